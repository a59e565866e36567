package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// PageSize is the unit in which a layer is read and written, in bytes.
const PageSize = 4096

const (
	magic        = "QFI\xfb"
	clusterBits  = 17
	clusterSize  = 1 << clusterBits
	subclusters  = clusterSize / PageSize
	l2Entries    = clusterSize / 16
	headerLength = 112

	copied     = 1 << 63
	compressed = 1 << 62
	offsetMask = 1<<56 - 1<<9

	featureDirty    = 1 << 0
	featureCorrupt  = 1 << 1
	featureData     = 1 << 2
	featureExtended = 1 << 4

	// maxSize bounds a disk, in bytes, and so what a hostile size makes a reader
	// allocate: 128 KiB for the L1 table.
	maxSize = 1 << 44
)

// ErrFormat: the file is no qcow2 image.
var ErrFormat = errors.New("not a qcow2 image")

// Header is what the beginning of an image says.
type Header struct {
	Version  uint32
	Size     uint64 // of the disk, in bytes
	Backing  bool   // it refers to an image below it
	DataFile bool   // its data is in another file
	Crypt    bool

	clusterBits  uint32
	incompatible uint64
	l1Size       uint32
	l1Offset     uint64
}

// ReadHeader reads the header of any image, by whomever it was written.
func ReadHeader(r io.ReaderAt) (*Header, error) {
	b := make([]byte, 104)
	if n, err := r.ReadAt(b, 0); n < 72 {
		if err != nil && err != io.EOF {
			return nil, fmt.Errorf("read the header: %w", err)
		}
		return nil, ErrFormat
	}
	be := binary.BigEndian
	if string(b[:4]) != magic {
		return nil, ErrFormat
	}
	h := &Header{
		Version: be.Uint32(b[4:]), Size: be.Uint64(b[24:]), Backing: be.Uint64(b[8:]) != 0, Crypt: be.Uint32(b[32:]) != 0,
		clusterBits: be.Uint32(b[20:]), l1Size: be.Uint32(b[36:]), l1Offset: be.Uint64(b[40:]),
	}
	switch h.Version {
	case 2:
	case 3:
		h.incompatible = be.Uint64(b[72:])
		h.DataFile = h.incompatible&featureData != 0
	default:
		return nil, fmt.Errorf("a qcow2 image of version %d, want 2 or 3", h.Version)
	}
	return h, nil
}

// Image is a layer that nobody writes to.
type Image struct {
	Header
	r  io.ReaderAt
	l1 []byte
}

// Open reads a layer's header and L1 table.
func Open(r io.ReaderAt) (*Image, error) {
	h, err := ReadHeader(r)
	if err != nil {
		return nil, fmt.Errorf("open layer: %w", err)
	}
	switch {
	case h.Version != 3 || h.clusterBits != clusterBits || h.incompatible&^featureDirty != featureExtended || h.Crypt:
		return nil, fmt.Errorf("open layer: version %d, clusters of 1<<%d bytes, features %#x, encrypted %t: not as layers are made", h.Version, h.clusterBits, h.incompatible, h.Crypt)
	case h.Size > maxSize:
		return nil, fmt.Errorf("open layer: a disk of %d bytes, more than %d", h.Size, int64(maxSize))
	}
	im := &Image{Header: *h, r: r, l1: make([]byte, 8*tables(h.Size))}
	if int(h.l1Size) < tables(h.Size) {
		return nil, fmt.Errorf("open layer: an L1 table of %d entries, want %d", h.l1Size, tables(h.Size))
	}
	if err := im.read(im.l1, h.l1Offset); err != nil {
		return nil, fmt.Errorf("open layer: L1 table: %w", err)
	}
	return im, nil
}

// tables is how many L2 tables a disk has.
func tables(size uint64) int {
	return int((size + clusterSize*l2Entries - 1) / (clusterSize * l2Entries))
}

// read fills b. What lies behind the end of the file is zero: a layer's file may end
// in the middle of its last cluster.
func (im *Image) read(b []byte, at uint64) error {
	if at > 1<<62 {
		return fmt.Errorf("offset %#x is in no file", at)
	}
	n, err := im.r.ReadAt(b, int64(at))
	if err == io.EOF {
		clear(b[n:])
		return nil
	}
	return err
}

// Pages calls page for every page that the layer holds, from the first to the last;
// data is nil for one of zeros, and else valid until page returns. What the last page
// has behind the end of the disk is zero.
func (im *Image) Pages(page func(offset uint64, data []byte) error) error {
	l2 := make([]byte, clusterSize)
	cluster := make([]byte, clusterSize)
	for i := range tables(im.Size) {
		entry := binary.BigEndian.Uint64(im.l1[8*i:])
		at := entry & offsetMask
		if at == 0 {
			continue
		}
		if at%clusterSize != 0 {
			return fmt.Errorf("read layer: L2 table %d at %#x: not at a cluster's beginning", i, at)
		}
		if err := im.read(l2, at); err != nil {
			return fmt.Errorf("read layer: L2 table %d at %#x: %w", i, at, err)
		}
		for k := range l2Entries {
			if err := im.cluster(l2[16*k:], uint64(i*l2Entries+k)*clusterSize, cluster, page); err != nil {
				return fmt.Errorf("read layer: L2 table %d, entry %d: %w", i, k, err)
			}
		}
	}
	return nil
}

func (im *Image) cluster(entry []byte, offset uint64, buf []byte, page func(uint64, []byte) error) error {
	where, bitmap := binary.BigEndian.Uint64(entry), binary.BigEndian.Uint64(entry[8:])
	if where == 0 && bitmap == 0 {
		return nil
	}
	allocated, zero := uint32(bitmap), uint32(bitmap>>32)
	at := where & offsetMask
	switch {
	case where&compressed != 0:
		return errors.New("a compressed cluster: not as layers are made")
	case allocated&zero != 0:
		return fmt.Errorf("subclusters %#x are both data and zero", allocated&zero)
	case allocated != 0 && (at == 0 || at%clusterSize != 0):
		return fmt.Errorf("a cluster at %#x", at)
	case offset >= im.Size:
		return errors.New("a cluster behind the end of the disk")
	}
	if allocated != 0 {
		if err := im.read(buf, at); err != nil {
			return err
		}
	}
	for i := range subclusters {
		off := offset + uint64(i)*PageSize
		if off >= im.Size {
			break
		}
		var err error
		switch {
		case zero&(1<<i) != 0:
			err = page(off, nil)
		case allocated&(1<<i) != 0:
			data := buf[i*PageSize : (i+1)*PageSize]
			if left := im.Size - off; left < PageSize {
				clear(data[left:])
			}
			err = page(off, data)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
