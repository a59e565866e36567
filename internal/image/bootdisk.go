package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// What boots a disk that is built: Debian's packages syslinux-common and systemd-boot-efi.
const (
	bootSector = "/usr/lib/syslinux/mbr/gptmbr.bin"
	bootLoader = "/usr/lib/systemd/boot/efi/systemd-bootx64.efi"
)

// diskTools are what building a disk runs besides, and the Debian packages that have them.
var diskTools = map[string]string{
	"mke2fs": "e2fsprogs", "mkfs.vfat": "dosfstools", "mcopy": "mtools", "sfdisk": "fdisk", "syslinux": "syslinux",
	bootSector: "syslinux-common", bootLoader: "systemd-boot-efi",
}

// diskModules mount the root file system of a disk.
var diskModules = []string{"ext4"}

// The disk's layout, in sectors of 512 bytes: GPT, the FAT file system with kernel and
// boot loaders, the root file system, and GPT's copy.
const (
	sector    = 512
	bootStart = 2048
	diskAlign = 2048
	rootName  = "violin-root" // the partition's, by which initrd-init finds it
)

// partition is a disk's, in sectors.
type partition struct{ start, size int64 }

// disk makes the disk's file: of the root file system, and of a small one that BIOS and
// UEFI boot from. Nothing is mounted: each file system is made in a file of its own and
// copied to its place.
func (w *builder) disk(ctx context.Context) error {
	if err := w.clean(); err != nil {
		return err
	}
	bootFile, rootFile := filepath.Join(w.work, "boot.img"), filepath.Join(w.work, "root.img")
	kernel := filepath.Join(w.kernel, "boot/vmlinuz-"+w.version)
	used, err := bytesOf(kernel, filepath.Join(w.work, InitrdFile), bootLoader)
	if err != nil {
		return err
	}
	boot := partition{start: bootStart, size: align(used/sector + 32<<20/sector)}
	root := partition{start: boot.start + boot.size, size: align(w.recipe.size() / sector)}
	if err := w.bootFiles(ctx, bootFile, kernel, boot); err != nil {
		return err
	}
	if err := w.run(ctx, "", nil, "mke2fs", "-q", "-t", "ext4", "-L", rootName, "-d", w.root, rootFile, fmt.Sprintf("%dK", root.size*sector>>10)); err != nil {
		return fmt.Errorf("the recipe's size is %d MiB: %w", w.recipe.size()>>20, err)
	}
	to := filepath.Join(w.work, DiskFile)
	if err := makeFile(to, (root.start+root.size+diskAlign)*sector); err != nil {
		return err
	}
	// Bit 2 of a partition's attributes has the boot sector boot from it.
	table := fmt.Sprintf("label: gpt\nstart=%d, size=%d, type=uefi, name=violin-boot, attrs=LegacyBIOSBootable\nstart=%d, size=%d, type=linux, name=%s\n",
		boot.start, boot.size, root.start, root.size, rootName)
	if err := w.run(ctx, "", nil, "sh", "-euc", `printf %s "$1" | sfdisk --quiet "$2"`, "sh", table, to); err != nil {
		return err
	}
	for from, at := range map[string]int64{bootSector: 0, bootFile: boot.start * sector, rootFile: root.start * sector} {
		if err := copyInto(from, to, at); err != nil {
			return err
		}
	}
	return nil
}

// bootFiles makes the file system that firmware reads: syslinux for the BIOS,
// systemd-boot for UEFI, and the kernel and the initrd that both load.
func (w *builder) bootFiles(ctx context.Context, to, kernel string, p partition) error {
	dir := filepath.Join(w.work, "boot")
	options := "console=ttyS0 violin.root=" + rootName
	for name, content := range map[string]string{
		"syslinux.cfg":               "SERIAL 0 115200\nDEFAULT violin\nLABEL violin\n  LINUX /vmlinuz\n  INITRD /initrd.img\n  APPEND " + options + "\n",
		"loader/loader.conf":         "timeout 0\n",
		"loader/entries/violin.conf": "title violin\nlinux /vmlinuz\ninitrd /initrd.img\noptions " + options + "\n",
	} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			return err
		}
	}
	for from, name := range map[string]string{kernel: "vmlinuz", filepath.Join(w.work, InitrdFile): "initrd.img", bootLoader: "EFI/BOOT/BOOTX64.EFI"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			return err
		}
		if err := copyFile(from, filepath.Join(dir, name), 0o644); err != nil {
			return err
		}
	}
	if err := makeFile(to, p.size*sector); err != nil {
		return err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	args := []string{"-s", "-i", to}
	for _, e := range entries {
		args = append(args, filepath.Join(dir, e.Name()))
	}
	// syslinux's first sector must know where on the disk it is (-h).
	if err := w.run(ctx, "", nil, "mkfs.vfat", "-n", "VIOLIN", "-h", fmt.Sprint(p.start), to); err != nil {
		return err
	}
	if err := w.run(ctx, "", nil, "mcopy", append(args, "::/")...); err != nil {
		return err
	}
	return w.run(ctx, "", nil, "syslinux", "--install", to)
}

// bytesOf is how much files take.
func bytesOf(paths ...string) (n int64, err error) {
	for _, p := range paths {
		st, err := os.Stat(p)
		if err != nil {
			return 0, err
		}
		n += st.Size()
	}
	return n, nil
}

func align(sectors int64) int64 { return (sectors + diskAlign - 1) / diskAlign * diskAlign }

// makeFile makes a file of zeros.
func makeFile(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(size), f.Close())
}

// copyInto copies a file to a place in another. What is zeros there stays a hole.
func copyInto(from, to string, at int64) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	_, err = copySparse(out, at, in, nil)
	return err
}

// copyBytes is how much copySparse copies at a time. What is all zeros in it is left out.
const copyBytes = 64 << 10

// copySparse copies to a place in a file that has zeros there, and says how much it was;
// each part is shown, if to anybody, before.
func copySparse(out io.WriterAt, at int64, in io.Reader, show func(part []byte) error) (n int64, err error) {
	b, zeros := make([]byte, copyBytes), strings.Repeat("\x00", copyBytes)
	for {
		k, err := io.ReadFull(in, b)
		if show != nil && k > 0 {
			if err := show(b[:k]); err != nil {
				return n, err
			}
		}
		if string(b[:k]) != zeros[:k] {
			if _, err := out.WriteAt(b[:k], at+n); err != nil {
				return n, err
			}
		}
		n += int64(k)
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return n, nil
		case err != nil:
			return n, err
		}
	}
}

// clean leaves out of the root file system what only its making needed.
func (w *builder) clean() error {
	for _, pattern := range []string{"var/lib/apt/lists/*", "var/cache/apt/*", "var/log/*", "usr/share/doc", "usr/share/man"} {
		files, err := fs.Glob(os.DirFS(w.root), pattern)
		if err != nil {
			return err
		}
		for _, f := range files {
			if err := os.RemoveAll(filepath.Join(w.root, f)); err != nil {
				return err
			}
		}
	}
	return nil
}
