package store

import (
	"context"
	"fmt"
)

const (
	// ChunkSize is the largest chunk, in bytes. A blob of up to this length is
	// one chunk.
	ChunkSize = 1 << 20
	// MaxBlobSize is the largest blob, in bytes: its list of chunk hashes has
	// to fit into one chunk.
	MaxBlobSize = ChunkSize / HashSize * ChunkSize
)

// A BlobRef names a blob: any bytes that are not pages, such as a page table
// or a device state. The reference says nothing about where it lies, and
// content that is stored twice has one reference.
type BlobRef struct {
	// Hash is that of the blob's only chunk, or, if Size is above ChunkSize,
	// that of a chunk that lists the hashes of its chunks.
	Hash Hash `json:"hash"`
	// Size is the blob's length, in bytes. A blob of no bytes takes no space.
	Size int64 `json:"size"`
}

// IsZero reports whether r is the zero value, which refers to nothing.
func (r BlobRef) IsZero() bool { return r == BlobRef{} }

// PutBlob stores data and returns its reference. data may be reused when
// PutBlob returns. It is safe for concurrent use.
func (se *Session) PutBlob(ctx context.Context, data []byte) (BlobRef, error) {
	fail := func(err error) (BlobRef, error) {
		return BlobRef{}, fmt.Errorf("store blob of %d bytes: %w", len(data), err)
	}
	if len(data) > MaxBlobSize {
		return fail(fmt.Errorf("a blob has at most %d bytes; split it", int64(MaxBlobSize)))
	}
	se.count.blobBytes.Add(int64(len(data)))
	ref := BlobRef{Size: int64(len(data))}
	if len(data) == 0 {
		ref.Hash = Sum(nil)
		return ref, nil
	}
	var err error
	if len(data) <= ChunkSize {
		if ref.Hash, err = se.putChunk(ctx, data); err != nil {
			return fail(err)
		}
		return ref, nil
	}
	var list []byte
	for len(data) > 0 {
		n := min(len(data), ChunkSize)
		h, err := se.putChunk(ctx, data[:n])
		if err != nil {
			return fail(err)
		}
		list = append(list, h[:]...)
		data = data[n:]
	}
	if ref.Hash, err = se.putChunk(ctx, list); err != nil {
		return fail(err)
	}
	return ref, nil
}

// GetBlob returns a committed blob, verified.
func (s *Store) GetBlob(ctx context.Context, ref BlobRef) ([]byte, error) {
	chunks, err := s.blobChunks(ctx, ref)
	if err != nil {
		return nil, err
	}
	var out []byte
	for _, h := range chunks {
		b, err := s.getChunk(ctx, h)
		if err != nil {
			return nil, err
		}
		// Grow with what is really there, not with what the reference says.
		out = append(out, b...)
	}
	if int64(len(out)) != ref.Size {
		return nil, &Error{Op: "read blob", Hash: ref.Hash, Offset: -1, Err: fmt.Errorf("%w: %d bytes, want %d", ErrDamaged, len(out), ref.Size)}
	}
	return out, nil
}

// blobChunks returns the hashes of a blob's chunks, in order.
func (s *Store) blobChunks(ctx context.Context, ref BlobRef) ([]Hash, error) {
	switch {
	case ref.IsZero():
		return nil, fmt.Errorf("read blob: the reference is empty")
	case ref.Size == 0:
		return nil, nil
	case ref.Size < 0 || ref.Size > MaxBlobSize:
		return nil, &Error{Op: "read blob", Hash: ref.Hash, Offset: -1, Err: fmt.Errorf("%w: %d bytes are no blob's size", ErrDamaged, ref.Size)}
	case ref.Size <= ChunkSize:
		return []Hash{ref.Hash}, nil
	}
	list, err := s.getChunk(ctx, ref.Hash)
	if err != nil {
		return nil, err
	}
	n := (ref.Size + ChunkSize - 1) / ChunkSize
	if int64(len(list)) != n*HashSize {
		return nil, &Error{Op: "read blob", Hash: ref.Hash, Offset: -1, Err: fmt.Errorf("%w: list of chunks has %d bytes, want %d", ErrDamaged, len(list), n*HashSize)}
	}
	chunks := make([]Hash, n)
	for i := range chunks {
		chunks[i] = Hash(list[i*HashSize:])
	}
	return chunks, nil
}
