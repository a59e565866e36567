package lab

import (
	"encoding/binary"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// numbered makes a frame of that size which carries its number.
func numbered(n uint32, size int) frame {
	data := make([]byte, max(size, 4))
	binary.BigEndian.PutUint32(data, n)
	return frame{data: data}
}

func number(f frame) uint32 { return binary.BigEndian.Uint32(f.data) }

// drain releases everything, as if for ever had passed.
func drain(s *shaper) (nums []uint32, dues []instant) {
	for {
		f, due, ok := s.release(1<<63 - 1)
		if !ok {
			return nums, dues
		}
		nums, dues = append(nums, number(f)), append(dues, due)
	}
}

func TestShaperDelaysExactly(t *testing.T) {
	s := newShaper(Shape{Delay: 30 * time.Millisecond}, 1, 0)
	s.admit(5*time.Millisecond, numbered(0, 100))
	if due, ok := s.next(); !ok || due != 35*time.Millisecond {
		t.Errorf("next = %v, %t, want 35ms", due, ok)
	}
	if _, _, ok := s.release(35*time.Millisecond - 1); ok {
		t.Error("released a nanosecond early")
	}
	if _, _, ok := s.release(35 * time.Millisecond); !ok {
		t.Error("not released on time")
	}
	if _, ok := s.next(); ok {
		t.Error("there is still a frame")
	}
}

func TestShaperRate(t *testing.T) {
	// 1000 bytes at 8 Mbit/s take a millisecond each, also after a rest.
	s := newShaper(Shape{Delay: 10 * time.Millisecond, Rate: 8_000_000}, 1, 0)
	for n := range uint32(3) {
		s.admit(0, numbered(n, 1000))
	}
	s.admit(100*time.Millisecond, numbered(3, 500))
	_, dues := drain(s)
	for i, want := range []time.Duration{11, 12, 13, 110} {
		want *= time.Millisecond
		if i == 3 {
			want += 500 * time.Microsecond
		}
		if dues[i] != want {
			t.Errorf("frame %d is due at %v, want %v", i, dues[i], want)
		}
	}
}

func TestShaperQueueIsBounded(t *testing.T) {
	s := newShaper(Shape{Delay: time.Second, QueueBytes: 250}, 1, 0)
	for n := range uint32(3) {
		s.admit(0, numbered(n, 100))
	}
	if got, want := s.stats, (Counters{Entered: 3, Overflow: 1, InFlight: 2, QueuedBytes: 200}); got != want {
		t.Errorf("counters %+v, want %+v", got, want)
	}
	if nums, _ := drain(s); len(nums) != 2 || nums[0] != 0 || nums[1] != 1 {
		t.Errorf("frames %v arrived, want the first two", nums)
	}
}

func TestShaperPartition(t *testing.T) {
	s := newShaper(Shape{Delay: time.Second}, 1, 0)
	s.admit(0, numbered(0, 100))
	s.partition(true)
	s.admit(1, numbered(1, 100))
	s.partition(true) // again: counts nothing twice
	s.partition(false)
	s.admit(2, numbered(2, 100))
	nums, _ := drain(s)
	if len(nums) != 1 || nums[0] != 2 {
		t.Errorf("frames %v arrived, want only the one after the partition", nums)
	}
	if got, want := s.stats, (Counters{Entered: 3, Delivered: 1, Bytes: 100, Partitioned: 2}); got != want {
		t.Errorf("counters %+v, want %+v", got, want)
	}
}

func TestShaperLosesItsShare(t *testing.T) {
	const frames = 100_000
	s := newShaper(Shape{Loss: 0.01}, 1, 0)
	for n := range uint32(frames) {
		s.admit(instant(n), numbered(n, 4))
	}
	// Ten standard deviations of the binomial distribution; the seed is fixed.
	if lost := s.stats.Lost; lost < 685 || lost > 1315 {
		t.Errorf("%d of %d frames lost, want about 1 %%", lost, frames)
	}
}

func TestShaperReorders(t *testing.T) {
	s := newShaper(Shape{Delay: time.Millisecond, Reorder: 0.1}, 1, 0)
	for n := range uint32(1000) {
		s.admit(instant(n)*instant(10*time.Microsecond), numbered(n, 4))
	}
	nums, _ := drain(s)
	late, highest := 0, uint32(0)
	for _, n := range nums {
		if n < highest {
			late++
		}
		highest = max(highest, n)
	}
	if late < 50 || uint64(late) > s.stats.Reordered {
		t.Errorf("%d of 1000 frames were overtaken, want about 100, at most the %d that took a detour", late, s.stats.Reordered)
	}
}

func TestShaperIsRepeatable(t *testing.T) {
	run := func(seed, stream uint64) []uint32 {
		s := newShaper(Shape{Delay: 10, Jitter: 10, Loss: 0.2, Reorder: 0.2}, seed, stream)
		for n := range uint32(200) {
			s.admit(instant(n), numbered(n, 4))
		}
		nums, _ := drain(s)
		return nums
	}
	same := func(a, b []uint32) bool {
		if len(a) != len(b) {
			return false
		}
		for i := range a {
			if a[i] != b[i] {
				return false
			}
		}
		return true
	}
	if !same(run(7, 0), run(7, 0)) {
		t.Error("the same seed gave another fate")
	}
	if same(run(7, 0), run(8, 0)) || same(run(7, 0), run(7, 1)) {
		t.Error("another seed or link gave the same fate")
	}
}

// Whatever is done to a shaper: each frame that entered is delivered once or
// counted as dropped, none is early, and without reordering none overtakes.
func TestShaperProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		shapes := rapid.Custom(func(t *rapid.T) Shape {
			delay := rapid.Int64Range(0, 1000).Draw(t, "delay")
			return Shape{
				Delay:      time.Duration(delay),
				Jitter:     time.Duration(rapid.Int64Range(0, delay).Draw(t, "jitter")),
				Loss:       rapid.SampledFrom([]float64{0, 0, 0.5, 1}).Draw(t, "loss"),
				Reorder:    rapid.SampledFrom([]float64{0, 0, 0.5, 1}).Draw(t, "reorder"),
				Rate:       rapid.SampledFrom([]int64{0, 1e9, 1e12}).Draw(t, "rate"),
				QueueBytes: rapid.SampledFrom([]int{0, 100, 10_000}).Draw(t, "queue"),
			}
		})
		s := newShaper(shapes.Draw(t, "shape"), rapid.Uint64().Draw(t, "seed"), 0)
		mayOvertake := s.shape.Reorder > 0
		earliest := make(map[uint32]instant) // of the frames that entered
		var now instant
		var sent uint32
		var last int64 = -1
		check := func(until instant) {
			for {
				f, due, ok := s.release(until)
				if !ok {
					return
				}
				n := number(f)
				bound, known := earliest[n]
				if !known {
					t.Fatalf("frame %d arrived twice, or was never sent", n)
				}
				delete(earliest, n)
				if due < bound || due > until {
					t.Fatalf("frame %d arrived at %v, want it between %v and %v", n, due, bound, until)
				}
				if !mayOvertake && int64(n) < last {
					t.Fatalf("frame %d arrived after %d", n, last)
				}
				last = max(last, int64(n))
			}
		}
		for range rapid.IntRange(0, 100).Draw(t, "steps") {
			switch rapid.SampledFrom([]string{"send", "send", "send", "wait", "shape", "cut", "mend"}).Draw(t, "step") {
			case "send":
				earliest[sent] = now + s.shape.Delay - s.shape.Jitter
				s.admit(now, numbered(sent, rapid.IntRange(4, 200).Draw(t, "size")))
				sent++
			case "wait":
				now += instant(rapid.Int64Range(0, 2000).Draw(t, "wait"))
				check(now)
			case "shape":
				s.shape = shapes.Draw(t, "shape")
				mayOvertake = mayOvertake || s.shape.Reorder > 0
			case "cut":
				s.partition(true)
			case "mend":
				s.partition(false)
			}
			if c := s.stats; c.Entered != c.Delivered+c.Dropped()+uint64(c.InFlight) || c.InFlight != len(s.queue) {
				t.Fatalf("counters don't add up: %+v with %d queued", c, len(s.queue))
			}
		}
		check(1<<63 - 1)
		c := s.stats
		if c.InFlight != 0 || c.QueuedBytes != 0 || c.Dropped() != uint64(len(earliest)) {
			t.Fatalf("in the end %+v, with %d frames that never arrived", c, len(earliest))
		}
	})
}

func BenchmarkShaper(b *testing.B) {
	s := newShaper(Shape{Delay: 30 * time.Millisecond, Jitter: time.Millisecond, Loss: 0.01, Reorder: 0.01}, 1, 0)
	f := numbered(0, 1500)
	for i := 0; b.Loop(); i++ {
		now := instant(i) * instant(25*time.Microsecond) // 40,000 frames a second
		s.admit(now, f)
		for {
			if _, _, ok := s.release(now); !ok {
				break
			}
		}
	}
}
