package store

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

// oldPage is a page of testdata/v1: a store as the violin before pack format 2 wrote it.
func oldPage(n int) []byte {
	page := make([]byte, PageSize)
	for i := range page {
		page[i] = byte(n + i/16*(i%7))
	}
	return page
}

// A store with packs of version 1 is read, added to, checked and collected.
func TestOldPacks(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	if err := os.CopyFS(dir, os.DirFS("testdata/v1")); err != nil {
		t.Fatal(err)
	}
	key := Key{raw: make([]byte, 32)}
	for i := range key.raw {
		key.raw[i] = byte(i)
	}
	table := BlobRef{Size: 57}
	if err := table.Hash.UnmarshalText([]byte("a7500a70469dd482ce008252b112c87d6df543228f59eaa63ca9b27cc282f7a7")); err != nil {
		t.Fatal(err)
	}
	s := openTest(t, dir, Options{Key: key})
	for _, p := range s.packs[1:] {
		if p.method != methodZstd {
			t.Errorf("pack %s has method %d", p.id, p.method)
		}
	}
	readOld := func(table BlobRef) {
		t.Helper()
		r, err := s.OpenMemory(t.Context(), table)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		buf := make([]byte, PageSize)
		for i := range 24 {
			if zero, err := r.Page(0, uint64(i)*PageSize, buf); err != nil || zero || !bytes.Equal(buf, oldPage(i)) {
				t.Fatalf("page %d: zero %v, %v", i, zero, err)
			}
		}
	}
	readOld(table)

	// The next snapshot relies on old pages, and has one of its own in a new pack.
	se := begin(t, s)
	w, err := se.NewPageWriter(t.Context(), []Region{{"pc.ram", 32 * PageSize}})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 25 {
		if err := w.Page(0, uint64(i)*PageSize, oldPage(i)); err != nil {
			t.Fatal(err)
		}
	}
	newer, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	commit(t, se)
	if got := se.Stats().NewPages; got != 1 {
		t.Errorf("%d new pages beside old ones, want 1", got)
	}
	root := Root{Name: "s1", Ref: newer, Memory: true}
	if _, err := s.GC(t.Context(), rootsOf(root)); err != nil {
		t.Fatal(err)
	}
	report, err := s.Check(t.Context(), rootsOf(root), CheckOptions{ReadData: true})
	if err != nil || len(report.Problems) != 0 {
		t.Errorf("check: %+v, %v", report, err)
	}
	readOld(newer)
}
