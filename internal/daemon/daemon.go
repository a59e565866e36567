// Package daemon owns the background server process of one machine: starting it
// when a command needs it and it does not run, finding it, and, inside it,
// listening, stopping and leaving when it is no longer needed. It knows nothing of
// what is served.
//
// Two directories hold all there is of a server:
//
//	run    server.sock   the API: HTTP/1.1 and HTTP/2 without TLS, mode 0600
//	       server.lock   held (flock) by the server for its whole life; its pid as text
//	       start.lock    held by a command while it starts a server
//	state  server.log    what the server writes to stdout and stderr when started by a command
//
// The locks make it one server a run directory, whoever starts one and however
// often at once. Lock files are never removed: removing one would let two processes
// hold "the" lock on two different files. The socket is removed by the server that
// made it, or, after a kill -9, by the next one, which holds the lock and so knows
// that nobody else listens there.
//
// Whether a server runs is asked on the socket (GET /healthz), not read from a pid
// file: a pid says nothing about whether the API answers.
package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// Directories used unless the user says otherwise.
const (
	DefaultRunDir   = "/run/violin"
	DefaultStateDir = "/var/lib/violin"
)

// ErrNotRunning says that no server answers on the socket.
var ErrNotRunning = errors.New("no violin server runs on this machine")

// Dirs are the directories of one server. Two servers with two pairs of
// directories may run side by side.
type Dirs struct {
	Run   string // gone after a reboot: sockets and locks
	State string // stays: what the server keeps, and its log
}

// NewDirs makes the two paths absolute, since the server that a command starts does
// not share the command's working directory. It creates nothing.
func NewDirs(run, state string) (Dirs, error) {
	r, err := filepath.Abs(run)
	if err != nil {
		return Dirs{}, fmt.Errorf("run directory %q: %w", run, err)
	}
	s, err := filepath.Abs(state)
	if err != nil {
		return Dirs{}, fmt.Errorf("state directory %q: %w", state, err)
	}
	d := Dirs{Run: r, State: s}
	// sun_path is 108 bytes with its final zero (unix(7)).
	if n := len(d.Socket()); n > 107 {
		return Dirs{}, fmt.Errorf("run directory %q: the socket's path would be %d bytes, and a unix socket's can have 107; choose a shorter directory", run, n)
	}
	return d, nil
}

// Socket is the path of the API's unix socket.
func (d Dirs) Socket() string { return filepath.Join(d.Run, "server.sock") }

// Log is the path of the log of a server that a command started.
func (d Dirs) Log() string { return filepath.Join(d.State, "server.log") }

func (d Dirs) serverLock() string { return filepath.Join(d.Run, "server.lock") }
func (d Dirs) startLock() string  { return filepath.Join(d.Run, "start.lock") }

// create makes the directories, for the user alone: the sockets give control of the
// machine's VMs, and the state holds their memory. Directories that exist keep their mode.
func (d Dirs) create() error {
	for _, dir := range []string{d.Run, d.State} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("create the server's directory: %w", err)
		}
	}
	return nil
}
