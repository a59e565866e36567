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

	"golang.org/x/sys/unix"
)

// The files of an image.
const (
	KernelFile = "vmlinuz"
	InitrdFile = "initrd.img"
	RootFile   = "rootfs.squashfs"
	DiskFile   = "disk" // of an image that is a disk
	infoFile   = "image.json"
)

// The versions of image.json: 2 is that of an image that is a disk, which a program
// that knows none must not take for another.
const (
	kernelFormat = 1
	diskFormat   = 2
)

// ErrNotFound: there is no image of that name.
var ErrNotFound = errors.New("there is no such image")

// Info is what image.json tells.
type Info struct {
	Format int               `json:"format"`
	Name   string            `json:"name"`
	Recipe string            `json:"recipe,omitempty"` // hash of the recipe and all that it refers to; empty if it was imported
	Kernel string            `json:"kernel,omitempty"` // its version, if it was built
	Disk   *Disk             `json:"disk,omitempty"`   // nil for a kernel, an initrd and a root file system
	Built  time.Time         `json:"built,omitzero"`
	SHA256 map[string]string `json:"sha256"`

	Bytes int64 `json:"-"` // of all files
}

// Disk is an image that is a disk, which a node's firmware boots.
type Disk struct {
	Format   string `json:"format"`   // qcow2 or raw
	Size     uint64 `json:"size"`     // in bytes, as a guest sees it
	Firmware string `json:"firmware"` // one of topology.Firmwares
	Guest    bool   `json:"guest"`    // it reads what the topology says of the node, as [topology.Topology.GuestConfig] gives it
}

// Files are the names of the image's files. The last is the largest, and of one build
// alone.
func (i *Info) Files() []string {
	if i.Disk != nil {
		return []string{DiskFile}
	}
	return []string{KernelFile, InitrdFile, RootFile}
}

// Main is the name of the file that tells one build from another.
func (i *Info) Main() string {
	files := i.Files()
	return files[len(files)-1]
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
		return nil, fmt.Errorf("image %q: %w in %s; 'violin image build' and 'violin image import' make one", name, ErrNotFound, dir)
	}
	if err != nil {
		return nil, fmt.Errorf("image %q: %w", name, err)
	}
	var i Info
	if err := json.Unmarshal(b, &i); err != nil {
		return nil, fmt.Errorf("image %q: %s: %w", name, infoFile, err)
	}
	if i.Format != kernelFormat && i.Format != diskFormat {
		return nil, fmt.Errorf("image %q: %s has format %d, this program knows %d and %d: make the image again", name, infoFile, i.Format, kernelFormat, diskFormat)
	}
	if (i.Format == diskFormat) != (i.Disk != nil) {
		return nil, fmt.Errorf("image %q: %s has format %d, which does not go with what it says of a disk: make the image again", name, infoFile, i.Format)
	}
	i.Name = name // it may have been moved
	for _, f := range i.Files() {
		st, err := os.Stat(filepath.Join(dir, name, f))
		if err != nil {
			return nil, fmt.Errorf("image %q is not whole, make it again: %w", name, err)
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

// place makes an image of a directory beside the others that has its files: whole, in
// place of one of that name, or not at all.
func place(dir, images string, info *Info) (*Info, error) {
	b, err := json.MarshalIndent(info, "", "  ")
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, infoFile), append(b, '\n'), 0o644); err != nil {
		return nil, err
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return nil, err
	}
	to := filepath.Join(images, info.Name)
	if err := os.Rename(dir, to); err == nil { // there was none
		return Open(images, info.Name)
	}
	if err := unix.Renameat2(unix.AT_FDCWD, dir, unix.AT_FDCWD, to, unix.RENAME_EXCHANGE); err != nil {
		return nil, fmt.Errorf("put it in place of %s: %w", to, err)
	}
	return Open(images, info.Name)
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
