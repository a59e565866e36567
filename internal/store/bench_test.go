package store

import (
	"encoding/binary"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// benchPages makes distinct pages of what a guest's memory is mostly made of:
// program text and data, here this test's own. They compress to about 40 %.
type benchPages struct {
	exe []byte
}

func newBenchPages(b *testing.B) *benchPages {
	name, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	exe, err := os.ReadFile(name)
	if err != nil {
		b.Fatal(err)
	}
	return &benchPages{exe[:len(exe)/2]} // behind are compressed symbols
}

func (b *benchPages) page(n int, seed uint64, buf []byte) {
	at := n * PageSize % (len(b.exe) - PageSize)
	copy(buf, b.exe[at:at+PageSize])
	binary.LittleEndian.PutUint64(buf, uint64(n))
	binary.LittleEndian.PutUint64(buf[2048:], seed)
}

// cpuTime returns the processor time that this process took: on a machine that
// does other work, too, it says more than the clock on the wall.
func cpuTime(b *testing.B) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// reportCPU reports the processor time for each of n pages an iteration.
func reportCPU(b *testing.B, since time.Duration, n int) {
	b.ReportMetric(float64(cpuTime(b)-since)/float64(b.N)/float64(n), "cpu-ns/page")
}

const benchMemory = 256 << 20

// capture streams a guest's memory with this many non-zero pages.
func benchCapture(b *testing.B, se *Session, pages *benchPages, n int, seed uint64) BlobRef {
	w, err := se.NewPageWriter(b.Context(), []Region{{"pc.ram", benchMemory}})
	if err != nil {
		b.Fatal(err)
	}
	var page [PageSize]byte
	for i := range n {
		pages.page(i, seed, page[:])
		if err := w.Page(0, uint64(i)*PageSize, page[:]); err != nil {
			b.Fatal(err)
		}
	}
	for i := n; i < benchMemory/PageSize; i++ {
		if err := w.Zero(0, uint64(i)*PageSize); err != nil {
			b.Fatal(err)
		}
	}
	ref, err := w.Close()
	if err != nil {
		b.Fatal(err)
	}
	return ref
}

// BenchmarkIngest measures the store alone, in a directory, syncs included.
func BenchmarkIngest(b *testing.B) {
	const n = 32768 // 128 MiB
	pages := newBenchPages(b)
	for _, mode := range []struct {
		name string
		opts Options
	}{{"unique", Options{}}, {"unique-encrypted", Options{Key: NewKey()}}, {"unique-small", Options{Compression: CompressSmall}}} {
		b.Run(mode.name, func(b *testing.B) {
			s := openTest(b, b.TempDir(), mode.opts)
			b.SetBytes(n * PageSize)
			var st SessionStats
			cpu := cpuTime(b)
			for seed := uint64(1); b.Loop(); seed++ {
				se := begin(b, s)
				benchCapture(b, se, pages, n, seed)
				commit(b, se)
				st = se.Stats()
			}
			reportCPU(b, cpu, n)
			b.ReportMetric(float64(st.StoredBytes)/float64(n*PageSize), "stored/raw")
		})
	}
	b.Run("known", func(b *testing.B) {
		s := openTest(b, b.TempDir(), Options{})
		se := begin(b, s)
		benchCapture(b, se, pages, n, 0)
		commit(b, se)
		b.SetBytes(n * PageSize)
		cpu := cpuTime(b)
		for b.Loop() {
			se := begin(b, s)
			benchCapture(b, se, pages, n, 0)
			commit(b, se)
		}
		reportCPU(b, cpu, n)
	})
	b.Run("zero", func(b *testing.B) {
		s := openTest(b, b.TempDir(), Options{})
		b.SetBytes(benchMemory)
		for b.Loop() {
			se := begin(b, s)
			benchCapture(b, se, pages, 0, 0)
			commit(b, se)
		}
	})
}

// BenchmarkRestore reads a 256 MiB guest with 100 MiB of non-zero pages as a
// migration encoder does. Its throughput counts the non-zero bytes.
func BenchmarkRestore(b *testing.B) {
	const n = 25600
	pages := newBenchPages(b)
	for _, mode := range []struct {
		name string
		opts Options
	}{{"plain", Options{}}, {"encrypted", Options{Key: NewKey()}}} {
		b.Run(mode.name, func(b *testing.B) {
			s := openTest(b, b.TempDir(), mode.opts)
			se := begin(b, s)
			table := benchCapture(b, se, pages, n, 0)
			commit(b, se)
			b.SetBytes(n * PageSize)
			cpu := cpuTime(b)
			for b.Loop() {
				s.cache = newWindowCache(s.opts.CacheSize)
				r, err := s.OpenMemory(b.Context(), table)
				if err != nil {
					b.Fatal(err)
				}
				buf := make([]byte, PageSize)
				for off := uint64(0); off < benchMemory; off += PageSize {
					if _, err := r.Page(0, off, buf); err != nil {
						b.Fatal(err)
					}
				}
				_ = r.Close()
			}
			reportCPU(b, cpu, n)
		})
	}
}

func BenchmarkSum(b *testing.B) {
	var buf [PageSize]byte
	b.SetBytes(PageSize)
	for b.Loop() {
		Sum(buf[:])
	}
}

// BenchmarkIndex reports the bytes of memory that a page costs.
func BenchmarkIndex(b *testing.B) {
	const n = 1 << 20
	r := rand.NewChaCha8([32]byte{1})
	hashes := make([]Hash, n)
	for i := range hashes {
		_, _ = r.Read(hashes[i][:])
	}
	var x *index
	for b.Loop() {
		x = new(index)
		for i, h := range hashes {
			x.add(h, makeLocation(1, uint32(i), 1))
		}
	}
	_, bytes := x.size()
	b.ReportMetric(float64(bytes)/n, "bytes/page")
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/page")
}
