// Package priority owns the order in which this machine's processors serve what a
// cut is made of. While a node stands still, whatever its pause waits for comes
// first: QEMU's threads, the switch's, and the agent's own. What can wait (taking a
// state in) comes last, behind the vCPUs.
//
// All of it needs privileges. Without them pauses are longer, and nothing else.
package priority

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// backgroundNice is the niceness of a thread that takes a state in.
const backgroundNice = 15

// Background gives the calling goroutine a thread of its own and lowers its
// priority. The thread ends with the goroutine.
func Background(log *slog.Logger) {
	runtime.LockOSThread()
	attr := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_NORMAL, Nice: backgroundNice}
	if err := unix.SchedSetAttr(0, &attr, 0); err != nil {
		log.Debug("the receiver's priority was not lowered", "err", fmt.Errorf("sched_setattr: %w", err))
	}
}

// Urgency is a process whose threads are scheduled in real time: before all that is
// scheduled by niceness, and at once. Niceness alone leaves a thread that wakes up
// waiting for the end of another's time slice, some milliseconds, at every turn.
type Urgency struct {
	pid int

	mu    sync.Mutex
	saved map[int]unix.SchedAttr // by thread; nil once lowered
}

// Raise makes a process's threads urgent. Those that keep names stay as they are.
// Threads that an urgent one starts are urgent as well, until Lower. The result is
// never nil: an error means that some threads, or all, are not urgent.
func Raise(pid int, keep func(thread int, nice int) bool) (*Urgency, error) {
	u := &Urgency{pid: pid, saved: map[int]unix.SchedAttr{}}
	threads, err := threadsOf(pid)
	if err != nil {
		return u, err
	}
	var errs []error
	for _, thread := range threads {
		attr, err := unix.SchedGetAttr(thread, 0)
		if err != nil || attr.Policy != unix.SCHED_NORMAL || keep != nil && keep(thread, int(attr.Nice)) {
			continue // it has ended, or is not ours to change
		}
		if err := unix.SchedSetAttr(thread, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_RR, Priority: 1}, 0); err != nil {
			errs = append(errs, fmt.Errorf("make thread %d of process %d urgent: %w", thread, pid, err))
			continue
		}
		u.saved[thread] = *attr
	}
	return u, errors.Join(errs...)
}

// Calm takes the urgency of all of a process's threads back that somebody made urgent who
// has died since. They get the niceness of this process.
func Calm(pid int) error {
	calm, err := unix.SchedGetAttr(pid, 0)
	if err != nil {
		return fmt.Errorf("read the priority of process %d: %w", pid, err)
	}
	if calm.Policy != unix.SCHED_NORMAL {
		if calm, err = unix.SchedGetAttr(os.Getpid(), 0); err != nil {
			return fmt.Errorf("read the own priority: %w", err)
		}
	}
	u := &Urgency{pid: pid, saved: map[int]unix.SchedAttr{pid: {Nice: calm.Nice}}}
	return u.Lower()
}

// LowerThread takes one thread's urgency back and gives it the niceness.
func (u *Urgency) LowerThread(thread, nice int) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if _, ok := u.saved[thread]; !ok {
		return nil
	}
	delete(u.saved, thread)
	return set(thread, nice)
}

// Lower takes the urgency of all threads back. They get the niceness that they had;
// those that were started meanwhile, that of the process.
func (u *Urgency) Lower() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.saved == nil {
		return nil
	}
	threads, err := threadsOf(u.pid)
	if err != nil {
		return nil // it has ended
	}
	var errs []error
	for _, thread := range threads {
		saved, ok := u.saved[thread]
		if !ok {
			attr, err := unix.SchedGetAttr(thread, 0)
			if err != nil || attr.Policy != unix.SCHED_RR {
				continue
			}
			saved.Nice = u.saved[u.pid].Nice
		}
		errs = append(errs, set(thread, int(saved.Nice)))
	}
	u.saved = nil
	return errors.Join(errs...)
}

func set(thread, nice int) error {
	err := unix.SchedSetAttr(thread, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_NORMAL, Nice: int32(nice)}, 0)
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("give thread %d the niceness %d: %w", thread, nice, err)
	}
	return nil
}

func threadsOf(pid int) ([]int, error) {
	tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return nil, fmt.Errorf("the threads of process %d: %w", pid, err)
	}
	var threads []int
	for _, t := range tasks {
		if id, err := strconv.Atoi(t.Name()); err == nil {
			threads = append(threads, id)
		}
	}
	return threads, nil
}

// Shared makes a process urgent while anybody needs it to be. A nil Shared never does.
type Shared struct {
	PID  int
	Keep func(thread int, nice int) bool // as for [Raise]
	Log  *slog.Logger

	mu    sync.Mutex
	users int
	now   *Urgency
}

// Raise makes the process urgent until the function that it returns has been
// called, once by each caller.
func (s *Shared) Raise() (lower func()) {
	if s == nil {
		return func() {}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.users++; s.users == 1 {
		var err error
		if s.now, err = Raise(s.PID, s.Keep); err != nil {
			s.Log.Debug("a pause without priority", "err", err)
		}
	}
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.users--; s.users == 0 {
			if err := s.now.Lower(); err != nil {
				s.Log.Debug("a process keeps its priority", "err", err)
			}
		}
	})
}

// Lowered tells [Raise] to keep the threads that [Background] has lowered.
func Lowered(_, nice int) bool { return nice >= backgroundNice }
