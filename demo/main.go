// Command demo tells Violin's story with the violin command itself: a slice of
// four nodes at two sites computes a picture with MPI, is snapshotted while it
// does, loses all its nodes, is restored, and finishes the very same picture.
//
// It ends with 0 only if everything that its table says held.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"image"
	"image/png"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

const (
	topology = "examples/mandelbrot.yaml"
	source   = "examples/mandelbrot/mandelbrot.c"
	slice    = "mandelbrot"
	master   = "mandelbrot/rank0"
	picture  = "/var/lib/violin/mandelbrot.pgm"

	// What must hold: the largest pause of a node's vCPUs, and the largest part of
	// the raw state that is stored.
	maxPause = 25 * time.Millisecond
	maxRatio = 0.35
)

func main() {
	violin := flag.String("violin", "bin/violin", "the violin command")
	state := flag.String("state", "/var/lib/violin", "where images and snapshots are kept")
	out := flag.String("o", "mandelbrot.png", "the picture to write")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *violin, *state, *out); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// story runs the violin command.
type story struct {
	violin string
	args   []string // before every verb
	began  time.Time
	rows   [][2]string
	failed []string
}

func run(ctx context.Context, violin, state, out string) (err error) {
	runDir, err := os.MkdirTemp("", "violin-demo-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(runDir)
	s := &story{violin: violin, args: []string{"--run-dir", runDir, "--state-dir", state}, began: time.Now()}
	// Whatever happens, nothing of the slice stays.
	defer func() {
		down, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		err = errors.Join(err, s.show(down, "down", "--all"), s.serverGone(down))
	}()

	if err := s.show(ctx, "up", topology); err != nil {
		return err
	}
	at, err := s.await(ctx, "the computation to be under way", func(p progress) bool { return p.percent >= 10 })
	if err != nil {
		return err
	}
	s.row("slice", "4 nodes, 4 hosts, 2 sites, 30 ms apart")
	s.row("snapshot taken", fmt.Sprintf("at %d %% of the computation", at.percent))
	if err := s.show(ctx, "snapshot", slice); err != nil {
		return err
	}
	snap, err := s.snapshot(ctx)
	if err != nil {
		return err
	}
	s.judge(snap)
	later, err := s.await(ctx, "the computation to go on", func(p progress) bool { return p.percent > at.percent+3 })
	if err != nil {
		return err
	}
	s.row("went on", fmt.Sprintf("to %d %%, undisturbed", later.percent))

	if err := s.fail(ctx); err != nil {
		return err
	}
	if err := s.show(ctx, "restore", slice+"@"+snap.ID); err != nil {
		return err
	}
	back, err := s.await(ctx, "the restored computation", func(progress) bool { return true })
	if err != nil {
		return err
	}
	s.check("restored in the middle of the computation", fmt.Sprintf("at %d %%", back.percent), back.percent > 0 && !back.done)
	if _, err := s.await(ctx, "the picture", func(p progress) bool { return p.done }); err != nil {
		return err
	}
	got, err := s.exec(ctx, "cat", picture)
	if err != nil {
		return err
	}
	want, err := reference(ctx, runDir)
	if err != nil {
		return err
	}
	s.check("picture after the restore", "byte for byte that of an undisturbed run", bytes.Equal(got, want))
	if err := writePNG(out, got); err != nil {
		return err
	}
	path, err := filepath.Abs(out)
	if err != nil {
		return err
	}
	s.row("picture", path)
	s.row("whole story", time.Since(s.began).Round(100*time.Millisecond).String())
	s.table()
	if len(s.failed) > 0 {
		return fmt.Errorf("did not hold: %s", strings.Join(s.failed, "; "))
	}
	return nil
}

func (s *story) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, s.violin, append(append([]string{}, s.args...), args...)...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 20 * time.Second
	// Ctrl-C is for the demo, which passes it on.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd
}

// show runs a command before the eyes of whoever watches.
func (s *story) show(ctx context.Context, args ...string) error {
	fmt.Printf("\n$ violin %s\n", strings.Join(args, " "))
	cmd := s.command(ctx, args...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("violin %s: %w", strings.Join(args, " "), err)
	}
	return nil
}

func (s *story) output(ctx context.Context, args ...string) ([]byte, error) {
	b, err := s.command(ctx, args...).Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s", err, bytes.TrimSpace(exit.Stderr))
		}
		return nil, fmt.Errorf("violin %s: %w", strings.Join(args, " "), err)
	}
	return b, nil
}

func (s *story) exec(ctx context.Context, command ...string) ([]byte, error) {
	return s.output(ctx, append([]string{"exec", master, "--"}, command...)...)
}

type progress struct {
	percent int
	done    bool
}

// await polls the program's own log until it has come far enough.
func (s *story) await(ctx context.Context, what string, enough func(progress) bool) (progress, error) {
	fmt.Printf("\nwaiting for %s ", what)
	ctx, cancel := context.WithTimeoutCause(ctx, 4*time.Minute, fmt.Errorf("%s did not come within 4 minutes", what))
	defer cancel()
	for last := -1; ; {
		if log, err := s.exec(ctx, "tail", "-n", "2", "/var/log/run.log"); err == nil {
			p := progress{percent: -1, done: bytes.Contains(log, []byte("picture "))}
			if i := bytes.LastIndex(log, []byte("progress ")); i >= 0 {
				_, _ = fmt.Sscanf(string(log[i:]), "progress %d%%", &p.percent)
			}
			if p.percent != last && p.percent >= 0 {
				last = p.percent
				fmt.Printf("%d%% ", p.percent)
			}
			if p.percent >= 0 && enough(p) || p.done {
				fmt.Println()
				return p, nil
			}
		}
		select {
		case <-ctx.Done():
			fmt.Println()
			return progress{}, context.Cause(ctx)
		case <-time.After(time.Second):
		}
	}
}

type snapshotNode struct{ Name, Pause, RawBytes, StoredBytes string }

type snapshot struct {
	ID, Skew, FramesHeld, FramesRecorded, FramesDropped, RawBytes, StoredBytes, Duration string
	Nodes                                                                                []snapshotNode
}

func (s *story) snapshot(ctx context.Context) (snapshot, error) {
	b, err := s.output(ctx, "snapshots", slice, "--output", "json")
	if err != nil {
		return snapshot{}, err
	}
	var list struct{ Snapshots []snapshot }
	if err := json.Unmarshal(b, &list); err != nil {
		return snapshot{}, fmt.Errorf("violin snapshots: %w", err)
	}
	if len(list.Snapshots) == 0 {
		return snapshot{}, errors.New("violin snapshots: the snapshot is not listed")
	}
	return list.Snapshots[len(list.Snapshots)-1], nil
}

// judge holds the snapshot's figures against what must hold.
func (s *story) judge(snap snapshot) {
	var longest time.Duration
	for _, n := range snap.Nodes {
		pause, err := time.ParseDuration(n.Pause)
		if err != nil {
			pause = time.Hour
		}
		longest = max(longest, pause)
	}
	s.check("longest vCPU pause", fmt.Sprintf("%.1f ms (at most %s)", float64(longest.Microseconds())/1000, maxPause), longest > 0 && longest <= maxPause)
	if skew, err := time.ParseDuration(snap.Skew); err == nil {
		s.row("skew of the cut instants", fmt.Sprintf("%.1f ms", float64(skew.Microseconds())/1000))
	}
	s.row("frames held, recorded", snap.FramesHeld+", "+snap.FramesRecorded)
	s.check("frames dropped by the cut", snap.FramesDropped, snap.FramesDropped == "0")
	var raw, stored float64
	_, rerr := fmt.Sscan(snap.RawBytes, &raw)
	_, serr := fmt.Sscan(snap.StoredBytes, &stored)
	s.check("stored of the raw state", fmt.Sprintf("%.1f of %.1f MiB, %.1f %% (at most %.0f %%)", stored/(1<<20), raw/(1<<20), 100*stored/raw, 100*maxRatio),
		rerr == nil && serr == nil && raw > 0 && stored <= maxRatio*raw)
}

// fail is the failure: all four nodes die at once.
func (s *story) fail(ctx context.Context) error {
	b, err := s.output(ctx, "ps", slice, "--output", "json")
	if err != nil {
		return err
	}
	var list struct {
		Slices []struct{ Nodes []struct{ Name, PID string } }
	}
	if err := json.Unmarshal(b, &list); err != nil {
		return fmt.Errorf("violin ps: %w", err)
	}
	killed := 0
	for _, sl := range list.Slices {
		for _, n := range sl.Nodes {
			var pid int
			if _, err := fmt.Sscan(n.PID, &pid); err != nil || pid < 2 {
				return fmt.Errorf("violin ps: node %s has no process", n.Name)
			}
			fmt.Printf("\n$ kill -9 %d    # %s", pid, n.Name)
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				return fmt.Errorf("kill %s: %w", n.Name, err)
			}
			killed++
		}
	}
	fmt.Println()
	s.row("failure", fmt.Sprintf("all %d QEMU processes killed", killed))
	return s.show(ctx, "ps")
}

// reference computes the picture on this machine, on one rank, with the
// arguments of the topology's run line.
func reference(ctx context.Context, dir string) ([]byte, error) {
	topo, err := os.ReadFile(topology)
	if err != nil {
		return nil, err
	}
	_, line, ok := strings.Cut(string(topo), " mandelbrot ")
	if !ok {
		return nil, fmt.Errorf("%s: no run line with the program in it", topology)
	}
	line, _, _ = strings.Cut(line, "\n")
	line, _, _ = strings.Cut(line, "-o")
	program, file := filepath.Join(dir, "reference"), filepath.Join(dir, "reference.pgm")
	if out, err := exec.CommandContext(ctx, "gcc", "-O2", "-DNO_MPI", "-o", program, source).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("compile %s: %w: %s", source, err, out)
	}
	fmt.Printf("\ncomputing the reference picture on this machine, on one rank\n")
	if out, err := exec.CommandContext(ctx, program, append(strings.Fields(line), "-o", file)...).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("compute the reference picture: %w: %s", err, out)
	}
	return os.ReadFile(file)
}

func writePNG(path string, pgm []byte) error {
	var w, h, depth int
	_, err := fmt.Sscanf(string(pgm[:min(len(pgm), 64)]), "P5\n%d %d\n%d\n", &w, &h, &depth)
	if header := fmt.Sprintf("P5\n%d %d\n%d\n", w, h, depth); err != nil || w <= 0 || h <= 0 || len(pgm) != len(header)+w*h {
		return errors.New("what the guest computed is no picture")
	}
	img := &image.Gray{Pix: pgm[len(pgm)-w*h:], Stride: w, Rect: image.Rect(0, 0, w, h)}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(png.Encode(f, img), f.Close())
}

// serverGone waits until the server that the first command started has left.
func (s *story) serverGone(ctx context.Context) error {
	for {
		if _, err := os.Stat(filepath.Join(s.args[1], "server.sock")); errors.Is(err, os.ErrNotExist) {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.New("the server has not left")
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func (s *story) row(what, value string) { s.rows = append(s.rows, [2]string{what, value}) }

func (s *story) check(what, value string, held bool) {
	mark := "ok    "
	if !held {
		mark = "FAILED"
		s.failed = append(s.failed, what+": "+value)
	}
	s.row(what, mark+" "+value)
}

func (s *story) table() {
	fmt.Printf("\nThe story\n")
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	for _, r := range s.rows {
		fmt.Fprintf(w, "  %s\t%s\n", r[0], r[1])
	}
	w.Flush()
}
