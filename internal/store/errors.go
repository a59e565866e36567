package store

import (
	"errors"
	"fmt"
)

var (
	// ErrDamaged is in the chain of every error that means: the bytes are
	// there but are not what was written. Nothing of them was returned.
	ErrDamaged = errors.New("damaged")
	// ErrMissing is in the chain when a page, chunk or document is not in the
	// store at all.
	ErrMissing = errors.New("not in the store")
	// ErrLocked is returned by Open when another process writes to the store.
	ErrLocked = errors.New("locked by another process")
	// ErrExists is returned by PutDocument for a name that is taken.
	ErrExists = errors.New("already exists")
	// ErrUncertain is in the chain of PutDocument's error when the document may have been
	// written or not.
	ErrUncertain = errors.New("the document may exist")
	// ErrKey is returned by Open for an encrypted store when the key is
	// missing or another store's.
	ErrKey = errors.New("wrong key")
	// ErrClosed is returned by a session or store that has ended.
	ErrClosed = errors.New("closed")
)

// An Error says which page or chunk of which pack an operation failed on.
type Error struct {
	Op     string // what was tried: "read page", "parse pack", ...
	Pack   string // the pack's object name in the bucket; empty if not known
	Hash   Hash   // the page or chunk; zero if the whole pack is meant
	Offset int64  // byte offset in the pack; -1 if not known
	Err    error
}

func (e *Error) Error() string {
	s := e.Op
	if !e.Hash.IsZero() {
		s += " " + e.Hash.String()
	}
	if e.Pack != "" {
		s += fmt.Sprintf(" in pack %s", e.Pack)
		if e.Offset >= 0 {
			s += fmt.Sprintf(" at byte %d", e.Offset)
		}
	}
	return s + ": " + e.Err.Error()
}

func (e *Error) Unwrap() error { return e.Err }
