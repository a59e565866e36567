package cut

import "testing"

// A frame from outside has no epoch: whatever its number, it is never newer, and never recorded.
func TestOutsideFrames(t *testing.T) {
	for epoch := range 256 {
		g := NewGate[int](7, Limits{})
		f := Frame[int]{Epoch: Epoch(epoch), Outside: true}
		if v, err := g.Arrive(f); err != nil || v != (Verdict{Deliver: true}) {
			t.Fatalf("open: %+v, %v", v, err)
		}
		g.Close()
		for range 2 { // before the flip and after it
			if v, err := g.Arrive(f); err != nil || v != (Verdict{}) {
				t.Fatalf("closed: %+v, %v", v, err)
			}
			g.Flip(8, true)
		}
		out := g.Open()
		if len(out) != 2 || out[0].Record || out[1].Record || g.Held() != 0 {
			t.Fatalf("given up: %+v", out)
		}
		if v, err := g.Arrive(f); err != nil || v != (Verdict{Deliver: true}) {
			t.Fatalf("recording: %+v, %v", v, err)
		}
		if s := g.Stats(); s.Recorded != 0 || s.Late != 0 || s.Held != 2 {
			t.Fatalf("%+v", s)
		}
	}
}
