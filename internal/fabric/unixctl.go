package fabric

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// unixctl is a session with a daemon's control socket: JSON-RPC 1.0, what
// ovs-appctl speaks. One session serves all calls, which keeps a purge well
// under a millisecond. A call that fails or is given up may leave half a message
// behind, in either direction: it ends the session, and the next call begins another.
type unixctl struct {
	path string

	mu   sync.Mutex
	conn net.Conn // nil between sessions
	dec  *json.Decoder
	id   int
}

// controlBound is the longest that the daemon may take to answer.
const controlBound = 10 * time.Second

func dialControl(ctx context.Context, path string) (*unixctl, error) {
	u := &unixctl{path: path}
	if err := u.dial(ctx); err != nil {
		return nil, err
	}
	return u, nil
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

func (u *unixctl) call(ctx context.Context, method string, params ...string) error {
	_, err := u.query(ctx, method, params...)
	return err
}

// query is a call whose answer has a text.
func (u *unixctl) query(ctx context.Context, method string, params ...string) (string, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.conn == nil {
		if err := u.dial(ctx); err != nil {
			return "", fmt.Errorf("%s: %w", method, err)
		}
	}
	conn := u.conn
	if err := conn.SetDeadline(time.Now().Add(controlBound)); err != nil {
		return "", fmt.Errorf("%s: %w", method, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	text, refusal, err := u.exchange(method, params)
	if !stop() || err != nil {
		conn.Close()
		u.conn = nil
	}
	if err != nil {
		return "", fmt.Errorf("%s: %w", method, errors.Join(context.Cause(ctx), err))
	}
	if refusal != "" {
		return "", fmt.Errorf("%s: ovs-vswitchd says %s", method, refusal)
	}
	return text, nil
}

// exchange sends a request and reads its answer. A refusal is an answer, too.
func (u *unixctl) exchange(method string, params []string) (text, refusal string, err error) {
	if params == nil {
		params = []string{}
	}
	u.id++
	req, err := json.Marshal(map[string]any{"id": u.id, "method": method, "params": params})
	if err != nil {
		return "", "", err
	}
	if _, err := u.conn.Write(req); err != nil {
		return "", "", err
	}
	var reply struct {
		ID     int             `json:"id"`
		Result string          `json:"result"`
		Error  json.RawMessage `json:"error"`
	}
	if err := u.dec.Decode(&reply); err != nil {
		return "", "", err
	}
	if reply.ID != u.id {
		return "", "", fmt.Errorf("the answer is to call %d, not %d", reply.ID, u.id)
	}
	if len(reply.Error) > 0 && string(reply.Error) != "null" {
		return "", string(reply.Error), nil
	}
	return reply.Result, "", nil
}

func (u *unixctl) close() {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.conn != nil {
		u.conn.Close()
		u.conn = nil
	}
}
