// Package storetest says what is expected of whatever keeps a store's documents, as
// tests that each of them passes.
package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"violin/internal/store"
)

// Documents tests one. make makes one with nothing in it.
func Documents(t *testing.T, make func(*testing.T) store.Documents) {
	t.Run("Create", func(t *testing.T) { create(t, make(t)) })
	t.Run("Replace", func(t *testing.T) { replace(t, make(t)) })
	t.Run("List", func(t *testing.T) { list(t, make(t)) })
	t.Run("Delete", func(t *testing.T) { remove(t, make(t)) })
	t.Run("Large", func(t *testing.T) { large(t, make(t)) })
	t.Run("OneWins", func(t *testing.T) { oneWins(t, make(t)) })
	t.Run("WholeWhileReplaced", func(t *testing.T) { whole(t, make(t)) })
	t.Run("Cancelled", func(t *testing.T) { cancelled(t, make(t)) })
}

func has(t *testing.T, d store.Documents, name string, want []byte) {
	t.Helper()
	got, err := d.Get(t.Context(), name)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s: %d bytes, %v; want %d", name, len(got), err, len(want))
	}
}

func create(t *testing.T, d store.Documents) {
	if got, err := d.Get(t.Context(), "a/b"); !errors.Is(err, store.ErrMissing) || got != nil {
		t.Errorf("before: %q, %v", got, err)
	}
	for name, data := range map[string][]byte{"a/b": []byte("one"), "a/c": {}, "a/d": {0}, "a/e": {1, '{'}} {
		if err := d.Create(t.Context(), name, data); err != nil {
			t.Fatal(err)
		}
		has(t, d, name, data)
	}
	if err := d.Create(t.Context(), "a/b", []byte("two")); !errors.Is(err, store.ErrExists) {
		t.Errorf("a name that is taken: %v", err)
	}
	has(t, d, "a/b", []byte("one"))
}

func replace(t *testing.T, d store.Documents) {
	for _, text := range []string{"one", "two", ""} {
		if err := d.Replace(t.Context(), "a/b", []byte(text)); err != nil {
			t.Fatal(err)
		}
		has(t, d, "a/b", []byte(text))
	}
	if err := d.Create(t.Context(), "a/b", nil); !errors.Is(err, store.ErrExists) {
		t.Errorf("a name that is taken: %v", err)
	}
}

func names(t *testing.T, d store.Documents, dir string) (all []string) {
	t.Helper()
	for name, err := range d.List(t.Context(), dir) {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, name)
	}
	return all
}

func list(t *testing.T, d store.Documents) {
	var want []string
	for _, name := range []string{"a/2", "a/1/z", "a/1/b", "ab/1", "b/a/1", "a/10"} {
		if err := d.Create(t.Context(), name, []byte(name)); err != nil {
			t.Fatal(err)
		}
		if name[:2] == "a/" {
			want = append(want, name)
		}
	}
	slices.Sort(want)
	if got := names(t, d, "a"); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if got := names(t, d, "a/1"); !slices.Equal(got, []string{"a/1/b", "a/1/z"}) {
		t.Errorf("below: %q", got)
	}
	if got := names(t, d, "none"); got != nil {
		t.Errorf("where there are none: %q", got)
	}
	for range d.List(t.Context(), "a") {
		break // who has seen enough
	}
	// What is deleted while it is listed is no reason to stop.
	n := 0
	for name, err := range d.List(t.Context(), "a") {
		if err == nil {
			err = d.Delete(t.Context(), name)
		}
		if err != nil {
			t.Fatal(err)
		}
		n++
	}
	if n != len(want) || names(t, d, "a") != nil {
		t.Errorf("%d deleted, and %q are left", n, names(t, d, "a"))
	}
}

func remove(t *testing.T, d store.Documents) {
	for range 2 {
		if err := d.Create(t.Context(), "a/b", []byte("one")); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := d.Delete(t.Context(), "a/b"); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := d.Get(t.Context(), "a/b"); !errors.Is(err, store.ErrMissing) {
			t.Errorf("after it was deleted: %v", err)
		}
	}
}

func large(t *testing.T, d store.Documents) {
	data := bytes.Repeat([]byte("0123456789abcde\n"), 5<<20/16)
	for i, n := range []int{len(data), 1 << 20, 1<<20 + 1, 12, len(data) - 1} {
		if err := d.Replace(t.Context(), "a/b", data[:n]); err != nil {
			t.Fatal(err)
		}
		has(t, d, "a/b", data[:n])
		if err := d.Create(t.Context(), "a/b", data); !errors.Is(err, store.ErrExists) {
			t.Errorf("%d: a name that is taken: %v", i, err)
		}
		has(t, d, "a/b", data[:n])
	}
	if got := names(t, d, "a"); !slices.Equal(got, []string{"a/b"}) {
		t.Errorf("%q", got)
	}
	if err := d.Delete(t.Context(), "a/b"); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Get(t.Context(), "a/b"); !errors.Is(err, store.ErrMissing) {
		t.Errorf("after it was deleted: %v", err)
	}
}

// Of many who create a document one succeeds, and its bytes are there.
func oneWins(t *testing.T, d store.Documents) {
	var won atomic.Int32
	var winner atomic.Value
	var g sync.WaitGroup
	for i := range 8 {
		g.Go(func() {
			text := fmt.Appendf(nil, "from %d", i)
			switch err := d.Create(t.Context(), "a/b", text); {
			case err == nil:
				won.Add(1)
				winner.Store(text)
			case !errors.Is(err, store.ErrExists):
				t.Error(err)
			}
		})
	}
	g.Wait()
	if won.Load() != 1 {
		t.Fatalf("%d have created it", won.Load())
	}
	has(t, d, "a/b", winner.Load().([]byte))
}

// Who reads finds one or the other.
func whole(t *testing.T, d store.Documents) {
	texts := [][]byte{bytes.Repeat([]byte("a"), 3<<19), bytes.Repeat([]byte("b"), 100), bytes.Repeat([]byte("c"), 5<<19)}
	if err := d.Replace(t.Context(), "a/b", texts[0]); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	defer func() { <-done }()
	go func() {
		defer close(done)
		for i := range 12 {
			if err := d.Replace(t.Context(), "a/b", texts[i%len(texts)]); err != nil {
				t.Error(err)
			}
		}
	}()
	for reading := true; reading; {
		select {
		case <-done:
			reading = false
		default:
		}
		got, err := d.Get(t.Context(), "a/b")
		if err != nil {
			t.Fatal(err)
		}
		if !slices.ContainsFunc(texts, func(text []byte) bool { return bytes.Equal(got, text) }) {
			t.Fatalf("%d bytes that nobody wrote", len(got))
		}
	}
}

func cancelled(t *testing.T, d store.Documents) {
	if err := d.Create(t.Context(), "a/b", []byte("one")); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := d.Create(ctx, "a/c", []byte("two")); err == nil {
		t.Error("created after all")
	}
	if got, err := d.Get(ctx, "a/b"); err == nil || got != nil {
		t.Errorf("read after all: %q", got)
	}
	has(t, d, "a/b", []byte("one"))
}
