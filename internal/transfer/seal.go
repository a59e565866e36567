package transfer

import (
	"bufio"
	"crypto/aes"
	"crypto/cipher"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"violin/internal/store"
)

const (
	segmentSize = 1 << 16
	// iterations follows OWASP's advice for HMAC-SHA-256 (2023).
	iterations = 600_000
	// maxIterations bounds what a file may ask this program to compute.
	maxIterations = 10_000_000
	minPassphrase = 8
)

// newBodyWriter writes the header; its Close ends the body.
func newBodyWriter(w io.Writer, passphrase string) (io.WriteCloser, error) {
	var head [headerSize]byte
	copy(head[:], magic)
	head[8] = version
	if passphrase == "" {
		_, err := w.Write(head[:])
		return &plainBody{bufio.NewWriterSize(w, segmentSize)}, err
	}
	if len(passphrase) < minPassphrase {
		return nil, fmt.Errorf("passphrase of %d characters; choose one of %d or more", len(passphrase), minPassphrase)
	}
	head[9] = 1
	binary.BigEndian.PutUint32(head[16:], iterations)
	_, _ = rand.Read(head[32:]) // never fails
	seal, err := newSeal(head[:], passphrase)
	if err != nil {
		return nil, err
	}
	_, err = w.Write(head[:])
	return &sealer{w: w, seal: seal, head: head[:], buf: make([]byte, 0, segmentSize)}, err
}

type plainBody struct{ *bufio.Writer }

func (p *plainBody) Close() error { return p.Flush() }

func newSeal(head []byte, passphrase string) (cipher.AEAD, error) {
	key, err := pbkdf2.Key(sha256.New, passphrase, head[32:64], int(binary.BigEndian.Uint32(head[16:])), 32)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

func segmentNonce(n uint64, last bool) []byte {
	b := make([]byte, 12)
	binary.BigEndian.PutUint64(b[3:], n)
	if last {
		b[11] = 1
	}
	return b
}

type sealer struct {
	w    io.Writer
	seal cipher.AEAD
	head []byte
	n    uint64
	buf  []byte // not sealed yet; full only if more follows
	out  []byte
}

func (s *sealer) Write(b []byte) (int, error) {
	written := len(b)
	for len(b) > 0 {
		if len(s.buf) == segmentSize {
			if err := s.segment(false); err != nil {
				return 0, err
			}
		}
		n := min(len(b), segmentSize-len(s.buf))
		s.buf = append(s.buf, b[:n]...)
		b = b[n:]
	}
	return written, nil
}

func (s *sealer) segment(last bool) error {
	s.out = s.seal.Seal(s.out[:0], segmentNonce(s.n, last), s.buf, s.head)
	s.n++
	s.buf = s.buf[:0]
	_, err := s.w.Write(s.out)
	return err
}

func (s *sealer) Close() error { return s.segment(true) }

// newBodyReader reads the header.
func newBodyReader(r io.Reader, passphrase string) (io.Reader, error) {
	var head [headerSize]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, fmt.Errorf("%w: too short for a violin export", store.ErrDamaged)
		}
		return nil, err
	}
	n := binary.BigEndian.Uint32(head[16:])
	switch {
	case string(head[:8]) != magic:
		return nil, fmt.Errorf("%w: no violin export; give a file that 'violin export' made", store.ErrDamaged)
	case head[8] != version:
		return nil, fmt.Errorf("the file has format version %d, this violin reads version %d; use a later violin", head[8], version)
	case head[9] > 1:
		return nil, fmt.Errorf("the file is sealed in way %d, which this violin does not know; use a later violin", head[9])
	case head[9] == 0 && passphrase != "":
		return nil, fmt.Errorf("%w: the file is not sealed, but a passphrase was given: it may have been exchanged for another; leave the passphrase out to import it all the same", store.ErrKey)
	case head[9] == 0 && [headerSize - 10]byte(head[10:]) != [headerSize - 10]byte{}:
		return nil, fmt.Errorf("%w: the header of a file that is not sealed is not zero", store.ErrDamaged)
	case head[9] == 0:
		return r, nil
	case passphrase == "":
		return nil, fmt.Errorf("%w: the file is sealed with a passphrase; give it", store.ErrKey)
	case n < 1 || n > maxIterations:
		return nil, fmt.Errorf("%w: the file asks for %d iterations, want 1 to %d", store.ErrDamaged, n, maxIterations)
	}
	seal, err := newSeal(head[:], passphrase)
	if err != nil {
		return nil, err
	}
	return &opener{r: bufio.NewReaderSize(r, segmentSize+64), seal: seal, head: head[:], in: make([]byte, segmentSize+seal.Overhead())}, nil
}

type opener struct {
	r    *bufio.Reader
	seal cipher.AEAD
	head []byte
	n    uint64
	in   []byte
	buf  []byte
	last bool
}

func (o *opener) Read(b []byte) (int, error) {
	for len(o.buf) == 0 {
		if o.last {
			return 0, io.EOF
		}
		if err := o.segment(); err != nil {
			return 0, err
		}
	}
	n := copy(b, o.buf)
	o.buf = o.buf[n:]
	return n, nil
}

func (o *opener) segment() error {
	n, err := io.ReadFull(o.r, o.in)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return err
	}
	_, peek := o.r.Peek(1)
	o.last = errors.Is(peek, io.EOF)
	if !o.last && peek != nil {
		return peek
	}
	o.buf, err = o.seal.Open(o.in[:0], segmentNonce(o.n, o.last), o.in[:n], o.head)
	if err != nil && o.n == 0 {
		return fmt.Errorf("%w: the passphrase does not open the file, or the file is damaged at its beginning", store.ErrKey)
	}
	if err != nil {
		return fmt.Errorf("file is %w: segment %d does not open: it was altered or cut off", store.ErrDamaged, o.n)
	}
	o.n++
	return nil
}
