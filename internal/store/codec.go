package store

import (
	"cmp"
	"errors"
	"fmt"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
	"github.com/minio/minlz"
)

// A method is how the entries of a pack are compressed.
type method byte

const (
	methodZstd  method = 0
	methodS2    method = 1
	methodMinLZ method = 2
)

// since is the pack version in which a method came up.
func (m method) since() byte { return byte(m) + 1 }

// Compression chooses between speed and size.
type Compression int

const (
	// CompressFast compresses pages with MinLZ at its fastest. It is the default: a
	// capture runs beside the guests, on their cores.
	CompressFast Compression = iota
	// CompressBalanced compresses pages with S2, in about twice the time: an eighth less is stored.
	CompressBalanced
	// CompressSmall compresses pages with zstd, in about nine times the time: a quarter less is stored.
	CompressSmall
)

// A codec compresses and decompresses entries. It is safe for concurrent use;
// no more than its number of workers run at a time, which bounds its memory.
type codec struct {
	pages method // of new packs of pages; chunks are compressed with zstd
	enc   *zstd.Encoder
	// Decoders of pages never see more than 4 KiB of output, those of chunks
	// up to ChunkSize; DecodeAll with a capacity limit covers both.
	dec *zstd.Decoder
}

func newCodec(c Compression, workers int) (*codec, error) {
	opts := []zstd.EOption{
		zstd.WithEncoderLevel(zstd.SpeedFastest),
		zstd.WithEncoderConcurrency(workers),
		zstd.WithEncoderCRC(false), // the hash is the better checksum
		zstd.WithLowerEncoderMem(true),
		zstd.WithWindowSize(ChunkSize),
		zstd.WithSingleSegment(true),
	}
	var pages method
	switch c {
	case CompressFast:
		pages = methodMinLZ
	case CompressBalanced:
		pages = methodS2
	case CompressSmall:
		pages = methodZstd
	default:
		return nil, fmt.Errorf("unknown compression %d", c)
	}
	enc, err := zstd.NewWriter(nil, opts...)
	if err != nil {
		return nil, fmt.Errorf("make zstd encoder: %w", err)
	}
	dec, err := zstd.NewReader(nil,
		zstd.WithDecoderConcurrency(workers),
		zstd.WithDecoderMaxMemory(ChunkSize),
		zstd.WithDecodeAllCapLimit(true),
	)
	if err != nil {
		return nil, fmt.Errorf("make zstd decoder: %w", err)
	}
	return &codec{pages: pages, enc: enc, dec: dec}, nil
}

func (c *codec) close() {
	_ = c.enc.Close()
	c.dec.Close()
}

// method is that of new packs of a kind.
func (c *codec) method(k kind) method {
	if k == kindPages {
		return c.pages
	}
	return methodZstd
}

// compress returns what is to be stored of data in a new pack: compressed in buf's
// memory if that is shorter, else data itself.
func (c *codec) compress(k kind, buf, data []byte) []byte {
	var out []byte
	switch c.method(k) {
	case methodMinLZ:
		out = minlz.TryEncode(buf[:cap(buf)], data, minlz.LevelSuperFast)
	case methodS2:
		out = s2.Encode(buf[:cap(buf)], data)
	case methodZstd:
		out = c.enc.EncodeAll(data, buf[:0])
	}
	if out == nil || len(out) >= len(data) {
		return data
	}
	return out
}

// decompress appends the content of one entry to buf and fails rather than
// append more than n bytes.
func (c *codec) decompress(m method, buf, frame []byte, n int) ([]byte, error) {
	if cap(buf)-len(buf) < n {
		grown := make([]byte, len(buf), len(buf)+n)
		copy(grown, buf)
		buf = grown
	}
	switch m {
	case methodMinLZ:
		return decompressBlock(buf, frame, n, minlz.DecodedLen, minlz.Decode)
	case methodS2:
		return decompressBlock(buf, frame, n, s2.DecodedLen, s2.Decode)
	}
	out, err := c.dec.DecodeAll(frame, buf[:len(buf):len(buf)+n])
	if err != nil {
		return nil, fmt.Errorf("decompress %d bytes: %w", len(frame), err)
	}
	// The same bytes, with the capacity that the caller's buffer has.
	return buf[:len(out)], nil
}

// decompressBlock is decompress for a block that begins with its content's length.
func decompressBlock(buf, block []byte, n int, length func([]byte) (int, error), decode func(dst, block []byte) ([]byte, error)) ([]byte, error) {
	if got, err := length(block); err != nil || got > n {
		return nil, fmt.Errorf("decompress %d bytes: %d bytes of content, want %d: %w", len(block), got, n, cmp.Or(err, errTooLong))
	}
	out, err := decode(buf[len(buf):len(buf)+n:len(buf)+n], block)
	if err != nil {
		return nil, fmt.Errorf("decompress %d bytes: %w", len(block), err)
	}
	return buf[:len(buf)+len(out)], nil
}

var errTooLong = errors.New("too long")
