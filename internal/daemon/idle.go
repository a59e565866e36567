package daemon

import (
	"context"
	"sync"
	"time"
)

// activity counts the requests of a server, to tell when it is no longer needed.
type activity struct {
	mu      sync.Mutex
	running int       // requests being served
	last    time.Time // when the last of them began or ended
	leaving bool
}

func newActivity() *activity { return &activity{last: time.Now()} }

// begin counts a request in. It is false once the server has decided to leave: the
// request must be refused, so that its client turns to the next server.
func (a *activity) begin() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.leaving {
		return false
	}
	a.running++
	a.last = time.Now()
	return true
}

func (a *activity) end() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.running--
	a.last = time.Now()
}

// waitIdle returns nil once no request has run for the whole of period and busy
// says no; from then on begin refuses. It returns ctx's error if that ends first.
func (a *activity) waitIdle(ctx context.Context, period time.Duration, busy func() bool) error {
	wait := period
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
		// Asked before the lock is taken: it is foreign code. Nothing slips through
		// between, because what makes a server busy comes by a request.
		isBusy := busy()
		a.mu.Lock()
		quiet := time.Since(a.last)
		switch {
		case isBusy || a.running > 0:
			wait = period
		case quiet < period:
			wait = period - quiet
		default:
			a.leaving = true
			a.mu.Unlock()
			return nil
		}
		a.mu.Unlock()
	}
}
