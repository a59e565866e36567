// Package protection decides what a protected slice's guard does: when a checkpoint is
// due, which ones have had their time, what a slice is rolled back to, and when it is
// not any more. It knows no clock; times are given to it.
package protection

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"violin/internal/catalog"
)

// The bounds and defaults of a policy.
const (
	MinEvery            = time.Second // a checkpoint takes about as long
	DefaultKeep         = 12
	DefaultMaxRollbacks = 5
	DefaultWindow       = time.Hour
	MinHostTimeout      = time.Second // an agent that dials anew takes some tenths of one
	DefaultHostTimeout  = time.Minute
)

// WithDefaults fills in what a policy leaves open, and refuses one that makes no sense.
func WithDefaults(p catalog.Protection) (catalog.Protection, error) {
	if p.Keep == 0 {
		p.Keep = DefaultKeep
	}
	if p.MaxRollbacks == 0 {
		p.MaxRollbacks = DefaultMaxRollbacks
	}
	if p.Window == 0 {
		p.Window = DefaultWindow
	}
	if p.HostTimeout == 0 {
		p.HostTimeout = DefaultHostTimeout
	}
	switch {
	case p.HostTimeout < MinHostTimeout:
		return p, fmt.Errorf("a host lost after %s: at least %s must pass", p.HostTimeout, MinHostTimeout)
	case p.Every < MinEvery:
		return p, fmt.Errorf("a checkpoint every %s: at least %s must lie between two", p.Every, MinEvery)
	case p.Keep < 1:
		return p, errors.New("at least one checkpoint must be kept")
	case p.MaxRollbacks < 1:
		return p, errors.New("at least one rollback must be allowed; --dry-run allows none")
	case p.Window < 0:
		return p, fmt.Errorf("rollbacks within %s: the time must be positive", p.Window)
	}
	return p, nil
}

// Due is how long to wait for the next checkpoint, if the last one began at last (zero:
// there was none). Those that were missed are not made up for.
func Due(p catalog.Protection, last, now time.Time) time.Duration {
	if last.IsZero() {
		return 0
	}
	return max(0, last.Add(p.Every).Sub(now))
}

// Rollback counts a rollback at now. It is false, and nothing is counted, if as many as
// are allowed lie within the window before now. Those before it are forgotten.
func Rollback(p catalog.Protection, now time.Time) (catalog.Protection, bool) {
	var recent []time.Time
	for _, at := range p.Rollbacks {
		// A clock that was set back must not let a loop go on for ever.
		if now.Sub(at) < p.Window || at.After(now) {
			recent = append(recent, at)
		}
	}
	p.Rollbacks = recent
	if len(recent) >= p.MaxRollbacks {
		return p, false
	}
	p.Rollbacks = append(recent, now)
	return p, true
}

// Pause is how long to wait before a rollback is tried again that has failed so many times.
func Pause(failures int) time.Duration {
	return min(time.Second<<min(failures, 6), time.Minute)
}

// Expired are the checkpoints of a slice, oldest first, that are not among the youngest
// to keep. Snapshots that the user took, or has tagged, are not the guard's to take
// away, nor is the one that the slice descends from.
func Expired(all []*catalog.Snapshot, keep int, head string) []*catalog.Snapshot {
	var own []*catalog.Snapshot
	for _, s := range all {
		if s.Checkpoint && len(s.Tags) == 0 {
			own = append(own, s)
		}
	}
	slices.SortStableFunc(own, func(a, b *catalog.Snapshot) int { return a.Created.Compare(b.Created) })
	own = own[:max(0, len(own)-keep)]
	return slices.DeleteFunc(slices.Clone(own), func(s *catalog.Snapshot) bool { return s.ID == head })
}

// Tip is the last snapshot of what ran, if head is what it descended from at the time
// at: head, or a descendant of head that was sealed after it. A server that dies
// between sealing a snapshot and noting it leaves one such.
func Tip(all []*catalog.Snapshot, head string, at time.Time) string {
	for {
		var next *catalog.Snapshot
		for _, s := range all {
			if s.Parent == head && s.ID != head && s.Created.After(at) && (next == nil || s.Created.After(next.Created)) {
				next = s
			}
		}
		if next == nil {
			return head
		}
		head, at = next.ID, next.Created
	}
}
