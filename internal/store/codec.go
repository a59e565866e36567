package store

import (
	"cmp"
	"fmt"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
)

// A method is how the entries of a pack are compressed.
type method byte

const (
	methodZstd method = 0
	methodS2   method = 1
)

// Compression chooses between speed and size.
type Compression int

const (
	// CompressFast compresses pages with S2: it has no tables to build, which is most of
	// what zstd does on 4 KiB. It is the default: a capture runs beside the guests, on their
	// cores.
	CompressFast Compression = iota
	// CompressSmall compresses pages with zstd: a tenth less is stored, and compression
	// takes four times as long.
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
	pages := methodZstd
	switch c {
	case CompressFast:
		pages = methodS2
	case CompressSmall:
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
	if c.method(k) == methodS2 {
		out = s2.Encode(buf[:cap(buf)], data)
	} else {
		out = c.enc.EncodeAll(data, buf[:0])
	}
	if len(out) >= len(data) {
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
	if m == methodS2 {
		if got, err := s2.DecodedLen(frame); err != nil || got > n {
			return nil, fmt.Errorf("decompress %d bytes: %d bytes of content, want %d: %w", len(frame), got, n, cmp.Or(err, s2.ErrTooLarge))
		}
		out, err := s2.Decode(buf[len(buf):len(buf)+n], frame)
		if err != nil {
			return nil, fmt.Errorf("decompress %d bytes: %w", len(frame), err)
		}
		return buf[:len(buf)+len(out)], nil
	}
	out, err := c.dec.DecodeAll(frame, buf[:len(buf):len(buf)+n])
	if err != nil {
		return nil, fmt.Errorf("decompress %d bytes: %w", len(frame), err)
	}
	// The same bytes, with the capacity that the caller's buffer has.
	return buf[:len(out)], nil
}
