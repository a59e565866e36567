package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
)

// file is a file in memory, with holes of clusters.
type file map[int64]*[clusterSize]byte

func (f file) WriteAt(p []byte, off int64) (int, error) {
	for i := 0; i < len(p); {
		at := off + int64(i)
		c := f[at/clusterSize]
		if c == nil {
			c = new([clusterSize]byte)
			f[at/clusterSize] = c
		}
		i += copy(c[at%clusterSize:], p[i:])
	}
	return len(p), nil
}

func (f file) ReadAt(p []byte, off int64) (int, error) {
	end := int64(0)
	for n := range f {
		end = max(end, (n+1)*clusterSize)
	}
	for i := 0; i < len(p); {
		at := off + int64(i)
		if at >= end {
			return i, io.EOF
		}
		c := f[at/clusterSize]
		if c == nil {
			c = new([clusterSize]byte)
		}
		i += copy(p[i:], c[at%clusterSize:])
	}
	return len(p), nil
}

// some is a disk's content: pages by offset, nil for zeros.
func some(rnd *rand.Rand, size uint64, n int) map[uint64][]byte {
	content := map[uint64][]byte{}
	for range n {
		off := rnd.Uint64N((size+PageSize-1)/PageSize) * PageSize
		if rnd.IntN(4) == 0 {
			content[off] = nil
			continue
		}
		page := make([]byte, PageSize)
		for i := range min(PageSize, size-off) {
			page[i] = byte(rnd.Uint32())
		}
		content[off] = page
	}
	return content
}

func write(t *testing.T, f io.WriterAt, size uint64, content map[uint64][]byte) {
	t.Helper()
	w, err := NewWriter(f, size)
	if err != nil {
		t.Fatal(err)
	}
	for off, data := range content { // in no order
		if err := w.Page(off, data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, f io.ReaderAt) map[uint64][]byte {
	t.Helper()
	im, err := Open(f)
	if err != nil {
		t.Fatal(err)
	}
	content := map[uint64][]byte{}
	last := int64(-1)
	if err := im.Pages(func(off uint64, data []byte) error {
		if int64(off) <= last {
			t.Fatalf("page %#x comes after %#x", off, last)
		}
		last = int64(off)
		content[off] = bytes.Clone(data)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return content
}

func same(a, b map[uint64][]byte) bool {
	return maps.EqualFunc(a, b, func(x, y []byte) bool { return (x == nil) == (y == nil) && bytes.Equal(x, y) })
}

func TestRoundTrip(t *testing.T) {
	for seed, size := range []uint64{PageSize, 512, 3 * 512, clusterSize, 10<<20 + 512, 3<<30 + PageSize, maxSize} {
		rnd := rand.New(rand.NewPCG(uint64(seed), 7))
		for _, n := range []int{0, 1, 300} {
			content := some(rnd, size, n)
			f := file{}
			write(t, f, size, content)
			if got := read(t, f); !same(got, content) {
				t.Errorf("a disk of %d bytes: %d pages came back, other than the %d written", size, len(got), len(content))
			}
		}
	}
}

// QEMU's own tools find nothing wrong with a layer, and in it what was written; and
// what they write is read.
func TestQEMU(t *testing.T) {
	if os.Getenv("VIOLIN_E2E") != "1" {
		t.Skip("runs qemu-img and qemu-io: set VIOLIN_E2E=1")
	}
	run := func(name string, args ...string) {
		t.Helper()
		if out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s %q: %v\n%s", name, args, err, out)
		}
	}
	for seed, size := range []uint64{512, 10<<20 + 512, 3 << 30} {
		rnd := rand.New(rand.NewPCG(uint64(seed), 8))
		path := filepath.Join(t.TempDir(), "layer")
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		content := some(rnd, size, 500)
		write(t, f, size, content)
		run("qemu-img", "check", "-f", "qcow2", path)

		raw := path + ".raw"
		run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
		g, err := os.Open(raw)
		if err != nil {
			t.Fatal(err)
		}
		if info, err := g.Stat(); err != nil || uint64(info.Size()) != size {
			t.Fatalf("the disk has %d bytes (%v), want %d", info.Size(), err, size)
		}
		for _, off := range slices.Sorted(maps.Keys(content)) {
			want := content[off]
			if want == nil {
				want = make([]byte, PageSize)
			}
			page := make([]byte, min(PageSize, size-off))
			if _, err := g.ReadAt(page, int64(off)); err != nil || !bytes.Equal(page, want[:len(page)]) {
				t.Fatalf("page %#x is other than what was written (%v)", off, err)
			}
		}
		g.Close()

		var cmds []string
		for range min(200, size/512) {
			off := rnd.Uint64N((size+PageSize-1)/PageSize) * PageSize
			n := min(PageSize, size-off)
			switch rnd.IntN(3) {
			case 0:
				content[off] = nil
				cmds = append(cmds, "-c", "write -z "+strconv.FormatUint(off, 10)+" "+strconv.FormatUint(n, 10))
			default:
				page := make([]byte, PageSize)
				pattern := byte(1 + rnd.IntN(255))
				for i := range n {
					page[i] = pattern
				}
				content[off] = page
				cmds = append(cmds, "-c", "write -P "+strconv.Itoa(int(pattern))+" "+strconv.FormatUint(off, 10)+" "+strconv.FormatUint(n, 10))
			}
		}
		run("qemu-io", append([]string{"-f", "qcow2", path}, cmds...)...)
		if got := read(t, f); !same(got, content) {
			t.Errorf("a disk of %d bytes: what QEMU wrote does not come back", size)
		}
		f.Close()
	}
}

func TestRefusals(t *testing.T) {
	if _, err := Open(bytes.NewReader([]byte("no image"))); !errors.Is(err, ErrFormat) {
		t.Errorf("error %v, want ErrFormat", err)
	}
	for _, size := range []uint64{0, 513, maxSize + 512} {
		if _, err := NewWriter(file{}, size); err == nil {
			t.Errorf("a layer of %d bytes is begun", size)
		}
	}
	w, err := NewWriter(file{}, 2*PageSize)
	if err != nil {
		t.Fatal(err)
	}
	for _, off := range []uint64{1, 2 * PageSize} {
		if err := w.Page(off, nil); err == nil {
			t.Errorf("a page at %#x is taken", off)
		}
	}
	if err := w.Page(0, make([]byte, 5)); err == nil {
		t.Error("a page of 5 bytes is taken")
	}
}

// A damaged layer is an error or some content, and never more than fits on the disk.
func FuzzOpen(f *testing.F) {
	var seed bytes.Buffer
	img := file{}
	w, err := NewWriter(img, 1<<20)
	if err != nil {
		f.Fatal(err)
	}
	for off := range uint64(8) {
		if err := w.Page(off*5*PageSize, bytes.Repeat([]byte{byte(off + 1)}, PageSize)); err != nil {
			f.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		f.Fatal(err)
	}
	for i := range int64(len(img)) {
		seed.Write(img[i][:])
	}
	f.Add(uint32(0), uint64(0))
	f.Add(uint32(24), uint64(1)<<43)
	f.Fuzz(func(t *testing.T, at uint32, value uint64) {
		b := bytes.Clone(seed.Bytes())
		at %= uint32(len(b) - 8)
		binary.BigEndian.PutUint64(b[at:], value)
		im, err := Open(bytes.NewReader(b))
		if err != nil {
			if im != nil {
				t.Fatal("an error and an image")
			}
			return
		}
		last := int64(-1)
		_ = im.Pages(func(off uint64, data []byte) error {
			if off >= im.Size || int64(off) <= last || data != nil && len(data) != PageSize {
				t.Fatalf("%d bytes at %#x of a disk of %d bytes", len(data), off, im.Size)
			}
			last = int64(off)
			return nil
		})
	})
}
