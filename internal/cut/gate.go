package cut

import (
	"fmt"
	"slices"
)

// Gate decides what becomes of the frames that a node's switch hands to its
// controller. There is one for each node, over all of its interfaces.
//
// The switch decides most frames by itself. Its flow tables deliver frames of
// the node's own epoch; they deliver those of the epoch before, with a copy to
// the controller while channel state is recorded; and they hand the rest to the
// controller alone: newer frames, and every frame while the node's gate is
// closed. Switch and controller are two things, so a frame may get here after
// the gate, the switch or both have moved on. The gate judges it by what the
// node is when the frame gets here, which is when the node can receive it, and
// not by why the switch sent it.
//
// The frames of one node reach Arrive in the order in which its switch handed
// them over, and the caller delivers in the order of Arrive's and Open's results.
//
// The zero value is not usable; see NewGate. A Gate is not safe for concurrent use.
type Gate[T any] struct {
	epoch     Epoch
	closed    bool
	recording bool
	limits    Limits

	held  []Frame[T] // in order of arrival
	bytes int        // sum of the held frames' sizes
	full  bool       // OverflowError was given for what is held
	stats GateStats
}

// Frame is one frame that the switch handed to the controller. T is whatever
// the caller needs to deliver it (its bytes, its port); the gate never looks at it.
type Frame[T any] struct {
	// Epoch is the sender's epoch when the frame left it.
	Epoch Epoch
	// Size in bytes counts against [Limits].
	Size int
	// Delivered says that the switch has delivered the frame itself and this is
	// the copy for the record. A switch in epoch e copies frames of epoch e-1, and
	// no others.
	Delivered bool
	// Outside says that the sender is not of the slice. Such a frame has no epoch:
	// a closed gate holds it like any other, but it is never newer than the node,
	// and never channel state.
	Outside bool

	Ref T
}

// Limits bound what a gate holds. They are where a cut is given up, not where
// frames are dropped: see [Gate.Arrive].
type Limits struct {
	Frames int // number of frames; 0: no bound
	Bytes  int // sum of their sizes; 0: no bound
}

// Verdict is what becomes of a frame that has just arrived. With neither Deliver
// nor Record the frame waits in the gate, or was a copy that nobody needs.
type Verdict struct {
	Deliver bool // to the node, at once
	Record  bool // the frame is channel state of the cut that is being recorded

	// Newer says that the frame waits for the node's cut: its sender has cut, the
	// node has not. A host that has been told to prepare may take this for its
	// order to cut the node (Lai and Yang's rule), which makes holds short where
	// orders travel slower than frames.
	Newer bool
}

// Released is a frame that the gate has held and now gives up, for delivery.
type Released[T any] struct {
	Frame  Frame[T]
	Record bool // as in [Verdict]
}

// GateStats count frames since the gate was made.
type GateStats struct {
	Arrived  uint64 // given to Arrive
	Held     uint64 // of these, and of those that were taken back, waited in the gate
	Recorded uint64 // of these, were channel state
	Late     uint64 // of these, were older but came while nothing was recorded: delivered, in no record
	Peak     int    // most frames held at one time
}

// OverflowError says that a gate holds more than its limits allow.
type OverflowError struct {
	Frames, Bytes int // held now
	Limits        Limits
}

func (e *OverflowError) Error() string {
	return fmt.Sprintf("hold frames at the gate: %d frames of %d bytes in all exceed the bound of %d frames, %d bytes: "+
		"abort the cut, and raise the bound or make the cut's skew smaller", e.Frames, e.Bytes, e.Limits.Frames, e.Limits.Bytes)
}

// NewGate returns an open gate of a node in the epoch.
func NewGate[T any](epoch Epoch, limits Limits) *Gate[T] {
	return &Gate[T]{epoch: epoch, limits: limits}
}

// Limit sets the bounds of what the gate holds from now on.
func (g *Gate[T]) Limit(limits Limits) { g.limits = limits }

// Epoch returns the node's epoch as far as the gate knows.
func (g *Gate[T]) Epoch() Epoch { return g.epoch }

// Held returns how many frames wait in the gate.
func (g *Gate[T]) Held() int { return len(g.held) }

// Stats returns the gate's counts.
func (g *Gate[T]) Stats() GateStats { return g.stats }

// Arrive judges one frame. An error is an *OverflowError: the frame is held all
// the same, for no frame is ever dropped, but the cut must now be aborted. It is
// given once for what is held, at the frame that exceeds the bound.
func (g *Gate[T]) Arrive(f Frame[T]) (Verdict, error) {
	g.stats.Arrived++
	if f.Delivered {
		// The switch that copied it was in the epoch after the frame's. If that is
		// not this node's epoch, a cut came between: the node had received the
		// frame before it, so it is in the node's memory and not in the channel.
		record := g.recording && f.Epoch.Next() == g.epoch
		g.count(record, f.Epoch.Next() == g.epoch)
		return Verdict{Record: record}, nil
	}
	if !g.closed && !g.newer(f) {
		return Verdict{Deliver: true, Record: g.judge(f)}, nil
	}
	v := Verdict{Newer: g.newer(f)}
	g.held = append(g.held, f)
	g.bytes += f.Size
	g.stats.Held++
	g.stats.Peak = max(g.stats.Peak, len(g.held))
	if !g.full && (exceeds(len(g.held), g.limits.Frames) || exceeds(g.bytes, g.limits.Bytes)) {
		g.full = true
		return v, &OverflowError{Frames: len(g.held), Bytes: g.bytes, Limits: g.limits}
	}
	return v, nil
}

// Close makes the gate hold every frame, whatever its epoch. It comes before
// the switch's gate is closed, so that nothing the switch then hands over is
// delivered: what has passed by then can settle in the node's memory.
func (g *Gate[T]) Close() { g.closed = true }

// TakeBack gives the gate, which must be closed, frames that had passed it and that the
// node has not received: they were taken out of the queue of its device, which the node
// does not read. They came before all that is held, so they go first. To the node they
// are of its own epoch, whatever their sender's was; no bound counts them.
func (g *Gate[T]) TakeBack(frames []Frame[T]) {
	taken := slices.Clone(frames)
	for i := range taken {
		taken[i].Epoch = g.epoch
		g.bytes += taken[i].Size
	}
	g.held = append(taken, g.held...)
	g.stats.Held += uint64(len(taken))
	g.stats.Peak = max(g.stats.Peak, len(g.held))
}

// Flip puts the node into the epoch. With record, older frames are channel state
// from here on, until StopRecording. The gate is closed by it if it was open:
// what it holds is released by Open, before anything that comes later.
func (g *Gate[T]) Flip(to Epoch, record bool) {
	g.closed = true
	g.epoch = to
	g.recording = record
}

// Open opens the gate and gives up, in the order of their arrival, the frames
// that the node may have; those that are still newer stay. Frames that arrive
// from now on are judged at once, also those that the switch handed over
// because its own gate was, or still is, closed. The switch's gate opens after
// the released frames are delivered, so that none is overtaken by a frame that
// came later.
func (g *Gate[T]) Open() []Released[T] {
	g.closed = false
	var out []Released[T]
	var newer []Frame[T]
	for _, f := range g.held {
		if g.newer(f) {
			newer = append(newer, f)
			continue
		}
		g.bytes -= f.Size
		out = append(out, Released[T]{Frame: f, Record: g.judge(f)})
	}
	g.held, g.full = newer, false
	return out
}

// StopRecording ends the channel state: the cut is drained, or aborted.
func (g *Gate[T]) StopRecording() { g.recording = false }

// newer tells whether a frame left its sender after a cut that the node has not made yet.
func (g *Gate[T]) newer(f Frame[T]) bool { return !f.Outside && f.Epoch.Compare(g.epoch) > 0 }

// judge tells whether a frame that is delivered now is channel state: it left
// its sender before the sender's cut and reaches the node after the node's.
func (g *Gate[T]) judge(f Frame[T]) (record bool) {
	older := !f.Outside && f.Epoch.Compare(g.epoch) < 0
	record = older && g.recording
	g.count(record, older)
	return record
}

func (g *Gate[T]) count(record, older bool) {
	switch {
	case record:
		g.stats.Recorded++
	case older:
		g.stats.Late++
	}
}

func exceeds(n, bound int) bool { return bound > 0 && n > bound }
