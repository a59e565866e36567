package store

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// A guest is a model of memory: what a restore must give.
type guest struct {
	regions []Region
	pages   []map[uint64][]byte
}

func (g *guest) verify(t testing.TB, r *PageReader, order func(pages []uint64)) {
	t.Helper()
	if d := cmp.Diff(g.regions, r.Regions()); d != "" {
		t.Fatalf("regions (-want +got):\n%s", d)
	}
	buf := make([]byte, PageSize)
	for i, region := range g.regions {
		var offsets []uint64
		for off := uint64(0); off < region.Length; off += PageSize {
			offsets = append(offsets, off)
		}
		order(offsets)
		for _, off := range offsets {
			zero, err := r.Page(i, off, buf)
			if err != nil {
				t.Fatal(err)
			}
			want, ok := g.pages[i][off]
			if zero != !ok || ok && !bytes.Equal(buf, want) {
				t.Fatalf("region %d, offset %#x: zero is %v, want %v, or other content", i, off, zero, !ok)
			}
		}
	}
}

// verifyAt does so by At.
func (g *guest) verifyAt(t testing.TB, r *PageReader) {
	buf := make([]byte, PageSize)
	for i, region := range g.regions {
		for off := region.Length; off > 0; off -= PageSize {
			zero, err := r.At(i, off-PageSize, buf)
			want, ok := g.pages[i][off-PageSize]
			if err != nil || zero != !ok || ok && !bytes.Equal(buf, want) {
				t.Errorf("region %d, offset %#x: zero is %v, want %v, or other content: %v", i, off-PageSize, zero, !ok, err)
				return
			}
		}
	}
}

func ascending([]uint64) {}

func shuffled(p []uint64) {
	r := rand.New(rand.NewPCG(1, 2))
	r.Shuffle(len(p), func(i, j int) { p[i], p[j] = p[j], p[i] })
}

// Random streams, with repeats as pre-copy sends them, come back as the last
// write left them.
func TestMemoryComesBack(t *testing.T) {
	s := openTest(t, "mem://", Options{PackSize: 1 << 20, Workers: 3})
	rapid.Check(t, func(rt *rapid.T) {
		g := &guest{}
		for range rapid.IntRange(1, 3).Draw(rt, "regions") {
			pages := rapid.SampledFrom([]uint64{0, 1, 7, 511, 512, 513, 1500}).Draw(rt, "pages")
			g.regions = append(g.regions, Region{ID: rapid.StringN(0, 8, 40).Draw(rt, "id"), Length: pages * PageSize})
			g.pages = append(g.pages, make(map[uint64][]byte))
		}
		se := begin(t, s)
		w, err := se.NewPageWriter(t.Context(), g.regions)
		if err != nil {
			rt.Fatal(err)
		}
		for range rapid.IntRange(0, 600).Draw(rt, "writes") {
			i := rapid.IntRange(0, len(g.regions)-1).Draw(rt, "region")
			n := g.regions[i].Length / PageSize
			if n == 0 {
				continue
			}
			off := rapid.Uint64Range(0, min(n, 40)-1).Draw(rt, "page") * (1 + (n-1)/40) * PageSize % (n * PageSize)
			content := rapid.IntRange(-2, 30).Draw(rt, "content")
			var err error
			switch content {
			case -2:
				err = w.Zero(i, off)
				delete(g.pages[i], off)
			case -1: // zeros that are sent as an ordinary page
				err = w.Page(i, off, make([]byte, PageSize))
				delete(g.pages[i], off)
			default:
				p := testPage(content)
				err = w.Page(i, off, p)
				g.pages[i][off] = bytes.Clone(p)
				clear(p) // the writer must have copied it
			}
			if err != nil {
				rt.Fatal(err)
			}
		}
		table, err := w.Close()
		if err != nil {
			rt.Fatal(err)
		}
		commit(t, se)
		pages := 0
		for _, m := range g.pages {
			pages += len(m)
		}
		st := w.Stats()
		if st.Pages != int64(pages) || (st.Pages+st.ZeroPages)*PageSize != st.RawBytes {
			rt.Errorf("stats: %+v, want %d pages", st, pages)
		}
		for _, order := range []func([]uint64){ascending, shuffled} {
			r, err := s.OpenMemory(t.Context(), table)
			if err != nil {
				rt.Fatal(err)
			}
			// Pages of any order are read beside the ordered ones.
			var beside sync.WaitGroup
			for range 2 {
				beside.Go(func() { g.verifyAt(t, r) })
			}
			g.verify(t, r, order)
			beside.Wait()
			if err := r.Close(); err != nil {
				rt.Error(err)
			}
		}
	})
}

func TestNodesOfOneSessionShare(t *testing.T) {
	s := openTest(t, t.TempDir(), Options{Workers: 2})
	se := begin(t, s)
	const nodes, pages = 6, 700
	var wg sync.WaitGroup
	tables := make([]BlobRef, nodes)
	for n := range nodes {
		wg.Go(func() {
			w, err := se.NewPageWriter(t.Context(), []Region{{"ram", pages * PageSize}})
			if err != nil {
				t.Error(err)
				return
			}
			for i := range pages {
				if err := w.Page(0, uint64(i)*PageSize, testPage(i)); err != nil {
					t.Error(err)
					return
				}
			}
			tables[n], err = w.Close()
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	commit(t, se)
	for _, ref := range tables {
		if ref != tables[0] {
			t.Errorf("equal memories have page tables %v and %v", tables[0], ref)
		}
	}
	if st := se.Stats(); st.NewPages != pages || st.Pages != nodes*pages {
		t.Errorf("stats: %+v", st)
	}
}

// A node whose stream stalls with a batch half full must not keep others from
// going on: a pre-copy cut waits until all have converged.
func TestStalledWritersBlockNobody(t *testing.T) {
	s := openTest(t, "mem://", Options{Workers: 1})
	se := begin(t, s)
	regions := []Region{{"ram", 1000 * PageSize}}
	for n := range 50 {
		w, err := se.NewPageWriter(t.Context(), regions)
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Page(0, 0, testPage(n)); err != nil {
			t.Fatal(err)
		}
	}
	w, err := se.NewPageWriter(t.Context(), regions)
	if err != nil {
		t.Fatal(err)
	}
	for n := range 1000 {
		if err := w.Page(0, uint64(n)*PageSize, testPage(n)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.Close(); err != nil {
		t.Fatal(err)
	}
}

// An unchanged stretch of memory shares its leaves with the snapshot before.
func TestPageTablesShareLeaves(t *testing.T) {
	s := openTest(t, t.TempDir(), Options{})
	const pages = 4096
	capture := func(touch int) SessionStats {
		se := begin(t, s)
		w, err := se.NewPageWriter(t.Context(), []Region{{"ram", pages * PageSize}})
		if err != nil {
			t.Fatal(err)
		}
		for n := range pages {
			p := testPage(n % 100)
			if n == touch {
				p = testPage(12345)
			}
			p[0], p[1] = byte(n), byte(n>>8)
			if err := w.Page(0, uint64(n)*PageSize, p); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := w.Close(); err != nil {
			t.Fatal(err)
		}
		commit(t, se)
		return se.Stats()
	}
	capture(-1)
	st := capture(1000)
	if limit := int64(leafPages*HashSize + 2048); st.NewPages != 1 || st.BlobBytesKept > limit {
		t.Errorf("one touched page cost %d pages and %d bytes of page table, want 1 and at most %d", st.NewPages, st.BlobBytesKept, limit)
	}
}

func TestPageWriterRefuses(t *testing.T) {
	s := openTest(t, "mem://", Options{})
	se := begin(t, s)
	for _, regions := range [][]Region{
		{{"ram", 100}},
		{{"ram", maxMemory + PageSize}},
		{{"a", maxMemory}, {"b", PageSize}},
		{{string(make([]byte, 300)), PageSize}},
		make([]Region, maxRegions+1),
	} {
		if w, err := se.NewPageWriter(t.Context(), regions); err == nil || w != nil {
			t.Errorf("%d regions are accepted", len(regions))
		}
	}
	w, err := se.NewPageWriter(t.Context(), []Region{{"ram", 10 * PageSize}})
	if err != nil {
		t.Fatal(err)
	}
	page := testPage(1)
	for _, c := range []struct {
		block  int
		offset uint64
		data   []byte
	}{
		{-1, 0, page}, {1, 0, page}, {0, 10 * PageSize, page}, {0, 1, page}, {0, 1 << 63, page}, {0, 0, page[1:]}, {0, 0, nil},
	} {
		if err := w.Page(c.block, c.offset, c.data); err == nil {
			t.Errorf("page of %d bytes at %d, %#x is accepted", len(c.data), c.block, c.offset)
		}
		if len(c.data) == PageSize {
			if err := w.Zero(c.block, c.offset); err == nil {
				t.Errorf("zero page at %d, %#x is accepted", c.block, c.offset)
			}
		}
	}
	if _, err := w.Close(); err != nil {
		t.Error(err)
	}
	if _, err := w.Close(); !errors.Is(err, ErrClosed) {
		t.Errorf("second close: %v, want ErrClosed", err)
	}
}

func TestCaptureEndsWithItsContextOrSession(t *testing.T) {
	s := openTest(t, "mem://", Options{Workers: 1})
	fill := func(w *PageWriter) error {
		for n := range uint64(1 << 20) {
			if err := w.Page(0, n%4096*PageSize, testPage(int(n%100))); err != nil {
				return err
			}
		}
		return nil
	}
	se := begin(t, s)
	regions := []Region{{"ram", 4096 * PageSize}}
	ctx, cancel := context.WithCancel(t.Context())
	w, err := se.NewPageWriter(ctx, regions)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := fill(w); !errors.Is(err, context.Canceled) {
		t.Errorf("page after cancellation: %v", err)
	}
	w, err = se.NewPageWriter(t.Context(), regions)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Page(0, 0, testPage(1)); err != nil {
		t.Fatal(err)
	}
	if err := se.Abort(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Close(); !errors.Is(err, ErrClosed) {
		t.Errorf("close after abort: %v, want ErrClosed", err)
	}
	if err := fill(w); err == nil {
		t.Error("pages are accepted after an abort")
	}
}

func TestPageReaderRefuses(t *testing.T) {
	s := openTest(t, "mem://", Options{})
	se := begin(t, s)
	w, err := se.NewPageWriter(t.Context(), []Region{{"ram", 10 * PageSize}})
	if err != nil {
		t.Fatal(err)
	}
	table, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	other, err := se.PutBlob(t.Context(), []byte("no page table"))
	if err != nil {
		t.Fatal(err)
	}
	commit(t, se)
	if r, err := s.OpenMemory(t.Context(), other); !errors.Is(err, ErrDamaged) || r != nil {
		t.Errorf("a blob that is no page table: %v", err)
	}
	if r, err := s.OpenMemory(t.Context(), BlobRef{Hash: Sum([]byte("x")), Size: 1}); !errors.Is(err, ErrMissing) || r != nil {
		t.Errorf("a page table that is not there: %v", err)
	}
	if r, err := s.OpenMemory(t.Context(), BlobRef{}); err == nil || r != nil {
		t.Errorf("no page table: %v", err)
	}
	r, err := s.OpenMemory(t.Context(), table)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	buf := make([]byte, PageSize)
	for _, c := range []struct {
		block  int
		offset uint64
		buf    []byte
	}{
		{-1, 0, buf}, {1, 0, buf}, {0, 10 * PageSize, buf}, {0, 1, buf}, {0, 0, buf[1:]},
	} {
		if _, err := r.Page(c.block, c.offset, c.buf); err == nil {
			t.Errorf("page at %d, %#x into %d bytes is given", c.block, c.offset, len(c.buf))
		}
		if _, err := r.At(c.block, c.offset, c.buf); err == nil {
			t.Errorf("page at %d, %#x into %d bytes is given, out of order", c.block, c.offset, len(c.buf))
		}
	}
	if zero, err := r.Page(0, 0, buf); err != nil || !zero {
		t.Errorf("page never written: zero is %v, %v", zero, err)
	}
}

func TestBlobsComeBack(t *testing.T) {
	keys(t, func(t *testing.T, opts Options) {
		opts.PackSize = 1 << 20
		s := openTest(t, t.TempDir(), opts)
		se := begin(t, s)
		noise := make([]byte, 3*ChunkSize+17)
		_, _ = io.ReadFull(rand.NewChaCha8([32]byte{1}), noise)
		var blobs [][]byte
		for _, n := range []int{0, 1, 100, ChunkSize - 1, ChunkSize, ChunkSize + 1, len(noise)} {
			blobs = append(blobs, noise[:n])
		}
		var refs []BlobRef
		for _, b := range blobs {
			ref, err := se.PutBlob(t.Context(), b)
			if err != nil {
				t.Fatal(err)
			}
			refs = append(refs, ref)
		}
		if again, err := se.PutBlob(t.Context(), blobs[2]); err != nil || again != refs[2] {
			t.Errorf("the same blob again: %v, %v; want %v", again, err, refs[2])
		}
		commit(t, se)
		for i, ref := range refs {
			got, err := s.GetBlob(t.Context(), ref)
			if err != nil || !bytes.Equal(got, blobs[i]) {
				t.Errorf("blob of %d bytes: %d bytes, %v", len(blobs[i]), len(got), err)
			}
		}
		for _, ref := range []BlobRef{{}, {Hash: refs[1].Hash, Size: -1}, {Hash: refs[1].Hash, Size: 2}, {Hash: refs[1].Hash, Size: 2 * ChunkSize}, {Hash: refs[1].Hash, Size: 1 << 62}} {
			if got, err := s.GetBlob(t.Context(), ref); err == nil || got != nil {
				t.Errorf("blob %v: %d bytes, want an error", ref, len(got))
			}
		}
	})
}
