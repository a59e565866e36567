package priority

import (
	"log/slog"
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
)

// policies returns the scheduling policies of a process's threads.
func policies(t *testing.T, pid int) map[uint32]int {
	t.Helper()
	threads, err := threadsOf(pid)
	if err != nil {
		t.Fatal(err)
	}
	found := map[uint32]int{}
	for _, thread := range threads {
		if attr, err := unix.SchedGetAttr(thread, 0); err == nil {
			found[attr.Policy]++
		}
	}
	return found
}

func TestShared(t *testing.T) {
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	pid := cmd.Process.Pid
	if err := unix.Setpriority(unix.PRIO_PROCESS, pid, 3); err != nil {
		t.Fatal(err)
	}
	s := &Shared{PID: pid, Log: slog.New(slog.DiscardHandler)}
	first, second := s.Raise(), s.Raise()
	if policies(t, pid)[unix.SCHED_RR] == 0 {
		t.Skip("no privilege to schedule in real time")
	}
	first()
	first()
	if policies(t, pid)[unix.SCHED_RR] == 0 {
		t.Error("not urgent although somebody needs it to be")
	}
	second()
	attr, err := unix.SchedGetAttr(pid, 0)
	if err != nil || attr.Policy != unix.SCHED_NORMAL || attr.Nice != 3 {
		t.Errorf("afterwards: %+v, %v", attr, err)
	}
}

// Threads that are started while a process is urgent do not stay so.
func TestLowerFindsNewThreads(t *testing.T) {
	u, err := Raise(os.Getpid(), Lowered)
	if err != nil {
		t.Skipf("no privilege: %v", err)
	}
	started, done := make(chan struct{}), make(chan struct{})
	for range 4 {
		go func() {
			Background(slog.New(slog.DiscardHandler))
			started <- struct{}{}
			<-done
		}()
	}
	for range 4 {
		<-started
	}
	if err := u.Lower(); err != nil {
		t.Fatal(err)
	}
	close(done)
	if n := policies(t, os.Getpid())[unix.SCHED_RR]; n > 0 {
		t.Errorf("%d threads are still urgent", n)
	}
}

func TestLowerThread(t *testing.T) {
	u, err := Raise(os.Getpid(), nil)
	if err != nil {
		t.Skipf("no privilege: %v", err)
	}
	defer u.Lower() //nolint:errcheck // the test's end
	if err := u.LowerThread(os.Getpid(), 1); err != nil {
		t.Fatal(err)
	}
	attr, err := unix.SchedGetAttr(os.Getpid(), 0)
	if err != nil || attr.Policy != unix.SCHED_NORMAL || attr.Nice != 1 {
		t.Errorf("the thread: %+v, %v", attr, err)
	}
}

func TestNone(t *testing.T) {
	var s *Shared
	s.Raise()()
	if _, err := Raise(1<<22+1, nil); err == nil {
		t.Error("no error for a process that is not there")
	}
}
