package e2e

import (
	"encoding/json"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Two nodes whose memory is mostly a file that they know the sum of.
const lazySlice = `version: 1
slice: lazy
sites:
  here: {hosts: [host-1]}
networks:
  lan: {subnet: 10.21.0.0/24}
nodes:
  a: {host: host-1, image: mpi, memory: 192MiB, interfaces: [{network: lan, address: 10.21.0.1/24}]}
  b: {host: host-1, image: mpi, memory: 192MiB, interfaces: [{network: lan, address: 10.21.0.2/24}]}
`

// What a lazy restore brings back is what was there: byte for byte, after another
// snapshot that had to wait for its end, and again. A page that is damaged stops the
// node that has it, by name, and no other.
func TestLazy(t *testing.T) {
	dirs, runDir := begin(t)
	state := filepath.Join(runDir, "state")
	file := filepath.Join(runDir, "lazy.yaml")
	if err := os.WriteFile(file, []byte(lazySlice), 0o600); err != nil {
		t.Fatal(err)
	}
	must(t, dirs, "up", file)
	sh := func(node, script string) (string, error) {
		out, err := command(t, dirs, "exec", "lazy/"+node, "--", "sh", "-c", script)
		return string(out), err
	}
	nodes := []string{"a", "b"}
	for _, n := range nodes {
		for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(time.Second) {
			out, err := sh(n, "head -c 24M /dev/urandom > /run/data && cd /run && md5sum data > sum && echo written")
			if err == nil && strings.Contains(out, "written") {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("node %s does not come up: %v", n, err)
			}
		}
	}
	check := func() {
		t.Helper()
		for _, n := range nodes {
			if out, err := sh(n, "cd /run && md5sum -c sum"); err != nil || !strings.Contains(out, "data: OK") {
				t.Errorf("node %s: %q, %v", n, out, err)
			}
		}
		if out, err := sh("a", "ping -c 1 -W 20 10.21.0.2"); err != nil {
			t.Errorf("a does not reach b: %q", out)
		}
	}
	type restored struct {
		Lazy  bool
		Notes []string
		Slice struct{ Nodes []struct{ PID string } }
	}
	restore := func(args ...string) (r restored) {
		t.Helper()
		if err := json.Unmarshal(must(t, dirs, append([]string{"restore", "--output", "json"}, args...)...), &r); err != nil {
			t.Fatal(err)
		}
		return r
	}
	must(t, dirs, "snapshot", "lazy", "--tag", "one")
	if r := restore("--lazy", "lazy@one"); !r.Lazy || len(r.Notes) > 0 {
		t.Fatalf("no lazy restore here: %q", r.Notes)
	}
	must(t, dirs, "snapshot", "lazy", "--tag", "two")
	check()
	for _, n := range nodes {
		if b, err := os.ReadFile(filepath.Join(state, "touched", "lazy", n)); err != nil || len(b) == 0 {
			t.Errorf("nothing was learnt of node %s: %v", n, err)
		}
	}
	restore("--lazy", "lazy@two")
	check()
	if r := restore("--lazy=false", "lazy@two"); r.Lazy {
		t.Error("a plain restore was lazy")
	}

	// A server that is killed takes what it serves with it, while memory still follows.
	r := restore("--lazy", "lazy@one")
	pids := ours(t, runDir)
	killServer(t, runDir)
	gone(t, runDir)
	if len(r.Slice.Nodes) != 2 || len(pids) == 0 {
		t.Errorf("%d nodes and %d processes before the kill", len(r.Slice.Nodes), len(pids))
	}

	// One bit, in a page that one of the nodes has.
	flipPage(t, state)
	out, err := command(t, dirs, "restore", "--lazy", "lazy@one", "--output", "json")
	t.Logf("restored with a damaged page: %v, %.200s", err, out)
	if err != nil {
		return // found before it ran: TestDamageIsNamed has the text
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(200 * time.Millisecond) {
		var ps struct {
			Slices []struct {
				Nodes []struct{ Name, State, Detail string }
			}
		}
		if err := json.Unmarshal(must(t, dirs, "ps", "--output", "json"), &ps); err != nil {
			t.Fatal(err)
		}
		dead := ""
		for _, s := range ps.Slices {
			for _, n := range s.Nodes {
				if n.State == "NODE_STATE_DEAD" {
					dead = n.Detail
				}
			}
		}
		if dead != "" {
			for _, want := range []string{"give it its memory", "RAM block", "pack packs/", "damaged"} {
				if !strings.Contains(dead, want) {
					t.Errorf("the node says %q, and nothing of %q", dead, want)
				}
			}
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("no node was stopped for the damaged page")
		}
	}
	// With something of the slice still there, the whole snapshot is looked at first.
	if out, err := command(t, dirs, "restore", "lazy@one"); err == nil {
		t.Errorf("a damaged snapshot was restored: %s", out)
	}
	must(t, dirs, "ps", "lazy")
}

// killServer kills the server that serves a run directory.
func killServer(t *testing.T, runDir string) {
	t.Helper()
	entries, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		b, err := os.ReadFile(e)
		args := strings.Split(string(b), "\x00")
		if err != nil || !strings.Contains(string(b), runDir) || filepath.Base(args[0]) != "violin" {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(e)))
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Fatal("no server found")
}

// flipPage flips a bit of the largest pack of pages, which is that of the first
// snapshot.
func flipPage(t *testing.T, state string) {
	t.Helper()
	var largest string
	var size int
	err := filepath.WalkDir(filepath.Join(state, "store", "packs"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		if err == nil && len(b) > size && b[9] == 'p' {
			largest, size = path, len(b)
		}
		return err
	})
	if err != nil || size == 0 {
		t.Fatalf("no pack of pages: %v", err)
	}
	b, err := os.ReadFile(largest)
	if err != nil {
		t.Fatal(err)
	}
	b[size/2] ^= 0x10
	if err := os.WriteFile(largest, b, 0o600); err != nil {
		t.Fatal(err)
	}
}
