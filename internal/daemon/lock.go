package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// lockPoll is how often a taken lock is tried again. flock(2) can block instead, but
// a blocked flock cannot be cancelled.
const lockPoll = 20 * time.Millisecond

// errLocked says that another process holds a lock.
var errLocked = errors.New("locked by another process")

// lock takes the lock file at path, waiting for it until ctx ends. Closing the file
// gives the lock back, and so does any end of the process: the descriptor is
// close-on-exec, so no child keeps it. onTaken is called each time the lock is found
// taken; its error ends the wait.
func lock(ctx context.Context, path string, onTaken func() error) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return f, nil
		case errors.Is(err, unix.EINTR):
			continue
		case !errors.Is(err, unix.EWOULDBLOCK):
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		if err := onTaken(); err != nil {
			f.Close()
			return nil, err
		}
		select {
		case <-ctx.Done():
			pid := holder(f)
			f.Close()
			return nil, fmt.Errorf("lock %s: %w%s: %w", path, errLocked, pid, context.Cause(ctx))
		case <-time.After(lockPoll):
		}
	}
}

// sign writes this process's pid into a lock file, for people and error messages.
func sign(f *os.File) error {
	if err := f.Truncate(0); err != nil {
		return err
	}
	_, err := f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	return err
}

// holder reads who signed a lock file: " (pid 123)", or "" if nobody did.
func holder(f *os.File) string {
	b, err := io.ReadAll(io.NewSectionReader(f, 0, 32))
	if err != nil {
		return ""
	}
	pid, err := strconv.Atoi(string(bytes.TrimSpace(b)))
	if err != nil {
		return ""
	}
	return fmt.Sprintf(" (pid %d)", pid)
}
