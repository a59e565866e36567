// Package e2e runs the violin command on real QEMU, Open vSwitch and MPI: the
// demo's story, in short.
package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

const root = "../.."

// command runs violin and returns what it printed.
func command(t *testing.T, dirs []string, args ...string) ([]byte, error) {
	t.Helper()
	return violin(t.Context(), t, dirs, args...)
}

// violin does so until ctx ends, which interrupts it.
func violin(ctx context.Context, t *testing.T, dirs []string, args ...string) ([]byte, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(root, "bin/violin"), append(append([]string{}, dirs...), args...)...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Logf("violin %s: %v: %s", strings.Join(args, " "), err, stderr.Bytes())
	}
	return out, err
}

func must(t *testing.T, dirs []string, args ...string) []byte {
	t.Helper()
	out, err := command(t, dirs, args...)
	if err != nil {
		t.FailNow()
	}
	return out
}

// ours lists the processes whose command line names the run directory.
func ours(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, e := range entries {
		b, err := os.ReadFile(e)
		if err == nil && bytes.Contains(b, []byte(dir)) && !strings.HasPrefix(e, "/proc/"+strconv.Itoa(os.Getpid())+"/") {
			found = append(found, string(bytes.ReplaceAll(b, []byte{0}, []byte{' '})))
		}
	}
	return found
}

// begin gives a test directories of its own. At its end nothing may be left that
// names them.
func begin(t *testing.T) (dirs []string, runDir string) {
	t.Helper()
	if os.Getenv("VIOLIN_E2E") != "1" {
		t.Skip("runs real VMs, switches and MPI, as root: set VIOLIN_E2E=1")
	}
	state := os.Getenv("VIOLIN_STATE_DIR")
	if state == "" {
		state = "/var/lib/violin"
	}
	runDir, err := os.MkdirTemp("", "violin-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	// The images are shared; the store is the test's own.
	own := filepath.Join(runDir, "state")
	if err := os.MkdirAll(own, 0o700); err != nil {
		t.Fatal(err)
	}
	images, err := filepath.Abs(filepath.Join(state, "images"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(images, filepath.Join(own, "images")); err != nil {
		t.Fatal(err)
	}
	dirs = []string{"--run-dir", runDir, "--state-dir", own}
	t.Cleanup(func() {
		defer os.RemoveAll(runDir)
		if _, err := violin(context.Background(), t, dirs, "down", "--all"); err != nil {
			t.Error("down --all failed")
		}
		gone(t, runDir)
	})
	return dirs, runDir
}

// gone waits until no process is left that names the directory.
func gone(t *testing.T, dir string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); len(ours(t, dir)) > 0; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("left behind: %q", ours(t, dir))
		}
	}
}

func TestPair(t *testing.T) {
	dirs, runDir := begin(t)
	must(t, dirs, "up", filepath.Join(root, "examples/pair.yaml"))
	log := func() string {
		out, err := command(t, dirs, "exec", "pair/left", "--", "cat", "/var/log/run.log")
		if err != nil {
			return ""
		}
		return string(out)
	}
	await := func(what, text string) {
		t.Helper()
		for deadline := time.Now().Add(4 * time.Minute); !strings.Contains(log(), text); time.Sleep(500 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s: %q did not show in the program's log: %q", what, text, log())
			}
		}
	}
	await("the computation begins", "progress 3%")
	for _, mode := range []string{"precopy", "background"} {
		var snap struct {
			ID, FramesDropped string
			Nodes             []struct{ Name string }
		}
		if err := json.Unmarshal(must(t, dirs, "snapshot", "pair", "--mode", mode, "--output", "json"), &snap); err != nil {
			t.Fatal(err)
		}
		if snap.FramesDropped != "0" || len(snap.Nodes) != 2 {
			t.Errorf("%s: %s frames dropped, %d nodes", mode, snap.FramesDropped, len(snap.Nodes))
		}
		verified(t, dirs, "pair@"+snap.ID)
		for _, n := range slice(t, dirs, "").Nodes {
			kill(t, n.PID)
		}
		must(t, dirs, "restore", "pair@"+snap.ID)
		printed := string(must(t, dirs, "console", "pair/left", "--log"))
		if !strings.HasPrefix(printed, "[violin: started ") || !strings.Contains(printed, "violin: left is up") || !strings.Contains(printed, "[violin: restored ") {
			t.Errorf("%s: the console's log after a restore: %q", mode, printed)
		}
		if strings.Contains(log(), "picture ") {
			t.Errorf("%s: restored to after the computation's end", mode)
		}
	}
	tampered(t, dirs, filepath.Join(runDir, "state"), "pair@latest")
	await("the restored computation ends", "picture ")
	got := must(t, dirs, "exec", "pair/left", "--", "cat", "/var/lib/violin/mandelbrot.pgm")

	program, file := filepath.Join(runDir, "reference"), filepath.Join(runDir, "reference.pgm")
	if out, err := exec.Command("gcc", "-O2", "-DNO_MPI", "-o", program, filepath.Join(root, "examples/mandelbrot/mandelbrot.c")).CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v: %s", err, out)
	}
	topo, err := os.ReadFile(filepath.Join(root, "examples/pair.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	_, args, _ := strings.Cut(string(topo), " mandelbrot ")
	args, _, _ = strings.Cut(args, "-o")
	if out, err := exec.Command(program, append(strings.Fields(args), "-o", file)...).CombinedOutput(); err != nil {
		t.Fatalf("reference: %v: %s", err, out)
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("the picture after two restores (%d bytes) is not that of an undisturbed run (%d bytes)", len(got), len(want))
	}
}
