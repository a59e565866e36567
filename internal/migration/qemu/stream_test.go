package qemu_test

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"violin/internal/migration/qemu"
)

// seeds are streams captured from QEMU 7.2, of guests with 1 MiB: "none" has
// no CPU, the others run testdata/guest.s.
var seeds = []string{
	"none-background.bin", "none-precopy.bin",
	"microvm-background.bin.gz", "microvm-precopy.bin.gz",
	"pc-background.bin.gz", "pc-precopy.bin.gz",
}

// smallSeeds are those of the seeds that a fuzzer mutates quickly.
var smallSeeds = seeds[:2]

func readSeed(tb testing.TB, name string) []byte {
	tb.Helper()
	f, err := os.Open(filepath.Join("testdata", name))
	if err != nil {
		tb.Fatal(err)
	}
	defer f.Close()
	var r io.Reader = f
	if strings.HasSuffix(name, ".gz") {
		if r, err = gzip.NewReader(f); err != nil {
			tb.Fatal(err)
		}
	}
	b, err := io.ReadAll(r)
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

// A memory is the RAM blocks of a guest: a sink and a source of pages.
type memory struct {
	ids    []string
	blocks [][]byte
}

// open is a sink's open function for small guests.
func (m *memory) open(blocks []qemu.RAMBlock) (qemu.PageSink, error) {
	for _, b := range blocks {
		if b.Length > 64<<20 {
			return nil, fmt.Errorf("RAM block %q is too large for a test", b.ID)
		}
		m.ids = append(m.ids, b.ID)
		m.blocks = append(m.blocks, make([]byte, b.Length))
	}
	return m, nil
}

func (m *memory) Page(block int, offset uint64, data []byte) error {
	copy(m.blocks[block][offset:], data)
	return nil
}

func (m *memory) Zero(block int, offset uint64) error {
	clear(m.blocks[block][offset : offset+qemu.PageSize])
	return nil
}

func (m *memory) equal(o *memory) bool {
	return slices.Equal(m.ids, o.ids) && slices.EqualFunc(m.blocks, o.blocks, bytes.Equal)
}

func (m *memory) source() source { return source{m} }

type source struct{ m *memory }

func (s source) Page(block int, offset uint64, buf []byte) (bool, error) {
	p := s.m.blocks[block][offset : offset+qemu.PageSize]
	if len(bytes.Trim(p, "\x00")) == 0 {
		return true, nil
	}
	copy(buf, p)
	return false, nil
}

func (m *memory) block(tb testing.TB, id string) []byte {
	tb.Helper()
	for i := range m.ids {
		if m.ids[i] == id {
			return m.blocks[i]
		}
	}
	tb.Fatalf("no RAM block %q in %q", id, m.ids)
	return nil
}

// A streamBuilder writes streams, right and wrong ones.
type streamBuilder []byte

func (b *streamBuilder) u8(v byte)        { *b = append(*b, v) }
func (b *streamBuilder) u16(v uint16)     { *b = binary.BigEndian.AppendUint16(*b, v) }
func (b *streamBuilder) u32(v uint32)     { *b = binary.BigEndian.AppendUint32(*b, v) }
func (b *streamBuilder) u64(v uint64)     { *b = binary.BigEndian.AppendUint64(*b, v) }
func (b *streamBuilder) bytes(s string)   { *b = append(*b, s...) }
func (b *streamBuilder) counted(s string) { b.u8(byte(len(s))); b.bytes(s) }

func (b *streamBuilder) header() {
	b.bytes("QEVM")
	b.u32(3)
	b.u8(7)
	b.u32(4)
	b.bytes("none")
}

func (b *streamBuilder) start(typ byte, id uint32, name string, version uint32) {
	b.u8(typ)
	b.u32(id)
	b.counted(name)
	b.u32(0)
	b.u32(version)
}

func (b *streamBuilder) footer(id uint32) { b.u8(0x7e); b.u32(id) }

func (b *streamBuilder) blocks(blocks ...qemu.RAMBlock) {
	total := uint64(0)
	for _, blk := range blocks {
		total += blk.Length
	}
	b.u64(total | 4)
	for _, blk := range blocks {
		b.counted(blk.ID)
		b.u64(blk.Length)
	}
}

// ram is a header and the START section with these blocks.
func (b *streamBuilder) ram(blocks ...qemu.RAMBlock) {
	b.header()
	b.start(1, 2, "ram", 4)
	b.blocks(blocks...)
	b.u64(0x10)
	b.footer(2)
}

func (b *streamBuilder) part(typ byte) { b.u8(typ); b.u32(2) }

func (b *streamBuilder) partEnd() { b.u64(0x10); b.footer(2) }

func (b *streamBuilder) zero(id string, offset uint64) {
	b.u64(offset | 2)
	b.counted(id)
	b.u8(0)
}

func (b *streamBuilder) page(id string, offset uint64, data []byte) {
	b.u64(offset | 8)
	b.counted(id)
	*b = append(*b, data...)
}

// devices is the state of one device and the end of the stream.
func (b *streamBuilder) devices() {
	b.start(4, 0, "timer", 2)
	b.bytes("~state~")
	b.footer(0)
	b.u8(0)
	b.description(`{"page_size": 4096, "devices": [{"name": "timer", "instance_id": 0}]}`)
}

func (b *streamBuilder) description(json string) {
	b.u8(6)
	b.u32(uint32(len(json)))
	b.bytes(json)
}
