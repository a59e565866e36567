package store

import (
	"bytes"
	"encoding/hex"
	"fmt"

	"violin/internal/pagehash"
)

const (
	// PageSize is the unit of content addressing for memory, in bytes.
	PageSize = 4096
	// HashSize is the length of a [Hash], in bytes.
	HashSize = 32
)

// A Hash names a page or a chunk: the BLAKE3-256 of its plain bytes.
type Hash [HashSize]byte

// String returns the hash as 64 lower-case hexadecimal digits.
func (h Hash) String() string { return hex.EncodeToString(h[:]) }

// IsZero reports whether h is the zero value, which names nothing. It is not
// the hash of a page of zeros; that is [ZeroPage].
func (h Hash) IsZero() bool { return h == Hash{} }

// MarshalText implements [encoding.TextMarshaler].
func (h Hash) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// UnmarshalText implements [encoding.TextUnmarshaler].
func (h *Hash) UnmarshalText(text []byte) error {
	var out Hash
	if len(text) != hex.EncodedLen(HashSize) {
		return fmt.Errorf("parse hash: %d characters, want %d hexadecimal digits", len(text), hex.EncodedLen(HashSize))
	}
	if _, err := hex.Decode(out[:], text); err != nil {
		return fmt.Errorf("parse hash: %w", err)
	}
	*h = out
	return nil
}

// ZeroPage returns the hash of a page of zeros. Such a page is never stored:
// Put answers with this hash at once, and Get fills the buffer by itself.
func ZeroPage() Hash { return zeroPage }

var (
	zeros    [PageSize]byte
	zeroPage = Sum(zeros[:])
)

// isZero is fast on the common page: it differs from zero in its first bytes.
func isZero(page []byte) bool { return bytes.Equal(page, zeros[:]) }

// Sum returns the hash of b.
func Sum(b []byte) Hash { return pagehash.SumLong(b) }

// SumPages puts the hashes of pages into out, in their order; pages has PageSize bytes for
// each. It is faster than Sum of each: by the machine's vectors, several pages at a time.
func SumPages(out []Hash, pages []byte) { pagehash.Sum(out, pages) }
