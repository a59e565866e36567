package qemu_test

import (
	"bytes"
	"io"
	"testing"

	"violin/internal/migration/qemu"
)

const benchRAM = 64 << 20

// counter is a sink that touches nothing, so that the codec alone is measured.
type counter struct{ pages, zeros int }

func (c *counter) Page(int, uint64, []byte) error { c.pages++; return nil }
func (c *counter) Zero(int, uint64) error         { c.zeros++; return nil }

// halfFull is a source of which every other page is zero.
type halfFull struct{ page []byte }

func (h halfFull) Page(_ int, offset uint64, buf []byte) (bool, error) {
	if offset/qemu.PageSize%2 == 1 {
		return true, nil
	}
	copy(buf, h.page)
	return false, nil
}

func benchStream(b *testing.B) []byte {
	var s streamBuilder
	s.ram(qemu.RAMBlock{ID: "pc.ram", Length: benchRAM})
	page := bytes.Repeat([]byte("violin: "), qemu.PageSize/8)
	s.part(2)
	for off := uint64(0); off < benchRAM; off += qemu.PageSize {
		s.page("pc.ram", off, page)
	}
	s.partEnd()
	s.devices()
	return s
}

func BenchmarkDecode(b *testing.B) {
	raw := benchStream(b)
	b.SetBytes(int64(len(raw)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := qemu.Decode(bytes.NewReader(raw), func([]qemu.RAMBlock) (qemu.PageSink, error) { return &counter{}, nil }); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkEncode(b *testing.B) {
	sk, err := qemu.Decode(bytes.NewReader(benchStream(b)), func([]qemu.RAMBlock) (qemu.PageSink, error) { return &counter{}, nil })
	if err != nil {
		b.Fatal(err)
	}
	src := halfFull{bytes.Repeat([]byte{7}, qemu.PageSize)}
	b.SetBytes(benchRAM)
	b.ReportAllocs()
	for b.Loop() {
		if err := qemu.Encode(io.Discard, sk, src); err != nil {
			b.Fatal(err)
		}
	}
}
