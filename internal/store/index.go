package store

import (
	"encoding/binary"
	"math/bits"
	"sync"
)

// A location says where a page lies, in 64 bits:
//
//	bits 41-63  pack number, from 1 (0: no pack)
//	bits 14-40  byte offset in the pack
//	bits  1-13  stored length, in bytes
//	bit      0  mark of the garbage collector
//
// The zero location is a free slot.
type location uint64

const (
	maxPacks = 1<<23 - 1

	// pending is the location of a page that a worker of this session is
	// about to place.
	pending location = 1 << 1
	marked  location = 1
)

func makeLocation(pack, offset, stored uint32) location {
	return location(pack)<<41 | location(offset)<<14 | location(stored)<<1
}

func (l location) pack() uint32   { return uint32(l >> 41) }
func (l location) offset() uint32 { return uint32(l>>14) & (1<<27 - 1) }
func (l location) stored() uint32 { return uint32(l>>1) & (1<<13 - 1) }

// An index maps page hashes to locations: open addressing in shards that grow
// on their own by an eighth, so that it is between 0.77 and 0.87 full and no
// growth copies more than one shard. That is 28 to 31 bytes a page; a TiB of
// distinct pages takes about 8 GB.
//
// Only the first 16 bytes of a hash are kept. To confuse two pages one must
// find two with equal 128 bits: about 2^64 hashes for a pair of one's own
// making (which spoils one's own snapshot, and the full hash is checked when
// it is read), 2^128 to hit a page of somebody else.
type index struct {
	shards [256]shard
	// shortLived is set for the index of a session: it doubles as it grows, which copies less.
	shortLived bool
}

type shard struct {
	mu    sync.RWMutex
	slots []slot
	used  int
}

type slot struct {
	hi, lo uint64 // bytes 0-7 and 8-15 of the hash
	loc    location
}

const (
	slotSize = 24
	minSlots = 16
)

func split(h Hash) (hi, lo uint64) {
	return binary.BigEndian.Uint64(h[:]), binary.BigEndian.Uint64(h[8:])
}

func (x *index) shard(hi uint64) *shard { return &x.shards[hi>>56] }

// find returns the slot of a key, or the free slot where it belongs; -1 if
// there are no slots at all.
func (s *shard) find(hi, lo uint64) int {
	if len(s.slots) == 0 {
		return -1
	}
	i := s.home(lo)
	for s.slots[i].loc != 0 && (s.slots[i].hi != hi || s.slots[i].lo != lo) {
		if i++; i == len(s.slots) {
			i = 0
		}
	}
	return i
}

// home is where the search for a key begins.
func (s *shard) home(lo uint64) int {
	h, _ := bits.Mul64(lo, uint64(len(s.slots)))
	return int(h)
}

// get returns where a page lies.
func (x *index) get(h Hash) (location, bool) {
	hi, lo := split(h)
	s := x.shard(hi)
	s.mu.RLock()
	defer s.mu.RUnlock()
	i := s.find(hi, lo)
	if i < 0 || s.slots[i].loc == 0 {
		return 0, false
	}
	return s.slots[i].loc &^ marked, true
}

// getMarked returns where a page lies if it is marked.
func (x *index) getMarked(h Hash) (location, bool) {
	hi, lo := split(h)
	s := x.shard(hi)
	s.mu.RLock()
	defer s.mu.RUnlock()
	i := s.find(hi, lo)
	if i < 0 || s.slots[i].loc&marked == 0 {
		return 0, false
	}
	return s.slots[i].loc &^ marked, true
}

// add inserts a page unless it is there, and reports whether it did.
func (x *index) add(h Hash, loc location) bool {
	hi, lo := split(h)
	s := x.shard(hi)
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.add(slot{hi, lo, loc}, x.shortLived)
}

func (s *shard) add(e slot, double bool) bool {
	i := s.find(e.hi, e.lo)
	if i >= 0 && s.slots[i].loc != 0 {
		return false
	}
	if (s.used+1)*8 > len(s.slots)*7 {
		more := len(s.slots) / 8
		if double {
			more = len(s.slots)
		}
		s.grow(max(minSlots, len(s.slots)+more))
		i = s.find(e.hi, e.lo)
	}
	s.slots[i] = e
	s.used++
	return true
}

// reserve makes room for n more pages at once: growing for one after the other copies each
// page that is there some eight times over.
func (x *index) reserve(n int) {
	for i := range x.shards {
		s := &x.shards[i]
		s.mu.Lock()
		if full := s.used + n/len(x.shards); full*8 > len(s.slots)*7 {
			s.grow(max(minSlots, full*5/4)) // hashes are even, but not quite
		}
		s.mu.Unlock()
	}
}

func (s *shard) grow(n int) {
	old := s.slots
	s.slots = make([]slot, n)
	for _, e := range old {
		if e.loc != 0 {
			s.slots[s.find(e.hi, e.lo)] = e
		}
	}
}

// set replaces a page's location; it must be there.
func (x *index) set(h Hash, loc location) {
	hi, lo := split(h)
	s := x.shard(hi)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.slots[s.find(hi, lo)].loc = loc
}

// mark sets the collector's mark and reports whether the page is there.
func (x *index) mark(h Hash) bool {
	hi, lo := split(h)
	s := x.shard(hi)
	s.mu.Lock()
	defer s.mu.Unlock()
	i := s.find(hi, lo)
	if i < 0 || s.slots[i].loc == 0 {
		return false
	}
	s.slots[i].loc |= marked
	return true
}

// delete removes a page if it lies at loc.
func (x *index) delete(h Hash, loc location) {
	hi, lo := split(h)
	s := x.shard(hi)
	s.mu.Lock()
	defer s.mu.Unlock()
	i := s.find(hi, lo)
	if i < 0 || s.slots[i].loc == 0 || s.slots[i].loc&^marked != loc {
		return
	}
	// A hole would end the searches that run across it: move back what
	// follows, as long as that brings it nearer to its home.
	n := len(s.slots)
	for j := i; ; {
		if j++; j == n {
			j = 0
		}
		if s.slots[j].loc == 0 {
			break
		}
		home := s.home(s.slots[j].lo)
		if (j-home+n)%n >= (j-i+n)%n {
			s.slots[i] = s.slots[j]
			i = j
		}
	}
	s.slots[i] = slot{}
	s.used--
}

// each calls f with every location, marks included, one shard locked at a
// time, and clears the mark if f says so.
func (x *index) each(f func(loc location) (unmark bool)) {
	for i := range x.shards {
		s := &x.shards[i]
		s.mu.Lock()
		for j := range s.slots {
			if l := s.slots[j].loc; l != 0 && f(l) {
				s.slots[j].loc = l &^ marked
			}
		}
		s.mu.Unlock()
	}
}

// size returns the number of pages and the bytes of memory they take.
func (x *index) size() (pages, bytes int64) {
	for i := range x.shards {
		s := &x.shards[i]
		s.mu.RLock()
		pages += int64(s.used)
		bytes += int64(len(s.slots)) * slotSize
		s.mu.RUnlock()
	}
	return pages, bytes
}
