package lab

import (
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// An alarm rings once after a while. The runtime's own timers are as coarse as
// epoll's timeout, a millisecond; this is a timer of the kernel with a file
// that becomes readable, late by some ten microseconds.
type alarm struct {
	file *os.File
	conn syscall.RawConn
}

func newAlarm() (*alarm, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make timer: %w", err)
	}
	f := os.NewFile(uintptr(fd), "timerfd")
	conn, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("make timer: %w", err)
	}
	return &alarm{f, conn}, nil
}

// set lets the alarm ring after d, which is positive, and no more at the time
// set before. It may be called while another goroutine waits.
func (a *alarm) set(d time.Duration) error {
	spec := unix.ItimerSpec{Value: unix.NsecToTimespec(d.Nanoseconds())}
	var err error
	cerr := a.conn.Control(func(fd uintptr) { err = unix.TimerfdSettime(int(fd), 0, &spec, nil) })
	if cerr != nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("set timer: %w", err)
	}
	return nil
}

// wait waits for the alarm to ring. It fails once the alarm is closed.
func (a *alarm) wait() error {
	var expirations [8]byte
	_, err := a.file.Read(expirations[:])
	return err
}

func (a *alarm) close() { a.file.Close() }
