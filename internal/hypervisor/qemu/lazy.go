package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"violin/internal/qmp"
)

// ErrNoPostcopy says that a VM cannot be loaded lazily here. It can be loaded by
// [VM.Load] all the same.
var ErrNoPostcopy = errors.New("memory cannot follow a VM that runs already")

// ErrClosed says that a VM was closed before it had all its memory.
var ErrClosed = errors.New("the VM was closed")

// Userfaultfd tells whether this process, and so a QEMU that it starts, may have the
// kernel report accesses to memory that is not there yet. An error says why not.
func Userfaultfd() error {
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC, 0, 0)
	if errno != 0 {
		return fmt.Errorf("userfaultfd(2): %w (is CONFIG_USERFAULTFD on, and is this root, or vm.unprivileged_userfaultfd 1?)", errno)
	}
	defer unix.Close(int(fd))
	api := struct{ api, features, ioctls uint64 }{api: 0xaa} // struct uffdio_api
	const uffdioAPI = 0xc018aa3f                             // _IOWR(0xaa, 0x3f, struct uffdio_api)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, uffdioAPI, uintptr(unsafe.Pointer(&api))); errno != 0 {
		return fmt.Errorf("userfaultfd(2): %w", errno)
	}
	return nil
}

// lazyBuffer is the buffer of a lazy load's socket, in bytes. A page that the VM asks
// for comes behind what is in there.
const lazyBuffer = 64 << 10

// LoadLazily gives an incoming VM its devices, so that it may be let run, while its
// memory follows. The vCPUs stay stopped.
//
// serve plays the source of a post-copy on the connection, until the VM has all of its
// memory; LoadLazily returns before that. If it fails, the VM is ended, for it can't run
// without its memory, and [VM.Err] says why.
//
// ended is called once, when there is nothing more to come: with the error of
// LoadLazily if it was not begun, which leaves the VM as it was if that is
// ErrNoPostcopy, and else with what came of it.
func (vm *VM) LoadLazily(ctx context.Context, serve func(io.ReadWriteCloser) error, ended func(error)) error {
	conn, events, err := vm.beginLazily(ctx)
	if err != nil {
		err = fmt.Errorf("load: %w", err)
		ended(err)
		return err
	}
	failed := vm.serveLazily(conn, events, serve, ended)
	if err := vm.loaded(ctx, failed); err != nil {
		vm.fail(err)
		return fmt.Errorf("load: %w%s", err, vm.logTail())
	}
	return nil
}

// serveLazily serves a VM in the background. The channel has the error, if it was ended
// for one.
func (vm *VM) serveLazily(conn io.ReadWriteCloser, events *qmp.Subscription, serve func(io.ReadWriteCloser) error, ended func(error)) <-chan error {
	failed := make(chan error, 1)
	go func() {
		defer events.Close()
		err := serve(conn)
		if err == nil {
			// Past the caller's context: this ends with the VM at the latest.
			err = migrated(context.Background(), events)
		}
		if err != nil {
			if vm.isClosed() {
				err = ErrClosed
			}
			err = fmt.Errorf("give it its memory: %w", err)
			vm.fail(err)
			failed <- err
		}
		ended(err)
	}()
	return failed
}

// GoOnLazily has a VM that was found get the memory that it has not got from the process
// that it was found from: serve plays the source of a post-copy that goes on. Otherwise it
// is as LoadLazily; the VM may run already.
func (vm *VM) GoOnLazily(ctx context.Context, serve func(io.ReadWriteCloser) error, ended func(error)) error {
	conn, events, err := vm.recover(ctx)
	if err != nil {
		err = fmt.Errorf("go on to give it its memory: %w", err)
		vm.End(err)
		ended(err)
		return err
	}
	if conn == nil { // it had all of it
		ended(nil)
		return nil
	}
	vm.serveLazily(conn, events, serve, ended)
	return nil
}

// recover has the VM wait for a post-copy that broke to go on. The connection is nil if it
// did not break, but had ended.
func (vm *VM) recover(ctx context.Context) (io.ReadWriteCloser, *qmp.Subscription, error) {
	if vm.qmp == nil {
		return nil, nil, errors.Join(errors.New("it has ended"), vm.Err())
	}
	for {
		var m struct{ Status string }
		if err := vm.qmp.Execute(ctx, "query-migrate", nil, &m); err != nil {
			return nil, nil, err
		}
		switch m.Status {
		case "postcopy-paused":
			return vm.take(ctx, "migrate-recover")
		case "completed":
			return nil, nil, nil
		case "postcopy-active", "postcopy-recover": // it has not noticed yet
		default:
			return nil, nil, fmt.Errorf("QEMU says that its migration is %q", m.Status)
		}
		select {
		case <-time.After(recoverPoll):
		case <-ctx.Done():
			return nil, nil, ctx.Err()
		}
	}
}

// beginLazily has the VM wait for a post-copy on a connection.
func (vm *VM) beginLazily(ctx context.Context) (io.ReadWriteCloser, *qmp.Subscription, error) {
	if err := Userfaultfd(); err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrNoPostcopy, err)
	}
	if err := vm.setCapabilities(ctx, []string{"postcopy-ram"}); err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrNoPostcopy, err)
	}
	return vm.take(ctx, "migrate-incoming")
}

// take has the VM take a post-copy in, or on, by a command of QMP.
func (vm *VM) take(ctx context.Context, command string) (io.ReadWriteCloser, *qmp.Subscription, error) {
	ours, events, err := vm.incoming(ctx, command)
	if err != nil {
		return nil, nil, err
	}
	if err := setBuffer(ours, lazyBuffer); err != nil {
		vm.log.Debug("the stream's buffer is not as it should be", "err", err)
	}
	return ours, events, nil
}

// recoverPoll is how often a VM is asked whether it has noticed that a connection broke.
const recoverPoll = 5 * time.Millisecond

// loaded returns once an incoming VM has its devices and could run.
func (vm *VM) loaded(ctx context.Context, failed <-chan error) error {
	for {
		status, err := vm.Status(ctx)
		select {
		case why := <-failed: // says more
			return why
		default:
		}
		if err != nil {
			return err
		}
		if status == "paused" {
			return nil
		}
		select {
		case why := <-failed:
			return why
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// End ends a VM that cannot go on; [VM.Err] says why.
func (vm *VM) End(why error) {
	if vm.proc != nil {
		vm.fail(why)
	}
}

// fail ends a VM that must not go on.
func (vm *VM) fail(why error) {
	vm.mu.Lock()
	if vm.cause == nil {
		vm.cause = why
	}
	vm.mu.Unlock()
	if err := vm.proc.Kill(); err != nil {
		vm.log.Debug("QEMU was gone already", "err", err)
	}
}
