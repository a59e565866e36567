package qemu

import (
	"errors"
	"fmt"
	"io"
)

// Error is a stream that could not be decoded: not one of QEMU's, cut short,
// or of a kind that this package does not read.
type Error struct {
	Offset  int64  // in bytes from the start of the stream, of the item at fault
	Section string // the part of the stream it lies in, such as "ram" or "configuration"
	Err     error
}

func (e *Error) Error() string {
	return fmt.Sprintf("decode migration stream: %s section at offset %d: %v", e.Section, e.Offset, e.Err)
}

func (e *Error) Unwrap() error { return e.Err }

// eof makes the end of the input an error where more had to follow.
func eof(err error) error {
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("the stream ends here, before the migration was complete: %w", io.ErrUnexpectedEOF)
	}
	return err
}
