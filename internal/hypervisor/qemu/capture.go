package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"violin/internal/priority"
	"violin/internal/qmp"
)

// Mode is how a VM's memory is captured.
type Mode int

// The modes.
const (
	// Background is QEMU's background-snapshot: the state is that of the beginning,
	// and memory leaves by copy-on-write while the VM runs.
	Background Mode = iota
	// Precopy is a live migration with pause-before-switchover: the state is that of
	// the end.
	Precopy
)

func (m Mode) String() string {
	if m == Precopy {
		return "precopy"
	}
	return "background"
}

// armBound bounds the wait for a background snapshot's set-up. Going on too
// early only makes the pause longer.
const armBound = 5 * time.Second

// streamBuffer is the stream's socket buffer in bytes. It is small, so that QEMU's
// snapshot thread soon waits for who reads: the pace of the capture is then that of
// a thread that lets pauses of other nodes go first. With 4 MiB, the longest pause of four
// nodes was twice as long. It has to hold what QEMU writes in a nap.
const streamBuffer = 256 << 10

// nap is how long a reader waits that has caught up. QEMU writes a background snapshot
// page by page; a reader that is woken for each spends as much on that as on storing it, and so does QEMU.
const nap = 300 * time.Microsecond

// standstill is the least bandwidth, in bytes/s: QEMU divides it by ten, and takes 0
// for no limit.
const standstill = 10

// nearlyDone is how much memory a pre-copy keeps back, in bytes.
const nearlyDone = 32 << 20

// Capture is a migration to nowhere that waits for its moment.
//
// Setting a background snapshot up takes QEMU tens of milliseconds, since it
// touches every page. So that none of it falls into the pause, QEMU is given a
// socket that is full: it does its set-up while the VM runs, and then blocks in
// in its first write, until [Capture.Release] makes room. There is nothing to wait
// for in the pause but the devices' state and the protection of memory.
//
// QEMU 8.2 and later would do that first write with its big lock held, and hear nothing any
// more. There the migration begins in the pause, which its set-up makes longer.
type Capture struct {
	vm      *VM
	mode    Mode
	events  *qmp.Subscription
	ours    *os.File
	theirs  *os.File          // our duplicate of QEMU's end, until the capture is released
	junk    int               // bytes that fill the socket
	late    bool              // the migration begins with Release
	urgency *priority.Urgency // from Stop to Resumed or Abort
	thread  int               // QEMU's snapshot thread; 0 if it was not seen
	orphan  bool              // begun by an agent that has died: the stream is the keeper's

	released chan struct{} // closed when the stream may be read
	once     sync.Once
	frozen   []Frozen

	turn      sync.Mutex // held while a pre-copy is told to switch over, or a late capture to begin
	continued bool       // it has been; guarded by turn
	paused    bool       // pre-copy: QEMU has stopped and waits to switch over
	stopped   time.Time

	mu        sync.Mutex
	completed bool
	aborted   bool
}

// Arm begins to set a capture up; the VM runs on. [Capture.Ready] waits for it.
func (vm *VM) Arm(ctx context.Context, mode Mode) (_ *Capture, err error) {
	c := &Capture{vm: vm, mode: mode, released: make(chan struct{}), late: mode == Background && vm.locksSetup()}
	if c.ours, c.theirs, err = socketpair(false); err != nil {
		return nil, fmt.Errorf("capture: %w", err)
	}
	c.events = vm.qmp.Subscribe(256, "STOP", "RESUME", "MIGRATION")
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("capture (%s): %w", mode, err), c.Abort(context.WithoutCancel(ctx)))
		}
	}()
	caps := []string{"background-snapshot"}
	if mode == Precopy {
		caps = []string{"pause-before-switchover"}
		// Not to switch over before it is told to: no pause is short enough. A small VM
		// would be through before anybody looks; see converge.
		rate := 256 << 20
		if vm.spec.Memory <= nearlyDone {
			rate = standstill
		}
		if err := vm.setParameters(ctx, map[string]any{"downtime-limit": 0, "max-bandwidth": rate}); err != nil {
			return nil, err
		}
	}
	if err := vm.setCapabilities(ctx, caps); err != nil {
		return nil, err
	}
	if err := vm.idle(ctx); err != nil {
		return nil, err
	}
	if err := vm.armDisks(ctx); err != nil {
		return nil, err
	}
	if mode == Background && !c.late {
		if c.junk, err = fill(c.theirs); err != nil {
			return nil, err
		}
	}
	if err := c.keep(); err != nil {
		return nil, err
	}
	if c.late {
		return c, nil
	}
	if err := c.begin(ctx); err != nil {
		return nil, err
	}
	if mode == Precopy {
		c.theirs.Close()
		close(c.released)
	}
	return c, nil
}

// locksSetup tells whether QEMU sets a migration up with its big lock held.
func (vm *VM) locksSetup() bool {
	v := vm.qmp.Version()
	return v.Major > 8 || v.Major == 8 && v.Minor >= 2
}

// begin has QEMU migrate into the socket.
func (c *Capture) begin(ctx context.Context) error {
	c.vm.mu.Lock()
	c.vm.number++
	name := "capture" + strconv.Itoa(c.vm.number)
	c.vm.mu.Unlock()
	if err := c.vm.qmp.ExecuteWithFD(ctx, "getfd", map[string]string{"fdname": name}, nil, c.theirs); err != nil {
		return err
	}
	return c.vm.qmp.Execute(ctx, "migrate", map[string]string{"uri": "fd:" + name}, nil)
}

// Ready returns once stopping the VM will be short: in the background mode when
// QEMU has set up (at once, if it does that in the pause), in pre-copy when nearly all
// memory has been sent, for which the stream must be read meanwhile.
func (c *Capture) Ready(ctx context.Context) error {
	switch {
	case c.late:
		return nil
	case c.mode == Background:
		return c.awaitSetup(ctx)
	}
	return c.converge(ctx)
}

// idle returns once QEMU has forgotten the migration before: some time after it
// said that it has completed. One that is begun earlier is refused, and ends QEMU 7.2.
func (vm *VM) idle(ctx context.Context) error {
	for {
		var instances []struct{ Type string }
		if err := vm.qmp.Execute(ctx, "query-yank", nil, &instances); err != nil {
			return err
		}
		busy := false
		for _, i := range instances {
			busy = busy || i.Type == "migration"
		}
		if !busy {
			return nil
		}
		select {
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("QEMU does not end its last migration: %w", ctx.Err())
		}
	}
}

func (vm *VM) setParameters(ctx context.Context, p map[string]any) error {
	return vm.qmp.Execute(ctx, "migrate-set-parameters", p, nil)
}

// fill makes a socket's buffer as small as can be and fills it.
func fill(f *os.File) (int, error) {
	fd := int(f.Fd())
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 1); err != nil {
		return 0, fmt.Errorf("make the stream's buffer small: %w", err)
	}
	for n := 0; ; {
		m, err := unix.SendmsgN(fd, []byte{0}, nil, nil, unix.MSG_DONTWAIT)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return n, nil
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, fmt.Errorf("fill the stream's buffer: %w", err)
		default:
			n += m
		}
	}
}

// awaitSetup returns once QEMU's snapshot thread is stuck in its first write.
func (c *Capture) awaitSetup(ctx context.Context) error {
	deadline := time.Now().Add(armBound)
	for time.Now().Before(deadline) {
		if thread, waits := c.vm.snapshotThread(); waits {
			c.thread = thread
			return nil
		}
		select {
		case <-time.After(time.Millisecond):
		case <-c.vm.done:
			return c.vm.err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	c.vm.log.Warn("the snapshot's set-up was not seen to end; the pause will be longer", "waited", armBound)
	return nil
}

// snapshotThread finds the thread that writes the stream, and tells whether it is
// in sendmsg(2).
func (vm *VM) snapshotThread() (id int, waits bool) {
	dir := fmt.Sprintf("/proc/%d/task", vm.PID())
	tasks, err := os.ReadDir(dir)
	if err != nil {
		return 0, false
	}
	for _, t := range tasks {
		comm, err := os.ReadFile(dir + "/" + t.Name() + "/comm")
		if err != nil || !strings.HasPrefix(string(comm), "bg_snapshot") && !strings.HasPrefix(string(comm), "mig/snapshot") { // the latter from QEMU 9.1 on
			continue
		}
		call, err := os.ReadFile(dir + "/" + t.Name() + "/syscall")
		if err != nil {
			continue
		}
		number, _, _ := strings.Cut(string(call), " ")
		if id, err = strconv.Atoi(t.Name()); err == nil {
			return id, number == strconv.Itoa(unix.SYS_SENDMSG)
		}
	}
	return 0, false
}

// converge returns once nearly all memory has been sent.
func (c *Capture) converge(ctx context.Context) error {
	for {
		var m struct {
			Status string
			RAM    struct {
				Syncs     int `json:"dirty-sync-count"`
				Remaining int64
			}
			Error string `json:"error-desc"`
		}
		if err := c.vm.qmp.Execute(ctx, "query-migrate", nil, &m); err != nil {
			return err
		}
		switch m.Status {
		case "failed", "cancelled":
			return fmt.Errorf("QEMU's migration has %s: %s", m.Status, m.Error)
		case "pre-switchover":
			return nil // it had nothing left to send, and has stopped already
		}
		if m.Status == "active" && (m.RAM.Syncs >= 2 || m.RAM.Remaining < nearlyDone) {
			// An idle guest would have nothing left to send, and QEMU would then
			// stop it by itself: keep a little back until it is told to.
			return c.vm.setParameters(ctx, map[string]any{"max-bandwidth": standstill})
		}
		select {
		case <-time.After(2 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Stream is the migration stream. Reading waits until Release, in the background
// mode.
func (c *Capture) Stream() io.Reader { return &captureStream{Capture: c} }

type captureStream struct {
	*Capture
	caughtUp bool // the last read took all there was
}

func (s *captureStream) Read(p []byte) (int, error) {
	<-s.released
	if s.caughtUp && s.mode == Background {
		// The thread itself, as it waits in Read: a timer would be another's.
		ts := unix.NsecToTimespec(int64(nap))
		_ = unix.Nanosleep(&ts, nil)
	}
	n, err := s.ours.Read(p)
	s.caughtUp = n < len(p)
	if err == io.EOF {
		s.ours.Close()
	}
	return n, err
}

// hangUp closes our end of the stream, whoever reads it.
func (c *Capture) hangUp() {
	if raw, err := c.ours.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_RDWR) })
	}
	c.ours.Close()
}

// Stop stops the vCPUs and returns when they stopped.
func (c *Capture) Stop(ctx context.Context) (time.Time, error) {
	c.hurry()
	var err error
	if c.mode == Background {
		err = c.vm.qmp.Execute(ctx, "stop", nil, nil)
	} else {
		err = c.vm.setParameters(ctx, map[string]any{"downtime-limit": 60_000, "max-bandwidth": 1 << 30})
	}
	if err != nil {
		return time.Time{}, fmt.Errorf("stop the vCPUs: %w", err)
	}
	for {
		e, err := c.events.Next(ctx)
		if err != nil {
			return time.Time{}, fmt.Errorf("stop the vCPUs: %w", err)
		}
		switch {
		case e.Name == "STOP":
			c.stopped = e.Timestamp
			for _, cpu := range c.vm.cpus { // they had to run in order to see that they shall stop
				c.report(c.urgency.LowerThread(cpu, vcpuNice))
			}
			if c.mode == Background {
				return c.stopped, nil
			}
		case e.Name == "MIGRATION" && strings.Contains(string(e.Data), `"pre-switchover"`):
			c.paused = true
			return c.stopped, nil
		case e.Name == "MIGRATION" && (strings.Contains(string(e.Data), `"failed"`) || strings.Contains(string(e.Data), `"cancelled"`)):
			return time.Time{}, errors.New("stop the vCPUs: QEMU's migration has failed")
		}
	}
}

// Release freezes the disks and lets QEMU capture. In the background mode the vCPUs then
// run again without being told to; see [Capture.Resumed].
func (c *Capture) Release(ctx context.Context) (err error) {
	if c.frozen, err = c.vm.switchDisks(ctx); err != nil {
		return fmt.Errorf("capture: %w", err)
	}
	switch {
	case c.mode == Precopy:
		err = c.switchOver(ctx)
	case c.late:
		err = c.beginLate(ctx)
	}
	if err != nil {
		return fmt.Errorf("capture: %w", err)
	}
	return c.unblock()
}

// beginLate begins a migration that is all in the pause.
func (c *Capture) beginLate(ctx context.Context) error {
	return c.unlessAborted(func() error { return c.begin(ctx) })
}

// switchOver lets a pre-copy end. Whether it has been told to must be known, so that
// it is not cancelled then; see [Capture.Abort].
func (c *Capture) switchOver(ctx context.Context) error {
	return c.unlessAborted(func() error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), switchBound)
		defer cancel()
		c.continued = true
		return c.vm.qmp.Execute(ctx, "migrate-continue", map[string]string{"state": "pre-switchover"}, nil)
	})
}

// unlessAborted lets QEMU capture, which [Capture.Abort] waits for, unless that came first.
func (c *Capture) unlessAborted(capture func() error) error {
	c.turn.Lock()
	defer c.turn.Unlock()
	c.mu.Lock()
	aborted := c.aborted
	c.mu.Unlock()
	if aborted {
		return errors.New("it was given up")
	}
	return capture()
}

// unblock makes room in the stream and throws away what filled it.
func (c *Capture) unblock() (err error) {
	c.once.Do(func() {
		if c.mode == Precopy {
			return
		}
		defer close(c.released)
		c.letGo() // before, or its end would not be seen
		err = setBuffer(c.theirs, streamBuffer)
		c.theirs.Close()
		if _, rerr := io.CopyN(io.Discard, c.ours, int64(c.junk)); rerr != nil {
			err = errors.Join(err, rerr)
		}
	})
	if err != nil {
		return fmt.Errorf("capture: let the stream go: %w", err)
	}
	return nil
}

// Resumed waits until the vCPUs run again and returns when they began to.
func (c *Capture) Resumed(ctx context.Context) (time.Time, error) {
	if c.mode == Precopy {
		if err := c.Wait(ctx); err != nil {
			return time.Time{}, err
		}
		if err := c.finalized(ctx); err != nil {
			return time.Time{}, err
		}
		defer c.relax()
		return c.vm.Resume(ctx)
	}
	if c.late {
		if err := c.letRun(ctx); err != nil {
			return time.Time{}, fmt.Errorf("wait for the vCPUs to run again: %w", err)
		}
	}
	for {
		e, err := c.events.Next(ctx)
		if err != nil {
			return time.Time{}, fmt.Errorf("wait for the vCPUs to run again: %w", err)
		}
		if err := c.note(e); err != nil {
			return time.Time{}, err
		}
		if e.Name == "RESUME" {
			c.relax()
			return e.Timestamp, nil
		}
	}
}

// letRun has the vCPUs run once the devices are saved and memory is protected. From 9.0 on
// QEMU leaves a VM that was stopped before as it was. That they are is seen from the first
// page that is sent.
func (c *Capture) letRun(ctx context.Context) error {
	for {
		var m struct {
			Status string
			RAM    struct{ Normal, Duplicate int64 }
			Error  string `json:"error-desc"`
		}
		if err := c.vm.qmp.Execute(ctx, "query-migrate", nil, &m); err != nil {
			return err
		}
		switch {
		case m.Status == "failed" || m.Status == "cancelled":
			return fmt.Errorf("QEMU's migration has %s: %s", m.Status, m.Error)
		case m.Status == "completed" || m.Status == "active" && m.RAM.Normal+m.RAM.Duplicate > 0:
			c.thread, _ = c.vm.snapshotThread()
			if status, err := c.vm.Status(ctx); err != nil || status == "running" {
				return err
			}
			return c.vm.qmp.Execute(ctx, "cont", nil, nil)
		}
		select {
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// finalized returns once QEMU has tidied up after a pre-copy and may run again,
// some time after it said that the migration has completed.
func (c *Capture) finalized(ctx context.Context) error {
	for {
		status, err := c.vm.Status(ctx)
		if err != nil || status == "postmigrate" {
			return err
		}
		select {
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("QEMU does not leave the state %q: %w", status, ctx.Err())
		}
	}
}

// hurry makes QEMU urgent for the time of the pause; see [priority.Urgency].
func (c *Capture) hurry() {
	u, err := priority.Raise(c.vm.PID(), nil)
	c.report(err)
	c.mu.Lock()
	c.urgency = u
	c.mu.Unlock()
}

// relax ends that. The rest of the capture goes behind the pauses of nodes that are
// being cut beside this one, and still before the vCPUs: it must keep up with their
// writes.
func (c *Capture) relax() {
	c.mu.Lock()
	u := c.urgency
	c.mu.Unlock()
	if u == nil {
		return
	}
	if c.thread != 0 {
		c.report(u.LowerThread(c.thread, snapshotNice))
	}
	c.report(u.Lower())
}

func (c *Capture) report(err error) {
	if err != nil {
		c.vm.log.Debug("the pause's priority is not as it should be", "err", err)
	}
}

// note takes in what an event says of the migration.
func (c *Capture) note(e qmp.Event) error {
	if e.Name != "MIGRATION" {
		return nil
	}
	switch {
	case strings.Contains(string(e.Data), `"completed"`):
		c.mu.Lock()
		c.completed = true
		c.mu.Unlock()
	case strings.Contains(string(e.Data), `"failed"`), strings.Contains(string(e.Data), `"cancelled"`):
		return fmt.Errorf("QEMU's migration ended with %s%s", e.Data, c.vm.logTail())
	}
	return nil
}

// Wait returns once QEMU has sent everything.
func (c *Capture) Wait(ctx context.Context) error {
	for {
		c.mu.Lock()
		completed := c.completed
		c.mu.Unlock()
		if completed {
			c.events.Close()
			c.drop()
			return nil
		}
		e, err := c.events.Next(ctx)
		if err != nil {
			return fmt.Errorf("wait for the end of the capture: %w", err)
		}
		if err := c.note(e); err != nil {
			return err
		}
	}
}

// Frozen is the disks as they were, once the capture was released.
func (c *Capture) Frozen() []Frozen { return c.frozen }

// Stored says that the capture, disks and all, belongs to a snapshot that counts. The
// next one's disks are read from here on. Of an orphan nobody knows what was stored: the
// next one's disks are read from where they were.
func (c *Capture) Stored() { c.vm.mergeDisks(!c.orphan) }

// Abort gives the capture up, at whatever step it is. The VM runs afterwards. It
// may be called again.
func (c *Capture) Abort(ctx context.Context) (err error) {
	c.mu.Lock()
	if c.aborted {
		c.mu.Unlock()
		return nil
	}
	c.aborted = true
	completed := c.completed
	c.mu.Unlock()
	defer c.drop()
	if c.vm.qmp == nil { // it was found to have ended
		return fmt.Errorf("give the capture up: %w", c.vm.Err())
	}
	defer c.events.Close()
	defer c.relax()
	defer func() {
		if derr := c.vm.dropSpares(ctx); derr != nil && c.vm.Err() == nil {
			err = errors.Join(err, fmt.Errorf("give the capture up: %w", derr))
		}
		c.vm.mergeDisks(false)
	}()
	c.turn.Lock()
	continued := c.continued
	c.turn.Unlock()
	switch {
	case c.orphan:
		if err := c.abortOrphan(ctx); err != nil {
			return fmt.Errorf("give the capture up: %w", err)
		}
	case c.mode != Precopy || completed:
	case continued:
		// It is about to end. Cancelled now, QEMU 7.2 died at the guest's next write to a
		// disk: it seems to let the VM run with disks that it has put away.
		go func() { _, _ = io.Copy(io.Discard, c.ours) }()
	default:
		if err := c.vm.qmp.Execute(ctx, "migrate_cancel", nil, nil); err != nil {
			return fmt.Errorf("give the capture up: %w", err)
		}
	}
	if c.mode == Background && !c.orphan {
		// A background snapshot that is cancelled leaves QEMU (7.2) unable to take
		// another: the guest's memory stays registered with userfaultfd. So it is
		// let through, and its stream thrown away.
		if err := c.unblock(); err != nil && !completed {
			return err
		}
		go func() { _, _ = io.Copy(io.Discard, c.ours) }()
	}
	if !c.orphan {
		defer c.hangUp()
	}
	status, err := c.settled(ctx)
	if err != nil {
		return fmt.Errorf("give the capture up: %w", err)
	}
	if c.orphan && c.mode == Background && status == "failed" {
		c.vm.fail(errBroken)
		return fmt.Errorf("give the capture up: %w", errBroken)
	}
	running, err := c.vm.steady(ctx)
	if err != nil {
		return fmt.Errorf("give the capture up: %w", err)
	}
	if !running {
		if err := c.vm.qmp.Execute(ctx, "cont", nil, nil); err != nil {
			return fmt.Errorf("let the vCPUs run again: %w", err)
		}
	}
	return nil
}

// steady tells whether the vCPUs run, once QEMU takes an order about that: for an
// instant after it has called a migration completed it does not.
func (vm *VM) steady(ctx context.Context) (running bool, err error) {
	for {
		status, err := vm.Status(ctx)
		if err != nil || status != "finish-migrate" {
			return status == "running", err
		}
		select {
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
			return false, ctx.Err()
		}
	}
}

// settled returns once QEMU has no migration under way, with how the last one ended.
func (c *Capture) settled(ctx context.Context) (string, error) {
	for {
		var m struct{ Status string }
		if err := c.vm.qmp.Execute(ctx, "query-migrate", nil, &m); err != nil {
			return "", err
		}
		switch m.Status {
		case "", "none", "completed", "failed", "cancelled":
			return m.Status, nil
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
}
