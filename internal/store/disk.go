package store

import (
	"context"
	"fmt"
	"slices"
)

// A disk is kept as a page table of two regions: what the disk holds, and a map that
// has a bit a page (bit i%8 of byte i/8), set for the pages that are the disk's own.
// The others are those of its base, which is not in the store. A page that is the
// disk's own and not in the first region's table is of zeros.
const (
	diskData  = "disk"
	diskOwned = "owned"
	mapSpan   = PageSize * 8 * PageSize // bytes of a disk that a page of the map is for
)

func diskRegions(size uint64) []Region {
	data := (size + PageSize - 1) / PageSize * PageSize
	return []Region{{diskData, data}, {diskOwned, (data + mapSpan - 1) / mapSpan * PageSize}}
}

// A DiskWriter takes one disk's pages into a session and makes its page table. Methods
// are for one goroutine at a time.
type DiskWriter struct {
	pages *PageWriter
	owned map[uint64]*[PageSize]byte // changed pages of the map, by number
	old   *tableRoot                 // the parent's; nil if there is none
}

// NewDiskWriter starts the capture of a disk of size bytes. If parent is the disk as it
// was in an earlier snapshot, only what has changed since need be given. If the parent
// is no longer whole, the error is [ErrMissing], and the disk has to be captured
// without. The context bounds the whole capture.
func (se *Session) NewDiskWriter(ctx context.Context, size uint64, parent BlobRef) (*DiskWriter, error) {
	w := &DiskWriter{owned: map[uint64]*[PageSize]byte{}}
	var err error
	if w.pages, err = se.NewPageWriter(ctx, diskRegions(size)); err != nil {
		return nil, fmt.Errorf("capture disk: %w", err)
	}
	if parent.IsZero() {
		return w, nil
	}
	if w.old, err = w.pages.inherit(parent); err != nil {
		return nil, fmt.Errorf("capture disk: %w", err)
	}
	return w, nil
}

// Page takes a page's content, of PageSize bytes; nil is a page of zeros. Content given
// later replaces what was given before.
func (w *DiskWriter) Page(offset uint64, data []byte) error {
	if _, err := w.pages.check(0, offset); err != nil {
		return err
	}
	if err := w.own(offset / PageSize); err != nil {
		return err
	}
	if data == nil {
		return w.pages.Zero(0, offset)
	}
	return w.pages.Page(0, offset, data)
}

// Reference takes a page by its hash, as [PageWriter.Reference] does.
func (w *DiskWriter) Reference(offset uint64, h Hash) error {
	if _, err := w.pages.check(0, offset); err != nil {
		return err
	}
	if err := w.own(offset / PageSize); err != nil {
		return err
	}
	return w.pages.Reference(0, offset, h)
}

// own marks a page as the disk's own.
func (w *DiskWriter) own(page uint64) error {
	n, bit := page/(8*PageSize), page%(8*PageSize)
	m := w.owned[n]
	if m == nil {
		m = new([PageSize]byte)
		if w.old != nil {
			if err := w.pages.se.s.diskMap(w.pages.ctx, w.old, n, m); err != nil {
				return fmt.Errorf("capture disk: %w", err)
			}
		}
		w.owned[n] = m
	}
	m[bit/8] |= 1 << (bit % 8)
	return nil
}

// Close waits until every page is placed, stores the page table and returns its
// reference.
func (w *DiskWriter) Close() (BlobRef, error) {
	for n, m := range w.owned {
		if err := w.pages.Page(1, n*PageSize, m[:]); err != nil {
			return BlobRef{}, err
		}
	}
	ref, err := w.pages.close()
	if err != nil {
		return BlobRef{}, fmt.Errorf("capture disk: %w", err)
	}
	return ref, nil
}

// Stats says what the writer was given, beside what it inherited.
func (w *DiskWriter) Stats() MemoryStats { return w.pages.Stats() }

// diskMap reads page n of a disk's map. It leaves m as it is if that page is zero.
func (s *Store) diskMap(ctx context.Context, root *tableRoot, n uint64, m *[PageSize]byte) error {
	leaf, page := int(n/leafPages), int(n%leafPages)
	if !root.leaves[1].has(leaf) {
		return nil
	}
	table, err := s.leaf(ctx, root.leaves[1].get(leaf))
	if err != nil || !table.has(page) {
		return err
	}
	_, err = s.Get(ctx, table.get(page), m[:])
	return err
}

// A DiskReader reads a disk as it was in a snapshot.
type DiskReader struct{ pages *PageReader }

// OpenDisk opens a committed disk of size bytes. Close releases what reads ahead. The
// context bounds all reading.
func (s *Store) OpenDisk(ctx context.Context, size uint64, table BlobRef) (*DiskReader, error) {
	pages, err := s.OpenMemory(ctx, table)
	if err != nil {
		return nil, fmt.Errorf("open disk: %w", err)
	}
	if !slices.Equal(pages.Regions(), diskRegions(size)) {
		pages.Close()
		return nil, fmt.Errorf("open disk: %w: its table is not of a disk of %d bytes", ErrDamaged, size)
	}
	return &DiskReader{pages}, nil
}

// Pages calls page for every page that is the disk's own, from the first to the last;
// data is nil for one of zeros, and else valid until page returns.
func (r *DiskReader) Pages(page func(offset uint64, data []byte) error) error {
	var buf [PageSize]byte
	for n := range r.pages.Regions()[1].Length / PageSize {
		var m [PageSize]byte
		if err := r.pages.s.diskMap(r.pages.ctx, r.pages.root, n, &m); err != nil {
			return fmt.Errorf("read disk: %w", err)
		}
		for i := range uint64(8 * PageSize) {
			if m[i/8]&(1<<(i%8)) == 0 {
				continue
			}
			off := n*mapSpan + i*PageSize
			data := buf[:]
			zero, err := r.pages.Page(0, off, data)
			if err != nil {
				return err
			}
			if zero {
				data = nil
			}
			if err := page(off, data); err != nil {
				return err
			}
		}
	}
	return nil
}

// Close stops reading ahead. It never fails.
func (r *DiskReader) Close() error { return r.pages.Close() }
