package agent

import (
	"fmt"
	"log/slog"
	"runtime"

	"golang.org/x/sys/unix"
)

// receiverNice is the niceness of the threads that take a state in. What they do
// can wait; the pause of a node that is being cut beside them cannot.
const receiverNice = 15

// Background gives the calling goroutine a thread of its own and lowers its
// priority. The thread ends with the goroutine.
func Background(log *slog.Logger) {
	runtime.LockOSThread()
	if err := unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), receiverNice); err != nil {
		log.Debug("the receiver's priority was not lowered", "err", fmt.Errorf("setpriority: %w", err))
	}
}
