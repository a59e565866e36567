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
	path string

	mu   sync.Mutex
	conn net.Conn // nil after a call that failed
	dec  *json.Decoder
	id   int
}

// controlBound is the longest that the daemon may take to answer.
const controlBound = 5 * time.Second

func dialControl(ctx context.Context, path string) (*unixctl, error) {
	u := &unixctl{path: path}
	return u, u.dial(ctx)
}

func (u *unixctl) dial(ctx context.Context) error {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", u.path)
	if err != nil {
		return fmt.Errorf("reach ovs-vswitchd's control socket: %w", err)
	}
	u.conn, u.dec = c, json.NewDecoder(c)
	return nil
}

// call calls a method. Once it has begun, ctx does not end it: an answer that nobody
// took would be taken for the next call's.
func (u *unixctl) call(ctx context.Context, method string, params ...string) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%s: %w", method, err)
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.conn == nil {
		if err := u.dial(ctx); err != nil {
			return fmt.Errorf("%s: %w", method, err)
		}
	}
	refusal, err := u.exchange(method, params)
	if err != nil {
		u.conn.Close()
		u.conn = nil
		return fmt.Errorf("%s: %w", method, err)
	}
	if refusal != "" {
		return fmt.Errorf("%s: ovs-vswitchd says %s", method, refusal)
	}
	return nil
}

func (u *unixctl) exchange(method string, params []string) (refusal string, err error) {
	if params == nil {
		params = []string{}
	}
	u.id++
	req, err := json.Marshal(map[string]any{"id": u.id, "method": method, "params": params})
	if err != nil {
		return "", err
	}
	if err := u.conn.SetDeadline(time.Now().Add(controlBound)); err != nil {
		return "", err
	}
	if _, err := u.conn.Write(req); err != nil {
		return "", err
	}
	var reply struct {
		ID    int             `json:"id"`
		Error json.RawMessage `json:"error"`
	}
	if err := u.dec.Decode(&reply); err != nil {
		return "", err
	}
	if reply.ID != u.id {
		return "", fmt.Errorf("the answer is to call %d, not to %d", reply.ID, u.id)
	}
	if len(reply.Error) > 0 && string(reply.Error) != "null" {
		return string(reply.Error), nil
	}
	return "", nil
}

func (u *unixctl) close() {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.conn != nil {
		u.conn.Close()
		u.conn = nil
	}
}
