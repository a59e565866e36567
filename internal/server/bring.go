package server

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/durationpb"

	violinv1 "violin/api/violin/v1"
	"violin/internal/catalog"
	"violin/internal/cut"
	"violin/internal/events"
	"violin/internal/frames"
	"violin/internal/placement"
	"violin/internal/topology"
)

// bringing is a snapshot that is to be brought to life.
type bringing struct {
	kind          events.Kind // what it is for whoever listens
	snap          *catalog.Snapshot
	as            string // the slice's name: the snapshot's, or a fork's
	topology      []byte // of a fork, as its edge was asked for; nil for the snapshot's
	paused        bool   // wait to be continued
	newGeneration bool   // fresh VM generation ids
	wish          wish
	// begin is called when it is clear that the slice has a place, before anything is
	// stopped for it; nil for nothing. An error ends it there.
	begin func(moves []placement.Move) error
	lazy  *bool  // memory follows: see RestoreRequest
	guard bool   // it is the guard who does it
	clock string // [catalog.Frozen] or [catalog.CatchUp]
}

// waiting is what a slice that was brought to a snapshot waits with.
type waiting struct {
	channel  *frames.ChannelState // nil if it has to be read first
	snapshot string               // that has it
	clock    string
	begun    bool // some nodes may run
}

func newGeneration() string { return uuid.NewString() }

// tellBringing brings a snapshot to life and tells a caller how it goes on.
func (s *Server) tellBringing(ctx context.Context, b bringing, out *connect.ServerStream[violinv1.RestoreResponse]) error {
	tell := serialize(func(p *violinv1.Progress) error {
		return out.Send(&violinv1.RestoreResponse{Event: &violinv1.RestoreResponse_Progress{Progress: p}})
	})
	restored, err := s.bring(ctx, b, tell)
	if err != nil {
		return apiError(err)
	}
	return out.Send(&violinv1.RestoreResponse{Event: &violinv1.RestoreResponse_Restored{Restored: restored}})
}

// bring brings a snapshot to life. What runs under the name is stopped first, if the
// slice is the snapshot's own; nothing is stopped for a snapshot that does not fit or,
// unless that is asked for, is damaged.
func (s *Server) bring(ctx context.Context, b bringing, tell teller) (*violinv1.Restored, error) {
	began := time.Now()
	topo, err := s.topologyFor(&b)
	if err != nil {
		return nil, err
	}
	if err := s.checkBoot(topo, b.snap); err != nil {
		return nil, connect.NewError(connect.CodeFailedPrecondition, err)
	}
	channel, err := s.channelOf(ctx, b.snap)
	if err != nil {
		return nil, err
	}
	// A fork that is rolled back, maybe to where it began, is there already.
	fork := b.as != b.snap.Slice && !b.guard
	var old *slice
	if !fork {
		old, _ = s.slice(b.as)
	}
	room, err := s.admit(ctx, topo, old, b.wish)
	if err != nil {
		return nil, elsewhere(err)
	}
	defer room.release()
	topo = room.topo
	for _, m := range room.moves {
		tell("place", m.Node, strings.TrimPrefix(m.String(), m.Node+" "))
	}
	free, err := s.takePorts(ctx, topo, old)
	if err != nil {
		return nil, err
	}
	defer free()
	if b.begin != nil {
		if err := b.begin(room.moves); err != nil {
			return nil, err
		}
	}
	moves := moveEvents(room.moves)
	if old != nil {
		if b.lazy == nil || !*b.lazy {
			if err := s.sound(ctx, b.snap); err != nil {
				return nil, err
			}
		}
		tell("stop", "", "what still runs of slice "+b.as)
		if err := old.close(); err != nil {
			s.log.Error("slice was not taken down cleanly", "slice", b.as, "err", err)
		}
		s.settle(b.as, nil)
	}
	if err := s.claim(b.as); err != nil {
		return nil, err
	}
	if fork {
		if err := s.takeName(ctx, b.as); err != nil {
			s.settle(b.as, nil)
			return nil, err
		}
	}
	lazily := b.lazy == nil || *b.lazy
	var skew time.Duration
	var notes []string
	sl, err := s.build(ctx, topo, cut.Epoch(b.snap.Epoch).Next(), b.generations(), b.snap, tell, func(ctx context.Context, sl *slice) error {
		sl.setHead(b.snap.Slice, b.snap.ID)
		var err error
		if notes, err = s.load(ctx, sl, b.snap, lazily, tell); err != nil {
			return err
		}
		if b.paused {
			if err := sl.follow(); err != nil {
				return err
			}
			sl.waiting = &waiting{channel: channel, snapshot: b.snap.Ref(), clock: b.clock}
			return nil
		}
		skew, err = sl.run(ctx, channel)
		return err
	})
	s.settle(b.as, sl)
	if err != nil {
		s.freeName(context.WithoutCancel(ctx), b.as)
		return nil, err
	}
	if err := s.record(context.WithoutCancel(ctx), b.as, func(r *catalog.Record) {
		r.Suspended = nil
		if r.Protection != nil && !b.guard { // the user has taken the matter in hand
			p := *r.Protection
			p.Rollbacks, p.GaveUp = nil, false
			r.Protection = &p
		}
	}); err != nil {
		// It runs, whatever is written; `violin down` and a restore mend the rest.
		s.log.Error("the slice runs, and is still noted as suspended", "slice", b.as, "err", err)
	}
	s.noteHead(context.WithoutCancel(ctx), sl)
	sl.poke()
	s.tell(events.Event{Slice: b.as, Kind: b.kind, Snapshot: b.snap.Ref(), Text: "took " + time.Since(began).Round(time.Millisecond).String() + told(moves), Moves: moves})
	lazily = lazily && len(notes) == 0
	notes = append(notes, sl.moved...)
	if !b.paused {
		notes = append(notes, sl.setClocks(ctx, b.clock, tell)...)
	}
	r := &violinv1.Restored{
		Notes: notes, Lazy: lazily, Moves: moveMessages(moves),
		Slice: s.message(ctx, sl), Snapshot: snapshotMessage(b.snap), Duration: durationpb.New(time.Since(began)), Skew: durationpb.New(skew),
	}
	if !b.paused {
		r.FramesInjected = uint64(len(channel.Frames))
	}
	return r, nil
}

// topologyFor is the topology of what a snapshot is brought to life as.
func (s *Server) topologyFor(b *bringing) (*topology.Topology, error) {
	if len(b.topology) == 0 || b.as == b.snap.Slice {
		return s.topologyOf(b.snap, b.as)
	}
	topo, err := topology.Parse("fork "+b.as, b.topology)
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	return topo, nil
}

// topologyOf is a snapshot's topology for a slice of a name. Everything that a guest
// may have seen of it stays as it was.
func (s *Server) topologyOf(snap *catalog.Snapshot, as string) (*topology.Topology, error) {
	topo, err := topology.Parse("snapshot "+snap.Ref(), snap.Topology)
	if err != nil {
		return nil, connect.NewError(connect.CodeDataLoss, err)
	}
	if as == topo.Slice {
		return topo, nil
	}
	topo.Slice = as
	if topo, err = topology.Parse("fork "+as, topo.Marshal()); err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	return topo, nil
}

// generations are the VM generation ids of the nodes: as they were, or fresh. A node
// that had none gets none.
func (b *bringing) generations() map[string]string {
	g := map[string]string{}
	for _, n := range b.snap.Nodes {
		if n.Generation == "" {
			continue
		}
		g[n.Name] = n.Generation
		if b.newGeneration {
			g[n.Name] = newGeneration()
		}
	}
	return g
}

// Fork implements the API.
func (s *Server) Fork(ctx context.Context, req *violinv1.ForkRequest, out *connect.ServerStream[violinv1.RestoreResponse]) error {
	if err := catalog.CheckName(req.GetAs()); err != nil {
		return connect.NewError(connect.CodeInvalidArgument, err)
	}
	snap, err := s.catalog.Resolve(ctx, req.GetSnapshot())
	if err != nil {
		return apiError(err)
	}
	if req.GetAs() == snap.Slice {
		return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("a fork of %s cannot have the name of its slice; `violin restore` brings the slice itself back", snap.Ref()))
	}
	if err := s.mayTake(ctx, req.GetAs()); err != nil {
		return err
	}
	if err := s.notSuspended(req.GetAs()); err != nil {
		return err
	}
	if req.GetNewGeneration() {
		for _, n := range snap.Nodes {
			if n.Generation == "" {
				return connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf(
					"snapshot %s: node %q has no VM generation id: it was started by a violin that gave none, and a VM cannot be given one later; fork it without", snap.Ref(), n.Name))
			}
		}
	}
	topo, err := s.forkTopology(ctx, snap, req)
	if err != nil {
		return err
	}
	policy := snap.Clock
	if req.GetPaused() {
		policy = "" // what is looked into is to be as it was
	}
	return s.tellBringing(ctx, bringing{
		kind: events.Forked, clock: clockOf(req.GetClock(), policy, catalog.Frozen), snap: snap, as: req.GetAs(), topology: topo, paused: req.GetPaused(), newGeneration: req.GetNewGeneration(), wish: wishOf(req, violinv1.PlacementPolicy_PLACEMENT_POLICY_AS_WAS), lazy: req.Lazy,
	}, out)
}

// Continue implements the API.
func (s *Server) Continue(ctx context.Context, req *violinv1.ContinueRequest) (*violinv1.ContinueResponse, error) {
	sl, err := s.slice(req.GetSlice())
	if err != nil {
		return nil, err
	}
	sl.mu.Lock()
	w := sl.waiting
	begun := w != nil && w.begun
	if w != nil {
		w.begun = true
	}
	sl.mu.Unlock()
	switch {
	case w == nil:
		return nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("slice %q is not paused", req.GetSlice()))
	case begun:
		return nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("slice %q is being continued just now", req.GetSlice()))
	}
	if err := s.letRun(context.WithoutCancel(ctx), sl, w); err != nil {
		return nil, apiError(err)
	}
	notes := sl.setClocks(ctx, w.clock, func(_, _, _ string) {})
	return &violinv1.ContinueResponse{Slice: s.message(ctx, sl), FramesInjected: uint64(len(w.channel.Frames)), Notes: notes}, nil
}

// letRun lets a slice run that waits at a snapshot. Half of the nodes running would be no
// state of the slice: it is not given up on the way, and a node that runs already is left
// as it is.
func (s *Server) letRun(ctx context.Context, sl *slice, w *waiting) (err error) {
	name := sl.topo.Slice
	defer func() {
		if err != nil {
			sl.mu.Lock()
			w.begun = false
			sl.mu.Unlock()
			err = fmt.Errorf("continue slice %q: %w", name, err)
		}
	}()
	if w.channel == nil {
		snap, err := s.catalog.Resolve(ctx, w.snapshot)
		if err != nil {
			return err
		}
		if w.channel, err = s.channelOf(ctx, snap); err != nil {
			return err
		}
	}
	if err := s.note(ctx, sl, func(r *catalog.Run) {
		r.Waiting = &catalog.Waiting{Snapshot: w.snapshot, Clock: w.clock, Begun: true}
	}); err != nil {
		return err
	}
	if _, err := sl.run(ctx, w.channel); err != nil {
		err = errors.Join(err, sl.close())
		s.settle(name, nil)
		return fmt.Errorf("it is stopped now: %w", err)
	}
	sl.mu.Lock()
	sl.waiting = nil
	sl.mu.Unlock()
	if err := s.note(ctx, sl, func(r *catalog.Run) { r.Waiting = nil }); err != nil {
		s.log.Error("a slice runs that is still noted as paused", "slice", name, "err", err) // the next server lets it run, too
	}
	return nil
}
