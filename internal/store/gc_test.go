package store

import (
	"bytes"
	"context"
	"errors"
	"iter"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
)

// snapshots stands for a catalog: the roots of what is sealed.
type snapshots struct {
	mu    sync.Mutex
	roots []Root
}

func (s *snapshots) add(r Root) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.roots = append(s.roots, r)
}

func (s *snapshots) all() iter.Seq2[Root, error] {
	return func(yield func(Root, error) bool) {
		s.mu.Lock()
		roots := slices.Clone(s.roots)
		s.mu.Unlock()
		for _, r := range roots {
			if !yield(r, nil) {
				return
			}
		}
	}
}

// capture stores a memory of these pages and returns its root.
func capture(t testing.TB, se *Session, name string, pages ...int) Root {
	t.Helper()
	w, err := se.NewPageWriter(context.Background(), []Region{{"ram", uint64(len(pages)) * PageSize}})
	if err != nil {
		t.Fatal(err)
	}
	for i, n := range pages {
		if err := w.Page(0, uint64(i)*PageSize, testPage(n)); err != nil {
			t.Fatal(err)
		}
	}
	ref, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	return Root{Name: name, Ref: ref, Memory: true}
}

// restore fails unless the root's memory has these pages.
func restore(t testing.TB, s *Store, r Root, pages ...int) {
	t.Helper()
	m, err := s.OpenMemory(t.Context(), r.Ref)
	if err != nil {
		t.Errorf("%s: %v", r.Name, err)
		return
	}
	defer m.Close()
	buf := make([]byte, PageSize)
	for i, n := range pages {
		if _, err := m.Page(0, uint64(i)*PageSize, buf); err != nil || !bytes.Equal(buf, testPage(n)) {
			t.Errorf("%s: page %d: %v", r.Name, i, err)
			return
		}
	}
}

func span(from, to int) []int {
	var out []int
	for n := from; n < to; n++ {
		out = append(out, n)
	}
	return out
}

func mustGC(t testing.TB, s *Store, roots iter.Seq2[Root, error]) GCStats {
	t.Helper()
	st, err := s.GC(t.Context(), roots)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func mustCheck(t testing.TB, s *Store, roots iter.Seq2[Root, error]) *Report {
	t.Helper()
	r, err := s.Check(t.Context(), roots, CheckOptions{ReadData: true})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestGCKeepsWhatIsNeeded(t *testing.T) {
	keys(t, func(t *testing.T, opts Options) {
		dir := t.TempDir()
		opts.PackSize = 1 << 20
		s := openTest(t, dir, opts)
		var live snapshots

		se := begin(t, s)
		a := capture(t, se, "a", span(0, 1500)...)
		blob := bytes.Repeat([]byte("device state"), 1000)
		ref, err := se.PutBlob(t.Context(), blob)
		if err != nil {
			t.Fatal(err)
		}
		commit(t, se)
		se = begin(t, s)
		// Shares a few pages with a, so that a's packs are mostly dead without a.
		shared := append(span(0, 40), span(2000, 2500)...)
		b := capture(t, se, "b", shared...)
		commit(t, se)
		live.add(a)
		live.add(b)
		live.add(Root{Name: "blob", Ref: ref})

		if st := mustGC(t, s, live.all()); st.PacksDeleted+st.PacksRewritten != 0 {
			t.Errorf("collected although all is needed: %+v", st)
		}
		before := s.Stats().PackBytes
		live.roots = slices.DeleteFunc(live.roots, func(r Root) bool { return r.Name == "a" })
		st := mustGC(t, s, live.all())
		if st.PacksDeleted == 0 || st.PacksRewritten == 0 || st.BytesFreed != before-s.Stats().PackBytes {
			t.Errorf("collected %+v; %d bytes before, %d after", st, before, s.Stats().PackBytes)
		}
		verify := func(s *Store) {
			t.Helper()
			restore(t, s, b, shared...)
			if got, err := s.GetBlob(t.Context(), ref); err != nil || !bytes.Equal(got, blob) {
				t.Errorf("blob: %v", err)
			}
			if s.Has(Sum(testPage(1000))) {
				t.Error("a page that nothing needs is still there")
			}
			if r := mustCheck(t, s, live.all()); len(r.Problems) != 0 {
				t.Errorf("check: %v", r.Problems)
			}
		}
		verify(s)
		_ = s.Close()
		s = openTest(t, dir, opts)
		verify(s)

		live.roots = nil
		mustGC(t, s, live.all())
		if n := packFiles(t, dir); len(n) != 0 {
			t.Errorf("left with nothing needed: %v", n)
		}
	})
}

func TestGCDeletesNothingIfARootCannotBeRead(t *testing.T) {
	dir := t.TempDir()
	s := openTest(t, dir, Options{})
	se := begin(t, s)
	a := capture(t, se, "a", 1, 2, 3)
	commit(t, se)
	before := packFiles(t, dir)

	reason := errors.New("a document is damaged")
	_, err := s.GC(t.Context(), func(yield func(Root, error) bool) { yield(Root{}, reason) })
	if !errors.Is(err, reason) {
		t.Errorf("got %v, want %v", err, reason)
	}
	var live snapshots
	live.add(Root{Name: "gone", Ref: BlobRef{Hash: Sum([]byte("x")), Size: 1}, Memory: true})
	if _, err := s.GC(t.Context(), live.all()); !errors.Is(err, ErrMissing) || !strings.Contains(err.Error(), "gone") {
		t.Errorf("got %v, want ErrMissing for the root that is gone", err)
	}
	if !slices.Equal(packFiles(t, dir), before) {
		t.Error("packs were deleted")
	}
	restore(t, s, a, 1, 2, 3)
}

// What a session deduplicates against while nothing sealed needs it stays.
func TestGCSparesWhatSessionsRelyOn(t *testing.T) {
	s := openTest(t, t.TempDir(), Options{})
	var live snapshots
	old := begin(t, s)
	capture(t, old, "forgotten", 1, 2, 3)
	commit(t, old)

	se := begin(t, s) // begun before the collection
	put(t, se, testPage(1))
	if st := mustGC(t, s, live.all()); st.PacksInUse == 0 {
		t.Errorf("collected %+v beside a session that relies on a pack", st)
	}
	a := capture(t, se, "a", 1, 2, 3)
	commit(t, se)
	restore(t, s, a, 1, 2, 3)

	// The session begins, deduplicates and seals in the middle of a
	// collection, after the roots were listed.
	mid := func(yield func(Root, error) bool) {
		se := begin(t, s)
		r := capture(t, se, "b", 2, 3)
		if n := se.Stats().NewPages; n != 0 {
			t.Errorf("%d new pages, want 0", n)
		}
		commit(t, se)
		live.add(r)
	}
	if st := mustGC(t, s, mid); st.PacksInUse == 0 {
		t.Errorf("collected %+v", st)
	}
	restore(t, s, live.roots[0], 2, 3)
	mustGC(t, s, live.all())
	restore(t, s, live.roots[0], 2, 3)

	if _, err := s.GC(t.Context(), func(yield func(Root, error) bool) {
		if _, err := s.GC(t.Context(), live.all()); err == nil {
			t.Error("two collections at a time")
		}
		yield(Root{}, errors.New("stop"))
	}); err == nil {
		t.Error("no error")
	}
}

// Sessions, restores and collections all at once.
func TestGCBesideEverything(t *testing.T) {
	s := openTest(t, "mem://", Options{PackSize: 1 << 20})
	var live snapshots
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil {
			if _, err := s.GC(t.Context(), live.all()); err != nil {
				t.Error(err)
				return
			}
		}
	})
	var writers sync.WaitGroup
	for g := range 3 {
		writers.Go(func() {
			r := rand.New(rand.NewPCG(uint64(g), 9))
			for range 12 {
				from := r.IntN(300)
				pages := span(from, from+r.IntN(200))
				se, err := s.Begin(ctx)
				if err != nil {
					t.Error(err)
					return
				}
				root := capture(t, se, "x", pages...)
				if r.IntN(4) == 0 {
					if err := se.Abort(ctx); err != nil {
						t.Error(err)
					}
					continue
				}
				if err := se.Commit(ctx, func(context.Context) error { live.add(root); return nil }); err != nil {
					t.Error(err)
					return
				}
				restore(t, s, root, pages...)
				live.mu.Lock()
				if len(live.roots) > 4 { // forget one that is not this one
					live.roots = slices.DeleteFunc(live.roots, func(o Root) bool { return o == live.roots[0] && o != root })
				}
				live.mu.Unlock()
			}
		})
	}
	writers.Wait()
	cancel()
	wg.Wait()
	if r := mustCheck(t, s, live.all()); len(r.Problems) != 0 {
		t.Errorf("check: %v", r.Problems)
	}
}

// A collection between what a commit does first (pages are visible) and last
// (the document is) takes nothing of it.
func TestGCWhileACommitSeals(t *testing.T) {
	s := openTest(t, t.TempDir(), Options{})
	var live snapshots
	se := begin(t, s)
	a := capture(t, se, "a", 1, 2, 3)
	if err := se.Commit(t.Context(), func(ctx context.Context) error {
		restore(t, s, a, 1, 2, 3)
		if st := mustGC(t, s, live.all()); st.PacksInUse != 2 {
			t.Errorf("collected %+v", st)
		}
		live.add(a)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	restore(t, s, a, 1, 2, 3)
	if r := mustCheck(t, s, live.all()); len(r.Problems) != 0 {
		t.Errorf("check: %v", r.Problems)
	}
}

// A commit that fails in its last step takes its packs back, but not from
// under a session that has used their pages meanwhile.
func TestFailedSealSparesWhatOthersFound(t *testing.T) {
	dir := t.TempDir()
	s := openTest(t, dir, Options{})
	var other Root
	reason := errors.New("no space for documents")
	se := begin(t, s)
	capture(t, se, "a", 1, 2, 3)
	if err := se.Commit(t.Context(), func(ctx context.Context) error {
		se := begin(t, s)
		other = capture(t, se, "b", 1, 2)
		if n := se.Stats().NewPages; n != 0 {
			t.Errorf("%d new pages, want 0", n)
		}
		commit(t, se)
		return reason
	}); !errors.Is(err, reason) {
		t.Errorf("commit: %v, want %v", err, reason)
	}
	restore(t, s, other, 1, 2)
	var live snapshots
	live.add(other)
	mustGC(t, s, live.all())
	restore(t, s, other, 1, 2)
	if r := mustCheck(t, s, live.all()); len(r.Problems) != 0 {
		t.Errorf("check: %v", r.Problems)
	}

	// If nobody knows whether the document is there, its packs stay.
	se = begin(t, s)
	c := capture(t, se, "c", 7)
	if err := se.Commit(t.Context(), func(context.Context) error { return ErrUncertain }); err == nil {
		t.Error("commit succeeded")
	}
	restore(t, s, c, 7)
}

func TestGCMergesSmallPacks(t *testing.T) {
	dir := t.TempDir()
	s := openTest(t, dir, Options{})
	var live snapshots
	for n := range smallPacks + 2 {
		se := begin(t, s)
		live.add(capture(t, se, "x", n))
		commit(t, se)
	}
	mustGC(t, s, live.all())
	if n := len(packFiles(t, dir)); n != 2 {
		t.Errorf("%d packs, want one of pages and one of chunks", n)
	}
	for n, r := range live.roots {
		restore(t, s, r, n)
	}
}
