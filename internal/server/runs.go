package server

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"

	"violin/internal/catalog"
	"violin/internal/coordinator"
	"violin/internal/cut"
	"violin/internal/events"
	"violin/internal/remote"
	"violin/internal/topology"
)

// forgetBound bounds the writing down that a slice is to run no more.
const forgetBound = 30 * time.Second

// note changes what is noted of a slice on hosts that have joined, for the server that
// comes after this one. Of one in a lab, which ends with the server, nothing is noted,
// and of one that is being taken down nothing more.
func (s *Server) note(ctx context.Context, sl *slice, change func(*catalog.Run)) error {
	sl.noting.Lock()
	defer sl.noting.Unlock()
	if sl.noted == nil {
		return nil
	}
	r := *sl.noted
	change(&r)
	if err := s.catalog.PutRun(ctx, &r); err != nil {
		return err
	}
	sl.noted = &r
	return nil
}

// noteRuns notes what is about to be begun.
func (s *Server) noteRuns(ctx context.Context, sl *slice, epoch cut.Epoch, runs map[string]*remote.Agent) error {
	r := &catalog.Run{
		Slice: sl.topo.Slice, Term: s.term, Topology: string(sl.topo.Marshal()), Created: sl.created, First: sl.first,
		Hosts: map[string]catalog.RunHost{}, Boot: sl.boot, Generation: sl.generation, Disks: sl.disks, Epoch: uint8(epoch),
	}
	for host, a := range runs {
		r.Hosts[host] = catalog.RunHost{Run: a.Run(), Peer: a.Peer()}
	}
	s.remember(sl, r)
	return s.note(ctx, sl, func(*catalog.Run) {})
}

// noteUp notes that all of a slice is up.
func (s *Server) noteUp(ctx context.Context, sl *slice) error {
	return s.note(ctx, sl, func(r *catalog.Run) {
		r.Whole, r.Topology = true, string(sl.topo.Marshal()) // with the ports that forwards have
		r.Origin, r.Head = sl.getHead()
		if w := sl.waiting; w != nil {
			r.Waiting = &catalog.Waiting{Snapshot: w.snapshot, Clock: w.clock}
		}
	})
}

// journal is the [coordinator.Journal] of a slice: part of its note.
type journal struct {
	s  *Server
	sl *slice
}

// Note implements [coordinator.Journal].
func (j journal) Note(ctx context.Context, n cut.Note, halt bool) error {
	return j.s.note(ctx, j.sl, func(r *catalog.Run) {
		c := &catalog.RunCut{ID: n.Cut, To: uint8(n.To), Ordered: n.Ordered, Halt: halt, Began: time.Now()}
		if r.Cut != nil && r.Cut.ID == c.ID {
			c.Began = r.Cut.Began
		}
		r.Cut, r.Epoch = c, uint8(n.To-1)
	})
}

// End implements [coordinator.Journal].
func (j journal) End(ctx context.Context, d cut.Done, halt bool) error {
	return j.s.note(ctx, j.sl, func(r *catalog.Run) {
		if r.Cut == nil || r.Cut.ID != d.Cut {
			return // the next one has begun already
		}
		r.Cut, r.Epoch = nil, uint8(d.Epoch)
		r.Lost = append(slices.Clone(r.Lost), d.Left...)
		if d.Outcome == cut.OutcomeCommitted {
			r.Head, r.Origin, r.Halted = d.Cut, "", halt
		}
	})
}

// noted reads what servers before this one have left running, and sorts out what is to
// go on.
func (s *Server) noted(ctx context.Context) (map[string]*catalog.Run, error) {
	all, err := s.catalog.Runs(ctx)
	if err != nil {
		return nil, err
	}
	if s.cfg.Listen == "" {
		// They run on, and wait for a server that their hosts can come to.
		for _, name := range slices.Sorted(maps.Keys(all)) {
			s.elsewhere[name] = true
			s.log.Warn("a slice runs on hosts that have joined, and this server takes none in: start `violin server --listen ADDRESS:PORT` to go on with it", "slice", name, "hosts", slices.Sorted(maps.Keys(all[name].Hosts)))
		}
		return nil, nil
	}
	for _, name := range slices.Sorted(maps.Keys(all)) {
		r, why := all[name], ""
		switch rec := s.records[name]; {
		case !r.Whole:
			why = "it was coming up when the server before ended, and is given up"
		case r.Halted && rec != nil && rec.Suspended != nil:
			why = "it is suspended, and what was left of it is stopped"
		default:
			continue
		}
		// Its hosts end what nobody knows.
		if err := s.catalog.DeleteRun(ctx, name); err != nil {
			return nil, err
		}
		s.log.Warn(why, "slice", name)
		delete(all, name)
	}
	return all, nil
}

// hubRuns are the runs of what is noted, as the hub takes them.
func hubRuns(noted map[string]*catalog.Run) (runs []remote.Run) {
	for name, r := range noted {
		for host, h := range r.Hosts {
			runs = append(runs, remote.Run{Host: host, Slice: name, Name: h.Run, Peer: h.Peer})
		}
	}
	return runs
}

// adopt goes on with slices that servers before this one have left running. Those of
// their hosts that do not come back in time are lost, like any host that is away for so
// long.
func (s *Server) adopt(ctx context.Context, noted map[string]*catalog.Run) error {
	var all []*slice
	for _, name := range slices.Sorted(maps.Keys(noted)) {
		sl, err := s.adopted(ctx, noted[name])
		if err != nil {
			return fmt.Errorf("go on with slice %q: %w", name, err)
		}
		all = append(all, sl)
	}
	for _, sl := range all {
		s.settle(sl.topo.Slice, sl)
		s.guards.Go(func() { s.awaitHosts(sl) })
	}
	return nil
}

// adopted makes a slice of its note.
func (s *Server) adopted(ctx context.Context, r *catalog.Run) (*slice, error) {
	topo, err := topology.Parse("note of slice "+r.Slice, []byte(r.Topology))
	if err != nil {
		return nil, err
	}
	sl := newSlice(topo)
	sl.created, sl.joined, sl.first, sl.boot, sl.generation, sl.disks = r.Created, true, r.First, r.Boot, r.Generation, r.Disks
	for _, e := range entrances(topo, true) {
		e.Yield = false // it has what it listens at
		sl.entrances = append(sl.entrances, e)
	}
	runs := map[string]*remote.Agent{}
	for host := range sl.nodesByHost() {
		a := s.hub.GoesOn(host, r.Hosts[host].Run)
		if a == nil {
			return nil, fmt.Errorf("what is noted has no run on host %q, where it has nodes", host)
		}
		runs[host], sl.agents[host] = a, a
	}
	sl.setHead(r.Origin, r.Head)
	if r.Origin == "" {
		sl.setHead(r.Slice, r.Head)
	}
	if w := r.Waiting; w != nil {
		sl.waiting = &waiting{snapshot: w.Snapshot, clock: w.Clock, begun: w.Begun}
	}
	s.remember(sl, r)
	cfg := s.coordination(sl, cut.Epoch(r.Epoch))
	cfg.Followed, cfg.Lost = true, r.Lost
	if r.Cut == nil {
		sl.coord = coordinator.New(cfg)
		return sl, nil
	}
	// Its snapshot's document is what decides, and nobody writes it any more.
	visible, err := s.visible(ctx, r.Slice, r.Cut.ID)
	if err != nil {
		return nil, err
	}
	if visible {
		sl.setHead(r.Slice, r.Cut.ID)
	}
	sl.coord = coordinator.Resume(cfg, cut.Note{Cut: r.Cut.ID, To: cut.Epoch(r.Cut.To), Ordered: r.Cut.Ordered}, visible)
	return sl, nil
}

// visible tells whether there is a snapshot.
func (s *Server) visible(ctx context.Context, slice, id string) (bool, error) {
	_, err := s.catalog.Get(ctx, slice, id)
	if errors.Is(err, catalog.ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}

// finishCut ends the cut that was under way, if one was, and tells how.
func (s *Server) finishCut(sl *slice) string {
	sl.noting.Lock()
	r := sl.noted
	sl.noting.Unlock()
	if r == nil || r.Cut == nil {
		return ""
	}
	err := sl.coord.Finish(s.life, r.Cut.Halt)
	switch {
	case err == nil:
		s.noteHead(context.WithoutCancel(s.life), sl)
		return "; the cut that was under way is committed: " + r.Cut.ID
	case errors.Is(err, coordinator.ErrAborted):
		return "; the cut that was under way is aborted: " + r.Cut.ID
	}
	s.log.Error("the cut that was under way has not ended", "slice", r.Slice, "cut", r.Cut.ID, "err", err)
	return ""
}

// remember says what is noted of a slice, or is about to be. When the slice is closed it
// is forgotten, written or not.
func (s *Server) remember(sl *slice, r *catalog.Run) {
	sl.noted = r
	sl.forget = func() error {
		sl.noting.Lock()
		defer sl.noting.Unlock()
		if sl.noted == nil {
			return nil
		}
		sl.noted = nil
		ctx, cancel := context.WithTimeout(context.Background(), forgetBound)
		defer cancel()
		return s.catalog.DeleteRun(ctx, sl.topo.Slice)
	}
}

// awaitHosts waits until all hosts of a slice that is gone on with are back, and does
// then what the server before had begun.
func (s *Server) awaitHosts(sl *slice) {
	name := sl.topo.Slice
	// Memory of it may follow to hosts that are away.
	if head, err := s.headOf(s.life, sl); err == nil && head != nil {
		s.following(head, 1)
		defer s.following(head, -1)
	}
	var away []string
	for _, host := range slices.Sorted(maps.Keys(sl.agents)) {
		if sl.away(host) != nil {
			away = append(away, host)
		}
	}
	s.tell(events.Event{Slice: name, Kind: events.ServerReturned, Text: "the server before had ended; the slice waits for the agents of its hosts: " + strings.Join(away, " ")})
	how := make(chan string, 1) // the hosts that are back need not wait for the others
	go func() { how <- s.finishCut(sl) }()
	for _, a := range sl.agents {
		if a, ok := a.(*remote.Agent); ok && !a.AwaitConnected(s.life) {
			<-how
			return // it is taken down, or the server ends
		}
	}
	if err := s.goOnFollowing(s.life, sl); err != nil && s.life.Err() == nil && !sl.isStopped() {
		s.log.Error("memory that followed to nodes of a slice when the server before ended does not follow on", "slice", name, "err", err)
	}
	s.tell(events.Event{Slice: name, Kind: events.Adopted, Text: "all of its hosts are back" + <-how})
	if err := s.finish(sl); err != nil && s.life.Err() == nil && !sl.isStopped() {
		s.log.Error("what the server before had begun with a slice is not finished", "slice", name, "err", err)
	}
}

// finish finishes what the server before had begun with a slice, beside cuts.
func (s *Server) finish(sl *slice) error {
	name := sl.topo.Slice
	sl.noting.Lock()
	r := sl.noted
	sl.noting.Unlock()
	if r == nil {
		return nil
	}
	s.mu.Lock()
	rec := s.records[name]
	s.mu.Unlock()
	switch suspended := rec != nil && rec.Suspended != nil; {
	case r.Halted && suspended:
		err := sl.close()
		s.settle(name, nil)
		s.tell(events.Event{Slice: name, Kind: events.Suspended, Snapshot: name + "@" + rec.Suspended.Snapshot})
		return err
	case r.Halted: // its nodes stand still in order to be suspended, and that was not written
		if err := sl.goOn(s.life); err != nil {
			return err
		}
		if err := s.note(s.life, sl, func(r *catalog.Run) { r.Halted = false }); err != nil {
			return err
		}
	case suspended: // it was resumed, and that was not written
		if err := s.record(s.life, name, func(r *catalog.Record) { r.Suspended = nil }); err != nil {
			return err
		}
	}
	sl.mu.Lock()
	w := sl.waiting
	sl.mu.Unlock()
	if w != nil && w.begun {
		return s.letRun(s.life, sl, w)
	}
	return nil
}

// runsElsewhere refuses a name by which something runs on hosts that this server does
// not take in. s's mu is held.
func (s *Server) runsElsewhereLocked(name string) error {
	if !s.elsewhere[name] {
		return nil
	}
	return connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf(
		"slice %q runs on hosts that have joined, and this server takes none in: end it, and start `violin server --listen ADDRESS:PORT`", name))
}
