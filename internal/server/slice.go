package server

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"sync"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

	violinv1 "violin/api/violin/v1"
	"violin/internal/agent"
	"violin/internal/catalog"
	"violin/internal/coloring"
	"violin/internal/coordinator"
	"violin/internal/cut"
	"violin/internal/fabric"
	"violin/internal/lab"
	"violin/internal/remote"
	"violin/internal/store"
	"violin/internal/topology"
)

// slice is a slice that runs: on hosts that have joined, or on a lab of its own.
type slice struct {
	topo    *topology.Topology
	created time.Time
	joined  bool
	first   uint16               // of its networks' numbers; 0 for 1
	lab     *lab.Lab             // nil on hosts that have joined
	agents  map[string]hostAgent // by host
	// entrances are its forwards, as they listen once it has come up, and moved says which
	// of them had to take another port than before.
	entrances []entrance
	moved     []string
	coord     *coordinator.Coordinator

	closing sync.Once
	closed  error
	stopped chan struct{} // closed when closing begins
	broken  chan struct{} // closed when a node or a host was lost
	loss    loss          // what; valid once broken is closed
	losing  sync.Once
	changed chan struct{} // has an element if the slice's protection is another

	noting sync.Mutex   // held while what is noted is changed
	noted  *catalog.Run // what the catalog has, never changed in place; nil for nothing
	forget func() error // forgets it; nil for nothing to forget

	mu      sync.Mutex
	head    string   // the snapshot it descends from
	origin  string   // the slice of head, if that is another
	waiting *waiting // what it waits for since it was brought to a snapshot; nil once it runs

	boot       map[string][]catalog.BootFile // by node, as they were when it came up
	generation map[string]string             // by node, its VM generation id, if it has one
	disks      map[string][]catalog.Disk     // by node, without what a snapshot tells of them
}

func newSlice(topo *topology.Topology) *slice {
	return &slice{topo: topo, created: time.Now(), agents: map[string]hostAgent{},
		stopped: make(chan struct{}), broken: make(chan struct{}), changed: make(chan struct{}, 1)}
}

// coordination is what a slice's coordinator finds.
func (s *Server) coordination(sl *slice, epoch cut.Epoch) coordinator.Config {
	return coordinator.Config{
		Slice: sl.topo.Slice, Epoch: epoch, Hosts: sl.hosts(), Nodes: sl.nodesByHost(), Networks: sl.networks(),
		Timing:  cut.Timing{Return: max(time.Minute, s.hostTimeout(sl.topo.Slice))},
		Journal: journal{s, sl}, Passed: s.cfg.Passed, Logger: s.log,
	}
}

// build brings a slice's hosts, switches and nodes up. With load, the nodes wait
// for their state and load gives it to them; without, they boot. A failure
// leaves nothing behind.
// generation are the nodes' VM generation ids, snap what their disks are to begin as;
// nil for as they are new.
func (s *Server) build(ctx context.Context, topo *topology.Topology, epoch cut.Epoch, generation map[string]string, snap *catalog.Snapshot, tell teller, load func(context.Context, *slice) error) (_ *slice, err error) {
	machines, err := s.machines(topo)
	if err != nil {
		return nil, err
	}
	var g given
	if snap != nil {
		g = givenIn(snap)
	} else if g, err = s.give(ctx, topo, tell); err != nil {
		return nil, err
	}
	g.add(machines)
	boot, err := s.bootFiles(machines)
	if err != nil {
		return nil, connect.NewError(connect.CodeFailedPrecondition, err)
	}
	sl := newSlice(topo)
	sl.boot, sl.generation, sl.disks = boot, generation, disksTold(machines, g)
	defer func() {
		if err != nil {
			if cerr := sl.close(); cerr != nil {
				s.log.Error("a slice that did not come up was not removed cleanly", "slice", topo.Slice, "err", cerr)
			}
			err = apiError(fmt.Errorf("bring up slice %q: %w", topo.Slice, err))
		}
	}()

	if sl.joined, err = s.placed(topo); err != nil {
		return nil, err
	}
	underlays := sl.startAgents
	if sl.joined {
		if sl.first, err = s.hub.Number(len(topo.Networks), s.networksInUse()); err != nil {
			return nil, err
		}
		tell("hosts", "", "those that have joined; the network between them is as it is")
		underlays = func(ctx context.Context, s *Server) (map[string]underlay, error) {
			return sl.beginAgents(ctx, s, epoch)
		}
	} else {
		tell("hosts", "", fmt.Sprintf("%d sites, %d hosts", len(topo.Sites), countHosts(topo)))
		if sl.lab, err = lab.New(ctx, labConfig(topo, s)); err != nil {
			return nil, err
		}
	}
	at, err := underlays(ctx, s)
	if err != nil {
		return nil, err
	}
	if err := sl.joinAgents(ctx, at); err != nil {
		return nil, err
	}
	sl.entrances = entrances(topo, sl.joined)
	tell("switches", "", fmt.Sprintf("%d Open vSwitches joined by VXLAN", len(sl.agents)))
	numbers := map[string]uint16{}
	for number, name := range sl.networks() {
		numbers[name] = number
	}
	sl.coord = coordinator.New(s.coordination(sl, epoch))

	if err := sl.startGateways(ctx, numbers); err != nil {
		return nil, err
	}
	if err := sl.learnPorts(ctx); err != nil {
		return nil, err
	}
	topo = sl.topo
	if err := s.supply(ctx, sl, machines, boot, tell); err != nil {
		return nil, err
	}
	eg, gctx := errgroup.WithContext(ctx)
	for i := range topo.Nodes {
		n := &topo.Nodes[i]
		eg.Go(func() error {
			spec := agent.NodeSpec{Slice: topo.Slice, Name: n.Name, Epoch: epoch, Machine: machines[n.Name]}
			spec.Machine.Generation = generation[n.Name]
			spec.Boot = map[string]store.Hash{}
			for _, f := range boot[n.Name] {
				spec.Boot[f.Kind] = f.Hash
			}
			for _, ifc := range n.Interfaces {
				spec.Interfaces = append(spec.Interfaces, agent.Interface{
					Network: numbers[ifc.Network], Address: ifc.MAC, MTU: topo.Network(ifc.Network).MTU, Model: ifc.Model,
				})
			}
			if snap != nil {
				if err := s.restoreDisks(gctx, &spec, snap); err != nil {
					return err
				}
			} else {
				s.fillGiven(gctx, &spec, g[n.Name])
			}
			if err := sl.agents[n.Host].AddNode(gctx, spec, load != nil); err != nil {
				return err
			}
			tell("node", n.Name, "on "+n.Host)
			return nil
		})
	}
	if err := eg.Wait(); err != nil {
		return nil, err
	}
	if load != nil {
		if err := load(ctx, sl); err != nil {
			return nil, err
		}
		return sl, s.noteUp(ctx, sl)
	}
	eg, gctx = errgroup.WithContext(ctx)
	for i := range topo.Nodes {
		n := &topo.Nodes[i]
		eg.Go(func() error {
			_, err := sl.agents[n.Host].RunNode(gctx, topo.Slice, n.Name, nil, nil)
			return err
		})
	}
	if err := eg.Wait(); err != nil {
		return nil, err
	}
	return sl, s.noteUp(ctx, sl)
}

func labConfig(topo *topology.Topology, s *Server) lab.Config {
	cfg := lab.Config{Logger: s.log}
	for _, site := range topo.Sites {
		cfg.Sites = append(cfg.Sites, lab.Site{Name: site.Name, Hosts: site.Hosts})
	}
	for _, l := range topo.WAN {
		cfg.Links = append(cfg.Links, lab.LinkConfig{A: l.Between[0], B: l.Between[1], Shape: lab.Shape{
			Delay: l.Delay, Jitter: l.Jitter, Loss: l.Loss.Probability(), Reorder: l.Reorder.Probability(), Rate: l.Rate,
		}})
	}
	return cfg
}

// underlay is where a host is found by the others.
type underlay struct {
	id uint16
	agent.Underlay
}

// startAgents starts an agent on every host of the lab that has nodes.
func (sl *slice) startAgents(ctx context.Context, s *Server) (map[string]underlay, error) {
	at := map[string]underlay{}
	var mu sync.Mutex
	g, gctx := errgroup.WithContext(ctx)
	nodes := sl.nodesByHost()
	for i, h := range sl.lab.Hosts() {
		if nodes[h.Name] == nil {
			continue
		}
		u := agent.Underlay{Device: h.UnderlayDevice, Addr: h.UnderlayAddr, MAC: h.UnderlayMAC, MTU: h.MTU}
		at[h.Name] = underlay{uint16(i + 1), u}
		g.Go(func() error {
			a, err := agent.Start(gctx, agent.Config{
				Host: h.Name, Dir: filepath.Join(s.cfg.RunDir, sl.topo.Slice, h.Name), Platform: h, Underlay: u,
				Urgency: s.urgency,
				Logger:  s.log.With("slice", sl.topo.Slice),
			})
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			sl.agents[h.Name] = a
			return nil
		})
	}
	return at, g.Wait()
}

// beginAgents has the agents of hosts that have joined begin with the slice, once that is
// noted.
func (sl *slice) beginAgents(ctx context.Context, s *Server, epoch cut.Epoch) (map[string]underlay, error) {
	runs := map[string]*remote.Agent{}
	for host := range sl.nodesByHost() {
		runs[host] = s.hub.Reserve(host, sl.topo.Slice)
		sl.agents[host] = runs[host]
	}
	if err := s.noteRuns(ctx, sl, epoch, runs); err != nil {
		return nil, err
	}
	g, gctx := errgroup.WithContext(ctx)
	for _, a := range runs {
		g.Go(func() error { return a.Begin(gctx) })
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	at := map[string]underlay{}
	for host, a := range runs {
		at[host] = underlay{a.Peer(), a.Underlay()}
	}
	return at, nil
}

// joinAgents joins the hosts with each other.
func (sl *slice) joinAgents(ctx context.Context, at map[string]underlay) error {
	ids := map[string]uint16{}
	for name, u := range at {
		ids[name] = u.id
	}
	g, gctx := errgroup.WithContext(ctx)
	for name, a := range sl.agents {
		g.Go(func() error {
			if err := a.SetRemotes(gctx, sl.topo.Slice, sl.remotes(name, ids)); err != nil {
				return err
			}
			for peer, u := range at {
				if peer == name {
					continue
				}
				if err := a.AddPeer(gctx, sl.topo.Slice, fabric.Peer{ID: u.id, Host: peer, Addr: u.Addr.Addr(), MAC: u.MAC}); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}

// startGateways gives the networks that ask for one their way out, before any
// node can look for it.
func (sl *slice) startGateways(ctx context.Context, numbers map[string]uint16) error {
	for i := range sl.topo.Networks {
		n := &sl.topo.Networks[i]
		host := sl.topo.GatewayHost(n.Name)
		if !n.Gateway.IsValid() || host == "" {
			continue
		}
		if err := sl.agents[host].AddGateway(ctx, agent.GatewaySpec{
			Slice: sl.topo.Slice, Network: numbers[n.Name], Address: n.Gateway, MAC: sl.topo.GatewayMAC(n.Name), MTU: n.MTU, Hold: n.Hold,
			Closed: n.Closed, Forwards: forwardsBy(sl.entrances, n.Name),
		}); err != nil {
			return err
		}
	}
	return nil
}

// remotes are the interfaces and gateways that lie on other hosts, as seen from one.
func (sl *slice) remotes(host string, ids map[string]uint16) []coloring.Remote {
	numbers := map[string]uint16{}
	for number, name := range sl.networks() {
		numbers[name] = number
	}
	var rs []coloring.Remote
	for i := range sl.topo.Nodes {
		n := &sl.topo.Nodes[i]
		if n.Host == host {
			continue
		}
		for _, ifc := range n.Interfaces {
			rs = append(rs, coloring.Remote{Network: numbers[ifc.Network], Address: ifc.MAC, Peer: ids[n.Host]})
		}
	}
	for _, n := range sl.topo.Networks {
		at := sl.topo.GatewayHost(n.Name)
		if n.Gateway.IsValid() && at != "" && at != host {
			rs = append(rs, coloring.Remote{
				Network: numbers[n.Name], Address: sl.topo.GatewayMAC(n.Name), Peer: ids[at], Outside: true,
			})
		}
	}
	return rs
}

// networks numbers the slice's networks, which no other has that shares a switch with it.
func (sl *slice) networks() map[uint16]string {
	m := map[uint16]string{}
	for i, n := range sl.topo.Networks {
		m[max(sl.first, 1)+uint16(i)] = n.Name
	}
	return m
}

// networksInUse are the numbers of the networks on hosts that have joined.
func (s *Server) networksInUse() map[uint16]bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	used := map[uint16]bool{}
	for _, sl := range s.slices {
		if sl != nil && sl.joined {
			for n := range sl.networks() {
				used[n] = true
			}
		}
	}
	return used
}

func (sl *slice) nodesByHost() map[string][]string {
	m := map[string][]string{}
	for i := range sl.topo.Nodes {
		n := &sl.topo.Nodes[i]
		m[n.Host] = append(m[n.Host], n.Name)
	}
	return m
}

func (sl *slice) hosts() map[string]coordinator.Host {
	m := map[string]coordinator.Host{}
	for name, a := range sl.agents {
		m[name] = a
	}
	return m
}

func (sl *slice) agentOf(node string) (hostAgent, error) {
	n := sl.topo.Node(node)
	if n == nil {
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("slice %q has no node %q", sl.topo.Slice, node))
	}
	return sl.agents[n.Host], nil
}

// close stops everything of the slice. It may be called again.
func (sl *slice) close() error {
	sl.closing.Do(func() {
		close(sl.stopped)
		var g errgroup.Group
		errs := make(chan error, len(sl.agents)+2)
		if sl.forget != nil {
			errs <- sl.forget() // first: what its hosts do not end now, they end when they come back
		}
		for _, a := range maps.Clone(sl.agents) {
			g.Go(func() error { errs <- a.Close(); return nil })
		}
		_ = g.Wait()
		if sl.lab != nil {
			errs <- sl.lab.Close()
		}
		close(errs)
		var all []error
		for err := range errs {
			all = append(all, err)
		}
		sl.closed = errors.Join(all...)
	})
	return sl.closed
}

// leave leaves what runs of the slice, on hosts that have joined, to the next server.
func (sl *slice) leave() {
	sl.closing.Do(func() {
		close(sl.stopped)
		for _, a := range sl.agents {
			if a, ok := a.(*remote.Agent); ok {
				a.Part()
			}
		}
	})
}

// setHead says what the slice descends from: a snapshot of origin.
func (sl *slice) setHead(origin, id string) {
	sl.mu.Lock()
	defer sl.mu.Unlock()
	sl.head, sl.origin = id, origin
	if origin == sl.topo.Slice {
		sl.origin = ""
	}
}

// getHead tells it; origin is empty if it is the slice itself.
func (sl *slice) getHead() (origin, id string) {
	sl.mu.Lock()
	defer sl.mu.Unlock()
	return sl.origin, sl.head
}

// paused tells whether the slice waits to be continued.
func (sl *slice) paused() bool {
	sl.mu.Lock()
	defer sl.mu.Unlock()
	return sl.waiting != nil
}

// waitsAt tells whether the slice waits to be continued from a snapshot.
func (sl *slice) waitsAt(ref string) bool {
	sl.mu.Lock()
	defer sl.mu.Unlock()
	return sl.waiting != nil && sl.waiting.snapshot == ref
}

// message is the slice as the API tells it.
func (sl *slice) message(ctx context.Context) *violinv1.Slice {
	m := &violinv1.Slice{Name: sl.topo.Slice, Created: timestamp(sl.created), Cutting: sl.coord.Cutting(), Paused: sl.paused()}
	m.Origin, m.Head = sl.getHead()
	ctx, cancel := context.WithTimeout(ctx, statusBound)
	defer cancel()
	forwards := sl.forwardMessages(ctx)
	m.Nodes = make([]*violinv1.Node, len(sl.topo.Nodes))
	var asked sync.WaitGroup
	for i := range sl.topo.Nodes {
		asked.Go(func() {
			n := &sl.topo.Nodes[i]
			node := nodeMessage(n, sl.disks[n.Name])
			node.Forwards = forwards[n.Name]
			sl.setState(ctx, n, node)
			m.Nodes[i] = node
		})
	}
	asked.Wait()
	return m
}

// statusBound is how long the nodes have to say how they are.
const statusBound = 2 * time.Second

// setState asks a node how it is.
func (sl *slice) setState(ctx context.Context, n *topology.Node, node *violinv1.Node) {
	st, err := sl.agents[n.Host].Status(ctx, sl.topo.Slice, n.Name)
	switch {
	case err != nil && sl.away(n.Host) != nil:
		node.State, node.Detail = violinv1.NodeState_NODE_STATE_AWAY, err.Error()
	case ctx.Err() != nil && (err != nil || st.PID != 0 && st.Status == ""):
		node.State, node.Detail = violinv1.NodeState_NODE_STATE_SILENT, fmt.Sprintf("no answer within %v", statusBound)
	case err != nil:
		node.State, node.Detail = violinv1.NodeState_NODE_STATE_DEAD, err.Error()
	case st.PID == 0 || st.Status == "":
		node.State, node.Detail = violinv1.NodeState_NODE_STATE_DEAD, st.Problem
	case st.Status == "running":
		node.State = violinv1.NodeState_NODE_STATE_RUNNING
	default:
		node.State, node.Detail = violinv1.NodeState_NODE_STATE_PAUSED, st.Status+st.Problem
	}
	node.Pid, node.Epoch = int64(st.PID), uint32(st.Epoch)
}

// away tells why a host's agent cannot be asked; nil if it can.
func (sl *slice) away(host string) error {
	if a, ok := sl.agents[host].(*remote.Agent); ok {
		return a.Away()
	}
	return nil
}

// nodeMessage is what the topology says of a node, and what disks it has.
func nodeMessage(n *topology.Node, disks []catalog.Disk) *violinv1.Node {
	node := &violinv1.Node{
		Name: n.Name, Host: n.Host, Site: n.Site, MemoryBytes: n.Memory, Cpus: uint32(n.CPUs),
	}
	for _, ifc := range n.Interfaces {
		address := ""
		if ifc.Address.IsValid() {
			address = ifc.Address.String()
		}
		node.Interfaces = append(node.Interfaces, &violinv1.Interface{Network: ifc.Network, Address: address, Mac: ifc.MAC.String()})
	}
	for _, d := range disks {
		node.Disks = append(node.Disks, &violinv1.NodeDisk{Name: d.Name, SizeBytes: uint64(d.Size), Use: diskUses[d.Use]})
	}
	return node
}

func countHosts(t *topology.Topology) int {
	n := 0
	for _, s := range t.Sites {
		n += len(s.Hosts)
	}
	return n
}
