package openflow

import (
	"encoding/binary"
	"fmt"
)

// Error tells where in a message something is malformed, or cannot be written.
type Error struct {
	Section string // what was being read or written, outermost first: "flow-mod: match"
	Offset  int    // in bytes from the start of the message
	Reason  string
}

func (e *Error) Error() string {
	return fmt.Sprintf("openflow: %s: byte %d: %s", e.Section, e.Offset, e.Reason)
}

// decoder reads one section of a message. The first error sticks, in the section
// and all that it is part of; from then on everything reads as zero and empty.
type decoder struct {
	b       []byte // what is left of the section
	off     int    // where b begins in the message
	section string
	err     *error // one for the whole message
}

func newDecoder(b []byte, section string) *decoder {
	return &decoder{b: b, section: section, err: new(error)}
}

func (d *decoder) ok() bool { return *d.err == nil }

// more tells whether a list goes on.
func (d *decoder) more() bool { return d.ok() && len(d.b) > 0 }

func (d *decoder) failf(format string, args ...any) {
	if d.ok() {
		*d.err = &Error{Section: d.section, Offset: d.off, Reason: fmt.Sprintf(format, args...)}
	}
	d.b = nil
}

// take returns the next n bytes, or nil after an error. It does not copy.
func (d *decoder) take(n int) []byte {
	if !d.ok() {
		d.b = nil
		return nil
	}
	if n < 0 || n > len(d.b) {
		d.failf("%d bytes wanted, %d left", n, len(d.b))
		return nil
	}
	b := d.b[:n:n]
	d.b = d.b[n:]
	d.off += n
	return b
}

func (d *decoder) skip(n int) { d.take(n) }

func (d *decoder) rest() []byte { return d.take(len(d.b)) }

// sub returns a decoder for the next n bytes, which are a section of their own.
func (d *decoder) sub(n int, section string) *decoder {
	s := &decoder{off: d.off, section: d.section + ": " + section, err: d.err}
	s.b = d.take(n)
	return s
}

func (d *decoder) u8() uint8 {
	if b := d.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (d *decoder) u16() uint16 {
	if b := d.take(2); b != nil {
		return binary.BigEndian.Uint16(b)
	}
	return 0
}

func (d *decoder) u32() uint32 {
	if b := d.take(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (d *decoder) u64() uint64 {
	if b := d.take(8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

// tlv splits off the next type:16 length:16 element whose length counts its
// four header bytes and is at least min; e reads what follows the header.
func (d *decoder) tlv(section string, min int) (typ uint16, e *decoder) {
	typ, n := d.u16(), int(d.u16())
	if d.ok() && n < min {
		d.off -= 2
		d.failf("%s length %d, at least %d wanted", section, n, min)
	}
	return typ, d.sub(n-4, section)
}

// property is tlv for a property: padding to eight bytes follows that its length does not count.
func (d *decoder) property(section string) (typ uint16, p *decoder) {
	n := len(d.b)
	typ, p = d.tlv(section, 4)
	// The padding of a last property may be missing: of no consequence to its content.
	d.skip(min(padding(n-len(d.b)), len(d.b)))
	return typ, p
}

// padding returns how many bytes are missing from n to a multiple of eight.
func padding(n int) int { return -n & 7 }

// encoder appends to a message. The first error sticks.
type encoder struct {
	b       []byte
	section string
	err     error
}

func (e *encoder) failf(format string, args ...any) {
	if e.err == nil {
		e.err = &Error{Section: e.section, Offset: len(e.b), Reason: fmt.Sprintf(format, args...)}
	}
}

func (e *encoder) u8(v uint8)     { e.b = append(e.b, v) }
func (e *encoder) u16(v uint16)   { e.b = binary.BigEndian.AppendUint16(e.b, v) }
func (e *encoder) u32(v uint32)   { e.b = binary.BigEndian.AppendUint32(e.b, v) }
func (e *encoder) u64(v uint64)   { e.b = binary.BigEndian.AppendUint64(e.b, v) }
func (e *encoder) bytes(b []byte) { e.b = append(e.b, b...) }
func (e *encoder) str(s string)   { e.b = append(e.b, s...) }
func (e *encoder) zero(n int)     { e.b = append(e.b, make([]byte, n)...) }

// pad fills up to a multiple of eight bytes, counted from start.
func (e *encoder) pad(start int) { e.zero(padding(len(e.b) - start)) }

// fixed writes s as n bytes, the last of them zero.
func (e *encoder) fixed(s string, n int) {
	if len(s) >= n {
		e.failf("%q is longer than %d bytes", s, n-1)
		s = ""
	}
	e.str(s)
	e.zero(n - len(s))
}

// length writes the 16-bit length at byte at: what was written since start.
func (e *encoder) length(at, start int) {
	n := len(e.b) - start
	if n > 0xffff {
		e.failf("%d bytes, at most 65535 fit", n)
	}
	binary.BigEndian.PutUint16(e.b[at:], uint16(n))
}

// tlv writes a type:16 length:16 element around what body writes.
func (e *encoder) tlv(typ uint16, body func()) {
	start := len(e.b)
	e.u16(typ)
	e.u16(0)
	body()
	e.length(start+2, start)
}

// property is tlv for a property.
func (e *encoder) property(typ uint16, body func()) {
	start := len(e.b)
	e.tlv(typ, body)
	e.pad(start)
}

// paddedTLV is tlv for an action or instruction, whose length counts the padding.
func (e *encoder) paddedTLV(typ uint16, body func()) {
	start := len(e.b)
	e.tlv(typ, func() { body(); e.pad(start) })
}

// in runs write with its section named in an error.
func (e *encoder) in(section string, write func()) {
	outer := e.section
	e.section += ": " + section
	write()
	e.section = outer
}
