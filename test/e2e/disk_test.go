package e2e

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// mix is what examples/blocks/blocks.c writes: word k of block i in generation g.
func mix(i, g, k uint64) uint64 {
	z := (i<<40 | g<<12 | k) + 0x9e3779b97f4a7c15
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

// blocksBase is a disk that the program finds its blocks on.
func blocksBase() (image []byte) {
	for i := range uint64(2048) {
		for k := range uint64(512) {
			image = binary.LittleEndian.AppendUint64(image, mix(i, 0, k))
		}
	}
	return image
}

// blocksRun waits until the program runs in a node.
func blocksRun(t *testing.T, dirs []string, node string) {
	t.Helper()
	if sh(t, dirs, node, "which blocks || true") == "" {
		t.Fatal("the image has no program blocks: make image")
	}
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(300 * time.Millisecond) {
		if _, err := command(t, dirs, "exec", node, "--", "blocks", "status"); err == nil {
			return
		} else if time.Now().After(deadline) {
			t.Fatalf("blocks does not run: %s", sh(t, dirs, node, "cat /var/log/run.log"))
		}
	}
}

// blocks is what the program says of itself.
type blocks struct {
	Writes, Holes, Reads uint64
	Wrong                map[string]uint64
}

func ask(t *testing.T, dirs []string, node, verb string) (b blocks) {
	t.Helper()
	if err := json.Unmarshal(must(t, dirs, "exec", node, "--", "blocks", verb), &b); err != nil {
		t.Fatal(err)
	}
	return b
}

// right has the program read everything back.
func right(t *testing.T, dirs []string, node, what string) blocks {
	t.Helper()
	b := ask(t, dirs, node, "check")
	for target, n := range b.Wrong {
		if n > 0 {
			t.Errorf("%s: %d blocks of the %s target are not as the program wrote them\n%s", what, n, target, sh(t, dirs, node, "tail -n 20 /var/log/run.log"))
		}
	}
	return b
}

// layers are the files that the slice's disks have on the hosts.
func layers(t *testing.T, runDir string) (files []string) {
	t.Helper()
	if err := filepath.Walk(runDir, func(path string, _ os.FileInfo, err error) error {
		if err == nil && strings.HasSuffix(path, ".qcow2") {
			files = append(files, path)
		}
		return nil // what goes away meanwhile is none
	}); err != nil {
		t.Fatal(err)
	}
	return files
}

// A guest writes to its disks all the time and knows what must be in each block. It is
// restored from several of a row of snapshots, and each has its disks of the very
// instant of its memory; also on another host, which only has the disks' base.
// VIOLIN_SNAPSHOTS says how many snapshots the row has.
func TestDisks(t *testing.T) {
	dirs, runDir := begin(t)
	row := 6
	if s := os.Getenv("VIOLIN_SNAPSHOTS"); s != "" {
		var err error
		if row, err = strconv.Atoi(s); err != nil || row < 4 {
			t.Fatalf("VIOLIN_SNAPSHOTS=%s: want 4 or more", s)
		}
	}
	base := filepath.Join(runDir, "base.img")
	if err := os.WriteFile(base, blocksBase(), 0o600); err != nil {
		t.Fatal(err)
	}
	source, err := os.ReadFile(filepath.Join(root, "examples/blocks.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	const line = "{name: raw, size: 8MiB}"
	if strings.Count(string(source), line) != 1 {
		t.Fatalf("examples/blocks.yaml: %q is not there once", line)
	}
	file := filepath.Join(runDir, "blocks.yaml")
	if err := os.WriteFile(file, []byte(strings.ReplaceAll(string(source), line, "{name: raw, base: base.img}")), 0o600); err != nil {
		t.Fatal(err)
	}
	must(t, dirs, "up", file)
	const node = "blocks/writer"
	booted(t, dirs, node)
	blocksRun(t, dirs, node)

	type shot struct {
		id            string
		before, after uint64 // writes when it was asked for, and when it had been taken
	}
	var shots []shot
	var longest time.Duration
	for n := range row {
		if n == 2 { // one is given up: the VM goes on, and the next has what it would have had
			for _, after := range []time.Duration{80 * time.Millisecond, 300 * time.Millisecond, 500 * time.Millisecond} {
				ctx, cancel := context.WithTimeout(t.Context(), after)
				_, _ = violin(ctx, t, dirs, "snapshot", "blocks", "--tag", fmt.Sprintf("given-up-%d", after.Milliseconds()))
				cancel()
				time.Sleep(200 * time.Millisecond)
			}
		}
		mode := "background"
		if n%4 == 3 {
			mode = "precopy"
		}
		var snap struct {
			ID    string
			Nodes []struct {
				Pause string
				Disks []struct{ SizeBytes, StoredBytes string }
			}
		}
		before := ask(t, dirs, node, "status").Writes
		if err := json.Unmarshal(must(t, dirs, "snapshot", "blocks", "--mode", mode, "--output", "json"), &snap); err != nil {
			t.Fatal(err)
		}
		pause, err := time.ParseDuration(snap.Nodes[0].Pause)
		if err != nil {
			t.Fatal(err)
		}
		if disks := snap.Nodes[0].Disks; len(disks) != 2 || disks[1].SizeBytes != "8388608" || disks[0].StoredBytes == "0" {
			t.Errorf("its disks are told as %v", disks)
		}
		if mode == "background" {
			longest = max(longest, pause)
		}
		shots = append(shots, shot{snap.ID, before, ask(t, dirs, node, "status").Writes})
		// Stored, merged, of a snapshot that was given up, under way, on top.
		if files := layers(t, runDir); len(files) > 2*5 {
			t.Errorf("after %d snapshots there are %d layers of two disks: %q", n+1, len(files), files)
		}
	}
	t.Logf("%d snapshots; the longest pause of background ones was %v", row, longest)
	right(t, dirs, node, "the VM that the snapshots were taken of")

	// One in the row is forgotten, and what it alone needed goes.
	must(t, dirs, "forget", "blocks@"+shots[1].id)
	must(t, dirs, "store", "gc")
	must(t, dirs, "store", "check")

	restored := func(dirs []string, s shot, what string) {
		t.Helper()
		must(t, dirs, "restore", "blocks@"+s.id)
		b := right(t, dirs, node, what)
		if b.Writes < s.before {
			t.Errorf("%s: the program goes on at write %d, and had done %d before", what, b.Writes, s.before)
		}
		t.Logf("%s: taken between writes %d and %d, checked at %d", what, s.before, s.after, b.Writes)
	}
	restored(dirs, shots[0], "the first")
	restored(dirs, shots[row/2], "the one in the middle")
	// What it becomes from there is a snapshot, too.
	var snap struct{ ID string }
	on := ask(t, dirs, node, "status").Writes
	if err := json.Unmarshal(must(t, dirs, "snapshot", "blocks", "--output", "json"), &snap); err != nil {
		t.Fatal(err)
	}
	restored(dirs, shots[row-1], "the last")
	restored(dirs, shot{id: snap.ID, before: on}, "one that descends from the one in the middle")
	if out := sh(t, dirs, node, "kill $(pidof blocks); sleep 0.5; umount /mnt && e2fsck -fn /dev/vdb 2>&1; echo status $?"); !strings.HasSuffix(out, "status 0") {
		t.Errorf("the file system is not whole: %s", out)
	}

	export := filepath.Join(runDir, "export")
	must(t, dirs, "export", "blocks@"+shots[row/2].id, "--file", export)
	must(t, dirs, "down", "blocks")
	if files := layers(t, runDir); len(files) > 0 {
		t.Errorf("the slice is gone and has left %q", files)
	}
	other, _ := begin(t)
	must(t, other, "import", export)
	restored(other, shots[row/2], "on another host")
}
