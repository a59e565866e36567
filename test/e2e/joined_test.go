package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"violin/internal/admission"
	"violin/internal/lab"
)

// far is a slice on hosts that have joined.
const far = `version: 1
slice: far
sites:
  west: {hosts: [alpha, beta]}
  east: {hosts: [gamma]}
wan:
  - {between: [west, east], delay: 10ms}
networks:
  lan: {subnet: 10.20.0.0/24}
nodes:
  n1:
    {host: alpha, image: mpi, memory: 96MiB, interfaces: [{network: lan, address: 10.20.0.1/24}], run: blocks run data raw,
     disks: [{name: data, size: 32MiB}, {name: raw, base: base.img}]}
  n2: {host: beta, image: mpi, memory: 96MiB, interfaces: [{network: lan, address: 10.20.0.2/24}]}
  n3: {host: gamma, image: mpi, memory: 96MiB, interfaces: [{network: lan, address: 10.20.0.3/24}]}
`

// process is a violin in the foreground, in a namespace that stands for a machine.
type process struct {
	cmd  *exec.Cmd
	done chan error

	mu  sync.Mutex
	log bytes.Buffer
}

// Write implements [io.Writer], for the log.
func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.Write(b)
}

func (p *process) said() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.String()
}

// spawn starts a violin on a host. It is told to end with the test, and must.
func spawn(t *testing.T, h *lab.Host, args ...string) *process {
	t.Helper()
	return launch(t, h.Start, args...)
}

// spawnWith does so with more environment.
func spawnWith(t *testing.T, h *lab.Host, env []string, args ...string) *process {
	t.Helper()
	return launch(t, func(cmd *exec.Cmd) error {
		cmd.Env = append(os.Environ(), env...)
		return h.Start(cmd)
	}, args...)
}

// launch starts a violin by start.
func launch(t *testing.T, start func(*exec.Cmd) error, args ...string) *process {
	t.Helper()
	program, err := filepath.Abs(filepath.Join(root, "bin/violin"))
	if err != nil {
		t.Fatal(err)
	}
	p := &process{cmd: exec.Command(program, args...), done: make(chan error, 1)}
	p.cmd.Stderr = p
	if err := start(p.cmd); err != nil {
		t.Fatal(err)
	}
	go func() {
		p.done <- p.cmd.Wait()
		close(p.done)
	}()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("violin %s: %s", strings.Join(args, " "), p.said())
		}
		p.stop(t)
	})
	return p
}

func (p *process) stop(t *testing.T) {
	t.Helper()
	_ = p.cmd.Process.Signal(os.Interrupt) // it may have ended; an agent's nodes end with it
	select {
	case <-p.done:
	case <-time.After(time.Minute):
		t.Error("a violin does not end")
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}

// await waits for something to come true.
func await(t *testing.T, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(90 * time.Second); !f(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("in vain: %s", what)
		}
	}
}

// A slice on three machines at two sites, whose agents are processes of their own: cut,
// restored, and cut while an agent's connection is lost.
func TestJoined(t *testing.T) {
	dirs, dir := begin(t)
	l, err := lab.New(t.Context(), lab.Config{
		Sites:  []lab.Site{{Name: "west", Hosts: []string{"alpha", "beta", "office"}}, {Name: "east", Hosts: []string{"gamma"}}},
		Links:  []lab.LinkConfig{{A: "west", B: "east", Shape: lab.Shape{Delay: 10 * time.Millisecond}}},
		Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	office, machines := l.Host("office"), []string{"alpha", "beta", "gamma"}
	for i, name := range machines {
		cable(t, office, l.Host(name), i)
	}
	server := spawn(t, office, append([]string{"server", "--listen", ":7000"}, dirs...)...)
	await(t, "the server serves", func() bool { return strings.Contains(server.said(), "msg=serving") })

	// One that has no token, or another's, does not join.
	bound := strings.TrimSpace(string(must(t, dirs, "token", "create", "--ttl", "5m", "--host", "alpha")))
	token := strings.TrimSpace(string(must(t, dirs, "token", "create", "--ttl", "5m")))
	args := func(i int, join string) []string {
		h := l.Host(machines[i])
		own := filepath.Join(dir, machines[i])
		return []string{"agent", "--join", join, "--name", machines[i], "--underlay", h.UnderlayDevice, "--underlay-address", h.UnderlayAddr.String(),
			"--run-dir", own, "--state-dir", filepath.Join(own, "state")}
	}
	var agents []*process
	for i, name := range machines {
		if name != "gamma" { // which has to fetch the image
			state := filepath.Join(dir, name, "state")
			if err := os.MkdirAll(state, 0o700); err != nil {
				t.Fatal(err)
			}
			images, err := filepath.EvalSymlinks(filepath.Join(dir, "state", "images"))
			if err == nil {
				err = os.Symlink(images, filepath.Join(state, "images"))
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		address := fmt.Sprintf("10.99.%d.1:7000", i)
		if i > 0 {
			refused := spawn(t, l.Host(name), args(i, bound+"@"+address)...)
			if err := <-refused.done; err == nil || !strings.Contains(refused.said(), "it is for host alpha") {
				t.Errorf("%v: %s", err, refused.said())
			}
		}
		if name == "gamma" {
			address = longWay(t, office, fmt.Sprintf("10.99.%d.1", i))
		}
		agents = append(agents, spawn(t, l.Host(name), args(i, token+"@"+address)...))
	}
	connected := func(want int) func() bool {
		return func() bool { return connected(t, dirs) == want }
	}
	await(t, "all agents are connected", connected(3))

	file := filepath.Join(dir, "far.yaml")
	shared := strings.Replace(far, "{host: gamma,", "{host: gamma, shares: [{name: tools, directory: tools}],", 1)
	if err := os.WriteFile(file, []byte(shared), 0o600); err != nil {
		t.Fatal(err)
	}
	tools := filepath.Join(dir, "tools")
	if err := os.Mkdir(tools, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tools, "told"), []byte("as it was\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "base.img"), blocksBase(), 0o600); err != nil {
		t.Fatal(err)
	}
	must(t, dirs, "up", file)
	if fetched, err := filepath.Glob(filepath.Join(dir, "*", "state", "files", "*")); err != nil || len(fetched) != 3 || slices.ContainsFunc(fetched, func(f string) bool { return !strings.Contains(f, "/gamma/") }) {
		t.Errorf("the one host that had no image has fetched %q, want the three files of it: %v", fetched, err)
	}
	for _, n := range []string{"far/n1", "far/n2", "far/n3"} {
		booted(t, dirs, n)
	}
	// A directory of the server's came with the node; what there is of it is of the snapshot.
	const read = `echo 3 >/proc/sys/vm/drop_caches; mkdir -p /run/tools; for d in /sys/block/vd*; do
		[ "$(cat $d/serial)" != tools ] || mountpoint -q /run/tools || mount -t squashfs -o ro /dev/${d##*/} /run/tools; done; cat /run/tools/told`
	if got := sh(t, dirs, "far/n3", read); got != "as it was" {
		t.Errorf("on a joined host the node is shown %q", got)
	}
	if err := os.RemoveAll(tools); err != nil {
		t.Fatal(err)
	}
	if printed := string(must(t, dirs, "console", "far/n3", "--log")); !strings.Contains(printed, "violin: n3 is up") {
		t.Errorf("the console's log of a node on a joined host: %q", printed)
	}
	// A count that goes on, and frames all the time.
	sh(t, dirs, "far/n1", "cat /proc/sys/kernel/random/uuid > /run/mark; (ping -i 0.2 10.20.0.3 >/run/ping 2>&1 &)")
	mark := sh(t, dirs, "far/n1", "cat /run/mark")
	blocksRun(t, dirs, "far/n1")
	sh(t, dirs, "far/n3", "head -c 16M /dev/urandom > /run/data && cd /run && md5sum data > sum")

	var snap struct{ ID string }
	if err := json.Unmarshal(must(t, dirs, "snapshot", "far", "--output", "json"), &snap); err != nil {
		t.Fatal(err)
	}
	verified(t, dirs, "far@"+snap.ID)
	sh(t, dirs, "far/n1", "echo later > /run/mark")
	for _, n := range slice(t, dirs, "far").Nodes {
		kill(t, n.PID)
	}
	var restored struct {
		Lazy  bool
		Notes []string
	}
	if err := json.Unmarshal(must(t, dirs, "restore", "far@"+snap.ID, "--output", "json"), &restored); err != nil || !restored.Lazy {
		t.Errorf("memory does not follow on joined hosts: %v, %q", err, restored.Notes)
	}
	// A host is cut off while it does: its node waits for what it does not have.
	plug(t, office, 2, false)
	await(t, "the loss is noticed", connected(2))
	plug(t, office, 2, true)
	await(t, "the agent is back", connected(3))
	if got := sh(t, dirs, "far/n1", "cat /run/mark"); got != mark {
		t.Errorf("the node remembers %q, and was restored to %q", got, mark)
	}
	if got := sh(t, dirs, "far/n3", read); got != "as it was" {
		t.Errorf("on a joined host the node is shown %q after a restore", got)
	}
	await(t, "frames go from site to site", func() bool { return strings.Contains(sh(t, dirs, "far/n1", "tail -1 /run/ping"), "time=") })
	right(t, dirs, "far/n1", "restored")
	if out := sh(t, dirs, "far/n3", "cd /run && md5sum -c sum"); !strings.Contains(out, "data: OK") {
		t.Errorf("the memory of a node that its host was cut off from: %s", out)
	}

	besides(t, dirs, dir, snap.ID, func() {
		_ = agents[0].cmd.Process.Signal(syscall.SIGTERM) // it leaves what runs
		<-agents[0].done
		await(t, "the agent is gone", connected(2))
		spawn(t, l.Host(machines[0]), args(0, token+"@10.99.0.1:7000")...)
		await(t, "the next agent is there", connected(3))
	})

	// The connection of an agent is lost between a cut's preparation and its instant.
	at := time.Now().Add(5 * time.Second)
	aborted := make(chan error, 1)
	go func() {
		_, err := violin(t.Context(), t, dirs, "snapshot", "far", "--at", at.Format(time.RFC3339Nano))
		aborted <- err
	}()
	time.Sleep(time.Until(at.Add(-time.Second)))
	plug(t, office, 2, false)
	await(t, "the loss is noticed", connected(2))
	plug(t, office, 2, true)
	status := (*exec.ExitError)(nil)
	if err := <-aborted; err == nil || !asExit(err, &status) || status.ExitCode() != 4 {
		t.Errorf("a snapshot without one of the hosts: %v, want exit status 4", err)
	}
	await(t, "the agent is back", connected(3))
	for _, n := range slice(t, dirs, "far").Nodes {
		if n.State != "NODE_STATE_RUNNING" {
			t.Errorf("node %s is %s after the abort", n.Name, n.State)
		}
	}
	lines := sh(t, dirs, "far/n1", "wc -l < /run/ping")
	await(t, "frames go on", func() bool { return count(t, sh(t, dirs, "far/n1", "wc -l < /run/ping")) > count(t, lines)+3 })
	if err := json.Unmarshal(must(t, dirs, "snapshot", "far", "--output", "json"), &snap); err != nil {
		t.Fatal(err)
	}
	verified(t, dirs, "far@"+snap.ID)
	refused(t, 5, dirs, "hosts", "rm", "gamma") // a slice runs there
	must(t, dirs, "down", "far")

	// Who is put out stays out, until there is a new token.
	must(t, dirs, "hosts", "rm", "gamma")
	if !connected(2)() || bytes.Contains(must(t, dirs, "hosts"), []byte("gamma")) {
		t.Error("gamma was put out, and is still there")
	}
	await(t, "gamma is refused", func() bool { return strings.Contains(server.said(), "host gamma has not joined, or was put out again") })
}

// besides has a fork of a slice beside it on the same hosts, with the same addresses.
func besides(t *testing.T, dirs []string, dir, id string, restart func()) {
	t.Helper()
	must(t, dirs, "fork", "far@"+id, "--as", "twin")
	sh(t, dirs, "twin/n1", "echo twin > /run/mark")
	if got := sh(t, dirs, "far/n1", "cat /run/mark"); got == "twin" {
		t.Error("a fork writes to the original's memory")
	}
	both := func(what string) {
		t.Helper()
		var cuts sync.WaitGroup
		for _, name := range []string{"far", "twin"} {
			cuts.Go(func() {
				out, err := violin(t.Context(), t, dirs, "snapshot", name, "--tag", what)
				if err != nil {
					t.Errorf("%s: snapshot of %s: %v: %s", what, name, err, out)
				}
			})
		}
		cuts.Wait()
		for _, name := range []string{"far", "twin"} {
			verified(t, dirs, name+"@"+what)
		}
	}
	both("together")

	// What is to come beside them must fit beside them: alone, it would.
	big := "version: 1\nslice: big\nsites: {east: {hosts: [gamma]}}\nnetworks:\n  lan: {subnet: 10.20.0.0/24}\nnodes:\n"
	for i := range admission.Ratio {
		big += fmt.Sprintf("  n%d: {host: gamma, image: mpi, memory: 96MiB, cpus: %d, interfaces: [{network: lan, address: 10.20.0.%d/24}]}\n", i, runtime.NumCPU(), i+1)
	}
	file := filepath.Join(dir, "big.yaml")
	if err := os.WriteFile(file, []byte(big), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(filepath.Join(root, "bin/violin"), append(slices.Clone(dirs), "up", file)...).CombinedOutput()
	if err == nil || !bytes.Contains(out, []byte("CPUs on host gamma, where 2 of at most")) {
		t.Errorf("a slice that does not fit: %v: %s", err, out)
	}

	pids := func() (all []string) {
		for _, name := range []string{"far", "twin"} {
			for _, n := range slice(t, dirs, name).Nodes {
				all = append(all, n.PID+" "+n.State)
			}
		}
		return all
	}
	before := pids()
	restart()
	if now := pids(); !slices.Equal(now, before) {
		t.Errorf("an agent has taken over %v, and there were %v", now, before)
	}
	both("adopted")

	right(t, dirs, "far/n1", "taken over")
	must(t, dirs, "restore", "twin@adopted")
	right(t, dirs, "twin/n1", "restored from what a taken-over agent captured")

	// A host is drained of all.
	must(t, dirs, "suspend", "--all", "--host", "gamma")
	must(t, dirs, "resume", "far")
	must(t, dirs, "down", "twin")
	sh(t, dirs, "far/n1", "ping -c 1 -W 5 10.20.0.3")
}

func count(t *testing.T, s string) int {
	t.Helper()
	n, err := strconv.Atoi(strings.TrimSpace(s))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func asExit(err error, to **exec.ExitError) bool {
	e, ok := err.(*exec.ExitError)
	*to = e
	return ok
}

// cable joins a machine with the office, apart from the underlay.
func cable(t *testing.T, office, machine *lab.Host, number int) {
	t.Helper()
	f, err := os.Open(machine.NamespacePath())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	address := func(name string, last byte) error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(10, 99, byte(number), last), Mask: net.CIDRMask(24, 32)}}); err != nil {
			return err
		}
		return netlink.LinkSetUp(link)
	}
	err = office.Do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = fmt.Sprintf("to%d", number)
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "office", PeerNamespace: netlink.NsFd(f.Fd())}); err != nil {
			return err
		}
		return address(attrs.Name, 1)
	})
	if err == nil {
		err = machine.Do(func() error { return address("office", 2) })
	}
	if err != nil {
		t.Fatal(err)
	}
}

// longWay is another address of the server in the office, which is 5 ms away each way.
func longWay(t *testing.T, office *lab.Host, address string) string {
	t.Helper()
	var l net.Listener
	if err := office.Do(func() (err error) {
		l, err = net.Listen("tcp", address+":7001")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			var away net.Conn
			if err := office.Do(func() (err error) {
				away, err = net.Dial("tcp", address+":7000")
				return err
			}); err != nil {
				near.Close()
				continue
			}
			go delayed(near, away)
			go delayed(away, near)
		}
	}()
	return l.Addr().String()
}

// delayed carries what comes from one connection to another, 5 ms later.
func delayed(from, to net.Conn) {
	type piece struct {
		at   time.Time
		data []byte
	}
	pieces := make(chan piece, 1024)
	go func() {
		defer to.Close()
		defer from.Close()
		for p := range pieces {
			time.Sleep(time.Until(p.at))
			if _, err := to.Write(p.data); err != nil {
				break
			}
		}
		for range pieces { // until the reader has noticed
		}
	}()
	defer close(pieces)
	for {
		b := make([]byte, 64<<10)
		n, err := from.Read(b)
		if n > 0 {
			pieces <- piece{time.Now().Add(5 * time.Millisecond), b[:n]}
		}
		if err != nil {
			return
		}
	}
}

// plug pulls the cable of a machine out of the office, or puts it in.
func plug(t *testing.T, office *lab.Host, number int, in bool) {
	t.Helper()
	err := office.Do(func() error {
		link, err := netlink.LinkByName(fmt.Sprintf("to%d", number))
		if err != nil {
			return err
		}
		if in {
			return netlink.LinkSetUp(link)
		}
		return netlink.LinkSetDown(link)
	})
	if err != nil {
		t.Fatal(err)
	}
}
