package remote

import (
	"context"
	"sync"
	"time"

	violinv1 "violin/api/violin/v1"
	"violin/internal/cut"
)

// mailbox holds a run's events, in order, until a stream takes them to the server:
// the one that was attached last. If there is none for too long while a cut is open,
// that is given up.
type mailbox struct {
	bound   time.Duration
	abandon func()

	mu     sync.Mutex
	turn   int // of the stream that was attached last
	live   bool
	opened bool // a cut has been prepared and has not ended
	closed bool
	events []*violinv1.CutResponse
	bell   chan struct{} // closed, and replaced, when there is something new
	timer  *time.Timer   // that gives up; nil if none runs
}

func (b *mailbox) init(bound time.Duration, abandon func()) {
	b.bound, b.abandon, b.bell = bound, abandon, make(chan struct{})
}

// ring wakes whoever waits. mu is held.
func (b *mailbox) ring() {
	close(b.bell)
	b.bell = make(chan struct{})
}

// open says that a cut begins.
func (b *mailbox) open() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.opened = true
}

// put takes an event. It never waits.
func (b *mailbox) put(ev cut.Event) {
	m, last, err := encodeEvent(ev)
	if err != nil {
		panic(err) // a kind of event that was added, and forgotten here
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if last {
		b.opened = false
	}
	if b.closed {
		return
	}
	b.events = append(b.events, m)
	b.ring()
}

// attach makes the caller the one that takes events. The one before gets none any more.
func (b *mailbox) attach() (turn int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.turn++
	b.live = true
	if b.timer != nil {
		b.timer.Stop()
		b.timer = nil
	}
	b.ring()
	return b.turn
}

// detach ends that.
func (b *mailbox) detach(turn int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if turn != b.turn {
		return
	}
	b.live = false
	if b.opened && !b.closed {
		b.timer = time.AfterFunc(b.bound, func() {
			b.mu.Lock()
			alone := b.turn == turn && !b.live && b.opened && !b.closed
			b.mu.Unlock()
			if alone {
				b.abandon()
			}
		})
	}
}

// next returns the next event, unless ctx ends or another is attached.
func (b *mailbox) next(ctx context.Context, turn int) (*violinv1.CutResponse, bool) {
	for {
		b.mu.Lock()
		switch {
		case turn != b.turn || b.closed:
			b.mu.Unlock()
			return nil, false
		case len(b.events) > 0:
			ev := b.events[0]
			b.events = b.events[1:]
			b.mu.Unlock()
			return ev, true
		}
		bell := b.bell
		b.mu.Unlock()
		select {
		case <-bell:
		case <-ctx.Done():
			return nil, false
		}
	}
}

// close gives everything up.
func (b *mailbox) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	if b.timer != nil {
		b.timer.Stop()
	}
	b.ring()
}
