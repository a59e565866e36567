package store

import (
	"context"
	"errors"
	"fmt"
	"iter"
)

// A Root is something that must be kept, and readable: what a snapshot's
// document refers to.
type Root struct {
	Name   string // for messages: "mandelbrot@260807-101530-k3f9, node rank0"
	Ref    BlobRef
	Memory bool // Ref is a page table: its pages are meant, too
}

// A collection is a garbage collection under way. Guarded by the store's mu.
type collection struct {
	pins pinSet // of the sessions that ended since it began
}

// GCStats says what a collection did.
type GCStats struct {
	PacksDeleted   int   // without anything in them that is needed
	PacksRewritten int   // of which what is needed went to new packs
	PacksInUse     int   // that could go but for sessions that rely on them
	BytesFreed     int64 // sizes of deleted and rewritten packs less new ones, in bytes
	BytesKept      int64 // sizes of all packs that are left, in bytes
}

// smallPacks is how many small packs are tolerated before they are merged.
const smallPacks = 16

// GC deletes what no root needs. It is safe beside sessions and readers: what
// sessions store or deduplicate against while it runs is kept. The roots are
// asked for after it has begun, so that everything sealed before is among
// them. If a root cannot be read, nothing is deleted.
//
// A crash at any point loses nothing: copies are on the disk before what they
// replace is deleted.
func (s *Store) GC(ctx context.Context, roots iter.Seq2[Root, error]) (GCStats, error) {
	st, err := s.collect(ctx, roots)
	if err != nil {
		return st, fmt.Errorf("collect garbage: %w", err)
	}
	return st, nil
}

func (s *Store) collect(ctx context.Context, roots iter.Seq2[Root, error]) (GCStats, error) {
	candidates, err := s.startCollection()
	if err != nil {
		return GCStats{}, err
	}
	defer s.endCollection()

	chunks, err := s.mark(ctx, roots)
	defer s.pages.each(func(location) bool { return true })
	if err != nil {
		return GCStats{}, err
	}
	var st GCStats
	dead, sparse := s.victims(candidates, chunks)
	for _, p := range dead {
		if err := s.deletePack(ctx, p, nil, &st); err != nil {
			return st, err
		}
	}
	if len(sparse) > 0 {
		if err := s.rewrite(ctx, sparse, chunks, &st); err != nil {
			return st, err
		}
	}
	st.BytesKept = s.Stats().PackBytes
	s.log.Info("store: collected garbage", "deleted", st.PacksDeleted, "rewritten", st.PacksRewritten, "in_use", st.PacksInUse, "freed_bytes", st.BytesFreed)
	return st, nil
}

// startCollection returns the packs that may go: those committed by now.
func (s *Store) startCollection() ([]*pack, error) {
	if s.opts.ReadOnly {
		return nil, errors.New("the store was opened read-only")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gc != nil {
		return nil, errors.New("a collection is running already; wait for it")
	}
	s.gc = &collection{}
	var out []*pack
	for _, p := range s.packs[1:] {
		if p.state == packCommitted {
			out = append(out, p)
		}
	}
	return out, nil
}

func (s *Store) endCollection() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gc = nil
}

// mark marks every page that a root needs and returns the chunks that one
// needs.
func (s *Store) mark(ctx context.Context, roots iter.Seq2[Root, error]) (map[Hash]bool, error) {
	chunks := make(map[Hash]bool)
	for r, err := range roots {
		if err != nil {
			return nil, err
		}
		err = s.walk(ctx, r, visitor{
			chunk: func(h Hash) (bool, error) {
				if chunks[h] {
					return false, nil // its pages are marked, too
				}
				if _, ok := s.chunkPlace(h); !ok {
					return false, s.notFound("mark chunk", h)
				}
				chunks[h] = true
				return true, nil
			},
			page: func(h Hash) error {
				if !s.pages.mark(h) {
					return s.notFound("mark page", h)
				}
				return nil
			},
		})
		if err != nil {
			return nil, fmt.Errorf("mark what %s needs: %w; check the store, and forget what is damaged", r.Name, err)
		}
	}
	return chunks, nil
}

// A visitor is told what a root needs.
type visitor struct {
	chunk func(Hash) (descend bool, err error)
	page  func(Hash) error
}

// walk visits the chunks and pages that a root needs. A leaf of a page table
// that the visitor does not want to descend into is not read.
func (s *Store) walk(ctx context.Context, r Root, v visitor) error {
	if r.Ref.Size > ChunkSize {
		if _, err := v.chunk(r.Ref.Hash); err != nil {
			return err
		}
	}
	list, err := s.blobChunks(ctx, r.Ref)
	if err != nil {
		return err
	}
	for _, h := range list {
		if _, err := v.chunk(h); err != nil {
			return err
		}
	}
	if !r.Memory {
		return nil
	}
	m, err := s.OpenMemory(ctx, r.Ref)
	if err != nil {
		return err
	}
	defer m.Close()
	for _, leaves := range m.root.leaves {
		for _, h := range leaves.hashes {
			descend, err := v.chunk(h)
			if err != nil {
				return err
			}
			if !descend {
				continue
			}
			leaf, err := s.leaf(ctx, h)
			if err != nil {
				return err
			}
			for _, p := range leaf.hashes {
				if err := v.page(p); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// victims returns the packs without anything live in them, and those that are
// worth rewriting: less than half live, or small ones if there are many.
func (s *Store) victims(candidates []*pack, chunks map[Hash]bool) (dead, sparse []*pack) {
	s.mu.RLock()
	live := make([]int64, len(s.packs))
	for h := range chunks {
		if at, ok := s.chunks[h]; ok {
			live[at.pack] += int64(at.stored)
		}
	}
	s.mu.RUnlock()
	s.pages.each(func(l location) bool {
		if l&marked != 0 && int(l.pack()) < len(live) {
			live[l.pack()] += int64(l.stored())
		}
		return false
	})
	small := make(map[kind][]*pack)
	for _, p := range candidates {
		switch n := live[p.no]; {
		case n == 0:
			dead = append(dead, p)
		case n < p.size/2:
			sparse = append(sparse, p)
		case p.size < int64(s.packLimit(p.kind))/4:
			small[p.kind] = append(small[p.kind], p)
		}
	}
	for _, packs := range small {
		if len(packs) > smallPacks {
			sparse = append(sparse, packs...)
		}
	}
	return dead, sparse
}

// rewrite copies what is live in packs to new ones and deletes the old.
func (s *Store) rewrite(ctx context.Context, packs []*pack, chunks map[Hash]bool, st *GCStats) error {
	se, err := s.Begin(ctx)
	if err != nil {
		return err
	}
	pages := make(map[Hash]location)
	places := make(map[Hash]chunkPlace)
	for _, p := range packs {
		_, entries, err := s.readFooter(ctx, object{p.id.name(), p.size})
		if err == nil {
			err = s.copyLive(ctx, se, p, entries, chunks, pages, places)
		}
		if err != nil {
			return errors.Join(err, se.Abort(context.WithoutCancel(ctx)))
		}
	}
	// Commit publishes nothing new: every entry has a place in the index. But
	// from here on the copies are safe.
	if err := se.Commit(ctx, nil); err != nil {
		return err
	}
	for _, w := range append(se.pages.takeWritten(), se.chunks.takeWritten()...) {
		st.BytesFreed -= w.size
	}
	for _, p := range packs {
		if err := s.deletePack(ctx, p, &moves{pages, places}, st); err != nil {
			return err
		}
	}
	return nil
}

// copyLive puts what is live in a pack into the session's packs.
func (s *Store) copyLive(ctx context.Context, se *Session, p *pack, entries []entry, chunks map[Hash]bool, pages map[Hash]location, places map[Hash]chunkPlace) error {
	scratch := make([]byte, 0, 2*PageSize)
	for _, e := range entries {
		if p.kind == kindPages {
			loc, ok := s.pages.getMarked(e.hash)
			if !ok || loc != makeLocation(p.no, e.offset, e.stored) {
				continue
			}
			page, err := s.readPage(ctx, e.hash, loc, nil)
			if err != nil {
				return err
			}
			to, no, err := se.pages.add(ctx, e.hash, s.codec.compress(kindPages, scratch, page), PageSize)
			if err != nil {
				return err
			}
			pages[e.hash] = makeLocation(no, to.offset, to.stored)
			continue
		}
		at, ok := s.chunkPlace(e.hash)
		if !ok || !chunks[e.hash] || at.pack != p.no || at.offset != e.offset {
			continue
		}
		data, err := s.readChunk(ctx, e.hash, at)
		if err != nil {
			return err
		}
		to, no, err := se.chunks.add(ctx, e.hash, s.codec.compress(kindChunks, nil, data), len(data))
		if err != nil {
			return err
		}
		places[e.hash] = chunkPlace{no, to.offset, to.stored, to.plain}
	}
	return nil
}

// moves says where copies of entries are.
type moves struct {
	pages  map[Hash]location
	chunks map[Hash]chunkPlace
}

// deletePack deletes a pack, unless a session relies on it.
func (s *Store) deletePack(ctx context.Context, p *pack, to *moves, st *GCStats) error {
	_, entries, err := s.readFooter(ctx, object{p.id.name(), p.size})
	if errors.Is(err, ErrMissing) && s.deleted(p) {
		return nil // a session whose document could not be written took it back
	}
	if err != nil {
		return err
	}
	if !s.condemn(p, entries, to) {
		st.PacksInUse++
		return nil
	}
	if err := s.removePack(ctx, p); err != nil {
		// It is out of the index; the next opening finds it again.
		return &Error{Op: "delete", Pack: p.id.name(), Offset: -1, Err: err}
	}
	if to == nil {
		st.PacksDeleted++
	} else {
		st.PacksRewritten++
	}
	st.BytesFreed += p.size
	return nil
}

func (s *Store) deleted(p *pack) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return p.state == packDeleted
}

// condemn is one step as seen by sessions: either one has pinned the pack
// before, or none finds it after.
func (s *Store) condemn(p *pack, entries []entry, to *moves) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p.state != packCommitted {
		return true
	}
	pinned := s.gc.pins.has(p.no)
	for se := range s.sessions {
		se.pinMu.Lock()
		pinned = pinned || se.pins.has(p.no)
		se.pinMu.Unlock()
	}
	if pinned {
		return false
	}
	s.unlist(p, entries, to)
	return true
}

// retract takes back a pack whose document could not be written. It reports
// false if a session relies on it, or did: that one may be sealed by now.
func (s *Store) retract(p *pack, entries []entry) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p.reliedOn.Load() {
		return false
	}
	s.unlist(p, entries, nil)
	return true
}

// unlist takes a pack's entries out of the index, or to where they were copied.
// mu is held.
func (s *Store) unlist(p *pack, entries []entry, to *moves) {
	p.state = packDeleted
	for _, e := range entries {
		if p.kind == kindPages {
			old := makeLocation(p.no, e.offset, e.stored)
			if got, ok := s.pages.get(e.hash); !ok || got != old {
				continue
			}
			if loc, ok := to.page(e.hash); ok {
				s.pages.set(e.hash, loc)
			} else {
				s.pages.delete(e.hash, old)
			}
			continue
		}
		if at, ok := s.chunks[e.hash]; !ok || at.pack != p.no || at.offset != e.offset {
			continue
		}
		if at, ok := to.chunk(e.hash); ok {
			s.chunks[e.hash] = at
		} else {
			delete(s.chunks, e.hash)
		}
	}
}

func (m *moves) page(h Hash) (location, bool) {
	if m == nil {
		return 0, false
	}
	l, ok := m.pages[h]
	return l, ok
}

func (m *moves) chunk(h Hash) (chunkPlace, bool) {
	if m == nil {
		return chunkPlace{}, false
	}
	at, ok := m.chunks[h]
	return at, ok
}
