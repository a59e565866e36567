package keeper

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"violin/internal/coloring"
	"violin/internal/openflow"
)

// peer is one end of an OpenFlow connection, on the wire.
type peer struct {
	t *testing.T
	c net.Conn
	r *bufio.Reader
}

func newPeer(t *testing.T, c net.Conn) *peer {
	t.Helper()
	t.Cleanup(func() { c.Close() })
	p := &peer{t, c, bufio.NewReader(c)}
	if err := greet(c, p.r); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *peer) send(xid uint32, m openflow.Message) {
	p.t.Helper()
	b, err := openflow.Marshal(xid, m)
	if err == nil {
		_, err = p.c.Write(b)
	}
	if err != nil {
		p.t.Fatal(err)
	}
}

// next is the next message; it fails the test if none comes.
func (p *peer) next() (uint32, openflow.Message) {
	p.t.Helper()
	if err := p.c.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		p.t.Fatal(err)
	}
	b, err := openflow.ReadRaw(p.r)
	if err != nil {
		p.t.Fatal(err)
	}
	xid, m, err := openflow.Unmarshal(b)
	if err != nil {
		p.t.Fatal(err)
	}
	return xid, m
}

// world is a keeper between a switch, which is the test, and agents.
type world struct {
	t   *testing.T
	dir string
	sw  *peer
}

func newWorld(t *testing.T) *world {
	t.Helper()
	dir, err := os.MkdirTemp("", "keeper") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l, err := net.Listen("unix", filepath.Join(dir, "switch"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- Run(ctx, Config{Switch: filepath.Join(dir, "switch"), Dir: dir, Logger: slog.New(slog.DiscardHandler)})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err == nil {
			t.Error("a keeper ended without saying why")
		}
	})
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return &world{t, dir, newPeer(t, c)}
}

// come is an agent that comes; the switch answers the keeper's barrier.
func (w *world) come() *peer {
	w.t.Helper()
	var c net.Conn
	var err error
	for {
		if c, err = DialSession(w.t.Context(), w.dir); !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ECONNREFUSED) {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if err != nil {
		w.t.Fatal(err)
	}
	p := newPeer(w.t, c)
	for {
		xid, m := w.sw.next()
		if _, ok := m.(*openflow.BarrierRequest); ok {
			w.sw.send(xid, &openflow.BarrierReply{})
			return p
		}
	}
}

func held(kind coloring.Kind, n int) *openflow.PacketIn {
	data := fmt.Appendf(nil, "frame %d", n)
	return &openflow.PacketIn{Cookie: coloring.Cookie{Run: 1, Kind: kind, Network: 1, Port: 1}.Pack(), Data: data, Length: len(data)}
}

// frames reads packet-ins, and wants them to be these.
func (p *peer) frames(want ...int) (buffers []uint32) {
	p.t.Helper()
	for _, n := range want {
		_, m := p.next()
		in, ok := m.(*openflow.PacketIn)
		if !ok || string(in.Data) != fmt.Sprintf("frame %d", n) {
			p.t.Fatalf("%T%+v, want frame %d", m, m, n)
		}
		buffers = append(buffers, in.Buffer)
	}
	return buffers
}

func out(buffer uint32, n int) *openflow.PacketOut {
	return &openflow.PacketOut{Buffer: buffer, Actions: []openflow.Action{openflow.Output{Port: 1}}, Data: fmt.Appendf(nil, "frame %d", n)}
}

// An agent dies with frames in its hands: the next has those that were not given out,
// in their order, before those that come.
func TestFramesOutliveAgents(t *testing.T) {
	w := newWorld(t)
	a := w.come()
	for n := range 4 {
		w.sw.send(0, held(coloring.KindHold, n))
	}
	w.sw.send(0, held(coloring.KindRecord, 9))
	b := a.frames(0, 1, 2, 3, 9)
	if b[4] != 0 {
		t.Error("a copy is kept")
	}
	a.send(7, out(b[0], 0))
	a.send(8, &openflow.PacketOut{Buffer: b[2]}) // for nobody
	a.send(9, &openflow.BundleControl{Bundle: 5, Command: openflow.BundleOpen})
	if xid, m := w.sw.next(); xid != 7 || m.(*openflow.PacketOut).Buffer != 0 || string(m.(*openflow.PacketOut).Data) != "frame 0" {
		t.Errorf("the switch is told %d %T%+v", xid, m, m)
	}
	if _, m := w.sw.next(); m.(*openflow.BundleControl).Bundle != 5 {
		t.Errorf("%T%+v", m, m)
	}
	a.c.Close()
	w.sw.send(0, held(coloring.KindClosed, 4)) // while there is none
	w.sw.send(0, held(coloring.KindRecord, 5)) // of no use then

	c, err := DialSession(t.Context(), w.dir)
	if err != nil {
		t.Fatal(err)
	}
	a = newPeer(t, c)
	if _, m := w.sw.next(); m.(*openflow.BundleControl).Command != openflow.BundleDiscard || m.(*openflow.BundleControl).Bundle != 5 {
		t.Errorf("what was left half done is not discarded: %T%+v", m, m)
	}
	barrier, m := w.sw.next()
	if _, ok := m.(*openflow.BarrierRequest); !ok {
		t.Fatalf("%T%+v", m, m)
	}
	w.sw.send(9, &openflow.BundleControl{Bundle: 5, Command: openflow.BundleOpenReply}) // an answer for the dead
	w.sw.send(0, held(coloring.KindClosed, 6))
	w.sw.send(barrier, &openflow.BarrierReply{})
	w.sw.send(0, held(coloring.KindClosed, 7))
	again := a.frames(1, 3, 4, 6, 7)
	if again[0] != b[1] || again[1] != b[3] {
		t.Errorf("frames have buffers %v, and had %v", again, b)
	}
	for i, n := range []int{1, 3, 4, 6, 7} {
		a.send(0, out(again[i], n))
		if _, m := w.sw.next(); string(m.(*openflow.PacketOut).Data) != fmt.Sprintf("frame %d", n) {
			t.Errorf("%T%+v", m, m)
		}
	}
	// Nothing is left for a third.
	a.c.Close()
	a = w.come()
	w.sw.send(0, held(coloring.KindHold, 8))
	a.frames(8)
}

// What is not for the keeper goes to and fro unchanged.
func TestPasses(t *testing.T) {
	w := newWorld(t)
	a := w.come()
	w.sw.send(3, &openflow.EchoRequest{Data: []byte("x")})
	if xid, m := w.sw.next(); xid != 3 || string(m.(*openflow.EchoReply).Data) != "x" {
		t.Errorf("%d %T%+v", xid, m, m)
	}
	a.send(4, &openflow.EchoRequest{Data: []byte("y")})
	if xid, m := w.sw.next(); xid != 4 || string(m.(*openflow.EchoRequest).Data) != "y" {
		t.Errorf("%d %T%+v", xid, m, m)
	}
	w.sw.send(4, &openflow.EchoReply{Data: []byte("y")})
	if xid, m := a.next(); xid != 4 || string(m.(*openflow.EchoReply).Data) != "y" {
		t.Errorf("%d %T%+v", xid, m, m)
	}
	// A frame under a number that is not known, as of a keeper before this one.
	a.send(5, out(77, 1))
	if _, m := w.sw.next(); m.(*openflow.PacketOut).Buffer != 0 || string(m.(*openflow.PacketOut).Data) != "frame 1" {
		t.Errorf("%T%+v", m, m)
	}
}

func TestStreams(t *testing.T) {
	w := newWorld(t)
	w.come()
	dial := func() *Streams {
		s, err := DialStreams(t.Context(), w.dir)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		return s
	}
	// put has the ends of a stream kept, of which the writer's is with a VM besides.
	put := func(s *Streams, name string) (vm *os.File) {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		reader, writer := os.NewFile(uintptr(fds[0]), "r"), os.NewFile(uintptr(fds[1]), "w")
		if err := s.Put(name, reader, writer); err != nil {
			t.Fatal(err)
		}
		reader.Close()
		t.Cleanup(func() { writer.Close() })
		return writer
	}
	first := dial()
	running, armed := put(first, "running"), put(first, "armed")
	if err := first.Release("running"); err != nil {
		t.Fatal(err)
	}
	first.Close()
	// More than fits any buffer: somebody reads.
	_ = running.SetWriteDeadline(time.Now().Add(time.Minute))
	if n, err := running.Write(make([]byte, 32<<20)); err != nil {
		t.Errorf("a stream that runs was not read to its end: %d bytes, %v", n, err)
	}
	_ = armed.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
	if n, err := armed.Write(make([]byte, 32<<20)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a stream that has not been let go was read: %d bytes, %v", n, err)
	}
	second := dial()
	if err := second.Release("armed"); err != nil {
		t.Fatal(err)
	}
	_ = armed.SetWriteDeadline(time.Now().Add(time.Minute))
	if n, err := armed.Write(make([]byte, 32<<20)); err != nil {
		t.Errorf("a stream that was let go by another agent was not read: %d bytes, %v", n, err)
	}
	// One whose agent lives is its own, and one that was dropped is nobody's.
	own := put(second, "own")
	if err := errors.Join(second.Release("own"), second.Drop("own")); err != nil {
		t.Fatal(err)
	}
	_ = own.SetWriteDeadline(time.Now().Add(time.Minute))
	if _, err := io.Copy(own, zeros{}); !errors.Is(err, unix.EPIPE) {
		t.Errorf("a stream that nobody has any more: %v", err)
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { return len(b), nil }

// BenchmarkBarrier is what the keeper adds to an exchange with the switch, a barrier's: twice
// the way through it.
func BenchmarkBarrier(b *testing.B) {
	echo := func(c net.Conn, r *bufio.Reader) {
		for {
			m, err := openflow.ReadRaw(r)
			if err != nil {
				return
			}
			reply, err := openflow.Marshal(m.XID(), &openflow.BarrierReply{})
			if err == nil {
				_, err = c.Write(reply)
			}
			if err != nil {
				return
			}
		}
	}
	dir := b.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, "switch"))
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				r := bufio.NewReader(c)
				if greet(c, r) == nil {
					echo(c, r)
				}
			}()
		}
	}()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- Run(ctx, Config{Switch: filepath.Join(dir, "switch"), Dir: dir, Logger: slog.New(slog.DiscardHandler)})
	}()
	defer func() { cancel(); <-done }()
	for _, way := range []string{"direct", "kept"} {
		b.Run(way, func(b *testing.B) {
			dial := func() (net.Conn, error) { return DialSession(b.Context(), dir) }
			if way == "direct" {
				dial = func() (net.Conn, error) { return net.Dial("unix", filepath.Join(dir, "switch")) }
			}
			c, err := dial()
			for ; err != nil; c, err = dial() {
				time.Sleep(time.Millisecond)
			}
			defer c.Close()
			r := bufio.NewReader(c)
			if err := greet(c, r); err != nil {
				b.Fatal(err)
			}
			request, err := openflow.Marshal(1, &openflow.BarrierRequest{})
			if err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				if _, err := c.Write(request); err != nil {
					b.Fatal(err)
				}
				if _, err := openflow.ReadRaw(r); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
