package e2e

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

type running struct {
	Name, Head, Origin string
	Suspended, Paused  bool
	Cutting            bool
	Nodes              []struct {
		Name, State, PID, Host string
		Epoch                  int
		Interfaces             []struct{ Address, MAC string }
	}
}

// slice is one of ps's slices, or the only one for "".
func slice(t *testing.T, dirs []string, name string) running {
	t.Helper()
	var list struct{ Slices []running }
	args := []string{"ps", "--output", "json"}
	if name != "" {
		args = append(args, name)
	}
	if err := json.Unmarshal(must(t, dirs, args...), &list); err != nil {
		t.Fatal(err)
	}
	if len(list.Slices) != 1 {
		t.Fatalf("%d slices %q", len(list.Slices), name)
	}
	return list.Slices[0]
}

func sh(t *testing.T, dirs []string, node, script string) string {
	t.Helper()
	return strings.TrimSpace(string(must(t, dirs, "exec", node, "--", "sh", "-c", script)))
}

// booted waits until a node's guest agent answers.
func booted(t *testing.T, dirs []string, node string) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(300 * time.Millisecond) {
		if _, err := command(t, dirs, "exec", node, "--", "true"); err == nil {
			return
		} else if time.Now().After(deadline) {
			t.Fatalf("%s did not come up", node)
		}
	}
}

func kill(t *testing.T, pid string) {
	t.Helper()
	n, err := strconv.Atoi(pid)
	if err != nil || n < 2 {
		t.Fatalf("no process: %q", pid)
	}
	if err := syscall.Kill(n, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

// A slice is forked beside itself, replayed, suspended and resumed.
func TestLife(t *testing.T) {
	dirs, runDir := begin(t)
	must(t, dirs, "up", filepath.Join(root, "examples/pair.yaml"))
	booted(t, dirs, "pair/left")
	booted(t, dirs, "pair/right")
	// Its clock goes wrong, as if it had been suspended for long.
	sh(t, dirs, "pair/left", "echo before >/tmp/mark; date -s @1000000000; (ping -i 0.005 right >/dev/null 2>&1 &)")
	boot := sh(t, dirs, "pair/left", "cat /proc/sys/kernel/random/boot_id")
	var one struct{ FramesRecorded string }
	if err := json.Unmarshal(must(t, dirs, "snapshot", "pair", "--tag", "one", "--output", "json"), &one); err != nil {
		t.Fatal(err)
	}

	// The fork has the same addresses, and neither sees the other.
	must(t, dirs, "fork", "pair@one", "--as", "whatif", "--new-genid", "--on", "left=there-1")
	original, fork := slice(t, dirs, "pair"), slice(t, dirs, "whatif")
	if fork.Nodes[0].Host != "there-1" || original.Nodes[0].Host != "here-1" {
		t.Errorf("the original is %+v, the fork %+v: its left node was to be elsewhere", original, fork)
	}
	for i, n := range original.Nodes {
		if f := fork.Nodes[i]; n.State != "NODE_STATE_RUNNING" || f.State != n.State || f.PID == n.PID || f.Interfaces[0] != n.Interfaces[0] {
			t.Errorf("original %+v, fork %+v", n, f)
		}
	}
	if fork.Origin != "pair" || fork.Head != original.Head {
		t.Errorf("the fork descends from %s@%s, the original from %s", fork.Origin, fork.Head, original.Head)
	}
	sh(t, dirs, "whatif/left", "echo fork >/tmp/mark")
	sh(t, dirs, "whatif/right", "ip addr add 10.20.0.77/24 dev $(ls /sys/class/net | grep -v lo | head -1)")
	for node, want := range map[string]string{"pair/left": "before", "whatif/left": "fork"} {
		if got := sh(t, dirs, node, "cat /tmp/mark; ping -c 1 -W 5 right >/dev/null && echo right; ping -c 1 -W 2 10.20.0.77 >/dev/null && echo 77; true"); strings.Fields(got)[0] != want ||
			!strings.Contains(got, "right") || strings.Contains(got, "77") != (want == "fork") {
			t.Errorf("%s: %q", node, got)
		}
	}

	// A replay stands still until it is continued.
	out := must(t, dirs, "replay", "pair@one", "--as", "autopsy")
	shown, _, _ := strings.Cut(string(out), "\n\n")
	if n := strings.Count(shown, "\n"); strconv.Itoa(n) != one.FramesRecorded { // a heading and a line a frame, or one line
		t.Errorf("in flight were %s frames, shown are %d:\n%s", one.FramesRecorded, n, out)
	}
	if _, err := command(t, dirs, "snapshot", "autopsy"); err == nil {
		t.Error("a snapshot was taken of what stands still at one")
	}
	for _, n := range slice(t, dirs, "autopsy").Nodes {
		if n.State != "NODE_STATE_PAUSED" {
			t.Errorf("replay: %s is %s", n.Name, n.State)
		}
	}
	must(t, dirs, "continue", "autopsy")
	if got := sh(t, dirs, "autopsy/left", "cat /tmp/mark; date +%Y"); got != "before\n2001" {
		t.Errorf("replay: %q", got)
	}
	must(t, dirs, "down", "autopsy")

	// A slice that cannot be snapshotted is not suspended, and what is left of it runs on.
	kill(t, fork.Nodes[1].PID)
	if _, err := command(t, dirs, "suspend", "whatif"); err == nil {
		t.Error("a slice with a dead node was suspended")
	}
	if n := slice(t, dirs, "whatif").Nodes[0]; n.State != "NODE_STATE_RUNNING" {
		t.Errorf("after a suspension that failed, %s is %s", n.Name, n.State)
	}
	must(t, dirs, "down", "whatif")

	// What is suspended takes nothing, survives its server, and goes on where it was.
	sh(t, dirs, "pair/left", "echo suspended >/tmp/mark")
	must(t, dirs, "suspend", "pair")
	for _, p := range ours(t, runDir) {
		if strings.HasPrefix(p, "qemu") {
			t.Errorf("a suspended slice still has %s", p)
		}
	}
	var version struct{ Server struct{ PID string } }
	if err := json.Unmarshal(must(t, dirs, "version", "--output", "json"), &version); err != nil {
		t.Fatal(err)
	}
	kill(t, version.Server.PID)
	gone(t, runDir)
	if s := slice(t, dirs, ""); !s.Suspended || s.Nodes[0].State != "NODE_STATE_SUSPENDED" {
		t.Errorf("ps: %+v", s)
	}
	if _, err := command(t, dirs, "up", filepath.Join(root, "examples/pair.yaml")); err == nil {
		t.Error("the name of a suspended slice was taken")
	}
	if _, err := command(t, dirs, "forget", "pair@latest"); err == nil {
		t.Error("what a suspended slice goes on from was forgotten")
	}
	must(t, dirs, "resume", "pair")
	if got := sh(t, dirs, "pair/left", "cat /tmp/mark /proc/sys/kernel/random/boot_id"); got != "suspended\n"+boot {
		t.Errorf("resumed: %q", got)
	}
	if _, err := command(t, dirs, "resume", "pair"); err == nil {
		t.Error("it was resumed twice")
	}
	if year := sh(t, dirs, "pair/left", "date +%Y"); year < "2026" {
		t.Errorf("resumed: its clock did not catch up: %s", year)
	}
	must(t, dirs, "forget", "pair@latest")
	protected(t, dirs, runDir)
}

// protected kills what the slice pair runs on, again and again: it comes back by
// itself, as often as it may.
func protected(t *testing.T, dirs []string, runDir string) {
	t.Helper()
	posted := make(chan string, 100)
	hook := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		var e struct{ Kind, Slice string }
		if err := json.NewDecoder(r.Body).Decode(&e); err != nil {
			t.Errorf("webhook: %v", err)
		}
		posted <- e.Kind + " " + e.Slice
	}))
	defer hook.Close()

	number := uint64(0)
	// await waits for an event after those that were waited for.
	await := func(kind string) {
		t.Helper()
		var seen []string
		for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(200 * time.Millisecond) {
			seen = nil
			out := must(t, dirs, "events", "pair", "--after", strconv.FormatUint(number, 10), "-o", "json")
			for line := range strings.Lines(string(out)) {
				var e struct{ Number, Kind, Text string }
				if err := json.Unmarshal([]byte(line), &e); err != nil {
					t.Fatal(err)
				}
				seen = append(seen, e.Kind+" "+e.Text)
				if e.Kind == kind {
					number, _ = strconv.ParseUint(e.Number, 10, 64)
					return
				}
			}
			if time.Now().After(deadline) {
				t.Fatalf("no event %s, but %q", kind, seen)
			}
		}
	}
	// back checks that the slice is where its checkpoint was.
	back := func() {
		t.Helper()
		for _, n := range slice(t, dirs, "pair").Nodes {
			if n.State != "NODE_STATE_RUNNING" {
				t.Errorf("rolled back: %s is %s", n.Name, n.State)
			}
		}
		if got := sh(t, dirs, "pair/left", "cat /tmp/mark; ls /tmp/late 2>/dev/null; true"); got != "suspended" {
			t.Errorf("rolled back: %q", got)
		}
	}
	must(t, dirs, "protect", "pair", "--every", "1h", "--max-rollbacks", "3", "--webhook", hook.URL)
	await("checkpoint")
	sh(t, dirs, "pair/left", "touch /tmp/late")

	kill(t, slice(t, dirs, "pair").Nodes[1].PID)
	await("node-died")
	await("rolled-back")
	back()

	sh(t, dirs, "pair/left", "touch /tmp/late")
	kill(t, pidOf(t, runDir, "violin"))
	gone(t, runDir)
	must(t, dirs, "ps")
	await("server-returned")
	await("rolled-back")
	back()

	sh(t, dirs, "pair/left", "touch /tmp/late")
	kill(t, pidOf(t, runDir, "ovs-vswitchd"))
	await("host-lost")
	await("rolled-back")
	back()

	kill(t, slice(t, dirs, "pair").Nodes[0].PID)
	await("node-died")
	await("gave-up")
	missing := map[string]bool{"node-died pair": true, "rolled-back pair": true, "host-lost pair": true, "gave-up pair": true}
	for len(missing) > 0 { // in whatever order
		select {
		case got := <-posted:
			delete(missing, got)
		case <-time.After(time.Minute):
			t.Fatalf("not posted: %v", missing)
		}
	}
}

// pidOf is a process of a program that names the run directory.
func pidOf(t *testing.T, dir, program string) string {
	t.Helper()
	entries, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		b, err := os.ReadFile(e)
		if name, _, _ := strings.Cut(string(b), "\x00"); err == nil && filepath.Base(name) == program && strings.Contains(string(b), dir) {
			return filepath.Base(filepath.Dir(e))
		}
	}
	t.Fatalf("no %s runs", program)
	return ""
}
