package coordinator

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// lead is how long before an agreed instant a cut begins: what its preparation may
// take without being late. samples is how often a clock is read: the fastest
// answer is the best (Cristian, "Probabilistic clock synchronization", 1989).
const (
	lead    = 3 * time.Second
	samples = 8
)

// agree waits until it is time to prepare, and translates the instant that the cut is
// wanted at into each host's clock.
func (r *run) agree(ctx context.Context) error {
	if r.req.At.IsZero() {
		return nil
	}
	if wait := time.Until(r.req.At) - lead; wait > 0 {
		r.req.Progress("wait", "", "until "+r.req.At.Add(-lead).Format(time.TimeOnly))
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w", r.req.At.Format(time.RFC3339), ctx.Err())
		}
	}
	r.local = map[string]time.Time{}
	var mu sync.Mutex
	var asking sync.WaitGroup
	var failed error
	for name, host := range r.c.cfg.Hosts {
		asking.Go(func() {
			offset, err := clockOffset(ctx, host)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failed = fmt.Errorf("read the clock of host %s: %w", name, err)
				return
			}
			r.local[name] = r.req.At.Add(offset)
		})
	}
	asking.Wait()
	return failed
}

// clockOffset estimates by how much a host's clock is ahead of ours: its reading, taken
// for that of the middle of the round trip.
func clockOffset(ctx context.Context, host Host) (time.Duration, error) {
	var offset time.Duration
	best := time.Duration(-1)
	for range samples {
		sent := time.Now()
		theirs, err := host.Now(ctx)
		if err != nil {
			return 0, err
		}
		trip := time.Since(sent)
		if best < 0 || trip < best {
			best, offset = trip, theirs.Sub(sent.Add(trip/2))
		}
	}
	return offset, nil
}
