package keeper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// streamBuffer is the buffer of a stream that is read to its end, in bytes.
const streamBuffer = 1 << 20

// The messages about streams: one of these and the stream's name.
const (
	opPut     = 'P' // with the reader's end of the stream and the writer's
	opRelease = 'R'
	opDrop    = 'D'
)

// Streams is an agent's connection to a keeper, about streams.
type Streams struct{ conn *net.UnixConn }

// DialStreams connects to the keeper in a directory.
func DialStreams(ctx context.Context, dir string) (*Streams, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unixpacket", filepath.Join(dir, streamSocket))
	if err != nil {
		return nil, fmt.Errorf("reach the keeper: %w", err)
	}
	return &Streams{c.(*net.UnixConn)}, nil
}

// DialSession connects to the switch through the keeper in a directory.
func DialSession(ctx context.Context, dir string) (net.Conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", filepath.Join(dir, sessionSocket))
	if err != nil {
		return nil, fmt.Errorf("reach the switch through the keeper: %w", err)
	}
	return c, nil
}

// Put has both ends of a stream kept, beside the agent's own. The writer's is closed by
// Release. There is one stream of a name.
func (s *Streams) Put(name string, reader, writer *os.File) error {
	var fds []int
	for _, f := range []*os.File{reader, writer} {
		// Not by Fd, which would make the reader wait in the kernel.
		c, err := f.SyscallConn()
		if err == nil {
			err = c.Control(func(fd uintptr) { fds = append(fds, int(fd)) })
		}
		if err != nil {
			return fmt.Errorf("have the stream of %s kept: %w", name, err)
		}
	}
	return s.tell(opPut, name, unix.UnixRights(fds...))
}

// Release says that the stream may run: it is to be read to its end if the agent that
// put it there dies, or has.
func (s *Streams) Release(name string) error { return s.tell(opRelease, name, nil) }

// Drop says that the stream is of no use any more.
func (s *Streams) Drop(name string) error { return s.tell(opDrop, name, nil) }

func (s *Streams) tell(op byte, name string, rights []byte) error {
	if _, _, err := s.conn.WriteMsgUnix(append([]byte{op}, name...), rights, nil); err != nil {
		return fmt.Errorf("tell the keeper of the stream of %s: %w", name, err)
	}
	return nil
}

// Close leaves the streams to the keeper.
func (s *Streams) Close() error { return s.conn.Close() }

// custody is what the keeper has of streams.
type custody struct {
	log *slog.Logger

	mu      sync.Mutex
	streams map[string]*stream
}

type stream struct {
	name           string
	reader, writer *os.File
	owner          *net.UnixConn // nil once it is gone
	released       bool
	draining       bool
}

func (c *custody) serve(conn *net.UnixConn) {
	defer c.orphan(conn)
	buf, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(2*4))
	for {
		n, on, flags, _, err := conn.ReadMsgUnix(buf, oob)
		if err != nil || n == 0 {
			return
		}
		files, err := received(oob[:on])
		if err == nil && flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
			err = errors.New("it was cut short")
		}
		if err == nil {
			err = c.obey(conn, buf[0], string(buf[1:n]), files)
		}
		if err != nil {
			c.log.Error("a message about a stream", "err", err)
			for _, f := range files {
				f.Close()
			}
		}
	}
}

// received are the files that came with a message.
func received(oob []byte) (files []*os.File, err error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			return files, err
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "stream"))
		}
	}
	return files, nil
}

func (c *custody) obey(conn *net.UnixConn, op byte, name string, files []*os.File) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.streams[name]
	switch {
	case op == opPut && len(files) == 2:
		if s != nil {
			c.drop(s)
		}
		c.streams[name] = &stream{name: name, reader: files[0], writer: files[1], owner: conn}
	case op == opRelease && len(files) == 0:
		if s != nil {
			s.released = true
			c.drain(s)
		}
	case op == opDrop && len(files) == 0:
		if s != nil && !s.draining { // then it goes at its end
			c.drop(s)
		}
	default:
		return fmt.Errorf("%q with %d files", op, len(files))
	}
	return nil
}

// drop forgets a stream. mu is held.
func (c *custody) drop(s *stream) {
	s.reader.Close()
	if s.writer != nil {
		s.writer.Close()
	}
	if c.streams[s.name] == s {
		delete(c.streams, s.name)
	}
}

// orphan does what there is to be done for an agent that has gone.
func (c *custody) orphan(conn *net.UnixConn) {
	conn.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.streams {
		if s.owner == conn {
			s.owner = nil
			c.drain(s)
		}
	}
}

// drain reads a stream to its end, if that is for us to do. mu is held.
func (c *custody) drain(s *stream) {
	if !s.released {
		return
	}
	if s.writer != nil {
		if s.owner == nil {
			// It was made small so that QEMU would wait.
			if err := unix.SetsockoptInt(int(s.writer.Fd()), unix.SOL_SOCKET, unix.SO_SNDBUF, streamBuffer); err != nil {
				c.log.Warn("a stream keeps its small buffer", "stream", s.name, "err", err)
			}
		}
		s.writer.Close() // or its end would not be seen
		s.writer = nil
	}
	if s.owner != nil || s.draining {
		return
	}
	s.draining = true
	c.log.Info("a stream without its agent is read to its end", "stream", s.name)
	go func() {
		n, err := io.Copy(io.Discard, s.reader)
		c.log.Info("a stream has ended", "stream", s.name, "bytes", n, "err", err)
		c.mu.Lock()
		defer c.mu.Unlock()
		c.drop(s)
	}()
}
