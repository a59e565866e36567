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
