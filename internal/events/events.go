// Package events keeps a log of what happened to slices, for people and for programs
// that wait for it: a JSON document a line, oldest first.
//
// The log is bounded, and kept in segments: documents of 64 events, a JSON document a
// line, of which the oldest go. What counts is what the segments say when a log is opened:
// a server that follows another tells the same history.
package events

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"
)

// Kind says what happened.
type Kind string

// The kinds.
const (
	Up               Kind = "up"
	Down             Kind = "down"
	Restored         Kind = "restored"
	Forked           Kind = "forked"
	Suspended        Kind = "suspended"
	Resumed          Kind = "resumed"
	Protected        Kind = "protected"
	Unprotected      Kind = "unprotected"
	Checkpoint       Kind = "checkpoint"
	CheckpointFailed Kind = "checkpoint-failed"
	NodeDied         Kind = "node-died"
	HostLost         Kind = "host-lost"
	ServerReturned   Kind = "server-returned" // and a slice had ended with the one before, if it was protected, or waits for its hosts
	Adopted          Kind = "adopted"         // by a server that came back: all its hosts are there, and it runs on
	RollbackBegun    Kind = "rollback-begun"
	RolledBack       Kind = "rolled-back"
	RollbackFailed   Kind = "rollback-failed"
	RollbackWaits    Kind = "rollback-waits"  // for hosts with room
	WouldRollBack    Kind = "would-roll-back" // in a dry run
	GaveUp           Kind = "gave-up"
	WebhookFailed    Kind = "webhook-failed"
)

// An Event is a thing that happened to a slice.
type Event struct {
	Number   uint64    `json:"number"` // 1 for the first of the log, then one more each
	At       time.Time `json:"at"`
	Slice    string    `json:"slice"`
	Kind     Kind      `json:"kind"`
	Node     string    `json:"node,omitempty"`
	Host     string    `json:"host,omitempty"`
	Snapshot string    `json:"snapshot,omitempty"` // SLICE@ID
	Text     string    `json:"text,omitempty"`     // for people
	Owner    string    `json:"owner,omitempty"`    // of the slice, then
	Moves    []Move    `json:"moves,omitempty"`    // nodes on other hosts than they were on before
}

// A Move is a node that came up on another host, or would.
type Move struct {
	Node string `json:"node"`
	From string `json:"from"`
	To   string `json:"to"`
	Why  string `json:"why,omitempty"` // it did not stay; empty if that was wished for
}

const (
	// segment is how many events are in one: numbers 1 to 64 in the first.
	segment = 64
	// kept is how many events are kept at least, once there are more.
	kept = 10000
)

// Segments are where a log is kept, by name.
type Segments interface {
	// Names are those that there are, in order.
	Names() ([]string, error)
	Read(name string) ([]byte, error)
	// Write writes one, whole or not at all, in the place of what is there.
	Write(name string, data []byte) error
	Remove(name string) error
}

// A Log is safe for concurrent use.
type Log struct {
	segments Segments

	mu     sync.Mutex
	events []Event
	wake   chan struct{}

	writing sync.Mutex // held from an event's number being taken until it is written
}

// Open opens a log, or makes it. What is none of its segments it leaves alone, and of a
// segment that cannot be read the events are left out.
func Open(segments Segments) (*Log, error) {
	l := &Log{segments: segments, wake: make(chan struct{})}
	names, err := segments.Names()
	if err != nil {
		return nil, fmt.Errorf("open event log: %w", err)
	}
	for _, name := range names {
		if _, ok := parseSegment(name); !ok {
			continue
		}
		text, err := segments.Read(name)
		if err != nil {
			return nil, fmt.Errorf("open event log: %w", err)
		}
		l.events = append(l.events, parse(bytes.NewReader(text))...)
	}
	return l, nil
}

// segmentOf names the segment of an event.
func segmentOf(number uint64) string { return fmt.Sprintf("%016d", (number-1)/segment) }

func parseSegment(name string) (uint64, bool) {
	n, err := strconv.ParseUint(name, 10, 64)
	return n, err == nil && len(name) == 16
}

// parse takes in events; what is none is left out.
func parse(r io.Reader) (out []Event) {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 4<<20)
	for lines.Scan() {
		var e Event
		if json.Unmarshal(lines.Bytes(), &e) == nil && e.Number > 0 && (len(out) == 0 || e.Number > out[len(out)-1].Number) {
			out = append(out, e)
		}
	}
	return out
}

// ReadFiles reads a log as earlier versions wrote it, in files, oldest first. One that is
// not there has no events.
func ReadFiles(paths ...string) (all []Event, err error) {
	for _, path := range paths {
		f, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read event log: %w", err)
		}
		all = append(all, parse(f)...)
		_ = f.Close()
	}
	return all, nil
}

// Begin writes events, which have numbers, into a log that has none yet.
func (l *Log) Begin(events []Event) error {
	l.writing.Lock()
	defer l.writing.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.events) > 0 {
		return nil
	}
	events = events[max(0, len(events)-kept):]
	for i, e := range events {
		if i+1 < len(events) && segmentOf(events[i+1].Number) == segmentOf(e.Number) {
			continue
		}
		if err := l.write(events[:i+1]); err != nil {
			return err
		}
	}
	l.events = append(l.events, events...)
	return nil
}

// Append writes an event and returns it with its number.
func (l *Log) Append(e Event) (Event, error) {
	l.writing.Lock()
	defer l.writing.Unlock()
	l.mu.Lock()
	e.Number = 1
	if n := len(l.events); n > 0 {
		e.Number = l.events[n-1].Number + 1
	}
	// Whoever listens gets it, written or not.
	l.events = append(l.events, e)
	var gone []string
	for len(l.events) > kept+segment {
		gone = append(gone, segmentOf(l.events[0].Number))
		l.events = slices.Clone(l.events[l.first():])
	}
	now := l.events
	close(l.wake)
	l.wake = make(chan struct{})
	l.mu.Unlock()
	err := l.write(now)
	for _, name := range gone {
		if err == nil {
			err = l.segments.Remove(name)
		}
	}
	if err != nil {
		return e, fmt.Errorf("write event log: %w", err)
	}
	return e, nil
}

// first is how many events the oldest segment has. mu is held.
func (l *Log) first() int {
	name := segmentOf(l.events[0].Number)
	n := slices.IndexFunc(l.events, func(e Event) bool { return segmentOf(e.Number) != name })
	return max(n, 1)
}

// write writes the segment of the last of events.
func (l *Log) write(events []Event) error {
	name := segmentOf(events[len(events)-1].Number)
	from := len(events)
	for from > 0 && segmentOf(events[from-1].Number) == name {
		from--
	}
	var text bytes.Buffer
	enc := json.NewEncoder(&text)
	for _, e := range events[from:] {
		if err := enc.Encode(e); err != nil {
			return err
		}
	}
	return l.segments.Write(name, text.Bytes())
}

// After returns the events with higher numbers, of a slice or of all for "", and a
// channel that is closed when there are more.
func (l *Log) After(number uint64, slice string) (found []Event, more <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.events {
		if e.Number > number && (slice == "" || e.Slice == slice) {
			found = append(found, e)
		}
	}
	return found, l.wake
}
