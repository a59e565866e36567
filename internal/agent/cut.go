package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"violin/internal/certificate"
	"violin/internal/coloring"
	"violin/internal/cut"
	"violin/internal/fabric"
	"violin/internal/hypervisor/qemu"
	stream "violin/internal/migration/qemu"
	"violin/internal/priority"
	"violin/internal/store"
)

// The bounds of the silence after which no frame is under way from the switch's closed
// gate, and of the looks for a moment in which no copy comes.
const (
	openQuiet  = 10 * time.Millisecond
	levelTries = 20
)

// Order is one of the coordinator's messages for this host. Mode, Session, Newer
// and Limits go with SendPrepare, At with SendCut.
type Order struct {
	Slice    string
	Networks map[uint16]string // the slice's networks, by number: the counters' names
	Effect   cut.Effect
	Mode     qemu.Mode
	Session  Session
	Newer    Newer
	Limits   cut.Limits // of what each gate holds; zero for [DefaultLimits]
	At       time.Time  // when the vCPUs are to stop, by this host's clock; zero or past for at once
	Halt     bool       // the nodes are to stand still once they are captured; with SendPrepare
}

// closeLead is how long before an agreed instant a node's gate is closed: what it takes
// until the node could stop, on a busy machine.
const closeLead = 30 * time.Millisecond

// Newer is what becomes of a newer frame at a node that has not cut.
type Newer int

// The policies for newer frames.
const (
	Hold    Newer = iota // it waits for the node's cut
	Trigger              // it waits, and is taken for the order to cut the node
	Drop                 // it is dropped, and no channel state recorded: what VNsnap did, for comparison
)

// NodeResult is what a node brings to a snapshot.
type NodeResult struct {
	Node      string
	CutAt     time.Time // the vCPUs stopped
	Pause     time.Duration
	Device    store.BlobRef
	Memory    store.BlobRef
	Stats     store.MemoryStats
	Disks     []Disk
	RawBytes  uint64 // of the migration stream
	Held      uint64
	Recorded  []Recorded
	Interface []Interface
	Steps     []certificate.Step
	Gate      certificate.Gate
}

// Disk is what a disk brings to a snapshot.
type Disk struct {
	Name   string
	Size   uint64 // bytes
	Blocks store.BlobRef
	Stats  store.MemoryStats
}

// hostCut is one cut on this host.
type hostCut struct {
	a      *Agent
	order  Order
	id     string
	from   cut.Epoch
	to     cut.Epoch
	report func(cut.Event)
	ctx    context.Context
	cancel context.CancelFunc
	work   sync.WaitGroup // everything that ctx ends

	prepared chan struct{} // closed when the preparation has ended, for good or ill

	nodes     map[string]*nodeCut
	taken     bool // over from an agent that has died: all that is left is to end it
	ended     bool // commit or abort has begun
	began     time.Time
	reads     map[int]time.Time // when a round's counters were read
	before    fabric.Counters   // when the host prepared
	after     fabric.Counters   // when the recording had ended
	overflows uint64            // of the switch's queues, until the host prepared
	excused   int64             // frames counted as handed over that the switch had delivered
	guessed   bool              // excused is a bound, since frames came all the time
	excusing  sync.Mutex
	discarded uint64 // frames, by the policy [Drop]
}

// nodeCut is one node's part in it.
type nodeCut struct {
	n       *node
	capture *qemu.Capture
	decoded chan error  // one value: the stream has been read and stored
	ordered atomic.Bool // the cut has begun, by whatever order
	at      time.Time   // when its vCPUs are to stop; past for at once
	turn    sync.Mutex  // held while its steps are done
	begun   cut.Step
	base    cut.GateStats
	result  NodeResult
}

// Handle takes an order and returns at once; orders are taken in the order of
// the calls. What comes of it is reported as the cut package's events, from
// other goroutines.
func (a *Agent) Handle(o Order, report func(cut.Event)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	hc := a.cuts[o.Slice]
	switch e := o.Effect.(type) {
	case cut.SendPrepare:
		if hc != nil {
			report(cut.Failed{Cut: e.Cut, Host: a.cfg.Host, Reason: fmt.Sprintf("cut %s has not ended on this host", hc.id)})
			return
		}
		hc = a.newCut(o, e, report)
		a.cuts[o.Slice] = hc
		hc.spawn(hc.prepare)
	case cut.SendCut:
		if hc.goesOn(e.Cut) {
			for _, name := range e.Nodes {
				hc.spawn(func() {
					if hc.await(o.At.Add(-closeLead)) {
						hc.cutNode(name, o.At)
					}
				})
			}
		}
	case cut.SendPoll:
		if hc.goesOn(e.Cut) {
			hc.spawn(func() { hc.poll(e.Round, e.Epoch) })
		}
	case cut.SendCollect:
		if hc.goesOn(e.Cut) {
			hc.spawn(hc.collect)
		}
	case cut.SendCommit:
		switch {
		case hc == nil || hc.id != e.Cut:
			report(cut.Committed{Cut: e.Cut, Host: a.cfg.Host})
		case !hc.ended:
			hc.conclude(report)
			go hc.commit()
		}
	case cut.SendAbort:
		switch {
		case hc == nil || hc.id != e.Cut:
			report(cut.Aborted{Cut: e.Cut, Host: a.cfg.Host})
		case !hc.ended:
			hc.conclude(report)
			go hc.abort(e.To)
		}
	}
}

// goesOn tells whether the cut, which may be nil, is the one that is meant and takes more
// than its end. The agent's mu is held.
func (hc *hostCut) goesOn(id string) bool {
	return hc != nil && hc.id == id && !hc.ended && !hc.taken
}

// conclude says that the end has begun, and who is to be told of it: of a cut that was
// taken over, nobody was told of anything. The agent's mu is held.
func (hc *hostCut) conclude(report func(cut.Event)) {
	hc.ended = true
	if hc.taken {
		hc.report = report
	}
}

func (a *Agent) newCut(o Order, e cut.SendPrepare, report func(cut.Event)) *hostCut {
	hc := &hostCut{a: a, order: o, id: e.Cut, from: e.From, to: e.To, report: report, nodes: map[string]*nodeCut{},
		began: time.Now(), reads: map[int]time.Time{}, prepared: make(chan struct{})}
	hc.ctx, hc.cancel = context.WithCancel(context.Background())
	for key, n := range a.nodes {
		if key.Slice == o.Slice {
			nc := &nodeCut{n: n, decoded: make(chan error, 1)}
			nc.result.Node = key.Node
			nc.result.Interface = n.spec.Interfaces
			hc.nodes[key.Node] = nc
		}
	}
	return hc
}

func (hc *hostCut) spawn(f func()) {
	hc.work.Add(1)
	go func() {
		defer hc.work.Done()
		f()
	}()
}

func (hc *hostCut) fail(node string, err error) {
	hc.a.log.Warn("cut failed on host", "cut", hc.id, "node", node, "err", err)
	hc.report(cut.Failed{Cut: hc.id, Host: hc.a.cfg.Host, Node: node, Reason: err.Error()})
}

// count says of which epochs the frames are counted.
func (hc *hostCut) count(ctx context.Context, epochs ...cut.Epoch) error {
	return hc.a.fabric.Update(ctx, func(st *coloring.State) {
		for n := range hc.order.Networks {
			if _, ok := st.Counted[n]; ok {
				st.Counted[n] = epochs
			}
		}
	})
}

// prepare counts the new epoch's frames and sets the captures up: whatever takes
// time is done while the nodes run.
func (hc *hostCut) prepare() {
	defer close(hc.prepared)
	if err := hc.a.book.write(func(p *page) {
		p.Cuts = append(p.Cuts, cutEntry{Slice: hc.order.Slice, ID: hc.id, From: hc.from, To: hc.to, Networks: hc.order.Networks, Mode: hc.order.Mode})
	}); err != nil {
		hc.fail("", err)
		return
	}
	if err := hc.count(hc.ctx, hc.from, hc.to); err != nil {
		hc.fail("", err)
		return
	}
	counters, err := hc.counters(hc.ctx)
	if err != nil {
		hc.fail("", err)
		return
	}
	hc.before = counters
	if hc.overflows, err = hc.a.fabric.Overflowed(hc.ctx); err != nil {
		hc.fail("", err)
		return
	}
	var arming sync.WaitGroup
	var failed sync.Once
	ok := true
	for name, nc := range hc.nodes {
		arming.Add(1)
		go func() {
			defer arming.Done()
			if err := hc.arm(nc); err != nil {
				failed.Do(func() { ok = false; hc.fail(name, err) })
			}
		}()
	}
	arming.Wait()
	if ok {
		hc.a.cfg.Passed("", "prepare")
		hc.report(cut.Prepared{Cut: hc.id, Host: hc.a.cfg.Host})
	}
}

func (hc *hostCut) arm(nc *nodeCut) error {
	if !nc.n.alive() {
		return fmt.Errorf("its hypervisor is gone: %w", errors.Join(nc.n.vm.Err()))
	}
	if f := nc.n.followed(); f != nil {
		select {
		case <-f.done:
		default: // of which a server that has just come back may not know yet
			return errors.New("its memory still follows since the restore; wait until it has all of it")
		}
	}
	limits := hc.order.Limits
	if limits == (cut.Limits{}) {
		limits = hc.a.cfg.Limits
	}
	nc.n.mu.Lock()
	nc.base = nc.n.gate.Stats()
	nc.n.gate.Limit(limits)
	nc.n.tally = tally{}
	nc.n.recorded = nil
	nc.n.overflow = func(err error) { hc.fail(nc.n.spec.Name, err) }
	nc.n.newer = hc.newer(nc.n.spec.Name)
	nc.n.discard = hc.order.Newer == Drop
	nc.n.mu.Unlock()
	capture, err := nc.n.vm.Arm(hc.ctx, hc.order.Mode)
	if err != nil {
		return err
	}
	nc.capture = capture
	hc.spawn(func() { nc.decoded <- hc.receive(nc) })
	return capture.Ready(hc.ctx)
}

// receive is the far end of the migration: the node's state goes to the store.
func (hc *hostCut) receive(nc *nodeCut) error {
	priority.Background(hc.a.log)
	var pages PageWriter
	d := stream.NewDecoder(nc.capture.Stream())
	skeleton, err := d.Decode(func(blocks []stream.RAMBlock) (stream.PageSink, error) {
		regions := make([]store.Region, len(blocks))
		for i, b := range blocks {
			regions[i] = store.Region(b)
		}
		var err error
		pages, err = hc.order.Session.NewPageWriter(hc.ctx, regions)
		return pages, err
	})
	if err != nil {
		// QEMU must not wait for a reader that has given up.
		io.Copy(io.Discard, nc.capture.Stream()) //nolint:errcheck // the first error is the one that counts
		return fmt.Errorf("receive its state: %w", err)
	}
	if nc.result.Memory, err = pages.Close(); err != nil {
		return fmt.Errorf("store its memory: %w", err)
	}
	b, err := skeleton.MarshalBinary()
	if err != nil {
		return fmt.Errorf("store its devices: %w", err)
	}
	if nc.result.Device, err = hc.order.Session.PutBlob(hc.ctx, b); err != nil {
		return fmt.Errorf("store its devices: %w", err)
	}
	nc.result.Stats = pages.Stats()
	nc.result.RawBytes = d.Stats().RawBytes
	return nil
}

// storeDisks has the disks, as they were at the cut, go to the store: what was written
// since the last snapshot, or all, if that snapshot is no longer there.
func (hc *hostCut) storeDisks(nc *nodeCut) error {
	priority.Background(hc.a.log)
	for _, f := range nc.capture.Frozen() {
		w, err := hc.order.Session.NewDiskWriter(hc.ctx, f.Size, nc.n.disks[f.Disk])
		read := f.Changed
		if errors.Is(err, store.ErrMissing) {
			w, err = hc.order.Session.NewDiskWriter(hc.ctx, f.Size, store.BlobRef{})
			read = f.All
		}
		if err != nil {
			return fmt.Errorf("store disk %q: %w", f.Disk, err)
		}
		if err := read(w.Page); err != nil {
			return fmt.Errorf("store its disks: %w", err)
		}
		d := Disk{Name: f.Disk, Size: f.Size}
		if d.Blocks, err = w.Close(); err != nil {
			return fmt.Errorf("store disk %q: %w", f.Disk, err)
		}
		d.Stats = w.Stats()
		nc.result.Disks = append(nc.result.Disks, d)
	}
	return nil
}

// await waits for the instant that the nodes are to be cut at. It tells whether they
// still are to be.
func (hc *hostCut) await(at time.Time) bool {
	return hc.sleep(time.Until(at)) == nil
}

// newer is what a gate does, beside holding, at a newer frame; nil for nothing.
func (hc *hostCut) newer(name string) func() {
	if hc.order.Newer != Trigger {
		return nil
	}
	return sync.OnceFunc(func() {
		hc.a.mu.Lock()
		defer hc.a.mu.Unlock()
		if !hc.ended {
			hc.spawn(func() { hc.cutNode(name, time.Time{}) })
		}
	})
}

func (hc *hostCut) cutNode(name string, at time.Time) {
	nc := hc.nodes[name]
	if nc == nil {
		hc.fail(name, fmt.Errorf("host %s has no such node", hc.a.cfg.Host))
		return
	}
	if nc.ordered.Swap(true) {
		return // a newer frame and an order both tell it
	}
	if err := hc.ctx.Err(); err != nil {
		hc.fail(name, fmt.Errorf("the cut has been given up: %w", err))
		return
	}
	nc.at = at
	if err := hc.steps(nc); err != nil {
		hc.fail(name, err)
		return
	}
	hc.report(cut.NodeCut{Cut: hc.id, Node: name})
	hc.a.cfg.Passed(name, "drain")

	disks := make(chan error, 1)
	hc.spawn(func() { disks <- hc.storeDisks(nc) })
	select {
	case err := <-nc.decoded:
		if err == nil {
			err = nc.capture.Wait(hc.ctx)
		}
		if err == nil {
			err = <-disks // it ends when the cut does
		}
		if err != nil {
			hc.fail(name, err)
			return
		}
		hc.a.cfg.Passed(name, "store")
		hc.report(cut.Stored{Cut: hc.id, Node: name})
	case <-hc.ctx.Done():
	}
}

func (hc *hostCut) steps(nc *nodeCut) error {
	nc.turn.Lock()
	defer nc.turn.Unlock()
	if err := hc.ctx.Err(); err != nil {
		return err // it is being given up
	}
	defer hc.a.hurry()()
	for _, step := range cut.Steps() {
		nc.begun = step
		began, from := time.Now(), nc.n.epoch()
		if err := hc.step(nc, step); err != nil {
			return fmt.Errorf("%s: %w", step, err)
		}
		hc.witness(nc, step, began, from)
		hc.a.cfg.Passed(nc.n.spec.Name, step.String())
		hc.a.log.Debug("step done", "cut", hc.id, "node", nc.n.spec.Name, "step", step.String(), "took", time.Since(began))
	}
	return nil
}

// hurry makes what a pause waits for urgent: the agent, its keeper and its switch.
func (a *Agent) hurry() (relax func()) {
	lower := []func(){a.cfg.Urgency.Raise(), a.fabric.Urgency().Raise(), a.keeping.raise()}
	return func() {
		for _, l := range slices.Backward(lower) {
			l()
		}
	}
}

func (hc *hostCut) step(nc *nodeCut, step cut.Step) error {
	n, ctx := nc.n, hc.ctx
	var err error
	switch step {
	case cut.StepClose:
		if err := hc.close(ctx, n); err != nil {
			return err
		}
		return hc.excuse(ctx)
	case cut.StepSettle:
		return hc.settle(ctx, n)
	case cut.StepStop:
		if !hc.await(nc.at) {
			return ctx.Err()
		}
		nc.result.CutAt, err = nc.capture.Stop(ctx)
		return err
	case cut.StepFlush:
		return hc.flush(ctx, n)
	case cut.StepFlip:
		return hc.flip(ctx, n, hc.to, hc.order.Newer != Drop)
	case cut.StepCapture:
		return nc.capture.Release(ctx)
	case cut.StepResume:
		resumed, err := nc.capture.Resumed(ctx)
		nc.result.Pause = resumed.Sub(nc.result.CutAt)
		if err == nil && hc.order.Halt {
			err = n.vm.Stop(ctx)
		}
		return err
	case cut.StepOpen:
		if err := hc.open(ctx, n); err != nil {
			return err
		}
		return hc.level(ctx, n)
	}
	return fmt.Errorf("unknown step %d", step)
}

// level finds out what the record entries count that is no copy. Frames that came
// to the closed gate between [fabric.Switch.Update]'s purge and its bundle went to
// the gate, but the switch credits them to the entries that match once it is open.
// They would pass for copies that never come.
//
// The counters' answer comes behind all copies that it counts, so what it has in
// excess of those that have come is no copy: exactly, if none came meanwhile, for
// which it tries. Otherwise some are taken for none; the drain then waits for the
// quiet time, and loses nothing.
func (hc *hostCut) level(ctx context.Context, n *node) error {
	for range levelTries {
		before := n.copies()
		counters, err := hc.counters(ctx)
		if err != nil {
			return err
		}
		n.mu.Lock()
		for i, p := range n.ports {
			counted := counters.Records[p.number]
			p.others = counted - min(before[i], counted)
		}
		n.mu.Unlock()
		if slices.Equal(before, n.copies()) {
			return nil
		}
	}
	return nil
}

// copies are those that have come for the record in this cut, by port.
func (n *node) copies() []uint64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	var c []uint64
	for _, p := range n.ports {
		c = append(c, p.copies)
	}
	return c
}

func (hc *hostCut) close(ctx context.Context, n *node) error {
	n.mu.Lock()
	n.gate.Close()
	n.mu.Unlock()
	return hc.a.recolor(ctx, n, func(c *coloring.Color) { c.Closed = true })
}

func (hc *hostCut) flip(ctx context.Context, n *node, to cut.Epoch, record bool) error {
	n.mu.Lock()
	for _, p := range n.ports {
		p.copies, p.others = 0, 0 // the record entries are new, and so are their counters
	}
	n.mu.Unlock()
	if err := hc.a.recolor(ctx, n, func(c *coloring.Color) { c.Epoch, c.Recording = to, record }); err != nil {
		return err
	}
	n.mu.Lock()
	n.gate.Flip(to, record)
	n.tally.flipped = record
	n.mu.Unlock()
	return nil
}

// open opens gate and switch, and waits until what the switch had handed over
// while it was closed has been through the gate.
func (hc *hostCut) open(ctx context.Context, n *node) error {
	if err := hc.a.open(ctx, n); err != nil {
		return err
	}
	opened := time.Now()
	for {
		n.mu.Lock()
		last := n.arrived
		n.mu.Unlock()
		if last.Before(opened) {
			last = opened
		}
		wait := openQuiet - time.Since(last)
		if wait <= 0 {
			return nil
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// poll reports Mattern's counters, and beside them the way of the copies from
// the switch to the gates.
func (hc *hostCut) poll(round int, epoch cut.Epoch) {
	hc.a.mu.Lock()
	hc.reads[round] = time.Now()
	hc.a.mu.Unlock()
	counters, err := hc.counters(hc.ctx)
	if err != nil {
		hc.fail("", err)
		return
	}
	host := hc.a.cfg.Host
	var counts []cut.ChannelCount
	for ch, sent := range counters.Sent {
		if name, ok := hc.order.Networks[ch.Network]; ok && ch.Epoch == epoch {
			counts = append(counts, cut.ChannelCount{Channel: cut.Channel{From: host, To: hc.a.peer(ch.Peer), Network: name}, Sent: sent})
		}
	}
	for ch, received := range counters.Received {
		if name, ok := hc.order.Networks[ch.Network]; ok && ch.Epoch == epoch {
			counts = append(counts, cut.ChannelCount{Channel: cut.Channel{From: hc.a.peer(ch.Peer), To: host, Network: name}, Received: received})
		}
	}
	counts = append(counts, hc.copies(counters)...)
	hc.report(cut.Counters{Cut: hc.id, Host: host, Round: round, Counts: counts})
}

func (a *Agent) peer(id uint16) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.peers[id]
}

// collect ends the recording.
func (hc *hostCut) collect() {
	if err := hc.awaitSeen(); err != nil {
		hc.fail("", err)
		return
	}
	for name, nc := range hc.nodes {
		n := nc.n
		n.mu.Lock()
		missing := n.missing(hc.after)
		n.mu.Unlock()
		if missing > 0 {
			// The quiet time has passed: they never come. The node has these frames, and
			// a restore would not.
			hc.fail(name, fmt.Errorf("%d frames of the channel state were not handed over by the switch; try again", missing))
			return
		}
		n.mu.Lock()
		n.gate.StopRecording()
		nc.result.Recorded, n.recorded = n.recorded, nil
		st := n.gate.Stats()
		nc.result.Held = st.Held - nc.base.Held
		nc.result.Gate = n.tally.gate(nc.base, st, n.gate.Held())
		hc.discarded += n.tally.discarded
		n.overflow, n.newer, n.discard = nil, nil, false
		n.mu.Unlock()
		if err := hc.a.recolor(hc.ctx, n, func(c *coloring.Color) { c.Recording = false }); err != nil {
			hc.fail(name, err)
			return
		}
	}
	err := hc.awaitSeen()
	if err == nil {
		err = hc.overflowed()
	}
	if err != nil {
		hc.fail("", err)
		return
	}
	hc.a.cfg.Passed("", "collect")
	hc.report(cut.Collected{Cut: hc.id, Host: hc.a.cfg.Host})
}

// missing is how many copies the switch counts that have not come.
func (n *node) missing(c fabric.Counters) (sum uint64) {
	for _, p := range n.ports {
		counted := c.Records[p.number]
		sum += counted - min(p.copies+p.others, counted)
	}
	return sum
}

func (hc *hostCut) commit() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := hc.count(ctx, hc.to); err != nil {
		hc.a.log.Warn("counters of the old epoch stay", "cut", hc.id, "err", err)
	}
	hc.keepDisks()
	hc.a.cfg.Passed("", "commit")
	hc.end()
	hc.report(cut.Committed{Cut: hc.id, Host: hc.a.cfg.Host})
}

// keepDisks has the next cut's disks go on from this one's. That is written down before
// layers are merged: who takes over must know which are in the store. Of a cut that was
// taken over itself it is not known what the store has; the next one's disks then go on
// from an earlier one's.
func (hc *hostCut) keepDisks() {
	if hc.taken {
		for _, nc := range hc.nodes {
			if nc.capture != nil { // of a VM that had not ended
				nc.capture.Stored()
			}
		}
		return
	}
	type kept struct {
		tables  map[string]store.BlobRef
		through map[string]int
	}
	all := map[*nodeCut]kept{}
	for _, nc := range hc.nodes {
		k := kept{map[string]store.BlobRef{}, map[string]int{}}
		for _, d := range nc.result.Disks {
			k.tables[d.Name] = d.Blocks
		}
		for _, f := range nc.capture.Frozen() {
			k.through[f.Disk] = f.Through
		}
		all[nc] = k
	}
	err := hc.a.book.write(func(p *page) {
		for nc, k := range all {
			e := p.node(coloring.NodeKey{Slice: nc.n.spec.Slice, Node: nc.n.spec.Name})
			e.Spec.Disks, e.Stored = k.tables, k.through
		}
	})
	if err != nil {
		// As if it had been given up: the next snapshot reads these layers again.
		hc.a.log.Error("that disks are in the store is not written down", "cut", hc.id, "err", err)
		return
	}
	for nc, k := range all {
		nc.n.disks = k.tables
		nc.capture.Stored()
	}
}

// abort gives the cut up, as the coordinator orders it.
func (hc *hostCut) abort(to cut.Epoch) {
	if !hc.giveUp(to) {
		// The coordinator repeats the order.
		hc.a.mu.Lock()
		hc.ended = false
		hc.a.mu.Unlock()
		return
	}
	hc.a.cfg.Passed("", "abort")
	hc.end()
	hc.report(cut.Aborted{Cut: hc.id, Host: hc.a.cfg.Host})
}

// Abandon gives up the cut of a slice, if one runs, whose coordinator does not come
// back. Its nodes run on, and where it can be known, in the epoch that all others go
// to: the new one, if the host was ordered to cut or has been sent a newer frame. The
// coordinator's own order is carried out when it comes after all.
func (a *Agent) Abandon(slice string) {
	a.mu.Lock()
	hc := a.cuts[slice]
	if hc == nil || hc.ended {
		a.mu.Unlock()
		return
	}
	hc.ended = true // nothing is begun meanwhile
	a.mu.Unlock()
	to := hc.from
	for _, nc := range hc.nodes {
		nc.n.mu.Lock()
		if nc.ordered.Load() || nc.n.gate.Held() > 0 {
			to = hc.to
		}
		nc.n.mu.Unlock()
	}
	a.log.Warn("the cut is given up: its coordinator does not come back", "cut", hc.id, "epoch", to)
	done := hc.giveUp(to)
	a.mu.Lock()
	hc.ended = false
	a.mu.Unlock()
	if !done {
		a.log.Error("the cut was not given up cleanly", "cut", hc.id)
	}
}

// giveUp undoes the preparation if no node has been cut anywhere, and else brings
// the host's nodes forward into the new epoch without a capture. It may be called
// again, also with another epoch. It tells whether all nodes that live are there.
func (hc *hostCut) giveUp(to cut.Epoch) bool {
	hc.cancel()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	<-hc.prepared // what is armed is known
	var captures sync.WaitGroup
	for name, nc := range hc.nodes {
		if nc.capture == nil {
			continue
		}
		captures.Go(func() {
			hc.quieten(ctx, nc)
			if err := nc.capture.Abort(ctx); err != nil && nc.n.alive() {
				hc.a.log.Error("capture was not given up cleanly", "cut", hc.id, "node", name, "err", err)
			}
		})
	}
	captures.Wait()
	hc.work.Wait()
	ok := true
	for name, nc := range hc.nodes {
		n := nc.n
		n.mu.Lock()
		n.gate.StopRecording()
		n.recorded, n.overflow, n.newer, n.discard = nil, nil, nil, false
		n.mu.Unlock()
		abort := func() error { return hc.abortNode(ctx, nc, to) }
		if to == hc.from {
			abort = func() error { return hc.a.open(ctx, n) } // it was closed for the end of its capture
		}
		if err := abort(); err != nil {
			hc.a.log.Error("abort", "cut", hc.id, "node", name, "err", err)
			ok = ok && !n.alive()
		}
	}
	if err := hc.count(ctx, to); err != nil {
		hc.a.log.Warn("counters of the old epoch stay", "cut", hc.id, "err", err)
	}
	return ok
}

// quieten closes the gate of a node that has not been stopped, and lets it settle:
// QEMU stops the vCPUs by itself in order to end a background snapshot that it has
// begun, and what it holds for the guest would be lost.
func (hc *hostCut) quieten(ctx context.Context, nc *nodeCut) {
	nc.turn.Lock() // the step that was under way has ended
	defer nc.turn.Unlock()
	if hc.order.Mode != qemu.Background || nc.begun >= cut.StepStop || !nc.n.alive() {
		return
	}
	err := hc.close(ctx, nc.n)
	if err == nil {
		nc.begun = cut.StepSettle // which need not be closed again
		err = hc.settle(ctx, nc.n)
	}
	if err != nil && nc.n.alive() {
		hc.a.log.Warn("a node's capture is given up while frames are on their way into it", "cut", hc.id, "node", nc.n.spec.Name, "err", err)
	}
}

// abortNode brings a node into the new epoch. Whatever fails, the node does not stay
// stopped.
func (hc *hostCut) abortNode(ctx context.Context, nc *nodeCut, to cut.Epoch) error {
	defer hc.a.hurry()()
	settled, stopped := true, false
	for _, step := range cut.AbortSteps(nc.begun) {
		if !settled && (step == cut.StepStop || step == cut.StepFlush) {
			continue // what the hypervisor holds for the node would be gone
		}
		err := hc.abortStep(ctx, nc, step, to)
		switch {
		case err != nil && step == cut.StepSettle && ctx.Err() == nil:
			hc.a.log.Warn("the node does not stand still for the end of the cut", "cut", hc.id, "node", nc.n.spec.Name, "err", err)
			settled = false
			continue
		case err != nil && stopped:
			_, resumed := nc.n.vm.Resume(ctx)
			return errors.Join(fmt.Errorf("%s: %w", step, err), resumed)
		case err != nil:
			return fmt.Errorf("%s: %w", step, err)
		}
		stopped = step == cut.StepStop || stopped && step != cut.StepResume
	}
	return nil
}

func (hc *hostCut) abortStep(ctx context.Context, nc *nodeCut, step cut.Step, to cut.Epoch) error {
	switch step {
	case cut.StepClose:
		return hc.close(ctx, nc.n)
	case cut.StepSettle:
		return hc.settle(ctx, nc.n)
	case cut.StepStop:
		return nc.n.vm.Stop(ctx)
	case cut.StepFlush:
		return hc.flush(ctx, nc.n)
	case cut.StepFlip:
		return hc.flip(ctx, nc.n, to, false)
	case cut.StepResume:
		_, err := nc.n.vm.Resume(ctx)
		return err
	case cut.StepOpen:
		// The switch of a node that had been cut still copies older frames.
		if err := hc.a.recolor(ctx, nc.n, func(c *coloring.Color) { c.Recording = false }); err != nil {
			return err
		}
		return hc.open(ctx, nc.n)
	}
	return fmt.Errorf("unknown step %d of an abort", step)
}

func (hc *hostCut) end() {
	hc.cancel()
	if err := hc.a.book.write(func(p *page) {
		p.Cuts = slices.DeleteFunc(p.Cuts, func(e cutEntry) bool { return e.ID == hc.id })
	}); err != nil {
		hc.a.log.Error("that the cut has ended is not written down", "cut", hc.id, "err", err)
	}
	hc.a.mu.Lock()
	delete(hc.a.cuts, hc.order.Slice)
	hc.a.mu.Unlock()
}

// copies is the way of the copies for the record: from the switch, which counts
// what its record entries hand over, to the gates.
func (hc *hostCut) copies(counters fabric.Counters) []cut.ChannelCount {
	host := hc.a.cfg.Host
	var counts []cut.ChannelCount
	for _, nc := range hc.nodes {
		for _, p := range nc.n.ports {
			nc.n.mu.Lock()
			seen, others := p.copies, p.others
			nc.n.mu.Unlock()
			name := hc.order.Networks[nc.n.spec.Interfaces[p.index].Network]
			counts = append(counts, cut.ChannelCount{
				Channel: cut.Channel{From: host, To: host, Network: name},
				Sent:    counters.Records[p.number] - min(others, counters.Records[p.number]), Received: seen,
			})
		}
	}
	return counts
}
