package events

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func open(t *testing.T, path string) *Log {
	t.Helper()
	l, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
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
	path := filepath.Join(t.TempDir(), "events")
	l := open(t, path)
	at := time.Date(2026, 8, 7, 10, 0, 0, 0, time.UTC)
	_, more := l.After(0, "")
	for _, s := range []string{"a 1", "b 2", "a 3"} {
		slice, text, _ := strings.Cut(s, " ")
		if _, err := l.Append(Event{At: at, Slice: slice, Kind: Up, Text: text}); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case <-more:
	default:
		t.Error("who waits was not woken")
	}
	// A process that is killed leaves half a line.
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(`{"number":4,"sl`); err != nil {
		t.Fatal(err)
	}
	f.Close()
	l = open(t, path)
	if e, err := l.Append(Event{At: at, Slice: "a", Kind: Down, Text: "4"}); err != nil || e.Number != 4 {
		t.Errorf("the next: %+v, %v", e, err)
	}
	l = open(t, path)
	for _, c := range []struct {
		after uint64
		slice string
		want  string
	}{{0, "", "1 2 3 4"}, {0, "a", "1 3 4"}, {3, "a", "4"}, {4, "", ""}} {
		if got, _ := l.After(c.after, c.slice); texts(got) != c.want {
			t.Errorf("after %d, %q: %q, want %q", c.after, c.slice, texts(got), c.want)
		}
	}
}

// The log does not grow beyond bounds, and numbers go on.
func TestLogIsBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events")
	l := open(t, path)
	text := strings.Repeat("x", 64<<10)
	const written = 3 * limit / (64 << 10)
	for range written {
		if _, err := l.Append(Event{Slice: "a", Kind: Checkpoint, Text: text}); err != nil {
			t.Fatal(err)
		}
	}
	var size int64
	for _, p := range []string{path, path + ".1"} {
		info, err := os.Stat(p)
		if err != nil {
			t.Fatal(err)
		}
		size += info.Size()
	}
	if size > 2*limit {
		t.Errorf("%d bytes", size)
	}
	inMemory, _ := l.After(0, "")
	onDisk, _ := open(t, path).After(0, "")
	if len(inMemory) != len(onDisk) || len(onDisk) == 0 || onDisk[len(onDisk)-1].Number != written || inMemory[0].Number != onDisk[0].Number {
		t.Errorf("%d events in memory, %d on the disk", len(inMemory), len(onDisk))
	}
}
