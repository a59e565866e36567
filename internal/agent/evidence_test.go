package agent

import (
	"strings"
	"testing"
	"time"

	"violin/internal/cut"
	"violin/internal/fabric"
)

func TestDroppedFramesFailTheCut(t *testing.T) {
	before := fabric.Counters{Handed: 10, Seen: 8} // two are gone since long ago
	for _, test := range []struct {
		handed, seen uint64
		waited       time.Duration
		done         bool
		want         string
	}{
		{15, 13, 0, true, ""},
		{15, 12, 0, false, ""},                               // it may be on its way
		{15, 12, time.Minute, true, "1 frames were dropped"}, // it is not
		{15, 10, time.Minute, true, "3 frames were dropped"},
		{8, 13, 0, false, ""}, // the switch has not told all yet
		{8, 13, time.Minute, true, ""},
	} {
		done, err := judge(dropped(before, fabric.Counters{Handed: test.handed, Seen: test.seen}), test.waited)
		if done != test.done || (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%+v: %v, %v", test, done, err)
		}
	}
}

// TestTally checks that evidence does not rest on what the gate says of itself.
func TestTally(t *testing.T) {
	var n tally
	n.arrive(255, true) // a copy for an earlier cut
	n.arrive(254, false)
	n.deliver(254, 255, false)
	n.flipped = true
	n.arrive(255, true)
	n.arrive(255, false)
	n.arrive(0, false)
	n.arrive(1, false)
	n.deliver(255, 0, false)
	n.deliver(0, 0, false)
	n.deliver(1, 0, false)
	n.failed++
	g := n.gate(cut.GateStats{Held: 3, Recorded: 5}, cut.GateStats{Held: 4, Recorded: 7}, 6)
	if g.Handed != 4 || g.Delivered != 3 || g.Failed != 1 || g.Newer != 1 || g.Older != 1 || g.Late != 1 || g.Copies != 1 || g.Held != 1 || g.Recorded != 2 || g.Waiting != 6 {
		t.Errorf("%+v", g)
	}
}
