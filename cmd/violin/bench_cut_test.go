package main

import (
	"strings"
	"testing"
	"time"

	"violin/internal/bench"
)

func TestJudgeCuts(t *testing.T) {
	good := bench.Cut{Newer: "hold", Skew: 5 * time.Millisecond, Before: 100, Across: 95, UDPSent: 10}
	for _, test := range []struct {
		change func(*bench.Cut)
		want   string
	}{
		{func(*bench.Cut) {}, ""},
		{func(c *bench.Cut) { c.Across = 94 }, "goodput"},
		{func(c *bench.Cut) { c.Before = 0 }, "goodput"},
		{func(c *bench.Cut) { c.Timeouts = 1 }, "timeouts"},
		{func(c *bench.Cut) { c.UDPLost = 1 }, "1 of 10 datagrams"},
		{func(c *bench.Cut) { c.UDPSent = 0 }, "datagrams"},
		{func(c *bench.Cut) { c.Skew++ }, "skew"},
		{func(c *bench.Cut) { c.Newer, c.UDPLost = "drop", 1 }, ""},
	} {
		c := good
		test.change(&c)
		f := cutFigures{Coordination: []bench.Coordination{{Hosts: 10, Took: 10}, {Hosts: 1000, Took: 19}}, Cuts: []bench.Cut{c}}
		f.judge()
		if got := strings.Join(f.Violations, "; "); (got == "") != (test.want == "") || !strings.Contains(got, test.want) {
			t.Errorf("%+v: %q, want %q", c, got, test.want)
		}
	}
	f := cutFigures{Coordination: []bench.Coordination{{Hosts: 10, Took: 10}, {Hosts: 1000, Took: 20}}}
	if f.judge(); len(f.Violations) != 1 {
		t.Errorf("twice the time: %q", f.Violations)
	}
}
