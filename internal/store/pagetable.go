package store

import (
	"encoding/binary"
	"fmt"
	"iter"
	"math/bits"
)

// A page table says which page is where in a node's memory. It is a tree of
// two levels, so that two snapshots of a node share the leaves of what the
// node did not touch between them:
//
//	root  magic "VPT1"; region count 4; a region: length of ID 2, ID, length 8,
//	      one bit a leaf (set: there is one), 32 bytes a leaf: its chunk's hash
//	leaf  one bit a page (set: not zero), 32 bytes a page: its hash
//
// Integers are big-endian, bit i is bit i%8 of byte i/8, bits beyond the end
// are zero. A leaf covers leafPages pages; one without pages is left out, so
// that a region of zeros costs one bit for 2 MiB.
const (
	tableMagic = "VPT1"
	leafPages  = 512
	leafBytes  = leafPages * PageSize
	leafBitmap = leafPages / 8

	maxRegions  = 1 << 12
	maxRegionID = 1 << 8
	// maxMemory bounds a node's memory, in bytes, and so what a hostile size
	// makes a reader allocate.
	maxMemory = 1 << 44
)

// A Region is one piece of a node's memory, such as QEMU's "pc.ram".
type Region struct {
	ID     string
	Length uint64 // in bytes, a multiple of PageSize
}

func (r Region) leaves() int { return int((r.Length + leafBytes - 1) / leafBytes) }

// checkRegions refuses what no page table may describe.
func checkRegions(regions []Region) error {
	if len(regions) > maxRegions {
		return fmt.Errorf("%d regions, want at most %d", len(regions), maxRegions)
	}
	total := uint64(0)
	for _, r := range regions {
		if len(r.ID) > maxRegionID {
			return fmt.Errorf("region ID of %d bytes, want at most %d", len(r.ID), maxRegionID)
		}
		if r.Length%PageSize != 0 {
			return fmt.Errorf("region %q of %d bytes, want a multiple of %d", r.ID, r.Length, PageSize)
		}
		if r.Length > maxMemory || total+r.Length > maxMemory {
			return fmt.Errorf("region %q of %d bytes makes the memory larger than %d bytes", r.ID, r.Length, int64(maxMemory))
		}
		total += r.Length
	}
	return nil
}

// sparse is a sequence of hashes of which most may be absent.
type sparse struct {
	bits   []byte // which are there
	hashes []Hash // those, in order
	rank   []int  // number of bits set before each 64 of them
}

func (s *sparse) init(b []byte, hashes []Hash) {
	s.bits, s.hashes = b, hashes
	n := 0
	for i := 0; i < len(b); i += 8 {
		s.rank = append(s.rank, n)
		n += ones(b[i:min(i+8, len(b))])
	}
}

func ones(b []byte) int {
	n := 0
	for _, x := range b {
		n += bits.OnesCount8(x)
	}
	return n
}

func (s *sparse) has(i int) bool { return s.bits[i/8]&(1<<(i%8)) != 0 }

// get returns the hash at i, which must be there.
func (s *sparse) get(i int) Hash { return s.hashes[s.index(i)] }

// index returns how many are there before i.
func (s *sparse) index(i int) int {
	word := i / 64
	return s.rank[word] + ones(s.bits[word*8:i/8]) + bits.OnesCount8(s.bits[i/8]&(1<<(i%8)-1))
}

// all yields positions and hashes in order.
func (s *sparse) all() iter.Seq2[int, Hash] {
	return func(yield func(int, Hash) bool) {
		n := 0
		for i, b := range s.bits {
			for ; b != 0; b &= b - 1 {
				if !yield(i*8+bits.TrailingZeros8(b), s.hashes[n]) {
					return
				}
				n++
			}
		}
	}
}

// A tableRoot is a parsed root.
type tableRoot struct {
	regions []Region
	leaves  []sparse // one a region
}

func (t *tableRoot) marshal() []byte {
	b := append([]byte(nil), tableMagic...)
	b = binary.BigEndian.AppendUint32(b, uint32(len(t.regions)))
	for i, r := range t.regions {
		b = binary.BigEndian.AppendUint16(b, uint16(len(r.ID)))
		b = append(b, r.ID...)
		b = binary.BigEndian.AppendUint64(b, r.Length)
		b = append(b, t.leaves[i].bits...)
		for _, h := range t.leaves[i].hashes {
			b = append(b, h[:]...)
		}
	}
	return b
}

// parseRoot is the inverse of marshal. What it allocates is in proportion to b.
func parseRoot(b []byte) (*tableRoot, error) {
	p := parser{b: b, section: "root"}
	if string(p.take(len(tableMagic))) != tableMagic {
		return nil, p.errorf("no magic %q", tableMagic)
	}
	n := p.uint32()
	if n > maxRegions {
		return nil, p.errorf("%d regions, want at most %d", n, maxRegions)
	}
	t := &tableRoot{}
	for range n {
		id := string(p.take(int(p.uint16())))
		r := Region{ID: id, Length: p.uint64()}
		t.regions = append(t.regions, r)
		if p.err == nil {
			p.err = checkRegions(t.regions)
		}
		if p.err != nil {
			return nil, p.errorf("%w", p.err)
		}
		leaves, err := p.sparse(r.leaves())
		if err != nil {
			return nil, err
		}
		t.leaves = append(t.leaves, leaves)
	}
	if p.err != nil || len(p.b) != p.at {
		return nil, p.errorf("%d bytes left over", len(p.b)-p.at)
	}
	return t, nil
}

func marshalLeaf(s *sparse) []byte {
	b := make([]byte, 0, leafBitmap+len(s.hashes)*HashSize)
	b = append(b, s.bits...)
	for _, h := range s.hashes {
		b = append(b, h[:]...)
	}
	return b
}

func parseLeaf(b []byte) (sparse, error) {
	p := parser{b: b, section: "leaf"}
	s, err := p.sparse(leafPages)
	if err != nil {
		return sparse{}, err
	}
	if len(p.b) != p.at {
		return sparse{}, p.errorf("%d bytes left over", len(p.b)-p.at)
	}
	return s, nil
}

// A parser reads big-endian fields; its error carries section and offset.
type parser struct {
	b       []byte
	at      int
	section string
	err     error
}

func (p *parser) take(n int) []byte {
	if p.err != nil || n > len(p.b)-p.at {
		if p.err == nil {
			p.err = fmt.Errorf("%d bytes are missing", n-(len(p.b)-p.at))
		}
		return nil
	}
	p.at += n
	return p.b[p.at-n : p.at]
}

func (p *parser) uint16() uint16 {
	if b := p.take(2); b != nil {
		return binary.BigEndian.Uint16(b)
	}
	return 0
}

func (p *parser) uint32() uint32 {
	if b := p.take(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (p *parser) uint64() uint64 {
	if b := p.take(8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

// sparse reads n bits and a hash for each one that is set.
func (p *parser) sparse(n int) (sparse, error) {
	b := p.take((n + 7) / 8)
	if p.err == nil && n%8 != 0 && b[len(b)-1]>>(n%8) != 0 {
		return sparse{}, p.errorf("bits are set beyond the end")
	}
	raw := p.take(ones(b) * HashSize)
	if p.err != nil {
		return sparse{}, p.errorf("%w", p.err)
	}
	hashes := make([]Hash, len(raw)/HashSize)
	for i := range hashes {
		hashes[i] = Hash(raw[i*HashSize:])
	}
	var s sparse
	s.init(b, hashes)
	return s, nil
}

func (p *parser) errorf(format string, args ...any) error {
	err := fmt.Errorf(format, args...)
	if p.err != nil {
		err = p.err
	}
	return fmt.Errorf("%w: page table %s: byte %d: %w", ErrDamaged, p.section, p.at, err)
}
