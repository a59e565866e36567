package qemu

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// mergePoll is how often a merge that another process has begun is looked at.
const mergePoll = 20 * time.Millisecond

// Stored tells, by disk, through which of its layers it is in the store: what [Find] is to
// be told. Disks that are not are left out.
func (vm *VM) Stored() map[string]int {
	vm.disks.mu.Lock()
	defer vm.disks.mu.Unlock()
	m := map[string]int{}
	for _, c := range vm.disks.chains {
		if c.stored > 0 {
			m[c.disk.Name] = c.layers[c.stored-1].number
		}
	}
	return m
}

// findDisks makes the chains of a VM that another process has started. With QEMU, it finds
// their layers behind, as a merge does its work: captures wait for that.
func (vm *VM) findDisks(stored map[string]int) {
	for i, d := range vm.spec.Disks {
		vm.disks.chains = append(vm.disks.chains, &chain{disk: d, name: diskName(i)})
	}
	if vm.qmp == nil || len(vm.disks.chains) == 0 {
		return
	}
	done := make(chan struct{})
	vm.disks.merging = done
	go func() {
		defer close(done)
		if err := vm.findLayers(context.Background(), stored); err != nil { // it ends with QEMU
			vm.disks.turn.Lock()
			vm.disks.lost = fmt.Errorf("find the layers of the disks: %w", err)
			vm.disks.turn.Unlock()
			if vm.Err() == nil && !vm.isClosed() {
				vm.log.Error("no snapshot can be taken of it any more", "err", vm.disks.lost)
			}
		}
	}()
}

// findLayers asks QEMU which layers the disks have. What is on none is what a capture did
// not use, or a merge has emptied, and goes.
func (vm *VM) findLayers(ctx context.Context, stored map[string]int) error {
	if err := vm.awaitMerge(ctx); err != nil {
		return err
	}
	var devices []blockStats
	if err := vm.qmp.Execute(ctx, "query-blockstats", nil, &devices); err != nil {
		return err
	}
	var nodes []struct {
		Name string `json:"node-name"`
	}
	if err := vm.qmp.Execute(ctx, "query-named-block-nodes", map[string]bool{"flat": true}, &nodes); err != nil {
		return err
	}
	for _, c := range vm.disks.chains {
		var layers []layer // from the top
		for _, d := range devices {
			for s := &d; s != nil; s = s.Backing {
				if l, ok := vm.layerOf(c, s.Node); ok {
					layers = append(layers, l)
				}
			}
		}
		if len(layers) == 0 {
			return fmt.Errorf("disk %q: QEMU has none", c.disk.Name)
		}
		slices.Reverse(layers)
		if !slices.IsSortedFunc(layers, func(a, b layer) int { return a.number - b.number }) {
			return fmt.Errorf("disk %q: its layers are not in their order: %v", c.disk.Name, layers)
		}
		made := layers[len(layers)-1].number + 1
		for _, n := range nodes {
			if l, ok := vm.layerOf(c, n.Name); ok && !slices.Contains(layers, l) {
				made = max(made, l.number+1)
				if err := vm.dropLayer(ctx, l); err != nil {
					return err
				}
			}
		}
		files, err := vm.layerFiles(c)
		if err != nil {
			return err
		}
		for _, l := range files { // one that QEMU was not given yet
			if !slices.Contains(layers, l) {
				made = max(made, l.number+1)
				if err := remove(l.path); err != nil {
					return err
				}
			}
		}
		vm.disks.mu.Lock()
		c.layers, c.made, c.stored = layers, made, 0
		if through, ok := stored[c.disk.Name]; ok {
			frozen := len(layers) - 1
			if c.disk.ReadOnly {
				frozen++
			}
			for c.stored < frozen && layers[c.stored].number <= through {
				c.stored++
			}
		}
		vm.disks.mu.Unlock()
	}
	return nil
}

// blockStats is a node of QEMU's graph of disks, in query-blockstats.
type blockStats struct {
	Node    string      `json:"node-name"`
	Backing *blockStats // what is below it
}

// awaitMerge waits for a merge that another process has begun.
func (vm *VM) awaitMerge(ctx context.Context) error {
	for {
		var jobs []struct{ Device string }
		if err := vm.qmp.Execute(ctx, "query-block-jobs", nil, &jobs); err != nil {
			return err
		}
		running := false
		for _, j := range jobs {
			running = running || strings.HasPrefix(j.Device, mergePrefix)
		}
		if !running {
			return nil
		}
		select {
		case <-time.After(mergePoll):
		case <-vm.done:
			return errors.Join(errors.New("QEMU has ended"), vm.err)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
