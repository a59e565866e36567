package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"violin/internal/hypervisor/qemu"
	"violin/internal/machine"
	migration "violin/internal/migration/qemu"
	"violin/internal/pageserver"
	"violin/internal/priority"
	"violin/internal/store"
)

// QEMUConfig says which nodes Violin is compared with QEMU on. Half of a node's pages are
// not zero.
type QEMUConfig struct {
	Dir    string   // QEMU's files and stores are made below it, and removed
	Memory []uint64 // bytes of each node
	Lazy   []uint64 // of nodes that are only restored lazily
	Runs   int      // of each, Violin's and QEMU's in turn
	Plain  bool     // without encryption
	Reader []string // a command that reads its standard input to the end: [Discard]
}

// A Comparison is what something takes Violin, and what it takes QEMU by itself in the same
// run.
type Comparison struct {
	What   string  `json:"what"` // "snapshot", "restore" or "lazy restore"
	Memory uint64  `json:"memory_bytes"`
	Ours   Run     `json:"violin"`          // the medians of the runs
	QEMU   Run     `json:"qemu"`            // none for a lazy restore
	Ratio  float64 `json:"ratio,omitempty"` // the median of the ratios of runs next to each other
}

// A Run is what something took once. The processor time is Violin's and QEMU's together, of all
// cores; that of a machine's other work shows in the wall's alone.
type Run struct {
	Wall time.Duration `json:"wall_ns"`
	CPU  time.Duration `json:"cpu_ns"`
}

// compared makes a comparison of pairs of runs.
func compared(what string, memory uint64, ours, theirs []Run) Comparison {
	c := Comparison{What: what, Memory: memory, Ours: medianRun(ours)}
	if len(theirs) > 0 {
		c.QEMU = medianRun(theirs)
		ratios := make([]float64, len(ours))
		for i := range ours {
			ratios[i] = ours[i].Wall.Seconds() / theirs[i].Wall.Seconds()
		}
		c.Ratio = median(ratios)
	}
	return c
}

func medianRun(all []Run) Run {
	var wall, cpu []time.Duration
	for _, r := range all {
		wall, cpu = append(wall, r.Wall), append(cpu, r.CPU)
	}
	return Run{median(wall), median(cpu)}
}

// A watch measures a run of a VM.
type watch struct {
	vm    *qemu.VM
	began time.Time
	cpu   time.Duration
}

func watched(vm *qemu.VM) watch {
	return watch{vm, time.Now(), processorTime() + processTime(vm.PID())}
}

func (w watch) run() Run {
	return Run{time.Since(w.began), processorTime() + processTime(w.vm.PID()) - w.cpu}
}

// processTime is what a process took of all cores, in the kernel's ticks of 10 ms; 0 if it
// cannot be read.
func processTime(pid int) time.Duration {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(b), ") ") // behind its name
	fields := strings.Fields(rest)
	if len(fields) < 13 {
		return 0
	}
	user, _ := strconv.Atoi(fields[11])
	system, _ := strconv.Atoi(fields[12])
	return time.Duration(user+system) * 10 * time.Millisecond
}

func median[T float64 | time.Duration](all []T) T {
	all = slices.Clone(all)
	slices.Sort(all)
	return all[len(all)/2]
}

// AgainstQEMU measures, of one node on QEMU and the store alone, with no server and no
// network: a first snapshot, from its beginning until all of it is on the disk, against the same
// QEMU's own migration to a socket whose reader throws all away; a restore, from
// the state's first byte until all is loaded, against QEMU's own of a file ("exec:cat"); and a lazy one, from
// the start of QEMU until the guest has run and needs a page that it writes to.
func AgainstQEMU(ctx context.Context, cfg QEMUConfig, done func(Comparison)) (err error) {
	dir, err := os.MkdirTemp(cfg.Dir, "violin-bench-")
	if err != nil {
		return fmt.Errorf("compare with QEMU: %w", err)
	}
	defer os.RemoveAll(dir)
	this := machine.New()
	for _, memory := range slices.Concat(cfg.Memory, cfg.Lazy) {
		n := &benchNode{dir: dir, memory: memory, plain: cfg.Plain, reader: cfg.Reader, machine: this, log: slog.New(slog.DiscardHandler)}
		err := n.measure(ctx, cfg.Runs, slices.Contains(cfg.Memory, memory), done)
		if err = errors.Join(err, n.close()); err != nil {
			return fmt.Errorf("compare with QEMU on a node of %d MiB: %w", memory>>20, err)
		}
	}
	return nil
}

// benchNode is one node that is measured.
type benchNode struct {
	dir    string
	memory uint64
	plain  bool
	reader []string
	log    *slog.Logger

	machine  *machine.Machine
	vms      int // started so far
	vm       *qemu.VM
	skeleton *migration.Skeleton
	booted   map[place][]byte // what is not zero once the guest runs
	filler   *guestMemory

	store *store.Store
	table store.BlobRef
	at    string // the store's directory
}

type place struct {
	block  int
	offset uint64
}

// counter is where the guest counts: a page that it needs at once.
const counter = 0x20000

// guestKernel is a kernel in the boot protocol of old: four sectors of set-up code behind the
// boot sector, run in real mode. It counts, for ever.
func guestKernel() []byte {
	image := make([]byte, 8192)
	copy(image[512:], []byte{
		0xfb,             // sti
		0xb8, 0x00, 0x20, // mov ax, 0x2000
		0x8e, 0xd8, // mov ds, ax
		0xf4,                   // again: hlt, until the timer's next tick
		0xff, 0x06, 0x00, 0x00, // inc word [0]
		0xeb, 0xf9, // jmp again
	})
	return image
}

func (n *benchNode) start(ctx context.Context, incoming bool) (*qemu.VM, error) {
	kernel := filepath.Join(n.dir, "kernel")
	if err := os.WriteFile(kernel, guestKernel(), 0o600); err != nil {
		return nil, err
	}
	n.vms++
	return qemu.Start(ctx, n.machine, qemu.Spec{
		Name: "bench", Memory: n.memory, CPUs: 1, Kernel: kernel, GuestConfig: []byte("{}"), Dir: filepath.Join(n.dir, fmt.Sprint("vm", n.vms)),
	}, incoming, n.log)
}

func (n *benchNode) measure(ctx context.Context, runs int, all bool, done func(Comparison)) error {
	if err := n.boot(ctx); err != nil {
		return err
	}
	var ours, theirs []Run
	if !all {
		if _, err := n.snapshot(ctx); err != nil {
			return err
		}
	} else {
		for range runs {
			q, err := n.discard(ctx)
			if err != nil {
				return err
			}
			o, err := n.snapshot(ctx)
			if err != nil {
				return err
			}
			ours, theirs = append(ours, o), append(theirs, q)
		}
		done(compared("snapshot", n.memory, ours, theirs))
		if err := n.restores(ctx, runs, done); err != nil {
			return err
		}
	}
	if err := n.vm.Close(); err != nil { // its memory is needed
		return err
	}
	ours = nil
	for range runs {
		took, err := n.lazily(ctx)
		if err != nil {
			return err
		}
		ours = append(ours, took)
	}
	done(compared("lazy restore", n.memory, ours, nil))
	return nil
}

// boot lets the guest run in a VM half of whose pages are not zero.
func (n *benchNode) boot(ctx context.Context) (err error) {
	if n.filler, err = newGuest(int(n.memory / store.PageSize)); err != nil {
		return err
	}
	if n.vm, err = n.start(ctx, false); err != nil {
		return err
	}
	if _, err = n.vm.Resume(ctx); err != nil {
		return err
	}
	n.booted = map[place][]byte{}
	for n.booted[place{0, counter}] == nil { // until it is past its firmware
		clear(n.booted)
		_, err := n.capture(ctx, func(r io.Reader) (err error) {
			n.skeleton, err = migration.Decode(r, func([]migration.RAMBlock) (migration.PageSink, error) { return (*bootedPages)(n), nil })
			return err
		})
		if err != nil {
			return err
		}
	}
	if err := n.vm.Close(); err != nil {
		return err
	}
	if n.vm, err = n.start(ctx, true); err != nil {
		return err
	}
	if err := n.vm.Load(ctx, func(w io.Writer) error { return migration.Encode(w, n.skeleton, (*filledPages)(n)) }); err != nil {
		return err
	}
	_, err = n.vm.Resume(ctx)
	return err
}

// bootedPages takes in what the guest and its firmware have written.
type bootedPages benchNode

func (b *bootedPages) Zero(int, uint64) error { return nil }

func (b *bootedPages) Page(block int, offset uint64, data []byte) error {
	b.booted[place{block, offset}] = slices.Clone(data)
	return nil
}

// filledPages adds to it until half of the first block is not zero: every second 64 KiB.
type filledPages benchNode

func (f *filledPages) Page(block int, offset uint64, buf []byte) (zero bool, err error) {
	if data, ok := f.booted[place{block, offset}]; ok {
		copy(buf, data)
		return false, nil
	}
	if block != 0 || offset < 16<<20 || offset>>16%2 == 0 {
		return true, nil
	}
	f.filler.page(int(offset/store.PageSize), 1, buf)
	return false, nil
}

// capture has the VM captured, and returns how long that and reading its stream took.
func (n *benchNode) capture(ctx context.Context, read func(io.Reader) error) (Run, error) {
	w := watched(n.vm)
	c, err := n.vm.Arm(ctx, qemu.Background)
	if err != nil {
		return Run{}, err
	}
	ended := make(chan error, 1)
	go func() { ended <- read(c.Stream()) }()
	err = func() error {
		if err := c.Ready(ctx); err != nil {
			return err
		}
		if _, err := c.Stop(ctx); err != nil {
			return err
		}
		if err := c.Release(ctx); err != nil {
			return err
		}
		if _, err := c.Resumed(ctx); err != nil {
			return err
		}
		return c.Wait(ctx)
	}()
	if err != nil {
		return Run{}, errors.Join(err, c.Abort(context.WithoutCancel(ctx)), <-ended)
	}
	err = <-ended
	took := w.run()
	c.Stored()
	return took, err
}

// discard has QEMU save the VM by itself, to a socket that a process of its own reads and throws all
// away of, as netcat would.
func (n *benchNode) discard(ctx context.Context) (took Run, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return Run{}, fmt.Errorf("make a socket pair: %w", err)
	}
	from, to := os.NewFile(uintptr(fds[0]), "reader's end"), os.NewFile(uintptr(fds[1]), "QEMU's end")
	reader := exec.CommandContext(ctx, n.reader[0], n.reader[1:]...)
	reader.Stdin = from
	err = reader.Start()
	from.Close()
	if err != nil {
		to.Close()
		return Run{}, fmt.Errorf("read QEMU's migration: %w", err)
	}
	w := watched(n.vm)
	err = n.vm.SaveTo(ctx, to)
	to.Close()
	rerr := reader.Wait()
	took = w.run()
	if rerr != nil {
		return Run{}, errors.Join(err, fmt.Errorf("read QEMU's migration: %w", rerr))
	}
	took.CPU += reader.ProcessState.UserTime() + reader.ProcessState.SystemTime()
	return took, err
}

// Discard reads a file to its end, for a process that does nothing else.
func Discard(f *os.File) error {
	fd := f.Fd() // and it waits in the kernel
	for buf := make([]byte, 64<<10); ; {
		// Past Go's scheduler, which would hand this thread's processor on and back at each wait.
		n, _, errno := unix.RawSyscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)))
		switch {
		case errno == unix.EINTR:
		case errno != 0:
			return errno
		case n == 0:
			return nil
		}
	}
}

// snapshot captures the VM into a new store, and keeps that.
func (n *benchNode) snapshot(ctx context.Context) (took Run, err error) {
	if err := n.closeStore(); err != nil {
		return Run{}, err
	}
	// As in a server: what takes a state in comes behind QEMU.
	opts := store.Options{Logger: n.log, StartWorker: func() { priority.Background(n.log) }}
	if !n.plain {
		opts.Key = store.NewKey()
	}
	if n.at, err = os.MkdirTemp(n.dir, "store-"); err != nil {
		return Run{}, err
	}
	if n.store, err = store.Open(ctx, n.at, opts); err != nil {
		return Run{}, err
	}
	clock := watched(n.vm)
	se, err := n.store.Begin(ctx)
	if err != nil {
		return Run{}, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, se.Abort(context.WithoutCancel(ctx)))
		}
	}()
	var w *store.PageWriter
	_, err = n.capture(ctx, func(r io.Reader) (err error) {
		priority.Background(n.log)
		n.skeleton, err = migration.Decode(r, func(blocks []migration.RAMBlock) (migration.PageSink, error) {
			regions := make([]store.Region, len(blocks))
			for i, b := range blocks {
				regions[i] = store.Region{ID: b.ID, Length: b.Length}
			}
			w, err = se.NewPageWriter(ctx, regions)
			return w, err
		})
		return err
	})
	if err != nil {
		return Run{}, err
	}
	if n.table, err = w.Close(); err != nil {
		return Run{}, err
	}
	err = se.Commit(ctx, nil)
	return clock.run(), err
}

// restores compares loading from the store with QEMU's loading of a file.
func (n *benchNode) restores(ctx context.Context, runs int, done func(Comparison)) error {
	file := filepath.Join(n.dir, "stream")
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer os.Remove(file)
	_, err = n.capture(ctx, func(r io.Reader) error { _, err := io.Copy(f, r); return err })
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	var ours, theirs []Run
	for range runs {
		q, err := n.restore(ctx, func(vm *qemu.VM) error { return vm.LoadFrom(ctx, "exec:cat "+file) })
		if err != nil {
			return err
		}
		o, err := n.restore(ctx, func(vm *qemu.VM) error {
			m, err := n.store.OpenMemory(ctx, n.table)
			if err != nil {
				return err
			}
			defer m.Close()
			return vm.Load(ctx, func(w io.Writer) error { return migration.Encode(w, n.skeleton, m) })
		})
		if err != nil {
			return err
		}
		ours, theirs = append(ours, o), append(theirs, q)
	}
	done(compared("restore", n.memory, ours, theirs))
	return nil
}

func (n *benchNode) restore(ctx context.Context, load func(*qemu.VM) error) (took Run, err error) {
	if err := warm(n.memory); err != nil {
		return Run{}, err
	}
	vm, err := n.start(ctx, true)
	if err != nil {
		return Run{}, err
	}
	defer func() { err = errors.Join(err, vm.Close()) }()
	clock := watched(vm)
	err = load(vm)
	return clock.run(), err
}

// warm has this machine touch as much memory as a VM is about to. If it is a virtual one itself, its host may
// have taken what was given back, and to get it again takes longer than all that is measured.
func warm(size uint64) error {
	b, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return fmt.Errorf("touch %d MiB of memory: %w", size>>20, err)
	}
	_ = unix.Madvise(b, unix.MADV_HUGEPAGE) // as QEMU does
	for i := 0; i < len(b); i += store.PageSize {
		b[i] = 1
	}
	return unix.Munmap(b)
}

// lazily restores the VM and returns how long it took until the guest ran.
func (n *benchNode) lazily(ctx context.Context) (took Run, err error) {
	clock := watch{began: time.Now(), cpu: processorTime()}
	if clock.vm, err = n.start(ctx, true); err != nil {
		return Run{}, err
	}
	vm := clock.vm
	defer func() { err = errors.Join(err, vm.Close()) }()
	m, err := n.store.OpenMemory(ctx, n.table)
	if err != nil {
		return Run{}, err
	}
	defer m.Close()
	server := pageserver.New(pageserver.Config{Skeleton: n.skeleton, Source: m})
	ended := make(chan error, 1)
	if err := vm.LoadLazily(ctx, server.Serve, func(err error) { ended <- err }); err != nil {
		return Run{}, err
	}
	if _, err := vm.Resume(ctx); err != nil {
		return Run{}, err
	}
	for !slices.ContainsFunc(server.Touched(), func(r pageserver.Run) bool {
		const page = counter / store.PageSize
		return r.Block == n.skeleton.Blocks[0].ID && r.Page <= page && page-r.Page < r.Pages
	}) {
		select {
		case err := <-ended:
			return Run{}, err
		case <-ctx.Done():
			return Run{}, ctx.Err()
		case <-time.After(time.Millisecond):
		}
	}
	took = clock.run()
	server.Follow() // and it is closed with the VM
	return took, nil
}

func (n *benchNode) closeStore() error {
	if n.store == nil {
		return nil
	}
	return errors.Join(n.store.Close(), os.RemoveAll(n.at))
}

func (n *benchNode) close() error {
	err := n.closeStore()
	if n.vm != nil {
		err = errors.Join(err, n.vm.Close())
	}
	return err
}
