package qga

import (
	"context"
	"fmt"
	"time"
)

// Result is how a process in the guest ended.
type Result struct {
	Stdout, Stderr []byte

	// ExitCode is the exit status; 128 plus the signal's number, as in a shell,
	// if a signal ended the process.
	ExitCode int

	// Truncated tells that the agent kept only the beginning of an output: it
	// keeps 16 MiB of each.
	Truncated bool
}

// Exec runs the program at path (or found by that name in the agent's PATH) with
// the arguments and standard input given, and waits for its end. A program that
// ended with another status than 0 is no error.
//
// When the context ends first, the process goes on in the guest. A snapshot of
// the guest that is taken meanwhile has the process in it, but nobody who asks
// for its result.
func (c *Client) Exec(ctx context.Context, path string, args []string, stdin []byte) (Result, error) {
	var started struct {
		PID int64 `json:"pid"`
	}
	err := c.Execute(ctx, "guest-exec", struct {
		Path    string   `json:"path"`
		Args    []string `json:"arg,omitempty"`
		Input   []byte   `json:"input-data,omitempty"` // json writes it in base64, as the agent wants it
		Capture bool     `json:"capture-output"`
	}{path, args, stdin, true}, &started)
	if err != nil {
		return Result{}, fmt.Errorf("start %q in the guest: %w", path, err)
	}

	timer := time.NewTimer(0)
	defer timer.Stop()
	for wait := c.poll; ; wait = min(wait*3/2, 50*c.poll) {
		select {
		case <-timer.C:
		case <-ctx.Done():
			return Result{}, fmt.Errorf("wait for %q in the guest: %w", path, context.Cause(ctx))
		}
		var status struct {
			Exited       bool
			ExitCode     int
			Signal       int
			Stdout       []byte `json:"out-data"`
			Stderr       []byte `json:"err-data"`
			OutTruncated bool   `json:"out-truncated"`
			ErrTruncated bool   `json:"err-truncated"`
		}
		if err := c.Execute(ctx, "guest-exec-status", map[string]int64{"pid": started.PID}, &status); err != nil {
			return Result{}, fmt.Errorf("wait for %q in the guest: %w", path, err)
		}
		if status.Exited {
			r := Result{
				Stdout:    status.Stdout,
				Stderr:    status.Stderr,
				ExitCode:  status.ExitCode,
				Truncated: status.OutTruncated || status.ErrTruncated,
			}
			if status.Signal != 0 {
				r.ExitCode = 128 + status.Signal
			}
			return r, nil
		}
		timer.Reset(wait)
	}
}
