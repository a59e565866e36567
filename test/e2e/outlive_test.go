package e2e

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"violin/internal/lab"
)

// The ledger on two machines of their own: two nodes where the agent is killed, one
// elsewhere.
const ledgerFar = `version: 1
slice: ledger
sites: {west: {hosts: [alpha, beta]}}
networks:
  lan: {subnet: 10.30.0.0/24, gateway: {nat: 10.30.0.254}}
nodes:
  alice: {host: alpha, image: mpi, memory: 96MiB, interfaces: [{network: lan, address: 10.30.0.1/24}], run: ledger run -r 50}
  bob:   {host: alpha, image: mpi, memory: 96MiB, interfaces: [{network: lan, address: 10.30.0.2/24}], run: ledger run -r 50}
  carol: {host: beta,  image: mpi, memory: 96MiB, interfaces: [{network: lan, address: 10.30.0.3/24}], run: ledger run -r 50}
`

// Where an agent is killed in a cut, and how that is taken. A snapshot that was sealed
// stays. Some are enough in general; VIOLIN_KILLS is a regular expression of those that
// are wanted besides: "." for all.
var killSteps = []struct {
	at     string
	args   []string
	sealed bool
	always bool

	cancelled bool // the command is killed while the nodes wait for their instant
}{
	{at: "prepare"}, {at: "alice/close"}, {at: "alice/settle"}, {at: "alice/stop", always: true}, {at: "alice/flush"}, {at: "alice/flip"},
	{at: "alice/capture"}, {at: "alice/resume", always: true}, {at: "alice/open"}, {at: "alice/drain"}, {at: "alice/store"}, {at: "collect"},
	{at: "commit", sealed: true},
	{at: "abort", cancelled: true},
	{at: "prepare", args: precopy}, {at: "alice/stop", args: precopy}, {at: "alice/flip", args: precopy}, {at: "alice/capture", args: precopy},
	{at: "alice/resume", args: precopy}, {at: "alice/drain", args: precopy},
}

var precopy = []string{"--mode", "precopy"}

// outlive is a slice on joined hosts whose agent is killed.
type outlive struct {
	*soak
	lab    *lab.Lab
	office *lab.Host // the server's
	server *process
	hosts  []string
	join   []string // by host
	agents map[string]*process
}

func (o *outlive) start(i int, env ...string) *process {
	o.t.Helper()
	name := o.hosts[i]
	h, own := o.lab.Host(name), filepath.Join(o.runDir, name)
	p := spawnWith(o.t, h, env, "agent", "--join", o.join[i], "--name", name, "--underlay", h.UnderlayDevice,
		"--underlay-address", h.UnderlayAddr.String(), "--run-dir", own, "--state-dir", filepath.Join(own, "state"))
	o.agents[name] = p
	return p
}

// kill ends an agent, and waits until that has been noticed.
func (o *outlive) kill(name string, how os.Signal) {
	o.t.Helper()
	_ = o.agents[name].cmd.Process.Signal(how) // it may have ended
	<-o.agents[name].done
	o.await(1)
}

// await waits until so many agents are connected.
func (o *outlive) await(want int) {
	o.t.Helper()
	await(o.t, fmt.Sprintf("%d agents are connected", want), func() bool { return connected(o.t, o.dirs) == want })
}

// running are the nodes' processes; all must run. (One that does not say at once how it
// is, such as while QEMU ends a capture, passes for dead.)
func (o *outlive) running() (pids map[string]string) {
	o.t.Helper()
	await(o.t, "all nodes run", func() bool {
		pids = map[string]string{}
		for _, n := range slice(o.t, o.dirs, "ledger").Nodes {
			if n.State == "NODE_STATE_RUNNING" {
				pids[n.Name] = n.PID
			}
		}
		return len(pids) == len(o.nodes)
	})
	return pids
}

// unharmed checks that the nodes are those that they were, and that nothing was lost
// or doubled.
func (o *outlive) unharmed(what string, before map[string]string) {
	o.t.Helper()
	if now := o.running(); !maps.Equal(now, before) {
		o.t.Errorf("%s: nodes are processes %v, and were %v", what, now, before)
	}
	o.freeze()
	o.rest(what)
	o.thaw()
}

func (o *outlive) snapshot() string {
	o.t.Helper()
	var snap struct{ ID string }
	if err := json.Unmarshal(must(o.t, o.dirs, "snapshot", "ledger", "--output", "json"), &snap); err != nil {
		o.t.Fatal(err)
	}
	verified(o.t, o.dirs, "ledger@"+snap.ID)
	return snap.ID
}

// newOutlive has the ledger run, on two machines that have joined a third. It returns
// the machines' devices as they were before.
func newOutlive(t *testing.T) (_ *outlive, devices map[string][]string) {
	t.Helper()
	return newOutliveBy(t, func(o *outlive) { o.serve() }, "7000")
}

// newOutliveBy is newOutlive with servers at ports, which serve starts.
func newOutliveBy(t *testing.T, serve func(*outlive), ports ...string) (_ *outlive, devices map[string][]string) {
	t.Helper()
	dirs, dir := begin(t)
	l, err := lab.New(t.Context(), lab.Config{
		Sites:  []lab.Site{{Name: "west", Hosts: []string{"alpha", "beta", "office"}}},
		Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	o := &outlive{
		soak: &soak{t: t, dirs: dirs, runDir: dir, own: filepath.Join(dir, "state"), nodes: []string{"alice", "bob", "carol"}, lossy: nowhere},
		lab:  l, hosts: []string{"alpha", "beta"}, agents: map[string]*process{},
	}
	o.office = l.Host("office")
	for i, name := range o.hosts {
		cable(t, o.office, l.Host(name), i)
		if err := os.MkdirAll(filepath.Join(dir, name, "state"), 0o700); err != nil {
			t.Fatal(err)
		}
		images, err := filepath.EvalSymlinks(filepath.Join(dir, "state", "images"))
		if err == nil {
			err = os.Symlink(images, filepath.Join(dir, name, "state", "images"))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	serve(o)
	token := strings.TrimSpace(string(must(t, dirs, "token", "create", "--ttl", "1h")))
	for i := range o.hosts {
		o.join = append(o.join, token+"@"+addresses(i, ports))
		o.start(i)
	}
	o.await(2)
	devices = o.devices()
	file := filepath.Join(dir, "ledger.yaml")
	if err := os.WriteFile(file, []byte(ledgerFar), 0o600); err != nil {
		t.Fatal(err)
	}
	must(t, dirs, "up", file)
	o.underWay()
	return o, devices
}

// addresses are those of the servers at ports, as a machine with a cable to the office
// reaches them.
func addresses(i int, ports []string) string {
	var all []string
	for _, port := range ports {
		all = append(all, fmt.Sprintf("10.99.%d.1:%s", i, port))
	}
	return strings.Join(all, ",")
}

// serve starts the server.
func (o *outlive) serve(env ...string) {
	o.t.Helper()
	server := spawnWith(o.t, o.office, env, append([]string{"server", "--listen", ":7000"}, o.dirs...)...)
	await(o.t, "the server serves", func() bool { return strings.Contains(server.said(), "msg=serving") })
	o.server = server
}

// An agent is killed, idle and in cuts, and another takes over: the nodes are the same
// processes, no transfer between them is lost or doubled, the next snapshot succeeds, and
// nothing is left of a slice that was taken down while there was no agent.
func TestOutlive(t *testing.T) {
	o, devices := newOutlive(t)
	dirs, dir, l := o.dirs, o.runDir, o.lab
	pids := o.running()

	t.Log("killed while idle")
	o.kill("alpha", os.Kill)
	second := exec.Command(filepath.Join(root, "bin/violin"), "agent", "--join", o.join[0], "--name", "alpha", "--underlay", l.Host("alpha").UnderlayDevice,
		"--underlay-address", l.Host("alpha").UnderlayAddr.String(), "--run-dir", filepath.Join(dir, "alpha"), "--state-dir", filepath.Join(dir, "alpha/state"))
	o.start(0)
	o.await(2)
	if out, err := second.CombinedOutput(); err == nil || !bytes.Contains(out, []byte("an agent runs here already")) {
		t.Errorf("a second agent of one directory: %v: %s", err, out)
	}
	o.unharmed("killed while idle", pids)
	sh(t, dirs, "ledger/alice", "ping -c 1 -W 10 10.30.0.254") // the way out, which is in the agent
	last := o.snapshot()

	wanted := regexp.MustCompile(cmp.Or(os.Getenv("VIOLIN_KILLS"), "^$"))
	for _, k := range killSteps {
		what := strings.Join(append([]string{k.at}, k.args...), " ")
		if !k.always && !wanted.MatchString(what) || t.Failed() {
			continue
		}
		began := time.Now()
		o.kill("alpha", os.Kill)
		p := o.start(0, "VIOLIN_TEST_KILL_AT="+k.at)
		o.await(2)
		type result struct {
			out []byte
			err error
		}
		taken := make(chan result, 1)
		go func() {
			ctx, args := t.Context(), append([]string{"snapshot", "ledger", "--output", "json"}, k.args...)
			if k.cancelled {
				at := time.Now().Add(5 * time.Second)
				args = append(args, "--at", at.Format(time.RFC3339Nano))
				var cancel context.CancelFunc
				ctx, cancel = context.WithDeadline(ctx, at.Add(-time.Second))
				defer cancel()
			}
			out, err := violin(ctx, t, dirs, args...)
			if k.cancelled {
				<-p.done // it told nobody
			}
			taken <- result{out, err}
		}()
		select {
		case <-p.done:
		case r := <-taken:
			t.Fatalf("%s: the agent was not killed: %s, %v; it said\n%s", what, r.out, r.err, p.said())
		}
		o.start(0)
		r := <-taken
		var exit *exec.ExitError
		switch {
		case k.sealed && r.err != nil:
			t.Errorf("%s: %v", what, r.err)
		case !k.sealed && !k.cancelled && (!errors.As(r.err, &exit) || exit.ExitCode() != 4):
			t.Errorf("%s: %s, %v; want exit status 4", what, r.out, r.err)
		}
		o.await(2)
		o.unharmed("killed at "+what, pids)
		last = o.snapshot()
		t.Logf("killed at %s: %s", what, time.Since(began).Round(time.Millisecond))
	}

	must(t, dirs, "restore", "ledger@"+last)
	o.underWay()
	o.unharmed("restored", o.running())

	// Taken down while there is no agent: it was told to end, and has left what runs.
	o.kill("alpha", syscall.SIGTERM)
	if len(o.vms()) != len(o.nodes) {
		t.Errorf("of %d nodes these run without the agent: %q", len(o.nodes), o.vms())
	}
	if _, err := violin(t.Context(), t, dirs, "down", "ledger"); err != nil {
		t.Logf("down without an agent: %v", err)
	}
	o.start(0)
	o.await(2)
	await(t, "nothing runs any more", func() bool {
		return len(o.vms()) == 0 && !slices.ContainsFunc(ours(t, dir), func(c string) bool {
			return strings.Contains(c, "ovs") || strings.Contains(c, " keep ")
		})
	})
	await(t, "no device is left", func() bool { return maps.EqualFunc(o.devices(), devices, slices.Equal) })
	for _, name := range o.hosts {
		if left, err := filepath.Glob(filepath.Join(dir, name, "*", "*")); err != nil || slices.ContainsFunc(left, func(f string) bool { return !strings.Contains(f, "/state/") }) {
			t.Errorf("files are left of host %s: %q, %v", name, left, err)
		}
	}
}

// vms are the QEMUs there are.
func (o *outlive) vms() []string {
	return slices.DeleteFunc(ours(o.t, o.runDir), func(c string) bool { return !strings.HasPrefix(c, "qemu-system") })
}

// devices are the network devices of the hosts, with their addresses.
func (o *outlive) devices() map[string][]string {
	o.t.Helper()
	all := map[string][]string{}
	for _, name := range o.hosts {
		err := o.lab.Host(name).Do(func() error {
			links, err := netlink.LinkList()
			if err != nil {
				return err
			}
			for _, link := range links {
				a := link.Attrs()
				d := a.Name + " " + a.HardwareAddr.String()
				addrs, err := netlink.AddrList(link, netlink.FAMILY_V4)
				if err != nil {
					return err
				}
				for _, addr := range addrs {
					d += " " + addr.IPNet.String()
				}
				all[name] = append(all[name], d)
			}
			slices.Sort(all[name])
			return nil
		})
		if err != nil {
			o.t.Fatal(err)
		}
	}
	return all
}
