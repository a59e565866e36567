package bench

import (
	"os"
	"testing"
)

// What is measured is what it says: new pages are stored, known ones and zeros
// are not, and of a changed memory only the change is.
func TestStoreMeasuresWhatItSays(t *testing.T) {
	for _, plain := range []bool{false, true} {
		dir := t.TempDir()
		got := map[string]Figure{}
		if err := Store(t.Context(), StoreConfig{Dir: dir, Memory: 8 << 20, Changed: 5, Plain: plain}, func(f Figure) { got[f.What] = f }); err != nil {
			t.Fatal(err)
		}
		unique, changed := got["unique pages"].StoredBytes, got["5 % changed"].StoredBytes
		if unique < 1<<20 || unique > 8<<20 || got["known pages"].StoredBytes != 0 || got["zero pages"].StoredBytes > 4096 ||
			changed == 0 || changed > unique/4 || len(got) != 5 {
			t.Errorf("plain %v: %+v", plain, got)
		}
		for what, f := range got {
			if f.Bytes != 8<<20 || f.Wall <= 0 {
				t.Errorf("%s: %+v", what, f)
			}
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("left %v, %v", left, err)
		}
	}
}

// Medians are of the runs, and a ratio is that of runs next to each other: what the machine
// did in both cancels out.
func TestCompared(t *testing.T) {
	got := compared("snapshot", 1<<20, []Run{{3, 1}, {40, 2}, {5, 3}}, []Run{{2, 1}, {20, 1}, {4, 9}})
	want := Comparison{What: "snapshot", Memory: 1 << 20, Ours: Run{5, 2}, QEMU: Run{4, 1}, Ratio: 1.5}
	if got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	if got := compared("lazy restore", 1<<20, []Run{{3, 1}}, nil); got.Ratio != 0 || got.Ours.Wall != 3 {
		t.Errorf("nothing to compare with: %+v", got)
	}
}

// A node on a real QEMU is measured in all ways, and nothing of it is left.
func TestAgainstQEMU(t *testing.T) {
	if os.Getenv("VIOLIN_E2E") != "1" {
		t.Skip("runs real QEMUs: set VIOLIN_E2E=1")
	}
	dir := t.TempDir()
	var got []Comparison
	if err := AgainstQEMU(t.Context(), QEMUConfig{Dir: dir, Memory: []uint64{64 << 20}, Lazy: []uint64{128 << 20}, Runs: 1}, func(c Comparison) { got = append(got, c) }); err != nil {
		t.Fatal(err)
	}
	if len(got) != 4 {
		t.Fatalf("%d comparisons, want 4: %+v", len(got), got)
	}
	for _, c := range got {
		if c.Ours.Wall <= 0 || (c.What != "lazy restore") != (c.Ratio > 0) {
			t.Errorf("%+v", c)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left %v, %v", left, err)
	}
}
