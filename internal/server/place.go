package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

	violinv1 "violin/api/violin/v1"
	"violin/internal/admission"
	"violin/internal/catalog"
	"violin/internal/events"
	"violin/internal/placement"
	"violin/internal/protection"
	"violin/internal/topology"
)

// wish is what is asked for of where a slice comes up.
type wish struct {
	auto       bool              // nodes whose hosts take nothing, or have too little room, go elsewhere
	on         map[string]string // hosts, by node
	overcommit bool
}

// wishOf is a request's wish.
func wishOf(req interface {
	GetPlacement() violinv1.PlacementPolicy
	GetOn() map[string]string
	GetOvercommit() bool
}, otherwise violinv1.PlacementPolicy,
) wish {
	policy := cmp.Or(req.GetPlacement(), otherwise)
	return wish{auto: policy == violinv1.PlacementPolicy_PLACEMENT_POLICY_AUTO, on: req.GetOn(), overcommit: req.GetOvercommit()}
}

// place places a slice's nodes, as if the slice that it replaces, if any, were gone.
// admitting is held.
func (s *Server) place(ctx context.Context, topo *topology.Topology, replaces *slice, w wish) (*topology.Topology, []placement.Move, error) {
	joined, err := s.whereabouts(topo, replaces, w)
	if err != nil {
		return nil, nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("slice %q: %w", topo.Slice, err))
	}
	r := placement.Request{On: w.on, Auto: w.auto, Overcommit: w.overcommit}
	for _, n := range topo.Nodes {
		p := placement.Node{Name: n.Name, Host: n.Host, Site: n.Site, Memory: n.Memory, CPUs: n.CPUs}
		if n.Host == "" {
			p.Within = n.Site
		}
		r.Nodes = append(r.Nodes, p)
	}
	if joined {
		err = s.joinedHosts(ctx, &r, topo, replaces)
	} else {
		err = s.labHosts(ctx, &r, topo, replaces)
	}
	if err != nil {
		return nil, nil, err
	}
	p, err := placement.Place(r)
	if err != nil {
		err = fmt.Errorf("slice %q: %w", topo.Slice, err)
		switch {
		case errors.Is(err, placement.ErrUnknown):
			return nil, nil, connect.NewError(connect.CodeInvalidArgument, err)
		case errors.Is(err, admission.ErrShort):
			return nil, nil, connect.NewError(connect.CodeResourceExhausted, err)
		}
		return nil, nil, connect.NewError(connect.CodeFailedPrecondition, err)
	}
	if !slices.ContainsFunc(topo.Nodes, func(n topology.Node) bool { return n.Host != p.Hosts[n.Name] }) {
		return topo, nil, nil
	}
	sites := map[string]string{}
	for _, h := range r.Hosts {
		sites[h.Name] = h.Site
	}
	placed, err := topology.Parse("slice "+topo.Slice, topo.Placed(p.Hosts, sites).Marshal())
	if err != nil {
		return nil, nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	return placed, p.Moves, nil
}

// free tells whether the wish leaves open where a node goes.
func (w *wish) free(n *topology.Node) bool { return w.on[n.Name] == "" && (w.auto || n.Host == "") }

// whereabouts tells whether a slice is to be on hosts that have joined: those that it has
// no choice of say so, or else where the slice was that it replaces, or any host of its
// topology.
func (s *Server) whereabouts(topo *topology.Topology, replaces *slice, w wish) (joined bool, err error) {
	if s.hub == nil {
		return false, nil
	}
	var fixed []string
	for i := range topo.Nodes {
		if n := &topo.Nodes[i]; !w.free(n) {
			fixed = append(fixed, cmp.Or(w.on[n.Name], n.Host))
		}
	}
	slices.Sort(fixed)
	if len(fixed) > 0 {
		return s.hub.Place(slices.Compact(fixed))
	}
	if replaces != nil {
		return replaces.joined, nil
	}
	all, err := s.hub.Hosts()
	if err != nil {
		return false, err
	}
	for _, h := range all {
		if topo.SiteOf(h.Name) != "" {
			return true, nil
		}
	}
	return false, nil
}

// labHosts are those of a lab: all on this machine, and as many as the topology has.
func (s *Server) labHosts(ctx context.Context, r *placement.Request, topo *topology.Topology, without *slice) error {
	m, err := s.machineNow(ctx, without)
	if err != nil {
		return err
	}
	r.Machines = append(r.Machines, m)
	for _, site := range topo.Sites {
		for _, h := range site.Hosts {
			r.Hosts = append(r.Hosts, placement.Host{Name: h, Site: site.Name, Machine: m.Name})
		}
	}
	return nil
}

// joinedHosts are those that have joined. Nodes that have never been anywhere are to be
// on one that the topology names. Of a host that no node can be on, nothing is measured.
func (s *Server) joinedHosts(ctx context.Context, r *placement.Request, topo *topology.Topology, without *slice) error {
	all, err := s.hub.Hosts()
	if err != nil {
		return err
	}
	wanted, any := map[string]bool{}, r.Auto
	for _, n := range r.Nodes {
		wanted[cmp.Or(r.On[n.Name], n.Host)] = true
		any = any || n.Host == "" && r.On[n.Name] == ""
	}
	for _, h := range all {
		site := topo.SiteOf(h.Name)
		switch {
		case !topology.IsName(h.Name), site == "" && !r.Auto && !wanted[h.Name]:
			continue
		case site != "":
		case topology.IsName(h.Machine.Site):
			site = h.Machine.Site
		default:
			site = h.Name
		}
		p := placement.Host{Name: h.Name, Machine: joinedMachine(h.Name), Site: site}
		switch since := s.cordonedSince(h.Name); {
		case !since.IsZero():
			p.Away = "it is cordoned, since " + since.Local().Format(time.DateTime)
		case !h.Connected && h.Since.IsZero():
			p.Away = "its agent has not connected; is `violin agent` running there?"
		case !h.Connected:
			p.Away = "its agent is not connected, since " + h.Since.Format(time.TimeOnly)
		}
		r.Hosts = append(r.Hosts, p)
	}
	r.Machines = make([]admission.Machine, len(r.Hosts))
	var g errgroup.Group
	for i := range r.Hosts {
		h, m := &r.Hosts[i], &r.Machines[i]
		m.Name = h.Machine
		if h.Away != "" || !wanted[h.Name] && !any {
			continue
		}
		g.Go(func() error {
			now, err := s.hub.Measure(ctx, h.Name)
			if err != nil {
				h.Away = err.Error()
				return ctx.Err()
			}
			m.Free, m.Reserve, m.CPUs = now.Available, min(now.Memory/20, 1<<30), now.CPUs
			s.reckon(ctx, m, h.Name, without)
			return nil
		})
	}
	return g.Wait()
}

// elsewhere says what a user can do about hosts that take nothing.
func elsewhere(err error) error {
	if connect.CodeOf(err) != connect.CodeFailedPrecondition {
		return err
	}
	return connect.NewError(connect.CodeOf(err), fmt.Errorf("%w; --place auto puts its nodes on other hosts, and --on NODE=HOST says on which", uncoded(err)))
}

// uncoded is an error without its code in the API, which is in its text.
func uncoded(err error) error {
	if coded := (*connect.Error)(nil); errors.As(err, &coded) {
		return coded.Unwrap()
	}
	return err
}

// told are the nodes that moved, to be added to a text for people.
func told(moves []events.Move) string {
	var b strings.Builder
	for _, m := range moves {
		b.WriteString("; " + placement.Move(m).String())
	}
	return b.String()
}

func moveMessages(moves []events.Move) []*violinv1.NodeMove {
	var all []*violinv1.NodeMove
	for _, m := range moves {
		all = append(all, &violinv1.NodeMove{Node: m.Node, From: m.From, To: m.To, Why: m.Why})
	}
	return all
}

func moveEvents(moves []placement.Move) []events.Move {
	var all []events.Move
	for _, m := range moves {
		all = append(all, events.Move(m))
	}
	return all
}

// readCordons finds what is kept of hosts.
func (s *Server) readCordons(ctx context.Context) error {
	all, err := s.catalog.Hosts(ctx, func(_ string, err error) {
		s.log.Error("what is kept of a host cannot be read", "err", err)
	})
	for name, h := range all {
		s.cordons[name] = h.Cordoned
	}
	return err
}

// cordonedSince is since when nothing new comes up on a host; zero if things do.
func (s *Server) cordonedSince(host string) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cordons[host]
}

// CordonHost implements the API.
func (s *Server) CordonHost(ctx context.Context, req *violinv1.CordonHostRequest) (*violinv1.CordonHostResponse, error) {
	if s.hub == nil {
		return nil, notListening()
	}
	known, err := s.authority.Machines()
	if err != nil {
		return nil, apiError(err)
	}
	if !slices.Contains(known, req.GetName()) {
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("no host %q has joined", req.GetName()))
	}
	if err := s.cordon(ctx, req.GetName(), req.GetCordoned()); err != nil {
		return nil, apiError(err)
	}
	return &violinv1.CordonHostResponse{}, nil
}

// cordon keeps nodes from a host that are to come up, or lets them.
func (s *Server) cordon(ctx context.Context, host string, on bool) error {
	s.recording.Lock()
	defer s.recording.Unlock()
	since := s.cordonedSince(host)
	if since.IsZero() != on {
		return nil // it is so already
	}
	since = time.Time{}
	if on {
		since = time.Now().UTC()
	}
	if err := s.catalog.PutHost(ctx, &catalog.Host{Name: host, Cordoned: since}); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cordons[host] = since; !on {
		delete(s.cordons, host)
	}
	s.hub.Wake()
	return nil
}

// hostTimeout is how long a joined host of a slice may be away until it counts as lost.
func (s *Server) hostTimeout(slice string) time.Duration {
	if p := s.protection(slice); p != nil && p.HostTimeout > 0 {
		return p.HostTimeout
	}
	return protection.DefaultHostTimeout
}
