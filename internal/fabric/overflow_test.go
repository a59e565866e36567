package fabric

import (
	"context"
	"testing"
	"time"

	"violin/internal/coloring"
)

// A controller that does not keep up makes the switch throw frames away. It must be
// known how many, and by both accounts: the entries that handed them over, and the
// switch's own counters of full queues.
func TestOverflow(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	busy := make(chan struct{})
	p := newPair(ctx, t, 16<<10, func(coloring.Packet, []byte) { <-busy })
	sw, to := p.switches["b"], p.guests["b"]
	if err := sw.Update(ctx, func(st *coloring.State) { st.Nodes[p.keys["b"]] = coloring.Color{Closed: true} }); err != nil {
		t.Fatal(err)
	}
	for n, before := 0, uint64(0); ; n++ {
		p.guests["a"].send(t, to.addr, n)
		if n%10000 != 9999 {
			continue
		}
		time.Sleep(OverflowLag)
		thrown, err := sw.Overflowed(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if thrown > before && before > 0 {
			break
		}
		before = thrown
	}
	close(busy)

	var c Counters
	var thrown uint64
	for { // what has not been thrown away comes
		var err error
		if c, err = sw.Counters(ctx); err != nil {
			t.Fatal(err)
		}
		if thrown, err = sw.Overflowed(ctx); err != nil {
			t.Fatal(err)
		}
		if c.Handed-c.Seen == thrown {
			break
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%d frames handed over, %d of them came, %d thrown away", c.Handed, c.Seen, thrown)
		case <-time.After(50 * time.Millisecond):
		}
	}
	t.Logf("%d frames handed over, %d of them came, %d thrown away", c.Handed, c.Seen, thrown)
}
