package events

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// shelf has segments in memory.
type shelf struct {
	mu    sync.Mutex
	files map[string]string
	fail  error
}

func newShelf() *shelf { return &shelf{files: map[string]string{"other": "x"}} }

func (s *shelf) Names() ([]string, error) { return slices.Sorted(maps.Keys(s.files)), nil }
func (s *shelf) Read(name string) ([]byte, error) {
	text, ok := s.files[name]
	if !ok {
		return nil, fs.ErrNotExist
	}
	return []byte(text), nil
}

func (s *shelf) Write(name string, data []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail == nil {
		s.files[name] = string(data)
	}
	return s.fail
}

func (s *shelf) Remove(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.files, name)
	return nil
}

func open(t *testing.T, s *shelf) *Log {
	t.Helper()
	l, err := Open(s)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func texts(events []Event) string {
	var out []string
	for _, e := range events {
		out = append(out, e.Text)
	}
	return strings.Join(out, " ")
}

func TestLog(t *testing.T) {
	s := newShelf()
	l := open(t, s)
	at := time.Date(2026, 8, 7, 10, 0, 0, 0, time.UTC)
	_, more := l.After(0, "")
	for _, text := range []string{"a 1", "b 2", "a 3"} {
		slice, text, _ := strings.Cut(text, " ")
		if _, err := l.Append(Event{At: at, Slice: slice, Kind: Up, Text: text}); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case <-more:
	default:
		t.Error("who waits was not woken")
	}
	// What cannot be read costs itself only.
	s.files["0000000000000000"] += `{"number":4,"sl` + "\n"
	l = open(t, s)
	if e, err := l.Append(Event{At: at, Slice: "a", Kind: Down, Text: "4"}); err != nil || e.Number != 4 {
		t.Errorf("the next: %+v, %v", e, err)
	}
	l = open(t, s)
	for _, c := range []struct {
		after uint64
		slice string
		want  string
	}{{0, "", "1 2 3 4"}, {0, "a", "1 3 4"}, {3, "a", "4"}, {4, "", ""}} {
		if got, _ := l.After(c.after, c.slice); texts(got) != c.want {
			t.Errorf("after %d, %q: %q, want %q", c.after, c.slice, texts(got), c.want)
		}
	}
	// One that is not written is told of, all the same, and written with the next.
	s.fail = errors.New("full")
	if e, err := l.Append(Event{At: at, Slice: "a", Text: "5"}); !errors.Is(err, s.fail) || e.Number != 5 {
		t.Errorf("%+v, %v", e, err)
	}
	s.fail = nil
	if _, err := l.Append(Event{At: at, Slice: "a", Text: "6"}); err != nil {
		t.Fatal(err)
	}
	if got, _ := open(t, s).After(3, ""); texts(got) != "4 5 6" {
		t.Errorf("%q", texts(got))
	}
}

// The log does not grow beyond bounds, and numbers go on.
func TestLogIsBounded(t *testing.T) {
	s := newShelf()
	var old []Event
	for i := range kept + 1000 {
		old = append(old, Event{Number: uint64(i + 1), Slice: "a", Kind: Checkpoint})
	}
	l := open(t, s)
	if err := l.Begin(old); err != nil {
		t.Fatal(err)
	}
	if err := l.Begin(old[:1]); err != nil {
		t.Fatal(err) // it has some: nothing is changed
	}
	for range 1000 {
		if _, err := l.Append(Event{Slice: "a", Kind: Checkpoint}); err != nil {
			t.Fatal(err)
		}
	}
	const written = kept + 2000
	if n := len(s.files) - 1; n > kept/segment+3 {
		t.Errorf("%d segments", n)
	}
	inMemory, _ := l.After(0, "")
	kept2, _ := open(t, s).After(0, "")
	if !reflect.DeepEqual(inMemory, kept2) || len(kept2) < kept || kept2[len(kept2)-1].Number != written {
		t.Errorf("%d events in memory, %d in the segments, the last %d", len(inMemory), len(kept2), kept2[len(kept2)-1].Number)
	}
	for i, e := range kept2 {
		if e.Number != kept2[0].Number+uint64(i) {
			t.Fatalf("number %d after %d others from %d on", e.Number, i, kept2[0].Number)
		}
	}
}

// As earlier versions wrote it: in two files, the last line cut short.
func TestReadFiles(t *testing.T) {
	dir := t.TempDir()
	var paths []string
	for i, text := range []string{"{\"number\":1,\"text\":\"1\"}\n", "{\"number\":2,\"text\":\"2\"}\n{\"number\":3,\"te"} {
		paths = append(paths, filepath.Join(dir, fmt.Sprint(i)))
		if err := os.WriteFile(paths[i], []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got, err := ReadFiles(append(paths, filepath.Join(dir, "none"))...)
	if err != nil || texts(got) != "1 2" {
		t.Errorf("%q, %v", texts(got), err)
	}
}
