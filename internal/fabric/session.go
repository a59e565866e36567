package fabric

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"time"

	"violin/internal/coloring"
	"violin/internal/openflow"
)

// reopenInterval is the time between two attempts to open a lost session again.
const reopenInterval = 100 * time.Millisecond

// connect opens the OpenFlow session and keeps it open until the switch is closed.
func (s *Switch) connect(ctx context.Context) error {
	conn, err := s.open(ctx)
	if err != nil {
		return err
	}
	s.conn.Store(conn)
	s.served = make(chan struct{})
	go s.keep(conn)
	return s.prepare(ctx, conn)
}

// dial reaches the bridge's management socket, which is always there, so the session
// needs no address and no namespace.
func (s *Switch) dial(ctx context.Context) (net.Conn, error) {
	if s.cfg.Dial != nil {
		return s.cfg.Dial(ctx)
	}
	var d net.Dialer
	return d.DialContext(ctx, "unix", ManagementSocket(s.cfg.Dir))
}

// ManagementSocket is where the switch in a directory listens for controllers.
func ManagementSocket(dir string) string { return filepath.Join(dir, integration+".mgmt") }

func (s *Switch) open(ctx context.Context) (*openflow.Conn, error) {
	c, err := s.dial(ctx)
	if err != nil {
		return nil, fmt.Errorf("reach the switch by OpenFlow: %w", err)
	}
	conn := openflow.NewConn(c, openflow.Options{Handler: s.handle, Logger: s.log, QueueBytes: s.cfg.queueBytes})
	if _, err := conn.Handshake(ctx); err != nil {
		return nil, err
	}
	return conn, nil
}

// prepare lets a session that is served bring what the gates need.
func (s *Switch) prepare(ctx context.Context, conn *openflow.Conn) error {
	if err := conn.EnableAsync(ctx); err != nil {
		return err
	}
	return s.daemons.raiseBuffers()
}

// keep serves the session, and opens it again when it is lost. Meanwhile the
// switch goes on by the entries that it has (fail-mode secure); what it would hand
// over is lost.
func (s *Switch) keep(conn *openflow.Conn) {
	defer close(s.served)
	for {
		err := conn.Serve(s.lifetime)
		if s.lifetime.Err() != nil {
			return
		}
		s.log.Warn("the OpenFlow session is lost; it is opened again", "err", err)
		if s.cfg.OnLost != nil {
			s.cfg.OnLost(err)
		}
		for conn = nil; conn == nil; {
			if conn, err = s.open(s.lifetime); err == nil {
				break
			}
			s.log.Debug("the OpenFlow session does not open", "err", err)
			select {
			case <-time.After(reopenInterval):
			case <-s.lifetime.Done():
				return
			}
		}
		s.mu.Lock() // no update before the repair
		s.conn.Store(conn)
		go func() {
			defer s.mu.Unlock()
			if err := s.repair(conn); err != nil {
				s.log.Warn("the switch's entries were not repaired", "err", err)
				conn.Close() // and so all over again
			}
		}()
	}
}

// repair brings the switch's entries to what they should be: it removes those that
// are unknown, puts in those that are missing, and leaves the others and their
// counters alone. The caller holds s.mu.
func (s *Switch) repair(conn *openflow.Conn) error {
	ctx, cancel := context.WithTimeout(s.lifetime, 10*time.Second)
	defer cancel()
	if err := s.prepare(ctx, conn); err != nil {
		return err
	}
	stats, err := conn.FlowStats(ctx, openflow.FlowStatsRequest{Table: openflow.TableAll})
	if err != nil {
		return err
	}
	mods, err := coloring.Repair(stats, s.installed)
	if err != nil {
		return err
	}
	if len(mods) > 0 {
		if err := s.Purge(ctx); err != nil {
			return err
		}
		if err := conn.Bundle(ctx, mods); err != nil {
			return err
		}
	}
	s.log.Info("the OpenFlow session is open again", "entries", len(stats), "repaired", len(mods))
	return s.Purge(ctx)
}
