package server

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	violinv1 "violin/api/violin/v1"
	"violin/internal/catalog"
)

// clockBound bounds the wait for a guest agent that may not be there.
const clockBound = 10 * time.Second

func clockName(p violinv1.ClockPolicy) string {
	switch p {
	case violinv1.ClockPolicy_CLOCK_POLICY_FROZEN:
		return catalog.Frozen
	case violinv1.ClockPolicy_CLOCK_POLICY_CATCH_UP:
		return catalog.CatchUp
	}
	return ""
}

// clockOf is what becomes of the clocks: what is asked for, else what the snapshot
// says, else the default.
func clockOf(asked violinv1.ClockPolicy, snapshot, otherwise string) string {
	for _, c := range []string{clockName(asked), snapshot} {
		if c != "" {
			return c
		}
	}
	return otherwise
}

// setClocks carries a policy out on guests that run. A guest whose clock could not be
// set runs on with its old one; the notes name it.
func (sl *slice) setClocks(ctx context.Context, policy string, tell teller) (notes []string) {
	if policy != catalog.CatchUp {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, clockBound)
	defer cancel()
	var mu sync.Mutex
	var all sync.WaitGroup
	for i := range sl.topo.Nodes {
		n := &sl.topo.Nodes[i]
		all.Go(func() {
			if err := sl.agents[n.Host].SetClock(ctx, sl.topo.Slice, n.Name); err != nil {
				mu.Lock()
				defer mu.Unlock()
				notes = append(notes, fmt.Sprintf("its clock goes on from the cut: %v", err))
				return
			}
			tell("clock", n.Name, "set to now")
		})
	}
	all.Wait()
	slices.Sort(notes)
	return notes
}
