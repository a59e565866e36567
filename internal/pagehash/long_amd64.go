package pagehash

import (
	"encoding/binary"
	"math/bits"

	"github.com/zeebo/blake3"
	"golang.org/x/sys/cpu"
)

// shortest is what is left to the library, in bytes.
const shortest = 64 << 10

func sumLong(data []byte) [Size]byte {
	if cpu.X86.HasAVX512F && len(data) > shortest {
		return long(16, data)
	}
	return blake3.Sum256(data)
}

// long hashes with n lanes what is longer than 2 chunks. The tree is made level by level: pairs of
// neighbours have a parent, and one that is left over goes up as it is, which is BLAKE3's
// tree, too.
func long(n int, data []byte) (sum [Size]byte) {
	var (
		count    = (len(data) + chunkSize - 1) / chunkSize
		group    = n * words
		cvs      = make([]uint32, (count+2*n-1)/n*group) // and room for a last group's neighbour
		counters [16]uint32
		last     [16 * chunkSize]byte
	)
	for at := 0; at < count; at += n {
		for i := range counters {
			counters[i] = uint32(at + i)
		}
		in := data[at*chunkSize:]
		if len(in) < n*chunkSize {
			copy(last[:], in)
			in = last[:]
		}
		hash(n, in, &counters, cvs[at*words:])
	}
	// word is that of the chaining value with a number.
	word := func(number, w int) *uint32 { return &cvs[number/n*group+w*n+number%n] }
	if rest := len(data) % chunkSize; rest > 0 {
		cv := chunk(data[len(data)-rest:], uint64(count-1))
		for w := range cv {
			*word(count-1, w) = cv[w]
		}
	}
	for count > 2 {
		var odd [words]uint32
		for w := range odd {
			odd[w] = *word(count-1, w)
		}
		for from, to := 0, 0; from < count; from, to = from+2*n, to+n {
			join(n, cvs[from*words:][:2*group], flagParent, cvs[to*words:][:group])
		}
		if count%2 == 1 {
			for w := range odd {
				*word(count/2, w) = odd[w]
			}
		}
		count = (count + 1) / 2
	}
	join(n, cvs[:2*group], flagParent|flagRoot, cvs[:group])
	for w := range words {
		binary.LittleEndian.PutUint32(sum[4*w:], *word(0, w))
	}
	return sum
}

var iv = [words]uint32{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19}

// chunk makes the chaining value of one chunk of 1 to 1024 bytes, not the only one.
func chunk(in []byte, counter uint64) [words]uint32 {
	cv, flags := iv, uint32(flagChunkStart)
	for len(in) > 0 {
		var block [16]uint32
		n := min(len(in), blockSize)
		var padded [blockSize]byte
		copy(padded[:], in[:n])
		for w := range block {
			block[w] = binary.LittleEndian.Uint32(padded[4*w:])
		}
		if in = in[n:]; len(in) == 0 {
			flags |= flagChunkEnd
		}
		compress(&cv, &block, counter, uint32(n), flags)
		flags = 0
	}
	return cv
}

// compress takes a block of n bytes into a chaining value: the paper's section 2.2.
func compress(cv *[words]uint32, block *[16]uint32, counter uint64, n, flags uint32) {
	s := [16]uint32{
		cv[0], cv[1], cv[2], cv[3], cv[4], cv[5], cv[6], cv[7],
		iv[0], iv[1], iv[2], iv[3], uint32(counter), uint32(counter >> 32), n, flags,
	}
	mix := func(a, b, c, d int, x, y uint32) {
		s[a] += s[b] + x
		s[d] = bits.RotateLeft32(s[d]^s[a], -16)
		s[c] += s[d]
		s[b] = bits.RotateLeft32(s[b]^s[c], -12)
		s[a] += s[b] + y
		s[d] = bits.RotateLeft32(s[d]^s[a], -8)
		s[c] += s[d]
		s[b] = bits.RotateLeft32(s[b]^s[c], -7)
	}
	m := *block
	for range 7 {
		mix(0, 4, 8, 12, m[0], m[1])
		mix(1, 5, 9, 13, m[2], m[3])
		mix(2, 6, 10, 14, m[4], m[5])
		mix(3, 7, 11, 15, m[6], m[7])
		mix(0, 5, 10, 15, m[8], m[9])
		mix(1, 6, 11, 12, m[10], m[11])
		mix(2, 7, 8, 13, m[12], m[13])
		mix(3, 4, 9, 14, m[14], m[15])
		m = [16]uint32{m[2], m[6], m[3], m[10], m[7], m[0], m[4], m[13], m[1], m[11], m[12], m[5], m[9], m[14], m[15], m[8]}
	}
	for w := range cv {
		cv[w] = s[w] ^ s[w+8]
	}
}
