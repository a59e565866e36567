package store

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

// Content comes back as it was, whole blocks or not, and whether the file system knows direct
// writes (most of /var/tmp) or not (tmpfs of old, for which ordinary memory stands here).
func TestDirect(t *testing.T) {
	for _, dir := range []string{t.TempDir(), "/var/tmp", "/dev/shm"} {
		for _, n := range []int{1, directAlign - 1, directAlign, directAlign + 1, 3<<20 + 5} {
			room := directRoom(n)
			if len(room) != 0 || cap(room) < n || cap(room)%directAlign != 0 {
				t.Fatalf("room for %d bytes has %d of %d", n, len(room), cap(room))
			}
			content := bytes.Repeat([]byte("violin"), n/6+1)[:n]
			for direct, data := range map[bool][]byte{true: append(room, content...), false: append(make([]byte, 1), content...)[1:]} {
				if isDirect(data) != direct {
					t.Errorf("%d bytes: direct %v, want %v", n, isDirect(data), direct)
				}
				f, err := os.CreateTemp(dir, "violin-test-")
				if err != nil {
					t.Skip(err)
				}
				err = writeWhole(f, data)
				got, rerr := os.ReadFile(f.Name())
				f.Close()
				os.Remove(f.Name())
				if err != nil || rerr != nil || !bytes.Equal(got, content) {
					t.Errorf("%s, %d bytes, direct %v: %d bytes came back, %v, %v", dir, n, direct, len(got), err, rerr)
				}
			}
		}
	}
}

// A session's packs are written directly.
func TestPackRoom(t *testing.T) {
	s := openTest(t, filepath.Join(t.TempDir(), "store"), Options{PackSize: 1 << 20})
	se := begin(t, s)
	w, err := se.NewPageWriter(t.Context(), []Region{{"pc.ram", 1200 * PageSize}})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 1200 {
		if err := w.Page(0, uint64(i)*PageSize, testPage(i+1)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.Close(); err != nil {
		t.Fatal(err)
	}
	commit(t, se)
	packs := 0
	for _, p := range se.pages.takeWritten() {
		packs++
		if p.size > 1<<20 {
			t.Errorf("pack %d has %d bytes", packs, p.size)
		}
	}
	if packs < 3 {
		t.Errorf("%d packs", packs)
	}
	for range cap(se.pages.bufs) {
		if buf, ok := s.rooms.Get().(*[]byte); ok && !isDirect((*buf)[:1]) {
			t.Errorf("a pack had a room of %d bytes that is not direct: it was moved", cap(*buf))
		}
	}
}
