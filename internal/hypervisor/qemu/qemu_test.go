package qemu

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	migration "violin/internal/migration/qemu"
	"violin/internal/pageserver"
)

type launcher struct{}

func (launcher) Start(cmd *exec.Cmd) error {
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd.Start()
}

// guest is a kernel in the boot protocol of old: four sectors of set-up code
// behind the boot sector, run in real mode. It counts in memory for ever, at
// 0x20000, so that there is always a page to send again.
func guest(t *testing.T) string {
	image := make([]byte, 8192)
	copy(image[512:], []byte{
		0xfb,             // sti
		0xb8, 0x00, 0x20, // mov ax, 0x2000
		0x8e, 0xd8, // mov ds, ax
		0xff, 0x06, 0x00, 0x00, // again: inc word [0]
		0xeb, 0xfa, // jmp again
	})
	path := filepath.Join(t.TempDir(), "kernel")
	if err := os.WriteFile(path, image, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// useProgram has the test run the QEMU that VIOLIN_QEMU names, if it does.
func useProgram(t *testing.T) {
	t.Helper()
	path := os.Getenv("VIOLIN_QEMU")
	if path == "" {
		return
	}
	dir := t.TempDir()
	if err := os.Symlink(path, filepath.Join(dir, Program)); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+string(os.PathListSeparator)+os.Getenv("PATH"))
}

func start(t *testing.T, ctx context.Context, kernel string, incoming bool) *VM {
	t.Helper()
	useProgram(t)
	vm, err := Start(ctx, launcher{}, Spec{
		Name: "a", Memory: 32 << 20, CPUs: 1, Kernel: kernel, GuestConfig: []byte("{}"), Dir: t.TempDir(), Generation: generation(incoming),
	}, incoming, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := vm.Close(); err != nil {
			t.Error(err)
		}
	})
	return vm
}

// generation is the VM generation id of a VM, and the fresh one of its clone.
func generation(clone bool) string {
	if clone {
		return "9b8e0f1a-6c39-4d1e-8a3c-2f4d5e6b7c80"
	}
	return "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87"
}

func wantStatus(t *testing.T, ctx context.Context, vm *VM, want string) {
	t.Helper()
	if got, err := vm.Status(ctx); err != nil || got != want {
		t.Fatalf("the VM is %q (%v), want %q", got, err, want)
	}
}

// pages keeps a stream's pages. It is both ends of the store.
type pages map[int]map[uint64][]byte

func (p pages) put(block int, offset uint64, data []byte) {
	if p[block] == nil {
		p[block] = map[uint64][]byte{}
	}
	p[block][offset] = data
}

func (p pages) Zero(block int, offset uint64) error {
	p.put(block, offset, nil)
	return nil
}

type sink struct{ pages }

func (s sink) Page(block int, offset uint64, data []byte) error {
	s.put(block, offset, bytes.Clone(data))
	return nil
}

type source struct{ pages }

func (s source) Page(block int, offset uint64, buf []byte) (bool, error) {
	data := s.pages[block][offset]
	copy(buf, data)
	return data == nil, nil
}

// steps are a capture, from beginning to end.
var steps = []struct {
	name string
	run  func(context.Context, *testing.T, *Capture) error
}{
	{"arm", func(context.Context, *testing.T, *Capture) error { return nil }},
	{"stop", func(ctx context.Context, _ *testing.T, c *Capture) error { _, err := c.Stop(ctx); return err }},
	{"release", func(ctx context.Context, _ *testing.T, c *Capture) error { return c.Release(ctx) }},
	{"resumed", func(ctx context.Context, _ *testing.T, c *Capture) error { _, err := c.Resumed(ctx); return err }},
	{"wait", func(ctx context.Context, _ *testing.T, c *Capture) error { return c.Wait(ctx) }},
}

// A VM is captured and goes on; a second VM goes on from the capture. Before
// that, captures are given up after each of their steps.
func TestCapture(t *testing.T) {
	if os.Getenv("VIOLIN_E2E") != "1" {
		t.Skip("runs real QEMUs: set VIOLIN_E2E=1")
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	kernel := guest(t)
	vm := start(t, ctx, kernel, false)
	wantStatus(t, ctx, vm, "prelaunch")
	if _, err := vm.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	for _, mode := range []Mode{Background, Precopy, Background} {
		for last := range steps {
			c, err := vm.Arm(ctx, mode)
			if err != nil {
				t.Fatalf("%v, to be given up after %s: %v", mode, steps[last].name, err)
			}
			read := make(chan struct{})
			go func() { defer close(read); io.Copy(io.Discard, c.Stream()) }()
			for _, s := range steps[:last+1] {
				if err := s.run(ctx, t, c); err != nil {
					t.Fatalf("%v: %s: %v", mode, s.name, err)
				}
			}
			for range 2 {
				if err := c.Abort(ctx); err != nil {
					t.Fatalf("%v: abort after %s: %v", mode, steps[last].name, err)
				}
			}
			<-read
			wantStatus(t, ctx, vm, "running")
		}

		c, err := vm.Arm(ctx, mode)
		if err != nil {
			t.Fatal(err)
		}
		memory := pages{}
		var skeleton *migration.Skeleton
		decoded := make(chan error, 1)
		go func() {
			var err error
			skeleton, err = migration.Decode(c.Stream(), func([]migration.RAMBlock) (migration.PageSink, error) { return sink{memory}, nil })
			decoded <- err
		}()
		stopped, err := c.Stop(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Release(ctx); err != nil {
			t.Fatal(err)
		}
		resumed, err := c.Resumed(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Wait(ctx); err != nil {
			t.Fatal(err)
		}
		if err := <-decoded; err != nil {
			t.Fatalf("%v: decode: %v", mode, err)
		}
		wantStatus(t, ctx, vm, "running")
		t.Logf("%v: paused for %v", mode, resumed.Sub(stopped))

		second := start(t, ctx, kernel, true)
		if err := second.Load(ctx, func(w io.Writer) error { return migration.Encode(w, skeleton, source{memory}) }); err != nil {
			t.Fatalf("%v: %v", mode, err)
		}
		wantStatus(t, ctx, second, "paused")
		var id struct{ GUID string }
		if err := second.qmp.Execute(ctx, "query-vm-generation-id", nil, &id); err != nil || id.GUID != generation(true) {
			t.Errorf("%v: generation id %q (%v), want the fresh one", mode, id.GUID, err)
		}
		if _, err := second.Resume(ctx); err != nil {
			t.Fatal(err)
		}
		wantStatus(t, ctx, second, "running")
		lazily(t, ctx, start(t, ctx, kernel, true), skeleton, memory)
	}
}

func (s source) At(block int, offset uint64, buf []byte) (bool, error) {
	return s.Page(block, offset, buf)
}

// damaged has a page that cannot be read, and that the guest needs at once.
type damaged struct{ source }

var errDamaged = errors.New("the page is damaged")

func (d damaged) At(block int, offset uint64, buf []byte) (bool, error) {
	if block == 0 && offset == 0x20000 {
		return false, errDamaged
	}
	return d.Page(block, offset, buf)
}

// lazily lets a VM run that has none of its memory yet, and captures it when it has
// all.
func lazily(t *testing.T, ctx context.Context, vm *VM, skeleton *migration.Skeleton, memory pages) {
	t.Helper()
	server := pageserver.New(pageserver.Config{Skeleton: skeleton, Source: source{memory}})
	ended := make(chan error, 1)
	err := vm.LoadLazily(ctx, server.Serve, func(err error) { ended <- err })
	if err != nil {
		t.Fatal(err)
	}
	wantStatus(t, ctx, vm, "paused")
	if _, err := vm.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	// The guest counts in this page, and nobody has sent it unasked.
	for touched := false; !touched; {
		for _, r := range server.Touched() {
			touched = touched || r.Block == "pc.ram" && r.Page <= 0x20 && 0x20-r.Page < r.Pages
		}
		if err := ctx.Err(); err != nil {
			t.Fatalf("the guest does not run: %v", err)
		}
		time.Sleep(time.Millisecond)
	}
	wantStatus(t, ctx, vm, "running")
	server.Follow()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	c, err := vm.Arm(ctx, Background)
	if err != nil {
		t.Fatal(err)
	}
	again := pages{}
	decoded := make(chan error, 1)
	go func() {
		_, err := migration.Decode(c.Stream(), func([]migration.RAMBlock) (migration.PageSink, error) { return sink{again}, nil })
		decoded <- err
	}()
	for _, s := range steps[1:] {
		if err := s.run(ctx, t, c); err != nil {
			t.Fatalf("capture after a lazy load: %s: %v", s.name, err)
		}
	}
	if err := <-decoded; err != nil {
		t.Fatal(err)
	}
	// The guest counts, and the BIOS does beside it: a few bytes here and there. A page
	// that is not the right one differs in more.
	zeros := make([]byte, migration.PageSize)
	for block, all := range memory {
		for offset, want := range all {
			got := again[block][offset]
			if want == nil {
				want = zeros
			}
			if got == nil {
				got = zeros
			}
			changed := 0
			for i := range want {
				if want[i] != got[i] {
					changed++
				}
			}
			if changed > 64 {
				t.Errorf("after a lazy load %d bytes of the page at %#x of block %d are others", changed, offset, block)
			}
		}
	}
}

// bootedState boots a VM and captures it.
func bootedState(t *testing.T, ctx context.Context, kernel string) (*migration.Skeleton, pages) {
	t.Helper()
	vm := start(t, ctx, kernel, false)
	if _, err := vm.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second) // into the guest's loop
	c, err := vm.Arm(ctx, Background)
	if err != nil {
		t.Fatal(err)
	}
	memory := pages{}
	var skeleton *migration.Skeleton
	decoded := make(chan error, 1)
	go func() {
		var err error
		skeleton, err = migration.Decode(c.Stream(), func([]migration.RAMBlock) (migration.PageSink, error) { return sink{memory}, nil })
		decoded <- err
	}()
	for _, s := range steps[1:] {
		if err := s.run(ctx, t, c); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-decoded; err != nil {
		t.Fatal(err)
	}
	return skeleton, memory
}

// A VM that cannot be given a page is ended, and says why.
func TestLazyDamage(t *testing.T) {
	if os.Getenv("VIOLIN_E2E") != "1" {
		t.Skip("runs real QEMUs: set VIOLIN_E2E=1")
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	kernel := guest(t)
	skeleton, memory := bootedState(t, ctx, kernel)
	second := start(t, ctx, kernel, true)
	ended := make(chan error, 1)
	server := pageserver.New(pageserver.Config{Skeleton: skeleton, Source: damaged{source{memory}}})
	err := second.LoadLazily(ctx, server.Serve, func(err error) { ended <- err })
	if err != nil {
		t.Fatal(err)
	}
	_, _ = second.Resume(ctx) // the guest may need the page, and the VM be gone, before this is answered
	if err := <-ended; !errors.Is(err, errDamaged) {
		t.Errorf("serving ended with %v", err)
	}
	<-second.Done()
	if err := second.Err(); !errors.Is(err, errDamaged) || !strings.Contains(err.Error(), "0x20000") {
		t.Errorf("the VM says %v", err)
	}
}

// A VM whose connection goes down before it has all its memory is ended, and says why: the guest
// does not wait for ever for a page that nobody sends.
func TestLazyConnectionLost(t *testing.T) {
	if os.Getenv("VIOLIN_E2E") != "1" {
		t.Skip("runs real QEMUs: set VIOLIN_E2E=1")
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	kernel := guest(t)
	skeleton, memory := bootedState(t, ctx, kernel)
	second := start(t, ctx, kernel, true)
	server := pageserver.New(pageserver.Config{Skeleton: skeleton, Source: source{memory}})
	conns, ended := make(chan io.Closer, 1), make(chan error, 1)
	err := second.LoadLazily(ctx, func(conn io.ReadWriteCloser) error {
		conns <- conn
		return server.Serve(conn)
	}, func(err error) { ended <- err })
	if err != nil {
		t.Fatal(err)
	}
	if _, err := second.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	wantStatus(t, ctx, second, "running")
	if err := (<-conns).Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err == nil || errors.Is(err, ErrClosed) {
		t.Errorf("serving ended with %v", err)
	}
	select {
	case <-second.Done():
	case <-ctx.Done():
		t.Fatal("the VM goes on without its memory")
	}
	if err := second.Err(); err == nil || !strings.Contains(err.Error(), "give it its memory") {
		t.Errorf("the VM says %v", err)
	}
}
