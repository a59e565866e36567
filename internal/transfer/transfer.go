// Package transfer carries a snapshot from one store to another in one file:
// its document and every page and chunk that it needs, each once.
//
// The file, integers big-endian:
//
//	header 64   0 magic "violexpt", 8 version 1, 9 sealing: 0 none, 1 AES-256-GCM
//	           16 PBKDF2-HMAC-SHA-256 iterations (4), 0 if not sealed
//	           32 salt, 32 random bytes; the rest is zero
//	body        if sealed: segments of 65536 bytes, the last shorter, each 16 longer
//	            than its plain content. The key is PBKDF2's of passphrase and salt, the
//	            nonce 3 zero bytes, the segment's number from 0 (8), and 1 for the
//	            last, 0 for others; the header is the additional data of each
//
// The body is a sequence of records:
//
//	 0  kind: 'S' document, 'c' chunk, 'p' page, 'E' end
//	 1  stored length (4): if it is less than the plain length, a zstd frame
//	 5  plain length (4)
//	 9  BLAKE3-256 of the plain content; for the end, of the body before this record
//	41  stored bytes
//
// The document comes first. The end's content is the number of pages (8) and
// chunks (8); nothing follows it. A file that was cut off, or in which any bit is
// another, is refused, and leaves nothing behind.
package transfer

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/zeebo/blake3"

	"violin/internal/catalog"
	"violin/internal/store"
)

const (
	magic      = "violexpt"
	version    = 1
	headerSize = 64
	recordSize = 41

	kindDocument = 'S'
	kindChunk    = 'c'
	kindPage     = 'p'
	kindEnd      = 'E'
)

// Stats says what was in a file.
type Stats struct {
	Pages, Chunks int64
	NewPages      int64 // of an import: that the store did not have
	StoredBytes   int64 // of an import: that the store grew by
}

// Export writes a snapshot to w, sealed unless the passphrase is empty. All of
// it is verified on the way; after an error, what was written is no whole file.
func Export(ctx context.Context, st *store.Store, snap *catalog.Snapshot, w io.Writer, passphrase string) (Stats, error) {
	stats, err := export(ctx, st, snap, w, passphrase)
	if err != nil {
		return stats, fmt.Errorf("export snapshot %s: %w", snap.Ref(), err)
	}
	return stats, nil
}

func export(ctx context.Context, st *store.Store, snap *catalog.Snapshot, w io.Writer, passphrase string) (stats Stats, err error) {
	doc, err := catalog.New(st).Document(ctx, snap)
	if err != nil {
		return stats, err
	}
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1),
		zstd.WithEncoderCRC(false), zstd.WithWindowSize(store.ChunkSize), zstd.WithSingleSegment(true))
	if err != nil {
		return stats, err
	}
	defer enc.Close()
	body, err := newBodyWriter(w, passphrase)
	if err != nil {
		return stats, err
	}
	out := &recordWriter{w: body, sum: blake3.New(), enc: enc}
	if err := out.write(kindDocument, store.Sum(doc), doc); err != nil {
		return stats, err
	}
	err = st.Content(ctx, snap.Roots(), func(page bool, h store.Hash, data []byte) error {
		if page {
			stats.Pages++
			return out.write(kindPage, h, data)
		}
		stats.Chunks++
		return out.write(kindChunk, h, data)
	})
	if err != nil {
		return stats, err
	}
	end := binary.BigEndian.AppendUint64(nil, uint64(stats.Pages))
	end = binary.BigEndian.AppendUint64(end, uint64(stats.Chunks))
	if err := out.write(kindEnd, store.Hash(out.sum.Sum(nil)), end); err != nil {
		return stats, err
	}
	return stats, body.Close()
}

type recordWriter struct {
	w   io.Writer
	sum *blake3.Hasher
	enc *zstd.Encoder
	buf []byte
}

func (r *recordWriter) write(kind byte, h store.Hash, data []byte) error {
	var head [recordSize]byte
	r.buf = r.enc.EncodeAll(data, r.buf[:0])
	stored := r.buf
	if len(stored) >= len(data) {
		stored = data
	}
	head[0] = kind
	binary.BigEndian.PutUint32(head[1:], uint32(len(stored)))
	binary.BigEndian.PutUint32(head[5:], uint32(len(data)))
	copy(head[9:], h[:])
	for _, b := range [][]byte{head[:], stored} {
		if _, err := r.w.Write(b); err != nil {
			return err
		}
		_, _ = r.sum.Write(b) // never fails
	}
	return nil
}

// Import takes a snapshot from r into a store. Every page and chunk is hashed, and
// what the store has already costs no space. The snapshot becomes visible last,
// once all that it needs is there; after an error nothing of it is.
func Import(ctx context.Context, st *store.Store, r io.Reader, passphrase string) (*catalog.Snapshot, Stats, error) {
	snap, stats, err := imports(ctx, st, r, passphrase)
	if err != nil {
		return nil, stats, fmt.Errorf("import snapshot: %w", err)
	}
	return snap, stats, nil
}

func imports(ctx context.Context, st *store.Store, r io.Reader, passphrase string) (_ *catalog.Snapshot, stats Stats, err error) {
	body, err := newBodyReader(r, passphrase)
	if err != nil {
		return nil, stats, err
	}
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(store.MaxDocument), zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		return nil, stats, err
	}
	defer dec.Close()
	in := &recordReader{r: bufio.NewReaderSize(body, 1<<16), sum: blake3.New(), dec: dec}
	kind, doc, err := in.read()
	if err != nil {
		return nil, stats, err
	}
	if kind != kindDocument {
		return nil, stats, in.damaged("begins with a record of kind %q, want a document", kind)
	}
	snap, err := catalog.ParseDocument(doc)
	if err != nil {
		return nil, stats, err
	}
	doc = append([]byte(nil), doc...) // the reader's buffer goes on
	c := catalog.New(st)
	if exists, err := c.Exists(ctx, snap.Slice, snap.ID); err != nil {
		return nil, stats, err
	} else if exists {
		return nil, stats, fmt.Errorf("%s is here: %w", snap.Ref(), store.ErrExists)
	}
	session, err := st.Begin(ctx)
	if err != nil {
		return nil, stats, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, session.Abort(context.WithoutCancel(ctx)))
		}
	}()
	for kind != kindEnd {
		var data []byte
		if kind, data, err = in.read(); err != nil {
			return nil, stats, err
		}
		switch kind {
		case kindPage:
			stats.Pages++
			_, err = session.Put(ctx, data)
		case kindChunk:
			stats.Chunks++
			_, err = session.PutBlob(ctx, data)
		case kindEnd:
			err = in.end(data, stats)
		default:
			err = in.damaged("record of kind %q", kind)
		}
		if err != nil {
			return nil, stats, err
		}
	}
	got := session.Stats()
	stats.NewPages, stats.StoredBytes = got.NewPages, got.StoredBytes+got.BlobBytesKept
	return snap, stats, session.Commit(ctx, func(ctx context.Context) error {
		if err := st.Complete(ctx, snap.Roots()); err != nil {
			return fmt.Errorf("the file lacks something that the snapshot needs: %w", err)
		}
		return c.PutDocument(ctx, doc)
	})
}

type recordReader struct {
	r     *bufio.Reader
	sum   *blake3.Hasher
	dec   *zstd.Decoder
	at    int64 // bytes of the body read
	buf   []byte
	plain []byte
	hash  store.Hash // that the last record gives
	body  store.Hash // of all before the last record
}

// read returns a record, verified; its content is valid until the next read.
func (r *recordReader) read() (kind byte, data []byte, err error) {
	var head [recordSize]byte
	if err := r.full(head[:]); err != nil {
		return 0, nil, err
	}
	kind = head[0]
	stored, plain := binary.BigEndian.Uint32(head[1:]), binary.BigEndian.Uint32(head[5:])
	limit := map[byte]uint32{kindDocument: store.MaxDocument, kindChunk: store.ChunkSize, kindPage: store.PageSize, kindEnd: 16}[kind]
	if stored > plain || plain > limit || kind == kindPage && plain != store.PageSize {
		return 0, nil, r.damaged("record of kind %q with %d bytes, stored as %d", kind, plain, stored)
	}
	if cap(r.buf) < int(stored) {
		r.buf = make([]byte, stored)
	}
	data = r.buf[:stored]
	r.body = store.Hash(r.sum.Sum(nil))
	_, _ = r.sum.Write(head[:])
	if err := r.full(data); err != nil {
		return 0, nil, err
	}
	_, _ = r.sum.Write(data)
	if stored < plain {
		if cap(r.plain) < int(plain) {
			r.plain = make([]byte, 0, plain)
		}
		if data, err = r.dec.DecodeAll(data, r.plain[:0:plain]); err != nil {
			return 0, nil, r.damaged("%w", err)
		}
	}
	copy(r.hash[:], head[9:])
	if len(data) != int(plain) {
		return 0, nil, r.damaged("record of %d bytes, want %d", len(data), plain)
	}
	if kind != kindEnd && store.Sum(data) != r.hash {
		return 0, nil, r.damaged("content has hash %s, but %s is written", store.Sum(data), r.hash)
	}
	return kind, data, nil
}

func (r *recordReader) full(b []byte) error {
	n, err := io.ReadFull(r.r, b)
	r.at += int64(n)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return r.damaged("it ends too early")
	}
	return err
}

// end checks the end against what came before, and that nothing follows.
func (r *recordReader) end(data []byte, got Stats) error {
	if len(data) != 16 || r.hash != r.body ||
		binary.BigEndian.Uint64(data) != uint64(got.Pages) || binary.BigEndian.Uint64(data[8:]) != uint64(got.Chunks) {
		return r.damaged("the end does not match what comes before")
	}
	if _, err := r.r.ReadByte(); !errors.Is(err, io.EOF) {
		if err != nil {
			return err
		}
		return r.damaged("something follows the end")
	}
	return nil
}

func (r *recordReader) damaged(format string, args ...any) error {
	return fmt.Errorf("file is %w: byte %d of the body: %w", store.ErrDamaged, r.at, fmt.Errorf(format, args...))
}
