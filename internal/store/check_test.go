package store

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// A flipped bit is found by the check, which names pack, page and everything
// hit, and by a restore, which gives no wrong byte.
func TestFlippedBitIsNamed(t *testing.T) {
	keys(t, func(t *testing.T, opts Options) {
		dir := t.TempDir()
		s := openTest(t, dir, opts)
		var live snapshots
		se := begin(t, s)
		live.add(capture(t, se, "s1 rank0", span(0, 50)...))
		live.add(capture(t, se, "s1 rank1", span(30, 80)...))
		live.add(capture(t, se, "s1 rank2", span(60, 90)...))
		commit(t, se)
		if r := mustCheck(t, s, live.all()); len(r.Problems) != 0 || r.Pages != 90 || r.Packs != 2 {
			t.Fatalf("check of a good store: %+v", r)
		}
		victim := Sum(testPage(40))
		loc, _ := s.pages.get(victim)
		pack := s.packOf(loc.pack()).id.name()
		flip(t, filepath.Join(dir, pack), int64(loc.offset()+loc.stored()/2))
		_ = s.Close()

		s = openTest(t, dir, opts)
		r := mustCheck(t, s, live.all())
		if len(r.Problems) != 1 {
			t.Fatalf("%d problems, want 1: %v", len(r.Problems), r.Problems)
		}
		p := r.Problems[0]
		var e *Error
		if !errors.As(p.Err, &e) || e.Pack != pack || e.Hash != victim || e.Offset != int64(loc.offset()) || !errors.Is(p.Err, ErrDamaged) {
			t.Errorf("problem: %v", p)
		}
		if !slices.Equal(p.Roots, []string{"s1 rank0", "s1 rank1"}) {
			t.Errorf("hit: %v", p.Roots)
		}
		if r, err := s.Check(t.Context(), live.all(), CheckOptions{}); err != nil || len(r.Problems) != 0 {
			t.Errorf("check that reads no data: %v, %v", r.Problems, err)
		}

		m, err := s.OpenMemory(t.Context(), live.roots[0].Ref)
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		buf := make([]byte, PageSize)
		for n := range 50 {
			_, err := m.Page(0, uint64(n)*PageSize, buf)
			if err != nil {
				if !errors.As(err, &e) || e.Hash != victim || e.Pack != pack || !errors.Is(err, ErrDamaged) {
					t.Errorf("restore: page %d: %v", n, err)
				}
				return
			}
			if !bytes.Equal(buf, testPage(n)) {
				t.Errorf("page %d has other content", n)
			}
		}
		t.Error("the restore succeeded")
	})
}

func flip(t testing.TB, file string, at int64) {
	t.Helper()
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	raw[at] ^= 0x10
	if err := os.WriteFile(file, raw, 0o600); err != nil {
		t.Fatal(err)
	}
}

// Damage of every kind to the files of a store: it opens, the check finds it
// and says whom it hits, and what is not hit can be restored.
func TestCheckFindsDamage(t *testing.T) {
	for _, c := range []struct {
		name  string
		kind  kind
		spoil func(t *testing.T, file string)
		want  string
	}{
		{"pack gone", kindPages, func(t *testing.T, f string) { remove(t, f) }, "not in the store"},
		{"pack of page tables gone", kindChunks, func(t *testing.T, f string) { remove(t, f) }, "not in the store"},
		{"pack torn", kindPages, func(t *testing.T, f string) { truncate(t, f, -20) }, "trailer"},
		{"pack empty", kindPages, func(t *testing.T, f string) { truncate(t, f, -1<<30) }, "0 bytes"},
		{"header", kindPages, func(t *testing.T, f string) { flip(t, f, 3) }, "magic"},
		{"pack id", kindPages, func(t *testing.T, f string) { flip(t, f, 20) }, "names pack"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			s := openTest(t, dir, Options{})
			var live snapshots
			se := begin(t, s)
			live.add(capture(t, se, "hit", span(0, 20)...))
			commit(t, se)
			se = begin(t, s)
			live.add(capture(t, se, "whole", span(100, 120)...))
			commit(t, se)
			var file string
			for _, p := range s.packs[1:] {
				if p.kind == c.kind && file == "" {
					file = filepath.Join(dir, p.id.name())
				}
			}
			_ = s.Close()
			c.spoil(t, file)
			s = openTest(t, dir, Options{})
			r := mustCheck(t, s, live.all())
			text := fmt.Sprint(r.Problems)
			if len(r.Problems) == 0 || !strings.Contains(text, c.want) {
				t.Errorf("problems: %s; want one about %q", text, c.want)
			}
			hit := false
			for _, p := range r.Problems {
				hit = hit || slices.Contains(p.Roots, "hit")
				if slices.Contains(p.Roots, "whole") {
					t.Errorf("problem hits what is whole: %v", p)
				}
			}
			if !hit {
				t.Errorf("problems do not say whom they hit: %s", text)
			}
			restore(t, s, live.roots[1], span(100, 120)...)
			if m, err := s.OpenMemory(t.Context(), live.roots[0].Ref); err == nil {
				_, err = m.Page(0, 0, make([]byte, PageSize))
				if err == nil {
					t.Error("a page of the damaged pack was read")
				}
				_ = m.Close()
			}
		})
	}
}

func remove(t testing.TB, file string) {
	t.Helper()
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
}

// truncate cuts a file by some bytes.
func truncate(t testing.TB, file string, by int64) {
	t.Helper()
	st, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, max(0, st.Size()+by)); err != nil {
		t.Fatal(err)
	}
}

// While the store is open, too, packs may be spoiled by others.
func TestPackGoneWhileOpen(t *testing.T) {
	dir := t.TempDir()
	s := openTest(t, dir, Options{})
	var live snapshots
	se := begin(t, s)
	live.add(capture(t, se, "hit", 1, 2))
	commit(t, se)
	for _, f := range packFiles(t, dir) {
		truncate(t, f, -1)
	}
	r := mustCheck(t, s, live.all())
	if len(r.Problems) == 0 {
		t.Error("no problem found")
	}
	for _, f := range packFiles(t, dir) {
		remove(t, f)
	}
	if r := mustCheck(t, s, live.all()); len(r.Problems) == 0 {
		t.Error("no problem found")
	}
	if _, err := s.Get(t.Context(), Sum(testPage(1)), make([]byte, PageSize)); !errors.Is(err, ErrMissing) {
		t.Errorf("page: %v, want ErrMissing", err)
	}
}
