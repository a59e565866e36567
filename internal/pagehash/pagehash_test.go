package pagehash

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/zeebo/blake3"
)

// implementations are all that this processor can run, by name.
func implementations() map[string]func([][Size]byte, []byte) {
	all := map[string]func([][Size]byte, []byte){"Sum": Sum[[Size]byte], "each": each[[Size]byte]}
	for name, f := range processor() {
		all[name] = f
	}
	return all
}

// check compares each implementation with the library, and sees that nothing beside the hashes is written.
func check(t *testing.T, pages []byte) {
	t.Helper()
	n := len(pages) / PageSize
	for name, sum := range implementations() {
		room := make([][Size]byte, n+2)
		sum(room[1:n+1], pages)
		for i := range n {
			if want := blake3.Sum256(pages[i*PageSize:][:PageSize]); room[i+1] != want {
				t.Fatalf("%s: page %d of %d: %x, want %x", name, i, n, room[i+1], want)
			}
		}
		if room[0] != [Size]byte{} || room[n+1] != [Size]byte{} {
			t.Fatalf("%s of %d pages wrote beside its hashes", name, n)
		}
	}
}

// Every number of pages up to some turns, each page another.
func TestSum(t *testing.T) {
	r := rand.NewChaCha8([32]byte{1})
	for n := range 70 {
		pages := make([]byte, n*PageSize)
		_, _ = r.Read(pages)
		check(t, pages)
	}
}

// Every bit of a page counts, in every lane, and no other page's.
func TestSumBits(t *testing.T) {
	const n = 17
	pages := make([]byte, n*PageSize)
	for bit := 0; bit < PageSize*8; bit += 37 { // all words, all places in them
		for page := range n {
			pages[page*PageSize+(bit+page*64)/8%PageSize] ^= 1 << (bit % 8)
		}
		check(t, pages)
	}
}

// What counts up, carries and is all ones.
func TestSumPatterns(t *testing.T) {
	pages := make([]byte, 16*PageSize)
	check(t, pages)
	for i := range pages {
		pages[i] = 0xff
	}
	check(t, pages)
	for i := range pages {
		pages[i] = byte(i % 251) // the pattern of the standard's test vectors
	}
	check(t, pages)
	// Not at the start of anything.
	check(t, pages[1:][:3*PageSize])
}

// Every number of chunks up to some groups of lanes, the last of every kind, and a pack's.
func TestSumLong(t *testing.T) {
	data := make([]byte, 16<<20+1)
	_, _ = rand.NewChaCha8([32]byte{2}).Read(data)
	var lengths []int
	for chunks := range 200 {
		for _, more := range []int{-1, 0, 1, 63, 64, 65} {
			lengths = append(lengths, max(0, chunks*chunkSize+more))
		}
	}
	for _, n := range append(lengths, 16<<20-1, 16<<20, 16<<20+1, 9_999_999) {
		want := blake3.Sum256(data[:n])
		for name, sum := range longs() {
			if got := sum(data[:n]); got != want {
				t.Fatalf("%s of %d bytes: %x, want %x", name, n, got, want)
			}
		}
	}
}

// longs are all that this processor can run, by name.
func longs() map[string]func([]byte) [Size]byte {
	all := processorLong()
	all["SumLong"] = SumLong
	return all
}

func TestSumPanics(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
	}()
	Sum(make([][Size]byte, 2), make([]byte, PageSize))
}

func FuzzSum(f *testing.F) {
	f.Add([]byte("a page"), uint8(3), uint64(1))
	f.Add([]byte{0}, uint8(16), uint64(0))
	f.Add([]byte{0xff, 0, 0xff}, uint8(33), uint64(7))
	f.Fuzz(func(t *testing.T, data []byte, n uint8, seed uint64) {
		pages := make([]byte, int(n%64)*PageSize)
		if len(data) > 0 {
			r := rand.New(rand.NewPCG(seed, 0))
			for at := 0; at < len(pages); at += 1 + r.IntN(len(data)+64) {
				copy(pages[at:], data)
			}
		}
		check(t, pages)
	})
}

func FuzzSumLong(f *testing.F) {
	f.Add([]byte("a pack"), uint32(70_000))
	f.Add([]byte{0xff}, uint32(64<<10+1))
	f.Fuzz(func(t *testing.T, pattern []byte, n uint32) {
		data := make([]byte, n%(1<<20))
		for at := 0; at < len(data) && len(pattern) > 0; {
			at += copy(data[at:], pattern) + at%7
		}
		want := blake3.Sum256(data)
		for name, sum := range longs() {
			if got := sum(data); got != want {
				t.Fatalf("%s of %d bytes: %x, want %x", name, len(data), got, want)
			}
		}
	})
}

func BenchmarkSumLong(b *testing.B) {
	data := make([]byte, 16<<20)
	for name, sum := range map[string]func([]byte) [Size]byte{"SumLong": SumLong, "library": blake3.Sum256} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			for b.Loop() {
				sum(data)
			}
		})
	}
}

func BenchmarkSum(b *testing.B) {
	for name, sum := range implementations() {
		for _, n := range []int{1, 4, 16, 64} {
			b.Run(fmt.Sprintf("%s/%d", name, n), func(b *testing.B) {
				pages := make([]byte, n*PageSize)
				out := make([][Size]byte, n)
				b.SetBytes(int64(len(pages)))
				for b.Loop() {
					sum(out, pages)
				}
			})
		}
	}
}
