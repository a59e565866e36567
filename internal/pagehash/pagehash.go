// Package pagehash computes the BLAKE3-256 of pages of 4096 bytes, many at a time, and that of
// the packs they are written in.
//
// The hash is the standard's, so that a page has the same one however it was computed. What
// is gained is in the processor's vectors. BLAKE3 cuts its input into chunks of 1024 bytes that
// are hashed side by side, one in each lane of a vector, and a page has four: of the 8
// lanes of AVX2 and the 16 of AVX-512, a library that is given one page uses four. Here
// the lanes are filled with the chunks of the pages that follow.
//
// A page's tree:
//
//	              root                  flags PARENT, ROOT
//	        /             \
//	     parent          parent         flags PARENT
//	    /      \        /      \
//	chunk 0  chunk 1  chunk 2  chunk 3  16 blocks of 64 bytes each
//
// One turn takes as many pages as there are lanes, N: four turns of N chunks, then two of N parents, then one of N
// roots. In between, chaining values lie by words: all lanes' first, then all lanes' second, and so on to the eighth.
//
// The assembly is written by gen.go, and compared with the library's results in the tests. Where
// the processor has neither AVX-512 nor AVX2, or there is a single page, it is the library that works.
package pagehash

import "github.com/zeebo/blake3"

const (
	// PageSize is the length of a page, in bytes.
	PageSize = 4096
	// Size is the length of a hash, in bytes.
	Size = 32

	chunkSize = 1024
	blockSize = 64

	flagChunkStart = 1
	flagChunkEnd   = 2
	flagParent     = 4
	flagRoot       = 8
)

// Sum puts the hashes of pages into out, in their order. pages has PageSize bytes for each
// element of out. Whole turns of 16 pages are fastest; what is left over is hashed in turns that
// are partly empty.
func Sum[H ~[Size]byte](out []H, pages []byte) {
	if len(pages) != len(out)*PageSize {
		panic("pagehash: pages and hashes differ in number")
	}
	if len(out) > 1 {
		vectors(out, pages)
		return
	}
	each(out, pages)
}

// SumLong returns the hash of data of any length. From some tens of KiB on it is faster than the
// library, where the processor has AVX-512.
func SumLong(data []byte) [Size]byte { return sumLong(data) }

// each hashes page by page.
func each[H ~[Size]byte](out []H, pages []byte) {
	for i := range out {
		out[i] = blake3.Sum256(pages[i*PageSize:][:PageSize])
	}
}
