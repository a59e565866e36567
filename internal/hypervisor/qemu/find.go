package qemu

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"violin/internal/child"
	"violin/internal/priority"
	"violin/internal/qmp"
)

// errBroken: QEMU 7.2 leaves the memory of such a VM write-protected, and nobody answers the
// vCPUs' faults any more. It says that the VM runs, and no vCPU does.
var errBroken = errors.New("the stream of its background snapshot broke, of which QEMU does not recover")

// errDeaf: QEMU's own thread waits for something, such as for memory that nobody gives it.
var errDeaf = errors.New("the agent that took over could not speak to it")

// findBound is how long QEMU may take to answer who finds it. Its monitor waits for as
// long as its disks or its memory make it wait.
const findBound = 30 * time.Second

// Find finds the VM that an agent before this one has started, as it is: running,
// stopped, or in a capture, which [VM.Orphan] is then for. One that has ended is one that
// has ended; one that does not answer is ended. stored says, by disk, through which layer
// it is in the store: see [VM.Stored] and [Frozen].
func Find(ctx context.Context, spec Spec, stored map[string]int, log *slog.Logger) (*VM, error) {
	vm := &VM{spec: spec, log: log.With("vm", spec.Name), done: make(chan struct{})}
	var err error
	if vm.proc, err = child.Find(spec.Dir); err != nil {
		return nil, fmt.Errorf("find QEMU of %s: %w", spec.Name, err)
	}
	if vm.proc == nil {
		vm.err = fmt.Errorf("QEMU of %s ended while no agent was there%s", spec.Name, vm.logTail())
		close(vm.done)
		vm.findDisks(nil)
		return vm, nil
	}
	go vm.watch()
	go vm.tendConsoleLog()
	if err := priority.Calm(vm.PID()); err != nil {
		vm.log.Debug("its priority is not as it should be", "err", err)
	}
	asking, cancel := context.WithTimeout(ctx, findBound)
	defer cancel()
	if vm.qmp, err = qmp.Dial(asking, vm.path("qmp.sock")); err == nil {
		err = vm.findVCPUs(asking)
	}
	if err != nil {
		vm.mu.Lock()
		vm.cause = fmt.Errorf("%w: %w", errDeaf, err)
		vm.mu.Unlock()
		vm.findDisks(nil)
		if err := vm.proc.Kill(); err != nil {
			return nil, fmt.Errorf("find QEMU of %s: %w", spec.Name, err)
		}
		<-vm.done // from now on it is one that has ended
		return vm, nil
	}
	vm.findDisks(stored)
	return vm, nil
}

// Orphan is the capture that the VM is in, or is not, of an agent that has died. All that
// can be done with it is to give it up, or to keep it if it is complete.
func (vm *VM) Orphan(mode Mode) *Capture {
	c := &Capture{vm: vm, mode: mode, orphan: true, released: make(chan struct{})}
	if vm.qmp != nil {
		c.events = vm.qmp.Subscribe(256, "STOP", "RESUME", "MIGRATION")
	}
	return c
}

// abortOrphan gives an orphan up: as [Capture.Abort], but for the stream, which is not ours.
func (c *Capture) abortOrphan(ctx context.Context) error {
	if c.mode == Background {
		if c.vm.keeper == nil {
			return errors.New("nobody has its stream")
		}
		return c.vm.keeper.Release(c.vm.spec.Dir)
	}
	var m struct{ Status string }
	if err := c.vm.qmp.Execute(ctx, "query-migrate", nil, &m); err != nil {
		return err
	}
	switch m.Status {
	case "setup", "active", "pre-switchover":
		return c.vm.qmp.Execute(ctx, "migrate_cancel", nil, nil)
	}
	return nil // it has ended, or is about to
}

// keep has the stream kept beyond this process, if there is who does.
func (c *Capture) keep() error {
	if c.vm.keeper == nil {
		return nil
	}
	err := c.vm.keeper.Put(c.vm.spec.Dir, c.ours, c.theirs)
	if err == nil && c.mode == Precopy {
		err = c.vm.keeper.Release(c.vm.spec.Dir) // it runs from the beginning
	}
	return err
}

// letGo says that the stream is to be read to its end if this process dies.
func (c *Capture) letGo() {
	if c.vm.keeper != nil && !c.orphan {
		c.forgive(c.vm.keeper.Release(c.vm.spec.Dir))
	}
}

// drop says that the capture is over.
func (c *Capture) drop() {
	if c.vm.keeper != nil {
		c.forgive(c.vm.keeper.Drop(c.vm.spec.Dir))
	}
}

// forgive takes note of an error that harms only if this process dies as well.
func (c *Capture) forgive(err error) {
	if err != nil && !errors.Is(err, os.ErrClosed) {
		c.vm.log.Warn("a capture would not survive the death of this agent", "err", err)
	}
}
