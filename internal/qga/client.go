package qga

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"time"

	"violin/internal/qmp"
)

// sentinel resets the parser of the agent and marks its reply to a synchronisation.
const sentinel = 0xff

// Client talks to the agent of one guest. Its methods are safe for concurrent
// use; commands take turns.
type Client struct {
	conn    net.Conn
	name    string // of the socket, for errors
	decoder *qmp.Decoder

	// turn is held during a command. A channel, because waiting for it must end
	// with the caller's context.
	turn   chan struct{}
	synced bool // guarded by turn

	patience time.Duration // until a synchronisation is tried again
	poll     time.Duration // the least time between two questions whether a process has exited
}

// Dial connects to QEMU's end of the agent's port, at the unix socket path. It
// says nothing to the guest, which may not even have booted: see [Client.Ping].
//
// A port serves one client at a time; a second one waits in silence.
func Dial(ctx context.Context, path string) (*Client, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("guest agent: connect to %s: %w (is QEMU running?)", path, err)
	}
	return New(conn, path), nil
}

// New uses a connection that is there already, and owns it. The name stands for
// it in errors.
func New(conn net.Conn, name string) *Client {
	return &Client{
		conn:     conn,
		name:     name,
		decoder:  qmp.NewDecoder(conn, 0),
		turn:     make(chan struct{}, 1),
		patience: 2 * time.Second,
		poll:     5 * time.Millisecond,
	}
}

// Close ends the connection. A command under way fails with [net.ErrClosed].
func (c *Client) Close() error { return c.conn.Close() }

// Ping waits until the agent answers, which while a guest boots may take long:
// the context says how long to wait.
func (c *Client) Ping(ctx context.Context) error {
	return c.Execute(ctx, "guest-ping", nil, nil)
}

// Execute runs a command of the agent. The arguments are anything that marshals
// to a JSON object, or nil; the reply is unmarshalled into out unless that is nil.
//
// It waits for an agent that does not answer until the context ends. A refusal
// is a [*qmp.Error]. After any other error the command may have been carried out
// nevertheless.
func (c *Client) Execute(ctx context.Context, command string, args, out any) error {
	fail := func(err error) error {
		return fmt.Errorf("guest agent: %s on %s: %w", command, c.name, err)
	}
	line, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
	}{command, args})
	if err != nil {
		return fail(fmt.Errorf("marshal the arguments: %w", err))
	}

	select {
	case c.turn <- struct{}{}:
		defer func() { <-c.turn }()
	case <-ctx.Done():
		return fail(fmt.Errorf("wait for the commands before it: %w", context.Cause(ctx)))
	}
	if !c.synced {
		if err := c.synchronize(ctx); err != nil {
			return fail(err)
		}
		c.synced = true
	}
	var m qmp.Message
	err = c.exchange(ctx, append(line, '\n'), func() (err error) {
		m, err = c.decoder.Decode()
		return err
	})
	if err == nil && m.Return == nil && m.Error == nil {
		err = errors.New("the agent sent what is no reply (is this the port of a guest agent?)")
	}
	if err != nil {
		c.synced = false
		return fail(err)
	}
	if m.Error != nil {
		m.Error.Command = command
		return fmt.Errorf("guest agent: %s: %w", c.name, m.Error)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(m.Return, out); err != nil {
		return fail(fmt.Errorf("unmarshal the reply: %w", err))
	}
	return nil
}

// synchronize waits for the agent, and for its reply to us. It asks again and
// again, for a guest that boots or is reset forgets what it was asked.
func (c *Client) synchronize(ctx context.Context) error {
	for patience := c.patience; ; patience = min(patience*3/2, 5*c.patience) {
		attempt, cancel := context.WithTimeout(ctx, patience)
		err := c.trySynchronize(attempt)
		cancel()
		if err == nil || !errors.Is(err, context.DeadlineExceeded) {
			return err
		}
		if ctx.Err() != nil {
			return fmt.Errorf("wait for the agent to answer: %w (does qemu-ga run in the guest?)", context.Cause(ctx))
		}
	}
}

func (c *Client) trySynchronize(ctx context.Context) error {
	// Random: a restored guest may still send replies to numbers chosen before.
	id := rand.Int64N(1 << 53)
	line := append([]byte{sentinel}, fmt.Sprintf(`{"execute":"guest-sync-delimited","arguments":{"id":%d}}`+"\n", id)...)
	return c.exchange(ctx, line, func() error {
		for {
			if err := c.decoder.Skip(sentinel); err != nil {
				return err
			}
			m, err := c.decoder.Decode()
			var syntax *qmp.SyntaxError
			if errors.As(err, &syntax) {
				continue
			}
			if err != nil {
				return err
			}
			var got int64
			if m.Return != nil && json.Unmarshal(m.Return, &got) == nil && got == id {
				return nil
			}
		}
	})
}

// exchange writes a line and reads with receive, both until ctx ends.
func (c *Client) exchange(ctx context.Context, line []byte, receive func() error) error {
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		c.conn.SetDeadline(time.Unix(1, 0)) // long ago
		close(interrupted)
	})
	_, err := c.conn.Write(line)
	if err == nil {
		err = receive()
	}
	if !stop() {
		<-interrupted
		c.conn.SetDeadline(time.Time{})
		if err != nil {
			return context.Cause(ctx)
		}
	}
	return err
}
