package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"violin/internal/lab"
)

// gatewayOf is the way out of the slice's network. It is where n1 is.
const gatewayOf = "10.20.0.254"

// elsewhere is the slice far on machines that die, or are cut off.
type elsewhere struct {
	t    *testing.T
	dirs []string
	*farm
}

// happening is an event, as far as it is looked at here.
type happening struct {
	Kind, Text string
	Moves      []struct{ Node, From, To, Why string }
}

// events are those of the slice since it was protected last.
func (e *elsewhere) events() (all []happening) {
	e.t.Helper()
	for line := range bytes.Lines(must(e.t, e.dirs, "events", "far", "--output", "json")) {
		var h happening
		if err := json.Unmarshal(line, &h); err != nil {
			e.t.Fatal(err)
		}
		if h.Kind == "protected" {
			all = nil
		}
		all = append(all, h)
	}
	return all
}

// happened waits for an event.
func (e *elsewhere) happened(kind string) (found happening) {
	e.t.Helper()
	await(e.t, kind, func() bool {
		all := e.events()
		i := slices.IndexFunc(all, func(h happening) bool { return h.Kind == kind })
		if i >= 0 {
			found = all[i]
		}
		return i >= 0
	})
	return found
}

// hosts are where the nodes are, all of which must run.
func (e *elsewhere) hosts() map[string]string {
	e.t.Helper()
	at := map[string]string{}
	for _, n := range slice(e.t, e.dirs, "far").Nodes {
		if at[n.Name] = n.Host; n.State != "NODE_STATE_RUNNING" {
			e.t.Errorf("node %s is %s", n.Name, n.State)
		}
	}
	return at
}

// protect has the slice protected and a checkpoint taken.
func (e *elsewhere) protect() {
	e.t.Helper()
	must(e.t, e.dirs, "protect", "far", "--every", "1h", "--host-timeout", "3s")
	e.happened("checkpoint")
}

// goesOn checks that the nodes know what they knew, and go on sending each other what they
// sent: each once.
func (e *elsewhere) goesOn(what string, marks map[string]string) {
	e.t.Helper()
	e.t.Log(what)
	for node, want := range marks {
		if got := sh(e.t, e.dirs, "far/"+node, "cat /run/mark"); got != want {
			e.t.Errorf("%s: %s remembers %q, want %q", what, node, got, want)
		}
	}
	last := func() string { return sh(e.t, e.dirs, "far/n1", "tail -1 /run/ping") }
	began := last()
	await(e.t, what+": the ping from n1 to n3 goes on", func() bool { s := last(); return s != began && strings.Contains(s, "time=") })
	for _, pair := range [][2]string{{"n1", "10.20.0.2"}, {"n2", "10.20.0.3"}, {"n3", "10.20.0.1"}, {"n2", gatewayOf}} {
		out := sh(e.t, e.dirs, "far/"+pair[0], "ping -c 3 -i 0.3 -W 10 "+pair[1])
		if !strings.Contains(out, " 3 received") && !strings.Contains(out, " 3 packets received") || strings.Contains(out, "DUP") {
			e.t.Errorf("%s: from %s to %s: %s", what, pair[0], pair[1], out)
		}
	}
}

// processes are those of one machine.
func processes(t *testing.T, h *lab.Host) (pids []int) {
	t.Helper()
	var ns syscall.Stat_t
	if err := syscall.Stat(h.NamespacePath(), &ns); err != nil {
		t.Fatal(err)
	}
	all, err := filepath.Glob("/proc/[0-9]*/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range all {
		var st syscall.Stat_t
		if syscall.Stat(p, &st) != nil || st.Ino != ns.Ino {
			continue
		}
		pid, err := strconv.Atoi(strings.Split(p, "/")[2])
		if err == nil && pid != os.Getpid() {
			pids = append(pids, pid)
		}
	}
	return pids
}

// vms are the QEMUs of one machine.
func vms(t *testing.T, h *lab.Host) (n int) {
	t.Helper()
	for _, pid := range processes(t, h) {
		if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); err == nil && strings.HasPrefix(string(b), "qemu") {
			n++
		}
	}
	return n
}

// die ends all that runs on a machine, at once.
func (e *elsewhere) die(host string) {
	e.t.Helper()
	await(e.t, host+" is dead", func() bool {
		pids := processes(e.t, e.lab.Host(host))
		for _, pid := range pids {
			_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended
		}
		return len(pids) == 0
	})
}

// Nodes come back on other machines than they were on: after a suspension in which theirs
// died, as wished, and by themselves when theirs is cut off or dies. They keep what they
// know and their addresses, and nobody hears of what still runs where they were.
func TestElsewhere(t *testing.T) {
	dirs, dir := begin(t)
	f := newFarm(t, dirs, dir)
	e := &elsewhere{t: t, dirs: dirs, farm: f}
	for _, name := range f.names {
		f.start(name)
	}
	f.await(3)
	file := filepath.Join(dir, "far.yaml")
	outside := strings.Replace(far, "subnet: 10.20.0.0/24", "subnet: 10.20.0.0/24, gateway: {nat: "+gatewayOf+"}", 1)
	if err := os.WriteFile(file, []byte(outside), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "base.img"), blocksBase(), 0o600); err != nil {
		t.Fatal(err)
	}
	must(t, dirs, "up", file)
	marks := map[string]string{}
	for _, n := range []string{"n1", "n2", "n3"} {
		booted(t, dirs, "far/"+n)
		marks[n] = sh(t, dirs, "far/"+n, "cat /proc/sys/kernel/random/uuid | tee /run/mark")
	}
	blocksRun(t, dirs, "far/n1")
	sh(t, dirs, "far/n1", "(ping -i 0.2 10.20.0.3 >/run/ping 2>&1 &)")

	must(t, dirs, "suspend", "far")
	e.die("gamma")
	f.await(2)
	refused(t, 5, dirs, "restore", "far@latest") // as it was, it cannot be
	must(t, dirs, "hosts", "cordon", "alpha")
	refused(t, 5, dirs, "resume", "far", "--on", "n3=alpha")
	must(t, dirs, "resume", "far")
	if at := e.hosts(); at["n1"] != "beta" || at["n2"] != "beta" || at["n3"] != "beta" {
		t.Errorf("with alpha cordoned and gamma dead, the nodes are at %v", at)
	}
	e.goesOn("resumed on one host", marks)
	right(t, dirs, "far/n1", "resumed on another host, its disks have come along")
	var snap struct {
		ID    string
		Nodes []struct{ Name, Host string }
	}
	if err := json.Unmarshal(must(t, dirs, "snapshot", "far", "--output", "json"), &snap); err != nil {
		t.Fatal(err)
	}
	for _, n := range snap.Nodes {
		if n.Host != "beta" {
			t.Errorf("the snapshot has %s at %s", n.Name, n.Host)
		}
	}
	verified(t, dirs, "far@"+snap.ID)

	// Where one wants them.
	f.start("gamma")
	f.await(3)
	must(t, dirs, "hosts", "uncordon", "alpha")
	must(t, dirs, "restore", "far@"+snap.ID, "--on", "n1=alpha,n3=gamma")
	if at := e.hosts(); at["n1"] != "alpha" || at["n2"] != "beta" || at["n3"] != "gamma" {
		t.Errorf("asked to be elsewhere, the nodes are at %v", at)
	}
	e.goesOn("restored as wished", marks)

	// Gamma is cut off from the server, and runs on: the others still reach it.
	e.protect()
	sh(t, dirs, "far/n1", "echo later > /run/mark")
	plug(t, f.office, 2, false)
	back := e.happened("rolled-back")
	if len(back.Moves) != 1 || back.Moves[0].Node != "n3" || back.Moves[0].From != "gamma" || !strings.Contains(back.Moves[0].Why, "not connected") {
		t.Errorf("rolled back: %+v", back)
	}
	if n := vms(t, f.lab.Host("gamma")); n != 1 {
		t.Errorf("gamma was to be cut off with a node that runs, and has %d", n)
	}
	e.goesOn("gamma cut off", marks)
	plug(t, f.office, 2, true)
	f.await(3)
	await(t, "what gamma ran is stopped", func() bool { return vms(t, f.lab.Host("gamma")) == 0 })

	// A whole machine dies in the middle of it.
	e.protect()
	at := e.hosts()
	sh(t, dirs, "far/n2", "echo later > /run/mark")
	e.die("beta")
	back = e.happened("rolled-back")
	for _, m := range back.Moves {
		if m.From != "beta" || m.To == "beta" {
			t.Errorf("rolled back: %+v", back)
		}
	}
	for node, host := range e.hosts() {
		if host == "beta" || at[node] != "beta" && host != at[node] {
			t.Errorf("beta is dead, and %s is at %s, where it was at %s", node, host, at[node])
		}
	}
	e.goesOn("beta dead", marks)
	f.start("beta") // finds what was left of it, and clears it away
	f.await(3)
	must(t, dirs, "unprotect", "far")
	must(t, dirs, "down", "far")
}
