package openflow

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// peer is the switch at the other end of the wire. What it does is the test's to say.
type peer struct {
	t  *testing.T
	nc net.Conn
}

// newPeer returns a session, not begun, and the switch it is with.
func newPeer(t *testing.T, opts Options) (*Conn, *peer) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		if ends[i], err = net.FileConn(f); err != nil {
			t.Fatal(err)
		}
		f.Close()
		t.Cleanup(func() { ends[i].Close() })
	}
	return NewConn(ends[0], opts), &peer{t: t, nc: ends[1]}
}

// serveWith returns a session that has agreed with the switch, and is served. ended gets
// why it ended.
func serveWith(ctx context.Context, t *testing.T, opts Options) (c *Conn, p *peer, ended <-chan error) {
	t.Helper()
	c, p = newPeer(t, opts)
	var greeted sync.WaitGroup
	greeted.Go(p.greet)
	if _, err := c.Handshake(ctx); err != nil {
		t.Fatal(err)
	}
	greeted.Wait()
	end := make(chan error, 1)
	go func() { end <- c.Serve(ctx) }()
	return c, p, end
}

// raw reads one message as it is on the wire; nil at the end of the connection.
func (p *peer) raw() []byte {
	h := make([]byte, headerSize)
	if _, err := io.ReadFull(p.nc, h); err != nil {
		return nil
	}
	b := append(h, make([]byte, int(binary.BigEndian.Uint16(h[2:]))-headerSize)...)
	if _, err := io.ReadFull(p.nc, b[headerSize:]); err != nil {
		return nil
	}
	return b
}

func (p *peer) read() (uint32, Message) {
	b := p.raw()
	if b == nil {
		return 0, nil
	}
	xid, m, err := Unmarshal(b)
	if err != nil {
		p.t.Errorf("the switch cannot read: %v", err)
	}
	return xid, m
}

func (p *peer) send(xid uint32, m Message) {
	b, err := Marshal(xid, m)
	if err != nil {
		p.t.Errorf("the switch cannot write: %v", err)
		return
	}
	p.nc.Write(b) //nolint:errcheck // the test sees what comes
}

func (p *peer) greet() {
	p.send(0, &Hello{Version: Version, Versions: []uint8{4, 6}})
	p.read() // hello
	xid, _ := p.read()
	p.send(xid, &FeaturesReply{DatapathID: 7})
}

// obey answers what a switch answers, until the connection ends, unless the test's
// own answer says that it has.
func (p *peer) obey(own func(xid uint32, m Message) bool) {
	for {
		xid, m := p.read()
		if m == nil {
			return
		}
		if own(xid, m) {
			continue
		}
		switch m := m.(type) {
		case *BarrierRequest:
			p.send(xid, &BarrierReply{})
		case *EchoRequest:
			p.send(xid, &EchoReply{Data: m.Data})
		case *BundleControl:
			p.send(xid, &BundleControl{Bundle: m.Bundle, Command: m.Command + 1, Flags: m.Flags})
		}
	}
}

// waitedFor is how many answers a session waits for.
func waitedFor(c *Conn) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.pending)
}

func bound(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestHandshake(t *testing.T) {
	for _, test := range []struct {
		name  string
		peer  func(*peer)
		want  string // a pattern for the error; none for success
		early int    // messages kept for the handler
	}{
		{"agreed", (*peer).greet, "", 0},
		{"without a list of versions", func(p *peer) {
			p.send(0, &Hello{Version: Version})
			p.read()
			xid, _ := p.read()
			p.send(xid, &FeaturesReply{DatapathID: 7})
		}, "", 0},
		{"talk before the answer", func(p *peer) {
			p.send(0, &Hello{Version: Version})
			p.read()
			asked, _ := p.read()
			p.send(0, &PacketIn{Data: []byte("frame"), Length: 5})
			p.send(9, &EchoRequest{Data: []byte("alive?")})
			xid, m := p.read()
			if r, ok := m.(*EchoReply); !ok || string(r.Data) != "alive?" {
				p.t.Errorf("echo answered by %d %T", xid, m)
			}
			p.send(asked, &FeaturesReply{DatapathID: 7})
		}, "", 1},
		{"an older switch", func(p *peer) {
			p.send(0, &Hello{Version: 4, Versions: []uint8{1, 4}})
			p.read()
			_, m := p.read()
			if e, ok := m.(*ErrorMessage); !ok || e.Type != errorHelloFailed {
				p.t.Errorf("it is told %v", m)
			}
		}, "it speaks OpenFlow 1.0, OpenFlow 1.3, but OpenFlow 1.5 is needed: add OpenFlow15", 0},
		{"it refuses us", func(p *peer) {
			p.send(0, &ErrorMessage{Type: errorHelloFailed, Data: []byte("no")})
			p.read()
		}, `refused the hello: OFPHFC_INCOMPATIBLE \("no"\)`, 0},
		{"no OpenFlow", func(p *peer) {
			p.send(0, &BarrierReply{})
			p.read()
		}, "is this an OpenFlow connection", 0},
		{"gone", func(p *peer) { p.nc.Close() }, "EOF|broken pipe|reset", 0},
		{"gone in the middle of a message", func(p *peer) {
			p.nc.Write([]byte{Version, typeHello, 0, 16, 0}) //nolint:errcheck // the test sees what comes
			p.nc.Close()
		}, "unexpected EOF|broken pipe|reset", 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			c, p := newPeer(t, Options{})
			var other sync.WaitGroup
			other.Go(func() { test.peer(p) })
			features, err := c.Handshake(bound(t))
			other.Wait()
			switch {
			case test.want == "" && (err != nil || features.DatapathID != 7):
				t.Fatalf("%+v, %v", features, err)
			case test.want != "" && (err == nil || !regexp.MustCompile(test.want).MatchString(err.Error())):
				t.Fatalf("%v, want %q", err, test.want)
			}
			if len(c.early) != test.early {
				t.Errorf("%d messages kept, want %d", len(c.early), test.early)
			}
			if err != nil && c.reason() == nil {
				t.Error("the connection is left open")
			}
		})
	}
}

// A switch that says nothing must not hold its controller for ever.
func TestHandshakeCancelled(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	c, p := newPeer(t, Options{})
	go func() {
		p.read()
		cancel(errors.New("enough"))
	}()
	if _, err := c.Handshake(ctx); err == nil || !strings.Contains(err.Error(), "enough") {
		t.Errorf("%v", err)
	}
}

// What came before the session was served is the handler's first, and packet-ins keep
// the wire's order; an answer is given out only after what came before it.
func TestOrder(t *testing.T) {
	const frames = 500
	var got []int
	c, p := newPeer(t, Options{Handler: func(m Message) { got = append(got, int(m.(*PacketIn).Cookie)) }})
	go func() {
		p.send(0, &Hello{Version: Version})
		p.read()
		xid, _ := p.read()
		p.send(0, &PacketIn{Cookie: 0})
		p.send(xid, &FeaturesReply{})
		p.obey(func(xid uint32, m Message) bool {
			for n := range frames - 1 {
				p.send(xid, &PacketIn{Cookie: uint64(n) + 1}) // a switch chooses any xid
			}
			return false
		})
	}()
	ctx := bound(t)
	if _, err := c.Handshake(ctx); err != nil {
		t.Fatal(err)
	}
	go c.Serve(ctx) //nolint:errcheck // the test ends it
	if err := c.Barrier(ctx); err != nil {
		t.Fatal(err)
	}
	if len(got) != frames || !slices.IsSorted(got) {
		t.Errorf("%d packet-ins before the barrier's reply, want %d: %v", len(got), frames, got)
	}
}

// Open vSwitch takes a controller that does not answer its echo for dead; ours may be
// busy with a frame, or waiting for the switch.
func TestEchoWhileBusy(t *testing.T) {
	busy, entered := make(chan struct{}), make(chan struct{})
	_, p, _ := serveWith(bound(t), t, Options{Handler: func(Message) { close(entered); <-busy }})
	p.send(0, &PacketIn{})
	<-entered
	p.send(77, &EchoRequest{Data: []byte("alive?")})
	xid, m := p.read()
	if r, ok := m.(*EchoReply); !ok || xid != 77 || string(r.Data) != "alive?" {
		t.Errorf("answered by %d %+v", xid, m)
	}
	close(busy)
}

func TestCall(t *testing.T) {
	var stray []Message
	ctx := bound(t)
	c, p, _ := serveWith(ctx, t, Options{Handler: func(m Message) { stray = append(stray, m) }})
	go p.obey(func(xid uint32, m Message) bool {
		switch m.(type) {
		case *FlowStatsRequest: // in three parts, with other things between
			for n := range 3 {
				p.send(xid, &FlowStatsReply{More: n < 2, Flows: []FlowStats{{Cookie: uint64(2 * n)}, {Cookie: uint64(2*n + 1)}}})
				p.send(xid+1000, &EchoReply{Data: []byte("nobody asked")})
			}
		case *RoleRequest:
			p.send(xid, &ErrorMessage{Type: 11, Code: 0, Data: []byte{Version, typeRoleRequest}})
		case *DescRequest: // an answer to something else
			p.send(xid, &BarrierReply{})
		case *PacketOut:
			p.send(xid, &ErrorMessage{Type: 2, Code: 4, Data: []byte{Version, typePacketOut}})
		default:
			return false
		}
		return true
	})
	flows, err := c.FlowStats(ctx, FlowStatsRequest{Table: TableAll})
	if err != nil || len(flows) != 6 || !slices.IsSortedFunc(flows, func(a, b FlowStats) int { return int(a.Cookie) - int(b.Cookie) }) {
		t.Errorf("%+v, %v", flows, err)
	}
	var refused *ErrorMessage
	if _, err := c.Role(ctx, 2, 1); !errors.As(err, &refused) || refused.Name() != "OFPRRFC_STALE" {
		t.Errorf("role: %v", err)
	}
	if _, err := c.Desc(ctx); err == nil || !strings.Contains(err.Error(), "answered with a barrier-reply") {
		t.Errorf("desc: %v", err)
	}
	// Nobody waits for the answer to what is only sent: a refusal is the handler's,
	// before that of a barrier which follows.
	if err := c.Send(&PacketOut{Actions: []Action{Output{Port: 1 << 30}}}); err != nil {
		t.Fatal(err)
	}
	if err := c.Barrier(ctx); err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, m := range stray {
		if e, ok := m.(*ErrorMessage); ok && e.Name() == "OFPBAC_BAD_OUT_PORT" {
			n++
		}
	}
	if n != 1 || len(stray) != 4 {
		t.Errorf("the handler got %d messages, %d of them the refusal: %+v", len(stray), n, stray)
	}
	if waitedFor(c) != 0 {
		t.Errorf("%d answers are still waited for", waitedFor(c))
	}
}

// An answer that does not come ends with the caller's patience, and spoils no later one.
func TestCallCancelled(t *testing.T) {
	ctx := bound(t)
	c, p, _ := serveWith(ctx, t, Options{})
	short, cancel := context.WithCancel(ctx)
	var late uint32
	go p.obey(func(xid uint32, m Message) bool {
		switch m.(type) {
		case *EchoRequest:
			late = xid
			cancel()
		case *BarrierRequest:
			p.send(late, &EchoReply{})
			return false
		}
		return true
	})
	if err := c.Echo(short); !errors.Is(err, context.Canceled) {
		t.Errorf("echo: %v", err)
	}
	if err := c.Barrier(ctx); err != nil {
		t.Errorf("barrier: %v", err)
	}
}

// Who waits when the connection ends is told why, and so is who comes later.
func TestEnd(t *testing.T) {
	for _, test := range []struct {
		name string
		end  func(c *Conn, p *peer, cancel context.CancelFunc)
		want string
	}{
		{"the switch closes", func(_ *Conn, p *peer, _ context.CancelFunc) { p.nc.Close() }, "the switch closed it"},
		{"we close", func(c *Conn, _ *peer, _ context.CancelFunc) { c.Close() }, net.ErrClosed.Error()},
		{"the context ends", func(_ *Conn, _ *peer, cancel context.CancelFunc) { cancel() }, context.Canceled.Error()},
		{"the switch talks nonsense", func(_ *Conn, p *peer, _ context.CancelFunc) {
			p.nc.Write([]byte{Version, typePacketIn, 0, 9, 0, 0, 0, 0, 1}) //nolint:errcheck // the test sees what comes
		}, "packet-in"},
		{"a length that cannot be", func(_ *Conn, p *peer, _ context.CancelFunc) {
			p.nc.Write([]byte{Version, typePacketIn, 0, 7, 0, 0, 0, 0}) //nolint:errcheck // ditto
		}, "header: byte 2: length 7"},
		{"another version", func(_ *Conn, p *peer, _ context.CancelFunc) {
			p.nc.Write([]byte{4, typeBarrierReply, 0, 8, 0, 0, 0, 0}) //nolint:errcheck // ditto
		}, "OpenFlow 1.3"},
	} {
		t.Run(test.name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(bound(t))
			defer cancel()
			c, p, ended := serveWith(ctx, t, Options{})
			asked := make(chan error, 1)
			go func() { asked <- c.Barrier(t.Context()) }()
			p.read()
			test.end(c, p, cancel)
			for what, err := range map[string]error{"serve": <-ended, "barrier": <-asked, "send": c.Send(&EchoRequest{}), "echo": c.Echo(t.Context())} {
				if err == nil || !strings.Contains(err.Error(), test.want) {
					t.Errorf("%s: %v, want %q", what, err, test.want)
				}
			}
		})
	}
}

// A switch that has stopped reading must not fill our memory.
func TestStoppedReading(t *testing.T) {
	const limit = 1 << 20
	c, _, ended := serveWith(bound(t), t, Options{QueueBytes: limit})
	frame := make([]byte, 8000)
	for sent := 0; ; sent += len(frame) {
		if err := c.Send(&PacketOut{Data: frame}); err != nil {
			if !strings.Contains(err.Error(), "stopped reading") {
				t.Error(err)
			}
			break
		}
		if sent > 2*limit {
			t.Fatalf("%d bytes were taken though nobody reads", sent)
		}
	}
	if err := <-ended; !strings.Contains(err.Error(), "stopped reading") {
		t.Error(err)
	}
}

// A handler that does not keep up makes us stop reading at the bound, and go on when it has.
func TestBusyHandler(t *testing.T) {
	const limit, frames = 64 << 10, 2000
	busy := make(chan struct{})
	seen := 0
	ctx := bound(t)
	c, p, _ := serveWith(ctx, t, Options{QueueBytes: limit, Handler: func(Message) { <-busy; seen++ }})
	var written atomic.Int64
	stalled := make(chan struct{})
	go func() {
		for range frames {
			p.send(0, &PacketIn{Data: make([]byte, 1000)})
			written.Add(1000)
		}
		p.obey(func(uint32, Message) bool { return false })
	}()
	go func() { // it is, when what the switch has written stays the same
		defer close(stalled)
		for last := int64(-1); last != written.Load(); time.Sleep(100 * time.Millisecond) {
			last = written.Load()
		}
	}()
	<-stalled
	c.mu.Lock()
	waits := c.inBytes
	c.mu.Unlock()
	if waits > limit+0xffff || written.Load() == 1000*frames {
		t.Errorf("%d bytes wait for the handler, the limit is %d; of %d bytes, %d were written", waits, limit, 1000*frames, written.Load())
	}
	close(busy)
	if err := c.Barrier(ctx); err != nil {
		t.Fatal(err)
	}
	if seen != frames {
		t.Errorf("the handler got %d of %d", seen, frames)
	}
}

func TestBundle(t *testing.T) {
	mods := []FlowMod{{Table: 1, Priority: 7}, {Table: 2, Priority: 8}, {Table: 3, Priority: 9}}
	for _, test := range []struct {
		name    string
		refuse  func(xid uint32, m Message) (uint32, bool) // which message's xid to answer with an error
		want    string
		dropped bool // the switch is told to forget the bundle
	}{
		{"taken", func(uint32, Message) (uint32, bool) { return 0, false }, "", false},
		{"no bundles", func(xid uint32, m Message) (uint32, bool) {
			b, ok := m.(*BundleControl)
			return xid, ok && b.Command == BundleOpen
		}, "open bundle: ", true},
		{"one flow mod refused", func(xid uint32, m Message) (uint32, bool) {
			b, ok := m.(*BundleAdd)
			return xid, ok && b.Message.(*FlowMod).Table == 2
		}, "flow mod 2 of 3 (cookie=0x0, table=2", true},
		{"refused at the commit", func(xid uint32, m Message) (uint32, bool) {
			b, ok := m.(*BundleControl)
			return xid, ok && b.Command == BundleCommit
		}, "commit bundle of 3 flow mods: ", false},
		{"one flow mod refused at the commit", func(xid uint32, m Message) (uint32, bool) {
			b, ok := m.(*BundleControl)
			return xid - 2, ok && b.Command == BundleCommit // the barrier's is between them
		}, "flow mod 3 of 3 (cookie=0x0, table=3", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			ctx := bound(t)
			c, p, _ := serveWith(ctx, t, Options{})
			var commits, discards, added int
			go p.obey(func(xid uint32, m Message) bool {
				switch m := m.(type) {
				case *BundleControl:
					switch m.Command {
					case BundleCommit:
						commits++
					case BundleDiscard:
						discards++
					}
				case *BundleAdd:
					added++
				}
				to, refuse := test.refuse(xid, m)
				if refuse {
					p.send(to, &ErrorMessage{Type: 17, Code: 13, Data: []byte{Version, typeBundleAdd}})
					if to != xid { // then it says that the bundle failed
						p.send(xid, &ErrorMessage{Type: 17, Code: 13, Data: []byte{Version, typeBundleControl}})
					}
				}
				return refuse
			})
			err := c.Bundle(ctx, slices.Clone(mods))
			if berr := c.Barrier(ctx); berr != nil { // the discard has come by then
				t.Fatal(berr)
			}
			var refused *ErrorMessage
			switch {
			case test.want == "" && err != nil:
				t.Error(err)
			case test.want != "" && (!errors.As(err, &refused) || !strings.Contains(err.Error(), test.want)):
				t.Errorf("%v, want %q", err, test.want)
			}
			if test.dropped != (discards == 1) || test.dropped == (commits == 1) {
				t.Errorf("%d commits, %d discards", commits, discards)
			}
			if waitedFor(c) > discards { // the answer to a refused discard may be on its way
				t.Errorf("%d answers are still waited for", waitedFor(c))
			}
			if added != len(mods) {
				t.Errorf("%d flow mods were added", added)
			}
		})
	}
}

// Nobody knows what has become of a commit whose answer does not come.
func TestCommitUnanswered(t *testing.T) {
	ctx := bound(t)
	c, p, _ := serveWith(ctx, t, Options{})
	go p.obey(func(_ uint32, m Message) bool {
		b, ok := m.(*BundleControl)
		if ok = ok && b.Command == BundleCommit; ok {
			p.nc.Close()
		}
		return ok
	})
	err := c.Bundle(ctx, []FlowMod{{Table: 1}})
	if err == nil || !strings.Contains(err.Error(), "whether it took effect is unknown") {
		t.Error(err)
	}
}
