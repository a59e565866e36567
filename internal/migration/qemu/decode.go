package qemu

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"sync/atomic"
)

// DefaultMaxDeviceBytes is the default of [Decoder.MaxDeviceBytes]: 64 MiB.
// A PC with virtio devices needs some 300 KiB.
const DefaultMaxDeviceBytes = 64 << 20

// A RAMBlock is one of the guest's memories: its RAM ("pc.ram"), a ROM
// ("pc.bios"), a table that the firmware reads ("/rom@etc/acpi/tables").
type RAMBlock struct {
	ID     string // QEMU's name of the block, unique in a stream, 1 to 255 bytes
	Length uint64 // in bytes, a multiple of PageSize
}

// Pages is the number of pages of the block.
func (b RAMBlock) Pages() uint64 { return b.Length / PageSize }

// A PageSink takes the pages of a stream as they arrive: in no order, and in
// pre-copy also repeatedly, where the last call for a page holds. Both calls
// name the block by its index in the list given to open, and the page by its
// offset in bytes, a multiple of PageSize and inside the block. An error
// ends the decoding.
type PageSink interface {
	// Page takes the PageSize bytes of a page, valid only during the call.
	// They may all be zero.
	Page(block int, offset uint64, data []byte) error
	// Zero takes a page of which QEMU said that all its bytes are zero.
	Zero(block int, offset uint64) error
}

// Stats counts what a decoder has read.
type Stats struct {
	RawBytes    uint64 // bytes of the stream
	Pages       uint64 // page records with content
	ZeroPages   uint64 // page records that say "zero"
	Resent      uint64 // of both, those for a page that had been sent before
	Missing     uint64 // pages never sent; see Decoder.AllowMissing
	DeviceBytes uint64 // bytes of device state
}

// A Decoder decodes one stream. Its fields are set before Decode.
type Decoder struct {
	// MaxDeviceBytes bounds the device state, which is kept in memory.
	// Zero means DefaultMaxDeviceBytes.
	MaxDeviceBytes int
	// AllowMissing accepts a stream that never sent some page, as one with
	// free page hinting or virtio-mem does; such a page is a zero page.
	// Without it, such a stream is refused: the usual cause is pages that
	// went over connections this decoder doesn't see (multifd).
	AllowMissing bool

	r     *bufio.Reader
	off   int64  // of the next byte of r
	head  []byte // while not sealed, what has been read, for the skeleton
	seal  bool
	sk    *Skeleton
	sink  PageSink
	index map[string]int // RAM block ID to index
	sent  []coverage     // by RAM block
	last  int            // RAM block of the last page record, or -1
	// flushed: there was a multifd flush. QEMU 8.1 sends it without multifd
	// too, so it is no reason to refuse the stream as long as no page is missing.
	flushed bool
	// pageless is set for a skeleton's binary form, whose pages are elsewhere.
	pageless bool

	stats struct {
		rawBytes, pages, zeroPages, resent, missing, deviceBytes atomic.Uint64
	}
}

// readBuffer is large enough to take a socket's whole buffer in one read.
const readBuffer = 256 << 10

// NewDecoder returns a decoder of the stream in r. It reads r ahead, and
// wants the whole of it: a QEMU that has sent everything closes its end.
func NewDecoder(r io.Reader) *Decoder {
	return &Decoder{r: bufio.NewReaderSize(r, readBuffer)}
}

// Decode reads one stream from r with a default [Decoder].
func Decode(r io.Reader, open func(blocks []RAMBlock) (PageSink, error)) (*Skeleton, error) {
	return NewDecoder(r).Decode(open)
}

// Stats tells how far the decoding has come. It may be called at any time,
// from any goroutine.
func (d *Decoder) Stats() Stats {
	return Stats{
		RawBytes:    d.stats.rawBytes.Load(),
		Pages:       d.stats.pages.Load(),
		ZeroPages:   d.stats.zeroPages.Load(),
		Resent:      d.stats.resent.Load(),
		Missing:     d.stats.missing.Load(),
		DeviceBytes: d.stats.deviceBytes.Load(),
	}
}

// Decode reads the stream to its end. Once the RAM blocks are known it calls
// open, and gives every page to the sink that open returns. To cancel it,
// close the connection it reads from.
//
// An error is an [*Error] and means a nil skeleton; what the sink got by then
// is to be thrown away. The sink's and open's own errors are wrapped in it.
func (d *Decoder) Decode(open func(blocks []RAMBlock) (PageSink, error)) (*Skeleton, error) {
	d.sk = &Skeleton{}
	d.last = -1
	err := d.decode(open)
	d.stats.rawBytes.Store(uint64(d.off))
	if err != nil {
		return nil, err
	}
	return d.sk, nil
}

func (d *Decoder) decode(open func(blocks []RAMBlock) (PageSink, error)) error {
	if err := d.header(); err != nil {
		return err
	}
	if err := d.configuration(); err != nil {
		return err
	}
	if err := d.ramStart(); err != nil {
		return err
	}
	sink, err := open(d.sk.Blocks)
	if err != nil {
		return d.errorf(d.off, ramName, "open a sink for %d RAM blocks: %w", len(d.sk.Blocks), err)
	}
	d.sink = sink
	for {
		at := d.off
		typ, err := d.byte("top-level")
		if err != nil {
			return err
		}
		switch typ {
		case secPart, secEnd:
			if err := d.ramPart(at, typ); err != nil {
				return err
			}
		case secCommand:
			if err := d.command(at); err != nil {
				return err
			}
		case secFull:
			if err := d.missing(at); err != nil {
				return err
			}
			return d.devices(at)
		case secStart:
			return d.errorf(at, "top-level", "a second live section begins; only RAM is read (a disk or a device that migrates by itself, such as vfio, can't be snapshotted)")
		case secEOF:
			return d.errorf(at, "top-level", "the stream ends without any device state")
		default:
			return d.errorf(at, "top-level", "unknown section type %#02x", typ)
		}
	}
}

// errorf makes an Error; its %w operand is what Unwrap leads to.
func (d *Decoder) errorf(off int64, section, format string, args ...any) error {
	return &Error{Offset: off, Section: section, Err: fmt.Errorf(format, args...)}
}

// next returns the next n bytes of the stream, valid until the next read;
// n is at most the read buffer's size.
func (d *Decoder) next(n int, section string) ([]byte, error) {
	b, err := d.r.Peek(n)
	if err != nil {
		at := d.off
		d.off += int64(len(b))
		return nil, &Error{Offset: at, Section: section, Err: eof(err)}
	}
	if _, err := d.r.Discard(n); err != nil {
		return nil, &Error{Offset: d.off, Section: section, Err: err}
	}
	if !d.seal {
		d.head = append(d.head, b...)
	}
	d.off += int64(n)
	return b, nil
}

func (d *Decoder) byte(section string) (byte, error) {
	b, err := d.next(1, section)
	if err != nil {
		return 0, err
	}
	return b[0], nil
}

func (d *Decoder) uint16(section string) (uint16, error) {
	b, err := d.next(2, section)
	if err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint16(b), nil
}

func (d *Decoder) uint32(section string) (uint32, error) {
	b, err := d.next(4, section)
	if err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint32(b), nil
}

func (d *Decoder) uint64(section string) (uint64, error) {
	b, err := d.next(8, section)
	if err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint64(b), nil
}

// name reads a string that is preceded by its length in one byte.
// The bytes are valid until the next read.
func (d *Decoder) name(section string) ([]byte, error) {
	n, err := d.byte(section)
	if err != nil {
		return nil, err
	}
	return d.next(int(n), section)
}

func (d *Decoder) header() error {
	const section = "header"
	m, err := d.uint32(section)
	if err != nil {
		return err
	}
	if m == multifdMagic {
		return d.errorf(0, section, "a connection of multifd, which carries pages beside the stream, is not read; switch off the migration capability multifd")
	}
	if m != magic {
		return d.errorf(0, section, "magic %#08x is not QEMU's (%#08x): not a migration stream", m, magic)
	}
	v, err := d.uint32(section)
	if err != nil {
		return err
	}
	if v != streamVersion {
		return d.errorf(4, section, "stream version %d; only %d is read", v, streamVersion)
	}
	return nil
}

func (d *Decoder) configuration() error {
	const section = "configuration"
	at := d.off
	typ, err := d.byte(section)
	if err != nil {
		return err
	}
	if typ != secConfiguration {
		return d.errorf(at, section, "section type %#02x where the machine type must be told; use a machine type of QEMU 2.4 or later", typ)
	}
	n, err := d.uint32(section)
	if err != nil {
		return err
	}
	if n == 0 || n > 255 {
		return d.errorf(at, section, "machine type of %d bytes; 1 to 255 can be", n)
	}
	machine, err := d.next(int(n), section)
	if err != nil {
		return err
	}
	d.sk.Machine = string(machine)
	for {
		b, err := d.r.Peek(1)
		if err != nil {
			return d.errorf(d.off, section, "%w", eof(err))
		}
		if b[0] != secSubsection {
			return nil
		}
		if err := d.configurationSubsection(); err != nil {
			return err
		}
	}
}

func (d *Decoder) configurationSubsection() error {
	const section = "configuration"
	at := d.off
	if _, err := d.byte(section); err != nil {
		return err
	}
	b, err := d.name(section)
	if err != nil {
		return err
	}
	name := string(b)
	version, err := d.uint32(section)
	if err != nil {
		return err
	}
	if version != 1 {
		return d.errorf(at, section, "subsection %q has version %d; only 1 is read", name, version)
	}
	switch name {
	case "configuration/target-page-bits":
		bits, err := d.uint32(section)
		if err != nil {
			return err
		}
		if bits != 12 {
			return d.errorf(at, section, "guest pages of 2^%d bytes; only %d bytes are read", bits, PageSize)
		}
	case "configuration/uuid":
		if _, err := d.next(16, section); err != nil {
			return err
		}
	case "configuration/capabilities":
		n, err := d.uint32(section)
		if err != nil {
			return err
		}
		if n > 0 {
			b, err := d.name(section)
			if err != nil {
				return err
			}
			// QEMU names here only capabilities that change the format.
			return &Error{Offset: at, Section: section, Err: refusedCapability(string(b))}
		}
	default:
		return d.errorf(at, section, "unknown subsection %q: a QEMU newer than this program may send it", name)
	}
	return nil
}

// ramStart reads the section that introduces RAM, with the list of blocks.
func (d *Decoder) ramStart() error {
	at := d.off
	typ, err := d.byte(ramName)
	if err != nil {
		return err
	}
	switch typ {
	case secStart:
	case secFull:
		return d.errorf(at, "top-level", "device state ahead of the RAM section; a device that needs it (virtio-mem) can't be snapshotted")
	case secCommand:
		cmd, err := d.uint16("command")
		if err != nil {
			return err
		}
		return &Error{Offset: at, Section: "command", Err: refusedCommand(cmd)}
	default:
		return d.errorf(at, "top-level", "section type %#02x where RAM must begin", typ)
	}
	id, err := d.uint32(ramName)
	if err != nil {
		return err
	}
	b, err := d.name(ramName)
	if err != nil {
		return err
	}
	if string(b) != ramName {
		return d.errorf(at, "top-level", "live section %q ahead of RAM is not read (block and dirty-bitmap migration, vfio)", b)
	}
	instance, err := d.uint32(ramName)
	if err != nil {
		return err
	}
	version, err := d.uint32(ramName)
	if err != nil {
		return err
	}
	if instance != 0 || version != ramVersion {
		return d.errorf(at, ramName, "instance %d of version %d; only instance 0 of version %d is read", instance, version, ramVersion)
	}
	d.sk.ramID = id
	if err := d.blocks(); err != nil {
		return err
	}
	if err := d.footer(); err != nil {
		return err
	}
	d.sk.head, d.sk.ramAt = d.head[:len(d.head):len(d.head)], int(at)
	d.seal = true
	return nil
}

// blocks reads the list of RAM blocks and the end of the START section.
func (d *Decoder) blocks() error {
	at := d.off
	rec, err := d.uint64(ramName)
	if err != nil {
		return err
	}
	if rec&flagMask != flagMemSize {
		return d.errorf(at, ramName, "RAM record %#x where the list of RAM blocks must begin", rec)
	}
	total := rec &^ flagMask
	if total > maxRAM {
		return d.errorf(at, ramName, "%d bytes of RAM; at most %d are read", total, uint64(maxRAM))
	}
	d.index = map[string]int{}
	for sum := uint64(0); sum < total; {
		at := d.off
		b, err := d.name(ramName)
		if err != nil {
			return err
		}
		blk := RAMBlock{ID: string(b)}
		if blk.Length, err = d.uint64(ramName); err != nil {
			return err
		}
		_, twice := d.index[blk.ID]
		switch {
		case blk.ID == "":
			return d.errorf(at, ramName, "RAM block without a name")
		case twice:
			return d.errorf(at, ramName, "RAM block %q is listed twice", blk.ID)
		case len(d.sk.Blocks) == maxBlocks:
			return d.errorf(at, ramName, "more than %d RAM blocks", maxBlocks)
		case blk.Length%PageSize != 0:
			return d.errorf(at, ramName, "RAM block %q of %d bytes is not a multiple of %d", blk.ID, blk.Length, PageSize)
		case blk.Length > total-sum:
			return d.errorf(at, ramName, "RAM block %q of %d bytes exceeds the %d bytes of RAM that were announced; are the capabilities x-ignore-shared, mapped-ram and postcopy-ram off?", blk.ID, blk.Length, total)
		}
		sum += blk.Length
		d.index[blk.ID] = len(d.sk.Blocks)
		d.sk.Blocks = append(d.sk.Blocks, blk)
	}
	d.sent = make([]coverage, len(d.sk.Blocks))
	for {
		at = d.off
		if rec, err = d.uint64(ramName); err != nil {
			return err
		}
		switch {
		case rec == flagMultifdFlush:
			d.flushed = true
		case rec == flagEOS:
			return nil
		case rec&flagMask&^flagEOS != 0:
			return &Error{Offset: at, Section: ramName, Err: refusedFlag(rec & flagMask)}
		default:
			return d.errorf(at, ramName, "RAM record %#x where the list of RAM blocks must end", rec)
		}
	}
}

func (d *Decoder) footer() error {
	at := d.off
	b, err := d.next(5, ramName)
	if err != nil {
		return err
	}
	if b[0] != secFooter {
		return d.errorf(at, ramName, "byte %#02x where the section's footer must be; use a machine type of QEMU 2.4 or later", b[0])
	}
	if id := binary.BigEndian.Uint32(b[1:]); id != d.sk.ramID {
		return d.errorf(at, ramName, "footer of section %d in section %d", id, d.sk.ramID)
	}
	return nil
}

// ramPart reads a PART or END section, after its type.
func (d *Decoder) ramPart(at int64, typ byte) error {
	id, err := d.uint32(ramName)
	if err != nil {
		return err
	}
	if id != d.sk.ramID {
		return d.errorf(at, "top-level", "part of section %d; only RAM, section %d, is read", id, d.sk.ramID)
	}
	if d.sk.end {
		return d.errorf(at, ramName, "RAM goes on after its end")
	}
	if err := d.pages(); err != nil {
		return err
	}
	d.sk.end = typ == secEnd
	d.stats.rawBytes.Store(uint64(d.off))
	return d.footer()
}

// pages reads page records up to the end of the section's.
func (d *Decoder) pages() error {
	for {
		at := d.off
		rec, err := d.uint64(ramName)
		if err != nil {
			return err
		}
		offset := rec &^ flagMask
		switch flags := rec & flagMask; flags &^ flagContinue {
		case flagEOS:
			if rec != flagEOS {
				return d.errorf(at, ramName, "RAM record %#x is no end of a section", rec)
			}
			return nil
		case flagMultifdFlush:
			if rec != flagMultifdFlush {
				return d.errorf(at, ramName, "RAM record %#x is no flush", rec)
			}
			d.flushed = true
		case flagPage, flagZero:
			if d.pageless {
				return d.errorf(at, ramName, "a skeleton holds no pages")
			}
			if flags&flagContinue == 0 {
				b, err := d.name(ramName)
				if err != nil {
					return err
				}
				i, ok := d.index[string(b)]
				if !ok {
					return d.errorf(at, ramName, "page of RAM block %q, which was not listed", b)
				}
				d.last = i
			}
			if d.last < 0 {
				return d.errorf(at, ramName, "the first page names no RAM block")
			}
			if blk := d.sk.Blocks[d.last]; offset >= blk.Length {
				return d.errorf(at, ramName, "page at %#x of RAM block %q, which ends at %#x", offset, blk.ID, blk.Length)
			}
			if err := d.page(at, offset, flags&flagZero != 0); err != nil {
				return err
			}
		default:
			return &Error{Offset: at, Section: ramName, Err: refusedFlag(flags)}
		}
	}
}

// page reads a page record's content and passes the page on.
func (d *Decoder) page(at int64, offset uint64, zero bool) error {
	var err error
	if zero {
		var fill byte
		if fill, err = d.byte(ramName); err != nil {
			return err
		}
		if fill != 0 {
			return d.errorf(at, ramName, "page filled with %#02x; only zero is read", fill)
		}
		d.stats.zeroPages.Add(1)
		err = d.sink.Zero(d.last, offset)
	} else {
		var b []byte
		if b, err = d.next(PageSize, ramName); err != nil {
			return err
		}
		d.stats.pages.Add(1)
		err = d.sink.Page(d.last, offset, b)
	}
	if err != nil {
		return d.errorf(at, ramName, "take page at %#x of RAM block %q: %w", offset, d.sk.Blocks[d.last].ID, err)
	}
	if !d.sent[d.last].mark(offset / PageSize) {
		d.stats.resent.Add(1)
	}
	return nil
}

// command reads a command, after its type.
func (d *Decoder) command(at int64) error {
	const section = "command"
	cmd, err := d.uint16(section)
	if err != nil {
		return err
	}
	n, err := d.uint16(section)
	if err != nil {
		return err
	}
	if cmd != cmdSwitchoverStart {
		return &Error{Offset: at, Section: section, Err: refusedCommand(cmd)}
	}
	if n != 0 || d.sk.switchover || d.sk.end {
		return d.errorf(at, section, "command %d (switchover start) with %d bytes of data, or out of place", cmd, n)
	}
	d.sk.switchover = true
	return nil
}

// missing checks that every page came, once RAM is complete.
func (d *Decoder) missing(at int64) error {
	if d.pageless {
		return nil
	}
	var err error
	for i, blk := range d.sk.Blocks {
		n := blk.Pages() - d.sent[i].n
		if n == 0 {
			continue
		}
		d.stats.missing.Add(n)
		if err == nil && (!d.AllowMissing || d.flushed) {
			err = d.errorf(at, ramName, "%d of %d pages of RAM block %q were never sent; switch off the migration capability multifd, and free page hinting of a balloon", n, blk.Pages(), blk.ID)
		}
	}
	return err
}

// devices reads all the rest of the stream, after the type of the first
// device's section.
func (d *Decoder) devices(at int64) error {
	const section = "device"
	limit := d.MaxDeviceBytes
	if limit == 0 {
		limit = DefaultMaxDeviceBytes
	}
	tail := []byte{secFull}
	rest, err := io.ReadAll(io.LimitReader(d.r, int64(limit)))
	d.off += int64(len(rest))
	d.stats.deviceBytes.Store(uint64(len(rest) + 1))
	if err != nil {
		return d.errorf(d.off, section, "%w", err)
	}
	if len(rest) == limit {
		return d.errorf(at, section, "device state of more than %d bytes; raise the limit if a device really has that much", limit)
	}
	tail = append(tail, rest...)
	devices, off, err := parseDevices(tail)
	if err != nil {
		return &Error{Offset: at + int64(off), Section: section, Err: err}
	}
	d.sk.Devices, d.sk.tail = devices, tail
	return nil
}

// coverage is the set of pages of one RAM block that have been sent. It
// takes memory only for what has been seen, so that a stream that merely
// announces much RAM costs little.
type coverage struct {
	n      uint64 // members
	chunks map[uint64]*coverageChunk
	cur    *coverageChunk // the last chunk used, since pages mostly come in order
	curKey uint64
}

const chunkPages = 4096 // 16 MiB of RAM in 512 bytes

type coverageChunk [chunkPages / 64]uint64

// mark adds a page and tells whether it is new.
func (c *coverage) mark(page uint64) bool {
	key := page / chunkPages
	if c.cur == nil || c.curKey != key {
		if c.chunks == nil {
			c.chunks = map[uint64]*coverageChunk{}
		}
		ch := c.chunks[key]
		if ch == nil {
			ch = new(coverageChunk)
			c.chunks[key] = ch
		}
		c.cur, c.curKey = ch, key
	}
	word, bit := page%chunkPages/64, uint64(1)<<(page%64)
	if c.cur[word]&bit != 0 {
		return false
	}
	c.cur[word] |= bit
	c.n++
	return true
}
