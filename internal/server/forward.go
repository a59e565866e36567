package server

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"connectrpc.com/connect"

	violinv1 "violin/api/violin/v1"
	"violin/internal/access"
	"violin/internal/agent"
	"violin/internal/catalog"
	"violin/internal/gateway"
	"violin/internal/topology"
)

// entrance is a forward with what it is a part of.
type entrance struct {
	topology.Forward        // of one that listens: where it does, and no other port will do
	node             string // that it leads to
	index            int    // among the node's
	network          string
	to               netip.AddrPort
	host             string // that has joined, where it listens; empty for this machine
}

// spec is the forward as its gateway is told of it.
func (e entrance) spec() gateway.Forward {
	return gateway.Forward{Protocol: e.Protocol, Listen: e.Listen, Yield: e.Yield, To: e.to}
}

// entrances are the topology's forwards, in its order, on hosts that have joined or on
// this machine.
func entrances(topo *topology.Topology, joined bool) []entrance {
	var all []entrance
	for i := range topo.Nodes {
		n := &topo.Nodes[i]
		network, address := topo.Entrance(n)
		if network == nil {
			continue
		}
		for k, f := range n.Forwards {
			e := entrance{Forward: f, node: n.Name, index: k, network: network.Name, to: netip.AddrPortFrom(address, f.Port)}
			if joined {
				e.host = topo.GatewayHost(network.Name)
			}
			all = append(all, e)
		}
	}
	return all
}

// forwardsBy are those that a network's gateway has, in their order.
func forwardsBy(all []entrance, network string) []gateway.Forward {
	var forwards []gateway.Forward
	for _, e := range all {
		if e.network == network {
			forwards = append(forwards, e.spec())
		}
	}
	return forwards
}

// takePorts makes sure that a slice's forwards can listen, and keeps other slices from
// their ports until the slice has come up or has failed. A port that is taken is refused,
// also one of another program's. What replaces has is free: it is stopped first; it may be nil.
func (s *Server) takePorts(ctx context.Context, topo *topology.Topology, replaces *slice) (release func(), err error) {
	joined, err := s.placed(topo)
	if err != nil {
		return nil, err
	}
	all := entrances(topo, joined)
	coming := &slice{topo: topo, entrances: all}
	s.mu.Lock()
	for _, e := range all {
		if who, other := s.holderLocked(e, topo.Slice); who != nil {
			s.mu.Unlock()
			return nil, taken(topo, e, s.nameOf(ctx, who, other))
		}
	}
	s.coming[coming] = true
	s.mu.Unlock()
	release = func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.coming, coming)
	}
	if err := s.probePorts(ctx, topo, all, replaces); err != nil {
		release()
		return nil, err
	}
	return release, nil
}

// holderLocked is another slice with a forward at the same port, and that forward.
func (s *Server) holderLocked(e entrance, name string) (*slice, entrance) {
	all := slices.Collect(maps.Keys(s.coming))
	for _, sl := range s.slices {
		if sl != nil {
			all = append(all, sl)
		}
	}
	for _, sl := range all {
		if sl.topo.Slice == name {
			continue
		}
		for _, other := range sl.entrances {
			if other.host == e.host && e.Overlaps(other.Forward) {
				return sl, other
			}
		}
	}
	return nil, entrance{}
}

// nameOf says which slice has a port, as far as its caller may know.
func (s *Server) nameOf(ctx context.Context, sl *slice, e entrance) error {
	if !s.owns(ctx, sl.topo.Slice) {
		return errors.New("another slice has it")
	}
	return fmt.Errorf("slice %q forwards it to node %q", sl.topo.Slice, e.node)
}

func taken(topo *topology.Topology, e entrance, why error) error {
	where := "this machine"
	if e.host != "" {
		where = "host " + e.host
	}
	return connect.NewError(connect.CodeFailedPrecondition,
		wrong(topo.Node(e.node), fmt.Sprintf("forwards[%d]", e.index), "port %s for %s of %s is not to be had: %w", e.Listen, e.Protocol, where, why))
}

// probePorts asks the machines whether the ports can be listened at.
func (s *Server) probePorts(ctx context.Context, topo *topology.Topology, all []entrance, replaces *slice) error {
	byHost := map[string][]entrance{}
	for _, e := range all {
		own := replaces != nil && slices.ContainsFunc(replaces.entrances, func(o entrance) bool { return o.host == e.host && e.Overlaps(o.Forward) })
		if !own && e.Listen.Port() != 0 && !e.Yield {
			byHost[e.host] = append(byHost[e.host], e)
		}
	}
	for _, host := range slices.Sorted(maps.Keys(byHost)) {
		var specs []gateway.Forward
		for _, e := range byHost[host] {
			specs = append(specs, e.spec())
		}
		var problems []error
		if host == "" {
			problems = gateway.Probe(specs)
		} else {
			var err error
			if problems, err = s.hub.Probe(ctx, host, specs); err != nil {
				return connect.NewError(connect.CodeFailedPrecondition, err)
			}
		}
		for i, problem := range problems {
			if problem != nil {
				return taken(topo, byHost[host][i], problem)
			}
		}
	}
	return nil
}

// listening asks the hosts how the slice's forwards are, by forward. Of a host that does not
// answer there are none.
func (sl *slice) listening(ctx context.Context) ([]agent.Listening, error) {
	numbers := sl.networks()
	byNetwork := map[string][]agent.Listening{}
	asked := map[string]bool{}
	var errs []error
	for _, e := range sl.entrances {
		host := sl.topo.GatewayHost(e.network)
		if asked[host] {
			continue
		}
		asked[host] = true
		on, err := sl.agents[host].Forwards(ctx, sl.topo.Slice)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for _, l := range on {
			byNetwork[numbers[l.Network]] = append(byNetwork[numbers[l.Network]], l)
		}
	}
	all := make([]agent.Listening, len(sl.entrances))
	next := map[string]int{}
	for i, e := range sl.entrances {
		if k := next[e.network]; k < len(byNetwork[e.network]) {
			all[i] = byNetwork[e.network][k]
		}
		next[e.network]++
	}
	return all, errors.Join(errs...)
}

// learnPorts notes where the forwards listen. From then on that is what the slice's
// topology says, so that its snapshots do: a port that was chosen is chosen again.
func (sl *slice) learnPorts(ctx context.Context) error {
	on, err := sl.listening(ctx)
	if err != nil {
		return err
	}
	topo := *sl.topo
	topo.Nodes = slices.Clone(topo.Nodes)
	for i := range topo.Nodes {
		topo.Nodes[i].Forwards = slices.Clone(topo.Nodes[i].Forwards)
	}
	for i, l := range on {
		e := &sl.entrances[i]
		if !l.At.IsValid() {
			return fmt.Errorf("node %q: forward %s does not listen: %s", e.node, e.Forward, l.Problem)
		}
		if e.Yield && l.At != e.Listen {
			sl.moved = append(sl.moved, fmt.Sprintf("node %s: port %d of %s was taken: its port %d is at %s", e.node, e.Listen.Port(), e.Listen.Addr(), e.Port, l.At))
		}
		f := &topo.Node(e.node).Forwards[e.index]
		f.Yield, f.Listen = f.Yield || f.Listen.Port() == 0, l.At
		e.Yield, e.Listen = false, l.At
	}
	sl.topo = &topo
	return nil
}

// forwardMessages are the slice's forwards as the API tells them, by node.
func (sl *slice) forwardMessages(ctx context.Context) map[string][]*violinv1.Forward {
	if len(sl.entrances) == 0 {
		return nil
	}
	on, err := sl.listening(ctx)
	all := map[string][]*violinv1.Forward{}
	for i, e := range sl.entrances {
		m := e.message()
		switch l := on[i]; {
		case l.At.IsValid():
			m.Listen, m.Listening = l.At.String(), true
		case l.Problem != "":
			m.Problem = l.Problem
		case err != nil:
			m.Problem = err.Error()
		}
		all[e.node] = append(all[e.node], m)
	}
	return all
}

func (e entrance) message() *violinv1.Forward {
	return &violinv1.Forward{Protocol: e.Protocol, Listen: e.Listen.String(), Port: uint32(e.Port), Host: e.host}
}

// leastPort is the first that experimenters may listen at: those below are for services
// of the machine's own.
const leastPort = 1024

// mayForward refuses forwards that take an operator: an experimenter's lead in from the
// machine itself only.
func mayForward(ctx context.Context, topo *topology.Topology) error {
	if access.From(ctx).Operator() {
		return nil
	}
	for i := range topo.Nodes {
		n := &topo.Nodes[i]
		for k, f := range n.Forwards {
			if !f.Listen.Addr().IsLoopback() || f.Listen.Port() != 0 && f.Listen.Port() < leastPort {
				return connect.NewError(connect.CodePermissionDenied, wrong(n, fmt.Sprintf("forwards[%d]", k),
					"port %s takes an operator: an experimenter's forwards listen at 127.0.0.1, and at ports from %d on, or 0 for any that is free", f.Listen, leastPort))
			}
		}
	}
	return nil
}

// fence makes a fork's edge of its snapshot's. Within it everything stays as it was.
func fence(topo *topology.Topology, ref string, req *violinv1.ForkRequest) error {
	closed := req.GetFence() == violinv1.Fence_FENCE_CLOSED || req.GetFence() == violinv1.Fence_FENCE_UNSPECIFIED && req.GetPaused()
	for i := range topo.Networks {
		n := &topo.Networks[i]
		if !n.Gateway.IsValid() {
			continue
		}
		if n.Closed && req.GetFence() == violinv1.Fence_FENCE_NAT {
			return connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf(
				"network %q of snapshot %s is closed to the outside, and a fork does not open it; fork a snapshot of the slice that is not", n.Name, ref))
		}
		if closed {
			n.Closed, n.Hold = true, false
		}
	}
	for i := range topo.Nodes {
		n := &topo.Nodes[i]
		if closed || req.GetNoForwards() {
			n.Forwards = nil
		}
		for k := range n.Forwards {
			f := &n.Forwards[k]
			f.Listen, f.Yield = netip.AddrPortFrom(f.Listen.Addr(), 0), false
		}
	}
	chosen := map[string][]topology.Forward{}
	for _, m := range req.GetForwards() {
		n := topo.Node(m.GetNode())
		if n == nil {
			return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("snapshot %s has no node %q to forward to", ref, m.GetNode()))
		}
		f, err := topology.ParseForward(m.GetForward())
		if err == nil {
			if w, _ := topo.Entrance(n); w == nil {
				err = errors.New("the node has no IPv4 address on a network with a gateway")
			}
		}
		if err != nil {
			return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("forward %q to node %q: %w", m.GetForward(), n.Name, err))
		}
		chosen[n.Name] = append(chosen[n.Name], f)
	}
	for name, forwards := range chosen {
		n := topo.Node(name)
		n.Forwards = slices.DeleteFunc(n.Forwards, func(f topology.Forward) bool {
			return slices.ContainsFunc(forwards, func(c topology.Forward) bool { return c.Port == f.Port && c.Protocol == f.Protocol })
		})
		n.Forwards = append(n.Forwards, forwards...)
	}
	return nil
}

// forkTopology is the topology of a fork, as it is asked for.
func (s *Server) forkTopology(ctx context.Context, snap *catalog.Snapshot, req *violinv1.ForkRequest) ([]byte, error) {
	topo, err := s.topologyOf(snap, req.GetAs())
	if err != nil {
		return nil, err
	}
	if err := fence(topo, snap.Ref(), req); err != nil {
		return nil, err
	}
	if err := mayForward(ctx, topo); err != nil {
		return nil, err
	}
	return topo.Marshal(), nil
}
