package record

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestRecord(t *testing.T) {
	path := filepath.Join(t.TempDir(), "r.json")
	var got struct{ Text string }
	if err := Read(path, &got); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	for n := range 5 { // longer and shorter ones
		want := strings.Repeat("x", 100*(5-n))
		if err := Write(path, struct{ Text string }{want}); err != nil {
			t.Fatal(err)
		}
		if err := Read(path, &got); err != nil || got.Text != want {
			t.Errorf("%d: %q, %v", n, got.Text, err)
		}
	}
}

// A writer that dies at any byte leaves what was there before, or what it wrote.
func TestTorn(t *testing.T) {
	path := filepath.Join(t.TempDir(), "r.json")
	var got struct{ N int }
	for n := 1; n <= 4; n++ {
		before := map[string][]byte{}
		for _, p := range slots(path) {
			before[p], _ = os.ReadFile(p)
		}
		if err := Write(path, struct{ N int }{n}); err != nil {
			t.Fatal(err)
		}
		for _, p := range slots(path) {
			after, err := os.ReadFile(p)
			if err != nil || string(after) == string(before[p]) {
				continue
			}
			for at := range after {
				torn := append(append([]byte{}, after[:at]...), before[p][min(at, len(before[p])):]...)
				if err := os.WriteFile(p, torn, 0o600); err != nil {
					t.Fatal(err)
				}
				err := Read(path, &got)
				if n == 1 && errors.Is(err, fs.ErrNotExist) {
					continue
				}
				if err != nil || got.N != n && got.N != n-1 {
					t.Fatalf("write %d, torn at byte %d: %d, %v", n, at, got.N, err)
				}
			}
			// The next writer overwrites it.
			if err := os.WriteFile(p, after[:len(after)-1], 0o600); err != nil {
				t.Fatal(err)
			}
			if err := Write(path, struct{ N int }{n}); err != nil {
				t.Fatal(err)
			}
			if err := Read(path, &got); err != nil || got.N != n {
				t.Fatalf("after a torn write: %d, %v", got.N, err)
			}
		}
	}
}

func TestRefuses(t *testing.T) {
	path := filepath.Join(t.TempDir(), "r.json")
	if err := Write(path, 1); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(strings.Replace(string(b), " 1 ", " 2 ", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	var v int
	if err := Read(path, &v); !errors.Is(err, errFormat) || !strings.Contains(err.Error(), path) {
		t.Error(err)
	}
	if err := Write(path, 2); !errors.Is(err, errFormat) {
		t.Errorf("it is overwritten: %v", err)
	}
	if err := Write(filepath.Join(t.TempDir(), "r"), func() {}); err == nil {
		t.Error("a function is written down")
	}
}

// BenchmarkWrite writes what a switch of ten nodes has, which a change of its tables waits for.
func BenchmarkWrite(b *testing.B) {
	type color struct {
		Slice, Node       string
		Epoch             uint8
		Closed, Recording bool
	}
	colors := make([]color, 10)
	for i := range colors {
		colors[i] = color{Slice: "slice", Node: "node-10", Epoch: 7, Closed: true}
	}
	path := filepath.Join(b.TempDir(), "colors.json")
	for b.Loop() {
		if err := Write(path, colors); err != nil {
			b.Fatal(err)
		}
	}
}
