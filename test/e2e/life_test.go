package e2e

import (
	"encoding/json"
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
	Nodes              []struct {
		Name, State, PID string
		Interfaces       []struct{ Address, MAC string }
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
	must(t, dirs, "snapshot", "pair", "--tag", "one")

	// The fork has the same addresses, and neither sees the other.
	must(t, dirs, "fork", "pair@one", "--as", "whatif", "--new-genid")
	original, fork := slice(t, dirs, "pair"), slice(t, dirs, "whatif")
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
	if !strings.Contains(string(out), "ICMPv4") {
		t.Errorf("no ping was shown in flight:\n%s", out)
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
}
