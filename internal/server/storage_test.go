package server

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
	"violin/internal/access"
	"violin/internal/catalog"
	"violin/internal/store"
	"violin/internal/trust"
)

func newServer(t *testing.T, state string, storage Storage) *Server {
	t.Helper()
	s, err := New(t.Context(), Config{StateDir: state, Storage: storage, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// dial speaks to a server over the wire.
func dial(t *testing.T, s *Server) violinv1connect.StoreServiceClient {
	t.Helper()
	h := httptest.NewServer(access.As(access.Caller{Role: trust.Operator}, s.Handler()))
	t.Cleanup(h.Close)
	return violinv1connect.NewStoreServiceClient(h.Client(), h.URL)
}

// keep stores a snapshot of two nodes; pages of the same seed are the same.
func keep(t *testing.T, s *Server, id, tag string, at time.Time, seed int) *catalog.Snapshot {
	t.Helper()
	se, err := s.store.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = se.Abort(context.Background()) }()
	snap := &catalog.Snapshot{ID: id, Slice: "pair", Tag: tag, Created: at, Topology: []byte("version: 1\n")}
	for n := range 2 {
		w, err := se.NewPageWriter(t.Context(), []store.Region{{ID: "pc.ram", Length: 64 * store.PageSize}})
		if err != nil {
			t.Fatal(err)
		}
		for i := range 40 {
			page := make([]byte, store.PageSize)
			binary.BigEndian.PutUint64(page[100:], uint64(seed*1000+n*100+i))
			if err := w.Page(0, uint64(i)*store.PageSize, page); err != nil {
				t.Fatal(err)
			}
		}
		memory, err := w.Close()
		if err != nil {
			t.Fatal(err)
		}
		device, err := se.PutBlob(t.Context(), fmt.Appendf(nil, "device %d of %d", n, seed))
		if err != nil {
			t.Fatal(err)
		}
		snap.Nodes = append(snap.Nodes, catalog.Node{Name: fmt.Sprintf("rank%d", n), Device: device, Memory: memory, Pages: 40, ZeroPages: 24})
	}
	ref, err := se.PutBlob(t.Context(), fmt.Appendf(nil, "channel of %d", seed))
	if err != nil {
		t.Fatal(err)
	}
	snap.Channel = catalog.Channel{Ref: ref}
	if err := se.Commit(t.Context(), func(ctx context.Context) error { return s.catalog.Put(ctx, snap) }); err != nil {
		t.Fatal(err)
	}
	return snap
}

func check(t *testing.T, c violinv1connect.StoreServiceClient) *violinv1.CheckReport {
	t.Helper()
	stream, err := c.Check(t.Context(), &violinv1.CheckRequest{ReadData: true})
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	var r *violinv1.CheckReport
	for stream.Receive() {
		r = stream.Msg().GetReport()
	}
	if stream.Err() != nil || r == nil {
		t.Fatalf("report %v, error %v", r, stream.Err())
	}
	return r
}

func packs(t *testing.T, state string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(state, "store", "packs", "*", "*"))
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	return files
}

var noon = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

func TestForgetAndCollect(t *testing.T) {
	s := newServer(t, t.TempDir(), Storage{})
	c := dial(t, s)
	for i := range 4 {
		keep(t, s, fmt.Sprintf("s%d", i), map[int]string{1: "release"}[i], noon.Add(time.Duration(i)*time.Minute), i)
	}
	request := &violinv1.ForgetRequest{Slice: "pair", KeepLast: 1, KeepTags: []string{"release"}, DryRun: true}
	for _, dry := range []bool{true, false} {
		request.DryRun = dry
		r, err := c.Forget(t.Context(), request)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, v := range r.GetVerdicts() {
			got = append(got, fmt.Sprintf("%s %v %s", v.GetSnapshot().GetId(), v.GetKept(), strings.Join(v.GetReasons(), "+")))
		}
		want := []string{"s0 false no rule keeps it", "s1 true tag release", "s2 false no rule keeps it", "s3 true last 1"}
		if !slices.Equal(got, want) {
			t.Errorf("dry run %v: got %q, want %q", dry, got, want)
		}
	}
	if _, err := c.Forget(t.Context(), &violinv1.ForgetRequest{Snapshots: []string{"pair@release", "pair@s0"}}); connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("one of two is gone: %v", err)
	}
	before, err := c.Stats(t.Context(), &violinv1.StatsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	// A cut that runs meanwhile, and shares a page with what is collected.
	se, err := s.store.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	page := make([]byte, store.PageSize)
	binary.BigEndian.PutUint64(page[100:], 2*1000)
	shared, err := se.Put(t.Context(), page)
	if err != nil {
		t.Fatal(err)
	}
	r, err := c.Collect(t.Context(), &violinv1.CollectRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if r.GetPacksDeleted() == 0 || r.GetPacksInUse() != 1 || r.GetBytesFreed() <= 0 {
		t.Errorf("collected %v", r)
	}
	if err := se.Commit(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if _, err := s.store.Get(t.Context(), shared, page); err != nil {
		t.Errorf("what a cut relied on during the collection: %v", err)
	}
	after, err := c.Stats(t.Context(), &violinv1.StatsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if before.GetSnapshots() != 2 || after.GetSnapshots() != 2 || after.GetPages() >= before.GetPages() || after.GetMemoryBytes() != 2*2*64*store.PageSize {
		t.Errorf("before %v, after %v", before, after)
	}
	if r := check(t, c); len(r.GetDamage()) != 0 {
		t.Errorf("damage after a collection: %v", r.GetDamage())
	}
}

// One flipped bit in a page: the check names it, what has it is not restored, and
// none of its bytes come out; what does not have it is as before.
// A snapshot of which memory still follows is kept, by name or by rules, until the last node has
// all of it.
func TestForgetWhileMemoryFollows(t *testing.T) {
	s := newServer(t, t.TempDir(), Storage{})
	c := dial(t, s)
	snap := keep(t, s, "s0", "", noon, 0)
	keep(t, s, "s1", "", noon.Add(time.Minute), 1)
	for range 2 {
		s.following(snap, 1)
	}
	for _, request := range []*violinv1.ForgetRequest{
		{Snapshots: []string{"pair@s0"}},
		{Slice: "pair", KeepLast: 1},
	} {
		r, err := c.Forget(t.Context(), request)
		if len(request.GetSnapshots()) > 0 {
			if connect.CodeOf(err) != connect.CodeFailedPrecondition || !strings.Contains(err.Error(), "memory still follows") {
				t.Errorf("by name: %v", err)
			}
			continue
		}
		if err != nil || len(r.GetVerdicts()) != 2 || !r.GetVerdicts()[0].GetKept() {
			t.Errorf("by rules: %v, %v", r, err)
		}
	}
	s.following(snap, -1)
	if _, err := c.Forget(t.Context(), &violinv1.ForgetRequest{Snapshots: []string{"pair@s0"}}); err == nil {
		t.Error("forgotten while one node still needs it")
	}
	s.following(snap, -1)
	if _, err := c.Forget(t.Context(), &violinv1.ForgetRequest{Snapshots: []string{"pair@s0"}}); err != nil {
		t.Error(err)
	}
}

func TestDamageIsNamed(t *testing.T) {
	state := t.TempDir()
	s := newServer(t, state, Storage{})
	hit := keep(t, s, "hit", "", noon, 1)
	files := packs(t, state)
	sound := keep(t, s, "sound", "", noon.Add(time.Minute), 2)
	var pack string
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if b[9] != 'p' {
			continue
		}
		pack = "packs/" + filepath.Base(filepath.Dir(f)) + "/" + filepath.Base(f)
		b[32+5] ^= 0x10 // the first page's
		if err := os.WriteFile(f, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c := dial(t, s)
	r := check(t, c)
	if len(r.GetDamage()) != 1 {
		t.Fatalf("damage: %v", r.GetDamage())
	}
	d := r.GetDamage()[0]
	if d.GetPack() != pack || len(d.GetPage()) != 64 || d.GetOffset() != 32 || len(d.GetNeededBy()) != 1 || !strings.HasPrefix(d.GetNeededBy()[0], "pair@hit rank") {
		t.Errorf("damage: %v", d)
	}

	err := s.sound(t.Context(), hit)
	var e *store.Error
	if !errors.As(err, &e) || e.Pack != pack || e.Hash.String() != d.GetPage() || !strings.Contains(err.Error(), d.GetNeededBy()[0]) {
		t.Errorf("verify: %v; want pack %s, page %s and %s", err, pack, d.GetPage(), d.GetNeededBy()[0])
	}
	if err := s.sound(t.Context(), sound); err != nil {
		t.Errorf("the other snapshot: %v", err)
	}

	// What a restore reads from.
	failed := 0
	for _, n := range hit.Nodes {
		m, err := s.store.OpenMemory(t.Context(), n.Memory)
		if err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, store.PageSize)
		for i := range 64 {
			for k := range buf {
				buf[k] = 0xa5
			}
			read := m.Page
			if i%2 == 1 {
				read = m.At // as a lazy restore does
			}
			_, err := read(0, uint64(i)*store.PageSize, buf)
			if err == nil {
				continue
			}
			failed++
			if !errors.As(err, &e) || e.Pack != pack || e.Hash.String() != d.GetPage() || !errors.Is(err, store.ErrDamaged) {
				t.Errorf("node %s, page %d: %v", n.Name, i, err)
			}
			if slices.ContainsFunc(buf, func(b byte) bool { return b != 0xa5 }) {
				t.Errorf("node %s, page %d: bytes were handed out", n.Name, i)
			}
		}
		_ = m.Close()
	}
	if failed == 0 {
		t.Error("the damaged page was read")
	}
}

// A damaged document does not hide the rest, and can be forgotten by its name.
func TestDamagedDocument(t *testing.T) {
	state := t.TempDir()
	s := newServer(t, state, Storage{Insecure: true})
	keep(t, s, "bad", "", noon, 1)
	keep(t, s, "good", "", noon, 2)
	if err := s.led.Replace(t.Context(), "snapshots/pair/bad.json", []byte("{")); err != nil {
		t.Fatal(err)
	}
	c := dial(t, s)
	r := check(t, c)
	if len(r.GetDamage()) != 1 || !slices.Equal(r.GetDamage()[0].GetNeededBy(), []string{"pair@bad"}) {
		t.Fatalf("damage: %v", r.GetDamage())
	}
	if _, err := c.Collect(t.Context(), &violinv1.CollectRequest{}); connect.CodeOf(err) != connect.CodeDataLoss || !strings.Contains(err.Error(), "pair@bad") {
		t.Errorf("collected beside a document that cannot be read: %v", err)
	}
	if _, err := c.Forget(t.Context(), &violinv1.ForgetRequest{Snapshots: []string{"pair@bad"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Collect(t.Context(), &violinv1.CollectRequest{}); err != nil {
		t.Error(err)
	}
	if r := check(t, c); len(r.GetDamage()) != 0 {
		t.Errorf("damage: %v", r.GetDamage())
	}
}

func TestKeys(t *testing.T) {
	open := func(state string, storage Storage) (*Server, error) {
		s, err := New(t.Context(), Config{StateDir: state, Storage: storage, Logger: slog.New(slog.DiscardHandler)})
		if err == nil {
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		}
		return s, err
	}
	const secret = "correct horse battery"
	for _, test := range []struct {
		name      string
		make      Storage
		encrypted bool
		again     map[string]Storage // refused, and what the error says
	}{
		{"by default", Storage{}, true, map[string]Storage{"leave the passphrase out": {Passphrase: secret}}},
		{"passphrase", Storage{Passphrase: secret}, true, map[string]Storage{
			"it was made with a passphrase": {}, "does not unlock": {Passphrase: "wrong horse battery"}}},
		{"insecure", Storage{Insecure: true}, false, map[string]Storage{"made without encryption": {Passphrase: secret}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			state := t.TempDir()
			s, err := open(state, test.make)
			if err != nil || s.store.Encrypted() != test.encrypted {
				t.Fatalf("encrypted %v, error %v", s != nil && s.store.Encrypted(), err)
			}
			if _, err := open(state, Storage{Passphrase: test.make.Passphrase}); err != nil {
				t.Errorf("again: %v", err)
			}
			for want, storage := range test.again {
				if _, err := open(state, storage); !errors.Is(err, store.ErrKey) || !strings.Contains(err.Error(), want) {
					t.Errorf("error %v, want %q", err, want)
				}
			}
			file := filepath.Join(state, "store.key")
			info, err := os.Stat(file)
			if want := test.name == "by default"; (err == nil) != want || want && info.Mode().Perm() != 0o600 {
				t.Errorf("key file: %v, %v", info, err)
			}
			if err != nil {
				return
			}
			if err := os.Rename(file, file+".away"); err != nil {
				t.Fatal(err)
			}
			if _, err := open(state, Storage{}); !errors.Is(err, store.ErrKey) || !strings.Contains(err.Error(), "key file "+file+" is missing") {
				t.Errorf("without the key file: %v", err)
			}
			if err := store.NewKey().WriteFile(file); err != nil {
				t.Fatal(err)
			}
			if _, err := open(state, Storage{}); !errors.Is(err, store.ErrKey) {
				t.Errorf("with another key file: %v", err)
			}
			if err := store.NewKey().WriteFile(file); !errors.Is(err, os.ErrExist) {
				t.Errorf("a key file was overwritten: %v", err)
			}
		})
	}
}
