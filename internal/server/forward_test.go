package server

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect"

	violinv1 "violin/api/violin/v1"
	"violin/internal/access"
	"violin/internal/catalog"
	"violin/internal/topology"
	"violin/internal/trust"
)

// edged is a slice whose node a is forwarded to.
func edged(t *testing.T, slice, external string, forwards ...string) *topology.Topology {
	t.Helper()
	topo, err := topology.Parse(slice, fmt.Appendf(nil, `
version: 1
slice: %s
sites: {here: {hosts: [h1]}}
networks: {lan: {subnet: 10.0.0.0/24, gateway: nat, external: %s}, inner: {subnet: 10.1.0.0/24}}
nodes:
  a: {host: h1, image: i, memory: 64MiB, interfaces: [{network: lan, address: 10.0.0.1/24}], forwards: [%s]}
  b: {host: h1, image: i, memory: 64MiB, interfaces: [{network: lan, address: 10.0.0.2/24}]}
  c: {host: h1, image: i, memory: 64MiB, interfaces: [{network: inner, address: 10.1.0.1/24}]}
`, slice, external, `"`+strings.Join(forwards, `", "`)+`"`))
	if err != nil {
		t.Fatal(err)
	}
	return topo
}

// forwardsOf are a topology's forwards, with their nodes.
func forwardsOf(topo *topology.Topology) (all []string) {
	for _, n := range topo.Nodes {
		for _, f := range n.Forwards {
			all = append(all, n.Name+"="+f.String())
		}
	}
	return all
}

func TestFence(t *testing.T) {
	chosen := func(forwards ...string) (all []*violinv1.NodeForward) {
		for _, f := range forwards {
			node, forward, _ := strings.Cut(f, "=")
			all = append(all, &violinv1.NodeForward{Node: node, Forward: forward})
		}
		return all
	}
	const nat, closed = violinv1.Fence_FENCE_NAT, violinv1.Fence_FENCE_CLOSED
	for what, c := range map[string]struct {
		external string
		req      *violinv1.ForkRequest
		want     string // forwards, and whether the network is closed or held; or the error
	}{
		"a fork":           {"pass", &violinv1.ForkRequest{}, "a=127.0.0.1:0:80/tcp a=0.0.0.0:0:22/tcp"},
		"one of a held":    {"hold", &violinv1.ForkRequest{}, "a=127.0.0.1:0:80/tcp a=0.0.0.0:0:22/tcp hold"},
		"none":             {"pass", &violinv1.ForkRequest{NoForwards: true}, ""},
		"chosen":           {"pass", &violinv1.ForkRequest{Forwards: chosen("a=9090:80", "b=0:53/udp")}, "a=0.0.0.0:0:22/tcp a=127.0.0.1:9090:80/tcp b=127.0.0.1:0:53/udp"},
		"chosen only":      {"pass", &violinv1.ForkRequest{NoForwards: true, Forwards: chosen("a=9090:80")}, "a=127.0.0.1:9090:80/tcp"},
		"another protocol": {"pass", &violinv1.ForkRequest{Forwards: chosen("a=9090:80/udp")}, "a=127.0.0.1:0:80/tcp a=0.0.0.0:0:22/tcp a=127.0.0.1:9090:80/udp"},
		"closed":           {"hold", &violinv1.ForkRequest{Fence: closed}, "closed"},
		"a replay":         {"pass", &violinv1.ForkRequest{Paused: true}, "closed"},
		"looked into":      {"pass", &violinv1.ForkRequest{Paused: true, Forwards: chosen("a=2222:22")}, "a=127.0.0.1:2222:22/tcp closed"},
		"open":             {"pass", &violinv1.ForkRequest{Paused: true, Fence: nat}, "a=127.0.0.1:0:80/tcp a=0.0.0.0:0:22/tcp"},
		"of a closed":      {"closed", &violinv1.ForkRequest{}, "a=127.0.0.1:0:80/tcp a=0.0.0.0:0:22/tcp closed"},
		"to be opened":     {"closed", &violinv1.ForkRequest{Fence: nat}, `failed_precondition: network "lan" of snapshot s@1 is closed to the outside`},
		"no such node":     {"pass", &violinv1.ForkRequest{Forwards: chosen("d=9090:80")}, `invalid_argument: snapshot s@1 has no node "d"`},
		"no way in":        {"pass", &violinv1.ForkRequest{Forwards: chosen("c=9090:80")}, `invalid_argument: forward "9090:80" to node "c": the node has no IPv4 address on a network with a gateway`},
		"no forward":       {"pass", &violinv1.ForkRequest{Forwards: chosen("a=9090")}, `invalid_argument: forward "9090" to node "a": `},
	} {
		topo := edged(t, "s", c.external, "8080:80", "0.0.0.0:2222?:22")
		var got string
		if err := fence(topo, "s@1", c.req); err != nil {
			got = err.Error()
			if c.want == "" || !strings.HasPrefix(got, c.want) {
				t.Errorf("%s: %s, want %s", what, got, c.want)
			}
			continue
		}
		again, err := topology.Parse("again", topo.Marshal())
		if err != nil {
			t.Errorf("%s: %v", what, err)
			continue
		}
		parts := forwardsOf(again)
		if lan := again.Network("lan"); lan.Closed {
			parts = append(parts, "closed")
		} else if lan.Hold {
			parts = append(parts, "hold")
		}
		if inner := again.Network("inner"); inner.Closed {
			t.Errorf("%s: a network without a gateway is closed", what)
		}
		if got = strings.Join(parts, " "); got != c.want {
			t.Errorf("%s: %s, want %s", what, got, c.want)
		}
	}
}

func TestTakePorts(t *testing.T) {
	s := newServer(t, t.TempDir(), Storage{})
	if err := s.record(t.Context(), "one", func(r *catalog.Record) { r.Owner = "alice" }); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	taken := l.Addr().String()
	free, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	free.Close()
	first := edged(t, "one", "pass", "0:22", free.Addr().String()+":80")
	release, err := s.takePorts(operator(t), first, nil)
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(free.Addr().String())
	second := edged(t, "two", "pass", "0.0.0.0:"+port+":80")
	alice, bob := access.Caller{Name: "alice", Role: trust.Experimenter}, access.Caller{Name: "bob", Role: trust.Experimenter}
	for who, named := range map[*access.Caller]bool{{Role: trust.Operator}: true, &alice: true, &bob: false} {
		_, err := s.takePorts(access.With(t.Context(), *who), second, nil)
		if connect.CodeOf(err) != connect.CodeFailedPrecondition || strings.Contains(err.Error(), `slice "one" forwards it to node "a"`) != named || strings.Contains(err.Error(), "another slice has it") == named {
			t.Errorf("%+v: a port that is taken: %v", who, err)
		}
		if placed := placeError("two.yaml", []byte("version: 1\nnodes:\n  a: {forwards: [x]}\n"), err); !strings.Contains(placed.Error(), "two.yaml:3:18: ") {
			t.Errorf("it is told of in another place: %v", placed)
		}
	}
	// Of those that the same slice has, the new ones take the place.
	if again, err := s.takePorts(operator(t), edged(t, "one", "pass", port+":81"), nil); err != nil {
		t.Error(err)
	} else {
		again()
	}
	release()
	if release, err = s.takePorts(operator(t), second, nil); err != nil {
		t.Errorf("a port that is free again: %v", err)
	} else {
		release()
	}

	// What another program has is refused, unless another port will do, or it is what the
	// slice that is replaced has.
	_, port, _ = net.SplitHostPort(taken)
	third := edged(t, "three", "pass", port+":80")
	if _, err := s.takePorts(operator(t), third, nil); connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Errorf("a port that another program has: %v", err)
	}
	for what, c := range map[string]struct {
		topo     *topology.Topology
		replaces *slice
	}{
		"yields":   {edged(t, "three", "pass", port+"?:80"), nil},
		"replaces": {third, &slice{topo: third, entrances: entrances(third, false)}},
	} {
		release, err := s.takePorts(operator(t), c.topo, c.replaces)
		if err != nil {
			t.Errorf("%s: %v", what, err)
			continue
		}
		release()
	}
	l.Close()
	if len(s.coming) > 0 {
		t.Errorf("ports stay taken: %v", s.coming)
	}
}

func TestMayForward(t *testing.T) {
	experimenter := access.With(t.Context(), access.Caller{Name: "bob", Role: trust.Experimenter})
	for forward, want := range map[string]bool{
		"8080:80": true, "0:80": true, "127.0.0.9:1024:80": true, "8080?:80/udp": true,
		"1023:80": false, "0.0.0.0:8080:80": false, "192.0.2.1:0:80": false,
	} {
		topo := edged(t, "s", "pass", forward)
		if err := harmless(topo); err != nil {
			t.Error(err)
		}
		if err := mayForward(experimenter, topo); (err == nil) != want || err != nil && connect.CodeOf(err) != connect.CodePermissionDenied {
			t.Errorf("%s: %v", forward, err)
		}
		if err := mayForward(operator(t), topo); err != nil {
			t.Errorf("%s: an operator's: %v", forward, err)
		}
	}
	// Nor may they have more of a fork than that.
	s := newServer(t, t.TempDir(), Storage{})
	snap := &catalog.Snapshot{ID: "1", Slice: "s", Topology: edged(t, "s", "pass", "0.0.0.0:80:80").Marshal()}
	for who, want := range map[context.Context]bool{experimenter: false, operator(t): true} {
		if _, err := s.forkTopology(who, snap, &violinv1.ForkRequest{As: "f"}); (err == nil) != want {
			t.Errorf("a fork that listens at all addresses: %v", err)
		}
	}
}

// A fork has the edge that it was given wherever it is brought to, and its own snapshots'.
func TestTopologyFor(t *testing.T) {
	s := newServer(t, t.TempDir(), Storage{})
	snap := &catalog.Snapshot{ID: "1", Slice: "s", Topology: edged(t, "s", "pass", "8080:80").Marshal()}
	edge, err := s.forkTopology(operator(t), snap, &violinv1.ForkRequest{As: "f", Forwards: []*violinv1.NodeForward{{Node: "a", Forward: "9090:80"}}})
	if err != nil {
		t.Fatal(err)
	}
	own := &catalog.Snapshot{ID: "2", Slice: "f", Topology: edged(t, "f", "pass", "9191:80").Marshal()}
	for want, b := range map[string]*bringing{
		"a=127.0.0.1:9090:80/tcp": {snap: snap, as: "f", topology: edge},
		"a=127.0.0.1:9191:80/tcp": {snap: own, as: "f", topology: edge},
		"a=127.0.0.1:8080:80/tcp": {snap: snap, as: "s", topology: []byte{}},
	} {
		topo, err := s.topologyFor(b)
		if err != nil {
			t.Fatal(err)
		}
		if got := forwardsOf(topo); topo.Slice != b.as || !slices.Equal(got, []string{want}) {
			t.Errorf("%s of %s: %v, want %s", topo.Slice, b.snap.Ref(), got, want)
		}
	}
}
