package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"violin/internal/qcow2"
)

// A layer's node is named DISK l NUMBER, and its file has a suffix. A merge is a job.
const (
	layerInfix  = "l"
	layerSuffix = ".qcow2"
	mergePrefix = "merge-" // of a job
)

// switchBound bounds the wait for QEMU to switch its disks, which takes milliseconds.
const switchBound = 10 * time.Second

// Disk is a virtio-blk disk. What the guest writes goes to layers in the VM's
// directory; the base is only read. A read-only one is as Restore gives it, in one layer,
// for good.
type Disk struct {
	Name       string // its serial number, too: at most 20 bytes
	Size       uint64 // bytes, a multiple of 512
	Base       string // path of an image; empty for a disk that begins empty
	BaseFormat string // "raw" or "qcow2"
	ReadOnly   bool
	Boot       int // the firmware tries disks in this order, from 1 on; 0 for never
	// Restore, if not nil, gives the pages in which the disk differs from its base, nil
	// for one of zeros.
	Restore func(page func(offset uint64, data []byte) error) error `json:"-"`
}

// chain is a disk's layers. Its writes go to the last; the others are frozen.
//
// What a capture needs in its pause is there before: the spare, a layer that QEMU has
// opened and does not use. The capture makes it the last layer. Once the frozen ones
// are in the store they are merged into the first, so that there are never more than
// four layers: those in the store, those of a capture that was given up, those of the
// capture that is under way, and the last.
type chain struct {
	disk   Disk
	name   string // of its nodes, to be followed by a number
	made   int
	layers []layer // from the bottom
	stored int     // so many of them, from the bottom, are in the store
	spare  *layer
}

// layer is a file of a disk. A higher number is higher in the chain; a merge keeps the
// lowest.
type layer struct {
	number     int
	node, path string
}

// writable are the disks that a capture switches to new layers.
func (d *disks) writable(yield func(*chain) bool) {
	for _, c := range d.chains {
		if !c.disk.ReadOnly && !yield(c) {
			return
		}
	}
}

// disks are a VM's disks.
type disks struct {
	turn    sync.Mutex // held while spares are made, used and dropped
	mu      sync.Mutex // guards the chains; not held while QEMU is at work
	chains  []*chain
	merging chan struct{} // closed when the merge that runs has ended; nil if none runs
	lost    error         // why the layers are not known, of a VM that was found
}

// create makes a new layer's file.
func (vm *VM) create(c *chain, fill func(func(uint64, []byte) error) error) (l layer, err error) {
	l = vm.layer(c, c.made)
	c.made++
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("disk %q: %w", c.disk.Name, err), remove(l.path))
		}
	}()
	f, err := os.OpenFile(l.path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return l, err
	}
	defer f.Close()
	w, err := qcow2.NewWriter(f, c.disk.Size)
	if err != nil {
		return l, err
	}
	if fill != nil {
		if err := fill(w.Page); err != nil {
			return l, err
		}
	}
	if err := w.Close(); err != nil {
		return l, err
	}
	return l, f.Close()
}

func (vm *VM) layer(c *chain, number int) layer {
	node := c.name + layerInfix + strconv.Itoa(number)
	return layer{number: number, node: node, path: vm.path(node + layerSuffix)}
}

// diskName is the name of a disk's device, and what those of its nodes begin with.
func diskName(i int) string { return "disk" + strconv.Itoa(i) }

// makeDisks makes the first layers.
func (vm *VM) makeDisks() error {
	for i, d := range vm.spec.Disks {
		c := &chain{disk: d, name: diskName(i)}
		vm.disks.chains = append(vm.disks.chains, c)
		if d.Restore != nil {
			l, err := vm.create(c, d.Restore)
			if err != nil {
				return err
			}
			c.layers, c.stored = append(c.layers, l), 1
		}
		if d.ReadOnly {
			continue
		}
		l, err := vm.create(c, nil)
		if err != nil {
			return err
		}
		c.layers = append(c.layers, l)
	}
	return nil
}

// blockdev is how QEMU opens a layer on another node; nil for none. QEMU need not see
// to it that what it writes is safe from a crash of the host: a layer is of no use
// without the memory of the VM.
func (l layer) blockdev(backing *string, readOnly bool) map[string]any {
	return map[string]any{
		"read-only": readOnly,
		"driver":    "qcow2", "node-name": l.node, "backing": backing, "discard": "unmap",
		"cache": map[string]any{"no-flush": true},
		"file":  map[string]any{"driver": "file", "filename": l.path, "cache": map[string]any{"no-flush": true}},
	}
}

// diskArgs is the disks on QEMU's command line.
func (vm *VM) diskArgs() []string {
	var args []string
	add := func(dev map[string]any) {
		b, err := json.Marshal(dev)
		if err != nil {
			panic(err) // strings and booleans always marshal
		}
		args = append(args, "-blockdev", string(b))
	}
	for _, c := range vm.disks.chains {
		var below *string
		if c.disk.Base != "" {
			name := c.name + "base"
			base := map[string]any{
				"driver": c.disk.BaseFormat, "node-name": name, "read-only": true,
				"file": map[string]any{"driver": "file", "filename": c.disk.Base},
			}
			if c.disk.BaseFormat == "qcow2" {
				base["backing"] = nil
			}
			add(base)
			below = &name
		}
		for _, l := range c.layers {
			add(l.blockdev(below, c.disk.ReadOnly))
			below = &l.node
		}
		device := "virtio-blk-pci,id=" + c.name + ",drive=" + *below + ",serial=" + strings.ReplaceAll(c.disk.Name, ",", ",,")
		if c.disk.Boot > 0 {
			device += ",bootindex=" + strconv.Itoa(c.disk.Boot)
		}
		args = append(args, "-device", device)
	}
	return args
}

// armDisks gives every disk a spare. It waits for a merge: while one runs, QEMU
// changes nothing about the disk.
func (vm *VM) armDisks(ctx context.Context) error {
	vm.disks.mu.Lock()
	merging := vm.disks.merging
	vm.disks.mu.Unlock()
	if merging != nil {
		select {
		case <-merging:
		case <-ctx.Done():
			return fmt.Errorf("wait until the disks' layers are merged: %w", ctx.Err())
		}
	}
	vm.disks.turn.Lock()
	defer vm.disks.turn.Unlock()
	if vm.disks.lost != nil {
		return vm.disks.lost
	}
	for c := range vm.disks.writable {
		l, err := vm.create(c, nil)
		if err != nil {
			return err
		}
		if err := vm.qmp.Execute(ctx, "blockdev-add", l.blockdev(nil, false), nil); err != nil {
			return errors.Join(fmt.Errorf("disk %q: open a layer: %w", c.disk.Name, err), remove(l.path))
		}
		vm.disks.mu.Lock()
		c.spare = &l
		vm.disks.mu.Unlock()
	}
	return nil
}

// switchDisks puts the spares on top of all disks, at one instant. The vCPUs stand
// still, and what the guest had asked of the disks has been done.
func (vm *VM) switchDisks(ctx context.Context) ([]Frozen, error) {
	if len(vm.disks.chains) == 0 {
		return nil, nil
	}
	vm.disks.turn.Lock()
	defer vm.disks.turn.Unlock()
	// Whether QEMU has switched must be known: the caller's end does not end this.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), switchBound)
	defer cancel()
	var actions []any
	for c := range vm.disks.writable {
		if c.spare == nil {
			return nil, errors.New("switch the disks: the capture was given up")
		}
		actions = append(actions, map[string]any{"type": "blockdev-snapshot", "data": map[string]string{
			"node": c.layers[len(c.layers)-1].node, "overlay": c.spare.node,
		}})
	}
	if len(actions) > 0 {
		if err := vm.qmp.Execute(ctx, "transaction", map[string]any{"actions": actions}, nil); err != nil {
			return nil, fmt.Errorf("switch the disks: %w", err)
		}
	}
	vm.disks.mu.Lock()
	defer vm.disks.mu.Unlock()
	var frozen []Frozen
	for _, c := range vm.disks.chains {
		f := Frozen{Disk: c.disk.Name, Size: c.disk.Size, stored: c.stored}
		for _, l := range c.layers {
			f.layers, f.Through = append(f.layers, l.path), l.number
		}
		frozen = append(frozen, f)
		if !c.disk.ReadOnly {
			c.layers, c.spare = append(c.layers, *c.spare), nil
		}
	}
	return frozen, nil
}

// Frozen is a disk as it was at the instant of a capture. It can be read until the
// capture is given up or said to be stored.
type Frozen struct {
	Disk    string
	Size    uint64 // bytes
	Through int    // the number of its highest layer; once it is stored, what [Find] is to be told
	layers  []string
	stored  int
}

// Changed gives the pages that were written since the last capture that was stored,
// and whose content is nil if it is zeros; all that differ from the base if there is
// none. A page that comes again replaces the one before.
func (f Frozen) Changed(page func(offset uint64, data []byte) error) error {
	return f.read(f.layers[f.stored:], page)
}

// All gives all pages that differ from the base, likewise.
func (f Frozen) All(page func(offset uint64, data []byte) error) error {
	return f.read(f.layers, page)
}

func (f Frozen) read(layers []string, page func(uint64, []byte) error) error {
	for _, path := range layers {
		if err := readLayer(path, page); err != nil {
			return fmt.Errorf("disk %q: %w", f.Disk, err)
		}
	}
	return nil
}

func readLayer(path string, page func(uint64, []byte) error) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	im, err := qcow2.Open(file)
	if err != nil {
		return err
	}
	return im.Pages(page)
}

// dropSpares takes back what armDisks has made and no capture used.
func (vm *VM) dropSpares(ctx context.Context) error {
	vm.disks.turn.Lock()
	defer vm.disks.turn.Unlock()
	var errs []error
	for _, c := range vm.disks.chains {
		vm.disks.mu.Lock()
		spare := c.spare
		c.spare = nil
		vm.disks.mu.Unlock()
		if spare != nil {
			errs = append(errs, vm.dropLayer(ctx, *spare))
		}
	}
	return errors.Join(errs...)
}

// dropLayer closes and deletes a layer that is in no disk.
func (vm *VM) dropLayer(ctx context.Context, l layer) error {
	if err := vm.qmp.Execute(ctx, "blockdev-del", map[string]string{"node-name": l.node}, nil); err != nil {
		return fmt.Errorf("close layer %s: %w", l.node, err)
	}
	return remove(l.path)
}

// mergeDisks begins to make the chains short, while the VM runs. With stored, what is
// frozen has gone to the store.
func (vm *VM) mergeDisks(stored bool) {
	vm.disks.mu.Lock()
	defer vm.disks.mu.Unlock()
	if len(vm.disks.chains) == 0 {
		return
	}
	for c := range vm.disks.writable {
		if stored {
			c.stored = len(c.layers) - 1
		}
	}
	before, done := vm.disks.merging, make(chan struct{})
	vm.disks.merging = done
	go func() {
		defer close(done)
		if before != nil {
			<-before
		}
		for c := range vm.disks.writable {
			// A merge that failed leaves the disk as it was, and the next does its work.
			if err := vm.merge(c); err != nil && vm.Err() == nil && !vm.isClosed() {
				vm.log.Warn("a disk's layers were not merged", "disk", c.disk.Name, "err", err)
			}
		}
	}()
}

func (vm *VM) isClosed() bool {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return vm.closed
}

// merge makes one layer of those that are in the store, and one of those that are
// frozen and are not.
func (vm *VM) merge(c *chain) error {
	vm.disks.mu.Lock()
	stored, frozen := c.stored, len(c.layers)-1
	vm.disks.mu.Unlock()
	if err := vm.mergeLayers(c, stored, frozen); err != nil {
		return err
	}
	return vm.mergeLayers(c, 0, stored)
}

// mergeLayers makes one layer, the first, of those from low to below high.
func (vm *VM) mergeLayers(c *chain, low, high int) error {
	if high-low < 2 {
		return nil
	}
	ctx := context.Background() // it ends with QEMU
	vm.disks.mu.Lock()
	layers := append([]layer(nil), c.layers[low:high]...)
	top := c.layers[len(c.layers)-1]
	vm.disks.mu.Unlock()
	events := vm.qmp.Subscribe(64, "BLOCK_JOB_COMPLETED")
	defer events.Close()
	job := mergePrefix + c.name
	if err := vm.qmp.Execute(ctx, "block-commit", map[string]any{
		"job-id": job, "device": top.node, "top-node": layers[len(layers)-1].node, "base-node": layers[0].node,
		"backing-file": layers[0].path,
	}, nil); err != nil {
		return err
	}
	for {
		e, err := events.Next(ctx)
		if err != nil {
			return err
		}
		var data struct{ Device, Error string }
		if err := json.Unmarshal(e.Data, &data); err != nil {
			return fmt.Errorf("event %s: %w", e.Name, err)
		}
		if data.Device != job {
			continue
		}
		if data.Error != "" {
			return fmt.Errorf("QEMU says: %s", data.Error)
		}
		break
	}
	vm.disks.mu.Lock()
	c.layers = append(c.layers[:low+1:low+1], c.layers[high:]...)
	if c.stored >= high {
		c.stored -= high - low - 1
	}
	vm.disks.mu.Unlock()
	var errs []error
	for i := len(layers) - 1; i > 0; i-- {
		errs = append(errs, vm.dropLayer(ctx, layers[i]))
	}
	return errors.Join(errs...)
}

// layerFiles are the layers that a chain has files of, whatever has become of them.
func (vm *VM) layerFiles(c *chain) ([]layer, error) {
	paths, err := filepath.Glob(vm.path(c.name + layerInfix + "*" + layerSuffix))
	var all []layer
	for _, p := range paths {
		if l, ok := vm.layerOf(c, strings.TrimSuffix(filepath.Base(p), layerSuffix)); ok {
			all = append(all, l)
		}
	}
	return all, err
}

// layerOf tells which of a chain's layers a node is.
func (vm *VM) layerOf(c *chain, node string) (layer, bool) {
	n, err := strconv.Atoi(strings.TrimPrefix(node, c.name+layerInfix))
	l := vm.layer(c, n)
	return l, err == nil && l.node == node
}

// removeDisks deletes the layers of a VM that is gone.
func (vm *VM) removeDisks() error {
	vm.disks.mu.Lock()
	defer vm.disks.mu.Unlock()
	var errs []error
	for _, c := range vm.disks.chains {
		files, err := vm.layerFiles(c)
		errs = append(errs, err)
		for _, l := range files {
			errs = append(errs, remove(l.path))
		}
	}
	return errors.Join(errs...)
}

func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
