package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	migration "violin/internal/migration/qemu"
)

// startDisks starts a VM with disks that runs.
func startDisks(t *testing.T, ctx context.Context, incoming bool, disks ...Disk) *VM {
	t.Helper()
	vm, err := Start(ctx, launcher{}, Spec{
		Name: "a", Memory: 32 << 20, CPUs: 1, Kernel: guest(t), GuestConfig: []byte("{}"), Dir: t.TempDir(), Disks: disks,
	}, incoming, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := vm.Close(); err != nil {
			t.Error(err)
		}
		if left, _ := filepath.Glob(vm.path("*.qcow2")); len(left) > 0 {
			t.Errorf("the VM is gone and has left %q", left)
		}
	})
	if !incoming {
		if _, err := vm.Resume(ctx); err != nil {
			t.Fatal(err)
		}
	}
	return vm
}

// io has QEMU read or write a disk as the guest would.
func (vm *VM) io(t *testing.T, ctx context.Context, disk int, command string) {
	t.Helper()
	var out string
	if err := vm.qmp.Execute(ctx, "human-monitor-command", map[string]string{
		"command-line": fmt.Sprintf("qemu-io -d /machine/peripheral/disk%d/virtio-backend \"%s\"", disk, command),
	}, &out); err != nil || strings.Contains(out, "fail") || strings.Contains(out, "rror") {
		t.Fatalf("%s: %v %s", command, err, out+vm.logTail())
	}
}

// contents is a disk of content pages: the first byte of each, by number.
type contents map[uint64]byte

func (c contents) put(offset uint64, data []byte) error {
	c[offset/4096] = 0
	if data != nil {
		c[offset/4096] = data[0]
		if !bytes.Equal(data, bytes.Repeat(data[:1], 4096)) {
			return fmt.Errorf("page %#x is of several bytes", offset)
		}
	}
	return nil
}

func (c contents) restore(page func(uint64, []byte) error) error {
	for n, b := range c {
		if err := page(n*4096, bytes.Repeat([]byte{b}, 4096)); err != nil {
			return err
		}
	}
	return nil
}

// capture takes one, of which only the disks are kept.
func capture(t *testing.T, ctx context.Context, vm *VM, mode Mode, stream func(io.Reader)) *Capture {
	t.Helper()
	c, err := vm.Arm(ctx, mode)
	if err != nil {
		t.Fatal(err)
	}
	read := make(chan struct{})
	go func() { defer close(read); stream(c.Stream()) }()
	if mode == Background { // so small a VM has sent nearly all from the beginning
		if err := c.Ready(ctx); err != nil {
			t.Fatal(err)
		}
	}
	stopped, err := c.Stop(ctx)
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := c.Release(ctx); err != nil {
		t.Fatal(err)
	}
	released := time.Since(began)
	resumed, err := c.Resumed(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	<-read
	t.Logf("%v: paused for %v, released in %v", mode, resumed.Sub(stopped), released)
	return c
}

func discard(r io.Reader) { _, _ = io.Copy(io.Discard, r) }

// Two disks, one on a base, are written to and captured again and again, by both
// modes, with captures between that are given up after any step. What was frozen is
// what was written by then, and the chains stay short.
func TestDisks(t *testing.T) {
	if os.Getenv("VIOLIN_E2E") != "1" {
		t.Skip("runs real QEMUs: set VIOLIN_E2E=1")
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	base := filepath.Join(t.TempDir(), "base")
	if out, err := exec.CommandContext(ctx, "qemu-img", "create", "-f", "qcow2", base, "8M").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out, err := exec.CommandContext(ctx, "qemu-io", "-f", "qcow2", base, "-c", "write -P 99 0 8M").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	// A third is only read, and is in each capture as it was from the beginning.
	tools := contents{3: 33, 7: 77}
	given := []Disk{
		{Name: "data", Size: 16 << 20}, {Name: "sys,tem", Size: 8 << 20, Base: base, BaseFormat: "qcow2"},
		{Name: "tools", Size: 1 << 20, ReadOnly: true, Restore: tools.restore},
	}
	isTools := func(f Frozen) {
		t.Helper()
		whole, changed := contents{}, contents{}
		if err := errors.Join(f.All(whole.put), f.Changed(changed.put)); err != nil || !maps.Equal(whole, tools) || len(changed) > 0 {
			t.Errorf("the disk that is only read has pages %v, and %v have changed: %v", whole, changed, err)
		}
	}
	vm := startDisks(t, ctx, false, given...)
	all := []contents{{}, {}}
	stored := []contents{{}, {}}
	write := func(n int) {
		for i := range all {
			page := uint64(n % 5 * 37)
			vm.io(t, ctx, i, fmt.Sprintf("write -P %d %d 4096", n+1, page*4096))
			all[i][page] = byte(n + 1)
		}
		if n%4 == 0 {
			vm.io(t, ctx, 1, "write -z 409600 4096")
			all[1][100] = 0
		}
	}
	n := 0
	for round := range 3 {
		for _, mode := range []Mode{Background, Precopy} {
			for last := range steps {
				write(n)
				n++
				c, err := vm.Arm(ctx, mode)
				if err != nil {
					t.Fatal(err)
				}
				go discard(c.Stream())
				for _, s := range steps[:last+1] {
					if err := s.run(ctx, t, c); err != nil {
						t.Fatalf("%v: %s: %v", mode, s.name, err)
					}
				}
				if err := c.Abort(ctx); err != nil {
					t.Fatalf("%v: abort after %s: %v", mode, steps[last].name, err)
				}
				wantStatus(t, ctx, vm, "running")
			}
			write(n)
			n++
			c := capture(t, ctx, vm, mode, discard)
			write(n + 100) // after the instant: in the next
			for i, f := range c.Frozen() {
				if f.Disk == "tools" {
					isTools(f)
					continue
				}
				whole := contents{}
				if err := f.All(whole.put); err != nil {
					t.Fatal(err)
				}
				if err := f.Changed(stored[i].put); err != nil {
					t.Fatal(err)
				}
				want := contents{}
				for page, b := range all[i] {
					want[page] = b
				}
				delete(want, uint64((n+100)%5*37))
				for page, b := range want {
					if whole[page] != b || stored[i][page] != b {
						t.Fatalf("round %d, %v, disk %d, page %d: %d in all, %d by what has changed, want %d", round, mode, i, page, whole[page], stored[i][page], b)
					}
				}
				if len(f.layers) > 3 {
					t.Errorf("the chain is %q", f.layers)
				}
			}
			c.Stored()
			n++
		}
	}
	// The last capture's merge ends; then a chain is what is stored, and a layer on it.
	vm.disks.mu.Lock()
	merging := vm.disks.merging
	vm.disks.mu.Unlock()
	<-merging
	files, _ := filepath.Glob(vm.path("*.qcow2"))
	if len(files) != 2*2+1 {
		t.Errorf("the layers are %q, want two a disk that is written to, and one of the other", files)
	}

	// A second VM goes on from a capture, on disks that are made of it.
	memory := pages{}
	var skeleton *migration.Skeleton
	c := capture(t, ctx, vm, Background, func(r io.Reader) {
		var err error
		if skeleton, err = migration.Decode(r, func([]migration.RAMBlock) (migration.PageSink, error) { return sink{memory}, nil }); err != nil {
			t.Error(err)
		}
	})
	restored := slices.Clone(given)
	for i, f := range c.Frozen() {
		content := contents{}
		if err := f.All(content.put); err != nil {
			t.Fatal(err)
		}
		restored[i].Restore = content.restore
	}
	second := startDisks(t, ctx, true, restored...)
	if err := second.Load(ctx, func(w io.Writer) error { return migration.Encode(w, skeleton, source{memory}) }); err != nil {
		t.Fatal(err)
	}
	if _, err := second.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	for i := range all {
		for page, b := range all[i] {
			second.io(t, ctx, i, fmt.Sprintf("read -P %d %d 4096", b, page*4096))
		}
	}
	second.io(t, ctx, 1, "read -P 99 1048576 65536")
	second.io(t, ctx, 2, "read -P 77 28672 4096")
	var out string
	if err := second.qmp.Execute(ctx, "human-monitor-command", map[string]string{"command-line": `qemu-io -d /machine/peripheral/disk2/virtio-backend "write 0 4096"`}, &out); err != nil || !strings.Contains(out, "read-only") {
		t.Errorf("a disk that is only read is written to: %q, %v", out, err)
	}
	c2 := capture(t, ctx, second, Background, discard)
	for _, f := range c2.Frozen() {
		if f.Disk == "tools" {
			isTools(f)
		}
		changed := contents{}
		if err := f.Changed(changed.put); err != nil || len(changed) != 0 {
			t.Errorf("nothing was written since the restore, and %d pages of %s have changed (%v)", len(changed), f.Disk, err)
		}
	}
}
