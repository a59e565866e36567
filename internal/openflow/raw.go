package openflow

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Raw is one message as it is on the wire, for who passes messages on.
type Raw []byte

// ReadRaw reads one message, into memory of its own. Only its length was looked at.
func ReadRaw(r *bufio.Reader) (Raw, error) {
	h, err := r.Peek(headerSize)
	if err != nil {
		if len(h) > 0 && errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	size := int(binary.BigEndian.Uint16(h[2:]))
	if size < headerSize {
		return nil, &Error{Section: "header", Offset: 2, Reason: fmt.Sprintf("length %d, at least %d wanted", size, headerSize)}
	}
	b := make(Raw, size)
	if _, err = io.ReadFull(r, b); err != nil {
		return nil, err
	}
	return b, nil
}

// Is tells whether the message is of the type of m, of which no more is looked at.
func (b Raw) Is(m Message) bool { return b[1] == m.messageType() }

// XID is the message's transaction id.
func (b Raw) XID() uint32 { return binary.BigEndian.Uint32(b[4:]) }

// Echo makes the answer of an echo request, in its place.
func (b Raw) Echo() Raw {
	b[1] = typeEchoReply
	return b
}
