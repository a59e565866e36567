package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"
)

// relayBound is how long the leader's answer to a connection is waited for.
const relayBound = 5 * time.Second

// relay hands connections on, as they are: they are of TLS, between who comes and the
// leader, and what hands them on can read none of it.
type relay struct {
	log      *slog.Logger
	listener net.Listener
	life     context.Context
	end      context.CancelFunc
	running  sync.WaitGroup

	mu      sync.Mutex
	address string // empty for nobody
	now     context.Context
	cut     context.CancelFunc
}

func newRelay(ctx context.Context, listen string, log *slog.Logger) (*relay, error) {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", listen)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", listen, err)
	}
	r := &relay{log: log, listener: l}
	r.life, r.end = context.WithCancel(ctx)
	r.now, r.cut = context.WithCancel(r.life)
	r.running.Go(r.accept)
	return r, nil
}

// to says where connections go from now on. Those that go elsewhere are cut: whoever is
// at their other end leads no more.
func (r *relay) to(address string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.address == address {
		return
	}
	r.cut()
	r.address = address
	r.now, r.cut = context.WithCancel(r.life)
}

func (r *relay) close() {
	r.end()
	_ = r.listener.Close()
	r.running.Wait()
}

func (r *relay) accept() {
	for {
		c, err := r.listener.Accept()
		if r.life.Err() != nil {
			if err == nil {
				c.Close()
			}
			return
		}
		if err != nil {
			r.log.Error("a connection was not accepted", "err", err)
			select {
			case <-time.After(time.Second): // such as for want of descriptors
			case <-r.life.Done():
			}
			continue
		}
		r.running.Go(func() {
			if err := r.carry(c); err != nil {
				r.log.Warn("a connection was not handed on to the leader", "from", c.RemoteAddr().String(), "err", err)
			}
		})
	}
}

// carry carries what comes on a connection to the leader, and back, until one of them
// ends it or there is another leader.
func (r *relay) carry(c net.Conn) error {
	defer c.Close()
	r.mu.Lock()
	address, now := r.address, r.now
	r.mu.Unlock()
	if address == "" {
		return errors.New("it is not known who leads, or where it listens")
	}
	d := net.Dialer{Timeout: relayBound}
	out, err := d.DialContext(now, "tcp", address)
	if err != nil {
		return err
	}
	defer out.Close()
	defer context.AfterFunc(now, func() {
		c.Close()
		out.Close()
	})()
	var both sync.WaitGroup
	for _, way := range [][2]net.Conn{{c, out}, {out, c}} {
		both.Go(func() {
			_, _ = io.Copy(way[1], way[0]) // its end is told to the other side, and no fault of ours
			if t, ok := way[1].(*net.TCPConn); ok {
				_ = t.CloseWrite()
			}
		})
	}
	both.Wait()
	return nil
}
