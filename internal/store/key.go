package store

import (
	"bytes"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// A Key is what the owner of an encrypted store keeps: either 32 random bytes
// from a file or a passphrase. It does not encrypt pages itself; it unlocks
// the store's own random key, which is kept in store.json.
type Key struct {
	raw        []byte // 32 bytes
	passphrase string
}

// IsZero reports whether k is the zero Key: no encryption.
func (k Key) IsZero() bool { return k.raw == nil && k.passphrase == "" }

// String hides the key.
func (k Key) String() string {
	if k.IsZero() {
		return "none"
	}
	return "secret"
}

// Passphrase returns the key that a passphrase stands for.
func Passphrase(p string) (Key, error) {
	if len(p) < 8 {
		return Key{}, fmt.Errorf("passphrase of %d characters; choose one of 8 or more", len(p))
	}
	return Key{passphrase: p}, nil
}

// NewKey returns a random key, to be written to a file with its Text.
func NewKey() Key {
	k := Key{raw: make([]byte, 32)}
	_, _ = rand.Read(k.raw) // never fails
	return k
}

// keyFilePrefix begins a key file, so that no other file is taken for one.
const keyFilePrefix = "violin-key-1:"

// Text returns the content of a key file: one line. It is empty for a
// passphrase.
func (k Key) Text() string {
	if k.raw == nil {
		return ""
	}
	return keyFilePrefix + hex.EncodeToString(k.raw) + "\n"
}

// WriteFile writes Text to a new file that only its owner may read; it is on the
// disk when WriteFile returns. A file that is there is never overwritten.
func (k Key) WriteFile(name string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("write key: %w", err)
		}
	}()
	f, err := os.CreateTemp(filepath.Dir(name), tempPrefix) // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.WriteString(k.Text())
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	// Unlike a rename, a link fails if the name is taken.
	if err := os.Link(f.Name(), name); err != nil {
		return err
	}
	return syncDir(filepath.Dir(name))
}

// ReadKeyFile reads a key that Text wrote.
func ReadKeyFile(name string) (Key, error) {
	raw, err := os.ReadFile(name)
	if err != nil {
		return Key{}, fmt.Errorf("read key: %w", err)
	}
	k, err := ParseKey(string(raw))
	if err != nil {
		return Key{}, fmt.Errorf("read key %s: %w", name, err)
	}
	return k, nil
}

// ParseKey parses what Text wrote.
func ParseKey(text string) (Key, error) {
	digits, ok := strings.CutPrefix(strings.TrimSpace(text), keyFilePrefix)
	if !ok {
		return Key{}, fmt.Errorf("does not begin with %q; give the file that was written when the store was made", keyFilePrefix)
	}
	raw, err := hex.DecodeString(digits)
	if err != nil || len(raw) != 32 {
		return Key{}, fmt.Errorf("not 64 hexadecimal digits after %q", keyFilePrefix)
	}
	return Key{raw: raw}, nil
}

// keyWrap is the store's key as kept in store.json: sealed with AES-256-GCM
// under the owner's key, the store's identifier being authenticated with it.
type keyWrap struct {
	Sealing string `json:"sealing"` // of packs and documents: "aes-256-gcm"
	From    string `json:"from"`    // "file" or "passphrase"
	// Salt and Iterations are PBKDF2-HMAC-SHA-256's, for a passphrase.
	Salt       []byte `json:"salt,omitempty"`
	Iterations int    `json:"iterations,omitempty"`
	Wrapped    []byte `json:"wrapped"` // nonce 12, sealed key 32 + 16
}

const (
	sealingName    = "aes-256-gcm"
	fromFile       = "file"
	fromPassphrase = "passphrase"

	// pbkdf2Iterations follows OWASP's advice for HMAC-SHA-256 (2023).
	pbkdf2Iterations = 600_000
	// maxIterations bounds what a store may ask this program to compute.
	maxIterations = 10_000_000

	contextWrap = "violin store v1: wrapping of the store's key"
)

func wrapKey(master masterKey, owner Key, id string) *keyWrap {
	w := &keyWrap{Sealing: sealingName, From: fromFile}
	if owner.raw == nil {
		w.From = fromPassphrase
		w.Salt = make([]byte, 32)
		_, _ = rand.Read(w.Salt) // never fails
		w.Iterations = pbkdf2Iterations
	}
	secret, err := w.secret(owner)
	if err != nil {
		panic(err) // the parameters are our own
	}
	seal := newGCM(contextWrap, secret)
	n := randomNonce(seal)
	w.Wrapped = seal.Seal(n, n, master, []byte(id))
	return w
}

// secret turns the owner's key into 32 bytes.
func (w *keyWrap) secret(owner Key) ([]byte, error) {
	if w.From == fromFile {
		return bytes.Clone(owner.raw), nil
	}
	return pbkdf2.Key(sha256.New, owner.passphrase, w.Salt, w.Iterations, 32)
}

// unwrap returns the store's key; w is nil for a store without encryption.
func (w *keyWrap) unwrap(owner Key, id string) (masterKey, error) {
	if w == nil {
		if !owner.IsZero() {
			return nil, fmt.Errorf("%w: the store is not encrypted but a key was given; open it without, or make a new store", ErrKey)
		}
		return nil, nil
	}
	if w.Sealing != sealingName {
		return nil, fmt.Errorf("store is sealed by %q, which this violin does not know; use a later violin", w.Sealing)
	}
	switch {
	case w.From != fromFile && w.From != fromPassphrase:
		return nil, fmt.Errorf("store's key comes from %q, which this violin does not know; use a later violin", w.From)
	case w.From == fromFile && owner.raw == nil:
		return nil, fmt.Errorf("%w: the store is encrypted with a key file; give that file", ErrKey)
	case w.From == fromPassphrase && owner.passphrase == "":
		return nil, fmt.Errorf("%w: the store is encrypted with a passphrase; give it", ErrKey)
	case w.From == fromPassphrase && (w.Iterations < 1 || w.Iterations > maxIterations):
		return nil, fmt.Errorf("%w: %s asks for %d iterations, want 1 to %d", ErrDamaged, describeName, w.Iterations, maxIterations)
	}
	secret, err := w.secret(owner)
	if err != nil {
		return nil, fmt.Errorf("derive key from passphrase: %w", err)
	}
	seal := newGCM(contextWrap, secret)
	if len(w.Wrapped) != seal.NonceSize()+32+seal.Overhead() {
		return nil, fmt.Errorf("%w: %s holds a wrapped key of %d bytes", ErrDamaged, describeName, len(w.Wrapped))
	}
	n, sealed := w.Wrapped[:seal.NonceSize()], w.Wrapped[seal.NonceSize():]
	master, err := seal.Open(nil, n, sealed, []byte(id))
	if err != nil {
		return nil, fmt.Errorf("%w: it does not unlock this store", ErrKey)
	}
	return master, nil
}
