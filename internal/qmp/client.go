package qmp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// ErrDisconnected is in the error of whatever was waiting, or is asked for
// later, when the connection has ended: for a VM it means that its QEMU exited
// or crashed (its log and exit status say why), or that the client was closed.
var ErrDisconnected = errors.New("the monitor connection has ended")

// ErrLagged ends a [Subscription] whose buffer was full.
var ErrLagged = errors.New("events came faster than they were taken")

// Client is a session with one QEMU. Its methods are safe for concurrent use.
type Client struct {
	conn     *net.UnixConn
	name     string // of the socket, for errors
	greeting Greeting

	writes chan outgoing // to the writer; unbuffered
	done   chan struct{} // closed with the session, after err is set

	mu      sync.Mutex
	lastID  uint64
	pending map[uint64]chan Message
	subs    map[*Subscription]struct{}
	err     error // why the session ended, without what and where
}

// Dial connects to the monitor at the unix socket path and negotiates. The
// context bounds the dialling only.
//
// To need no polling for a socket that QEMU has yet to make, listen on it
// beforehand and hand QEMU the listener
// (-chardev socket,id=qmp,fd=3,server=on,wait=off -mon chardev=qmp,mode=control).
func Dial(ctx context.Context, path string) (*Client, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("qmp: connect to %s: %w (is QEMU running?)", path, err)
	}
	return New(ctx, conn.(*net.UnixConn), path)
}

// New negotiates on a connection that is there already, such as one half of a
// socket pair. The name stands for it in errors. The client owns the
// connection, also when New fails.
func New(ctx context.Context, conn *net.UnixConn, name string) (*Client, error) {
	c := &Client{
		conn:    conn,
		name:    name,
		writes:  make(chan outgoing),
		done:    make(chan struct{}),
		pending: make(map[uint64]chan Message),
		subs:    make(map[*Subscription]struct{}),
	}
	greeted := make(chan Greeting, 1)
	go c.read(greeted)
	go c.write()
	select {
	case c.greeting = <-greeted:
	case <-c.done:
		return nil, c.Err()
	case <-ctx.Done():
		c.Close()
		return nil, fmt.Errorf("qmp: wait for the greeting on %s: %w (a monitor serves one client at a time: is another one connected?)", name, context.Cause(ctx))
	}
	if err := c.Execute(ctx, "qmp_capabilities", nil, nil); err != nil {
		c.Close()
		return nil, fmt.Errorf("negotiate capabilities: %w", err)
	}
	return c, nil
}

// Version is the version of the QEMU at the other end.
func (c *Client) Version() Version { return c.greeting.Version }

// Close ends the session. Whatever waits fails with [ErrDisconnected].
// QEMU itself runs on. It may be called more than once.
func (c *Client) Close() error {
	c.fail(fmt.Errorf("%w: it was closed on this side", ErrDisconnected))
	return nil
}

// Done is closed when the session has ended: QEMU went away, or Close was called.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err tells why the session ended; nil while it goes on.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.explain(c.err)
}

// explain says of which session an error is; nil stays nil.
func (c *Client) explain(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("qmp: %s: %w", c.name, err)
}

// Execute runs a command and waits for its reply. The arguments are anything
// that marshals to a JSON object, or nil for none; the reply is unmarshalled
// into out unless that is nil.
//
// A refusal is an [*Error]; the end of the session is [ErrDisconnected]. When the
// context ends first, QEMU may still carry the command out.
func (c *Client) Execute(ctx context.Context, command string, args, out any) error {
	return c.execute(ctx, command, args, out, nil)
}

// ExecuteWithFD is Execute for getfd and add-fd: it passes fd to QEMU along with
// the command. The caller keeps its own descriptor and may close it afterwards.
func (c *Client) ExecuteWithFD(ctx context.Context, command string, args, out any, fd *os.File) error {
	return c.execute(ctx, command, args, out, fd)
}

func (c *Client) execute(ctx context.Context, command string, args, out any, fd *os.File) error {
	fail := func(err error) error {
		return fmt.Errorf("qmp: %s on %s: %w", command, c.name, err)
	}
	if err := ctx.Err(); err != nil {
		return fail(context.Cause(ctx))
	}
	id, reply, err := c.expect()
	if err != nil {
		return fail(err)
	}
	defer c.forget(id)

	line, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, args, id})
	if err != nil {
		return fail(fmt.Errorf("marshal the arguments: %w", err))
	}
	w := outgoing{line: append(line, '\n'), fd: -1}
	if fd != nil {
		// The writer may outlast this call, so it gets a descriptor of its own.
		if w.fd, err = dup(fd); err != nil {
			return fail(fmt.Errorf("duplicate descriptor of %s: %w", fd.Name(), err))
		}
	}

	select {
	case c.writes <- w:
	case <-ctx.Done():
		w.close()
		return fail(fmt.Errorf("send: %w (QEMU does not read its monitor)", context.Cause(ctx)))
	case <-c.done:
		w.close()
		return fail(c.cause())
	}
	select {
	case m := <-reply:
		return c.result(command, m, out)
	case <-ctx.Done():
		return fail(fmt.Errorf("wait for the reply: %w", context.Cause(ctx)))
	case <-c.done:
		// The reply may have come just before the end, as that of quit does.
		select {
		case m := <-reply:
			return c.result(command, m, out)
		default:
			return fail(c.cause())
		}
	}
}

func (c *Client) result(command string, m Message, out any) error {
	if m.Error != nil {
		m.Error.Command = command
		return fmt.Errorf("qmp: %s: %w", c.name, m.Error)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(m.Return, out); err != nil {
		return fmt.Errorf("qmp: %s on %s: unmarshal the reply: %w", command, c.name, err)
	}
	return nil
}

// expect makes room for a reply.
func (c *Client) expect() (id uint64, reply <-chan Message, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return 0, nil, c.err
	}
	c.lastID++
	ch := make(chan Message, 1)
	c.pending[c.lastID] = ch
	return c.lastID, ch, nil
}

func (c *Client) forget(id uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.pending, id)
}

// outgoing is one command on its way to the writer.
type outgoing struct {
	line []byte
	fd   int // passed along, and owned; -1 for none
}

func (w outgoing) close() {
	if w.fd >= 0 {
		unix.Close(w.fd)
	}
}

// write is the session's writer; it ends with the session. It is a goroutine of
// its own so that a caller whose context ends leaves a whole line behind, never
// half of one, and the session goes on.
func (c *Client) write() {
	for {
		select {
		case w := <-c.writes:
			err := c.send(w)
			w.close()
			if err != nil {
				c.fail(fmt.Errorf("%w: write: %w", ErrDisconnected, err))
				return
			}
		case <-c.done:
			return
		}
	}
}

func (c *Client) send(w outgoing) error {
	line := w.line
	if w.fd >= 0 {
		n, _, err := c.conn.WriteMsgUnix(line, unix.UnixRights(w.fd), nil)
		if err != nil {
			return err
		}
		line = line[n:]
	}
	if len(line) == 0 {
		return nil
	}
	_, err := c.conn.Write(line)
	return err
}

// dup duplicates a file's descriptor without changing its mode, as File.Fd may.
func dup(f *os.File) (n int, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	var errno error
	if err := raw.Control(func(fd uintptr) {
		n, errno = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0)
	}); err != nil {
		return -1, err
	}
	return n, errno
}

// read is the session's reader; it ends with the connection.
func (c *Client) read(greeted chan<- Greeting) {
	d := NewDecoder(c.conn, 0)
	for first := true; ; {
		m, err := d.Decode()
		switch {
		case err != nil:
		case first && m.Greeting == nil:
			continue // for whoever was connected before and did not wait for it
		case first != (m.Greeting != nil):
			err = errors.New("want one greeting only")
		case (m.Return != nil || m.Error != nil) && m.ID == nil:
			err = errors.New("a reply without the id of its command")
		}
		if err != nil {
			// A line that is no message ends the session as well: whose reply
			// it was is not known, and its waiter would wait for ever.
			c.fail(fmt.Errorf("%w: read: %w", ErrDisconnected, err))
			return
		}
		switch {
		case m.Greeting != nil:
			first = false
			greeted <- *m.Greeting
		case m.Event != nil:
			c.publish(*m.Event)
		default:
			c.reply(m)
		}
	}
}

func (c *Client) reply(m Message) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if ch := c.pending[*m.ID]; ch != nil {
		ch <- m // never blocks: one reply an id
		delete(c.pending, *m.ID)
	}
}

func (c *Client) cause() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// fail ends the session; the first reason stays.
func (c *Client) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	c.err = err
	for s := range c.subs {
		c.end(s, err)
	}
	c.conn.Close()
	close(c.done)
}

// Subscription delivers events, in order. C is closed when the session ends,
// when the buffer was full (an event was lost, and to go on would hide that),
// or by Close; Err then tells which.
type Subscription struct {
	C <-chan Event

	client *Client
	events chan Event
	names  []string
	err    error // guarded by client.mu
}

// Subscribe delivers the events of the given names that arrive from now on, or
// all if there are no names. Up to buffer events wait to be taken.
//
// Subscribe before the command whose events matter is executed.
func (c *Client) Subscribe(buffer int, names ...string) *Subscription {
	events := make(chan Event, max(buffer, 1))
	s := &Subscription{C: events, client: c, events: events, names: names}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		s.err = c.err
		close(s.events)
		return s
	}
	c.subs[s] = struct{}{}
	return s
}

// Next waits for the next event.
func (s *Subscription) Next(ctx context.Context) (Event, error) {
	select {
	case e, ok := <-s.C:
		if !ok {
			if err := s.Err(); err != nil {
				return Event{}, err
			}
			return Event{}, s.client.explain(errors.New("the subscription was closed"))
		}
		return e, nil
	case <-ctx.Done():
		return Event{}, s.client.explain(fmt.Errorf("wait for event %s: %w", strings.Join(s.names, " or "), context.Cause(ctx)))
	}
}

// Err tells why C was closed: [ErrDisconnected], [ErrLagged], or nil after Close.
func (s *Subscription) Err() error {
	s.client.mu.Lock()
	defer s.client.mu.Unlock()
	return s.client.explain(s.err)
}

// Close ends the subscription. It may be called more than once.
func (s *Subscription) Close() {
	s.client.mu.Lock()
	defer s.client.mu.Unlock()
	s.client.end(s, nil)
}

// WaitEvent waits for the next event of one of the names. An event that came
// before the call is missed: where that matters, Subscribe first.
func (c *Client) WaitEvent(ctx context.Context, names ...string) (Event, error) {
	s := c.Subscribe(1, names...)
	defer s.Close()
	return s.Next(ctx)
}

func (c *Client) publish(e Event) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for s := range c.subs {
		if len(s.names) > 0 && !slices.Contains(s.names, e.Name) {
			continue
		}
		select {
		case s.events <- e:
		default:
			c.end(s, fmt.Errorf("event %s: %w", e.Name, ErrLagged))
		}
	}
}

// end closes a subscription once; c.mu is held.
func (c *Client) end(s *Subscription, err error) {
	if _, ok := c.subs[s]; !ok {
		return
	}
	delete(c.subs, s)
	s.err = err
	close(s.events)
}
