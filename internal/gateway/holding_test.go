package gateway

import (
	"slices"
	"testing"
)

// A hold that is full loses what comes last, and what it has comes out in order.
func TestHoldIsBounded(t *testing.T) {
	var h hold
	const size = HoldBytes / 4
	for i := range 6 {
		f := make([]byte, size)
		f[0] = byte(i)
		if ok := h.put(f); ok != (i < 4) {
			t.Errorf("frame %d: %v", i, ok)
		}
	}
	var got []byte
	send := func(f []byte) { got = append(got, f[0]) }
	h.release(h.mark()-2, send)
	if !h.put(make([]byte, size)) {
		t.Error("no room after a release")
	}
	h.release(h.mark(), send)
	if !slices.Equal(got, []byte{0, 1, 2, 3, 0}) || h.dropped != 2 || h.bytes != 0 {
		t.Errorf("released %v, dropped %d, %d bytes left", got, h.dropped, h.bytes)
	}
}

// A mark that an earlier hold gave releases nothing of one that was begun since.
func TestHoldForgetsMarks(t *testing.T) {
	var before, h hold
	before.begin()
	h.begin()
	for range 3 {
		before.put([]byte{1})
		h.put([]byte{2})
	}
	released := 0
	send := func([]byte) { released++ }
	h.release(before.mark(), send)
	h.release(0, send)
	h.release(h.mark()+1, send)
	if released > 0 {
		t.Errorf("%d frames were released by marks of another hold", released)
	}
	h.release(h.mark()-1, send)
	if released != 2 {
		t.Errorf("%d frames were released, want 2", released)
	}
}
