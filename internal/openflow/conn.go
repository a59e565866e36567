package openflow

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"
)

// Options configure a [Conn]. The zero value is usable.
type Options struct {
	// Handler gets what the switch sends of its own accord, in the order it was
	// sent: *PacketIn, *PortStatus, *FlowRemoved, *Unknown, and *ErrorMessage for a
	// message that was just sent ([Conn.Send]). It runs on [Conn.Serve]'s goroutine, so
	// it may send, but must not wait for an answer: none is given out before it
	// returns. Nil drops them.
	Handler func(Message)
	// Logger gets what no caller is told. Nil for none.
	Logger *slog.Logger
	// QueueBytes bounds, in bytes, what waits to be written, and separately what
	// has been read and waits for the handler; 0 stands for 64 MiB. A switch that
	// lets so much wait is taken for dead, and the connection ends. While the
	// handler lets so much wait nothing is read, and the switch drops packet-ins.
	QueueBytes int
}

const defaultQueueBytes = 64 << 20

// maxMultipartBytes bounds the parts of one answer, so that a peer gone mad
// cannot fill our memory: 256 MiB are two million flow entries.
const maxMultipartBytes = 256 << 20

// Conn is a controller's session with one switch: [NewConn], [Conn.Handshake],
// [Conn.Serve] in a goroutine of its own, and then the rest, from any goroutine.
type Conn struct {
	nc      net.Conn
	r       *bufio.Reader
	handler func(Message)
	log     *slog.Logger
	limit   int

	early []Message // came before the answer to the handshake; for the handler

	ended chan struct{} // closed when err is set

	mu       sync.Mutex
	change   sync.Cond // of what follows, under mu
	err      error     // why the connection ended
	xid      uint32    // the last one used
	bundle   uint32    // the last one used
	pending  map[uint32]callback
	out      net.Buffers // waits to be written
	outBytes int         // in out, and being written
	in       [][]byte    // messages that wait for dispatch
	inBytes  int         // in in, and being dispatched
	readErr  error       // why nothing more will be received
}

// callback gets a message with the xid it waits for, of size bytes, and tells
// whether it was the last. It runs on Serve's goroutine, without the lock.
type callback func(m Message, size int) (last bool)

// NewConn makes a session of a connection that the switch opened or accepted.
func NewConn(c net.Conn, opts Options) *Conn {
	if opts.Handler == nil {
		opts.Handler = func(Message) {}
	}
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	if opts.QueueBytes == 0 {
		opts.QueueBytes = defaultQueueBytes
	}
	conn := &Conn{
		nc:      c,
		r:       bufio.NewReaderSize(c, 256<<10),
		handler: opts.Handler,
		log:     opts.Logger,
		limit:   opts.QueueBytes,
		ended:   make(chan struct{}),
		pending: map[uint32]callback{},
	}
	conn.change.L = &conn.mu
	return conn
}

// Close ends the session. Who waits for an answer gets an error.
func (c *Conn) Close() error {
	c.end(net.ErrClosed)
	return nil
}

// end ends the session once; the first reason counts.
func (c *Conn) end(err error) {
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return
	}
	c.err = err
	close(c.ended)
	c.change.Broadcast()
	c.mu.Unlock()
	if err := c.nc.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		c.log.Debug("openflow: close connection", "error", err)
	}
}

// reason is why the session ended.
func (c *Conn) reason() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Handshake agrees on OpenFlow 1.5 and asks the switch who it is (§6.3.3). It comes
// before Serve. After an error the connection is closed.
func (c *Conn) Handshake(ctx context.Context) (*FeaturesReply, error) {
	stop := context.AfterFunc(ctx, func() { _ = c.nc.SetDeadline(time.Unix(1, 0)) })
	features, err := c.handshake()
	if !stop() && err == nil {
		err = context.Cause(ctx) // the deadline may have struck, and would strike later
	}
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		err = fmt.Errorf("openflow: handshake with the switch: %w", err)
		c.end(err)
		return nil, err
	}
	return features, nil
}

func (c *Conn) handshake() (*FeaturesReply, error) {
	if err := c.writeNow(&Hello{Versions: []uint8{Version}}); err != nil {
		return nil, err
	}
	m, err := c.readNow()
	if err != nil {
		return nil, err
	}
	switch m := m.(type) {
	case *ErrorMessage:
		return nil, m
	case *Hello:
		if !m.speaks(Version) {
			// Best effort: the switch logs our reason, and we tell ours.
			_ = c.writeNow(&ErrorMessage{Type: errorHelloFailed, Data: []byte("this controller speaks OpenFlow 1.5 only")})
			return nil, fmt.Errorf("it speaks %s, but OpenFlow 1.5 is needed: add OpenFlow15 to the protocols of its bridge", m.offer())
		}
	default:
		return nil, fmt.Errorf("it began with a %s message instead of hello: is this an OpenFlow connection?", messageName(m))
	}
	if err := c.writeNow(&FeaturesRequest{}); err != nil {
		return nil, err
	}
	for {
		m, err := c.readNow()
		if err != nil {
			return nil, err
		}
		switch m := m.(type) {
		case *FeaturesReply:
			return m, nil
		case *EchoRequest:
			if err := c.writeNow(&EchoReply{Data: m.Data}); err != nil {
				return nil, err
			}
		case *ErrorMessage:
			return nil, m
		default:
			c.early = append(c.early, m)
		}
	}
}

// readNow reads before Serve does.
func (c *Conn) readNow() (Message, error) {
	b, err := c.read()
	if err != nil {
		return nil, err
	}
	_, m, err := Unmarshal(b)
	return m, err
}

// writeNow writes without the queue, before Serve.
func (c *Conn) writeNow(m Message) error {
	b, err := Marshal(c.nextXID(), m)
	if err != nil {
		return err
	}
	_, err = c.nc.Write(b)
	return err
}

// Serve reads what the switch sends and writes what it is sent, until the
// connection or ctx ends; then it closes the connection and tells why. It
// answers the switch's echo requests itself.
//
// Reading waits neither for the handler nor for decoding: Open vSwitch drops
// packet-ins when more than a hundred wait for us (with the bridge's
// other_config:controller-queue-size up to 512), besides those in the socket.
func (c *Conn) Serve(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { c.end(context.Cause(ctx)) })
	defer stop()
	var loops sync.WaitGroup
	loops.Go(c.writeLoop)
	loops.Go(c.readLoop)
	c.end(c.dispatchLoop())
	loops.Wait()
	return fmt.Errorf("openflow: connection with the switch: %w", c.reason())
}

func (c *Conn) dispatchLoop() error {
	for _, m := range c.early {
		c.handler(m)
	}
	c.early = nil
	for {
		c.mu.Lock()
		for len(c.in) == 0 && c.readErr == nil && c.err == nil {
			c.change.Wait()
		}
		batch, bytes, err := c.in, c.inBytes, c.err
		if len(batch) == 0 && err == nil {
			err = c.readErr // not before all that was read is dispatched
		}
		c.in = nil
		c.mu.Unlock()
		if err != nil {
			return err
		}
		for _, b := range batch {
			if err := c.dispatch(b); err != nil {
				return err
			}
		}
		c.mu.Lock()
		c.inBytes -= bytes
		c.change.Broadcast()
		c.mu.Unlock()
	}
}

// dispatch gives a message to who waits for it.
func (c *Conn) dispatch(b []byte) error {
	xid, m, err := Unmarshal(b)
	if err != nil {
		return err
	}
	switch m.(type) {
	case *PacketIn, *PortStatus, *FlowRemoved:
		// A switch chooses the xids of these; they answer nothing.
		c.handler(m)
		return nil
	}
	c.mu.Lock()
	f := c.pending[xid]
	c.mu.Unlock()
	if f == nil {
		c.handler(m)
	} else if f(m, len(b)) {
		c.forget(xid)
	}
	return nil
}

func (c *Conn) readLoop() {
	for {
		b, err := c.read()
		if errors.Is(err, io.EOF) {
			err = errors.New("the switch closed it")
		}
		if err == nil && b[1] == typeEchoRequest { // answered even while the handler is busy
			b[1] = typeEchoReply
			if err = c.enqueue(b); err == nil {
				continue
			}
		}
		c.mu.Lock()
		if err == nil {
			c.in = append(c.in, b)
			c.inBytes += len(b)
		}
		c.readErr = err
		c.change.Broadcast()
		for c.inBytes > c.limit && c.err == nil {
			c.change.Wait()
		}
		ended := c.err != nil || c.readErr != nil
		c.mu.Unlock()
		if ended {
			return
		}
	}
}

// read reads one message, into memory of its own.
func (c *Conn) read() ([]byte, error) { return ReadRaw(c.r) }

// enqueue has bytes written, in order, by the write loop.
func (c *Conn) enqueue(messages ...[]byte) error {
	n := 0
	for _, b := range messages {
		n += len(b)
	}
	c.mu.Lock()
	err := c.err
	dead := err == nil && c.outBytes > 0 && c.outBytes+n > c.limit
	if dead {
		err = fmt.Errorf("the switch has stopped reading: %d bytes wait to be written", c.outBytes)
	}
	if err == nil {
		c.out = append(c.out, messages...)
		c.outBytes += n
		c.change.Broadcast()
	}
	c.mu.Unlock()
	if dead {
		c.end(err)
	}
	if err != nil {
		return fmt.Errorf("openflow: connection with the switch: %w", err)
	}
	return nil
}

func (c *Conn) writeLoop() {
	for {
		c.mu.Lock()
		for len(c.out) == 0 && c.err == nil {
			c.change.Wait()
		}
		batch, ended := c.out, c.err != nil
		c.out = nil
		c.mu.Unlock()
		if ended {
			return
		}
		n, err := batch.WriteTo(c.nc)
		if err != nil {
			c.end(err)
			return
		}
		c.mu.Lock()
		c.outBytes -= int(n)
		c.mu.Unlock()
	}
}

func (c *Conn) nextXID() uint32 {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.xid++
	if c.xid == 0 { // 0 is what switches use in messages of their own
		c.xid++
	}
	return c.xid
}

// expect has f called with the messages that carry the xid.
func (c *Conn) expect(xid uint32, f callback) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pending[xid] = f
}

func (c *Conn) forget(xids ...uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, xid := range xids {
		delete(c.pending, xid)
	}
}

// Send sends a message and does not wait. If the switch refuses it, the handler
// gets an *ErrorMessage. Messages are obeyed in the order they were sent.
func (c *Conn) Send(m Message) error {
	b, err := Marshal(c.nextXID(), m)
	if err != nil {
		return err
	}
	return c.enqueue(b)
}

// call sends a message and waits for its answer, all parts of it.
func (c *Conn) call(ctx context.Context, m Message) ([]Message, error) {
	xid := c.nextXID()
	b, err := Marshal(xid, m)
	if err != nil {
		return nil, err
	}
	var parts []Message
	total := 0
	done := make(chan error, 1)
	c.expect(xid, func(m Message, size int) (last bool) {
		if e, ok := m.(*ErrorMessage); ok {
			done <- e
			return true
		}
		parts = append(parts, m)
		if total += size; total > maxMultipartBytes {
			done <- fmt.Errorf("openflow: the answer is longer than %d bytes", maxMultipartBytes)
			return true
		}
		if moreParts(m) {
			return false
		}
		done <- nil
		return true
	})
	defer c.forget(xid)
	if err := c.enqueue(b); err != nil {
		return nil, err
	}
	if err := c.wait(ctx, done); err != nil {
		return nil, fmt.Errorf("%s: %w", messageName(m), err)
	}
	return parts, nil
}

func moreParts(m Message) bool {
	switch m := m.(type) {
	case *FlowStatsReply:
		return m.More
	case *PortDescReply:
		return m.More
	case *PortStatsReply:
		return m.More
	}
	return false
}

// wait waits for one result, the end of ctx, or that of the connection.
func (c *Conn) wait(ctx context.Context, done <-chan error) error {
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("openflow: wait for the switch's answer: %w", context.Cause(ctx))
	case <-c.ended:
		select {
		case err := <-done: // the answer was the last that came
			return err
		default:
		}
		return fmt.Errorf("openflow: connection with the switch: %w", c.reason())
	}
}

// Barrier returns once the switch has done everything sent before it (§7.3.7), and the
// handler has been given every error that came of it, and every packet-in that
// the switch sent until then. It is no fence for frames: a switch may send a
// frame's packet-in some time after it took the frame in.
func (c *Conn) Barrier(ctx context.Context) error {
	_, err := one[*BarrierReply](c.call(ctx, &BarrierRequest{}))
	return err
}

// Echo returns once the switch has answered, so it is alive.
func (c *Conn) Echo(ctx context.Context) error {
	_, err := one[*EchoReply](c.call(ctx, &EchoRequest{}))
	return err
}

// EnableAsync asks for every packet-in, whole and with its user data, every
// change of a port and every removed flow. Without it a switch sends some
// connections (those to a bridge's .mgmt socket) nothing, and no user data to any.
func (c *Conn) EnableAsync(ctx context.Context) error {
	for _, m := range []Message{
		&PacketInFormat{Format: PacketInNicira2},
		&SetConfig{MissSendLen: ControllerNoBuffer},
		&SetAsync{PacketIn: 0x3f, PortStatus: 0x7, FlowRemoved: 0x3f},
	} {
		if err := c.Send(m); err != nil {
			return err
		}
	}
	return c.Barrier(ctx)
}

// Role takes a role and returns the one that the connection now has.
func (c *Conn) Role(ctx context.Context, role Role, generation uint64) (*RoleReply, error) {
	return one[*RoleReply](c.call(ctx, &RoleRequest{Role: role, Generation: generation}))
}

// Desc returns the switch's description.
func (c *Conn) Desc(ctx context.Context) (*Desc, error) {
	return one[*Desc](c.call(ctx, &DescRequest{}))
}

// FlowStats returns the flow entries that the request selects, with their counters.
func (c *Conn) FlowStats(ctx context.Context, req FlowStatsRequest) ([]FlowStats, error) {
	parts, err := c.call(ctx, &req)
	return collect(parts, err, func(m *FlowStatsReply) []FlowStats { return m.Flows })
}

// AggregateStats returns the sums over the flow entries that the request selects.
func (c *Conn) AggregateStats(ctx context.Context, req FlowStatsRequest) (*AggregateStats, error) {
	return one[*AggregateStats](c.call(ctx, &AggregateStatsRequest{req}))
}

// PortDescs returns all ports' descriptions.
func (c *Conn) PortDescs(ctx context.Context) ([]PortDesc, error) {
	parts, err := c.call(ctx, &PortDescRequest{Port: PortAny})
	return collect(parts, err, func(m *PortDescReply) []PortDesc { return m.Ports })
}

// PortStats returns all ports' counters.
func (c *Conn) PortStats(ctx context.Context) ([]PortStats, error) {
	parts, err := c.call(ctx, &PortStatsRequest{Port: PortAny})
	return collect(parts, err, func(m *PortStatsReply) []PortStats { return m.Ports })
}

// one returns the only part of an answer.
func one[M Message](parts []Message, err error) (M, error) {
	var zero M
	if err != nil {
		return zero, err
	}
	m, ok := parts[0].(M)
	if !ok {
		return zero, fmt.Errorf("openflow: the switch answered with a %s message instead of %T", messageName(parts[0]), zero)
	}
	return m, nil
}

// collect joins the parts of an answer.
func collect[M Message, T any](parts []Message, err error, items func(M) []T) ([]T, error) {
	if err != nil {
		return nil, err
	}
	var all []T
	for _, p := range parts {
		m, err := one[M]([]Message{p}, nil)
		if err != nil {
			return nil, err
		}
		all = append(all, items(m)...)
	}
	return all, nil
}
