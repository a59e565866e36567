package transfer

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
	"testing"
	"time"

	"violin/internal/catalog"
	"violin/internal/store"
)

func open(t testing.TB, opts store.Options) (*store.Store, string) {
	t.Helper()
	dir := t.TempDir()
	opts.Logger = slog.New(slog.DiscardHandler)
	st, err := store.Open(t.Context(), dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = st.Close() })
	return st, dir
}

const pages = 1200 // more than two leaves

func page(i int) []byte {
	p := make([]byte, store.PageSize)
	if i%3 == 0 {
		return p
	}
	r := rand.NewChaCha8([32]byte{byte(i)})
	if i%5 == 0 {
		_, _ = r.Read(p) // does not compress
	}
	binary.BigEndian.PutUint64(p, uint64(i))
	return p
}

// take stores a snapshot of one node.
func take(t testing.TB, st *store.Store, id, tag string) *catalog.Snapshot {
	t.Helper()
	se, err := st.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = se.Abort(context.Background()) }()
	w, err := se.NewPageWriter(t.Context(), []store.Region{{ID: "pc.ram", Length: pages * store.PageSize}})
	if err != nil {
		t.Fatal(err)
	}
	for i := range pages {
		if err := w.Page(0, uint64(i)*store.PageSize, page(i)); err != nil {
			t.Fatal(err)
		}
	}
	memory, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	device, err := se.PutBlob(t.Context(), bytes.Repeat([]byte(id), 1<<19)) // more than one chunk
	if err != nil {
		t.Fatal(err)
	}
	snap := &catalog.Snapshot{ID: id, Slice: "pair", Tag: tag, Created: time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC),
		Topology: []byte("version: 1\n"), Nodes: []catalog.Node{{Name: "rank0", Device: device, Memory: memory}}}
	if err := se.Commit(t.Context(), func(ctx context.Context) error { return catalog.New(st).Put(ctx, snap) }); err != nil {
		t.Fatal(err)
	}
	return snap
}

func exportTo(t testing.TB, st *store.Store, snap *catalog.Snapshot, passphrase string) []byte {
	t.Helper()
	var b bytes.Buffer
	if _, err := Export(t.Context(), st, snap, &b, passphrase); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

const secret = "correct horse battery"

func TestThereAndBack(t *testing.T) {
	for _, sealed := range []string{"", secret} {
		for _, opts := range []store.Options{{}, {Key: store.NewKey()}} {
			t.Run(fmt.Sprintf("sealed %v, encrypted %v", sealed != "", !opts.Key.IsZero()), func(t *testing.T) {
				from, _ := open(t, store.Options{Key: store.NewKey()})
				snap := take(t, from, "one", "release")
				file := exportTo(t, from, snap, sealed)
				to, _ := open(t, opts)
				got, stats, err := Import(t.Context(), to, bytes.NewReader(file), sealed)
				if err != nil {
					t.Fatal(err)
				}
				if stats.Pages != pages*2/3 || stats.NewPages != stats.Pages || got.Ref() != snap.Ref() {
					t.Errorf("%s, %+v", got.Ref(), stats)
				}
				c := catalog.New(to)
				a, err := catalog.New(from).Document(t.Context(), snap)
				if err != nil {
					t.Fatal(err)
				}
				if b, err := c.Document(t.Context(), got); err != nil || !bytes.Equal(a, b) {
					t.Errorf("the document is another: %v", err)
				}
				m, err := to.OpenMemory(t.Context(), got.Nodes[0].Memory)
				if err != nil {
					t.Fatal(err)
				}
				defer m.Close()
				for i := range pages {
					buf := make([]byte, store.PageSize)
					if _, err := m.Page(0, uint64(i)*store.PageSize, buf); err != nil || !bytes.Equal(buf, page(i)) {
						t.Fatalf("page %d: %v", i, err)
					}
				}
				if r, err := to.Check(t.Context(), c.Roots(t.Context()), store.CheckOptions{ReadData: true}); err != nil || len(r.Problems) > 0 {
					t.Errorf("%v, %v", r, err)
				}
				if _, _, err := Import(t.Context(), to, bytes.NewReader(file), sealed); !errors.Is(err, store.ErrExists) {
					t.Errorf("again: %v", err)
				}
				// Another snapshot of the same memory brings no page.
				second := exportTo(t, from, take(t, from, "two", ""), sealed)
				if _, stats, err := Import(t.Context(), to, bytes.NewReader(second), sealed); err != nil || stats.NewPages != 0 {
					t.Errorf("second: %+v, %v", stats, err)
				}
				// Nor is a tag taken away.
				third := exportTo(t, from, func() *catalog.Snapshot {
					if err := catalog.New(from).Delete(t.Context(), "pair", "one"); err != nil {
						t.Fatal(err)
					}
					return take(t, from, "three", "release")
				}(), sealed)
				if _, _, err := Import(t.Context(), to, bytes.NewReader(third), sealed); !errors.Is(err, store.ErrExists) {
					t.Errorf("a tag twice: %v", err)
				}
			})
		}
	}
}

// A file in which a bit is another, or that ends anywhere else, is refused, and
// the store is as before.
func TestDamage(t *testing.T) {
	from, _ := open(t, store.Options{})
	snap := take(t, from, "one", "")
	r := rand.New(rand.NewPCG(1, 2))
	for _, passphrase := range []string{"", secret} {
		file := exportTo(t, from, snap, passphrase)
		to, dir := open(t, store.Options{})
		refused := func(what string, b []byte) {
			t.Helper()
			_, _, err := Import(t.Context(), to, bytes.NewReader(b), passphrase)
			if err == nil {
				t.Fatalf("%s: accepted", what)
			}
			all, lerr := catalog.New(to).List(t.Context(), "")
			packs, gerr := filepath.Glob(filepath.Join(dir, "packs", "*", "*"))
			if len(all) != 0 || len(packs) != 0 || lerr != nil || gerr != nil {
				t.Fatalf("%s: left %v, %v, %v, %v", what, all, packs, lerr, gerr)
			}
		}
		flips := []int{0, 8, 9, 10, 16, 40, 63, 64, 70, 100, len(file) - 1, len(file) - 20}
		ends := []int{0, 63, 64, 65, len(file) - 1, len(file) - 57}
		if passphrase == "" { // deriving a key takes its time
			for range 15 {
				flips = append(flips, r.IntN(len(file)))
				ends = append(ends, r.IntN(len(file)))
			}
		}
		for _, at := range flips {
			if passphrase != "" && at == 16 {
				continue // asks for more iterations than this test has time for
			}
			b := bytes.Clone(file)
			b[at] ^= 1 << r.IntN(8)
			refused(fmt.Sprintf("a bit of byte %d", at), b)
		}
		for _, n := range ends {
			refused(fmt.Sprintf("%d bytes", n), file[:n])
		}
		refused("a byte more", append(bytes.Clone(file), 0))
		if passphrase != "" {
			// A whole segment less.
			refused("segment", file[:headerSize+segmentSize+16])
			for _, wrong := range []string{"", "wrong horse battery"} {
				if _, _, err := Import(t.Context(), to, bytes.NewReader(file), wrong); !errors.Is(err, store.ErrKey) {
					t.Errorf("passphrase %q: %v", wrong, err)
				}
			}
		}
		if _, _, err := Import(t.Context(), to, bytes.NewReader(file), passphrase); err != nil {
			t.Errorf("after all that: %v", err)
		}
	}
}

// What a snapshot needs and a well-formed file lacks is found before it is visible.
func TestIncomplete(t *testing.T) {
	from, _ := open(t, store.Options{})
	whole, _ := open(t, store.Options{})
	snap := take(t, from, "one", "")
	// The document refers to the same, in a store that has nothing else.
	doc, err := catalog.New(from).Document(t.Context(), snap)
	if err != nil {
		t.Fatal(err)
	}
	if err := catalog.New(whole).PutDocument(t.Context(), doc); err != nil {
		t.Fatal(err)
	}
	if _, err := Export(t.Context(), whole, snap, &bytes.Buffer{}, ""); !errors.Is(err, store.ErrMissing) {
		t.Errorf("exported what is not there: %v", err)
	}
	file := exportTo(t, from, snap, "")
	// Cut a page's record out and make the end right again.
	b := without(t, file)
	to, dir := open(t, store.Options{})
	if _, _, err := Import(t.Context(), to, bytes.NewReader(b), ""); !errors.Is(err, store.ErrMissing) {
		t.Errorf("imported an incomplete file: %v", err)
	}
	if names, err := os.ReadDir(filepath.Join(dir, "snapshots")); len(names) > 0 {
		t.Errorf("it left %v, %v", names, err)
	}
}

// without removes the last page of a plain file.
func without(t *testing.T, file []byte) []byte {
	t.Helper()
	var starts []int
	for at := headerSize; at < len(file); at += recordSize + int(binary.BigEndian.Uint32(file[at+1:])) {
		starts = append(starts, at)
	}
	n := len(starts) - 1
	for n--; file[starts[n]] != kindPage; n-- {
	}
	out := append(bytes.Clone(file[:starts[n]]), file[starts[n+1]:starts[len(starts)-1]]...)
	end := bytes.Clone(file[starts[len(starts)-1]:])
	if len(end) != recordSize+16 {
		t.Skip("the end is compressed")
	}
	binary.BigEndian.PutUint64(end[recordSize:], binary.BigEndian.Uint64(end[recordSize:])-1)
	sum := store.Sum(out[headerSize:])
	copy(end[9:], sum[:])
	return append(out, end...)
}
