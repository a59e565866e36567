package store

import (
	"bytes"
	"errors"
	"path/filepath"
	"testing"
)

// One store is written with each compression in turn, and read with all of them.
func TestCompressions(t *testing.T) {
	all := []Compression{CompressFast, CompressBalanced, CompressSmall}
	keys(t, func(t *testing.T, opts Options) {
		opts.PackSize = 1 << 20
		dir := filepath.Join(t.TempDir(), "store")
		const n = 20
		hashes := map[Hash]int{}
		var sizes []int64
		for i, c := range all {
			opts.Compression = c
			s := openTest(t, dir, opts)
			se := begin(t, s)
			for k := range n {
				hashes[put(t, se, testPage(100*i+k))] = 100*i + k
			}
			commit(t, se)
			sizes = append(sizes, se.Stats().StoredBytes)
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
		}
		for i, size := range sizes {
			// Half of a page is noise, the other is text.
			if size < n*PageSize/2 || size > n*PageSize*3/4 {
				t.Errorf("compression %d stored %d pages in %d bytes", all[i], n, size)
			}
		}
		for _, c := range all {
			opts.Compression = c
			s := openTest(t, dir, opts)
			methods := map[method]bool{}
			for _, p := range s.packs[1:] {
				methods[p.method] = true
			}
			if len(methods) != len(all) {
				t.Errorf("packs are of methods %v", methods)
			}
			for h, k := range hashes {
				var buf [PageSize]byte
				if _, err := s.Get(t.Context(), h, buf[:]); err != nil || !bytes.Equal(buf[:], testPage(k)) {
					t.Errorf("page %d: %v", k, err)
				}
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// What a block says of its content's length is not believed, and what does not decompress is
// damage: no more than a page is ever written.
func TestDecompressDamage(t *testing.T) {
	page := testPage(1)
	for _, c := range []Compression{CompressFast, CompressBalanced, CompressSmall} {
		codec, err := newCodec(c, 1)
		if err != nil {
			t.Fatal(err)
		}
		good := bytes.Clone(codec.compress(kindPages, make([]byte, 0, 2*PageSize), page))
		m := codec.method(kindPages)
		room := bytes.Repeat([]byte{0xee}, PageSize+64)
		for i := range good {
			for bit := range 8 {
				bad := bytes.Clone(good)
				bad[i] ^= 1 << bit
				_, err := openEntry(room[:0:PageSize], bad, Sum(page), 0, PageSize, m, nil, codec)
				if err != nil && !errors.Is(err, ErrDamaged) {
					t.Fatalf("compression %d, byte %d: %v", c, i, err)
				}
			}
			if _, err := openEntry(room[:0:PageSize], good[:i], Sum(page), 0, PageSize, m, nil, codec); !errors.Is(err, ErrDamaged) {
				t.Fatalf("compression %d, cut at byte %d: %v", c, i, err)
			}
		}
		if !bytes.Equal(room[PageSize:], bytes.Repeat([]byte{0xee}, 64)) {
			t.Errorf("compression %d wrote behind the page", c)
		}
		codec.close()
	}
}

// Packs of version 2 had S2.
func TestPackVersion2(t *testing.T) {
	b := makePack(t, kindPages, nil, testPage(1))
	b[8], b[11] = 2, byte(methodS2)
	h, err := parseHeader(b)
	if err != nil || h.method != methodS2 {
		t.Errorf("%+v, %v", h, err)
	}
}
