package image

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"violin/internal/qcow2"
)

// foreign are the beginnings of images in formats that must not be taken for raw ones.
var foreign = map[string]string{"KDMV": "VMDK", "COWD": "VMDK", "QED\x00": "QED", "vhdxfile": "VHDX", "conectix": "VHD", "<<< ": "VDI"}

// packed are the beginnings of files that have an image inside.
var packed = map[string]string{"\xfd7zXZ\x00": "xz", "\x1f\x8b\x08": "gzip", "\x28\xb5\x2f\xfd": "zstd", "BZh": "bzip2", "PK\x03\x04": "zip"}

// InspectDisk tells the size, in bytes, of the disk in an image, and the image's
// format. The image must be whole in its one file, which its hash is of.
func InspectDisk(path string) (size uint64, format string, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, "", err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return 0, "", err
	}
	if !info.Mode().IsRegular() {
		return 0, "", errors.New("it is no regular file: a device's content can't be part of a snapshot; copy it into an image, with qemu-img convert")
	}
	h, err := qcow2.ReadHeader(f)
	switch {
	case errors.Is(err, qcow2.ErrFormat):
		begin := make([]byte, 8)
		if _, err := f.ReadAt(begin, 0); err != nil && err != io.EOF {
			return 0, "", err
		}
		for magic, name := range packed {
			if bytes.HasPrefix(begin, []byte(magic)) {
				return 0, "", fmt.Errorf("it is packed by %s; unpack it first", name)
			}
		}
		for magic, name := range foreign {
			if bytes.HasPrefix(begin, []byte(magic)) {
				return 0, "", fmt.Errorf("it is a %s image; make a qcow2 one of it, with qemu-img convert -O qcow2", name)
			}
		}
		if n := info.Size(); n == 0 || n%512 != 0 {
			return 0, "", fmt.Errorf("it has %d bytes: neither a qcow2 image nor a raw one, which has whole sectors of 512 bytes", n)
		}
		return uint64(info.Size()), "raw", nil
	case err != nil:
		return 0, "", err
	case h.Backing:
		return 0, "", errors.New("it refers to another image below it, which a snapshot would not know; make one file of them, with qemu-img convert -O qcow2")
	case h.DataFile:
		return 0, "", errors.New("its data is in another file, which a snapshot would not know; make one file of them, with qemu-img convert -O qcow2")
	case h.Crypt:
		return 0, "", errors.New("it is encrypted; use one that is not")
	case h.Size == 0 || h.Size%512 != 0:
		return 0, "", fmt.Errorf("its disk has %d bytes, want sectors of 512", h.Size)
	}
	return h.Size, "qcow2", nil
}
