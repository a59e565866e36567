package fabric

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"path/filepath"
	"testing"
)

// A call that is given up half way must not spoil those after it.
func TestControlAfterCancel(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ctl")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	stuck := make(chan struct{}, 1) // a request that is answered by half a message
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				for dec := json.NewDecoder(c); ; {
					var req struct {
						ID     int
						Method string
					}
					if dec.Decode(&req) != nil {
						return
					}
					answer, _ := json.Marshal(map[string]any{"id": req.ID, "result": "", "error": nil})
					if req.Method == "stall" {
						answer = answer[:len(answer)/2]
					}
					if _, err := c.Write(answer); err != nil {
						return
					}
					if req.Method == "stall" {
						stuck <- struct{}{}
					}
				}
			}()
		}
	}()
	u, err := dialControl(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer u.close()
	for range 3 {
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			<-stuck
			cancel()
		}()
		if err := u.call(ctx, "stall"); !errors.Is(err, context.Canceled) {
			t.Fatalf("a call that was given up: %v", err)
		}
		if err := u.call(t.Context(), "purge"); err != nil {
			t.Fatalf("the call after it: %v", err)
		}
	}
}
