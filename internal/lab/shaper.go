package lab

import (
	"container/heap"
	"math/rand/v2"
	"time"
)

// Counters tell what became of the frames of one direction of a link. Every
// frame that Entered is counted in exactly one of Delivered, Lost, Overflow,
// Partitioned and InFlight.
type Counters struct {
	Entered     uint64
	Delivered   uint64
	Bytes       uint64 // of the frames delivered, Ethernet header included
	Lost        uint64 // by chance (Shape.Loss)
	Overflow    uint64 // the queue was full (Shape.QueueBytes)
	Partitioned uint64 // sent, or on their way, while the link was cut
	Reordered   uint64 // took a detour (Shape.Reorder); counted above as well
	InFlight    int    // on their way now
	QueuedBytes int    // of the frames in flight
}

// Dropped is the number of frames that did not and will not arrive.
func (c Counters) Dropped() uint64 { return c.Lost + c.Overflow + c.Partitioned }

// An instant is the time since the lab was started. It is always handed in, so
// that the shaper can be tested without a clock.
type instant = time.Duration

// A frame on the WAN. Its site of destination is settled when it enters.
type frame struct {
	data []byte
	to   int // index of the site
}

// A shaper is one direction of a link: frames go in by admit and come out by
// release when their time has come. It is not safe for concurrent use.
type shaper struct {
	shape     Shape
	cut       bool // partitioned
	rng       *rand.Rand
	queue     arrivals
	seq       uint64  // of the frame admitted last
	busyUntil instant // the sender's line is free again
	lastDue   instant // of the frames that keep their order
	stats     Counters
}

func newShaper(shape Shape, seed, stream uint64) *shaper {
	return &shaper{shape: shape, rng: rand.New(rand.NewPCG(seed, stream))}
}

// admit takes a frame that reaches the link at now, and keeps its data.
func (s *shaper) admit(now instant, f frame) {
	s.stats.Entered++
	if s.cut {
		s.stats.Partitioned++
		return
	}
	if s.shape.Loss > 0 && s.rng.Float64() < s.shape.Loss {
		s.stats.Lost++
		return
	}
	limit := s.shape.QueueBytes
	if limit == 0 {
		limit = DefaultQueueBytes
	}
	if s.stats.QueuedBytes+len(f.data) > limit {
		s.stats.Overflow++
		return
	}

	sent := max(now, s.busyUntil)
	if s.shape.Rate > 0 {
		sent += time.Duration(float64(len(f.data)) * 8 * float64(time.Second) / float64(s.shape.Rate))
	}
	s.busyUntil = sent

	due := sent + s.shape.Delay
	if j := s.shape.Jitter; j > 0 {
		due += time.Duration((s.rng.Float64()*2 - 1) * float64(j))
	}
	due = max(due, s.lastDue)
	if s.shape.Reorder > 0 && s.rng.Float64() < s.shape.Reorder {
		// lastDue stays as it was: the frames behind don't wait for this one.
		s.stats.Reordered++
		due += 1 + time.Duration(s.rng.Float64()*float64(max(s.shape.Delay, time.Millisecond)))
	} else {
		s.lastDue = due
	}

	s.seq++
	heap.Push(&s.queue, &arrival{frame: f, due: due, seq: s.seq})
	s.stats.InFlight++
	s.stats.QueuedBytes += len(f.data)
}

// next tells when release will have a frame, if there is one.
func (s *shaper) next() (instant, bool) {
	if len(s.queue) == 0 {
		return 0, false
	}
	return s.queue[0].due, true
}

// release gives out the next frame that is due at now, and when it was due.
func (s *shaper) release(now instant) (f frame, due instant, ok bool) {
	if len(s.queue) == 0 || s.queue[0].due > now {
		return frame{}, 0, false
	}
	a := heap.Pop(&s.queue).(*arrival)
	s.stats.InFlight--
	s.stats.QueuedBytes -= len(a.data)
	s.stats.Delivered++
	s.stats.Bytes += uint64(len(a.data))
	return a.frame, a.due, true
}

// partition cuts the line, which loses what is on it, or mends it.
func (s *shaper) partition(cut bool) {
	s.cut = cut
	if !cut {
		return
	}
	s.stats.Partitioned += uint64(len(s.queue))
	s.stats.InFlight, s.stats.QueuedBytes = 0, 0
	s.queue = nil
	s.busyUntil, s.lastDue = 0, 0
}

// arrivals is a heap by time of arrival; frames of the same time keep the order
// they were sent in.
type arrivals []*arrival

type arrival struct {
	frame
	due instant
	seq uint64
}

func (q arrivals) Len() int { return len(q) }
func (q arrivals) Less(i, j int) bool {
	return q[i].due < q[j].due || q[i].due == q[j].due && q[i].seq < q[j].seq
}
func (q arrivals) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *arrivals) Push(x any)   { *q = append(*q, x.(*arrival)) }
func (q *arrivals) Pop() any {
	old := *q
	last := old[len(old)-1]
	old[len(old)-1] = nil
	*q = old[:len(old)-1]
	return last
}
