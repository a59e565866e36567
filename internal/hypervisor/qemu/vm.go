// Package qemu runs a node on QEMU: it starts the VM, captures its state by a
// migration that never leaves the host, and gives a state back to a new VM.
package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"violin/internal/child"
	"violin/internal/qmp"
	"violin/internal/topology"
)

// Program is QEMU's name; it is looked up in PATH.
const Program = "qemu-system-x86_64"

// The niceness of QEMU's threads that work beside others' pauses. A vCPU uses, under
// TCG, all the processor time there is.
const (
	vcpuNice     = 10
	snapshotNice = 0
)

// oddMemory is added to a VM's memory, in KiB, so that it is no multiple of 256 KiB.
// QEMU before 9.0 loses pages written near the end of a pre-copy under TCG if it is
// (mended upstream in 03bfc2188f), and nothing in the stream shows it.
const oddMemory = 8

// endBound bounds the wait for the end of a QEMU whose monitor is gone.
const endBound = time.Second

// Launcher starts a child where the node's TAP devices are.
type Launcher interface{ Start(cmd *exec.Cmd) error }

// NIC is one network interface on a TAP device that exists.
type NIC struct {
	Tap   string
	MAC   net.HardwareAddr
	MTU   int
	Model string // one of topology.Models; empty for virtio
}

// Spec is a VM.
type Spec struct {
	Name        string
	Memory      uint64 // bytes, a multiple of 1 MiB
	CPUs        int
	Firmware    string // one of topology.Firmwares, which boots a disk; empty if there is a kernel
	Kernel      string // path; empty if the firmware finds what to boot
	Initrd      string // path, may be empty
	RootFS      string // path of a read-only disk, may be empty
	Append      string // to the kernel's command line
	GuestConfig []byte // the fw_cfg file topology.GuestConfigName
	// Generation is the VM generation id, a UUID. A VM that has one must be loaded with
	// one, and a VM that has none without: it is a device.
	Generation string
	NICs       []NIC
	Disks      []Disk
	Args       []string // more of QEMU's arguments: see [CheckArgs]
	Dir        string   // sockets, logs and the disks' layers
}

// Keeper keeps the streams of captures beyond this process; see the keeper package.
type Keeper interface {
	Put(name string, reader, writer *os.File) error
	Release(name string) error
	Drop(name string) error
}

// VM is a running QEMU.
type VM struct {
	spec Spec
	log  *slog.Logger
	proc *child.Process
	qmp  *qmp.Client
	cpus []int // the vCPUs' threads

	firmware string // the file; empty for QEMU's own
	disks    disks
	keeper   Keeper // nil for none

	done chan struct{}
	err  error // valid once done is closed

	mu     sync.Mutex
	closed bool
	cause  error // why it was ended, other than by Close
	number int   // of captures so far, for their descriptors' names
}

// Start starts QEMU with its vCPUs stopped. An incoming VM then waits for
// [VM.Load]; the other boots with the first [VM.Resume].
func Start(ctx context.Context, l Launcher, spec Spec, incoming bool, log *slog.Logger) (_ *VM, err error) {
	if err := spec.check(); err != nil {
		return nil, fmt.Errorf("start QEMU of %s: %w", spec.Name, err)
	}
	if err := os.MkdirAll(spec.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("start QEMU: %w", err)
	}
	vm := &VM{spec: spec, log: log.With("vm", spec.Name), done: make(chan struct{})}
	if vm.firmware, err = FindFirmware(spec.Firmware); err != nil {
		return nil, fmt.Errorf("start QEMU of %s: %w", spec.Name, err)
	}
	for _, path := range []string{vm.path("qmp.sock"), vm.ConsolePath(), vm.AgentPath()} {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("start QEMU: remove what an earlier one left: %w", err)
		}
	}
	if err := vm.beginConsoleLog(incoming); err != nil {
		return nil, fmt.Errorf("start QEMU of %s: %w", spec.Name, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, vm.removeDisks())
		}
	}()
	if err := vm.makeDisks(); err != nil {
		return nil, fmt.Errorf("start QEMU of %s: %w", spec.Name, err)
	}
	config := vm.path("guest.conf")
	if err := os.WriteFile(config, spec.GuestConfig, 0o600); err != nil {
		return nil, fmt.Errorf("start QEMU: %w", err)
	}
	// QEMU is given a socket that listens already, so that there is nothing to poll for.
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: vm.path("qmp.sock")})
	if err != nil {
		return nil, fmt.Errorf("start QEMU: %w", err)
	}
	listener.SetUnlinkOnClose(false)
	control, err := listener.File()
	listener.Close()
	if err != nil {
		return nil, fmt.Errorf("start QEMU: %w", err)
	}
	defer control.Close()
	output, err := os.Create(vm.path("qemu.log"))
	if err != nil {
		return nil, fmt.Errorf("start QEMU: %w", err)
	}
	defer output.Close()

	cmd := exec.Command(Program, vm.args(incoming, config)...)
	cmd.ExtraFiles = []*os.File{control}
	cmd.Stdout, cmd.Stderr = output, output
	child.Mark(cmd, spec.Dir)
	if err := l.Start(cmd); err != nil {
		return nil, fmt.Errorf("start %s (is qemu-system-x86 installed?): %w", Program, err)
	}
	vm.proc = child.Started(cmd)
	go vm.watch()
	go vm.tendConsoleLog()
	if vm.qmp, err = qmp.Dial(ctx, vm.path("qmp.sock")); err != nil {
		tail := vm.logTail()
		return nil, errors.Join(fmt.Errorf("start QEMU of %s: %w%s", spec.Name, err, tail), vm.Close())
	}
	if !incoming {
		err = vm.checkCapture(ctx)
	}
	if err == nil {
		err = vm.setCapabilities(ctx, nil)
	}
	if err == nil {
		err = vm.findVCPUs(ctx)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start QEMU of %s: %w", spec.Name, err), vm.Close())
	}
	return vm, nil
}

// watch waits for the end of QEMU, and keeps why it ended.
func (vm *VM) watch() {
	err := vm.proc.Err()
	vm.mu.Lock()
	switch {
	case vm.closed:
	case vm.cause != nil:
		vm.err = fmt.Errorf("%s was stopped: %w", vm.spec.Name, vm.cause)
	default:
		vm.err = fmt.Errorf("QEMU of %s ended: %v%s", vm.spec.Name, exitText(err), vm.logTail())
	}
	vm.mu.Unlock()
	close(vm.done)
}

// KeepStreams has the streams of captures kept beyond this process.
func (vm *VM) KeepStreams(k Keeper) { vm.keeper = k }

// args is QEMU's command line. Every device on it can be migrated; segmentation
// and checksum offloads are off, since a switch in user space does neither.
func (vm *VM) args(incoming bool, config string) []string {
	s := vm.spec
	args := []string{
		"-name", strings.ReplaceAll(s.Name, ",", ",,") + ",debug-threads=on",
		"-nodefaults", "-no-user-config", "-display", "none", "-vga", "none",
		"-only-migratable", // a device that can't be in a snapshot ends QEMU at once, and says so
		"-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max",
		"-m", strconv.FormatUint(s.Memory>>10+oddMemory, 10) + "K", "-smp", strconv.Itoa(s.CPUs), "-S",
		"-chardev", "socket,id=qmp,fd=3,server=on,wait=off", "-mon", "chardev=qmp,mode=control",
		"-chardev", "socket,id=console,path=" + vm.ConsolePath() + ",server=on,wait=off,logfile=" + vm.consoleLog() + ",logappend=on",
		"-serial", "chardev:console",
		"-device", "virtio-serial-pci",
		"-chardev", "socket,id=agent,path=" + vm.AgentPath() + ",server=on,wait=off",
		"-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0",
		"-device", "virtio-rng-pci",
		"-fw_cfg", "name=" + topology.GuestConfigName + ",file=" + config,
	}
	if s.Kernel != "" {
		args = append(args, "-kernel", s.Kernel, "-append", strings.TrimSpace("console=ttyS0 "+s.Append))
	}
	if s.Firmware == "uefi" {
		args = append(args, "-bios", vm.firmware)
	}
	if s.Initrd != "" {
		args = append(args, "-initrd", s.Initrd)
	}
	if s.RootFS != "" {
		args = append(args,
			"-blockdev", `{"driver":"raw","node-name":"root","read-only":true,"file":{"driver":"file","filename":`+quote(s.RootFS)+`,"locking":"off"}}`,
			"-device", "virtio-blk-pci,drive=root")
	}
	args = append(args, vm.diskArgs()...)
	if s.Generation != "" {
		args = append(args, "-device", "vmgenid,guid="+s.Generation)
	}
	for i, n := range s.NICs {
		args = append(args, n.args("net"+strconv.Itoa(i))...)
	}
	args = append(args, s.Args...)
	if incoming {
		args = append(args, "-incoming", "defer")
	}
	return args
}

// check refuses what would break snapshots, or is no part of QEMU's command line.
func (s *Spec) check() error {
	for i, n := range s.NICs {
		if n.Model != "" && !slices.Contains(topology.Models, n.Model) {
			return fmt.Errorf("interface %d: model %q is none of %s", i, n.Model, strings.Join(topology.Models, ", "))
		}
	}
	if (s.Kernel == "") == (s.Firmware == "") {
		return fmt.Errorf("kernel %q and firmware %q: want the one or the other", s.Kernel, s.Firmware)
	}
	for _, d := range s.Disks {
		if d.ReadOnly && d.Restore == nil {
			return fmt.Errorf("disk %q is read-only, and nothing says what it holds", d.Name)
		}
	}
	_, err := CheckArgs(s.Args)
	return err
}

func (n NIC) args(id string) []string {
	tap := "tap,id=" + id + ",ifname=" + n.Tap + ",script=no,downscript=no,vhost=off"
	device := "netdev=" + id + ",mac=" + n.MAC.String() + ",romfile="
	if n.Model != "" && n.Model != topology.Models[0] {
		// Without this header QEMU itself does what it offers the guest to leave to it.
		return []string{"-netdev", tap + ",vnet_hdr=off", "-device", n.Model + "," + device}
	}
	return []string{"-netdev", tap, "-device", "virtio-net-pci," + device + "," +
		"csum=off,gso=off,guest_csum=off,guest_tso4=off,guest_tso6=off,guest_ecn=off,guest_ufo=off," +
		"host_tso4=off,host_tso6=off,host_ecn=off,host_ufo=off"}
}

// checkCapture refuses a VM of which no state can be captured, before its vCPUs run. It
// leaves the capabilities to be set.
func (vm *VM) checkCapture(ctx context.Context) error {
	var m struct {
		Blocked []string `json:"blocked-reasons"`
	}
	if err := vm.qmp.Execute(ctx, "query-migrate", nil, &m); err != nil {
		return err
	}
	if len(m.Blocked) > 0 {
		return fmt.Errorf("no snapshot of it could be taken: %s", strings.Join(m.Blocked, "; "))
	}
	// QEMU looks at the guest's memory, and at what the kernel has, when it is asked for
	// the capability.
	err := vm.setCapabilities(ctx, []string{"background-snapshot"})
	if err != nil && len(vm.spec.Args) > 0 { // what else?
		return fmt.Errorf("no live snapshot of it could be taken, with its arguments %q: %w", vm.spec.Args, err)
	}
	if err != nil {
		vm.log.Warn("this host takes no background snapshots: take them with --mode precopy", "err", err)
	}
	return nil
}

func quote(s string) string {
	b, err := json.Marshal(s)
	if err != nil {
		panic(err) // a string always marshals
	}
	return string(b)
}

func (vm *VM) path(name string) string { return filepath.Join(vm.spec.Dir, name) }

// ConsolePath is the unix socket of the serial console, and AgentPath that of the
// guest agent.
func (vm *VM) ConsolePath() string { return vm.path("console.sock") }
func (vm *VM) AgentPath() string   { return vm.path("agent.sock") }

// PID is QEMU's process.
func (vm *VM) PID() int { return vm.proc.PID() }

// Done is closed when QEMU has ended.
func (vm *VM) Done() <-chan struct{} { return vm.done }

// Err says why QEMU has ended; nil while it runs, and after Close.
func (vm *VM) Err() error {
	select {
	case <-vm.done:
		return vm.err
	default:
		return nil
	}
}

// Close ends QEMU and waits until it is gone.
func (vm *VM) Close() error {
	vm.mu.Lock()
	vm.closed = true
	vm.mu.Unlock()
	if vm.qmp != nil {
		vm.qmp.Close()
	}
	if vm.proc != nil {
		if err := vm.proc.Kill(); err != nil {
			return fmt.Errorf("stop QEMU of %s: %w", vm.spec.Name, err)
		}
	}
	<-vm.done
	if err := vm.removeDisks(); err != nil {
		return fmt.Errorf("delete the disks of %s: %w", vm.spec.Name, err)
	}
	return nil
}

func exitText(err error) string {
	if err == nil {
		return "exit status 0"
	}
	return err.Error()
}

// logTail is the end of what QEMU printed, for an error's text.
func (vm *VM) logTail() string {
	b, err := os.ReadFile(vm.path("qemu.log"))
	if err != nil || len(b) == 0 {
		return ""
	}
	if len(b) > 1000 {
		b = b[len(b)-1000:]
	}
	return ": " + strings.TrimSpace(string(b))
}

// findVCPUs finds the vCPUs' threads and lowers their priority.
func (vm *VM) findVCPUs(ctx context.Context) error {
	var cpus []struct {
		Thread int `json:"thread-id"`
	}
	if err := vm.qmp.Execute(ctx, "query-cpus-fast", nil, &cpus); err != nil {
		return err
	}
	for _, c := range cpus {
		vm.cpus = append(vm.cpus, c.Thread)
		if err := unix.Setpriority(unix.PRIO_PROCESS, c.Thread, vcpuNice); err != nil {
			return fmt.Errorf("lower the priority of vCPU thread %d: %w", c.Thread, err)
		}
	}
	return nil
}

// Status is QEMU's run state, such as "running" or "paused".
func (vm *VM) Status(ctx context.Context) (string, error) {
	var s struct{ Status string }
	err := vm.qmp.Execute(ctx, "query-status", nil, &s)
	if errors.Is(err, qmp.ErrDisconnected) {
		// QEMU is ending: why, is known in a moment.
		select {
		case <-vm.done:
			if vm.err != nil {
				err = vm.err
			}
		case <-time.After(endBound):
		case <-ctx.Done():
		}
	}
	return s.Status, err
}

// Stop stops the vCPUs, outside a capture. Running or not, they stand still when it
// returns.
func (vm *VM) Stop(ctx context.Context) error {
	if err := vm.qmp.Execute(ctx, "stop", nil, nil); err != nil {
		return fmt.Errorf("stop the vCPUs: %w", err)
	}
	return nil
}

// Resume lets the vCPUs run. It returns when they began to, which is now if they run
// already.
func (vm *VM) Resume(ctx context.Context) (time.Time, error) {
	switch status, err := vm.Status(ctx); {
	case err != nil:
		return time.Time{}, err
	case status == "running": // QEMU would send no event
		return time.Now(), nil
	}
	events := vm.qmp.Subscribe(64, "RESUME")
	defer events.Close()
	if err := vm.qmp.Execute(ctx, "cont", nil, nil); err != nil {
		return time.Time{}, err
	}
	e, err := events.Next(ctx)
	return e.Timestamp, err
}

// Load gives an incoming VM its state: write writes a migration stream. The
// vCPUs stay stopped.
func (vm *VM) Load(ctx context.Context, write func(io.Writer) error) error {
	ours, events, err := vm.incoming(ctx, "migrate-incoming")
	if err != nil {
		return fmt.Errorf("load: %w", err)
	}
	defer ours.Close()
	defer events.Close()
	// QEMU reads 32 KiB at a time: with more under way, the two wait for each other less.
	if err := setBuffer(ours, loadBuffer); err != nil {
		vm.log.Debug("the stream's buffer is not as it should be", "err", err)
	}
	stop := context.AfterFunc(ctx, func() { ours.Close() })
	defer stop()
	if err := write(ours); err != nil {
		return fmt.Errorf("load: send the state to QEMU: %w%s", err, vm.logTail())
	}
	ours.Close()
	if err := migrated(ctx, events); err != nil {
		return fmt.Errorf("load: %w%s", err, vm.logTail())
	}
	return nil
}

// SaveTo has a VM write its state by itself, as a background snapshot, to a socket, and
// returns once it has. The vCPUs run but for an instant.
func (vm *VM) SaveTo(ctx context.Context, to *os.File) error {
	err := vm.setCapabilities(ctx, []string{"background-snapshot"})
	if err == nil {
		err = vm.idle(ctx)
	}
	events := vm.qmp.Subscribe(64, "MIGRATION")
	defer events.Close()
	if err == nil {
		err = vm.qmp.ExecuteWithFD(ctx, "getfd", map[string]string{"fdname": "save"}, nil, to)
	}
	if err == nil {
		err = vm.qmp.Execute(ctx, "migrate", map[string]string{"uri": "fd:save"}, nil)
	}
	if err == nil {
		err = migrated(ctx, events)
	}
	if err != nil {
		return fmt.Errorf("save: %w%s", err, vm.logTail())
	}
	return nil
}

// LoadFrom has an incoming VM load a state by itself, from one of QEMU's own URIs. The
// vCPUs stay stopped.
func (vm *VM) LoadFrom(ctx context.Context, uri string) error {
	events := vm.qmp.Subscribe(64, "MIGRATION")
	defer events.Close()
	err := vm.qmp.Execute(ctx, "migrate-incoming", map[string]string{"uri": uri}, nil)
	if err == nil {
		err = migrated(ctx, events)
	}
	if err != nil {
		return fmt.Errorf("load from %s: %w%s", uri, err, vm.logTail())
	}
	return nil
}

// incoming has an incoming VM take a migration in, which comes over the connection. The
// events are those of the migration. The caller closes both.
func (vm *VM) incoming(ctx context.Context, command string) (*os.File, *qmp.Subscription, error) {
	ours, theirs, err := socketpair(true)
	if err != nil {
		return nil, nil, err
	}
	defer theirs.Close()
	events := vm.qmp.Subscribe(64, "MIGRATION")
	err = vm.qmp.ExecuteWithFD(ctx, "getfd", map[string]string{"fdname": "incoming"}, nil, theirs)
	if err == nil {
		err = vm.qmp.Execute(ctx, command, map[string]string{"uri": "fd:incoming"}, nil)
	}
	if err != nil {
		events.Close()
		return nil, nil, errors.Join(err, ours.Close())
	}
	return ours, events, nil
}

// migrated waits until a migration has completed.
func migrated(ctx context.Context, events *qmp.Subscription) error {
	for {
		status, _, err := nextStatus(ctx, events)
		if err != nil {
			return err
		}
		switch status {
		case "completed":
			return nil
		case "failed", "cancelled":
			return fmt.Errorf("QEMU says that the migration has %s", status)
		}
	}
}

func nextStatus(ctx context.Context, events *qmp.Subscription) (string, time.Time, error) {
	e, err := events.Next(ctx)
	if err != nil {
		return "", time.Time{}, err
	}
	var data struct{ Status string }
	if len(e.Data) > 0 {
		if err := json.Unmarshal(e.Data, &data); err != nil {
			return "", time.Time{}, fmt.Errorf("event %s: %w", e.Name, err)
		}
	}
	return data.Status, e.Timestamp, nil
}

// socketpair returns two ends of a unix stream, as files.
// socketpair makes a stream's two ends. Unless ours is polled, its users wait in the kernel,
// and Close does not end that.
func socketpair(polled bool) (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make a socket pair: %w", err)
	}
	if err := unix.SetNonblock(fds[0], polled); err != nil {
		unix.Close(fds[0])
		unix.Close(fds[1])
		return nil, nil, fmt.Errorf("make a socket pair: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "migration"), os.NewFile(uintptr(fds[1]), "migration, QEMU's end"), nil
}

// loadBuffer is the buffer of a stream that QEMU loads, in bytes.
const loadBuffer = 4 << 20

// setBuffer sets the size of the buffer of what is written to a socket, in bytes: beyond the
// system's bound, if the privilege is there.
func setBuffer(f *os.File, size int) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	err = raw.Control(func(fd uintptr) {
		if serr = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, size); serr != nil {
			serr = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF, size)
		}
	})
	return errors.Join(err, serr)
}

// The migration capabilities that Violin sets.
var capabilities = []string{"events", "background-snapshot", "pause-before-switchover", "postcopy-ram"}

// setCapabilities switches the named capabilities on, beside events, and the rest off.
func (vm *VM) setCapabilities(ctx context.Context, on []string) error {
	var caps []map[string]any
	for _, c := range capabilities {
		state := c == "events"
		for _, o := range on {
			state = state || o == c
		}
		caps = append(caps, map[string]any{"capability": c, "state": state})
	}
	return vm.qmp.Execute(ctx, "migrate-set-capabilities", map[string]any{"capabilities": caps}, nil)
}
