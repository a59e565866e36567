package store

import (
	"bytes"
	"errors"
	"iter"
	"maps"
	"math/rand/v2"
	"testing"
)

// disk is a model of one: the pages that are its own, nil for zeros.
type disk map[uint64][]byte

func (d disk) write(t *testing.T, w *DiskWriter, offset uint64, data []byte) {
	t.Helper()
	d[offset] = bytes.Clone(data)
	if err := w.Page(offset, data); err != nil {
		t.Fatal(err)
	}
}

func (d disk) verify(t *testing.T, s *Store, size uint64, ref BlobRef) {
	t.Helper()
	r, err := s.OpenDisk(t.Context(), size, ref)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	got := disk{}
	if err := r.Pages(func(off uint64, data []byte) error { got[off] = bytes.Clone(data); return nil }); err != nil {
		t.Fatal(err)
	}
	if !maps.EqualFunc(d, got, func(a, b []byte) bool { return (a == nil) == (b == nil) && bytes.Equal(a, b) }) {
		t.Fatalf("%d pages come back, other than the %d that the disk had", len(got), len(d))
	}
}

// Each snapshot of a disk is given what was written since the one before, and is the
// whole disk: also when those before it are forgotten and collected.
func TestDisks(t *testing.T) {
	s := openTest(t, "mem://", Options{PackSize: 1 << 20, Workers: 3})
	rnd := rand.New(rand.NewPCG(3, 4))
	const size = 2*mapSpan + 512 // a map of several pages, and a last page that is cut off
	page := func() uint64 { return rnd.Uint64N(3) * (size / 3 / PageSize) * PageSize }
	model, parent := disk{}, BlobRef{}
	var kept []Root
	var models []disk
	for n := range 12 {
		se := begin(t, s)
		w, err := se.NewDiskWriter(t.Context(), size, parent)
		if err != nil {
			t.Fatal(err)
		}
		given := 0
		for range rnd.IntN(40) {
			off := page() + rnd.Uint64N(600)*PageSize
			data := bytes.Repeat([]byte{byte(1 + rnd.IntN(255)), byte(n)}, PageSize/2)
			switch rnd.IntN(5) {
			case 0:
				data = nil
			case 1:
				model.write(t, w, off, data) // and again
				given++
				data = bytes.Repeat([]byte{7}, PageSize)
			}
			model.write(t, w, off, data)
			given++
		}
		if off := uint64(2 * mapSpan); n == 5 { // the last page
			model.write(t, w, off, bytes.Repeat([]byte{5}, PageSize))
			given++
		}
		ref, err := w.Close()
		if err != nil {
			t.Fatal(err)
		}
		if st := w.Stats(); st.SentPages > int64(given)+3 {
			t.Errorf("disk %d: %d pages went to the session, for %d written", n, st.SentPages, given)
		}
		commit(t, se)
		parent = ref
		kept = append(kept, Root{Name: "disk", Ref: ref, Memory: true})
		models = append(models, maps.Clone(model))
	}
	for i, r := range kept {
		models[i].verify(t, s, size, r.Ref)
	}
	kept, models = kept[8:], models[8:] // the others are forgotten
	mustGC(t, s, roots(kept...))
	mustCheck(t, s, roots(kept...))
	for i, r := range kept {
		models[i].verify(t, s, size, r.Ref)
	}
}

// A disk whose parent has been collected says so, and one whose parent is collected
// meanwhile keeps it.
func TestDiskWithoutParent(t *testing.T) {
	s := openTest(t, "mem://", Options{PackSize: 1 << 20})
	const size = 8 << 20
	model := disk{}
	first := func(seed byte) BlobRef {
		se := begin(t, s)
		w, err := se.NewDiskWriter(t.Context(), size, BlobRef{})
		if err != nil {
			t.Fatal(err)
		}
		for i := range uint64(600) {
			model.write(t, w, i*2*PageSize, bytes.Repeat([]byte{seed, byte(i), byte(i >> 8), 1}, PageSize/4))
		}
		ref, err := w.Close()
		if err != nil {
			t.Fatal(err)
		}
		commit(t, se)
		return ref
	}
	gone := first(1)
	mustGC(t, s, roots())
	se := begin(t, s)
	if _, err := se.NewDiskWriter(t.Context(), size, gone); !errors.Is(err, ErrMissing) {
		t.Fatalf("a parent that is gone: error %v, want ErrMissing", err)
	}
	if err := se.Abort(t.Context()); err != nil {
		t.Fatal(err)
	}

	parent := first(2)
	se = begin(t, s)
	w, err := se.NewDiskWriter(t.Context(), size, parent)
	if err != nil {
		t.Fatal(err)
	}
	mustGC(t, s, roots()) // nothing needs the parent any more
	model.write(t, w, PageSize, bytes.Repeat([]byte{9}, PageSize))
	ref, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	commit(t, se)
	mustGC(t, s, roots(Root{Name: "disk", Ref: ref, Memory: true}))
	model.verify(t, s, size, ref)
	if _, err := s.OpenDisk(t.Context(), size+PageSize, ref); !errors.Is(err, ErrDamaged) {
		t.Errorf("a disk of another size: error %v, want ErrDamaged", err)
	}
}

func roots(rs ...Root) iter.Seq2[Root, error] { return (&snapshots{roots: rs}).all() }
