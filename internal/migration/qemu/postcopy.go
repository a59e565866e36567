package qemu

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// A PostcopyWriter writes a stream in post-copy form, for a "qemu -incoming" that has
// the migration capability postcopy-ram: first the devices, with which the VM can run,
// then its pages in any order. The VM asks for those that it misses on the return
// path; see [ReturnReader].
//
// Methods are for one goroutine at a time. After an error the writer is of no use.
type PostcopyWriter struct {
	w   io.Writer
	s   *Skeleton
	buf []byte
	n   int // pages in the open section; 0 if none is open
	cur int // RAM block of the last page in the open section
}

// NewPostcopyWriter returns a writer of the stream of which s is the skeleton. Nothing
// is written yet.
func NewPostcopyWriter(w io.Writer, s *Skeleton) (*PostcopyWriter, error) {
	if len(s.head) == 0 {
		return nil, errors.New("encode post-copy stream: the skeleton is empty")
	}
	return &PostcopyWriter{w: w, s: s, buf: make([]byte, 0, 16*maxRecord)}, nil
}

// Start writes all but the pages and the end. QEMU then loads the devices, and asks
// for the pages that they touch.
func (p *PostcopyWriter) Start() error {
	// What must be loaded while pages come in is packaged, so that it is read before
	// the thread that takes pages in begins to read.
	end, err := findDescription(p.s.tail)
	if err != nil {
		return fmt.Errorf("encode post-copy stream: %w", err)
	}
	var pkg []byte
	pkg = appendCommand(pkg, cmdPostcopyListen)
	pkg = append(pkg, p.s.tail[:end]...)
	pkg = appendCommand(pkg, cmdPostcopyRun)

	var b []byte
	b = append(b, p.s.head[:p.s.ramAt]...)
	b = appendCommand(b, cmdOpenReturnPath)
	// The sum of all RAM blocks' page sizes, as bits, and the guest's page size.
	b = appendCommand(b, cmdPostcopyAdvise, PageSize, PageSize)
	b = append(b, p.s.head[p.s.ramAt:]...)
	if p.s.switchover {
		b = appendCommand(b, cmdSwitchoverStart)
	}
	// There is nothing to throw away, but without the command QEMU 7.2 forgets that it
	// listens: pages that come then would be loaded as in pre-copy, by writing to them.
	for _, blk := range p.s.Blocks {
		if blk.Length > 0 {
			b = appendDiscard(b, blk)
		}
	}
	b = append(b, secCommand)
	b = binary.BigEndian.AppendUint16(b, cmdPackaged)
	b = binary.BigEndian.AppendUint16(b, 4)
	b = binary.BigEndian.AppendUint32(b, uint32(len(pkg)))
	b = append(b, pkg...)
	return p.write(b)
}

// Ask begins to go on with a post-copy that broke, on a new connection: it asks which
// pages the VM has. [ReturnReader.Received] reads the answer for each block of some length,
// in the order of the blocks; then comes [PostcopyWriter.Resume].
func (p *PostcopyWriter) Ask() error {
	var b []byte
	for _, blk := range p.s.Blocks {
		if blk.Length > 0 {
			b = append(b, secCommand)
			b = binary.BigEndian.AppendUint16(b, cmdRecvBitmap)
			b = binary.BigEndian.AppendUint16(b, uint16(1+len(blk.ID)))
			b = append(b, byte(len(blk.ID)))
			b = append(b, blk.ID...)
		}
	}
	return p.write(b)
}

// Resume has the VM go on, which it acknowledges: see [ReturnReader.Resumed].
func (p *PostcopyWriter) Resume() error { return p.write(appendCommand(nil, cmdPostcopyResume)) }

// appendCommand appends a command with 64-bit arguments.
func appendCommand(b []byte, cmd uint16, args ...uint64) []byte {
	b = append(b, secCommand)
	b = binary.BigEndian.AppendUint16(b, cmd)
	b = binary.BigEndian.AppendUint16(b, uint16(8*len(args)))
	for _, a := range args {
		b = binary.BigEndian.AppendUint64(b, a)
	}
	return b
}

// appendDiscard appends the command to throw a whole block away.
func appendDiscard(b []byte, blk RAMBlock) []byte {
	b = append(b, secCommand)
	b = binary.BigEndian.AppendUint16(b, cmdPostcopyDiscard)
	b = binary.BigEndian.AppendUint16(b, uint16(3+len(blk.ID)+16))
	b = append(b, 0, byte(len(blk.ID))) // version, name
	b = append(b, blk.ID...)
	b = append(b, 0)
	b = binary.BigEndian.AppendUint64(b, 0)
	return binary.BigEndian.AppendUint64(b, blk.Length)
}

// Page writes a page, or with nil data one of zeros. QEMU takes each page exactly
// once. It may stay in the buffer until [PostcopyWriter.Flush].
func (p *PostcopyWriter) Page(block int, offset uint64, data []byte) error {
	if cap(p.buf)-len(p.buf) < maxRecord+32 {
		if err := p.Flush(); err != nil {
			return err
		}
	}
	rec := offset | flagPage
	if data == nil {
		rec = offset | flagZero
	}
	open := p.n > 0
	if !open {
		p.buf = append(p.buf, secPart)
		p.buf = binary.BigEndian.AppendUint32(p.buf, p.s.ramID)
	}
	if open && p.cur == block {
		p.buf = binary.BigEndian.AppendUint64(p.buf, rec|flagContinue)
	} else {
		p.buf = binary.BigEndian.AppendUint64(p.buf, rec)
		p.buf = append(p.buf, byte(len(p.s.Blocks[block].ID)))
		p.buf = append(p.buf, p.s.Blocks[block].ID...)
	}
	if data == nil {
		p.buf = append(p.buf, 0)
	} else {
		p.buf = append(p.buf, data[:PageSize]...)
	}
	p.cur = block
	if p.n++; p.n == partPages {
		p.buf = p.s.appendPartEnd(p.buf)
		p.n = 0
	}
	return nil
}

// Flush writes what is buffered.
func (p *PostcopyWriter) Flush() error { return p.write(nil) }

// End writes the end, after which QEMU says goodbye on the return path. All pages
// must have been written.
func (p *PostcopyWriter) End() error {
	if p.n > 0 {
		p.buf = p.s.appendPartEnd(p.buf)
	}
	p.buf = append(p.buf, secEnd)
	p.buf = binary.BigEndian.AppendUint32(p.buf, p.s.ramID)
	p.buf = p.s.appendPartEnd(p.buf)
	p.buf = append(p.buf, secEOF)
	return p.Flush()
}

func (p *PostcopyWriter) write(b []byte) error {
	for _, b := range [][]byte{p.buf, b} {
		if len(b) == 0 {
			continue
		}
		if _, err := p.w.Write(b); err != nil {
			return fmt.Errorf("write post-copy stream: %w", err)
		}
	}
	p.buf = p.buf[:0]
	return nil
}

// Messages on the return path (migration.h: enum mig_rp_message_type).
const (
	returnShut       = 1
	returnPong       = 2
	returnPagesNamed = 3
	returnPages      = 4
	returnReceived   = 5
	returnResumed    = 6
)

// The ends of what is sent when a post-copy goes on.
const (
	receivedEnd  = 0x0123456789abcdef
	resumedValue = 1
)

// maxReturn is the longest message that is read: a request with a block's name.
const maxReturn = 8 + 4 + 1 + 255

// A Request asks for Length bytes of a RAM block from Offset on, both multiples of
// PageSize, Length at least one page, and all of it inside the block.
type Request struct {
	Block          int // index into Skeleton.Blocks
	Offset, Length uint64
}

// A ReturnReader reads the return path of a post-copy, on which the VM asks for pages.
type ReturnReader struct {
	r      io.Reader
	off    int64
	blocks []RAMBlock
	index  map[string]int
	last   int // block of the last request, or -1
	buf    [maxReturn]byte
}

// NewReturnReader returns a reader of the return path of the VM whose RAM blocks are
// given.
func NewReturnReader(r io.Reader, blocks []RAMBlock) *ReturnReader {
	rr := &ReturnReader{r: r, blocks: blocks, index: map[string]int{}, last: -1}
	for i, b := range blocks {
		rr.index[b.ID] = i
	}
	return rr
}

// Next returns the next request; io.EOF once QEMU has everything and has said goodbye.
// Any other error is an [*Error].
func (r *ReturnReader) Next() (Request, error) {
	for {
		at := r.off
		typ, b, err := r.message()
		if err != nil {
			return Request{}, r.errorf(at, err)
		}
		switch typ {
		case returnShut:
			if len(b) != 4 {
				return Request{}, r.errorf(at, fmt.Errorf("goodbye of %d bytes", len(b)))
			}
			if status := binary.BigEndian.Uint32(b); status != 0 {
				return Request{}, r.errorf(at, fmt.Errorf("QEMU gives the migration up, with status %d", status))
			}
			return Request{}, io.EOF
		case returnPong:
			continue
		case returnPages, returnPagesNamed:
			q, err := r.request(typ, b)
			if err != nil {
				return Request{}, r.errorf(at, err)
			}
			return q, nil
		}
		return Request{}, r.errorf(at, fmt.Errorf("unknown message type %d: a QEMU newer than this program may send it", typ))
	}
}

// Received reads which pages of a block the VM has: bit n%8 of byte n/8 is set for page n.
func (r *ReturnReader) Received(block int) ([]byte, error) {
	at := r.off
	b, err := r.expect(returnReceived)
	if err != nil {
		return nil, r.errorf(at, err)
	}
	blk := r.blocks[block]
	if len(b) != 1+len(blk.ID) || string(b[1:]) != blk.ID {
		return nil, r.errorf(at, fmt.Errorf("what it has received of RAM block %q, want of %q", b, blk.ID))
	}
	var n [8]byte
	if err := r.read(n[:]); err != nil {
		return nil, r.errorf(at, err)
	}
	if got, want := binary.BigEndian.Uint64(n[:]), (blk.Pages()+63)/64*8; got != want {
		return nil, r.errorf(at, fmt.Errorf("%d bytes for the pages of RAM block %q, want %d", got, blk.ID, want))
	}
	bits := make([]byte, (blk.Pages()+63)/64*8)
	if err := r.read(bits); err != nil {
		return nil, r.errorf(at, err)
	}
	if err := r.read(n[:]); err != nil {
		return nil, r.errorf(at, err)
	}
	if binary.BigEndian.Uint64(n[:]) != receivedEnd {
		return nil, r.errorf(at, fmt.Errorf("the pages of RAM block %q end with %x", blk.ID, n))
	}
	return bits, nil
}

// Resumed reads that the VM goes on.
func (r *ReturnReader) Resumed() error {
	at := r.off
	b, err := r.expect(returnResumed)
	if err == nil && (len(b) != 4 || binary.BigEndian.Uint32(b) != resumedValue) {
		err = fmt.Errorf("QEMU does not go on: %x", b)
	}
	if err != nil {
		return r.errorf(at, err)
	}
	return nil
}

// expect reads a message of one type.
func (r *ReturnReader) expect(want uint16) ([]byte, error) {
	for {
		typ, b, err := r.message()
		switch {
		case err != nil:
			return nil, err
		case typ == want:
			return b, nil
		case typ != returnPong:
			return nil, fmt.Errorf("message type %d, want %d", typ, want)
		}
	}
}

// message reads one message. What it returns is valid until the next.
func (r *ReturnReader) message() (typ uint16, b []byte, err error) {
	var head [4]byte
	if err := r.read(head[:]); err != nil {
		return 0, nil, err
	}
	n := binary.BigEndian.Uint16(head[2:])
	if n > maxReturn {
		return 0, nil, fmt.Errorf("message of %d bytes; at most %d are read", n, maxReturn)
	}
	b = r.buf[:n]
	return binary.BigEndian.Uint16(head[:]), b, r.read(b)
}

func (r *ReturnReader) read(b []byte) error {
	n, err := io.ReadFull(r.r, b)
	r.off += int64(n)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("QEMU closed its end before it had all pages: %w", io.ErrUnexpectedEOF)
	}
	return err
}

func (r *ReturnReader) request(typ uint16, b []byte) (Request, error) {
	fixed := 12
	if typ == returnPagesNamed {
		fixed = 13
	}
	if len(b) < fixed || typ == returnPages && len(b) != fixed || typ == returnPagesNamed && len(b) != fixed+int(b[12]) {
		return Request{}, fmt.Errorf("request for pages of %d bytes", len(b))
	}
	if typ == returnPagesNamed {
		i, ok := r.index[string(b[13:])]
		if !ok {
			return Request{}, fmt.Errorf("request for pages of RAM block %q, which there is not", b[13:])
		}
		r.last = i
	}
	if r.last < 0 {
		return Request{}, errors.New("the first request for pages names no RAM block")
	}
	q := Request{Block: r.last, Offset: binary.BigEndian.Uint64(b), Length: uint64(binary.BigEndian.Uint32(b[8:]))}
	blk := r.blocks[q.Block]
	if q.Offset%PageSize != 0 || q.Length%PageSize != 0 || q.Length == 0 || q.Offset > blk.Length || q.Length > blk.Length-q.Offset {
		return Request{}, fmt.Errorf("request for %d bytes at %#x of RAM block %q, which has %d bytes", q.Length, q.Offset, blk.ID, blk.Length)
	}
	return q, nil
}

func (r *ReturnReader) errorf(at int64, err error) error {
	return &Error{Offset: at, Section: "return path", Err: err}
}
