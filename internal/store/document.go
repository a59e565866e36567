package store

import (
	"context"
	"crypto/cipher"
	"crypto/rand"
	"errors"
	"fmt"
	"iter"
	"strings"
)

// MaxDocument is the largest document, in bytes.
const MaxDocument = 16 << 20

// documentMagic begins an encrypted document: magic 8, nonce 12, sealed bytes.
// The name is authenticated with them, so that no document passes for another.
const documentMagic = "violdoc1"

// Documents keeps documents, sealed already, by name: what a store's documents are kept
// in. It is safe for concurrent use. One conformance suite, storetest, says what is
// expected of it.
type Documents interface {
	// Create writes a document, whole or not at all; it will stay when Create has
	// returned. A name that is taken is refused with [ErrExists]. An error that wraps
	// [ErrUncertain] leaves open whether it was written.
	Create(ctx context.Context, name string, data []byte) error
	// Replace is Create for a name that may be taken. Who reads meanwhile finds what was
	// there or what is written.
	Replace(ctx context.Context, name string, data []byte) error
	// Get reads a document; [ErrMissing] if there is none of this name.
	Get(ctx context.Context, name string) ([]byte, error)
	// List yields the names of the documents in a directory and below, in order.
	List(ctx context.Context, dir string) iter.Seq2[string, error]
	// Delete deletes a document; one that is not there is no error.
	Delete(ctx context.Context, name string) error
}

// bucketDocuments are objects of the bucket, beside the packs.
type bucketDocuments struct{ bucket *bucket }

// Create implements [Documents].
func (d bucketDocuments) Create(ctx context.Context, name string, data []byte) error {
	err := d.bucket.putNew(ctx, name, data)
	if err == nil || errors.Is(err, ErrExists) || errors.Is(err, ErrUncertain) {
		return err
	}
	// It may be there all the same: renamed but not synced, or written
	// but not acknowledged. Then what it refers to has to stay.
	if rerr := d.bucket.remove(context.WithoutCancel(ctx), name); rerr != nil {
		return errors.Join(err, fmt.Errorf("%w: remove it again: %w", ErrUncertain, rerr))
	}
	return err
}

// Replace implements [Documents].
func (d bucketDocuments) Replace(ctx context.Context, name string, data []byte) error {
	return d.bucket.put(ctx, name, data)
}

// Get implements [Documents].
func (d bucketDocuments) Get(ctx context.Context, name string) ([]byte, error) {
	if err := ctx.Err(); err != nil { // which a directory does not look at
		return nil, err
	}
	return d.bucket.read(ctx, name, MaxDocument+sealRoom)
}

// List implements [Documents].
func (d bucketDocuments) List(ctx context.Context, dir string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		for o, err := range d.bucket.list(ctx, dir+"/") {
			if !yield(o.name, err) || err != nil {
				return
			}
		}
	}
}

// Delete implements [Documents].
func (d bucketDocuments) Delete(ctx context.Context, name string) error {
	return d.bucket.remove(ctx, name)
}

// sealRoom is more than a seal adds to a document.
const sealRoom = 64

// PutDocument writes a small named object, whole or not at all; it will stay when
// PutDocument returns. The name is dir/name, of letters,
// digits and -_. only. A name that is taken is refused with ErrExists.
func (s *Store) PutDocument(ctx context.Context, name string, data []byte) error {
	if err := s.putDocument(ctx, name, data); err != nil {
		return fmt.Errorf("write document %s: %w", name, err)
	}
	return nil
}

// ReplaceDocument is PutDocument for a name that may be taken. Whoever reads the
// document meanwhile, and whoever comes after a crash, finds either what was there
// or what is written.
func (s *Store) ReplaceDocument(ctx context.Context, name string, data []byte) error {
	data, err := s.sealDocument(name, data)
	if err == nil {
		err = s.documents.Replace(ctx, name, data)
	}
	if err != nil {
		return fmt.Errorf("replace document %s: %w", name, err)
	}
	return nil
}

// sealDocument makes of a document's content what is written.
func (s *Store) sealDocument(name string, data []byte) ([]byte, error) {
	if err := s.writable(name); err != nil {
		return nil, err
	}
	if len(data) > MaxDocument {
		return nil, fmt.Errorf("%d bytes, want at most %d", len(data), MaxDocument)
	}
	if seal := s.key.document(); seal != nil {
		n := randomNonce(seal)
		out := append([]byte(documentMagic), n...)
		data = seal.Seal(out, n, data, []byte(name))
	}
	return data, nil
}

func (s *Store) putDocument(ctx context.Context, name string, data []byte) error {
	data, err := s.sealDocument(name, data)
	if err != nil {
		return err
	}
	return s.documents.Create(ctx, name, data)
}

// GetDocument reads a document; ErrMissing if there is none of this name.
func (s *Store) GetDocument(ctx context.Context, name string) ([]byte, error) {
	data, err := s.unseal(ctx, s.documents, name)
	if err != nil {
		return nil, fmt.Errorf("read document %s: %w", name, err)
	}
	return data, nil
}

// unseal reads a document from where it is kept.
func (s *Store) unseal(ctx context.Context, from Documents, name string) ([]byte, error) {
	if err := documentName(name); err != nil {
		return nil, err
	}
	data, err := from.Get(ctx, name)
	if err != nil {
		return nil, err
	}
	seal := s.key.document()
	if seal == nil {
		return data, nil
	}
	sealed, ok := strings.CutPrefix(string(data), documentMagic)
	if !ok || len(sealed) < seal.NonceSize() {
		return nil, fmt.Errorf("%w: not an encrypted document", ErrDamaged)
	}
	n := seal.NonceSize()
	plain, err := seal.Open(nil, []byte(sealed[:n]), []byte(sealed[n:]), []byte(name))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return plain, nil
}

// Documents yields the names of the documents in a directory and below, in
// order.
func (s *Store) Documents(ctx context.Context, dir string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		for name, err := range s.documents.List(ctx, strings.TrimSuffix(dir, "/")) {
			if err != nil {
				yield("", fmt.Errorf("list documents in %s: %w", dir, err))
				return
			}
			if !yield(name, nil) {
				return
			}
		}
	}
}

// DeleteDocument deletes a document; one that is not there is no error.
func (s *Store) DeleteDocument(ctx context.Context, name string) error {
	err := s.writable(name)
	if err == nil {
		err = s.documents.Delete(ctx, name)
	}
	if err != nil {
		return fmt.Errorf("delete document %s: %w", name, err)
	}
	return nil
}

func (s *Store) writable(name string) error {
	if s.opts.ReadOnly {
		return errors.New("the store was opened read-only")
	}
	return documentName(name)
}

// documentName is what a document may be called: it keeps clear of packs and
// of what file systems treat specially.
func documentName(name string) error {
	ok := strings.Contains(name, "/") && !strings.HasPrefix(name, packPrefix) && len(name) <= 512
	for part := range strings.SplitSeq(name, "/") {
		ok = ok && part != "" && part[0] != '.'
	}
	for _, r := range name {
		ok = ok && (r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-_./", r))
	}
	if !ok {
		return fmt.Errorf("name %q: want dir/name of letters, digits and -_. only", name)
	}
	return nil
}

func randomNonce(seal cipher.AEAD) []byte {
	n := make([]byte, seal.NonceSize())
	_, _ = rand.Read(n) // never fails
	return n
}
