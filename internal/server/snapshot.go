package server

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	violinv1 "violin/api/violin/v1"
	"violin/internal/agent"
	"violin/internal/catalog"
	"violin/internal/coordinator"
	"violin/internal/cut"
	"violin/internal/events"
	"violin/internal/frames"
	"violin/internal/hypervisor/qemu"
	"violin/internal/store"
)

// maxAhead bounds how long before its instant a cut may be asked for.
const maxAhead = time.Hour

// Snapshot implements the API.
func (s *Server) Snapshot(ctx context.Context, req *violinv1.SnapshotRequest, out *connect.ServerStream[violinv1.SnapshotResponse]) error {
	sl, err := s.slice(req.GetSlice())
	if err != nil {
		return err
	}
	if tag := req.GetTag(); tag != "" {
		if err := s.freeTag(ctx, sl.topo.Slice, tag); err != nil {
			return err
		}
	}
	if at := instant(req.GetAt()); time.Until(at) > maxAhead {
		return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("a cut at %s is more than %s ahead", at.Format(time.RFC3339), maxAhead))
	}
	if h := req.GetHoldTime(); h != nil && h.AsDuration() <= 0 || req.GetHoldBytes() > math.MaxInt32 {
		return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("hold at most %d bytes for %s: the time must be positive, the bytes below 2 GiB", req.GetHoldBytes(), h.AsDuration()))
	}
	tell := serialize(func(p *violinv1.Progress) error {
		return out.Send(&violinv1.SnapshotResponse{Event: &violinv1.SnapshotResponse_Progress{Progress: p}})
	})
	snap, err := s.take(ctx, sl, req, manner{}, tell)
	if err != nil {
		return apiError(err)
	}
	return out.Send(&violinv1.SnapshotResponse{Event: &violinv1.SnapshotResponse_Snapshot{Snapshot: snapshotMessage(snap)}})
}

// freeTag refuses a tag that a snapshot could not be sealed with.
func (s *Server) freeTag(ctx context.Context, slice, tag string) error {
	if err := catalog.CheckTag(tag); err != nil {
		return connect.NewError(connect.CodeInvalidArgument, err)
	}
	if old, err := s.catalog.Resolve(ctx, slice+"@"+tag); err == nil {
		return connect.NewError(connect.CodeAlreadyExists, fmt.Errorf("the tag %q names snapshot %s already", tag, old.Ref()))
	}
	return nil
}

func newerPolicy(p violinv1.NewerPolicy) agent.Newer {
	switch p {
	case violinv1.NewerPolicy_NEWER_POLICY_TRIGGER:
		return agent.Trigger
	case violinv1.NewerPolicy_NEWER_POLICY_DROP:
		return agent.Drop
	}
	return agent.Hold
}

func instant(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

// manner is how a snapshot is taken, beside what users may ask for.
type manner struct {
	halt       bool // the nodes stand still from their cuts on, unless it fails
	checkpoint bool // for a protection
}

// take takes a snapshot.
func (s *Server) take(ctx context.Context, sl *slice, req *violinv1.SnapshotRequest, how manner, tell teller) (_ *catalog.Snapshot, err error) {
	if sl.paused() {
		return nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("slice %q is paused at a snapshot; `violin continue` lets it run", sl.topo.Slice))
	}
	began := time.Now()
	id, err := catalog.NewID(began, rand.Reader)
	if err != nil {
		return nil, err
	}
	mode, name := qemu.Background, "background"
	if req.GetMode() == violinv1.CaptureMode_CAPTURE_MODE_PRECOPY {
		mode, name = qemu.Precopy, "precopy"
	}
	if err := sl.awaitMemory(ctx, tell); err != nil {
		return nil, err
	}
	session, err := s.store.Begin(ctx)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, session.Abort(context.WithoutCancel(ctx)))
		}
	}()
	snap := &catalog.Snapshot{
		ID: id, Slice: sl.topo.Slice, Tag: req.GetTag(), Mode: name,
		Epoch: uint8(sl.coord.Epoch()), Topology: sl.topo.Marshal(),
	}
	snap.ParentSlice, snap.Parent = sl.getHead()
	snap.Clock, snap.Checkpoint = clockName(req.GetClock()), how.checkpoint
	release, err := s.outputUntilNow(ctx, sl)
	if err != nil {
		return nil, err
	}
	err = sl.coord.Take(ctx, coordinator.Cut{
		ID: id, Mode: mode, Session: agent.InStore(session), Progress: tell, Halt: how.halt,
		Newer: newerPolicy(req.GetNewer()), At: instant(req.GetAt()),
		Limits: cut.Limits{Bytes: int(req.GetHoldBytes())}, Hold: req.GetHoldTime().AsDuration(),
		Seal: func(ctx context.Context, hosts []agent.HostResult, lost []cut.ChannelLoss, drained coordinator.Drained) error {
			return s.seal(ctx, sl, snap, session, began, hosts, lost, drained)
		},
	})
	if err != nil {
		return nil, err
	}
	release(context.WithoutCancel(ctx))
	sl.setHead(snap.Slice, id)
	s.noteHead(context.WithoutCancel(ctx), sl)
	return snap, nil
}

// outputUntilNow are the frames to the outside that gateways hold back now: no node has
// been cut yet, so a snapshot that is begun covers that they were sent. They go when it is
// sealed.
func (s *Server) outputUntilNow(ctx context.Context, sl *slice) (release func(context.Context), err error) {
	marks := map[string][]uint64{}
	for host, a := range sl.agents {
		if marks[host], err = a.MarkOutput(ctx, sl.topo.Slice); err != nil {
			return nil, err
		}
	}
	return func(ctx context.Context) {
		for host, a := range sl.agents {
			if len(marks[host]) == 0 {
				continue
			}
			if err := a.ReleaseOutput(ctx, sl.topo.Slice, marks[host]); err != nil {
				s.log.Error("frames to the outside wait for the next snapshot", "slice", sl.topo.Slice, "err", err)
			}
		}
	}, nil
}

// seal writes what belongs to the snapshot and, last, makes it visible.
func (s *Server) seal(ctx context.Context, sl *slice, snap *catalog.Snapshot, session *store.Session, began time.Time, hosts []agent.HostResult, lost []cut.ChannelLoss, drained coordinator.Drained) error {
	var results []agent.NodeResult
	for _, h := range hosts {
		results = append(results, h.Nodes...)
		snap.Totals.Dropped += int64(h.Dropped)
	}
	slices.SortFunc(results, func(a, b agent.NodeResult) int { return cmp.Compare(a.Node, b.Node) })
	channel := channelState(sl, snap, results)
	var buf bytes.Buffer
	if err := frames.Write(&buf, channel); err != nil {
		return fmt.Errorf("write the channel state: %w", err)
	}
	ref, err := session.PutBlob(ctx, buf.Bytes())
	if err != nil {
		return fmt.Errorf("store the channel state: %w", err)
	}
	snap.Channel = catalog.Channel{Ref: ref, Frames: int64(len(channel.Frames)), Bytes: int64(buf.Len())}
	var first, last time.Time
	for _, r := range results {
		snap.Nodes = append(snap.Nodes, catalog.Node{
			Name: r.Node, Host: sl.topo.Node(r.Node).Host, CutAt: r.CutAt, Pause: r.Pause, Device: r.Device, Memory: r.Memory,
			RawBytes: int64(r.RawBytes), StoredBytes: r.Stats.StoredBytes, Pages: r.Stats.Pages, ZeroPages: r.Stats.ZeroPages,
			Held: int64(r.Held), Recorded: int64(len(r.Recorded)), Boot: sl.boot[r.Node], Generation: sl.generation[r.Node],
		})
		for _, d := range r.Disks {
			n := &snap.Nodes[len(snap.Nodes)-1]
			n.Disks = append(n.Disks, catalog.Disk{Name: d.Name, Size: int64(d.Size), Blocks: d.Blocks, StoredBytes: d.Stats.StoredBytes, Use: sl.useOf(r.Node, d.Name)})
			n.StoredBytes += d.Stats.StoredBytes
		}
		snap.Totals.Held += int64(r.Held)
		snap.Totals.Recorded += int64(len(r.Recorded))
		snap.Totals.RawBytes += int64(r.RawBytes)
		if first.IsZero() || r.CutAt.Before(first) {
			first = r.CutAt
		}
		if r.CutAt.After(last) {
			last = r.CutAt
		}
	}
	for _, l := range lost {
		snap.Totals.Lost += int64(l.Frames)
	}
	if err := s.certify(ctx, snap, session, hosts, channel, lost, drained); err != nil {
		return err
	}
	st := session.Stats()
	snap.Totals.StoredBytes = st.StoredBytes + st.BlobBytesKept
	snap.Totals.Skew = last.Sub(first)
	return session.Commit(ctx, func(ctx context.Context) error {
		snap.Created = time.Now()
		snap.Totals.Duration = snap.Created.Sub(began)
		if s.cfg.Passed != nil {
			s.cfg.Passed("packed")
		}
		return s.catalog.Put(ctx, snap)
	})
}

// channelState gathers what was in flight: a receiver for each interface, and
// the frames by the time that had passed at their receiver since its cut.
func channelState(sl *slice, snap *catalog.Snapshot, results []agent.NodeResult) *frames.ChannelState {
	names := sl.networks()
	cs := &frames.ChannelState{Slice: snap.Slice, Snapshot: snap.ID}
	for _, r := range results {
		base := len(cs.Receivers)
		for i, ifc := range r.Interface {
			cs.Receivers = append(cs.Receivers, frames.Receiver{
				Node: r.Node, Interface: i, Network: names[ifc.Network], Epoch: cut.Epoch(snap.Epoch).Next(), Cut: r.CutAt.UTC().Round(0),
			})
		}
		for _, f := range r.Recorded {
			cs.Frames = append(cs.Frames, frames.Frame{
				// A frame that waited at the closed gate came before the instant of the
				// cut; to the node it comes right after.
				Receiver: base + f.Interface, Epoch: f.Epoch, At: max(0, f.At.Sub(r.CutAt)), Data: f.Data,
			})
		}
	}
	slices.SortStableFunc(cs.Frames, func(a, b frames.Frame) int { return cmp.Compare(a.At, b.At) })
	return cs
}

// ListSnapshots implements the API.
func (s *Server) ListSnapshots(ctx context.Context, req *violinv1.ListSnapshotsRequest) (*violinv1.ListSnapshotsResponse, error) {
	all, err := s.catalog.List(ctx, req.GetSlice())
	if err != nil {
		return nil, apiError(err)
	}
	resp := &violinv1.ListSnapshotsResponse{}
	for _, snap := range s.owned(ctx, all) {
		resp.Snapshots = append(resp.Snapshots, snapshotMessage(snap))
	}
	return resp, nil
}

// Restore implements the API.
func (s *Server) Restore(ctx context.Context, req *violinv1.RestoreRequest, out *connect.ServerStream[violinv1.RestoreResponse]) error {
	snap, err := s.catalog.Resolve(ctx, req.GetSnapshot())
	if err != nil {
		return apiError(err)
	}
	return s.tellBringing(ctx, bringing{kind: events.Restored, snap: snap, as: snap.Slice, wish: wishOf(req, violinv1.PlacementPolicy_PLACEMENT_POLICY_AS_WAS), lazy: req.Lazy, clock: clockOf(req.GetClock(), snap.Clock, catalog.Frozen)}, out)
}

func (s *Server) channelOf(ctx context.Context, snap *catalog.Snapshot) (*frames.ChannelState, error) {
	b, err := s.store.GetBlob(ctx, snap.Channel.Ref)
	if err != nil {
		return nil, fmt.Errorf("channel state of snapshot %s: %w", snap.Ref(), err)
	}
	cs, err := frames.Read(bytes.NewReader(b))
	if err != nil {
		return nil, fmt.Errorf("channel state of snapshot %s: %w", snap.Ref(), err)
	}
	return cs, nil
}

// load gives all nodes their state. They do not run yet. With lazily, memory follows
// while they run; notes say why that cannot be done, for those where it can't.
func (s *Server) load(ctx context.Context, sl *slice, snap *catalog.Snapshot, lazily bool, tell teller) (notes []string, err error) {
	var mu sync.Mutex
	var plain reasons
	g, gctx := errgroup.WithContext(ctx)
	for _, n := range snap.Nodes {
		g.Go(func() error {
			why, err := s.loadNode(gctx, sl, snap, n, lazily)
			if err != nil {
				return fmt.Errorf("node %q from snapshot %s: %w", n.Name, snap.Ref(), err)
			}
			detail := ""
			switch {
			case why != nil:
				mu.Lock()
				plain.add(why)
				mu.Unlock()
			case lazily:
				detail = "its memory follows"
			}
			tell("load", n.Name, detail)
			return nil
		})
	}
	err = g.Wait()
	return plain, err
}

// run lets the nodes that have their state run, together, and gives them the channel
// state. It returns the skew of the instants at which they began.
func (sl *slice) run(ctx context.Context, channel *frames.ChannelState) (time.Duration, error) {
	var mu sync.Mutex
	var first, last time.Time
	g, gctx := errgroup.WithContext(ctx)
	for i := range sl.topo.Nodes {
		n := &sl.topo.Nodes[i]
		g.Go(func() error {
			at, err := sl.agents[n.Host].RunNode(gctx, sl.topo.Slice, n.Name, channel.Frames, channel.Receivers)
			mu.Lock()
			defer mu.Unlock()
			if first.IsZero() || at.Before(first) {
				first = at
			}
			if at.After(last) {
				last = at
			}
			return err
		})
	}
	err := g.Wait()
	return last.Sub(first), err
}

func snapshotMessage(s *catalog.Snapshot) *violinv1.Snapshot {
	m := &violinv1.Snapshot{
		Id: s.ID, Slice: s.Slice, Tags: s.Tags, Parent: s.Parent, ParentSlice: s.ParentSlice, Checkpoint: s.Checkpoint, Created: timestamp(s.Created),
		Duration: durationpb.New(s.Totals.Duration), Skew: durationpb.New(s.Totals.Skew),
		FramesHeld: uint64(s.Totals.Held), FramesRecorded: uint64(s.Totals.Recorded),
		FramesDropped: uint64(s.Totals.Dropped), FramesLostByNetwork: uint64(s.Totals.Lost),
		RawBytes: uint64(s.Totals.RawBytes), StoredBytes: uint64(s.Totals.StoredBytes),
		Mode: violinv1.CaptureMode_CAPTURE_MODE_BACKGROUND,
	}
	if s.Mode == "precopy" {
		m.Mode = violinv1.CaptureMode_CAPTURE_MODE_PRECOPY
	}
	switch s.Clock {
	case catalog.Frozen:
		m.Clock = violinv1.ClockPolicy_CLOCK_POLICY_FROZEN
	case catalog.CatchUp:
		m.Clock = violinv1.ClockPolicy_CLOCK_POLICY_CATCH_UP
	}
	if len(s.Tags) > 0 {
		m.Tag = s.Tags[0]
	}
	if s.Certificate != nil {
		m.Certificate = s.Certificate.Fingerprint.String()
	}
	var first time.Time
	for _, n := range s.Nodes {
		if first.IsZero() || n.CutAt.Before(first) {
			first = n.CutAt
		}
	}
	for _, n := range s.Nodes {
		var disks []*violinv1.SnapshotDisk
		for _, d := range n.Disks {
			disks = append(disks, &violinv1.SnapshotDisk{Name: d.Name, SizeBytes: uint64(d.Size), StoredBytes: uint64(d.StoredBytes), Use: diskUses[d.Use]})
		}
		m.Nodes = append(m.Nodes, &violinv1.SnapshotNode{
			Disks: disks,
			Name:  n.Name, Host: n.Host, Pause: durationpb.New(n.Pause), CutAt: timestamp(n.CutAt), CutOffset: durationpb.New(n.CutAt.Sub(first)),
			FramesHeld: uint64(n.Held), FramesRecorded: uint64(n.Recorded), RawBytes: uint64(n.RawBytes),
			StoredBytes: uint64(n.StoredBytes), Pages: uint64(n.Pages), ZeroPages: uint64(n.ZeroPages),
		})
	}
	return m
}
