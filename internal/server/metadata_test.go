package server

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"violin/internal/catalog"
	"violin/internal/events"
	"violin/internal/store"
	"violin/internal/trust"
)

func snapshotsOf(t *testing.T, s *Server) (names []string) {
	t.Helper()
	all, err := s.catalog.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	for _, snap := range all {
		names = append(names, snap.ID+" "+strings.Join(snap.Tags, ","))
	}
	return names
}

// What an earlier version has left, with all documents beside the pages, is taken in.
func TestUpgrade(t *testing.T) {
	state := t.TempDir()
	key := store.NewKey()
	if err := key.WriteFile(filepath.Join(state, "store.key")); err != nil {
		t.Fatal(err)
	}
	old, err := store.Open(t.Context(), filepath.Join(state, "store"), store.Options{Key: key, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	// As that version wrote them: by a store alone.
	before := &Server{store: old, catalog: catalog.New(old)}
	first := keep(t, before, "1", "sealed", noon, 1)
	keep(t, before, "2", "", noon.Add(time.Minute), 2)
	if err := before.catalog.SetTag(t.Context(), "pair", first.ID, "later", false); err != nil {
		t.Fatal(err)
	}
	if err := before.catalog.PutRecord(t.Context(), &catalog.Record{Slice: "pair", Owner: "alice"}); err != nil {
		t.Fatal(err)
	}
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	authority, err := trust.OpenAuthority(trust.Directory(filepath.Join(state, "ca")))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(state, "ca", "users"), 0o700); err != nil {
		t.Fatal(err)
	}
	for file, text := range map[string]string{
		"ca/users/bob":   `{"role":"operator","certificates":[{"serial":"1"}]}`,
		"events.jsonl.1": "{\"number\":7,\"slice\":\"pair\"}\n",
		"events.jsonl":   "{\"number\":8,\"slice\":\"pair\"}\n",
	} {
		if err := os.WriteFile(filepath.Join(state, filepath.FromSlash(file)), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want := []string{"1 later,sealed", "2 "}
	for range 2 {
		s, err := New(t.Context(), Config{StateDir: state, Logger: slog.New(slog.DiscardHandler), Listen: "127.0.0.1:0"})
		if err != nil {
			t.Fatal(err)
		}
		if got := snapshotsOf(t, s); !slices.Equal(got, want) {
			t.Errorf("%q, want %q", got, want)
		}
		users, err := s.authority.Users()
		if err != nil || len(users) != 1 || users[0].Name != "bob" || !bytes.Equal(s.authority.Certificate(), authority.Certificate()) {
			t.Errorf("another authority, of %v, %v", users, err)
		}
		if found, _ := s.events.After(0, ""); len(found) != 2 || found[1].Number != 8 {
			t.Errorf("events %v", found)
		}
		if r := s.records["pair"]; r == nil || r.Owner != "alice" {
			t.Errorf("record %+v", r)
		}
		if _, err := s.store.GC(t.Context(), s.catalog.Roots(t.Context())); err != nil {
			t.Error(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// An etcd that was lost, or is an older one again, costs no snapshot; what was forgotten
// stays so.
func TestEtcdIsLost(t *testing.T) {
	state := t.TempDir()
	s := newServer(t, state, Storage{})
	var old string
	for i, id := range []string{"1", "2", "3"} {
		keep(t, s, id, "tag"+id, noon.Add(time.Duration(i)*time.Minute), i)
		if id == "2" {
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			old = filepath.Join(t.TempDir(), "etcd")
			if err := os.CopyFS(old, os.DirFS(filepath.Join(state, "etcd"))); err != nil {
				t.Fatal(err)
			}
			s = newServer(t, state, Storage{})
		}
	}
	if err := s.catalog.Delete(t.Context(), "pair", "2"); err != nil {
		t.Fatal(err)
	}
	if err := s.store.Copied(t.Context()); err != nil {
		t.Fatal(err)
	}
	term := s.led.Term()
	for what, put := range map[string]func(dir string) error{
		"lost":  func(string) error { return nil },
		"older": func(dir string) error { return os.CopyFS(dir, os.DirFS(old)) },
	} {
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		dir := filepath.Join(state, "etcd")
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		if err := put(dir); err != nil {
			t.Fatal(err)
		}
		s = newServer(t, state, Storage{})
		want := []string{"1 tag1", "3 tag3"}
		if what == "older" {
			want = []string{"1 tag1", "2 tag2", "3 tag3"} // as that one knows
		}
		if s.led.Term() <= term {
			t.Errorf("%s: term %d after %d", what, s.led.Term(), term)
		}
		term = s.led.Term()
		if got := snapshotsOf(t, s); !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
		if err := s.catalog.Delete(t.Context(), "pair", "2"); err != nil {
			t.Fatal(err)
		}
	}
}

// One store's servers do not meet another's documents in the same state directory.
func TestTwoStores(t *testing.T) {
	state := t.TempDir()
	for i, url := range []string{"", t.TempDir(), ""} {
		s := newServer(t, state, Storage{URL: url})
		if got := snapshotsOf(t, s); len(got) != i/2 {
			t.Errorf("store %d: %q", i, got)
		}
		if i < 2 {
			keep(t, s, "1", "", noon, 1)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func event(slice string) events.Event { return events.Event{Slice: slice, Kind: events.Up} }
