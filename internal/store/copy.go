package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	// copyRetry is how long a copy that failed waits at first, and copyRetryMax at most.
	copyRetry, copyRetryMax = time.Second, time.Minute
	// copyBound is how long copies that are due have when the store is closed.
	copyBound = 5 * time.Second
)

// copies are documents of which some are copied to the bucket, after they have been
// written. What counts is what they are in; a copy is read only if that is lost.
//
// A copy is never there without its document for long: it goes first, and what is found
// to have none when a store is opened has lost it, and is taken in again.
type copies struct {
	Documents
	to   bucketDocuments
	dirs []string
	log  *slog.Logger

	busy sync.Mutex // held while one name is copied or deleted

	mu   sync.Mutex
	due  []string // names, each once
	now  string   // the one that is being copied
	wake chan struct{}

	life context.Context
	end  context.CancelFunc
	done chan struct{}
}

func newCopies(from Documents, to bucketDocuments, dirs []string, log *slog.Logger) *copies {
	c := &copies{Documents: from, to: to, dirs: dirs, log: log, wake: make(chan struct{}, 1), done: make(chan struct{})}
	c.life, c.end = context.WithCancel(context.Background())
	return c
}

func (c *copies) copied(name string) bool {
	dir, _, _ := strings.Cut(name, "/")
	return slices.Contains(c.dirs, dir)
}

// Create implements [Documents].
func (c *copies) Create(ctx context.Context, name string, data []byte) error {
	return c.wrote(name, c.Documents.Create(ctx, name, data))
}

// Replace implements [Documents].
func (c *copies) Replace(ctx context.Context, name string, data []byte) error {
	return c.wrote(name, c.Documents.Replace(ctx, name, data))
}

// wrote has a document copied that was written.
func (c *copies) wrote(name string, err error) error {
	if c.copied(name) && (err == nil || errors.Is(err, ErrUncertain)) {
		c.put(name)
	}
	return err
}

// Delete implements [Documents]. If it fails half-way, the document is there, and its
// copy is made again.
func (c *copies) Delete(ctx context.Context, name string) error {
	if !c.copied(name) {
		return c.Documents.Delete(ctx, name)
	}
	c.busy.Lock()
	defer c.busy.Unlock()
	err := c.to.Delete(ctx, name)
	if err != nil {
		return fmt.Errorf("delete its copy: %w", err)
	}
	if err = c.Documents.Delete(ctx, name); err != nil {
		c.put(name)
	}
	return err
}

func (c *copies) put(names ...string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, name := range names {
		if !slices.Contains(c.due, name) {
			c.due = append(c.due, name)
		}
	}
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

func (c *copies) take() (name string, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.due) == 0 {
		return "", false
	}
	c.now, c.due = c.due[0], c.due[1:]
	return c.now, true
}

func (c *copies) took() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = ""
}

func (c *copies) start() { go c.run() }

// run copies what is due until the store is closed.
func (c *copies) run() {
	defer close(c.done)
	wait := copyRetry
	for {
		name, ok := c.take()
		if !ok {
			select {
			case <-c.wake:
				continue
			case <-c.life.Done():
				return
			}
		}
		err := c.copy(c.life, name)
		if err != nil {
			c.put(name)
		}
		c.took()
		if err == nil {
			wait = copyRetry
			continue
		}
		if c.life.Err() != nil {
			return
		}
		c.log.Warn("store: a document is not copied to the bucket yet", "document", name, "err", err, "again_in", wait)
		select {
		case <-time.After(wait):
		case <-c.life.Done():
			return
		}
		wait = min(2*wait, copyRetryMax)
	}
}

// copy makes a document's copy what the document is now.
func (c *copies) copy(ctx context.Context, name string) error {
	c.busy.Lock()
	defer c.busy.Unlock()
	data, err := c.Documents.Get(ctx, name)
	if errors.Is(err, ErrMissing) {
		return nil // it was deleted, and its copy before it
	}
	if err != nil {
		return err
	}
	return c.to.Replace(ctx, name, data)
}

// stop copies what is due, if that can be done soon.
func (c *copies) stop() {
	c.end()
	<-c.done
	ctx, cancel := context.WithTimeout(context.Background(), copyBound)
	defer cancel()
	for {
		name, ok := c.take()
		if !ok {
			return
		}
		if err := c.copy(ctx, name); err != nil {
			c.log.Warn("store: a document is not copied to the bucket; the next server does that", "document", name, "err", err)
			if ctx.Err() != nil {
				return
			}
		}
	}
}

// list reads the names in the directories that are copied.
func (c *copies) list(ctx context.Context, of func(context.Context, string) iter.Seq2[string, error]) (map[string]bool, error) {
	all := map[string]bool{}
	for _, dir := range c.dirs {
		for name, err := range of(ctx, dir) {
			if err != nil {
				return nil, err
			}
			if documentName(name) == nil {
				all[name] = true
			}
		}
	}
	return all, nil
}

// Reconcile takes documents in that are in the bucket, but not where documents are
// kept: of a store that was written by a violin which kept them in the bucket, and of
// one whose other place was lost, or came back as it was earlier. It returns their
// names. Copies that are missing, or of what has been written over, are made again, behind.
// snapshots are never written over and so not compared.
func (s *Store) Reconcile(ctx context.Context, unchanging ...string) (taken []string, err error) {
	c := s.copies
	if c == nil {
		return nil, nil
	}
	fail := func(err error) ([]string, error) {
		return taken, fmt.Errorf("compare documents with their copies in the bucket: %w", err)
	}
	kept, err := c.list(ctx, c.Documents.List)
	if err != nil {
		return fail(err)
	}
	copied, err := c.list(ctx, c.to.List)
	if err != nil {
		return fail(err)
	}
	for name := range copied {
		if kept[name] {
			continue
		}
		data, err := c.to.Get(ctx, name)
		if errors.Is(err, ErrMissing) {
			continue
		}
		if err == nil {
			err = c.Documents.Create(ctx, name, data)
		}
		if err != nil {
			return fail(fmt.Errorf("take %s in: %w", name, err))
		}
		taken = append(taken, name)
	}
	for name := range kept {
		same := copied[name]
		dir, _, _ := strings.Cut(name, "/")
		if same && !slices.Contains(unchanging, dir) {
			theirs, err := c.to.Get(ctx, name)
			if err != nil && !errors.Is(err, ErrMissing) && !errors.Is(err, ErrDamaged) {
				return fail(err)
			}
			ours, err := c.Documents.Get(ctx, name)
			if err != nil {
				return fail(err)
			}
			same = bytes.Equal(ours, theirs)
		}
		if !same {
			c.put(name)
		}
	}
	slices.Sort(taken)
	return taken, nil
}

// Copy reads a document's copy; [ErrMissing] if there is none.
func (s *Store) Copy(ctx context.Context, name string) ([]byte, error) {
	data, err := s.unseal(ctx, bucketDocuments{s.bucket}, name)
	if err != nil {
		return nil, fmt.Errorf("read copy of document %s: %w", name, err)
	}
	return data, nil
}

// Copied waits until every copy that is due has been made.
func (s *Store) Copied(ctx context.Context) error {
	if s.copies == nil {
		return nil
	}
	for {
		c := s.copies
		c.mu.Lock()
		due := len(c.due)
		if c.now != "" {
			due++
		}
		c.mu.Unlock()
		if due == 0 {
			return nil
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("%d documents are not copied to the bucket: %w", due, ctx.Err())
		}
	}
}
