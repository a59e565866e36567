package store

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	_ "gocloud.dev/blob/memblob"
)

// quiet keeps expected complaints out of the tests' output.
var quiet = slog.New(slog.DiscardHandler)

func openTest(t testing.TB, at string, opts Options) *Store {
	t.Helper()
	if opts.Logger == nil {
		opts.Logger = quiet
	}
	s, err := Open(t.Context(), at, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func begin(t testing.TB, s *Store) *Session {
	t.Helper()
	se, err := s.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = se.Abort(context.Background()) })
	return se
}

func commit(t testing.TB, se *Session) {
	t.Helper()
	if err := se.Commit(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
}

func put(t testing.TB, se *Session, page []byte) Hash {
	t.Helper()
	h, err := se.Put(t.Context(), page)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// testPage makes page n of a kind of memory: half noise, half text-like.
func testPage(n int) []byte {
	p := make([]byte, PageSize)
	r := rand.New(rand.NewPCG(uint64(n), 1))
	for i := 0; i < PageSize/2; i += 8 {
		binary.LittleEndian.PutUint64(p[i:], r.Uint64())
	}
	copy(p[PageSize/2:], bytes.Repeat(fmt.Appendf(nil, "page %d of a guest ", n), 200))
	return p
}

// keys are both ways to run a store.
func keys(t *testing.T, f func(t *testing.T, opts Options)) {
	t.Run("plain", func(t *testing.T) { f(t, Options{}) })
	t.Run("encrypted", func(t *testing.T) { f(t, Options{Key: NewKey()}) })
}

func TestPagesComeBack(t *testing.T) {
	keys(t, func(t *testing.T, opts Options) {
		dir := t.TempDir()
		opts.PackSize = 1 << 20
		s := openTest(t, dir, opts)
		se := begin(t, s)
		var hashes []Hash
		for n := range 1000 {
			hashes = append(hashes, put(t, se, testPage(n)))
		}
		if h := put(t, se, testPage(3)); h != hashes[3] || h != Sum(testPage(3)) {
			t.Errorf("page 3 has hash %s again, want %s", h, hashes[3])
		}
		if h := put(t, se, make([]byte, PageSize)); h != ZeroPage() {
			t.Errorf("zeros have hash %s, want that of the zero page", h)
		}
		if s.Has(hashes[0]) {
			t.Error("a page is visible before its session has committed")
		}
		commit(t, se)

		st := se.Stats()
		if st.Pages != 1002 || st.NewPages != 1000 || st.ZeroPages != 1 || st.RawBytes != 1002*PageSize {
			t.Errorf("session stats: %+v", st)
		}
		if st.StoredBytes <= 0 || st.StoredBytes >= 1000*PageSize*3/4 {
			t.Errorf("1000 half-empty pages were stored in %d bytes", st.StoredBytes)
		}
		check := func(s *Store) {
			t.Helper()
			buf := make([]byte, PageSize)
			for n, h := range hashes {
				if got, err := s.Get(t.Context(), h, buf); err != nil || got != PageSize || !bytes.Equal(buf, testPage(n)) {
					t.Fatalf("page %d: %d bytes, %v", n, got, err)
				}
			}
			if _, err := s.Get(t.Context(), ZeroPage(), buf); err != nil || !isZero(buf) {
				t.Errorf("zero page: %v", err)
			}
			if _, err := s.Get(t.Context(), Sum([]byte("x")), buf); !errors.Is(err, ErrMissing) {
				t.Errorf("unknown page: %v, want ErrMissing", err)
			}
			if st := s.Stats(); st.Pages != 1000 || st.Packs < 2 {
				t.Errorf("store stats: %+v", st)
			}
		}
		check(s)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		check(openTest(t, dir, opts))
	})
}

func TestSecondSessionStoresNothingTwice(t *testing.T) {
	s := openTest(t, t.TempDir(), Options{})
	for round := range 2 {
		se := begin(t, s)
		for n := range 100 {
			put(t, se, testPage(n))
		}
		commit(t, se)
		if want := int64(100 * (1 - round)); se.Stats().NewPages != want {
			t.Errorf("round %d: %d new pages, want %d", round, se.Stats().NewPages, want)
		}
	}
	if n := s.Stats().Packs; n != 1 {
		t.Errorf("%d packs, want 1", n)
	}
}

func TestManyPutTheSamePages(t *testing.T) {
	s := openTest(t, t.TempDir(), Options{PackSize: 1 << 20})
	se := begin(t, s)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for n := range 300 {
				if _, err := se.Put(t.Context(), testPage(n)); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	commit(t, se)
	if st := se.Stats(); st.NewPages != 300 {
		t.Errorf("%d new pages, want 300", st.NewPages)
	}
	buf := make([]byte, PageSize)
	for n := range 300 {
		if _, err := s.Get(t.Context(), Sum(testPage(n)), buf); err != nil {
			t.Fatal(err)
		}
	}
}

func TestAbortLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	s := openTest(t, dir, Options{PackSize: 1 << 20})
	kept := begin(t, s)
	put(t, kept, testPage(0))
	commit(t, kept)

	se := begin(t, s)
	for n := range 2000 { // several packs
		put(t, se, testPage(n))
	}
	if err := se.Abort(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := se.Abort(t.Context()); err != nil {
		t.Errorf("second abort: %v", err)
	}
	if n := packFiles(t, dir); len(n) != 1 {
		t.Errorf("%d packs in the directory, want 1", len(n))
	}
	if _, err := se.Put(t.Context(), testPage(5000)); !errors.Is(err, ErrClosed) {
		t.Errorf("put after abort: %v, want ErrClosed", err)
	}
	if err := se.Commit(t.Context(), nil); !errors.Is(err, ErrClosed) {
		t.Errorf("commit after abort: %v, want ErrClosed", err)
	}
	if !s.Has(Sum(testPage(0))) || s.Has(Sum(testPage(1))) {
		t.Error("the abort took what was committed before, or left what it stored")
	}
}

func TestFailedSealAborts(t *testing.T) {
	dir := t.TempDir()
	s := openTest(t, dir, Options{})
	se := begin(t, s)
	h := put(t, se, testPage(1))
	reason := errors.New("disk of documents is full")
	if err := se.Commit(t.Context(), func(context.Context) error { return reason }); !errors.Is(err, reason) {
		t.Errorf("commit: %v, want %v", err, reason)
	}
	if s.Has(h) || len(packFiles(t, dir)) != 0 {
		t.Error("the pages of a snapshot that was not sealed are still there")
	}
}

func TestSealSeesEverythingStored(t *testing.T) {
	dir := t.TempDir()
	s := openTest(t, dir, Options{})
	se := begin(t, s)
	put(t, se, testPage(1))
	err := se.Commit(t.Context(), func(ctx context.Context) error {
		if n := len(packFiles(t, dir)); n != 1 {
			t.Errorf("%d packs on the disk when the document is written, want 1", n)
		}
		return s.PutDocument(ctx, "snapshots/a", []byte("{}"))
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestAbortWhileOthersPut(t *testing.T) {
	s := openTest(t, "mem://", Options{PackSize: 1 << 20})
	se := begin(t, s)
	started := make(chan struct{}, 4)
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for n := 0; ; n++ {
				if _, err := se.Put(context.Background(), testPage(n*4+g)); err != nil {
					if !errors.Is(err, ErrClosed) {
						t.Errorf("put: %v, want ErrClosed", err)
					}
					return
				}
				if n == 50 {
					started <- struct{}{}
				}
			}
		})
	}
	<-started
	if err := se.Abort(t.Context()); err != nil {
		t.Error(err)
	}
	wg.Wait()
	for o, err := range s.bucket.list(t.Context(), packPrefix) {
		t.Errorf("left behind: %s, %v", o.name, err)
	}
}

func TestCancelledCommitAborts(t *testing.T) {
	dir := t.TempDir()
	s := openTest(t, dir, Options{})
	se := begin(t, s)
	put(t, se, testPage(1))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := se.Commit(ctx, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("commit: %v, want context.Canceled", err)
	}
	if n := packFiles(t, dir); len(n) != 0 {
		t.Errorf("left behind: %v", n)
	}
}

// A bucket that cannot be written to ends the session with the reason.
func TestFullBucketIsReported(t *testing.T) {
	dir := t.TempDir()
	s := openTest(t, dir, Options{PackSize: 1 << 20})
	se := begin(t, s)
	// A file where the packs' directory has to be.
	if err := os.WriteFile(filepath.Join(dir, "packs"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var err error
	for n := 0; err == nil && n < 100_000; n++ {
		_, err = se.Put(t.Context(), testPage(n))
	}
	if err == nil {
		t.Fatal("pages are accepted for ever")
	}
	if err := se.Commit(t.Context(), nil); err == nil {
		t.Error("commit succeeded")
	}
}

func TestOneWriter(t *testing.T) {
	dir := t.TempDir()
	s := openTest(t, dir, Options{})
	if _, err := Open(t.Context(), dir, Options{}); !errors.Is(err, ErrLocked) {
		t.Errorf("second writer: %v, want ErrLocked", err)
	}
	se := begin(t, s)
	h := put(t, se, testPage(1))
	commit(t, se)

	r := openTest(t, dir, Options{ReadOnly: true})
	if !r.Has(h) {
		t.Error("reader beside the writer does not see the page")
	}
	if _, err := r.Begin(t.Context()); err == nil {
		t.Error("session in a store opened read-only")
	}
	if err := r.PutDocument(t.Context(), "a/b", nil); err == nil {
		t.Error("document written to a store opened read-only")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	openTest(t, dir, Options{})
}

func TestOpenRefuses(t *testing.T) {
	key := NewKey()
	sealed := func(t *testing.T, dir string) {
		s := openTest(t, dir, Options{Key: key})
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	write := func(name, text string) func(t *testing.T, dir string) {
		return func(t *testing.T, dir string) {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	nothing := func(*testing.T, string) {}
	phrase, err := Passphrase("correct horse")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name    string
		prepare func(t *testing.T, dir string)
		opts    Options
		want    string
	}{
		{"newer format", write(describeName, `{"format":"violin-store","version":2,"id":"x"}`), Options{}, "format version 2"},
		{"other format", write(describeName, `{"format":"tar","version":1}`), Options{}, "no violin store"},
		{"torn description", write(describeName, `{"form`), Options{}, "damaged"},
		{"other files", write("thesis.tex", "..."), Options{}, "thesis.tex"},
		{"nothing to read", nothing, Options{ReadOnly: true}, "not in the store"},
		{"no key", sealed, Options{}, "wrong key"},
		{"wrong key", sealed, Options{Key: NewKey()}, "wrong key"},
		{"passphrase for a key file", sealed, Options{Key: phrase}, "key file"},
		{"key for a plain store", func(t *testing.T, dir string) { _ = openTest(t, dir, Options{}).Close() }, Options{Key: key}, "not encrypted"},
		{"tiny packs", nothing, Options{PackSize: 1}, "pack size"},
		{"no such driver", nothing, Options{}, "nosuch"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			c.prepare(t, dir)
			at := dir
			if c.want == "nosuch" {
				at = "nosuch://bucket"
			}
			s, err := Open(t.Context(), at, c.opts)
			if err == nil || s != nil || !bytes.Contains([]byte(err.Error()), []byte(c.want)) {
				t.Errorf("got %v, %v; want an error about %q", s, err, c.want)
			}
		})
	}
}

func TestReadOnlyMakesNothing(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "typo")
	if s, err := Open(t.Context(), dir, Options{ReadOnly: true}); err == nil || s != nil {
		t.Errorf("a store that is not there opens: %v", err)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("the directory was made")
	}
}

func TestKeys(t *testing.T) {
	k := NewKey()
	file := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(file, []byte(k.Text()), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := ReadKeyFile(file)
	if err != nil || got.Text() != k.Text() {
		t.Errorf("key from its file: %v", err)
	}
	if s := fmt.Sprint(k, got); bytes.Contains([]byte(s), []byte(k.Text()[len(keyFilePrefix):])) {
		t.Errorf("a key shows when printed: %s", s)
	}
	for _, text := range []string{"", "violin-key-1:", "violin-key-1:zz", k.Text()[:40], "secret"} {
		if _, err := ParseKey(text); err == nil {
			t.Errorf("key %q is accepted", text)
		}
	}
	if _, err := Passphrase("short"); err == nil {
		t.Error("a short passphrase is accepted")
	}

	p, err := Passphrase("correct horse battery")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	s := openTest(t, dir, Options{Key: p})
	se := begin(t, s)
	h := put(t, se, testPage(1))
	commit(t, se)
	_ = s.Close()
	if s := openTest(t, dir, Options{Key: p}); !s.Has(h) || !s.Encrypted() {
		t.Error("page is gone after opening with the passphrase")
	}
}

func TestEncryptedStoreShowsNothing(t *testing.T) {
	dir := t.TempDir()
	s := openTest(t, dir, Options{Key: NewKey()})
	se := begin(t, s)
	secret := bytes.Repeat([]byte("top secret key. "), PageSize/16)
	h := put(t, se, secret)
	noise := testPage(7) // does not compress in its first half
	put(t, se, noise)
	if _, err := se.PutBlob(t.Context(), []byte("device state of rank0")); err != nil {
		t.Fatal(err)
	}
	if err := se.Commit(t.Context(), func(ctx context.Context) error {
		return s.PutDocument(ctx, "snapshots/a", []byte("snapshot of mandelbrot"))
	}); err != nil {
		t.Fatal(err)
	}
	err := filepath.WalkDir(dir, func(name string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		raw, err := os.ReadFile(name)
		for _, s := range [][]byte{[]byte("top secret"), noise[:64], []byte("rank0"), []byte("mandelbrot"), h[:]} {
			if bytes.Contains(raw, s) {
				t.Errorf("%s holds %q in the clear", name, s)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := s.GetDocument(t.Context(), "snapshots/a"); err != nil || string(got) != "snapshot of mandelbrot" {
		t.Errorf("document: %q, %v", got, err)
	}
	// A document under another's name is not accepted.
	if err := os.Rename(filepath.Join(dir, "snapshots/a"), filepath.Join(dir, "snapshots/b")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.GetDocument(t.Context(), "snapshots/b"); !errors.Is(err, ErrDamaged) {
		t.Errorf("document under another name: %v, want ErrDamaged", err)
	}
}

func TestDocuments(t *testing.T) {
	s := openTest(t, t.TempDir(), Options{})
	ctx := t.Context()
	for _, name := range []string{"", "a", "/a", "a/", "a//b", "a/../b", "a/.b", "packs/aa/b", "a/b c", "a/ü"} {
		if err := s.PutDocument(ctx, name, nil); err == nil {
			t.Errorf("document name %q is accepted", name)
		}
	}
	for _, name := range []string{"snapshots/b/2", "snapshots/b/1", "snapshots/bb/1", "other/1"} {
		if err := s.PutDocument(ctx, name, []byte(name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.PutDocument(ctx, "snapshots/b/1", nil); !errors.Is(err, ErrExists) {
		t.Errorf("taken name: %v, want ErrExists", err)
	}
	var names []string
	for n, err := range s.Documents(ctx, "snapshots/b") {
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, n)
	}
	if got := fmt.Sprint(names); got != "[snapshots/b/1 snapshots/b/2]" {
		t.Errorf("documents: %s", got)
	}
	if err := s.DeleteDocument(ctx, "snapshots/b/1"); err != nil {
		t.Error(err)
	}
	if err := s.DeleteDocument(ctx, "snapshots/b/1"); err != nil {
		t.Errorf("second deletion: %v", err)
	}
	if _, err := s.GetDocument(ctx, "snapshots/b/1"); !errors.Is(err, ErrMissing) {
		t.Errorf("deleted document: %v, want ErrMissing", err)
	}
}

func packFiles(t testing.TB, dir string) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "packs", "*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	return names
}
