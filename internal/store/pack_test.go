package store

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"strings"
	"testing"
)

// makePack builds a small pack.
func makePack(t testing.TB, k kind, key masterKey, contents ...[]byte) []byte {
	t.Helper()
	id := packID{1, 2, 3, 15: 16}
	b := newBuilder(id, k, methodZstd, key.pack(id), make([]byte, 0, 1<<20), 1<<20)
	for _, c := range contents {
		e, place := b.reserve(Sum(c), len(c), len(c))
		b.fill(e, place, c)
	}
	pack, err := b.finish()
	if err != nil {
		t.Fatal(err)
	}
	return pack
}

// The bytes of docs/store.md.
func TestPackFormat(t *testing.T) {
	content := []byte("hello")
	pack := makePack(t, kindChunks, nil, content)
	h := Sum(content)
	want := "" +
		hex.EncodeToString([]byte("violpack")) + "03" + "63" + "00" + "0000000000" + // header
		"01020300000000000000000000000010" + // pack id
		hex.EncodeToString(content) + // the entry
		h.String() + "00000005" + "00000005" + // footer
		"00000001" + "00000028" // trailer
	raw, err := hex.DecodeString(want)
	if err != nil {
		t.Fatal(err)
	}
	digest := Sum(raw)
	raw = append(append(raw, digest[:]...), "packend\n"...)
	if !bytes.Equal(pack, raw) {
		t.Errorf("pack is\n%x, want\n%x", pack, raw)
	}
	if h.String() != "ea8f163db38682925e4491c5e58d4bb3506ef8c14eb78a86e908c5624a67200f" {
		t.Errorf("BLAKE3 of hello is %s", h)
	}
}

func TestPackNames(t *testing.T) {
	id := packID{0xab, 15: 1}
	if got := id.name(); got != "packs/ab/ab000000000000000000000000000001" {
		t.Errorf("name %s", got)
	}
	if got, ok := parsePackName(id.name()); !ok || got != id {
		t.Errorf("parse: %s, %v", got, ok)
	}
	for _, n := range []string{"", "packs/", "packs/ab", "packs/ac/ab000000000000000000000000000001", "packs/AB/AB000000000000000000000000000001", id.name() + "0", "packs/ab/zz000000000000000000000000000001"} {
		if _, ok := parsePackName(n); ok {
			t.Errorf("%q passes for a pack's name", n)
		}
	}
}

// Every single-bit error in a pack is found.
func TestEveryFlippedBitIsFound(t *testing.T) {
	for _, key := range []masterKey{nil, bytes.Repeat([]byte{7}, 32)} {
		pack := makePack(t, kindChunks, key, []byte("hello"), []byte("world, and more of it"))
		for i := range len(pack) * 8 {
			bad := bytes.Clone(pack)
			bad[i/8] ^= 1 << (i % 8)
			if err := checkDigest(bad); err == nil {
				// The trailer's magic is behind the digest.
				if _, err := parseAll(bad, key); err == nil {
					t.Errorf("bit %d of byte %d: not found", i%8, i/8)
				}
			}
		}
		if err := checkDigest(pack); err != nil {
			t.Error(err)
		}
	}
}

// parseAll parses a whole pack as Open and a check with --read-data do.
func parseAll(pack []byte, key masterKey) ([]entry, error) {
	h, err := parseHeader(pack)
	if err != nil {
		return nil, err
	}
	return parseFooter(pack, int64(len(pack)), h, key.pack(h.id))
}

func TestPackRefuses(t *testing.T) {
	page := testPage(1)
	good := makePack(t, kindPages, nil, page)
	footer := headerSize + PageSize
	put32 := func(at int, v uint32) func(b []byte) []byte {
		return func(b []byte) []byte { binary.BigEndian.PutUint32(b[at:], v); return b }
	}
	for _, c := range []struct {
		name string
		edit func(b []byte) []byte
		want string
	}{
		{"empty", func([]byte) []byte { return nil }, "header"},
		{"short", func(b []byte) []byte { return b[:40] }, "trailer"},
		{"torn", func(b []byte) []byte { return b[:len(b)-1] }, "trailer"},
		{"version", func(b []byte) []byte { b[8] = 4; return b }, "format version 4"},
		{"method", func(b []byte) []byte { b[11] = 3; return b }, "unknown compression 3"},
		{"method of version 1", func(b []byte) []byte { b[8], b[11] = 1, 1; return b }, "unknown compression 1"},
		{"method of version 2", func(b []byte) []byte { b[8], b[11] = 2, 2; return b }, "unknown compression 2"},
		{"kind", func(b []byte) []byte { b[9] = 'x'; return b }, "kind"},
		{"sealing", func(b []byte) []byte { b[10] = 9; return b }, "sealing"},
		{"sealed elsewhere", func(b []byte) []byte { b[10] = sealAESGCM; return b }, "sealing"},
		{"reserved", func(b []byte) []byte { b[12] = 1; return b }, "not zero"},
		{"huge footer", put32(len(good)-trailerSize+4, 1<<31), "footer of"},
		{"huge count", put32(len(good)-trailerSize, 1<<31), "entries"},
		{"stored too long", put32(footer+HashSize, PageSize+1), "stored length"},
		{"stored nothing", put32(footer+HashSize, 0), "stored length"},
		{"stored too short", put32(footer+HashSize, 9), "entries end"},
		{"page of other size", put32(footer+HashSize+4, 8192), "page of 8192"},
	} {
		entries, err := parseAll(c.edit(bytes.Clone(good)), nil)
		if err == nil || entries != nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %d entries, %v; want an error about %q", c.name, len(entries), err, c.want)
		}
	}
}

func FuzzPack(f *testing.F) {
	key := masterKey(bytes.Repeat([]byte{7}, 32))
	f.Add(makePack(f, kindChunks, nil, []byte("hello"), []byte("world")), false)
	f.Add(makePack(f, kindPages, nil, testPage(1)), false)
	for _, m := range []method{methodS2, methodMinLZ} {
		b := makePack(f, kindPages, nil, testPage(1))
		b[11] = byte(m)
		f.Add(b, false)
	}
	f.Add(makePack(f, kindChunks, key, []byte("hello")), true)
	f.Add(makePack(f, kindChunks, nil), false)
	codec, err := newCodec(CompressFast, 1)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte, sealed bool) {
		var k masterKey
		if sealed {
			k = key
		}
		entries, err := parseAll(b, k)
		if err != nil {
			if entries != nil {
				t.Error("an error and entries")
			}
			return
		}
		if len(entries)*footerEntry > len(b) {
			t.Errorf("%d entries from %d bytes", len(entries), len(b))
		}
		h, _ := parseHeader(b)
		for _, e := range entries {
			out, err := openEntry(nil, b[e.offset:e.offset+e.stored], e.hash, e.offset, e.plain, h.method, k.pack(h.id), codec)
			if err != nil {
				if out != nil || !errors.Is(err, ErrDamaged) {
					t.Errorf("entry: %d bytes, %v", len(out), err)
				}
			} else if Sum(out) != e.hash {
				t.Error("an entry with other content than its hash says")
			}
		}
	})
}

func FuzzPageTable(f *testing.F) {
	t := &tableRoot{regions: []Region{{"pc.ram", 600 * PageSize}, {"", 0}}, leaves: make([]sparse, 2)}
	t.leaves[0].init([]byte{2}, []Hash{Sum(nil)})
	f.Add(t.marshal())
	f.Add((&tableRoot{}).marshal())
	leaf := new(sparse)
	leaf.init(append([]byte{5}, make([]byte, leafBitmap-1)...), []Hash{Sum(nil), ZeroPage()})
	f.Add(marshalLeaf(leaf))
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := parseRoot(b); err != nil {
			if r != nil || !errors.Is(err, ErrDamaged) {
				t.Errorf("%v, %v", r, err)
			}
		} else if !bytes.Equal(r.marshal(), b) {
			t.Error("a page table has two spellings")
		}
		if s, err := parseLeaf(b); err == nil {
			if !bytes.Equal(marshalLeaf(&s), b) {
				t.Error("a leaf has two spellings")
			}
			n := 0
			for i, h := range s.all() {
				if !s.has(i) || s.get(i) != h || s.index(i) != n {
					t.Errorf("hash %d", i)
				}
				n++
			}
			if n != len(s.hashes) {
				t.Errorf("%d of %d hashes", n, len(s.hashes))
			}
		}
	})
}

func TestHashText(t *testing.T) {
	h := Sum([]byte("hello"))
	text, err := h.MarshalText()
	if err != nil {
		t.Fatal(err)
	}
	var got Hash
	if err := got.UnmarshalText(text); err != nil || got != h {
		t.Errorf("%s, %v", got, err)
	}
	for _, bad := range []string{"", "ab", h.String() + "00", strings.Repeat("g", 64)} {
		if err := got.UnmarshalText([]byte(bad)); err == nil || got != h {
			t.Errorf("%q is accepted", bad)
		}
	}
	if !(Hash{}).IsZero() || ZeroPage().IsZero() {
		t.Error("the zero hash is not that of the zero page")
	}
}

// The published test vectors: input is the bytes 0 to 250, over and over.
func TestSumIsBLAKE3(t *testing.T) {
	for n, want := range map[int]string{
		0:     "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
		4096:  "015094013f57a5277b59d8475c0501042c0b642e531b0a1c8f58d2163229e969",
		16384: "f875d6646de28985646f34ee13be9a576fd515f76b5b0a26bb324735041ddde4",
	} {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(i % 251)
		}
		if got := Sum(b).String(); got != want {
			t.Errorf("%d bytes: %s, want %s", n, got, want)
		}
	}
}
