// Package child is a child process that may outlive the process that started it.
//
// It carries a name in its environment, by which whoever takes over finds it again. A
// number that was written down could have been given to another process meanwhile, or
// not have been written yet when the writer died; an environment can't.
package child

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Variable is the environment variable that holds a child's name.
const Variable = "VIOLIN_CHILD"

// Mark gives a command that has not been started its name. Names are paths: what
// belongs together is below the same one.
func Mark(cmd *exec.Cmd, name string) {
	cmd.Env = append(cmd.Environ(), Variable+"="+name)
	cmd.Env = cmd.Environ() // of two of a name, the last is kept
}

// Process is a child, of this process or of one that it takes over from.
type Process struct {
	name string
	pid  int
	fd   int // of the process, if it is not our child
	cmd  *exec.Cmd
	done chan struct{}
	err  error // valid once done is closed
}

// Started takes a command over that has just been started. Nobody else may wait for it.
func Started(cmd *exec.Cmd) *Process {
	p := &Process{name: cmd.Path, pid: cmd.Process.Pid, fd: -1, cmd: cmd, done: make(chan struct{})}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	return p
}

// Find returns the process of this name that lives, or nil if none does.
func Find(name string) (*Process, error) {
	all, err := find(func(n string) bool { return n == name })
	if err != nil || len(all) == 0 {
		return nil, err
	}
	return all[0], nil
}

// Below returns the processes that live of which the names are below a path.
func Below(path string) ([]*Process, error) {
	return find(func(n string) bool { return strings.HasPrefix(n, path+"/") })
}

func find(ours func(string) bool) ([]*Process, error) {
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("look for processes: %w", err)
	}
	var all []*Process
	for _, d := range dirs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		if name := nameOf(pid); name == "" || !ours(name) {
			continue
		}
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue // it has just ended
		}
		// Only now is it known that the number stays this process's.
		name := nameOf(pid)
		if name == "" || !ours(name) {
			unix.Close(fd)
			continue
		}
		p := &Process{name: name, pid: pid, fd: fd, done: make(chan struct{})}
		go p.watch()
		all = append(all, p)
	}
	return all, nil
}

// nameOf is the name of a process; empty if it has none, has ended, or is another user's.
func nameOf(pid int) string {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "environ"))
	if err != nil {
		return ""
	}
	for v := range bytes.SplitSeq(b, []byte{0}) {
		if name, ok := bytes.CutPrefix(v, []byte(Variable+"=")); ok {
			return string(name)
		}
	}
	return ""
}

// watch waits for the end of a process that is not our child.
func (p *Process) watch() {
	for {
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}, -1)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	p.err = errors.New("how, only who started it was told")
	close(p.done)
}

// PID is the process's number.
func (p *Process) PID() int { return p.pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err says how the process ended, once it has: nil for exit status 0.
func (p *Process) Err() error {
	<-p.done
	return p.err
}

// Kill kills the process and waits until it has ended. It may have.
func (p *Process) Kill() error {
	var err error
	if p.cmd != nil {
		err = p.cmd.Process.Kill()
	} else {
		err = unix.PidfdSendSignal(p.fd, unix.SIGKILL, nil, 0)
	}
	if err != nil && !errors.Is(err, os.ErrProcessDone) && !errors.Is(err, unix.ESRCH) && !errors.Is(err, fs.ErrClosed) {
		return fmt.Errorf("kill %s (pid %d): %w", p.name, p.pid, err)
	}
	<-p.done
	return nil
}
