package qemu

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// A PageSource gives the pages of a node. [Encode] asks for every page of
// every block once, blocks in order and offsets ascending, so a source may
// read ahead.
type PageSource interface {
	// Page fills buf, of PageSize bytes, with the page at offset bytes of
	// the block, which is an index into Skeleton.Blocks, and tells instead
	// whether the page is all zero; then buf need not be filled.
	Page(block int, offset uint64, buf []byte) (zero bool, err error)
}

// partPages is how many pages go into one section: few enough that QEMU
// reads sections as it writes them.
const partPages = 1024

// maxRecord is the largest page record in bytes: the record, the block's
// name, the page.
const maxRecord = 8 + 1 + 255 + PageSize

// Encode writes the stream of which s is the skeleton and src has the pages,
// for "qemu -incoming" to read. Every page is sent, zero pages too, as the
// restoring QEMU's own memory need not be zero (its ROMs are not). To cancel
// it, close the connection it writes to.
func Encode(w io.Writer, s *Skeleton, src PageSource) error {
	if len(s.head) == 0 {
		return errors.New("encode migration stream: the skeleton is empty")
	}
	e := &encoder{w: w, buf: make([]byte, 0, 256<<10), s: s}
	if err := e.encode(src); err != nil {
		return fmt.Errorf("encode migration stream: %w", err)
	}
	return nil
}

type encoder struct {
	w   io.Writer
	buf []byte
	s   *Skeleton
}

func (e *encoder) encode(src PageSource) error {
	if err := e.write(e.s.head); err != nil {
		return err
	}
	n := 0 // pages in the open section
	for i, blk := range e.s.Blocks {
		named := false // whether this section has named the block
		for off := uint64(0); off < blk.Length; off += PageSize {
			if cap(e.buf)-len(e.buf) < maxRecord+32 {
				if err := e.flush(); err != nil {
					return err
				}
			}
			if n == 0 {
				e.buf = append(e.buf, secPart)
				e.buf = binary.BigEndian.AppendUint32(e.buf, e.s.ramID)
				named = false
			}
			name := blk.ID
			if named {
				name = ""
			}
			var err error
			if e.buf, err = appendPage(e.buf, src, i, off, name); err != nil {
				return fmt.Errorf("page at %#x of RAM block %q: %w", off, blk.ID, err)
			}
			named = true
			if n++; n == partPages {
				e.buf = e.s.appendPartEnd(e.buf)
				n = 0
			}
		}
	}
	if n > 0 {
		e.buf = e.s.appendPartEnd(e.buf)
	}
	e.buf = e.s.appendRAMEnd(e.buf)
	return e.write(e.s.tail)
}

// appendPage appends a page's record, with the name of its block unless that
// is empty. The page is read right into its place; buf must have room.
func appendPage(buf []byte, src PageSource, block int, off uint64, name string) ([]byte, error) {
	at := len(buf)
	buf = append(buf, 0, 0, 0, 0, 0, 0, 0, 0)
	rec := off
	if name == "" {
		rec |= flagContinue
	} else {
		buf = append(buf, byte(len(name)))
		buf = append(buf, name...)
	}
	n := len(buf)
	buf = buf[:n+PageSize]
	zero, err := src.Page(block, off, buf[n:])
	if err != nil {
		return nil, err
	}
	if zero {
		rec |= flagZero
		buf[n] = 0
		buf = buf[:n+1]
	} else {
		rec |= flagPage
	}
	binary.BigEndian.PutUint64(buf[at:], rec)
	return buf, nil
}

// write writes b behind what is buffered.
func (e *encoder) write(b []byte) error {
	if err := e.flush(); err != nil {
		return err
	}
	_, err := e.w.Write(b)
	return err
}

// flush writes what is buffered; nothing at all if that is empty, since
// QEMU closes its end as soon as it has read the last byte.
func (e *encoder) flush() error {
	if len(e.buf) == 0 {
		return nil
	}
	_, err := e.w.Write(e.buf)
	e.buf = e.buf[:0]
	return err
}
