package pagehash

import (
	"encoding/binary"

	"golang.org/x/sys/cpu"
)

//go:generate go run gen.go

// Chaining values lie in memory by words: the first of all lanes, then the second, to the eighth.
// Counters are the chunks' numbers in what is hashed, one a lane.

//go:noescape
func chunks16(in *byte, counters, cv *uint32)

//go:noescape
func parents16(children *uint32, flags uint32, cv *uint32)

//go:noescape
func chunks8(in *byte, counters, cv *uint32)

//go:noescape
func parents8(children *uint32, flags uint32, cv *uint32)

// vectors is the fastest that the processor has.
func vectors[H ~[Size]byte](out []H, pages []byte) {
	switch {
	case cpu.X86.HasAVX512F:
		lanes(16, out, pages)
	case cpu.X86.HasAVX2:
		lanes(8, out, pages)
	default:
		each(out, pages)
	}
}

const words = 8 // of a chaining value

// A page's chunks are numbered from 0 to 3.
var pageCounters = [16]uint32{0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3}

// lanes takes turns of n pages: 16, which needs AVX-512F, or 8, which needs AVX2.
func lanes[H ~[Size]byte](n int, out []H, pages []byte) {
	var (
		chunks  [4 * words * 16]uint32
		parents [2 * words * 16]uint32
		roots   [words * 16]uint32
		last    [16 * chunkSize]byte
	)
	cvs := words * n // of all lanes
	for len(out) > 0 {
		now := min(len(out), n)
		for i := 0; i*n*chunkSize < now*PageSize; i++ {
			in := pages[i*n*chunkSize : now*PageSize]
			if len(in) < n*chunkSize {
				copy(last[:], in)
				in = last[:]
			}
			hash(n, in, &pageCounters, chunks[i*cvs:])
		}
		join(n, chunks[:2*cvs], flagParent, parents[:cvs])
		if now > n/2 {
			join(n, chunks[2*cvs:4*cvs], flagParent, parents[cvs:2*cvs])
		}
		join(n, parents[:2*cvs], flagParent|flagRoot, roots[:cvs])
		for page := range out[:now] {
			for w := range words {
				binary.LittleEndian.PutUint32(out[page][4*w:], roots[w*n+page])
			}
		}
		out, pages = out[now:], pages[now*PageSize:]
	}
}

// hash makes the chaining values of n chunks.
func hash(n int, in []byte, counters *[16]uint32, cv []uint32) {
	_, _ = in[n*chunkSize-1], cv[n*words-1]
	if n == 16 {
		chunks16(&in[0], &counters[0], &cv[0])
	} else {
		chunks8(&in[0], &counters[0], &cv[0])
	}
}

// join makes the chaining values of n parents from those of their 2n children.
func join(n int, children []uint32, flags uint32, cv []uint32) {
	if n == 16 {
		parents16(&children[0], flags, &cv[0])
	} else {
		parents8(&children[0], flags, &cv[0])
	}
}
