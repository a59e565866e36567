package qcow2

import (
	"encoding/binary"
	"fmt"
	"io"
)

// Writer makes a layer. The file is an image only once Close has returned.
type Writer struct {
	w    io.WriterAt
	size uint64
	next uint64           // the first cluster that is free
	l2   map[int][]uint64 // by table: two words a cluster
}

// NewWriter begins a layer of a disk of size bytes, in a file that is empty.
func NewWriter(w io.WriterAt, size uint64) (*Writer, error) {
	if size == 0 || size > maxSize || size%512 != 0 {
		return nil, fmt.Errorf("make layer: a disk of %d bytes, want a multiple of 512 up to %d", size, int64(maxSize))
	}
	return &Writer{w: w, size: size, next: 1, l2: map[int][]uint64{}}, nil
}

// Page puts a page into the layer; nil is one of zeros. Each may be given once.
func (w *Writer) Page(offset uint64, data []byte) error {
	if offset%PageSize != 0 || offset >= w.size || data != nil && len(data) != PageSize {
		return fmt.Errorf("make layer: a page of %d bytes at %#x of a disk of %d bytes", len(data), offset, w.size)
	}
	cluster := offset / clusterSize
	sub := offset % clusterSize / PageSize
	table := int(cluster / l2Entries)
	if w.l2[table] == nil {
		w.l2[table] = make([]uint64, 2*l2Entries)
	}
	entry := w.l2[table][2*(cluster%l2Entries):][:2]
	if data == nil {
		entry[1] |= 1 << (32 + sub)
		return nil
	}
	if entry[0] == 0 {
		entry[0] = w.next*clusterSize | copied
		w.next++
	}
	entry[1] |= 1 << sub
	return w.write(data, entry[0]&offsetMask+sub*PageSize)
}

func (w *Writer) write(b []byte, at uint64) error {
	if _, err := w.w.WriteAt(b, int64(at)); err != nil {
		return fmt.Errorf("make layer: %w", err)
	}
	return nil
}

// Close writes the tables and, last, the header.
func (w *Writer) Close() error {
	be := binary.BigEndian
	l1 := make([]byte, 8*tables(w.size))
	buf := make([]byte, clusterSize)
	for i := range tables(w.size) {
		entries := w.l2[i]
		if entries == nil {
			continue
		}
		for k, e := range entries {
			be.PutUint64(buf[8*k:], e)
		}
		if err := w.write(buf, w.next*clusterSize); err != nil {
			return err
		}
		be.PutUint64(l1[8*i:], w.next*clusterSize|copied)
		w.next++
	}
	l1At := w.next
	if err := w.write(l1, l1At*clusterSize); err != nil {
		return err
	}
	w.next += clusters(uint64(len(l1)))

	// The refcounts, of 16 bits, count their own blocks and table, too.
	const perBlock = clusterSize / 2
	var total, blocks, tableClusters uint64
	for {
		total = w.next + blocks + tableClusters
		b := (total + perBlock - 1) / perBlock
		t := clusters(8 * b)
		if b == blocks && t == tableClusters {
			break
		}
		blocks, tableClusters = b, t
	}
	table := make([]byte, 8*blocks)
	for i := range blocks {
		clear(buf)
		for k := range min(perBlock, total-i*perBlock) {
			be.PutUint16(buf[2*k:], 1)
		}
		if err := w.write(buf, (w.next+i)*clusterSize); err != nil {
			return err
		}
		be.PutUint64(table[8*i:], (w.next+i)*clusterSize)
	}
	// The table fills its clusters: QEMU reads them whole.
	table = append(table, make([]byte, tableClusters*clusterSize-uint64(len(table)))...)
	tableAt := w.next + blocks
	if err := w.write(table, tableAt*clusterSize); err != nil {
		return err
	}

	h := make([]byte, headerLength+8) // and the end of the header's extensions
	copy(h, magic)
	be.PutUint32(h[4:], 3)
	be.PutUint32(h[20:], clusterBits)
	be.PutUint64(h[24:], w.size)
	be.PutUint32(h[36:], uint32(tables(w.size)))
	be.PutUint64(h[40:], l1At*clusterSize)
	be.PutUint64(h[48:], tableAt*clusterSize)
	be.PutUint32(h[56:], uint32(tableClusters))
	be.PutUint64(h[72:], featureExtended)
	be.PutUint32(h[96:], 4)
	be.PutUint32(h[100:], headerLength)
	return w.write(h, 0)
}

func clusters(n uint64) uint64 { return (n + clusterSize - 1) / clusterSize }
