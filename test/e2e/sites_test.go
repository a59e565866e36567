package e2e

import (
	"cmp"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"violin/internal/lab"
	"violin/internal/metadata/etcdtest"
)

// The ledger on three machines at two sites.
const ledgerSites = `version: 1
slice: ledger
sites: {west: {hosts: [alpha, beta]}, east: {hosts: [gamma]}}
wan: [{between: [west, east], delay: 10ms}]
networks:
  lan: {subnet: 10.30.0.0/24}
nodes:
  alice: {host: alpha, image: mpi, memory: 96MiB, interfaces: [{network: lan, address: 10.30.0.1/24}], run: ledger run -r 30}
  bob:   {host: beta,  image: mpi, memory: 96MiB, interfaces: [{network: lan, address: 10.30.0.2/24}], run: ledger run -r 30}
  carol: {host: gamma, image: mpi, memory: 96MiB, interfaces: [{network: lan, address: 10.30.0.3/24}], run: ledger run -r 30}
`

// apart is how far it is from site to site, each way.
const apart = 10 * time.Millisecond

// sites is the ledger, three machines that have joined two servers, and an etcd of three
// members, all of them processes of their own with addresses of their own at two sites.
// Who speaks to whom shows a certificate.
type sites struct {
	*outlive
	net     *management
	cluster *etcdtest.Cluster
	etcds   []string
	servers []string
	process map[string]*process // by server
	options map[string][]string // that reach it from this machine
}

func newSites(t *testing.T) *sites {
	t.Helper()
	dirs, dir := begin(t)
	l, err := lab.New(t.Context(), lab.Config{
		Sites:  []lab.Site{{Name: "west", Hosts: []string{"alpha", "beta"}}, {Name: "east", Hosts: []string{"gamma"}}},
		Links:  []lab.LinkConfig{{A: "west", B: "east", Shape: lab.Shape{Delay: apart}}},
		Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	s := &sites{
		outlive: &outlive{
			soak: &soak{t: t, dirs: dirs, runDir: dir, own: filepath.Join(dir, "state"), nodes: []string{"alice", "bob", "carol"}, lossy: nowhere},
			lab:  l, hosts: []string{"alpha", "beta", "gamma"}, agents: map[string]*process{},
		},
		servers: []string{"server1", "server2"}, etcds: []string{"etcd1", "etcd2", "etcd3"},
		process: map[string]*process{}, options: map[string][]string{},
	}
	s.net = manage(t, l, []lab.Site{
		{Name: "west", Hosts: []string{"alpha", "beta", "server1", "etcd1", "etcd3"}},
		{Name: "east", Hosts: []string{"gamma", "server2", "etcd2"}},
	}, apart)
	var places []etcdtest.Place
	for _, name := range s.etcds {
		places = append(places, etcdtest.Place{Address: s.net.address(name), Start: s.net.host(name).Start})
	}
	s.cluster = etcdtest.StartAt(t, places...)
	images, err := filepath.EvalSymlinks(filepath.Join(dir, "state", "images"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range slices.Concat(s.hosts, s.servers) {
		state := filepath.Join(dir, name, "state")
		s.options[name] = []string{"--run-dir", filepath.Join(dir, name), "--state-dir", state}
		if err := errors.Join(os.MkdirAll(state, 0o700), os.Symlink(images, filepath.Join(state, "images"))); err != nil {
			t.Fatal(err)
		}
	}
	var addresses []string
	for _, name := range s.servers {
		s.serve(name)
		addresses = append(addresses, s.net.address(name).String()+":7000")
	}
	s.leader()
	token := strings.TrimSpace(string(must(t, s.dirs, "token", "create", "--ttl", "1h")))
	for i := range s.hosts {
		s.join = append(s.join, token+"@"+strings.Join(addresses, ","))
		s.start(i)
	}
	s.await(len(s.hosts))
	file := filepath.Join(dir, "ledger.yaml")
	if err := os.WriteFile(file, []byte(ledgerSites), 0o600); err != nil {
		t.Fatal(err)
	}
	must(t, s.dirs, "up", file)
	s.underWay()
	return s
}

// serve starts a server.
func (s *sites) serve(name string, env ...string) {
	s.t.Helper()
	at := s.net.address(name).String() + ":7000"
	args := append([]string{
		"server", "--listen", at, "--advertise", at, "--name", name, "--store", filepath.Join(s.runDir, "shared", "store"),
		"--etcd", strings.Join(s.cluster.Endpoints(), ","), "--etcd-ca", s.cluster.CA, "--etcd-cert", s.cluster.Cert, "--etcd-key", s.cluster.Key,
	}, s.options[name]...)
	p := spawnWith(s.t, s.net.host(name), append(env, "VIOLIN_PASSPHRASE=the office's"), args...)
	await(s.t, name+" serves", func() bool { return strings.Contains(p.said(), "msg=serving") })
	s.process[name] = p
}

// leader waits until a server leads, and has what follows speak to that one.
func (s *sites) leader() (name string) {
	s.t.Helper()
	program := filepath.Join(root, "bin/violin")
	await(s.t, "a server leads", func() bool {
		for _, name = range s.servers {
			if exec.Command(program, append(slices.Clone(s.options[name]), "hosts")...).Run() == nil {
				s.dirs = s.options[name]
				return true
			}
		}
		return false
	})
	return name
}

func (s *sites) other(server string) string {
	if server == s.servers[0] {
		return s.servers[1]
	}
	return s.servers[0]
}

// recovered checks that all is as it was, whoever leads now: the nodes are those that they
// were, in one epoch, no transfer between them is lost or doubled, new snapshots are
// whole, and one can be taken.
func (s *sites) recovered(what string, pids map[string]string, before []string) {
	s.t.Helper()
	s.leader()
	s.await(len(s.hosts))
	await(s.t, "no cut is under way", func() bool { return !slice(s.t, s.dirs, "ledger").Cutting })
	s.unharmed(what, pids)
	s.oneEpoch(what)
	for _, id := range s.snapshots()[len(before):] {
		verified(s.t, s.dirs, "ledger@"+id)
	}
	s.snapshot()
}

// outcome holds what the caller of a snapshot was told against what there is. Who was told
// nothing of it, such as by a server that was killed, may find it or not.
func (s *sites) outcome(what string, err error, before []string) {
	s.t.Helper()
	s.leader()
	taken := len(s.snapshots()) - len(before)
	var exit *exec.ExitError
	switch aborted := errors.As(err, &exit) && exit.ExitCode() == 4; {
	case taken < 0 || taken > 1, err == nil && taken != 1, aborted && taken != 0:
		s.t.Errorf("%s: the caller was told %v, and there are %d new snapshots", what, err, taken)
	}
	s.t.Logf("%s: %v, %d new", what, err, taken)
}

// parted takes a snapshot, and keeps two from each other from before its instant on, for
// longer than a lease.
func (s *sites) parted(what string, pids map[string]string, part func() (join func())) {
	s.t.Helper()
	s.leader()
	before := s.snapshots()
	at := time.Now().Add(4 * time.Second)
	taken := make(chan error, 1)
	go func() {
		_, err := violin(s.t.Context(), s.t, s.dirs, "snapshot", "ledger", "--at", at.Format(time.RFC3339Nano))
		taken <- err
	}()
	time.Sleep(time.Until(at.Add(-500 * time.Millisecond)))
	join := part()
	time.Sleep(12 * time.Second)
	join()
	err := <-taken
	s.outcome(what, err, before)
	s.recovered(what, pids, before)
}

// Two sites with all that the control plane consists of. Any two of those that speak to
// each other are kept from it during a cut; the leader is killed in cuts. What comes of
// it is a snapshot or none, and nothing is lost, doubled, or stuck. In general it is some
// of the pairs and steps; VIOLIN_PAIRS and VIOLIN_KILLS are regular expressions of those
// that are wanted besides: "." for all.
func TestSites(t *testing.T) {
	s := newSites(t)
	pids := s.running()
	s.snapshot()

	wanted := regexp.MustCompile(cmp.Or(os.Getenv("VIOLIN_PAIRS"), "^$"))
	run := func(what string, always bool, part func() (join func())) {
		if (always || wanted.MatchString(what)) && !t.Failed() {
			began := time.Now()
			s.parted(what, pids, part)
			t.Logf("%s parted: %s", what, time.Since(began).Round(time.Millisecond))
		}
	}
	var pairs [][2]string
	for i, server := range s.servers {
		for _, host := range s.hosts {
			pairs = append(pairs, [2]string{server, host})
		}
		for _, etcd := range s.etcds {
			pairs = append(pairs, [2]string{server, etcd})
		}
		for _, other := range s.servers[i+1:] {
			pairs = append(pairs, [2]string{server, other})
		}
	}
	for i, etcd := range s.etcds {
		for _, other := range s.etcds[i+1:] {
			pairs = append(pairs, [2]string{etcd, other})
		}
	}
	always := []string{"server1 gamma", "etcd1 etcd2"}
	for _, p := range pairs {
		what := p[0] + " " + p[1]
		run(what, slices.Contains(always, what), func() func() { return s.net.part(t, p[0], p[1]) })
	}
	// A server that nobody hears: another leads, and what it says itself does not count.
	run("the leader from all", false, func() (join func()) {
		leader := s.leader()
		var joins []func()
		for _, other := range slices.Concat(s.hosts, s.etcds, []string{s.other(leader)}) {
			joins = append(joins, s.net.part(t, leader, other))
		}
		return func() {
			for _, join := range joins {
				join()
			}
		}
	})
	lost := map[[2]int]bool{}
	s.lossy = func(from, to int) bool { return lost[[2]int{min(from, to), max(from, to)}] }
	for i, host := range s.hosts {
		for k, other := range s.hosts[i+1:] {
			run("underlays of "+host+" "+other, host == "alpha" && other == "gamma", func() func() {
				lost[[2]int{i, i + 1 + k}] = true // a datagram between them may be, from now on
				if err := s.lab.Part(host, other, true); err != nil {
					t.Error(err)
				}
				return func() {
					if err := s.lab.Part(host, other, false); err != nil {
						t.Error(err)
					}
				}
			})
		}
	}

	wanted = regexp.MustCompile(cmp.Or(os.Getenv("VIOLIN_KILLS"), "^$"))
	for _, k := range serverKills {
		what := strings.Join(append([]string{k.at}, k.args...), " ")
		if k.agent != "" || what != "cut" && !wanted.MatchString(what) || t.Failed() {
			continue
		}
		began := time.Now()
		s.succeed(k.at)
		before := s.snapshots()
		_, err := violin(t.Context(), t, s.dirs, append([]string{"snapshot", "ledger"}, k.args...)...)
		if err == nil && k.at != "ended" {
			t.Fatalf("%s: the leader was not killed", what)
		}
		what = "the leader was killed at " + what
		s.outcome(what, err, before)
		if taken := len(s.snapshots()) > len(before); taken != k.sealed {
			t.Errorf("%s: sealed %t, want %t", what, taken, k.sealed)
		}
		s.recovered(what, pids, before)
		t.Logf("%s: %s", what, time.Since(began).Round(time.Millisecond))
	}

	s.leader()
	must(t, s.dirs, "restore", "ledger@"+s.snapshot())
	s.underWay()
	s.unharmed("restored", s.running())
	must(t, s.dirs, "store", "check", "--read-data")
	must(t, s.dirs, "down", "ledger")
}

// succeed has a leader that is to be killed at a step of a cut, and another that stands
// by for it.
func (s *sites) succeed(step string) {
	s.t.Helper()
	leader := s.leader()
	next := s.other(leader)
	for _, name := range []string{next, leader} { // that which leads is the last to end
		_ = s.process[name].cmd.Process.Signal(syscall.SIGTERM) // it may have been killed
		<-s.process[name].done
		if name == next {
			s.serve(next, "VIOLIN_TEST_KILL_AT="+step)
		}
	}
	if got := s.leader(); got != next {
		s.t.Fatalf("%s leads, not %s", got, next)
	}
	s.serve(leader)
	s.await(len(s.hosts))
}
