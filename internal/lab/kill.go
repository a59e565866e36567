package lab

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// killTimeout bounds how long a killed process may take to die. Some seconds
// pass when the kernel frees a large machine's memory; for ever if it hangs in
// a driver.
const killTimeout = 10 * time.Second

// killAll kills every other process whose network namespace is one of those
// given, by inode, and waits until they are gone. The parent's bond
// (PR_SET_PDEATHSIG) does not reach processes that a child has forked; this does.
func killAll(inodes map[uint64]bool) error {
	deadline := time.Now().Add(killTimeout)
	for {
		// Again until none is found: one may have forked while we looked.
		pids, err := processesIn(inodes)
		if err != nil || len(pids) == 0 {
			return err
		}
		if !time.Now().Before(deadline) {
			return fmt.Errorf("close lab: processes %v survived SIGKILL for %v; see what the kernel waits for in /proc/PID/stack", pids, killTimeout)
		}
		for _, pid := range pids {
			if err := kill(pid, inodes, deadline); err != nil {
				return fmt.Errorf("close lab: kill process %d: %w", pid, err)
			}
		}
	}
}

func processesIn(inodes map[uint64]bool) ([]int, error) {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil, fmt.Errorf("look for processes of the lab: %w", err)
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("look for processes of the lab: %w", err)
	}
	self := os.Getpid()
	var pids []int
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err == nil && pid != self && isIn(pid, inodes) {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// isIn reports whether the process is in one of the namespaces. A zombie is in
// none.
func isIn(pid int, inodes map[uint64]bool) bool {
	var st unix.Stat_t
	err := unix.Stat(fmt.Sprintf("/proc/%d/ns/net", pid), &st)
	return err == nil && inodes[st.Ino]
}

// kill kills the process and waits for its end. It holds the process by a file
// and looks again before the shot, as its number may be another's by now.
func kill(pid int, inodes map[uint64]bool, deadline time.Time) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if !isIn(pid, inodes) {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	for {
		left := max(time.Until(deadline), 0)
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(left.Milliseconds()))
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
