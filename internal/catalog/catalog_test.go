package catalog_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"violin/internal/catalog"
	"violin/internal/store"
)

func open(t testing.TB, dir string, opts store.Options) (*store.Store, *catalog.Catalog) {
	t.Helper()
	opts.Logger = slog.New(slog.DiscardHandler)
	st, err := store.Open(t.Context(), dir, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = st.Close() })
	return st, catalog.New(st)
}

var start = time.Date(2026, 8, 7, 10, 15, 30, 123456789, time.UTC)

// take stores and seals a snapshot of one node whose memory is one page.
func take(t testing.TB, st *store.Store, c *catalog.Catalog, s *catalog.Snapshot) error {
	t.Helper()
	se, err := st.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	w, err := se.NewPageWriter(t.Context(), []store.Region{{ID: "pc.ram", Length: store.PageSize}})
	if err != nil {
		t.Fatal(err)
	}
	page := make([]byte, store.PageSize)
	copy(page, s.Slice+s.ID)
	if err := w.Page(0, 0, page); err != nil {
		t.Fatal(err)
	}
	memory, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	device, err := se.PutBlob(t.Context(), []byte("device state of "+s.ID))
	if err != nil {
		t.Fatal(err)
	}
	s.Nodes = []catalog.Node{{
		Name: "rank0", Host: "utah-1", CutAt: start, Pause: 3 * time.Millisecond,
		Device: device, Memory: memory, RawBytes: 4200, StoredBytes: 100, Pages: 1,
	}}
	return se.Commit(t.Context(), func(ctx context.Context) error { return c.Put(ctx, s) })
}

func snapshot(slice, id, tag string) *catalog.Snapshot {
	return &catalog.Snapshot{
		ID: id, Slice: slice, Tag: tag, Created: start, Mode: "background", Epoch: 255,
		Topology: []byte("version: 1\nslice: " + slice + "\n"),
		Totals:   catalog.Totals{Skew: time.Millisecond, Held: 3, Recorded: 2},
	}
}

func TestSnapshotsComeBack(t *testing.T) {
	for _, opts := range []store.Options{{}, {Key: store.NewKey()}} {
		dir := t.TempDir()
		st, c := open(t, dir, opts)
		want := snapshot("mandelbrot", "260807-101530-k3f9", "half-way")
		if err := take(t, st, c, want); err != nil {
			t.Fatal(err)
		}
		_ = st.Close()
		_, c = open(t, dir, opts)
		got, err := c.Get(t.Context(), "mandelbrot", "260807-101530-k3f9")
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("snapshot (-put +got):\n%s", d)
		}
	}
}

func TestResolve(t *testing.T) {
	st, c := open(t, t.TempDir(), store.Options{})
	for _, s := range []*catalog.Snapshot{
		snapshot("mandelbrot", "260807-101530-k3f9", "first"),
		snapshot("mandelbrot", "260807-111530-aaaa", "2608"), // a tag that looks like an ID's beginning
		snapshot("mandelbrot", "260808-091530-bbbb", ""),
		snapshot("mandelbrot-2", "260701-000000-cccc", "first"),
		snapshot("bank", "260808-091530-dddd", ""),
	} {
		if err := take(t, st, c, s); err != nil {
			t.Fatal(err)
		}
	}
	for _, r := range []struct {
		ref, want string
		err       error
		says      string
	}{
		{ref: "mandelbrot@260807-101530-k3f9", want: "mandelbrot@260807-101530-k3f9"},
		{ref: "mandelbrot@first", want: "mandelbrot@260807-101530-k3f9"},
		{ref: "mandelbrot-2@first", want: "mandelbrot-2@260701-000000-cccc"},
		{ref: "mandelbrot@latest", want: "mandelbrot@260808-091530-bbbb"},
		{ref: "mandelbrot", want: "mandelbrot@260808-091530-bbbb"},
		{ref: "mandelbrot@260808", want: "mandelbrot@260808-091530-bbbb"},
		{ref: "mandelbrot@2608", want: "mandelbrot@260807-111530-aaaa"},
		{ref: "260807-101530-k3f9", want: "mandelbrot@260807-101530-k3f9"},
		{ref: "260701", want: "mandelbrot-2@260701-000000-cccc"},
		{ref: "mandelbrot@260807", err: catalog.ErrAmbiguous, says: "mandelbrot@260807-111530-aaaa"},
		{ref: "260808-091530", err: catalog.ErrAmbiguous, says: "bank@260808-091530-dddd"},
		{ref: "mandelbrot@second", err: catalog.ErrNotFound, says: "second"},
		{ref: "julia@first", err: catalog.ErrNotFound, says: "julia"},
		{ref: "julia", err: catalog.ErrNotFound, says: "julia"},
		{ref: "mandelbrot@", says: "nothing after"},
		{ref: "", says: "slice name"},
		{ref: "../etc@latest", says: "slice name"},
	} {
		s, err := c.Resolve(t.Context(), r.ref)
		if r.want != "" {
			if err != nil || s.Ref() != r.want {
				t.Errorf("%q is %v, %v; want %s", r.ref, s, err, r.want)
			}
			continue
		}
		if err == nil || s != nil || r.err != nil && !errors.Is(err, r.err) || !strings.Contains(err.Error(), r.says) {
			t.Errorf("%q: %v; want %v that says %q", r.ref, err, r.err, r.says)
		}
	}
}

func TestListAndDelete(t *testing.T) {
	st, c := open(t, t.TempDir(), store.Options{})
	for _, ref := range []string{"b@2", "b@1", "a@1", "b-x@1"} {
		slice, id, _ := strings.Cut(ref, "@")
		if err := take(t, st, c, snapshot(slice, id, "")); err != nil {
			t.Fatal(err)
		}
	}
	list := func(slice string) string {
		t.Helper()
		all, err := c.List(t.Context(), slice)
		if err != nil {
			t.Fatal(err)
		}
		var refs []string
		for _, s := range all {
			refs = append(refs, s.Ref())
		}
		return strings.Join(refs, " ")
	}
	if got := list("b"); got != "b@1 b@2" {
		t.Errorf("slice b: %s", got)
	}
	if got := list(""); len(strings.Fields(got)) != 4 {
		t.Errorf("all: %s", got)
	}
	if got := list("none"); got != "" {
		t.Errorf("slice that is not there: %s", got)
	}
	if got, err := c.Slices(t.Context()); err != nil || len(got) != 3 {
		t.Errorf("slices: %v, %v", got, err)
	}
	if err := c.Delete(t.Context(), "b", "1"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Get(t.Context(), "b", "1"); !errors.Is(err, catalog.ErrNotFound) {
		t.Errorf("deleted: %v, want ErrNotFound", err)
	}
	if got := list("b"); got != "b@2" {
		t.Errorf("slice b: %s", got)
	}
	// Its pages go with the next collection, those of others stay.
	before := st.Stats().Pages
	if _, err := st.GC(t.Context(), c.Roots(t.Context())); err != nil {
		t.Fatal(err)
	}
	if after := st.Stats().Pages; after != before-1 {
		t.Errorf("%d pages after the collection, want %d", after, before-1)
	}
	r, err := st.Check(t.Context(), c.Roots(t.Context()), store.CheckOptions{ReadData: true})
	if err != nil || len(r.Problems) != 0 {
		t.Errorf("check: %v, %v", r, err)
	}
}

func TestPutRefuses(t *testing.T) {
	st, c := open(t, t.TempDir(), store.Options{})
	if err := take(t, st, c, snapshot("a", "1", "gold")); err != nil {
		t.Fatal(err)
	}
	for _, r := range []struct {
		s    *catalog.Snapshot
		want string
	}{
		{snapshot("a", "1", ""), "exists"},
		{snapshot("a", "2", "gold"), `snapshot 1 has it`},
		{snapshot("a", "2", "latest"), "youngest"},
		{snapshot("a", "2", "no spaces"), "tag"},
		{snapshot("A", "2", ""), "slice name"},
		{snapshot("a", "../2", ""), "snapshot ID"},
		{snapshot("", "2", ""), "slice name"},
	} {
		before := st.Stats().Pages
		if err := take(t, st, c, r.s); err == nil || !strings.Contains(err.Error(), r.want) {
			t.Errorf("%s: %v; want an error about %q", r.s.Ref(), err, r.want)
		}
		if st.Stats().Pages != before {
			t.Errorf("%s: pages of a snapshot that was refused are there", r.s.Ref())
		}
	}
	bad := snapshot("a", "3", "")
	if err := c.Put(t.Context(), bad); err != nil {
		t.Errorf("snapshot without nodes: %v", err)
	}
	bad.ID, bad.Nodes = "4", []catalog.Node{{Name: "x"}}
	if err := c.Put(t.Context(), bad); err == nil {
		t.Error("node without memory is accepted")
	}
	bad.Nodes, bad.Created = nil, time.Time{}
	if err := c.Put(t.Context(), bad); err == nil {
		t.Error("snapshot without a time is accepted")
	}
}

// Any altered byte of a sealed document is found, or makes no difference.
func TestSealFindsTampering(t *testing.T) {
	dir := t.TempDir()
	st, c := open(t, dir, store.Options{})
	want := snapshot("a", "1", "gold")
	if err := take(t, st, c, want); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "snapshots", "a", "1.json")
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for i := range good {
		bad := append([]byte(nil), good...)
		bad[i] ^= 1
		if err := os.WriteFile(file, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := c.Get(t.Context(), "a", "1")
		if err == nil && !cmp.Equal(got, want) || err != nil && got != nil {
			t.Errorf("byte %d (%q to %q): %v, %v", i, good[i], bad[i], got, err)
		}
	}
	for _, torn := range []int{0, 1, len(good) / 2, len(good) - 3} {
		if err := os.WriteFile(file, good[:torn], 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Get(t.Context(), "a", "1"); !errors.Is(err, store.ErrDamaged) || !strings.Contains(err.Error(), "a@1") {
			t.Errorf("torn after %d bytes: %v, want ErrDamaged", torn, err)
		}
	}
	// Nothing may be collected while nobody knows what it refers to.
	if _, err := st.GC(t.Context(), c.Roots(t.Context())); !errors.Is(err, store.ErrDamaged) {
		t.Errorf("collection: %v, want ErrDamaged", err)
	}
	newer := strings.Replace(string(good), `"version": 2`, `"version": 99`, 1)
	if err := os.WriteFile(file, []byte(newer), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Get(t.Context(), "a", "1"); err == nil || !strings.Contains(err.Error(), "format version 99") {
		t.Errorf("newer format: %v", err)
	}
	// A document under another's name is not accepted.
	if err := os.WriteFile(filepath.Join(dir, "snapshots", "a", "2.json"), good, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Get(t.Context(), "a", "2"); !errors.Is(err, store.ErrDamaged) {
		t.Errorf("document under another name: %v", err)
	}
}

func TestNewID(t *testing.T) {
	seed := rand.NewChaCha8([32]byte{1})
	var last string
	for n := range 100 {
		id, err := catalog.NewID(start.Add(time.Duration(n)*time.Second), seed)
		if err != nil {
			t.Fatal(err)
		}
		if len(id) != len("260807-101530-k3f9") || id <= last || !strings.HasPrefix(id, "260807-1") {
			t.Errorf("ID %q after %q", id, last)
		}
		last = id
	}
	if _, err := catalog.NewID(start, strings.NewReader("")); err == nil {
		t.Error("an ID without randomness")
	}
}

// The document is meant to be read by people and by other programs.
func TestDocumentFormat(t *testing.T) {
	dir := t.TempDir()
	st, c := open(t, dir, store.Options{})
	if err := take(t, st, c, snapshot("a", "1", "gold")); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(filepath.Join(dir, "snapshots", "a", "1.json"))
	if err != nil {
		t.Fatal(err)
	}
	var doc struct {
		Format   string
		Version  int
		Seal     store.Hash
		Snapshot json.RawMessage
	}
	if err := json.Unmarshal(raw, &doc); err != nil {
		t.Fatal(err)
	}
	if doc.Format != "violin-snapshot" || doc.Version != catalog.FormatVersion || doc.Seal != store.Sum(doc.Snapshot) {
		t.Errorf("document: %s", raw)
	}
	for _, s := range []string{`"tag": "gold"`, `"pause_ns": 3000000`, `"epoch": 255`} {
		if !strings.Contains(string(doc.Snapshot), s) {
			t.Errorf("document has no %s", s)
		}
	}
}

func ExampleCatalog_Resolve() {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "store")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	st, err := store.Open(ctx, dir, store.Options{})
	if err != nil {
		panic(err)
	}
	defer st.Close()

	c := catalog.New(st)
	session, err := st.Begin(ctx)
	if err != nil {
		panic(err)
	}
	snap := &catalog.Snapshot{ID: "260807-101530-k3f9", Slice: "mandelbrot", Tag: "half-way", Created: time.Now()}
	if err := session.Commit(ctx, func(ctx context.Context) error { return c.Put(ctx, snap) }); err != nil {
		panic(err)
	}
	for _, ref := range []string{"mandelbrot@half-way", "mandelbrot@2608", "mandelbrot"} {
		s, err := c.Resolve(ctx, ref)
		if err != nil {
			panic(err)
		}
		fmt.Println(s.Ref())
	}
	// Output:
	// mandelbrot@260807-101530-k3f9
	// mandelbrot@260807-101530-k3f9
	// mandelbrot@260807-101530-k3f9
}
