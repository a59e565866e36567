package qemu

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// An agent dies after each step of a capture, and as the layers of one that counts are
// merged. The next finds the disks' layers, and what it captures then is what was written:
// all of it, and the part that it reads because it is not stored.
func TestFindDisks(t *testing.T) {
	if os.Getenv("VIOLIN_E2E") != "1" {
		t.Skip("runs real QEMUs: set VIOLIN_E2E=1")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	began := contents{3: 200, 9: 201}
	first := startDisks(t, ctx, false, Disk{Name: "data", Size: 16 << 20}, Disk{Name: "restored", Size: 16 << 20, Restore: began.restore})
	vm, saved := first, first.Stored()
	if !maps.Equal(saved, map[string]int{"restored": 0}) {
		t.Errorf("of the disks %v is stored", saved)
	}
	all := []contents{{}, maps.Clone(began)}
	stored := []contents{{}, maps.Clone(began)}
	n := 0
	write := func() {
		for i := range all {
			page := uint64(n % 7 * 37)
			vm.io(t, ctx, i, fmt.Sprintf("write -P %d %d 4096", n+1, page*4096))
			all[i][page] = byte(n + 1)
		}
		n++
	}
	// next is the VM as the next agent finds it.
	next := func() {
		t.Helper()
		vm.qmp.Close()
		found, err := Find(ctx, first.spec, saved, slog.New(slog.DiscardHandler))
		if err != nil || found.Err() != nil {
			t.Fatal(err, found.Err())
		}
		vm = found
	}
	for _, mode := range []Mode{Background, Precopy} {
		for last := range steps[:4] {
			write()
			h := &hands{}
			vm.KeepStreams(h)
			c, err := vm.Arm(ctx, mode)
			if err != nil {
				t.Fatal(err)
			}
			if mode == Background {
				if err := c.Ready(ctx); err != nil {
					t.Fatal(err)
				}
			}
			go discard(c.Stream())
			for _, s := range steps[:last+1] {
				if err := s.run(ctx, t, c); err != nil {
					t.Fatalf("%v: %s: %v", mode, s.name, err)
				}
			}
			c.theirs.Close()
			c.ours.Close()
			h.die()
			next()
			vm.KeepStreams(h)
			orphan := vm.Orphan(mode)
			if err := orphan.Abort(ctx); err != nil {
				t.Fatalf("%v: after %s: %v", mode, steps[last].name, err)
			}
			orphan.Stored() // which it does not know, whatever it is told
			wantStatus(t, ctx, vm, "running")
			vm.KeepStreams(nil)
			write()
			c = capture(t, ctx, vm, mode, discard)
			for i, f := range c.Frozen() {
				whole := contents{}
				if err := f.All(whole.put); err != nil {
					t.Fatal(err)
				}
				if err := f.Changed(stored[i].put); err != nil {
					t.Fatal(err)
				}
				if !maps.Equal(whole, all[i]) || !maps.Equal(stored[i], all[i]) {
					t.Fatalf("%v, died after %s, disk %d: %v in all, %v by what has changed, want %v", mode, steps[last].name, i, whole, stored[i], all[i])
				}
				saved[f.Disk] = f.Through // as it is written down before
			}
			c.Stored()
			next()
		}
	}
	vm.disks.mu.Lock()
	merging := vm.disks.merging
	vm.disks.mu.Unlock()
	<-merging
	vm.mergeDisks(false) // of what an agent that died had not merged
	vm.disks.mu.Lock()
	merging = vm.disks.merging
	vm.disks.mu.Unlock()
	<-merging
	files, err := filepath.Glob(vm.path("*.qcow2"))
	if err != nil || len(files) != 4 {
		t.Errorf("the layers are %q, want two a disk: %v", files, err)
	}
	if err := vm.Close(); err != nil {
		t.Error(err)
	}
}
