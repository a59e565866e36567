package server

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
	"violin/internal/access"
	"violin/internal/admission"
	"violin/internal/catalog"
	"violin/internal/coordinator"
	"violin/internal/cut"
	"violin/internal/events"
	"violin/internal/placement"
	"violin/internal/protection"
	"violin/internal/webhook"
)

var _ violinv1connect.ProtectionServiceHandler = (*Server)(nil)

// loss is what broke a slice.
type loss struct {
	kind       events.Kind
	node, host string
	text       string
}

// lose notes that something of the slice is gone. The first loss counts.
func (sl *slice) lose(l loss) {
	sl.losing.Do(func() {
		sl.loss = l
		close(sl.broken)
	})
}

// isStopped tells whether the slice is being taken down, or has been.
func (sl *slice) isStopped() bool {
	select {
	case <-sl.stopped:
		return true
	default:
		return false
	}
}

// poke tells the slice's guard that its protection is another.
func (sl *slice) poke() {
	select {
	case sl.changed <- struct{}{}:
	default:
	}
}

// protection is how a slice is guarded; nil if it is not.
func (s *Server) protection(name string) *catalog.Protection {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.records[name]; r != nil {
		return r.Protection
	}
	return nil
}

// protect changes a protection that there is; the change is refused by an error.
func (s *Server) protect(ctx context.Context, name string, change func(*catalog.Protection)) error {
	return s.record(ctx, name, func(r *catalog.Record) {
		if r.Protection != nil {
			p := *r.Protection
			change(&p)
			r.Protection = &p
		}
	})
}

// noteHead notes what a protected slice descends from, for when its server is gone.
func (s *Server) noteHead(ctx context.Context, sl *slice) {
	name := sl.topo.Slice
	if s.protection(name) == nil {
		return
	}
	origin, id := sl.getHead()
	if id == "" {
		return
	}
	if err := s.protect(ctx, name, func(p *catalog.Protection) {
		p.Head, p.HeadAt = cmp.Or(origin, name)+"@"+id, time.Now()
		p.Topology = ""
		if origin != "" {
			p.Topology = string(sl.topo.Marshal())
		}
	}); err != nil {
		s.log.Error("what a protected slice descends from is not noted", "slice", name, "err", err)
	}
}

// watch looks after a slice from its start to its end: it tells of losses, takes
// checkpoints if the slice is protected, and then rolls it back after a loss.
func (s *Server) watch(sl *slice) {
	s.lookout(sl)
	name := sl.topo.Slice
	var last time.Time // when the last checkpoint began
	if _, head := sl.getHead(); head != "" {
		last = time.Now() // it was brought to one
	}
	broken, lost, told := sl.broken, false, false
	for {
		p := s.protection(name)
		guarded := p != nil && !p.GaveUp && !sl.paused()
		if guarded && lost && !told {
			if s.rollBack(name, sl.loss.text) {
				return // what runs now has a watch of its own
			}
			told = true
			continue
		}
		var due <-chan time.Time
		if guarded && !lost {
			if p.Since.After(last) {
				last = time.Time{}
			}
			due = time.After(protection.Due(*p, last, time.Now()))
		}
		select {
		case <-s.life.Done():
			return
		case <-sl.stopped:
			return
		case <-sl.changed:
			told = false
		case <-broken:
			broken, lost = nil, true
			s.tell(events.Event{Slice: name, Kind: sl.loss.kind, Node: sl.loss.node, Host: sl.loss.host, Text: sl.loss.text})
		case <-due:
			last = time.Now()
			if s.checkpoint(sl, *p) {
				last = last.Add(time.Second - p.Every) // another cut runs: soon again
			}
		}
	}
}

// lookout waits for each node and each switch of a slice to be lost.
func (s *Server) lookout(sl *slice) {
	await := func(gone <-chan struct{}, l func() loss) {
		s.guards.Go(func() {
			select {
			case <-gone:
				if !sl.isStopped() { // which would be on purpose
					sl.lose(l())
				}
			case <-sl.stopped:
			case <-s.life.Done():
			}
		})
	}
	for i := range sl.topo.Nodes {
		n := &sl.topo.Nodes[i]
		a := sl.agents[n.Host]
		gone, err := a.Gone(sl.topo.Slice, n.Name)
		if err != nil {
			continue // it is being taken down already
		}
		await(gone, func() loss {
			l := loss{kind: events.NodeDied, node: n.Name, host: n.Host, text: "its hypervisor ended"}
			if st, err := a.Status(s.life, sl.topo.Slice, n.Name); err == nil && st.Problem != "" {
				l.text = st.Problem
			}
			return l
		})
	}
	for host, a := range sl.agents {
		await(a.SwitchGone(), func() loss {
			if err := sl.away(host); err != nil {
				return loss{kind: events.HostLost, host: host, text: err.Error()}
			}
			return loss{kind: events.HostLost, host: host, text: "the switch of host " + host + " ended"}
		})
	}
}

// checkpoint takes one and forgets those whose time has come. It tells whether another
// cut was in the way.
func (s *Server) checkpoint(sl *slice, p catalog.Protection) (busy bool) {
	name := sl.topo.Slice
	snap, err := s.take(s.life, sl, &violinv1.SnapshotRequest{Slice: name}, manner{checkpoint: true}, func(_, _, _ string) {})
	switch {
	case errors.Is(err, cut.ErrBusy):
		return true
	case err != nil && (s.life.Err() != nil || sl.isStopped()):
		return false // on purpose
	case err != nil:
		s.tell(events.Event{Slice: name, Kind: events.CheckpointFailed, Text: err.Error()})
		if errors.Is(err, coordinator.ErrHostLost) {
			sl.lose(loss{kind: events.HostLost, text: err.Error()})
		}
		return false
	}
	s.tell(events.Event{Slice: name, Kind: events.Checkpoint, Snapshot: snap.Ref()})
	if err := s.expire(s.life, name, p.Keep, snap.ID); err != nil {
		s.log.Error("checkpoints that have had their time stay", "slice", name, "err", err)
	}
	return false
}

// expire forgets checkpoints, and frees their space when there is something to gain.
func (s *Server) expire(ctx context.Context, name string, keep int, head string) error {
	all, err := s.catalog.List(ctx, name)
	if err != nil {
		return err
	}
	expired := protection.Expired(all, keep, head)
	for _, snap := range expired {
		if s.needed(snap) != "" {
			continue
		}
		if err := s.catalog.Delete(ctx, name, snap.ID); err != nil {
			return err
		}
	}
	// To collect takes a look at every page table: not after each checkpoint.
	if s.expired.Add(int64(len(expired))) < int64(keep) {
		return nil
	}
	s.expired.Store(0)
	_, err = s.store.GC(ctx, s.catalog.Roots(ctx))
	return err
}

// rollBack brings a protected slice back to its last snapshot, on hosts that take its
// nodes, and tells whether it runs again, by this or otherwise.
func (s *Server) rollBack(name, why string) bool {
	s.rolling.Add(1)
	defer s.rolling.Add(-1)
	failures, waits, short, news := 0, 0, "", true
	for {
		p := s.protection(name)
		if p == nil || s.suspension(name) != nil {
			return false // the user has taken the matter in hand
		}
		if sl, err := s.slice(name); err == nil {
			select {
			case <-sl.broken:
			default:
				return true // ditto
			}
		}
		snap, err := s.lastOf(name, *p)
		if err != nil {
			s.giveUp(name, fmt.Sprintf("there is no snapshot to roll back to: %v", err))
			return false
		}
		// Taken before it is looked what there is, so that nothing that changes is missed.
		changed := s.hostsChange()
		if late := s.expected(snap, *p); late > 0 {
			if !s.pause(late, changed) {
				return true
			}
			continue
		}
		if p.DryRun {
			moves, err := s.wouldPlace(name, snap)
			if err != nil {
				why += "; " + err.Error()
			}
			s.tell(events.Event{Slice: name, Kind: events.WouldRollBack, Snapshot: snap.Ref(), Text: why + told(moves), Moves: moves})
			return false
		}
		counted, ok := protection.Rollback(*p, time.Now())
		if !ok {
			s.giveUp(name, fmt.Sprintf("%d rollbacks within %s: %s", len(counted.Rollbacks), p.Window, why))
			return false
		}
		begun := false
		// Counted first, so that a rollback that ends the server counts, too.
		count := func() error {
			begun = true
			return s.protect(s.life, name, func(p *catalog.Protection) { p.Rollbacks = counted.Rollbacks })
		}
		_, err = s.bring(s.life, bringing{
			kind: events.RolledBack, snap: snap, as: name, topology: []byte(p.Topology), guard: true, clock: clockOf(0, snap.Clock, catalog.Frozen), wish: wish{auto: true},
			begin: func(moves []placement.Move) error {
				m := moveEvents(moves)
				s.tell(events.Event{Slice: name, Kind: events.RollbackBegun, Snapshot: snap.Ref(), Text: why + told(m), Moves: m})
				return count()
			},
		}, func(_, _, _ string) {})
		switch {
		case s.life.Err() != nil:
			return true
		case err == nil:
			return s.keepOrStop(name)
		case !begun && errors.Is(err, admission.ErrShort):
			// That is for as long as it takes, and counts as no failure.
			if text := err.Error(); news && text != short {
				short = text
				s.tell(events.Event{Slice: name, Kind: events.RollbackWaits, Snapshot: snap.Ref(), Text: text})
			}
			waits++
			if !s.pause(protection.Pause(waits), changed) {
				return true
			}
			select {
			case <-changed:
				news = true
			default:
				news = false // the figures may be others; it is the same shortfall
			}
			continue
		}
		if !begun {
			err = errors.Join(err, count())
		}
		why = err.Error()
		s.tell(events.Event{Slice: name, Kind: events.RollbackFailed, Snapshot: snap.Ref(), Text: why})
		failures++
		if !s.pause(protection.Pause(failures), nil) {
			return true
		}
	}
}

// pause waits for a time, or until something changes, and tells whether the server goes on.
func (s *Server) pause(d time.Duration, changed <-chan struct{}) bool {
	select {
	case <-time.After(d):
	case <-changed:
	case <-s.life.Done():
		return false
	}
	return true
}

// hostsChange returns what is closed when what hosts take becomes another; nil if none
// can join.
func (s *Server) hostsChange() <-chan struct{} {
	if s.hub == nil {
		return nil
	}
	return s.hub.Changed()
}

// expected is how long to wait for hosts that nodes of a snapshot were on, and that are
// not lost yet: such as after the start of a server, to which no agent has connected.
func (s *Server) expected(snap *catalog.Snapshot, p catalog.Protection) time.Duration {
	if s.hub == nil {
		return 0
	}
	known, err := s.authority.Machines()
	if err != nil {
		return 0 // and what follows says why
	}
	var longest time.Duration
	for _, n := range snap.Nodes {
		since, away := s.hub.Away(n.Host)
		if away && slices.Contains(known, n.Host) && s.cordonedSince(n.Host).IsZero() {
			longest = max(longest, cmp.Or(p.HostTimeout, protection.DefaultHostTimeout)-time.Since(since))
		}
	}
	return longest
}

// wouldPlace are the nodes that a rollback would bring up on other hosts.
func (s *Server) wouldPlace(name string, snap *catalog.Snapshot) ([]events.Move, error) {
	topo, err := s.topologyOf(snap, name)
	if err != nil {
		return nil, err
	}
	sl, _ := s.slice(name)
	room, err := s.admit(s.life, topo, sl, wish{auto: true})
	if err != nil {
		return nil, err
	}
	room.release()
	return moveEvents(room.moves), nil
}

// keepOrStop leaves a slice that was brought back running, unless all slices were to be
// taken down meanwhile.
func (s *Server) keepOrStop(name string) bool {
	s.mu.Lock()
	forsaken := s.forsaken[name]
	delete(s.forsaken, name)
	s.mu.Unlock()
	sl, err := s.slice(name)
	if err != nil || !forsaken {
		return true
	}
	if err := sl.close(); err != nil {
		s.log.Error("slice was not taken down cleanly", "slice", name, "err", err)
	}
	s.settle(name, nil)
	s.tell(events.Event{Slice: name, Kind: events.Down, Text: "it was being rolled back"})
	return true
}

// forsake ends the protection of slices that do not run, which are those that are being
// rolled back, or wait for it.
func (s *Server) forsake(ctx context.Context) error {
	s.mu.Lock()
	var names []string
	for name, r := range s.records {
		if r.Protection != nil && r.Suspended == nil && s.slices[name] == nil && s.ownsLocked(ctx, name) {
			names = append(names, name)
			if _, coming := s.slices[name]; coming {
				s.forsaken[name] = true
			}
		}
	}
	s.mu.Unlock()
	slices.Sort(names)
	for _, name := range names {
		if err := s.record(ctx, name, func(r *catalog.Record) { r.Protection = nil }); err != nil {
			return err
		}
		s.tell(events.Event{Slice: name, Kind: events.Unprotected})
	}
	return nil
}

// lastOf is the snapshot that a protected slice descended from last.
func (s *Server) lastOf(name string, p catalog.Protection) (*catalog.Snapshot, error) {
	if p.Head == "" {
		return nil, catalog.ErrNotFound
	}
	slice, id, _ := strings.Cut(p.Head, "@")
	all, err := s.catalog.List(s.life, name)
	if err != nil {
		return nil, err
	}
	if tip := protection.Tip(all, id, p.HeadAt); tip != id {
		slice, id = name, tip
	}
	return s.catalog.Get(s.life, slice, id)
}

func (s *Server) giveUp(name, why string) {
	if err := s.protect(s.life, name, func(p *catalog.Protection) { p.GaveUp = true }); err != nil {
		s.log.Error("a protection that gave up is not noted", "slice", name, "err", err)
	}
	s.tell(events.Event{Slice: name, Kind: events.GaveUp, Text: why})
}

// bringBack brings slices back that were protected and ended with the server before.
func (s *Server) bringBack() {
	for _, name := range slices.Sorted(maps.Keys(s.records)) {
		r := s.records[name]
		if r.Protection == nil || r.Protection.GaveUp || r.Suspended != nil || s.elsewhere[name] {
			continue
		}
		if _, err := s.slice(name); err == nil {
			continue // it runs on
		}
		s.rolling.Add(1)
		s.guards.Go(func() {
			defer s.rolling.Add(-1)
			const why = "the server before had ended, and the slice with it"
			s.tell(events.Event{Slice: name, Kind: events.ServerReturned, Text: why})
			s.rollBack(name, why)
		})
	}
}

// alarming are the events that a webhook is told.
var alarming = map[events.Kind]bool{
	events.NodeDied: true, events.HostLost: true, events.ServerReturned: true, events.CheckpointFailed: true,
	events.RollbackBegun: true, events.RolledBack: true, events.RollbackFailed: true, events.RollbackWaits: true, events.WouldRollBack: true, events.GaveUp: true,
}

// maxPosting bounds how many posts wait for somebody to take them.
const maxPosting = 100

// tell logs an event, and posts it where the slice's protection says.
func (s *Server) tell(e events.Event) {
	e.At, e.Owner = time.Now().UTC(), s.Owner(e.Slice)
	e, err := s.events.Append(e)
	if err != nil {
		s.log.Error("event", "err", err)
	}
	s.log.Info("event", "slice", e.Slice, "kind", string(e.Kind), "node", e.Node, "host", e.Host, "snapshot", e.Snapshot, "text", e.Text)
	p := s.protection(e.Slice)
	if p == nil || p.Webhook == "" || !alarming[e.Kind] {
		return
	}
	failed := func(err error) {
		s.log.Warn("event was not posted", "err", err)
		if _, err := s.events.Append(events.Event{At: time.Now().UTC(), Slice: e.Slice, Owner: e.Owner, Kind: events.WebhookFailed, Text: fmt.Sprintf("event %d: %v", e.Number, err)}); err != nil {
			s.log.Error("event", "err", err)
		}
	}
	body, err := json.Marshal(e)
	if err != nil {
		failed(err)
		return
	}
	if s.posting.Add(1) > maxPosting {
		s.posting.Add(-1)
		failed(errors.New("too many others wait to be posted"))
		return
	}
	s.guards.Go(func() {
		defer s.posting.Add(-1)
		if err := new(webhook.Poster).Post(s.life, p.Webhook, body); err != nil && s.life.Err() == nil {
			failed(err)
		}
	})
}

// Protect implements the API.
func (s *Server) Protect(ctx context.Context, req *violinv1.ProtectRequest) (*violinv1.ProtectResponse, error) {
	sl, err := s.slice(req.GetSlice())
	if err != nil {
		return nil, err
	}
	p, err := protection.WithDefaults(catalog.Protection{
		Every: req.GetEvery().AsDuration(), Keep: int(req.GetKeep()), MaxRollbacks: int(req.GetMaxRollbacks()),
		Window: req.GetWindow().AsDuration(), Webhook: req.GetWebhook(), DryRun: req.GetDryRun(), Since: time.Now(),
		HostTimeout: req.GetHostTimeout().AsDuration(),
	})
	if err == nil && p.Webhook != "" {
		err = webhook.Check(p.Webhook)
	}
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("protect slice %q: %w", req.GetSlice(), err))
	}
	if sl.paused() {
		return nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("slice %q is paused at a snapshot; `violin continue` lets it run", req.GetSlice()))
	}
	if err := s.record(ctx, req.GetSlice(), func(r *catalog.Record) { r.Protection = &p }); err != nil {
		return nil, apiError(err)
	}
	s.noteHead(ctx, sl)
	s.tell(events.Event{Slice: req.GetSlice(), Kind: events.Protected, Text: fmt.Sprintf("every %s, %d kept", p.Every, p.Keep)})
	sl.poke()
	return &violinv1.ProtectResponse{Protection: s.protectionMessage(req.GetSlice())}, nil
}

// Unprotect implements the API.
func (s *Server) Unprotect(ctx context.Context, req *violinv1.UnprotectRequest) (*violinv1.UnprotectResponse, error) {
	if s.protection(req.GetSlice()) == nil {
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("slice %q is not protected", req.GetSlice()))
	}
	if err := s.record(ctx, req.GetSlice(), func(r *catalog.Record) { r.Protection = nil }); err != nil {
		return nil, apiError(err)
	}
	s.tell(events.Event{Slice: req.GetSlice(), Kind: events.Unprotected})
	if sl, err := s.slice(req.GetSlice()); err == nil {
		sl.poke()
	}
	return &violinv1.UnprotectResponse{}, nil
}

// ListProtections implements the API.
func (s *Server) ListProtections(ctx context.Context, req *violinv1.ListProtectionsRequest) (*violinv1.ListProtectionsResponse, error) {
	s.mu.Lock()
	names := slices.Sorted(maps.Keys(s.records))
	s.mu.Unlock()
	resp := &violinv1.ListProtectionsResponse{}
	for _, name := range names {
		if req.GetSlice() != "" && name != req.GetSlice() || !s.owns(ctx, name) {
			continue
		}
		if m := s.protectionMessage(name); m != nil {
			resp.Protections = append(resp.Protections, m)
		}
	}
	if req.GetSlice() != "" && len(resp.Protections) == 0 {
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("slice %q is not protected", req.GetSlice()))
	}
	return resp, nil
}

func (s *Server) protectionMessage(name string) *violinv1.Protection {
	p := s.protection(name)
	if p == nil {
		return nil
	}
	recent := 0
	for _, at := range p.Rollbacks {
		if time.Since(at) < p.Window {
			recent++
		}
	}
	return &violinv1.Protection{
		Slice: name, Every: durationpb.New(p.Every), Keep: uint32(p.Keep), MaxRollbacks: uint32(p.MaxRollbacks), Window: durationpb.New(p.Window),
		Webhook: p.Webhook, DryRun: p.DryRun, Since: timestamp(p.Since), Rollbacks: uint32(recent), GaveUp: p.GaveUp, Head: p.Head,
		HostTimeout: durationpb.New(s.hostTimeout(name)),
	}
}

// Events implements the API.
func (s *Server) Events(ctx context.Context, req *violinv1.EventsRequest, out *connect.ServerStream[violinv1.Event]) error {
	after := req.GetAfter()
	for first := true; ; first = false {
		found, more := s.events.After(after, req.GetSlice())
		// Whose a slice was when it happened: its name may be another's by now.
		found = slices.DeleteFunc(found, func(e events.Event) bool { return !access.From(ctx).Owns(e.Owner) })
		if n := int(req.GetLast()); first && n > 0 && len(found) > n {
			found = found[len(found)-n:]
		}
		for _, e := range found {
			if err := out.Send(&violinv1.Event{
				Number: e.Number, At: timestamp(e.At), Slice: e.Slice, Kind: string(e.Kind), Node: e.Node, Host: e.Host, Snapshot: e.Snapshot, Text: e.Text, Owner: e.Owner, Moves: moveMessages(e.Moves),
			}); err != nil {
				return err
			}
			after = e.Number
		}
		if !req.GetFollow() {
			return nil
		}
		select {
		case <-more:
		case <-ctx.Done():
			return ctx.Err()
		case <-s.life.Done():
			return nil
		}
	}
}
