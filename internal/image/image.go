package image

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"time"
)

// The files of an image.
const (
	KernelFile = "vmlinuz"
	InitrdFile = "initrd.img"
	RootFile   = "rootfs.squashfs"
	infoFile   = "image.json"
)

// format is the only version of image.json.
const format = 1

// ErrNotFound: there is no image of that name.
var ErrNotFound = errors.New("there is no such image")

// Info is what image.json tells.
type Info struct {
	Format int               `json:"format"`
	Name   string            `json:"name"`
	Recipe string            `json:"recipe"` // hash of the recipe and all that it refers to
	Kernel string            `json:"kernel"` // its version
	Built  time.Time         `json:"built,omitzero"`
	SHA256 map[string]string `json:"sha256"`

	Bytes int64 `json:"-"` // of all files
}

var imageName = regexp.MustCompile(`^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$`)

// CheckName tells whether an image may be called that.
func CheckName(name string) error {
	if !imageName.MatchString(name) {
		return fmt.Errorf("%q is no name of an image: use lower-case letters, digits, '-', '_' and '.', at most 63", name)
	}
	return nil
}

// Open reads what an image in the directory dir of all images is.
func Open(dir, name string) (*Info, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	b, err := os.ReadFile(filepath.Join(dir, name, infoFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("image %q: %w in %s; 'violin image build' makes one", name, ErrNotFound, dir)
	}
	if err != nil {
		return nil, fmt.Errorf("image %q: %w", name, err)
	}
	var i Info
	if err := json.Unmarshal(b, &i); err != nil {
		return nil, fmt.Errorf("image %q: %s: %w", name, infoFile, err)
	}
	if i.Format != format {
		return nil, fmt.Errorf("image %q: %s has format %d, this program knows %d: build the image again", name, infoFile, i.Format, format)
	}
	i.Name = name // it may have been moved
	for _, f := range []string{KernelFile, InitrdFile, RootFile} {
		st, err := os.Stat(filepath.Join(dir, name, f))
		if err != nil {
			return nil, fmt.Errorf("image %q is not whole, build it again: %w", name, err)
		}
		i.Bytes += st.Size()
	}
	return &i, nil
}

// List returns the images in dir, by name. What is there and is none is told in the
// error, beside those that are.
func List(dir string) ([]*Info, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	var all []*Info
	var errs []error
	for _, e := range entries {
		if CheckName(e.Name()) != nil {
			continue // a build that runs, or was cut short
		}
		i, err := Open(dir, e.Name())
		if err != nil {
			errs = append(errs, err)
			continue
		}
		all = append(all, i)
	}
	return all, errors.Join(errs...)
}

// Remove removes an image, whole or not. Nodes that run keep the files that they have open.
func Remove(dir, name string) error {
	if err := CheckName(name); err != nil {
		return err
	}
	if _, err := os.Lstat(filepath.Join(dir, name)); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("image %q: %w in %s", name, ErrNotFound, dir)
	}
	// Without its description it is none, whatever comes between.
	if err := os.Remove(filepath.Join(dir, name, infoFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove image %q: %w", name, err)
	}
	if err := os.RemoveAll(filepath.Join(dir, name)); err != nil {
		return fmt.Errorf("remove image %q: %w", name, err)
	}
	return nil
}

// sum is the SHA-256 of a file, in hex.
func sum(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", fmt.Errorf("read %s: %w", path, err)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
