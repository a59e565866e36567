package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// ErrClosed is returned by whatever is asked of a host after its lab was closed.
var ErrClosed = errors.New("the lab is closed")

// A namespace is an unnamed network namespace and the thread that lives in it.
type namespace struct {
	fd    *os.File // holds the namespace for netlink sockets and devices moved into it
	tid   int
	inode uint64 // what /proc/PID/ns/net of its processes shows
	calls chan call
	quit  chan struct{} // closed to end the thread
	done  chan struct{} // closed when it has ended
	once  sync.Once
}

type call struct {
	fn  func() error
	err chan<- error // buffered
}

func newNamespace() (*namespace, error) {
	ns := &namespace{calls: make(chan call), quit: make(chan struct{}), done: make(chan struct{})}
	ready := make(chan error, 1)
	go ns.thread(ready)
	if err := <-ready; err != nil {
		return nil, err
	}
	return ns, nil
}

// thread is the life of the namespace's thread. It never unlocks it, so that
// the runtime ends the thread with the goroutine, and the kernel then kills
// the children that were started on it.
func (ns *namespace) thread(ready chan<- error) {
	runtime.LockOSThread()
	if unix.Gettid() == os.Getpid() {
		// The main thread of a process can't end before the process, and its
		// namespace is what others see as the process's own. Keep it busy
		// until another thread has taken over.
		taken := make(chan error, 1)
		go ns.thread(taken)
		err := <-taken
		runtime.UnlockOSThread()
		ready <- err
		return
	}
	if err := ns.enter(); err != nil {
		ready <- err
		return
	}
	defer close(ns.done)
	ready <- nil
	for {
		select {
		case c := <-ns.calls:
			c.err <- c.fn()
		case <-ns.quit:
			return
		}
	}
}

func (ns *namespace) enter() error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		if errors.Is(err, fs.ErrPermission) {
			return fmt.Errorf("make a network namespace: %w; run as root", err)
		}
		return fmt.Errorf("make a network namespace: %w", err)
	}
	f, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return fmt.Errorf("hold the network namespace: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		f.Close()
		return fmt.Errorf("identify the network namespace: %w", err)
	}
	if err := quiet(); err != nil {
		f.Close()
		return err
	}
	ns.fd, ns.inode, ns.tid = f, st.Ino, unix.Gettid()
	return nil
}

// quiet keeps the kernel's own protocol stack out of the network: it must not
// speak IPv6 on a machine's TAP device, nor forward what it overhears there.
// Called in the namespace, before it has devices.
func quiet() error {
	for _, s := range []struct {
		path, value string
		optional    bool // the kernel may lack the protocol
	}{
		{"/proc/sys/net/ipv4/ip_forward", "0", false},
		{"/proc/sys/net/ipv6/conf/all/disable_ipv6", "1", true},
		{"/proc/sys/net/ipv6/conf/default/disable_ipv6", "1", true},
	} {
		err := os.WriteFile(s.path, []byte(s.value), 0)
		if err != nil && !(s.optional && errors.Is(err, fs.ErrNotExist)) {
			return fmt.Errorf("silence the kernel's own traffic: %w", err)
		}
	}
	return nil
}

// do runs fn on the namespace's thread, one call at a time.
func (ns *namespace) do(fn func() error) error {
	res := make(chan error, 1)
	select {
	case ns.calls <- call{fn, res}:
	case <-ns.done:
		return ErrClosed
	}
	select {
	case err := <-res:
		return err
	case <-ns.done:
		// Also when fn left by runtime.Goexit, which took the thread along.
		select {
		case err := <-res:
			return err
		default:
			return ErrClosed
		}
	}
}

// close ends the thread. The namespace goes when its last process and file do.
func (ns *namespace) close() {
	ns.once.Do(func() {
		close(ns.quit)
		<-ns.done
		ns.fd.Close()
	})
}
