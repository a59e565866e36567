// Package events keeps a log of what happened to slices, for people and for programs
// that wait for it: a JSON document a line, oldest first.
//
// The log is bounded: when the file has grown to its limit it is set aside, in the
// place of the one that was set aside before. What a process wrote that was killed is
// there; a last line that was cut short is left out.
package events

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
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
}

// limit is the size at which a file is set aside, in bytes.
const limit = 2 << 20

// A Log is safe for concurrent use.
type Log struct {
	path string

	mu     sync.Mutex
	file   *os.File
	size   int64
	events []Event // of both files
	older  int     // how many of them are in the file set aside
	wake   chan struct{}
}

// Open opens a log, or makes it.
func Open(path string) (*Log, error) {
	l := &Log{path: path, wake: make(chan struct{})}
	for _, p := range []string{path + ".1", path} {
		found, err := read(p)
		if err != nil {
			return nil, fmt.Errorf("open event log: %w", err)
		}
		l.older = len(l.events)
		l.events = append(l.events, found...)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open event log: %w", err)
	}
	info, err := f.Stat()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open event log: %w", err), f.Close())
	}
	l.file, l.size = f, info.Size()
	if l.size > 0 {
		// A line that was cut short stays alone.
		n, err := f.WriteString("\n")
		l.size += int64(n)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("open event log: %w", err), f.Close())
		}
	}
	return l, nil
}

// read takes in the events of a file; what is none is left out.
func read(path string) ([]Event, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var out []Event
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, limit+1)
	for lines.Scan() {
		var e Event
		if json.Unmarshal(lines.Bytes(), &e) == nil && e.Number > 0 {
			out = append(out, e)
		}
	}
	return out, lines.Err()
}

// Append writes an event and returns it with its number.
func (l *Log) Append(e Event) (Event, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e.Number = 1
	if n := len(l.events); n > 0 {
		e.Number = l.events[n-1].Number + 1
	}
	line, err := json.Marshal(e)
	if err == nil {
		err = l.write(append(line, '\n'))
	}
	// Whoever listens gets it all the same.
	l.events = append(l.events, e)
	close(l.wake)
	l.wake = make(chan struct{})
	if err != nil {
		return e, fmt.Errorf("write event log: %w", err)
	}
	return e, nil
}

func (l *Log) write(line []byte) error {
	if l.file == nil {
		return fs.ErrClosed
	}
	if l.size > 0 && l.size+int64(len(line)) > limit {
		f, err := os.OpenFile(l.path+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			return err
		}
		if err := errors.Join(os.Rename(l.path, l.path+".1"), os.Rename(l.path+".new", l.path)); err != nil {
			return errors.Join(err, f.Close())
		}
		_ = l.file.Close()
		l.file, l.size = f, 0
		l.events = append([]Event(nil), l.events[l.older:]...)
		l.older = len(l.events)
	}
	n, err := l.file.Write(line)
	l.size += int64(n)
	return err
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

// Close closes the file.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return nil
	}
	err := l.file.Close()
	l.file = nil
	return err
}
