package qemu_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"reflect"
	"strings"
	"testing"

	"violin/internal/migration/qemu"
)

func smallSkeleton(tb testing.TB) *qemu.Skeleton {
	tb.Helper()
	var b streamBuilder
	b.ram(qemu.RAMBlock{ID: "a", Length: 8192}, qemu.RAMBlock{ID: "none"}, qemu.RAMBlock{ID: "rom", Length: 4096})
	b.part(2)
	b.zero("a", 0)
	b.zero("a", 4096)
	b.zero("rom", 0)
	b.partEnd()
	b.devices()
	sk, err := qemu.Decode(bytes.NewReader(b), (&memory{}).open)
	if err != nil {
		tb.Fatal(err)
	}
	return sk
}

func (b *streamBuilder) command(cmd uint16, data ...byte) {
	b.u8(8)
	b.u16(cmd)
	b.u16(uint16(len(data)))
	*b = append(*b, data...)
}

// What is written is, byte for byte, what docs/migration-stream.md says.
func TestPostcopyWriter(t *testing.T) {
	var out bytes.Buffer
	w, err := qemu.NewPostcopyWriter(&out, smallSkeleton(t))
	if err != nil {
		t.Fatal(err)
	}
	page := bytes.Repeat([]byte{7}, qemu.PageSize)
	for _, step := range []func() error{
		w.Start,
		func() error { return w.Page(2, 0, page) },
		w.Flush,
		func() error { return w.Page(0, 4096, nil) },
		func() error { return w.Page(0, 0, page) },
		w.End,
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}

	var want, pkg, ram streamBuilder
	ram.ram(qemu.RAMBlock{ID: "a", Length: 8192}, qemu.RAMBlock{ID: "none"}, qemu.RAMBlock{ID: "rom", Length: 4096})
	want.header()
	header := len(want)
	want.command(1)
	want.command(3, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0x10, 0)
	want.bytes(string(ram[header:]))
	want.command(6, append([]byte("\x00\x01a\x00"), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x20, 0)...)
	want.command(6, append([]byte("\x00\x03rom\x00"), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0)...)
	pkg.command(4)
	pkg.start(4, 0, "timer", 2)
	pkg.bytes("~state~")
	pkg.footer(0)
	pkg.command(5)
	want.command(7, binary.BigEndian.AppendUint32(nil, uint32(len(pkg)))...)
	want.bytes(string(pkg))
	want.part(2)
	want.page("rom", 0, page)
	want.zero("a", 4096)
	want.u64(0 | 8 | 0x20)
	want = append(want, page...)
	want.partEnd()
	want.part(3)
	want.partEnd()
	want.u8(0)
	if !bytes.Equal(out.Bytes(), want) {
		t.Errorf("written:\n%x\nwant:\n%x", out.Bytes(), []byte(want))
	}
}

// A long stream is cut into sections, and each names its block.
func TestPostcopySections(t *testing.T) {
	var b streamBuilder
	b.ram(qemu.RAMBlock{ID: "a", Length: 1500 * qemu.PageSize})
	b.part(2)
	for n := range uint64(1500) {
		b.zero("a", n*qemu.PageSize)
	}
	b.partEnd()
	b.devices()
	sk, err := qemu.Decode(bytes.NewReader(b), (&memory{}).open)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	w, err := qemu.NewPostcopyWriter(&out, sk)
	if err != nil {
		t.Fatal(err)
	}
	var want streamBuilder
	for n := range uint64(1500) {
		if n == 0 || n == 1024 {
			if n > 0 {
				want.partEnd()
			}
			want.part(2)
			want.zero("a", n*qemu.PageSize)
		} else {
			want.u64(n*qemu.PageSize | 2 | 0x20)
			want.u8(0)
		}
		if err := w.Page(0, n*qemu.PageSize, nil); err != nil {
			t.Fatal(err)
		}
	}
	want.partEnd()
	want.part(3)
	want.partEnd()
	want.u8(0)
	if err := w.End(); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(out.Bytes(), want) {
		t.Error("the sections are not as they should be")
	}
}

func TestPostcopyWriterRefuses(t *testing.T) {
	if _, err := qemu.NewPostcopyWriter(io.Discard, &qemu.Skeleton{}); err == nil {
		t.Error("an empty skeleton was taken")
	}
	w, err := qemu.NewPostcopyWriter(broken{}, smallSkeleton(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Start(); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("written to a closed pipe: %v", err)
	}
}

type broken struct{}

func (broken) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }

func message(typ uint16, data ...byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, typ)
	b = binary.BigEndian.AppendUint16(b, uint16(len(data)))
	return append(b, data...)
}

func pagesOf(offset uint64, length uint32, name string) []byte {
	b := binary.BigEndian.AppendUint64(nil, offset)
	b = binary.BigEndian.AppendUint32(b, length)
	if name == "" {
		return message(4, b...)
	}
	b = append(b, byte(len(name)))
	return message(3, append(b, name...)...)
}

var returnBlocks = []qemu.RAMBlock{{ID: "a", Length: 8192}, {ID: "rom", Length: 4096}}

func TestReturnReader(t *testing.T) {
	raw := bytes.Join([][]byte{
		message(2, 0, 0, 0, 1),
		pagesOf(4096, 4096, "a"), pagesOf(0, 4096, ""), pagesOf(0, 4096, "rom"), pagesOf(0, 8192, "a"),
		message(1, 0, 0, 0, 0),
	}, nil)
	r := qemu.NewReturnReader(bytes.NewReader(raw), returnBlocks)
	for _, want := range []qemu.Request{{0, 4096, 4096}, {0, 0, 4096}, {1, 0, 4096}, {0, 0, 8192}} {
		got, err := r.Next()
		if err != nil || got != want {
			t.Fatalf("request %+v, error %v; want %+v", got, err, want)
		}
	}
	if _, err := r.Next(); err != io.EOF {
		t.Errorf("after the goodbye: %v", err)
	}
}

func TestReturnReaderRefuses(t *testing.T) {
	for _, tt := range []struct {
		raw  []byte
		want string
	}{
		{nil, "QEMU closed its end before it had all pages"},
		{[]byte{0, 4, 0}, "QEMU closed its end before it had all pages"},
		{pagesOf(0, 4096, "a")[:10], "QEMU closed its end before it had all pages"},
		{message(1, 0, 0, 0, 1), "gives the migration up, with status 1"},
		{message(1, 0), "goodbye of 1 bytes"},
		{message(9), "unknown message type 9"},
		{message(2, make([]byte, 300)...), "message of 300 bytes"},
		{message(4, 1, 2, 3), "request for pages of 3 bytes"},
		{message(3, make([]byte, 14)...), "request for pages of 14 bytes"},
		{pagesOf(0, 4096, ""), "names no RAM block"},
		{pagesOf(0, 4096, "b"), `RAM block "b", which there is not`},
		{pagesOf(1, 4096, "a"), "request for 4096 bytes at 0x1"},
		{pagesOf(0, 4095, "a"), "request for 4095 bytes"},
		{pagesOf(0, 0, "a"), "request for 0 bytes"},
		{pagesOf(8192, 4096, "a"), "which has 8192 bytes"},
		{pagesOf(4096, 8192, "a"), "which has 8192 bytes"},
		{pagesOf(1<<64-4096, 8192, "a"), "which has 8192 bytes"},
	} {
		q, err := qemu.NewReturnReader(bytes.NewReader(tt.raw), returnBlocks).Next()
		var e *qemu.Error
		if !errors.As(err, &e) || !strings.Contains(err.Error(), tt.want) || q != (qemu.Request{}) {
			t.Errorf("%x: %+v, %v; want %q", tt.raw, q, err, tt.want)
		}
	}
}

func FuzzReturnReader(f *testing.F) {
	f.Add(bytes.Join([][]byte{message(2, 0, 0, 0, 1), pagesOf(4096, 4096, "a"), pagesOf(0, 4096, ""), message(1, 0, 0, 0, 0)}, nil))
	f.Fuzz(func(t *testing.T, raw []byte) {
		r := qemu.NewReturnReader(bytes.NewReader(raw), returnBlocks)
		for {
			q, err := r.Next()
			if err != nil {
				if !reflect.ValueOf(q).IsZero() {
					t.Fatal("an error and a request")
				}
				return
			}
			if blk := returnBlocks[q.Block]; q.Length == 0 || q.Offset%qemu.PageSize != 0 || q.Length%qemu.PageSize != 0 || q.Offset+q.Length > blk.Length || q.Offset+q.Length < q.Offset {
				t.Fatalf("request %+v", q)
			}
		}
	})
}
