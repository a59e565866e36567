package fabric

import (
	"context"
	"testing"
	"time"

	"violin/internal/coloring"
)

// What a gate gives up reaches the guest, and what the switch does not take is known.
func TestOutput(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	p := newPair(ctx, t, 0, func(coloring.Packet, []byte) {})
	sw, g := p.switches["b"], p.guests["b"]
	frame := make([]byte, 100)
	copy(frame, g.addr)
	frame[12], frame[13] = 0x88, 0xb5
	const frames = 50
	for range frames {
		if err := sw.Output(sw.taps["n0"], frame); err != nil {
			t.Fatal(err)
		}
	}
	g.receive(t, frames)
	for _, want := range []uint64{0, 1} {
		c, err := sw.Counters(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if c.Refused != want {
			t.Errorf("%d frames refused, want %d", c.Refused, want)
		}
		if err := sw.Output(0xffff_fff0, frame); err != nil { // no such port
			t.Fatal(err)
		}
	}
}
