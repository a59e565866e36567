// Package bench measures parts of Violin on the machine that it runs on.
package bench

import (
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"violin/internal/store"
)

// StoreConfig says what a guest of the store's measurement is like.
type StoreConfig struct {
	Dir     string // a store is made below it, and removed
	Memory  uint64 // bytes of a guest that are not zero
	Changed int    // percent of them that differ in the next snapshot
	Plain   bool   // without encryption
}

// What is measured that has bounds.
const (
	UniquePages = "unique pages"
	KnownPages  = "known pages"
)

// A Figure is one measurement.
type Figure struct {
	What        string        `json:"what"`
	Bytes       int64         `json:"bytes"`        // of memory that went through
	StoredBytes int64         `json:"stored_bytes"` // that the store grew by
	Wall        time.Duration `json:"wall_ns"`
	CPU         time.Duration `json:"cpu_ns"` // of all cores
}

// Rate is bytes of memory a second.
func (f Figure) Rate() float64 { return float64(f.Bytes) / f.Wall.Seconds() }

// Store measures the store alone, in a directory, syncs included: a guest's first
// snapshot, the same again, one of which part has changed, one of zeros, and a
// restore. Each ends with its commit.
func Store(ctx context.Context, cfg StoreConfig, done func(Figure)) (err error) {
	dir, err := os.MkdirTemp(cfg.Dir, "violin-bench-")
	if err != nil {
		return fmt.Errorf("measure the store: %w", err)
	}
	defer os.RemoveAll(dir)
	opts := store.Options{Logger: slog.New(slog.DiscardHandler)}
	if !cfg.Plain {
		opts.Key = store.NewKey()
	}
	st, err := store.Open(ctx, filepath.Join(dir, "store"), opts)
	if err != nil {
		return fmt.Errorf("measure the store: %w", err)
	}
	defer st.Close()
	guest, err := newGuest(int(cfg.Memory / store.PageSize))
	if err != nil {
		return fmt.Errorf("measure the store: %w", err)
	}
	var table store.BlobRef
	for _, step := range []struct {
		what string
		run  func() (int64, error)
	}{
		{UniquePages, func() (int64, error) { return guest.capture(ctx, st, 0, 1, &table) }},
		{KnownPages, func() (int64, error) { return guest.capture(ctx, st, 0, 1, &table) }},
		{fmt.Sprintf("%d %% changed", cfg.Changed), func() (int64, error) { return guest.capture(ctx, st, cfg.Changed, 2, &table) }},
		{"zero pages", func() (int64, error) {
			var zeros store.BlobRef
			return (&guestMemory{pages: guest.pages}).capture(ctx, st, 0, 0, &zeros)
		}},
		{"restore", func() (int64, error) { return 0, guest.restore(ctx, st, table) }},
	} {
		began, cpu := time.Now(), processorTime()
		stored, err := step.run()
		if err != nil {
			return fmt.Errorf("measure %s: %w", step.what, err)
		}
		done(Figure{What: step.what, Bytes: int64(guest.pages) * store.PageSize, StoredBytes: stored, Wall: time.Since(began), CPU: processorTime() - cpu})
	}
	return nil
}

// guestMemory makes distinct pages of what a guest's memory is mostly made of:
// program text and data, here this program's own. Without text its pages are zeros.
type guestMemory struct {
	text  []byte
	pages int
}

func newGuest(pages int) (*guestMemory, error) {
	name, err := os.Executable()
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	return &guestMemory{text[:len(text)/2], pages}, nil // behind are compressed symbols
}

func (g *guestMemory) page(n int, seed uint64, buf []byte) {
	if g.text == nil {
		return
	}
	at := n * store.PageSize % (len(g.text) - store.PageSize)
	copy(buf, g.text[at:at+store.PageSize])
	binary.LittleEndian.PutUint64(buf, uint64(n)+1)
	binary.LittleEndian.PutUint64(buf[store.PageSize/2:], seed)
}

// capture stores the memory as a cut does; of a hundred pages in a row, the first so many have another seed.
func (g *guestMemory) capture(ctx context.Context, st *store.Store, percent int, seed uint64, table *store.BlobRef) (stored int64, err error) {
	se, err := st.Begin(ctx)
	if err != nil {
		return 0, err
	}
	defer func() {
		if err != nil {
			_ = se.Abort(context.WithoutCancel(ctx))
		}
	}()
	w, err := se.NewPageWriter(ctx, []store.Region{{ID: "pc.ram", Length: uint64(g.pages) * store.PageSize}})
	if err != nil {
		return 0, err
	}
	var page [store.PageSize]byte
	for i := range g.pages {
		s := uint64(1)
		if i%100 < percent {
			s = seed
		}
		g.page(i, s, page[:])
		if err := w.Page(0, uint64(i)*store.PageSize, page[:]); err != nil {
			return 0, err
		}
	}
	if *table, err = w.Close(); err != nil {
		return 0, err
	}
	if err := se.Commit(ctx, nil); err != nil {
		return 0, err
	}
	s := se.Stats()
	return s.StoredBytes + s.BlobBytesKept, nil
}

// restore reads the memory as a migration encoder does.
func (g *guestMemory) restore(ctx context.Context, st *store.Store, table store.BlobRef) error {
	m, err := st.OpenMemory(ctx, table)
	if err != nil {
		return err
	}
	defer m.Close()
	var page [store.PageSize]byte
	for i := range g.pages {
		if _, err := m.Page(0, uint64(i)*store.PageSize, page[:]); err != nil {
			return err
		}
	}
	return nil
}

// processorTime is what this process took of all cores.
func processorTime() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0 // it has no other way to fail than a wrong argument
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
