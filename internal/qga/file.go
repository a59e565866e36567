package qga

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"
)

// chunk is how much of a file one command carries, in bytes. In base64 it is a
// line far below what either side refuses, and holds up other commands briefly.
const chunk = 256 << 10

// ReadFile copies a file of the guest to w and returns its length so far.
func (c *Client) ReadFile(ctx context.Context, path string, w io.Writer) (n int64, err error) {
	f, err := c.open(ctx, path, "rb")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.close(ctx)) }()
	for {
		var part struct {
			Data []byte `json:"buf-b64"`
			EOF  bool
		}
		if err := c.Execute(ctx, "guest-file-read", map[string]int64{"handle": f.handle, "count": chunk}, &part); err != nil {
			return n, fmt.Errorf("read %q in the guest: %w", path, err)
		}
		m, err := w.Write(part.Data)
		n += int64(m)
		if err != nil {
			return n, fmt.Errorf("copy %q of the guest: %w", path, err)
		}
		if part.EOF {
			return n, nil
		}
		if len(part.Data) == 0 {
			return n, fmt.Errorf("read %q in the guest: %w after %d bytes", path, io.ErrNoProgress, n)
		}
	}
}

// WriteFile makes a file of the guest, or replaces its content, from r and
// returns how much was written. The file has the agent's default mode.
func (c *Client) WriteFile(ctx context.Context, path string, r io.Reader) (n int64, err error) {
	f, err := c.open(ctx, path, "wb")
	if err != nil {
		return 0, err
	}
	// The agent buffers: only closing tells that all was written.
	defer func() { err = errors.Join(err, f.close(ctx)) }()
	buf := make([]byte, chunk)
	for {
		m, rerr := io.ReadFull(r, buf)
		for part := buf[:m]; len(part) > 0; {
			var written struct{ Count int }
			err := c.Execute(ctx, "guest-file-write", struct {
				Handle int64  `json:"handle"`
				Data   []byte `json:"buf-b64"`
			}{f.handle, part}, &written)
			if err == nil && (written.Count <= 0 || written.Count > len(part)) {
				err = fmt.Errorf("%w: the agent wrote %d of %d bytes", io.ErrShortWrite, written.Count, len(part))
			}
			if err != nil {
				return n, fmt.Errorf("write %q in the guest: %w", path, err)
			}
			n += int64(written.Count)
			part = part[written.Count:]
		}
		switch {
		case errors.Is(rerr, io.EOF), errors.Is(rerr, io.ErrUnexpectedEOF):
			return n, nil
		case rerr != nil:
			return n, fmt.Errorf("copy to %q of the guest: %w", path, rerr)
		}
	}
}

// file is open in the guest. The agent keeps it open for ever if it is not closed.
type file struct {
	c      *Client
	path   string
	handle int64
}

func (c *Client) open(ctx context.Context, path, mode string) (file, error) {
	f := file{c: c, path: path}
	if err := c.Execute(ctx, "guest-file-open", map[string]string{"path": path, "mode": mode}, &f.handle); err != nil {
		return file{}, fmt.Errorf("open %q in the guest: %w", path, err)
	}
	return f, nil
}

// close closes the file, also when ctx has ended, though it doesn't wait long then.
func (f file) close(ctx context.Context) error {
	if ctx.Err() != nil {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
	}
	if err := f.c.Execute(ctx, "guest-file-close", map[string]int64{"handle": f.handle}, nil); err != nil {
		return fmt.Errorf("close %q in the guest: %w", f.path, err)
	}
	return nil
}
