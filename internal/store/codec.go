package store

import (
	"fmt"

	"github.com/klauspost/compress/zstd"
)

// Compression chooses between speed and size.
type Compression int

const (
	// CompressFast leaves literals as they are (no entropy coding). It is the
	// default: a capture runs beside the guests, on their cores.
	CompressFast Compression = iota
	// CompressSmall stores about 15 % less in about 1.7 times the time.
	CompressSmall
)

// A codec compresses and decompresses entries. It is safe for concurrent use;
// no more than its number of workers run at a time, which bounds its memory.
type codec struct {
	enc *zstd.Encoder
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
	switch c {
	case CompressFast:
		opts = append(opts, zstd.WithNoEntropyCompression(true))
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
	return &codec{enc: enc, dec: dec}, nil
}

func (c *codec) close() {
	_ = c.enc.Close()
	c.dec.Close()
}

// compress returns what is to be stored of data: a zstd frame in buf's
// memory if that is shorter, else data itself.
func (c *codec) compress(buf, data []byte) []byte {
	out := c.enc.EncodeAll(data, buf[:0])
	if len(out) >= len(data) {
		return data
	}
	return out
}

// decompress appends the content of one frame to buf and fails rather than
// append more than n bytes.
func (c *codec) decompress(buf, frame []byte, n int) ([]byte, error) {
	if cap(buf)-len(buf) < n {
		grown := make([]byte, len(buf), len(buf)+n)
		copy(grown, buf)
		buf = grown
	}
	out, err := c.dec.DecodeAll(frame, buf[:len(buf):len(buf)+n])
	if err != nil {
		return nil, fmt.Errorf("decompress %d bytes: %w", len(frame), err)
	}
	// The same bytes, with the capacity that the caller's buffer has.
	return buf[:len(out)], nil
}
