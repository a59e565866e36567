package fabric

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"sync"
	"time"
)

// unixctl is a session with a daemon's control socket: JSON-RPC 1.0, what
// ovs-appctl speaks. One session serves all calls, which keeps a purge well
// under a millisecond.
type unixctl struct {
	mu   sync.Mutex
	conn net.Conn
	dec  *json.Decoder
	id   int
}

func dialControl(ctx context.Context, path string) (*unixctl, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("reach ovs-vswitchd's control socket: %w", err)
	}
	return &unixctl{conn: c, dec: json.NewDecoder(c)}, nil
}

func (u *unixctl) call(ctx context.Context, method string, params ...string) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if params == nil {
		params = []string{}
	}
	u.id++
	if err := u.conn.SetDeadline(time.Time{}); err != nil {
		return fmt.Errorf("%s: %w", method, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = u.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	req, err := json.Marshal(map[string]any{"id": u.id, "method": method, "params": params})
	if err != nil {
		return fmt.Errorf("%s: %w", method, err)
	}
	if _, err := u.conn.Write(req); err != nil {
		return fmt.Errorf("%s: %w", method, err)
	}
	for {
		var reply struct {
			ID    int             `json:"id"`
			Error json.RawMessage `json:"error"`
		}
		if err := u.dec.Decode(&reply); err != nil {
			return fmt.Errorf("%s: %w", method, err)
		}
		if reply.ID != u.id {
			continue // of a call that was given up
		}
		if len(reply.Error) > 0 && string(reply.Error) != "null" {
			return fmt.Errorf("%s: ovs-vswitchd says %s", method, reply.Error)
		}
		return nil
	}
}

func (u *unixctl) close() { u.conn.Close() }
