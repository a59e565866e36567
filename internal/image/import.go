package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"violin/internal/topology"
)

// UnfitError is why a file, or what was said of it, makes no image.
type UnfitError struct{ Err error }

func (e *UnfitError) Error() string { return e.Err.Error() }
func (e *UnfitError) Unwrap() error { return e.Err }

func unfit(format string, args ...any) error { return &UnfitError{fmt.Errorf(format, args...)} }

// Import describes how a disk image of someone's own becomes one of ours.
type Import struct {
	Name     string
	File     string // a qcow2 or raw image, whole in itself
	Firmware string // one of topology.Firmwares; empty for the first
	SHA256   string // of the file, in hex, as its maker tells; empty if it is not to be compared
	Dir      string // of all images
	// Copied is told how many bytes of the file have been read, now and then; nil for
	// nobody.
	Copied func(done, of int64)
}

// Run makes the image, in place of one of the same name once it is whole. The file is
// copied as it is, byte by byte: so that of two machines that import it, each restores
// the other's snapshots.
func (m Import) Run(ctx context.Context) (_ *Info, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("import %s as image %q: %w", m.File, m.Name, err)
		}
	}()
	if err := CheckName(m.Name); err != nil {
		return nil, err
	}
	if m.Firmware == "" {
		m.Firmware = topology.Firmwares[0]
	}
	if !slices.Contains(topology.Firmwares, m.Firmware) {
		return nil, unfit("firmware %q is none of %s", m.Firmware, strings.Join(topology.Firmwares, ", "))
	}
	want := strings.ToLower(m.SHA256)
	if b, err := hex.DecodeString(want); err != nil || want != "" && len(b) != sha256.Size {
		return nil, unfit("%q is no SHA-256, which has 64 hexadecimal digits", m.SHA256)
	}
	if _, _, err := InspectDisk(m.File); err != nil {
		return nil, &UnfitError{err}
	}
	if err := os.MkdirAll(m.Dir, 0o755); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(m.Dir, "."+m.Name+"-") // no image's name
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	to := filepath.Join(dir, DiskFile)
	got, err := m.copy(ctx, to)
	if err != nil {
		return nil, err
	}
	if want != "" && got != want {
		return nil, unfit("it has SHA-256 %s, not %s: it is another file than you want, or was damaged on its way", got, want)
	}
	// What counts is what was copied: the file may have changed meanwhile.
	size, format, err := InspectDisk(to)
	if err != nil {
		return nil, err
	}
	return place(dir, m.Dir, &Info{
		Format: diskFormat, Name: m.Name, Built: time.Now().UTC().Truncate(time.Second),
		Disk: &Disk{Format: format, Size: size, Firmware: m.Firmware}, SHA256: map[string]string{DiskFile: got},
	})
}

// copy copies the file and tells its SHA-256.
func (m Import) copy(ctx context.Context, to string) (sha string, err error) {
	in, err := os.Open(m.File)
	if err != nil {
		return "", err
	}
	defer in.Close()
	st, err := in.Stat()
	if err != nil {
		return "", err
	}
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	h, done := sha256.New(), int64(0)
	n, err := copySparse(out, 0, in, func(part []byte) error {
		h.Write(part)
		if done += int64(len(part)); m.Copied != nil {
			m.Copied(done, st.Size())
		}
		return context.Cause(ctx)
	})
	if err != nil {
		return "", err
	}
	if err := out.Truncate(n); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), out.Sync()
}
