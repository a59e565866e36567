package server

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"time"

	"connectrpc.com/connect"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
	"violin/internal/catalog"
	"violin/internal/events"
)

var _ violinv1connect.LifecycleServiceHandler = (*Server)(nil)

// record changes what is kept of a slice, on the disk first.
func (s *Server) record(ctx context.Context, name string, change func(*catalog.Record)) error {
	s.recording.Lock()
	defer s.recording.Unlock()
	s.mu.Lock()
	old := s.records[name]
	s.mu.Unlock()
	r := &catalog.Record{Slice: name}
	if old != nil {
		*r = *old
	}
	change(r)
	if r.Empty() && old == nil {
		return nil
	}
	if err := s.catalog.PutRecord(ctx, r); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.Empty() {
		delete(s.records, name)
	} else {
		s.records[name] = r
	}
	return nil
}

// suspension is where a slice goes on that is suspended; nil if it is not.
func (s *Server) suspension(name string) *catalog.Suspension {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.records[name]; r != nil && s.slices[name] == nil {
		return r.Suspended
	}
	return nil
}

// suspended are the names of the slices that are.
func (s *Server) suspended() []string {
	s.mu.Lock()
	names := slices.Sorted(maps.Keys(s.records))
	s.mu.Unlock()
	return slices.DeleteFunc(names, func(name string) bool { return s.suspension(name) == nil })
}

// notSuspended refuses a name that a suspended slice has.
func (s *Server) notSuspended(name string) error {
	if s.suspension(name) == nil {
		return nil
	}
	return connect.NewError(connect.CodeAlreadyExists, fmt.Errorf(
		"slice %q is suspended: `violin resume %s` lets it go on, `violin down %s` gives the suspension up", name, name, name))
}

// suspendedMessage is a suspended slice as the API tells it.
func (s *Server) suspendedMessage(ctx context.Context, name string) *violinv1.Slice {
	m := &violinv1.Slice{Name: name, Suspended: true, Owner: s.Owner(name)}
	at := s.suspension(name)
	if at == nil {
		return m // resumed meanwhile
	}
	m.Head, m.Created = at.Snapshot, timestamp(at.At)
	snap, err := s.catalog.Get(ctx, name, at.Snapshot)
	if err != nil {
		s.log.Error("what a suspended slice would go on from cannot be read", "slice", name, "err", err)
		return m
	}
	topo, err := s.topologyOf(snap, name)
	if err != nil {
		s.log.Error("what a suspended slice would go on from cannot be read", "slice", name, "err", err)
		return m
	}
	joined, err := s.placed(topo)
	if err != nil {
		s.log.Warn("a suspended slice can't go on where it was", "slice", name, "err", err)
	}
	forwards := map[string][]*violinv1.Forward{}
	for _, e := range entrances(topo, joined) {
		forwards[e.node] = append(forwards[e.node], e.message())
	}
	for i := range topo.Nodes {
		var disks []catalog.Disk
		if n := snap.Node(topo.Nodes[i].Name); n != nil {
			disks = n.Disks
		}
		node := nodeMessage(&topo.Nodes[i], disks)
		node.State = violinv1.NodeState_NODE_STATE_SUSPENDED
		node.Forwards = forwards[node.GetName()]
		m.Nodes = append(m.Nodes, node)
	}
	return m
}

// Suspend implements the API.
func (s *Server) Suspend(ctx context.Context, req *violinv1.SuspendRequest, out *connect.ServerStream[violinv1.SuspendResponse]) error {
	invalid := func(text string) error { return connect.NewError(connect.CodeInvalidArgument, errors.New(text)) }
	switch {
	case (req.GetSlice() == "") != req.GetAll():
		return invalid("name either one slice or all")
	case req.GetHost() != "" && !req.GetAll():
		return invalid("a host goes with all slices, not with one")
	case req.GetTag() != "" && req.GetAll():
		return invalid("a tag goes with one slice, not with all")
	}
	if tag := req.GetTag(); tag != "" {
		if err := s.freeTag(ctx, req.GetSlice(), tag); err != nil {
			return err
		}
	}
	tell := serialize(func(p *violinv1.Progress) error {
		return out.Send(&violinv1.SuspendResponse{Event: &violinv1.SuspendResponse_Progress{Progress: p}})
	})
	done := &violinv1.Suspended{}
	var errs []error
	for _, name := range s.toSuspend(ctx, req) {
		sl, err := s.slice(name)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		snap, err := s.suspend(ctx, sl, req.GetTag(), tell)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		done.Snapshots = append(done.Snapshots, snapshotMessage(snap))
	}
	if err := errors.Join(errs...); err != nil {
		return apiError(err)
	}
	return out.Send(&violinv1.SuspendResponse{Event: &violinv1.SuspendResponse_Suspended{Suspended: done}})
}

// toSuspend are the names of the slices that a request is about.
func (s *Server) toSuspend(ctx context.Context, req *violinv1.SuspendRequest) []string {
	if !req.GetAll() {
		return []string{req.GetSlice()}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var names []string
	for name, sl := range s.slices {
		if sl != nil && s.ownsLocked(ctx, name) && (req.GetHost() == "" || len(sl.topo.NodesOn(req.GetHost())) > 0) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// suspend brings a slice to a snapshot and frees what it took. Until the snapshot is
// sealed and noted, nothing of the slice is lost: if that fails, it runs on.
func (s *Server) suspend(ctx context.Context, sl *slice, tag string, tell teller) (*catalog.Snapshot, error) {
	name := sl.topo.Slice
	snap, err := s.take(ctx, sl, &violinv1.SnapshotRequest{Slice: name, Tag: tag}, manner{halt: true}, tell)
	if err != nil {
		return nil, err
	}
	// From here on it is not to be interrupted: the nodes stand still.
	ctx = context.WithoutCancel(ctx)
	err = s.record(ctx, name, func(r *catalog.Record) { r.Suspended = &catalog.Suspension{Snapshot: snap.ID, At: time.Now()} })
	if err != nil {
		return nil, errors.Join(fmt.Errorf("suspend slice %q, which runs on: %w", name, err), sl.goOn(ctx))
	}
	tell("stop", "", "slice "+name)
	if err := sl.close(); err != nil {
		s.log.Error("slice was not taken down cleanly", "slice", name, "err", err)
	}
	s.settle(name, nil)
	s.tell(events.Event{Slice: name, Kind: events.Suspended, Snapshot: snap.Ref()})
	return snap, nil
}

// goOn lets nodes run that a cut has halted.
func (sl *slice) goOn(ctx context.Context) error {
	var errs []error
	for i := range sl.topo.Nodes {
		n := &sl.topo.Nodes[i]
		errs = append(errs, sl.agents[n.Host].ContinueNode(ctx, sl.topo.Slice, n.Name))
	}
	return errors.Join(errs...)
}

// Resume implements the API.
func (s *Server) Resume(ctx context.Context, req *violinv1.ResumeRequest, out *connect.ServerStream[violinv1.RestoreResponse]) error {
	at := s.suspension(req.GetSlice())
	if at == nil {
		if _, err := s.slice(req.GetSlice()); err != nil {
			return err
		}
		return connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("slice %q runs, and is not suspended", req.GetSlice()))
	}
	snap, err := s.catalog.Get(ctx, req.GetSlice(), at.Snapshot)
	if err != nil {
		return apiError(fmt.Errorf("resume slice %q: %w", req.GetSlice(), err))
	}
	return s.tellBringing(ctx, bringing{kind: events.Resumed, snap: snap, as: snap.Slice, wish: wishOf(req, violinv1.PlacementPolicy_PLACEMENT_POLICY_AUTO), lazy: req.Lazy, clock: clockOf(req.GetClock(), snap.Clock, catalog.CatchUp)}, out)
}

// Remembers tells, without a server, whether one with this state directory would know
// of slices that do not run: by the copies beside its pages. Of a store elsewhere it
// knows nothing.
func Remembers(stateDir string) bool {
	kept, err := filepath.Glob(filepath.Join(stateDir, "store", "slices", "*.json"))
	return err == nil && len(kept) > 0
}
