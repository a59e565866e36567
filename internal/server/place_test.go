package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	violinv1 "violin/api/violin/v1"
	"violin/internal/catalog"
	"violin/internal/events"
	"violin/internal/remote"
	"violin/internal/topology"
	"violin/internal/trust"
)

// serving is a server of a state directory that takes hosts in.
func serving(t *testing.T, state string) *Server {
	t.Helper()
	s, err := New(t.Context(), Config{StateDir: state, RunDir: t.TempDir(), Logger: slog.New(slog.DiscardHandler), Listen: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// machineRoom is where the agents of a test have what they keep.
type machineRoom struct {
	t   *testing.T
	dir string
}

// join has a host join that is never to run anything, and returns what ends its agent.
func (r machineRoom) join(s *Server, name, site string) (leave func()) {
	r.t.Helper()
	token, err := s.authority.NewToken(name, time.Hour)
	if err != nil {
		r.t.Fatal(err)
	}
	identity, err := trust.OpenIdentity(filepath.Join(r.dir, name), name)
	if err != nil {
		r.t.Fatal(err)
	}
	devices, err := net.Interfaces()
	if err != nil {
		r.t.Fatal(err)
	}
	device := slices.IndexFunc(devices, func(i net.Interface) bool { return len(i.HardwareAddr) == 6 })
	if device < 0 {
		r.t.Skip("this machine has no Ethernet device that an agent would name; it would not be touched")
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- remote.ServeHost(ctx, remote.HostConfig{
			Servers: []string{s.hub.Address()}, Token: token, Identity: identity, Dir: filepath.Join(r.dir, name, "run"), Device: devices[device].Name,
			Address: netip.MustParsePrefix("127.0.0.1/8"), Site: site, Version: "test", Logger: slog.New(slog.DiscardHandler),
		})
		close(ended)
	}()
	leave = func() {
		cancel()
		if err := <-ended; err != nil {
			r.t.Error(err)
		}
		r.await(s, name, false, nil)
	}
	r.t.Cleanup(func() { cancel(); <-ended })
	r.await(s, name, true, ended)
	return leave
}

// await waits until a host is connected, or is not. Its agent must not end meanwhile.
func (r machineRoom) await(s *Server, name string, connected bool, ended <-chan error) {
	r.t.Helper()
	for {
		changed := s.hub.Changed()
		if _, away := s.hub.Away(name); away != connected {
			return
		}
		select {
		case <-changed:
		case err := <-ended:
			r.t.Fatalf("the agent of %s: %v", name, err)
		case <-r.t.Context().Done():
			r.t.Fatal("the test is over")
		}
	}
}

// spread is a topology of nodes, at their hosts, that need 32 MiB and more.
func spread(t *testing.T, at string) *topology.Topology {
	t.Helper()
	text := "version: 1\nslice: spread\nsites:\n  west: {hosts: [alpha, beta]}\n  east: {hosts: [gamma]}\nwan:\n  - {between: [west, east], delay: 1ms}\nnetworks:\n  lan: {}\nnodes:\n"
	for i, host := range strings.Fields(at) {
		text += fmt.Sprintf("  n%d: {%s, image: mpi, memory: 32MiB, interfaces: [{network: lan}]}\n", i+1, host)
	}
	topo, err := topology.Parse("spread.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return topo
}

func hostsIn(topo *topology.Topology) string {
	var all []string
	for _, n := range topo.Nodes {
		all = append(all, n.Host+"/"+n.Site)
	}
	return strings.Join(all, " ")
}

// Where nodes go, of hosts that come, go, and are cordoned.
func TestPlaces(t *testing.T) {
	state := t.TempDir()
	s, room := serving(t, state), machineRoom{t, t.TempDir()}
	try := func(what string, topo *topology.Topology, w wish, want string) {
		t.Helper()
		a, err := s.admit(t.Context(), topo, nil, w)
		if err != nil {
			t.Errorf("%s: %v", what, err)
			return
		}
		a.release()
		if got := hostsIn(a.topo); got != want {
			t.Errorf("%s: %s, want %s", what, got, want)
		}
	}
	refuse := func(what string, topo *topology.Topology, w wish, code connect.Code, says ...string) {
		t.Helper()
		a, err := s.admit(t.Context(), topo, nil, w)
		err = elsewhere(err)
		if connect.CodeOf(err) != code || a != nil {
			t.Errorf("%s: %v, want %v", what, err, code)
			return
		}
		for _, text := range says {
			if !strings.Contains(err.Error(), text) {
				t.Errorf("%s: %v: it does not say %q", what, err, text)
			}
		}
	}
	all := spread(t, "host:alpha host:beta host:gamma")
	auto := wish{auto: true}

	try("in a lab, since no host has joined", all, wish{}, "alpha/west beta/west gamma/east")
	try("ditto, as wished", all, wish{on: map[string]string{"n1": "gamma"}}, "gamma/east beta/west gamma/east")
	try("ditto, in a site", spread(t, "site:west site:west site:east"), wish{}, "alpha/west beta/west gamma/east")
	refuse("ditto, where there is nothing", all, wish{on: map[string]string{"n1": "delta"}}, connect.CodeInvalidArgument, "no such host", "alpha, beta, gamma")

	room.join(s, "alpha", "")
	leave := room.join(s, "beta", "")
	room.join(s, "delta", "north")
	room.join(s, "Epsilon.example", "")
	refuse("one of its hosts has not joined", all, wish{}, connect.CodeFailedPrecondition, "gamma not", "--place auto")
	try("a host that has not joined is none", all, auto, "alpha/west beta/west delta/north")
	room.join(s, "gamma", "")()
	refuse("one is away", all, wish{}, connect.CodeFailedPrecondition, `"n3" on host gamma`, "not connected", "--place auto", "--on NODE=HOST")
	try("its node goes elsewhere", all, auto, "alpha/west beta/west delta/north")
	try("wishes, and another site than that of the topology", all, wish{on: map[string]string{"n3": "delta", "n1": "beta"}}, "beta/west beta/west delta/north")
	refuse("a wish that cannot be", all, wish{auto: true, on: map[string]string{"n3": "gamma"}}, connect.CodeFailedPrecondition, "gamma")

	try("in a site", spread(t, "host:alpha site:west site:west site:west"), wish{}, "alpha/west beta/west alpha/west beta/west")
	refuse("in a site where there is nothing", spread(t, "host:alpha site:east"), wish{}, connect.CodeResourceExhausted, "in site east", "host gamma: its agent is not connected")

	cordon := func(host string, on bool) {
		t.Helper()
		if _, err := s.CordonHost(operator(t), &violinv1.CordonHostRequest{Name: host, Cordoned: on}); err != nil {
			t.Fatal(err)
		}
	}
	cordon("alpha", true)
	cordon("alpha", true) // it is so already
	if _, err := s.CordonHost(operator(t), &violinv1.CordonHostRequest{Name: "zeta", Cordoned: true}); connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("cordon a host that has not joined: %v", err)
	}
	two := spread(t, "host:alpha host:alpha")
	refuse("cordoned", two, wish{}, connect.CodeFailedPrecondition, "cordoned")
	refuse("cordoned, and too much", two, wish{overcommit: true}, connect.CodeFailedPrecondition, "cordoned")
	try("to the other one of the site", two, auto, "beta/west beta/west")
	leave()
	try("to another site, there being none left", two, auto, "delta/north delta/north")
	cordon("delta", true)
	refuse("to no host", two, auto, connect.CodeResourceExhausted, `node "n1"`, "host alpha: it is cordoned", "host beta: its agent is not connected", "host delta: it is cordoned", "host gamma")

	// It outlives the server; who is put out takes it along.
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = serving(t, state)
	list, err := s.ListHosts(operator(t), &violinv1.ListHostsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var cordoned []string
	for _, h := range list.GetHosts() {
		if h.GetCordoned() {
			cordoned = append(cordoned, h.GetName())
		}
	}
	if !slices.Equal(cordoned, []string{"alpha", "delta"}) {
		t.Errorf("cordoned after another start: %q", cordoned)
	}
	if _, err := s.RemoveHost(operator(t), &violinv1.RemoveHostRequest{Name: "delta"}); err != nil {
		t.Fatal(err)
	}
	cordon("alpha", false)
	if left, err := s.catalog.Hosts(t.Context(), nil); err != nil || len(left) > 0 || !s.cordonedSince("delta").IsZero() {
		t.Errorf("cordoned yet: %v, %v", left, err)
	}
}

// A slice that is to be rolled back waits for hosts that are not lost yet, then for some
// with room, as long as that takes, and is told where its nodes would go.
func TestRollBackWaits(t *testing.T) {
	state, room := t.TempDir(), machineRoom{t, t.TempDir()}
	s := serving(t, state)
	kernel := filepath.Join(t.TempDir(), "vmlinuz")
	if err := os.WriteFile(kernel, []byte("kernel"), 0o600); err != nil {
		t.Fatal(err)
	}
	guarded := func(slice, memory string, dry bool) {
		t.Helper()
		topo, err := topology.Parse(slice, fmt.Appendf(nil, `version: 1
slice: %s
sites: {here: {hosts: [h]}}
networks: {lan: {subnet: 10.20.0.0/24}}
nodes:
  n: {host: h, kernel: %s, memory: %s, interfaces: [{network: lan, address: 10.20.0.1/24}]}
`, slice, kernel, memory))
		if err != nil {
			t.Fatal(err)
		}
		snap := &catalog.Snapshot{ID: "261123-120000-abcd", Slice: slice, Mode: "background", Epoch: 3, Topology: topo.Marshal()}
		if err := seal(t.Context(), s, topo, snap, nil); err != nil {
			t.Fatal(err)
		}
		if err := s.record(t.Context(), slice, func(r *catalog.Record) {
			r.Protection = &catalog.Protection{
				Every: time.Hour, Keep: 1, MaxRollbacks: 1, Window: time.Hour, Since: time.Now(), DryRun: dry, Head: snap.Ref(), HeadAt: time.Now(), HostTimeout: time.Second,
			}
		}); err != nil {
			t.Fatal(err)
		}
	}
	guarded("big", "8TiB", false)
	guarded("dry", "32MiB", true)
	for _, name := range []string{"h", "other"} {
		room.join(s, name, "")()
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	// The next server: one host comes, but not the one that the nodes were on.
	s = serving(t, state)
	room.join(s, "other", "")
	if kinds := happened(t, s, "dry", "would-roll-back"); !slices.Equal(kinds, []string{"server-returned", "would-roll-back"}) {
		t.Errorf("%q", kinds)
	}
	last := func(slice string) events.Event {
		found, _ := s.events.After(0, slice)
		return found[len(found)-1]
	}
	if e := last("dry"); len(e.Moves) != 1 || e.Moves[0].Node != "n" || e.Moves[0].From != "h" || e.Moves[0].To != "other" ||
		!strings.Contains(e.Text, "n is on other, and was on h (its agent has not connected") {
		t.Errorf("%+v", e)
	}
	happened(t, s, "big", "rollback-waits")
	if e := last("big"); !strings.Contains(e.Text, `node "n" (8192.0 GiB, 1 CPUs)`) || !strings.Contains(e.Text, "host other: it has") || !strings.Contains(e.Text, "host h: its agent has not connected") {
		t.Errorf("%+v", e)
	}
	// When another comes it is tried again, and what is short is told once more.
	room.join(s, "h", "")
	for deadline := time.Now().Add(time.Minute); !strings.Contains(last("big").Text, "host h: it has"); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%+v", last("big"))
		}
	}
	if p := s.protection("big"); len(p.Rollbacks) > 0 || p.GaveUp {
		t.Errorf("to wait counts as a rollback: %+v", p)
	}
	if _, err := s.Unprotect(t.Context(), &violinv1.UnprotectRequest{Slice: "big"}); err != nil {
		t.Fatal(err)
	}
}

func TestElsewhere(t *testing.T) {
	cause := errors.New("cause")
	if err := elsewhere(connect.NewError(connect.CodeResourceExhausted, cause)); strings.Contains(err.Error(), "--place") {
		t.Errorf("where there is no room, it is of no use: %v", err)
	}
	err := elsewhere(connect.NewError(connect.CodeFailedPrecondition, cause))
	if connect.CodeOf(err) != connect.CodeFailedPrecondition || !errors.Is(err, cause) || strings.Count(err.Error(), "failed_precondition") != 1 {
		t.Errorf("%v", err)
	}
}
