package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"violin/internal/bench"
)

// What `violin bench cut` holds its figures against.
const (
	leastGoodput = 0.95
	mostSkew     = 5 * time.Millisecond
	mostGrowth   = 2 // of the time for 1,000 hosts over that for 10
)

func (a *app) benchCutCommand() *cobra.Command {
	var runs int
	var coordination bool
	cmd := &cobra.Command{
		Use:   "cut",
		Short: "Measure cuts: what they do to flows, and how they scale",
		Long: `Measure cuts. First the coordination alone: the real coordinator and protocol, on
simulated hosts. Then live: a slice of four nodes at two sites with a round trip of 60 ms,
whose nodes send by TCP and UDP over the WAN while it is cut, with the policies hold
and drop in turn; and a restore of the last snapshot of each. Needs the image "mpi".
  GOODPUT      of TCP in the 5 s from half a second before the cut, to that in the 5 s before
  TIMEOUTS     retransmission timeouts of TCP from 1.5 s before the cut to 5 s after it
  UDP LOST     datagrams of the whole flow of 16 s
  RETRANSMITS  segments in the whole flow; of a restore, in the 5 s after it
The exit status is 1 if a bound does not hold with the policy hold: goodput at least
95 %, no timeout, no datagram lost, skew at most 5 ms; and 1,000 hosts in less than
twice the time of 10.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if runs < 1 || runs > 100 {
				return &failure{code: exitUsage, err: fmt.Errorf("--runs %d: 1 to 100", runs)}
			}
			return a.benchCut(cmd.Context(), runs, coordination)
		},
	}
	cmd.Flags().IntVar(&runs, "runs", 3, "live cuts with each policy")
	cmd.Flags().BoolVar(&coordination, "coordination", false, "the coordination alone: no server, no image, no root")
	return cmd
}

type cutFigures struct {
	Machine      bench.Machine        `json:"machine"`
	Coordination []bench.Coordination `json:"coordination"`
	Cuts         []bench.Cut          `json:"cuts,omitempty"`
	Restores     []bench.Restore      `json:"restores,omitempty"`
	Violations   []string             `json:"violations,omitempty"`
}

func (a *app) benchCut(ctx context.Context, runs int, coordination bool) error {
	if !coordination {
		if err := a.here("bench cut", "measures this machine"); err != nil {
			return err
		}
	}
	p := a.progress()
	defer p.done()
	f := cutFigures{Machine: bench.ThisMachine()}
	for _, hosts := range []int{10, 100, 1000} {
		p.step("measure", "", fmt.Sprintf("the coordination of %d hosts", hosts))
		c, err := bench.Coordinate(ctx, hosts, 9)
		if err != nil {
			return err
		}
		f.Coordination = append(f.Coordination, c)
	}
	if !coordination {
		client, err := a.startServer(ctx, p)
		if err != nil {
			return err
		}
		f.Cuts, f.Restores, err = bench.Live(ctx, client, runs, func(what string) { p.step("measure", "", what) })
		if err != nil {
			return err
		}
	}
	p.done()
	f.judge()
	if err := a.printFigures(f, f.write); err != nil {
		return err
	}
	if len(f.Violations) > 0 {
		return &failure{code: exitFailure, err: errors.New("did not hold: " + strings.Join(f.Violations, "; "))}
	}
	return nil
}

func (f *cutFigures) judge() {
	few, many := f.Coordination[0], f.Coordination[len(f.Coordination)-1]
	if many.Took >= mostGrowth*few.Took {
		f.Violations = append(f.Violations, fmt.Sprintf("%d hosts took %s, %d took %s", many.Hosts, formatDuration(many.Took), few.Hosts, formatDuration(few.Took)))
	}
	for i, c := range f.Cuts {
		if c.Newer != "hold" {
			continue
		}
		bad := func(format string, args ...any) {
			f.Violations = append(f.Violations, fmt.Sprintf("cut %d: ", i+1)+fmt.Sprintf(format, args...))
		}
		if c.Ratio() < leastGoodput {
			bad("goodput fell to %.1f %%", 100*c.Ratio())
		}
		if c.Timeouts > 0 {
			bad("%d timeouts of TCP", c.Timeouts)
		}
		if c.UDPLost > 0 || c.UDPSent == 0 {
			bad("%d of %d datagrams lost", c.UDPLost, c.UDPSent)
		}
		if c.Skew > mostSkew {
			bad("skew of %s", formatDuration(c.Skew))
		}
	}
}

func (f *cutFigures) write(w io.Writer) {
	t := newTable("SIMULATED HOSTS", ">A CUT TAKES")
	for _, c := range f.Coordination {
		t.row(fmt.Sprint(c.Hosts), formatDuration(c.Took))
	}
	t.write(w)
	if len(f.Cuts) > 0 {
		fmt.Fprintln(w)
		t = newTable("CUT", "NEWER", ">PAUSE", ">SKEW", ">HELD", ">RECORDED", ">DROPPED", ">GOODPUT", ">RETRANSMITS", ">TIMEOUTS", ">UDP LOST")
		for i, c := range f.Cuts {
			t.row(fmt.Sprint(i+1), c.Newer, formatDuration(c.Pause), formatDuration(c.Skew), formatCount(c.Held), formatCount(c.Recorded), formatCount(c.Dropped),
				fmt.Sprintf("%.1f %%", 100*c.Ratio()), fmt.Sprint(c.Retransmits), fmt.Sprint(c.Timeouts), fmt.Sprintf("%d of %d", c.UDPLost, c.UDPSent))
		}
		t.write(w)
		fmt.Fprintln(w)
		t = newTable("RESTORE OF", ">TOOK", ">SKEW", ">INJECTED", ">RETRANSMITS", ">TIMEOUTS")
		for _, r := range f.Restores {
			t.row(r.Newer, formatDuration(r.Took), formatDuration(r.Skew), formatCount(r.Injected), fmt.Sprint(r.Retransmits), fmt.Sprint(r.Timeouts))
		}
		t.write(w)
	}
	fmt.Fprintf(w, "\n%s\n", f.Machine)
}
