package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const greeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian 1:7.2"}, "capabilities": ["oob"]}}` + "\r\n"

// peer is the other end of the wire, played by the test.
type peer struct {
	t    *testing.T
	conn *net.UnixConn
	r    *bufio.Reader
}

// command is what the client wrote.
type command struct {
	Execute   string
	Arguments json.RawMessage
	ID        uint64
}

func (p *peer) send(format string, args ...any) {
	p.t.Helper()
	if _, err := fmt.Fprintf(p.conn, format+"\r\n", args...); err != nil {
		p.t.Error(err)
	}
}

func (p *peer) receive(want string) command {
	p.t.Helper()
	line, err := p.r.ReadBytes('\n')
	if err != nil {
		p.t.Errorf("wait for %s: %v", want, err)
		return command{}
	}
	var c command
	if err := json.Unmarshal(line, &c); err != nil {
		p.t.Error(err)
	}
	if c.Execute != want {
		p.t.Errorf("client executed %q, want %q", c.Execute, want)
	}
	return c
}

// listen plays a QEMU at a socket of its own: script runs when a client comes.
// The peer's end is closed when the script returns.
func listen(t *testing.T, script func(*peer)) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "qmp.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		script(&peer{t: t, conn: conn.(*net.UnixConn), r: bufio.NewReader(conn)})
	})
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	return path
}

// dial negotiates with a peer that goes on with script.
func dial(t *testing.T, script func(*peer)) *Client {
	t.Helper()
	path := listen(t, func(p *peer) {
		io.WriteString(p.conn, greeting)
		c := p.receive("qmp_capabilities")
		p.send(`{"return": {}, "id": %d}`, c.ID)
		script(p)
	})
	c, err := Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestExecute(t *testing.T) {
	c := dial(t, func(p *peer) {
		q := p.receive("query-status")
		if q.Arguments != nil {
			t.Errorf("arguments %s, want none", q.Arguments)
		}
		p.send(`{"return": {"status": "running", "running": true}, "id": %d}`, q.ID)
		q = p.receive("migrate")
		if string(q.Arguments) != `{"uri":"unix:/x"}` {
			t.Errorf("arguments %s", q.Arguments)
		}
		p.send(`{"id": %d, "error": {"class": "GenericError", "desc": "no"}}`, q.ID)
	})
	if got := c.Version().String(); got != "7.2.22 (Debian 1:7.2)" {
		t.Errorf("version %q", got)
	}
	var status struct{ Status string }
	if err := c.Execute(t.Context(), "query-status", nil, &status); err != nil || status.Status != "running" {
		t.Errorf("query-status: %+v, %v", status, err)
	}
	err := c.Execute(t.Context(), "migrate", map[string]any{"uri": "unix:/x"}, nil)
	var refused *Error
	if !errors.As(err, &refused) || refused.Class != "GenericError" || refused.Command != "migrate" {
		t.Errorf("migrate: %v, want QEMU's refusal", err)
	}
}

func TestRepliesOutOfOrder(t *testing.T) {
	c := dial(t, func(p *peer) {
		a, b := p.receive("x"), p.receive("x")
		for _, q := range []command{b, a} {
			p.send(`{"return": %s, "id": %d}`, q.Arguments, q.ID)
		}
	})
	var wg sync.WaitGroup
	for i := range 2 {
		wg.Go(func() {
			var out struct{ N int }
			if err := c.Execute(t.Context(), "x", map[string]int{"n": i}, &out); err != nil || out.N != i {
				t.Errorf("call %d got %+v, %v", i, out, err)
			}
		})
	}
	wg.Wait()
}

// Events that precede a reply on the wire are in the subscription by the time
// that Execute returns: the pause of a VM is measured that way.
func TestEventsBeforeReply(t *testing.T) {
	c := dial(t, func(p *peer) {
		q := p.receive("stop")
		p.send(`{"timestamp": {"seconds": 1700000000, "microseconds": 123456}, "event": "STOP"}`)
		p.send(`{"timestamp": {"seconds": 1700000000, "microseconds": 123457}, "event": "OTHER"}`)
		p.send(`{"timestamp": {"seconds": -1, "microseconds": -1}, "event": "MIGRATION", "data": {"status": "setup"}}`)
		p.send(`{"return": {}, "id": %d}`, q.ID)
	})
	s := c.Subscribe(8, "STOP", "MIGRATION")
	defer s.Close()
	if err := c.Execute(t.Context(), "stop", nil, nil); err != nil {
		t.Fatal(err)
	}
	if n := len(s.C); n != 2 {
		t.Fatalf("%d events are there, want 2", n)
	}
	stop, migration := <-s.C, <-s.C
	if want := time.UnixMicro(1700000000123456); stop.Name != "STOP" || !stop.Timestamp.Equal(want) || stop.Data != nil {
		t.Errorf("got %+v", stop)
	}
	if !migration.Timestamp.IsZero() || string(migration.Data) != `{"status": "setup"}` {
		t.Errorf("got %+v", migration)
	}
}

func TestWaitEvent(t *testing.T) {
	c := dial(t, func(p *peer) {
		// Again and again, for the peer can't know when the client listens.
		for {
			if _, err := io.WriteString(p.conn, `{"event": "A"}`+"\n"+`{"event": "B"}`+"\n"); err != nil {
				return
			}
		}
	})
	e, err := c.WaitEvent(t.Context(), "B", "C")
	if err != nil || e.Name != "B" {
		t.Errorf("got %+v, %v", e, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.WaitEvent(ctx, "C"); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	c.Close()
}

func TestSubscriptionEnds(t *testing.T) {
	gone := make(chan struct{})
	c := dial(t, func(p *peer) {
		q := p.receive("burst")
		for range 3 {
			p.send(`{"event": "E", "timestamp": {"seconds": 1, "microseconds": 0}}`)
		}
		p.send(`{"return": {}, "id": %d}`, q.ID)
		<-gone
	})
	small, large, closed := c.Subscribe(2), c.Subscribe(8), c.Subscribe(8)
	closed.Close()
	closed.Close()
	if _, err := closed.Next(t.Context()); err == nil || closed.Err() != nil {
		t.Errorf("closed subscription: Next %v, Err %v", err, closed.Err())
	}
	if err := c.Execute(t.Context(), "burst", nil, nil); err != nil {
		t.Fatal(err)
	}
	drain := func(s *Subscription) (n int) {
		for range s.C {
			n++
		}
		return n
	}
	if n := drain(small); n != 2 || !errors.Is(small.Err(), ErrLagged) {
		t.Errorf("small buffer: %d events, then %v", n, small.Err())
	}
	close(gone)
	if n := drain(large); n != 3 || !errors.Is(large.Err(), ErrDisconnected) {
		t.Errorf("large buffer: %d events, then %v", n, large.Err())
	}
	if _, err := c.Subscribe(1).Next(t.Context()); !errors.Is(err, ErrDisconnected) {
		t.Errorf("subscription after the end: %v", err)
	}
}

func TestDisconnect(t *testing.T) {
	for _, tc := range []struct {
		name string
		last string // what the peer says before it goes
		want string
	}{
		{"exit", "", "EOF"},
		{"half a line", `{"return"`, "unexpected EOF"},
		{"garbage", "\x7fELF\n", "not a JSON object"},
		{"second greeting", greeting, "want one greeting only"},
		{"reply without id", `{"return": {}}` + "\n", "without the id"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := dial(t, func(p *peer) {
				p.receive("stop")
				io.WriteString(p.conn, tc.last)
			})
			s := c.Subscribe(1)
			err := c.Execute(t.Context(), "stop", nil, nil)
			if !errors.Is(err, ErrDisconnected) || !strings.Contains(fmt.Sprint(err), tc.want) {
				t.Errorf("waiter: %v", err)
			}
			<-c.Done()
			if _, err := s.Next(t.Context()); !errors.Is(err, ErrDisconnected) {
				t.Errorf("subscription: %v", err)
			}
			if err := c.Execute(t.Context(), "stop", nil, nil); !errors.Is(err, ErrDisconnected) {
				t.Errorf("later command: %v", err)
			}
			if !errors.Is(c.Err(), ErrDisconnected) {
				t.Errorf("Err: %v", c.Err())
			}
		})
	}
}

// The reply to quit and the end of the connection come together.
func TestReplyThenDisconnect(t *testing.T) {
	c := dial(t, func(p *peer) {
		p.send(`{"return": {}, "id": %d}`, p.receive("quit").ID)
	})
	if err := c.Execute(t.Context(), "quit", nil, nil); err != nil {
		t.Error(err)
	}
}

// A caller who gives up leaves the session to the others, and the late reply is
// nobody's.
func TestCancel(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("the cut was aborted")
	c := dial(t, func(p *peer) {
		slow := p.receive("slow")
		cancel(why)
		quick := p.receive("quick")
		p.send(`{"return": "late", "id": %d}`, slow.ID)
		p.send(`{"return": "quick", "id": %d}`, quick.ID)
	})
	if err := c.Execute(ctx, "slow", nil, nil); !errors.Is(err, why) {
		t.Errorf("cancelled command: %v", err)
	}
	if err := c.Execute(ctx, "never", nil, nil); !errors.Is(err, why) {
		t.Errorf("command of a dead context: %v", err)
	}
	var got string
	if err := c.Execute(t.Context(), "quick", nil, &got); err != nil || got != "quick" {
		t.Errorf("next command: %q, %v", got, err)
	}
}

func TestExecuteWithFD(t *testing.T) {
	c := dial(t, func(p *peer) {
		buf, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
		n, oobn, _, _, err := p.conn.ReadMsgUnix(buf, oob)
		if err != nil {
			t.Error(err)
			return
		}
		msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil || len(msgs) != 1 {
			t.Errorf("%d control messages, %v", len(msgs), err)
			return
		}
		fds, err := unix.ParseUnixRights(&msgs[0])
		if err != nil || len(fds) != 1 {
			t.Errorf("descriptors %v, %v", fds, err)
			return
		}
		f := os.NewFile(uintptr(fds[0]), "passed")
		defer f.Close()
		io.WriteString(f, "hello")
		var q command
		if err := json.Unmarshal(buf[:n], &q); err != nil {
			t.Error(err)
		}
		p.send(`{"return": {}, "id": %d}`, q.ID)
	})
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	err = c.ExecuteWithFD(t.Context(), "getfd", map[string]string{"fdname": "x"}, nil, w)
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	// The read ends only if no copy of w was left open.
	if got, err := io.ReadAll(r); err != nil || string(got) != "hello" {
		t.Errorf("through the descriptor: %q, %v", got, err)
	}
}

// QEMU keeps what it could not say to a client that went away, and says it to the next,
// before it greets that one.
func TestLeftovers(t *testing.T) {
	path := listen(t, func(p *peer) {
		p.send(`{"return": {}, "id": 1}`)
		p.send(`{"timestamp": {"seconds": 1700000000, "microseconds": 123456}, "event": "RESUME"}`)
		io.WriteString(p.conn, greeting)
		p.send(`{"return": {}, "id": %d}`, p.receive("qmp_capabilities").ID)
		p.r.ReadByte()
	})
	c, err := Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got := c.Version().Major; got != 7 {
		t.Errorf("version %d", got)
	}
}

func TestDialRefused(t *testing.T) {
	if _, err := Dial(t.Context(), filepath.Join(t.TempDir(), "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no socket: %v", err)
	}

	ctx, cancel := context.WithCancel(t.Context())
	path := listen(t, func(p *peer) {
		cancel()
		p.r.ReadByte()
	})
	if _, err := Dial(ctx, path); !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "connect") {
		t.Errorf("silent peer: %v", err)
	}

	path = listen(t, func(p *peer) {
		io.WriteString(p.conn, greeting)
		p.send(`{"error": {"class": "CommandNotFound", "desc": "no"}, "id": %d}`, p.receive("qmp_capabilities").ID)
		p.r.ReadByte()
	})
	var refused *Error
	if _, err := Dial(t.Context(), path); !errors.As(err, &refused) {
		t.Errorf("refused negotiation: %v", err)
	}

	path = listen(t, func(p *peer) { io.WriteString(p.conn, "SSH-2.0-OpenSSH\r\n") })
	if _, err := Dial(t.Context(), path); !errors.Is(err, ErrDisconnected) {
		t.Errorf("another protocol: %v", err)
	}
}
