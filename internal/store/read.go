package store

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"sync"
)

// pageBuf is room for a page, as it is or compressed.
type pageBuf [2 * PageSize]byte

var pageBufs = sync.Pool{New: func() any { return new(pageBuf) }}

// Get puts a committed page into buf, which has room for PageSize bytes, and
// returns PageSize. The page's hash is verified first: on any error, buf's
// content is unspecified, no byte of it is the page's, and the error names pack
// and page (ErrDamaged, ErrMissing).
func (s *Store) Get(ctx context.Context, h Hash, buf []byte) (int, error) {
	if len(buf) < PageSize {
		return 0, fmt.Errorf("read page %s: buffer of %d bytes, want %d", h, len(buf), PageSize)
	}
	if h == zeroPage {
		clear(buf[:PageSize])
		return PageSize, nil
	}
	scratch := pageBufs.Get().(*pageBuf)
	defer pageBufs.Put(scratch)
	page, err := s.getPage(ctx, h, scratch[:0])
	if err != nil {
		return 0, err
	}
	return copy(buf, page), nil
}

// getPages appends pages to buf, all verified: their hashes are computed together, which is
// faster than one by one.
func (s *Store) getPages(ctx context.Context, hashes []Hash, buf []byte) ([]byte, error) {
	const turn = 64
	var got [turn]Hash
	for len(hashes) > 0 {
		now, from := hashes[:min(turn, len(hashes))], len(buf)
		for _, h := range now {
			var err error
			if buf, err = s.unpackPage(ctx, h, buf); err != nil {
				return nil, err
			}
		}
		SumPages(got[:len(now)], buf[from:])
		for i, h := range now {
			if got[i] == h {
				continue
			}
			// Once more, by itself: the error says where it lies.
			if _, err := s.getPage(ctx, h, buf[from+i*PageSize:][:0]); err != nil {
				return nil, err
			}
		}
		hashes = hashes[len(now):]
	}
	return buf, nil
}

// getPage appends a page to buf, verified.
func (s *Store) getPage(ctx context.Context, h Hash, buf []byte) ([]byte, error) {
	page, err := s.unpackPage(ctx, h, buf)
	if err == nil && Sum(page[len(buf):]) != h {
		loc, _ := s.pages.get(h)
		err = s.pageError(h, loc, errOtherContent)
	}
	if err != nil {
		return nil, err
	}
	return page, nil
}

// unpackPage is getPage without a look at the hash, which is the caller's to take.
func (s *Store) unpackPage(ctx context.Context, h Hash, buf []byte) ([]byte, error) {
	loc, ok := s.pages.get(h)
	if !ok {
		return nil, s.notFound("read page", h)
	}
	page, err := s.readPage(ctx, h, loc, buf)
	if err == nil || !errors.Is(err, ErrMissing) {
		return page, err
	}
	// The collector may have moved the page between the two steps.
	again, ok := s.pages.get(h)
	if !ok || again == loc {
		return nil, err
	}
	return s.readPage(ctx, h, again, buf)
}

func (s *Store) readPage(ctx context.Context, h Hash, loc location, buf []byte) ([]byte, error) {
	p := s.packOf(loc.pack())
	data, w, err := s.cache.read(ctx, s.bucket, p, int64(loc.offset()), int64(loc.stored()))
	if err == nil {
		buf, err = unpackEntry(buf, data, loc.offset(), PageSize, p.method, p.seal, s.codec)
		s.cache.release(w)
	}
	if err != nil {
		return nil, s.pageError(h, loc, err)
	}
	return buf, nil
}

func (s *Store) pageError(h Hash, loc location, err error) error {
	return &Error{Op: "read page", Pack: s.packOf(loc.pack()).id.name(), Hash: h, Offset: int64(loc.offset()), Err: err}
}

// getChunk returns a committed chunk, verified.
func (s *Store) getChunk(ctx context.Context, h Hash) ([]byte, error) {
	place, ok := s.chunkPlace(h)
	if !ok {
		return nil, s.notFound("read chunk", h)
	}
	b, err := s.readChunk(ctx, h, place)
	if err == nil || !errors.Is(err, ErrMissing) {
		return b, err
	}
	again, ok := s.chunkPlace(h)
	if !ok || again == place {
		return nil, err
	}
	return s.readChunk(ctx, h, again)
}

func (s *Store) chunkPlace(h Hash) (chunkPlace, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	place, ok := s.chunks[h]
	return place, ok
}

func (s *Store) readChunk(ctx context.Context, h Hash, at chunkPlace) ([]byte, error) {
	p := s.packOf(at.pack)
	data, err := s.bucket.readInto(ctx, p.id.name(), int64(at.offset), make([]byte, at.stored))
	if err == nil && uint32(len(data)) != at.stored {
		err = fmt.Errorf("%w: the pack ends before it", ErrDamaged)
	}
	var out []byte
	if err == nil {
		out, err = openEntry(nil, data, h, at.offset, at.plain, p.method, p.seal, s.codec)
	}
	if err != nil {
		return nil, &Error{Op: "read chunk", Pack: p.id.name(), Hash: h, Offset: int64(at.offset), Err: err}
	}
	return out, nil
}

// notFound is the error for a hash that no usable pack holds.
func (s *Store) notFound(op string, h Hash) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	err := ErrMissing
	if n := len(s.unread); n > 0 {
		err = fmt.Errorf("%w, but %d packs could not be read when it was opened (the first: %w)", ErrMissing, n, s.unread[0])
	}
	return &Error{Op: op, Hash: h, Offset: -1, Err: err}
}

// Pages are read by windows: aligned pieces of a pack, with room behind for an
// entry that begins in one and ends in the next. A restore reads pages mostly
// in the order in which they were stored, so that one request serves hundreds.
const (
	windowSize = 256 << 10
	windowRoom = maxStoredPage
)

// A windowCache keeps the windows used last. Two readers of one window cause
// one request. A window's memory is used again for another once nobody reads from it any more.
type windowCache struct {
	mu      sync.Mutex
	max     int // windows
	windows map[windowKey]*list.Element
	recent  list.List // of *window, the last used first
	rooms   [][]byte  // memory of former windows, at most maxRooms
}

const maxRooms = 16

type windowKey struct {
	pack uint32
	n    int64
}

type window struct {
	key   windowKey
	users int           // who read from it; guarded by the cache's mu
	gone  bool          // from the cache; guarded by the cache's mu
	done  chan struct{} // closed once data and err are set
	data  []byte
	err   error
}

func newWindowCache(size int64) *windowCache {
	return &windowCache{
		max:     max(4, int(size/(windowSize+windowRoom))),
		windows: make(map[windowKey]*list.Element),
	}
}

// read returns n bytes of a pack from an offset on. The caller must not write
// to them, and releases the window once it is done with them.
func (c *windowCache) read(ctx context.Context, b *bucket, p *pack, offset, n int64) ([]byte, *window, error) {
	key := windowKey{p.no, offset / windowSize}
	for {
		w, mine := c.window(key)
		if mine {
			w.data, w.err = b.readInto(ctx, p.id.name(), key.n*windowSize, w.data)
			if w.err != nil {
				c.drop(w)
			}
			close(w.done)
		}
		select {
		case <-w.done:
		case <-ctx.Done():
			c.release(w)
			return nil, nil, ctx.Err()
		}
		err := w.err
		at := offset - key.n*windowSize
		if err == nil && at+n > int64(len(w.data)) {
			err = fmt.Errorf("%w: the pack ends before it", ErrDamaged)
		}
		if err == nil {
			return w.data[at : at+n], w, nil
		}
		c.release(w)
		// Another reader's cancellation is not ours.
		if !mine && ctx.Err() == nil && (errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)) {
			continue
		}
		return nil, nil, err
	}
}

// window returns a window, with the caller as one of its users, and whether the caller has
// to fill it.
func (c *windowCache) window(key windowKey) (w *window, mine bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e, ok := c.windows[key]; ok {
		c.recent.MoveToFront(e)
		w = e.Value.(*window)
		w.users++
		return w, false
	}
	w = &window{key: key, users: 1, done: make(chan struct{})}
	c.windows[key] = c.recent.PushFront(w)
	for c.recent.Len() > c.max {
		c.evict(c.recent.Back())
	}
	if n := len(c.rooms); n > 0 {
		w.data, c.rooms = c.rooms[n-1], c.rooms[:n-1]
	} else {
		w.data = make([]byte, windowSize+windowRoom)
	}
	return w, true
}

// release ends the use of a window's data.
func (c *windowCache) release(w *window) {
	c.mu.Lock()
	defer c.mu.Unlock()
	w.users--
	c.reuse(w)
}

// evict takes a window out of the cache. mu is held.
func (c *windowCache) evict(e *list.Element) {
	w := e.Value.(*window)
	delete(c.windows, w.key)
	c.recent.Remove(e)
	w.gone = true
	c.reuse(w)
}

// reuse keeps the memory of a window that nobody can come to use any more. mu is held.
func (c *windowCache) reuse(w *window) {
	if w.gone && w.users == 0 && cap(w.data) == windowSize+windowRoom && len(c.rooms) < maxRooms {
		c.rooms = append(c.rooms, w.data[:cap(w.data)])
	}
}

// drop takes a window out of the cache that could not be filled.
func (c *windowCache) drop(w *window) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e, ok := c.windows[w.key]; ok && e.Value.(*window) == w {
		c.evict(e)
	}
}
