package qmp

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"
)

// DefaultMaxLine is the longest line, in bytes, that a [Decoder] takes unless
// told otherwise. QEMU's longest reply, that of query-qmp-schema, is about
// 0.2 MiB; a guest agent's file read is as long as its caller asked for.
const DefaultMaxLine = 16 << 20

// Message is one line from the peer. Exactly one of Greeting, Event, Return and
// Error is set.
type Message struct {
	Greeting *Greeting
	Event    *Event
	Return   json.RawMessage
	Error    *Error

	// ID is the id of the command that Return or Error replies to. It is nil
	// when the peer gave none, or one that is not of this client's making.
	ID *uint64
}

// Greeting is what QEMU says first on a connection.
type Greeting struct {
	Version      Version
	Capabilities []string // such as "oob"
}

// Version is QEMU's own version.
type Version struct {
	Major, Minor, Micro int
	Package             string // the distributor's, such as "Debian 1:7.2+dfsg-7"
}

func (v Version) String() string {
	s := fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Micro)
	if v.Package != "" {
		s += " (" + v.Package + ")"
	}
	return s
}

// Event is something that happened in QEMU by itself, such as STOP or MIGRATION.
type Event struct {
	Name string

	// Timestamp is the wall clock of QEMU's host when the event was made, in
	// whole microseconds; it is zero if QEMU could not read its clock.
	Timestamp time.Time

	// Data is the event's JSON object; nil if it has none.
	Data json.RawMessage
}

// Error is QEMU's refusal of a command.
type Error struct {
	Command string // the command that was refused
	Class   string // "GenericError", "CommandNotFound", "DeviceNotFound", ...
	Desc    string // for people; not to be parsed
}

func (e *Error) Error() string {
	s := e.Desc
	if e.Class != "" && e.Class != "GenericError" {
		s = e.Class + ": " + s
	}
	if e.Command != "" {
		s = e.Command + ": " + s
	}
	return s
}

// SyntaxError is a line that is not a message. The lines after it may be.
type SyntaxError struct {
	Offset int64 // of the line's first byte, since the Decoder was made
	Reason string
}

func (e *SyntaxError) Error() string {
	return fmt.Sprintf("line at byte %d: %s", e.Offset, e.Reason)
}

// Decoder reads messages from a stream of lines. It is not safe for concurrent
// use.
type Decoder struct {
	r       *bufio.Reader
	maxLine int
	offset  int64
	line    []byte // of the last Decode; reused
}

// NewDecoder returns a decoder that refuses a line of more than maxLine bytes;
// zero means [DefaultMaxLine].
func NewDecoder(r io.Reader, maxLine int) *Decoder {
	if maxLine == 0 {
		maxLine = DefaultMaxLine
	}
	return &Decoder{r: bufio.NewReader(r), maxLine: maxLine}
}

// Decode reads the next message. Its error is a *SyntaxError if the line was
// read but is no message, and what the reader gave otherwise: io.EOF only
// between two lines. The message is the zero Message on any error.
//
// Memory grows with what was read, never with what a line claims to be.
func (d *Decoder) Decode() (Message, error) {
	for {
		start := d.offset
		line, err := d.readLine()
		if err != nil {
			return Message{}, err
		}
		line = bytes.TrimSpace(line)
		if len(line) == 0 {
			continue
		}
		m, err := parseMessage(line)
		if err != nil {
			return Message{}, &SyntaxError{Offset: start, Reason: err.Error()}
		}
		return m, nil
	}
}

// Skip discards what is read, up to and including the byte delim.
func (d *Decoder) Skip(delim byte) error {
	for {
		part, err := d.r.ReadSlice(delim)
		d.offset += int64(len(part))
		if !errors.Is(err, bufio.ErrBufferFull) {
			return err
		}
	}
}

// readLine reads up to a newline. The line is valid until the next call.
func (d *Decoder) readLine() ([]byte, error) {
	start := d.offset
	d.line = d.line[:0]
	for {
		part, err := d.r.ReadSlice('\n')
		d.offset += int64(len(part))
		if len(d.line)+len(part) > d.maxLine {
			return nil, fmt.Errorf("line at byte %d is longer than %d bytes", start, d.maxLine)
		}
		d.line = append(d.line, part...)
		switch {
		case err == nil:
			return d.line, nil
		case errors.Is(err, bufio.ErrBufferFull):
			continue
		case errors.Is(err, io.EOF) && len(d.line) > 0:
			return nil, io.ErrUnexpectedEOF
		default:
			return nil, err
		}
	}
}

// parseMessage parses one line. Nothing in the result points into line.
func parseMessage(line []byte) (Message, error) {
	var raw struct {
		QMP *struct {
			Version struct {
				QEMU struct {
					Major, Minor, Micro int
				}
				Package string
			}
			Capabilities []string
		}
		Event     *string
		Timestamp struct {
			Seconds, Microseconds int64
		}
		Data   json.RawMessage
		Return json.RawMessage
		Error  *struct {
			Class, Desc string
		}
		ID json.RawMessage
	}
	if line[0] != '{' {
		// Else json would take null for an empty message.
		return Message{}, errors.New("not a JSON object")
	}
	if err := json.Unmarshal(line, &raw); err != nil {
		return Message{}, err
	}

	var m Message
	kinds := 0
	if q := raw.QMP; q != nil {
		kinds++
		m.Greeting = &Greeting{
			Version: Version{
				Major:   q.Version.QEMU.Major,
				Minor:   q.Version.QEMU.Minor,
				Micro:   q.Version.QEMU.Micro,
				Package: q.Version.Package,
			},
			Capabilities: q.Capabilities,
		}
	}
	if raw.Event != nil {
		kinds++
		m.Event = &Event{Name: *raw.Event, Data: raw.Data}
		// QEMU sends -1 for both when it has no clock.
		if t := raw.Timestamp; t.Seconds > 0 && t.Microseconds >= 0 && t.Microseconds < 1e6 {
			m.Event.Timestamp = time.Unix(t.Seconds, t.Microseconds*1e3)
		}
	}
	if raw.Return != nil {
		kinds++
		m.Return = raw.Return
	}
	if e := raw.Error; e != nil {
		kinds++
		m.Error = &Error{Class: e.Class, Desc: e.Desc}
	}
	if kinds != 1 {
		return Message{}, fmt.Errorf("%d of greeting, event, return and error in one message, want exactly one", kinds)
	}
	var id uint64
	if raw.ID != nil && json.Unmarshal(raw.ID, &id) == nil && raw.ID[0] != 'n' {
		m.ID = &id
	}
	return m, nil
}
