package qemu_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"violin/internal/migration/qemu"
)

func TestDecodeCaptured(t *testing.T) {
	type want struct {
		Machine string
		Blocks  []string
		Devices int
		First   qemu.Device
		Stats   qemu.Stats
	}
	for name, w := range map[string]want{
		"none-background.bin": {
			"none", []string{"ram 1048576"}, 2,
			qemu.Device{Name: "timer", Version: 2, Size: 24},
			qemu.Stats{RawBytes: 3067, ZeroPages: 256, DeviceBytes: 674},
		},
		"none-precopy.bin": {
			"none", []string{"ram 1048576"}, 2,
			qemu.Device{Name: "timer", Version: 2, Size: 24},
			qemu.Stats{RawBytes: 3085, ZeroPages: 256, DeviceBytes: 674},
		},
		"microvm-precopy.bin.gz": {
			"microvm", []string{"/rom@etc/acpi/tables 4096", "microvm.ram 1048576", "pc.bios 65536", "/rom@etc/table-loader 4096", "/rom@etc/acpi/rsdp 4096"}, 14,
			qemu.Device{Name: "timer", Version: 2, Size: 24},
			qemu.Stats{RawBytes: 574366, Pages: 135, ZeroPages: 205, Resent: 65, DeviceBytes: 18171},
		},
		"pc-background.bin.gz": {
			"pc-i440fx-7.2", []string{"/rom@etc/acpi/tables 131072", "pc.ram 1048576", "pc.rom 131072", "pc.bios 65536", "/rom@etc/table-loader 4096", "/rom@etc/acpi/rsdp 4096"}, 32,
			qemu.Device{Name: "timer", Version: 2, Size: 24},
			qemu.Stats{RawBytes: 494626, Pages: 70, ZeroPages: 268, DeviceBytes: 204636},
		},
	} {
		t.Run(name, func(t *testing.T) {
			var m memory
			d := qemu.NewDecoder(bytes.NewReader(readSeed(t, name)))
			sk, err := d.Decode(m.open)
			if err != nil {
				t.Fatal(err)
			}
			got := want{Machine: sk.Machine, Devices: len(sk.Devices), First: sk.Devices[0], Stats: d.Stats()}
			for _, b := range sk.Blocks {
				got.Blocks = append(got.Blocks, fmt.Sprintf("%s %d", b.ID, b.Length))
			}
			if diff := cmp.Diff(w, got); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
		})
	}
}

// The guest's memory is that of one instant: see testdata/guest.s. In
// pre-copy this holds only if the last of a page's records wins.
func TestDecodedMemoryIsOfOneInstant(t *testing.T) {
	for _, name := range []string{"microvm-background.bin.gz", "microvm-precopy.bin.gz", "pc-background.bin.gz", "pc-precopy.bin.gz"} {
		t.Run(name, func(t *testing.T) {
			var m memory
			if _, err := qemu.Decode(bytes.NewReader(readSeed(t, name)), m.open); err != nil {
				t.Fatal(err)
			}
			id := "pc.ram"
			if strings.HasPrefix(name, "microvm") {
				id = "microvm.ram"
			}
			checkGuest(t, m.block(t, id))
		})
	}
}

// guestCount is the i-th of the 64 counts that testdata/guest.s keeps.
func guestCount(ram []byte, i int) uint32 {
	return binary.LittleEndian.Uint32(ram[0x20000+i*qemu.PageSize:])
}

// lastCount is how far the guest has counted.
func lastCount(ram []byte) uint32 {
	last := uint32(0)
	for i := range 64 {
		last = max(last, guestCount(ram, i))
	}
	return last
}

// checkGuest checks that the guest's 64 counts are consecutive.
func checkGuest(t *testing.T, ram []byte) {
	t.Helper()
	last := lastCount(ram)
	if last < step {
		t.Fatalf("the guest has counted to %d only", last)
	}
	for i := range 64 {
		if c := guestCount(ram, i); c%64 != uint32(i) || last-c >= 64 {
			t.Errorf("page %d holds count %d, with %d the last one", i, c, last)
		}
	}
}

func TestRoundTrip(t *testing.T) {
	for _, name := range seeds {
		t.Run(name, func(t *testing.T) {
			raw := readSeed(t, name)
			var m memory
			d := qemu.NewDecoder(bytes.NewReader(raw))
			sk, err := d.Decode(m.open)
			if err != nil {
				t.Fatal(err)
			}
			b, err := sk.MarshalBinary()
			if err != nil {
				t.Fatal(err)
			}
			var kept qemu.Skeleton
			if err := kept.UnmarshalBinary(b); err != nil {
				t.Fatal(err)
			}
			var out bytes.Buffer
			if err := qemu.Encode(&out, &kept, m.source()); err != nil {
				t.Fatal(err)
			}
			// QEMU and we walk memory in the same order, so without repeats
			// even the bytes are the same.
			if d.Stats().Resent == 0 && !bytes.Equal(out.Bytes(), raw) {
				t.Errorf("the stream written again differs: %d bytes for %d", out.Len(), len(raw))
			}
			var again memory
			sk2, err := qemu.Decode(&out, again.open)
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(sk, sk2) {
				t.Errorf("skeleton %v, want %v", sk2, sk)
			}
			if !m.equal(&again) {
				t.Error("memory differs")
			}
		})
	}
}

func TestDecodeInPieces(t *testing.T) {
	raw := readSeed(t, "microvm-background.bin.gz")
	var whole, pieces memory
	sk1, err1 := qemu.Decode(bytes.NewReader(raw), whole.open)
	sk2, err2 := qemu.Decode(iotest.OneByteReader(bytes.NewReader(raw)), pieces.open)
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	if !reflect.DeepEqual(sk1, sk2) {
		t.Errorf("whole %v, pieces %v", sk1, sk2)
	}
	if !whole.equal(&pieces) {
		t.Error("memory differs")
	}
}

// Wherever a stream is cut, that is noticed.
func TestDecodeTruncated(t *testing.T) {
	raw := readSeed(t, "none-precopy.bin")
	for n := range raw {
		sk, err := qemu.Decode(bytes.NewReader(raw[:n]), func([]qemu.RAMBlock) (qemu.PageSink, error) { return &counter{}, nil })
		if sk != nil || !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("cut after %d of %d bytes: skeleton %v, error %v", n, len(raw), sk, err)
		}
		var e *qemu.Error
		if !errors.As(err, &e) || e.Offset > int64(n) {
			t.Fatalf("cut after %d bytes: error %#v", n, err)
		}
	}
}

func TestDecodeConnectionLost(t *testing.T) {
	raw := readSeed(t, "none-background.bin")
	ours, theirs := net.Pipe()
	go func() {
		_, _ = theirs.Write(raw[:1000])
		ours.Close() // as a caller does who cancels
	}()
	var m memory
	sk, err := qemu.Decode(ours, m.open)
	if sk != nil || !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("skeleton %v, error %v", sk, err)
	}
}

func TestDecodeRefuses(t *testing.T) {
	two := []qemu.RAMBlock{{ID: "a", Length: 8192}, {ID: "b", Length: 4096}}
	for _, tt := range []struct {
		name    string
		build   func(b *streamBuilder)
		section string
		offset  int64 // -1: not checked
		want    string
	}{
		{"other format", func(b *streamBuilder) { b.bytes("\x7fELF----") }, "header", 0, "not a migration stream"},
		{"a connection of multifd", func(b *streamBuilder) { b.u32(0x11223344); b.u32(1) }, "header", 0, "switch off the migration capability multifd"},
		{"version", func(b *streamBuilder) { b.bytes("QEVM"); b.u32(2) }, "header", 4, "stream version 2"},
		{"no configuration", func(b *streamBuilder) { b.bytes("QEVM"); b.u32(3); b.u8(1) }, "configuration", 8, "machine type"},
		{"machine name", func(b *streamBuilder) { b.bytes("QEVM"); b.u32(3); b.u8(7); b.u32(1 << 31) }, "configuration", 8, "2147483648 bytes"},
		{"page bits", func(b *streamBuilder) {
			b.header()
			b.u8(5)
			b.counted("configuration/target-page-bits")
			b.u32(1)
			b.u32(16)
		}, "configuration", 17, "2^16"},
		{"mapped-ram", func(b *streamBuilder) {
			b.header()
			b.u8(5)
			b.counted("configuration/capabilities")
			b.u32(1)
			b.u32(1)
			b.counted("mapped-ram")
		}, "configuration", 17, `capability "mapped-ram" lays pages out at places of their own in a file and is not read; switch it off`},
		{"configuration of a later version", func(b *streamBuilder) {
			b.header()
			b.u8(5)
			b.counted("configuration/uuid")
			b.u32(2)
		}, "configuration", 17, "version 2"},
		{"unknown configuration", func(b *streamBuilder) {
			b.header()
			b.u8(5)
			b.counted("configuration/colour")
			b.u32(1)
		}, "configuration", 17, `unknown subsection "configuration/colour"`},
		{"early device", func(b *streamBuilder) { b.header(); b.start(4, 9, "virtio-mem-early", 1) }, "top-level", 17, "virtio-mem"},
		{"return path", func(b *streamBuilder) { b.header(); b.u8(8); b.u16(1); b.u16(0) }, "command", 17, "return-path"},
		{"post-copy", func(b *streamBuilder) { b.header(); b.u8(8); b.u16(3); b.u16(16) }, "command", 17, "postcopy-ram"},
		{"unknown command", func(b *streamBuilder) { b.ram(two...); b.u8(8); b.u16(77); b.u16(0) }, "command", -1, "unknown command 77"},
		{"disk migration", func(b *streamBuilder) { b.header(); b.start(1, 1, "block", 1) }, "top-level", 17, `"block"`},
		{"RAM version", func(b *streamBuilder) { b.header(); b.start(1, 1, "ram", 5) }, "ram", 17, "version 5"},
		{"second live section", func(b *streamBuilder) { b.ram(two...); b.start(1, 3, "vfio", 1) }, "top-level", -1, "vfio"},
		{"part of another section", func(b *streamBuilder) { b.ram(two...); b.u8(2); b.u32(3) }, "top-level", -1, "section 3"},
		{"no block list", func(b *streamBuilder) { b.header(); b.start(1, 2, "ram", 4); b.u64(0x10) }, "ram", 34, "list of RAM blocks"},
		{"block twice", func(b *streamBuilder) { b.ram(two[0], two[0]) }, "ram", -1, "twice"},
		{"block without name", func(b *streamBuilder) { b.ram(qemu.RAMBlock{Length: 4096}) }, "ram", -1, "without a name"},
		{"block of half a page", func(b *streamBuilder) {
			b.header()
			b.start(1, 2, "ram", 4)
			b.u64(8192 | 4)
			b.counted("a")
			b.u64(2048)
		}, "ram", -1, "not a multiple"},
		{"x-ignore-shared", func(b *streamBuilder) { // adds an address to each block
			b.header()
			b.start(1, 2, "ram", 4)
			b.u64(8192 | 4)
			b.counted("a")
			b.u64(4096)
			b.u64(0xc0000)
			b.counted("b")
			b.u64(4096)
			b.u64(0xd0000)
		}, "ram", -1, "RAM block"},
		{"too much RAM", func(b *streamBuilder) { b.ram(qemu.RAMBlock{ID: "a", Length: 1 << 60}) }, "ram", 34, "at most"},
		{"flush of a page", func(b *streamBuilder) { b.ram(two...); b.part(2); b.u64(0x1200) }, "ram", -1, "no flush"},
		{"multifd", func(b *streamBuilder) { // QEMU 8.1 and later
			b.ram(two...)
			b.part(2)
			b.zero("b", 0)
			b.u64(0x200)
			b.partEnd()
			b.devices()
		}, "ram", -1, "switch off the migration capability multifd"},
		{"xbzrle", func(b *streamBuilder) { b.ram(two...); b.part(2); b.u64(0x40) }, "ram", -1, "xbzrle"},
		{"compress", func(b *streamBuilder) { b.ram(two...); b.part(2); b.u64(0x100) }, "ram", -1, "compress"},
		{"rdma", func(b *streamBuilder) { b.ram(two...); b.part(2); b.u64(0x80) }, "ram", -1, "RDMA"},
		{"unknown flag", func(b *streamBuilder) { b.ram(two...); b.part(2); b.u64(0x400) }, "ram", -1, "unknown flags 0x400"},
		{"page and zero", func(b *streamBuilder) { b.ram(two...); b.part(2); b.u64(0x0a) }, "ram", -1, "unknown flags 0xa"},
		{"unknown block", func(b *streamBuilder) { b.ram(two...); b.part(2); b.zero("c", 0) }, "ram", -1, `"c", which was not listed`},
		{"continue from nothing", func(b *streamBuilder) { b.ram(two...); b.part(2); b.u64(0x22); b.u8(0) }, "ram", -1, "names no RAM block"},
		{"past the end", func(b *streamBuilder) { b.ram(two...); b.part(2); b.zero("a", 8192) }, "ram", -1, "ends at 0x2000"},
		{"fill", func(b *streamBuilder) { b.ram(two...); b.part(2); b.u64(2); b.counted("a"); b.u8(0xff) }, "ram", -1, "0xff"},
		{"no footer", func(b *streamBuilder) { b.ram(two...); b.part(2); b.u64(0x10); b.u8(2); b.u32(2) }, "ram", -1, "footer"},
		{"footer of another", func(b *streamBuilder) { b.ram(two...); b.part(2); b.u64(0x10); b.footer(3) }, "ram", -1, "footer of section 3"},
		{"RAM after its end", func(b *streamBuilder) { b.ram(two...); b.part(3); b.partEnd(); b.part(2) }, "ram", -1, "after its end"},
		{"no devices", func(b *streamBuilder) { b.ram(two...); b.u8(0) }, "top-level", -1, "without any device state"},
		{"unknown section", func(b *streamBuilder) { b.ram(two...); b.u8(0x33) }, "top-level", -1, "0x33"},
		{"multifd without flushes", func(b *streamBuilder) { // QEMU 7.2: nothing but pages that don't come
			b.ram(two...)
			b.part(2)
			b.zero("b", 0)
			b.partEnd()
			b.devices()
		}, "ram", -1, `2 of 2 pages of RAM block "a" were never sent`},
		{"no description", func(b *streamBuilder) {
			b.ram()
			b.start(4, 0, "timer", 2)
			b.footer(0)
			b.u8(0)
		}, "device", -1, "suppress-vmdesc"},
		{"device missing", func(b *streamBuilder) {
			b.ram()
			b.start(4, 0, "timer", 2)
			b.footer(0)
			b.u8(0)
			b.description(`{"page_size": 4096, "devices": [{"name": "timer"}, {"name": "cpu"}]}`)
		}, "device", -1, `"timer" instance 0 has no end`},
		{"device too many", func(b *streamBuilder) {
			b.ram()
			b.start(4, 0, "timer", 2)
			b.footer(0)
			b.start(4, 1, "cpu", 2)
			b.footer(1)
			b.u8(0)
			b.description(`{"page_size": 4096, "devices": [{"name": "timer"}]}`)
		}, "device", -1, "has no end"},
		{"another device", func(b *streamBuilder) {
			b.ram()
			b.start(4, 0, "timer", 2)
			b.footer(0)
			b.u8(0)
			b.description(`{"page_size": 4096, "devices": [{"name": "timer", "instance_id": 1}]}`)
		}, "device", -1, `"timer" instance 1 must begin here`},
		{"broken description", func(b *streamBuilder) {
			b.ram()
			b.start(4, 0, "timer", 2)
			b.footer(0)
			b.u8(0)
			b.description(`{"page_size`)
		}, "device", -1, "description of the device state"},
		{"large pages", func(b *streamBuilder) {
			b.ram()
			b.start(4, 0, "timer", 2)
			b.footer(0)
			b.u8(0)
			b.description(`{"page_size": 65536, "devices": [{"name": "timer"}]}`)
		}, "device", -1, "65536"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var b streamBuilder
			tt.build(&b)
			var m memory
			sk, err := qemu.Decode(bytes.NewReader(b), m.open)
			var e *qemu.Error
			if sk != nil || !errors.As(err, &e) {
				t.Fatalf("skeleton %v, error %v", sk, err)
			}
			if e.Section != tt.section || tt.offset >= 0 && e.Offset != tt.offset || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %q: want %q in section %q at offset %d", err, tt.want, tt.section, tt.offset)
			}
			if e.Offset < 0 || e.Offset > int64(len(b)) {
				t.Errorf("offset %d of %d", e.Offset, len(b))
			}
		})
	}
}

// What QEMU 8 to 10 send in addition, and what a machine may have.
func TestDecodeAccepts(t *testing.T) {
	block := qemu.RAMBlock{ID: "a", Length: 4096}
	for _, tt := range []struct {
		name  string
		build func(b *streamBuilder)
	}{
		{"switchover start", func(b *streamBuilder) { // QEMU 10.0
			b.ram(block)
			b.part(2)
			b.zero("a", 0)
			b.partEnd()
			b.u8(8)
			b.u16(11)
			b.u16(0)
			b.part(3)
			b.partEnd()
			b.devices()
		}},
		{"flushes without multifd", func(b *streamBuilder) { // QEMU 8.1
			b.header()
			b.start(1, 2, "ram", 4)
			b.blocks(block)
			b.u64(0x200)
			b.u64(0x10)
			b.footer(2)
			b.part(2)
			b.zero("a", 0)
			b.partEnd()
			b.devices()
		}},
		{"page bits and uuid", func(b *streamBuilder) {
			b.header()
			b.u8(5)
			b.counted("configuration/target-page-bits")
			b.u32(1)
			b.u32(12)
			b.u8(5)
			b.counted("configuration/uuid")
			b.u32(1)
			b.bytes("0123456789abcdef")
			b.start(1, 2, "ram", 4)
			b.blocks(block)
			b.u64(0x10)
			b.footer(2)
			b.part(2)
			b.zero("a", 0)
			b.partEnd()
			b.devices()
		}},
		{"footers and headers within device state", func(b *streamBuilder) {
			b.ram(block)
			b.part(2)
			b.zero("a", 0)
			b.partEnd()
			b.start(4, 7, "one", 1)
			b.footer(7)
			b.start(4, 8, "other", 1)
			b.footer(7)
			b.footer(7)
			b.start(4, 8, "two", 1)
			b.footer(8)
			b.footer(8)
			b.u8(0)
			b.description(`{"page_size": 4096, "devices": [{"name": "one"}, {"name": "two"}]}`)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var b streamBuilder
			tt.build(&b)
			var m memory
			sk, err := qemu.Decode(bytes.NewReader(b), m.open)
			if err != nil {
				t.Fatal(err)
			}
			var out bytes.Buffer
			if err := qemu.Encode(&out, sk, m.source()); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(out.Bytes(), b) {
				t.Errorf("written again:\n%q\nread:\n%q", out.Bytes(), []byte(b))
			}
		})
	}
}

func TestDecodeAllowMissing(t *testing.T) {
	var b streamBuilder
	b.ram(qemu.RAMBlock{ID: "a", Length: 3 * 4096})
	b.part(2)
	b.page("a", 4096, bytes.Repeat([]byte{1}, 4096))
	b.partEnd()
	b.devices()
	var m memory
	d := qemu.NewDecoder(bytes.NewReader(b))
	d.AllowMissing = true
	if _, err := d.Decode(m.open); err != nil {
		t.Fatal(err)
	}
	if got := d.Stats(); got.Missing != 2 || got.Pages != 1 {
		t.Errorf("stats %+v", got)
	}
}

// Missing pages that multifd may have carried are never zero pages.
func TestDecodeAllowMissingNotWithMultifd(t *testing.T) {
	var b streamBuilder
	b.ram(qemu.RAMBlock{ID: "a", Length: 4096})
	b.part(2)
	b.u64(0x200)
	b.partEnd()
	b.devices()
	var m memory
	d := qemu.NewDecoder(bytes.NewReader(b))
	d.AllowMissing = true
	if sk, err := d.Decode(m.open); sk != nil || err == nil || !strings.Contains(err.Error(), "multifd") {
		t.Errorf("skeleton %v, error %v", sk, err)
	}
}

func TestDecodeDeviceLimit(t *testing.T) {
	raw := readSeed(t, "none-background.bin") // 674 bytes of device state
	for _, limit := range []int{1, 100, 673, 674, 10000} {
		var m memory
		d := qemu.NewDecoder(bytes.NewReader(raw))
		d.MaxDeviceBytes = limit
		sk, err := d.Decode(m.open)
		if ok := limit >= 674; (err == nil) != ok || (sk != nil) != ok {
			t.Errorf("limit %d: skeleton %v, error %v", limit, sk != nil, err)
		}
	}
}

type failingSink struct{ err error }

func (f failingSink) Page(int, uint64, []byte) error { return f.err }
func (f failingSink) Zero(int, uint64) error         { return f.err }

func TestDecodeSinkErrors(t *testing.T) {
	full := errors.New("disk full")
	raw := readSeed(t, "microvm-background.bin.gz")
	for name, open := range map[string]func([]qemu.RAMBlock) (qemu.PageSink, error){
		"open": func([]qemu.RAMBlock) (qemu.PageSink, error) { return nil, full },
		"page": func([]qemu.RAMBlock) (qemu.PageSink, error) { return failingSink{full}, nil },
	} {
		sk, err := qemu.Decode(bytes.NewReader(raw), open)
		if sk != nil || !errors.Is(err, full) {
			t.Errorf("%s: skeleton %v, error %v", name, sk, err)
		}
	}
}

// closesEarly is a reader that closes as soon as it has all, as QEMU does.
type closesEarly struct{ left int }

func (c *closesEarly) Write(b []byte) (int, error) {
	if c.left == 0 {
		return 0, io.ErrClosedPipe
	}
	c.left -= len(b)
	return len(b), nil
}

func TestEncodeWritesNothingAfterTheEnd(t *testing.T) {
	for _, name := range seeds {
		raw := readSeed(t, name)
		var m memory
		sk, err := qemu.Decode(bytes.NewReader(raw), m.open)
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		if err := qemu.Encode(&out, sk, m.source()); err != nil {
			t.Fatal(err)
		}
		if err := qemu.Encode(&closesEarly{out.Len()}, sk, m.source()); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

type failingSource struct{ err error }

func (f failingSource) Page(int, uint64, []byte) (bool, error) { return false, f.err }

func TestEncodeErrors(t *testing.T) {
	var m memory
	sk, err := qemu.Decode(bytes.NewReader(readSeed(t, "none-background.bin")), m.open)
	if err != nil {
		t.Fatal(err)
	}
	bad := errors.New("flipped bit")
	if err := qemu.Encode(io.Discard, sk, failingSource{bad}); !errors.Is(err, bad) || !strings.Contains(err.Error(), `page at 0x0 of RAM block "ram"`) {
		t.Errorf("failing source: %v", err)
	}
	r, w := io.Pipe()
	r.CloseWithError(bad)
	if err := qemu.Encode(w, sk, m.source()); !errors.Is(err, bad) {
		t.Errorf("failing writer: %v", err)
	}
	if err := qemu.Encode(io.Discard, &qemu.Skeleton{}, m.source()); err == nil {
		t.Error("empty skeleton: no error")
	}
	if _, err := new(qemu.Skeleton).MarshalBinary(); err == nil {
		t.Error("marshal empty skeleton: no error")
	}
}

func TestSkeletonHoldsNoPages(t *testing.T) {
	var sk qemu.Skeleton
	err := sk.UnmarshalBinary(readSeed(t, "none-background.bin"))
	if err == nil || !strings.Contains(err.Error(), "no pages") || sk.Machine != "" {
		t.Errorf("skeleton %+v, error %v", sk, err)
	}
}

// Any order and number of page records gives the memory that a plain
// execution of them gives.
func TestDecodeProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		pages := rapid.SliceOfN(rapid.IntRange(1, 5), 0, 4).Draw(t, "pages per block")
		var blocks []qemu.RAMBlock
		var want memory
		for i, n := range pages {
			blocks = append(blocks, qemu.RAMBlock{ID: fmt.Sprint("block", i), Length: uint64(n) * qemu.PageSize})
		}
		if _, err := want.open(blocks); err != nil {
			t.Fatal(err)
		}
		var b streamBuilder
		b.ram(blocks...)
		b.part(2)
		records := 0
		send := func(block int, page uint64) {
			if rapid.IntRange(0, 9).Draw(t, "new section") == 0 {
				b.partEnd()
				b.part(2)
			}
			fill := rapid.Byte().Draw(t, "fill")
			data := bytes.Repeat([]byte{fill}, qemu.PageSize)
			if fill%4 == 0 {
				data = make([]byte, qemu.PageSize)
				b.zero(blocks[block].ID, page*qemu.PageSize)
			} else {
				b.page(blocks[block].ID, page*qemu.PageSize, data)
			}
			copy(want.blocks[block][page*qemu.PageSize:], data)
			records++
		}
		total := uint64(0)
		for i, blk := range blocks {
			total += blk.Pages()
			for p := range blk.Pages() {
				for range rapid.IntRange(1, 3).Draw(t, "times") {
					send(i, p)
				}
			}
		}
		b.partEnd()
		b.devices()

		var got memory
		d := qemu.NewDecoder(bytes.NewReader(b))
		sk, err := d.Decode(got.open)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(blocks, sk.Blocks, cmpopts.EquateEmpty()); diff != "" {
			t.Fatalf("(-want +got)\n%s", diff)
		}
		if !want.equal(&got) {
			t.Fatal("memory differs")
		}
		if s := d.Stats(); s.Pages+s.ZeroPages != uint64(records) || s.Resent != uint64(records)-total {
			t.Fatalf("%d records for %d pages: %+v", records, total, s)
		}
	})
}

func FuzzDecode(f *testing.F) {
	for _, name := range smallSeeds {
		f.Add(readSeed(f, name))
	}
	// A seed with content and repeats, small enough to mutate quickly.
	var b streamBuilder
	b.ram(qemu.RAMBlock{ID: "a", Length: 8192}, qemu.RAMBlock{ID: "b", Length: 4096})
	b.part(2)
	b.page("a", 4096, bytes.Repeat([]byte{1}, 4096))
	b.zero("b", 0)
	b.partEnd()
	b.part(3)
	b.zero("a", 4096)
	b.partEnd()
	b.devices()
	f.Add([]byte(b))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var m memory
		d := qemu.NewDecoder(bytes.NewReader(raw))
		d.AllowMissing = true
		sk, err := d.Decode(m.open)
		if err != nil {
			if sk != nil {
				t.Fatal("an error and a skeleton")
			}
			return
		}
		if s := d.Stats(); s.RawBytes != uint64(len(raw)) {
			t.Fatalf("%d of %d bytes read", s.RawBytes, len(raw))
		}
		var out bytes.Buffer
		if err := qemu.Encode(&out, sk, m.source()); err != nil {
			t.Fatal(err)
		}
		var again memory
		sk2, err := qemu.Decode(&out, again.open)
		if err != nil {
			t.Fatalf("our own stream: %v", err)
		}
		if !reflect.DeepEqual(sk, sk2) || !m.equal(&again) {
			t.Fatal("round trip differs")
		}
	})
}

func FuzzSkeleton(f *testing.F) {
	for _, name := range smallSeeds {
		var m memory
		sk, err := qemu.Decode(bytes.NewReader(readSeed(f, name)), m.open)
		if err != nil {
			f.Fatal(err)
		}
		b, err := sk.MarshalBinary()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var sk, sk2 qemu.Skeleton
		if err := sk.UnmarshalBinary(b); err != nil {
			if !reflect.DeepEqual(sk, qemu.Skeleton{}) {
				t.Fatal("an error and a skeleton")
			}
			return
		}
		out, err := sk.MarshalBinary()
		if err != nil {
			t.Fatal(err)
		}
		if err := sk2.UnmarshalBinary(out); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(sk, sk2) {
			t.Fatal("round trip differs")
		}
	})
}
