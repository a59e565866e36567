package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"violin/internal/child"
	"violin/internal/coloring"
	"violin/internal/cut"
	"violin/internal/fabric"
	"violin/internal/hypervisor/qemu"
	"violin/internal/record"
)

// book is what an agent whose host is to outlive it writes down, besides what its switch
// does. A thing is written down before it is made, and until it is gone.
type book struct {
	path string // empty for one that nothing is written in

	mu   sync.Mutex
	page page
}

type page struct {
	Taps  int // made so far, for their names
	Nodes []nodeEntry
	Exits []exitEntry
	Cuts  []cutEntry
	Uses  map[string]use // by slice
}

type nodeEntry struct {
	Spec  NodeSpec
	Taps  []string // by interface
	Whole bool     // it has been made
	// Stored says, by disk, through which layer the disks are what Spec.Disks has in the
	// store: see [qemu.Find].
	Stored map[string]int
	// Follows: its memory follows, from an agent.
	Follows bool
}

type exitEntry struct {
	Spec  GatewaySpec
	Tap   string
	Whole bool
}

// cutEntry is a cut that has been prepared, or was about to, and has not ended.
type cutEntry struct {
	Slice, ID string
	From, To  cut.Epoch
	Networks  map[uint16]string
	Mode      qemu.Mode
}

func newBook(cfg Config) *book {
	b := &book{}
	if cfg.Keeper != nil {
		b.path = filepath.Join(cfg.Dir, "agent.json")
	}
	return b
}

// write changes what is written down.
func (b *book) write(change func(*page)) error {
	if b.path == "" {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	change(&b.page)
	return record.Write(b.path, b.page)
}

func (p *page) node(key coloring.NodeKey) *nodeEntry {
	for i := range p.Nodes {
		if e := &p.Nodes[i]; e.Spec.Slice == key.Slice && e.Spec.Name == key.Node {
			return e
		}
	}
	return &nodeEntry{} // it is gone
}

func (p *page) exit(tap string) *exitEntry {
	for i := range p.Exits {
		if p.Exits[i].Tap == tap {
			return &p.Exits[i]
		}
	}
	return &exitEntry{}
}

// followedBound bounds the wait for the hypervisor of a node whose memory followed from an
// agent that has died.
const followedBound = 10 * time.Second

// Find takes a host over from an agent that has died: its switch, its nodes with the
// frames that waited at their gates, and its cut. Nodes run on as they are, and what
// was half made is removed. Ways to the outside are made anew: connections that went
// through them are cut. An error means that nothing is left of it.
func Find(ctx context.Context, cfg Config) (_ *Agent, err error) {
	a := newAgent(cfg)
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("host %s: take over what runs there: %w", cfg.Host, err), a.remove())
		}
	}()
	if err := record.Read(a.book.path, &a.book.page); err != nil {
		return nil, err
	}
	a.taps = a.book.page.Taps
	maps.Copy(a.uses, a.book.page.Uses)
	if a.fabric, err = fabric.Find(ctx, a.fabricConfig()); err != nil {
		return nil, err
	}
	for _, p := range a.fabric.Peers() {
		a.peers[p.ID] = p.Host
	}
	var half []coloring.NodeKey
	for _, e := range a.book.page.Nodes {
		if err := a.findNode(ctx, e); err != nil {
			return nil, err
		}
		if !e.Whole {
			half = append(half, coloring.NodeKey{Slice: e.Spec.Slice, Node: e.Spec.Name})
		}
	}
	for _, e := range a.book.page.Cuts {
		a.cuts[e.Slice] = a.resumeCut(e)
	}
	if err := a.fabric.Open(ctx); err != nil {
		return nil, err
	}
	for _, key := range half {
		if err := a.stopNode(key); err != nil {
			return nil, err
		}
	}
	return a, a.findExits(ctx)
}

func (a *Agent) findNode(ctx context.Context, e nodeEntry) error {
	key := coloring.NodeKey{Slice: e.Spec.Slice, Node: e.Spec.Name}
	color := a.fabric.Color(key)
	n := &node{spec: e.Spec, disks: e.Spec.Disks, gate: cut.NewGate[arrival](color.Epoch, a.cfg.Limits)}
	if color.Closed || !e.Whole {
		n.gate.Close()
	} else {
		n.began = time.Now() // which opened it
	}
	spec := e.Spec.Machine
	spec.Dir = a.dirOf(e.Spec)
	for i, tap := range e.Taps {
		p := &port{node: n, index: i, tap: tap, number: a.fabric.Tap(tap)}
		n.ports = append(n.ports, p)
		if p.number != 0 {
			a.ports[p.number] = p
		}
	}
	var err error
	finding, cancel := ctx, func() {}
	if e.Follows { // QEMU answers nothing while it waits for a page itself
		finding, cancel = context.WithTimeout(ctx, followedBound)
	}
	defer cancel()
	if n.vm, err = qemu.Find(finding, spec, e.Stored, a.log); err != nil {
		return err
	}
	a.keep(n.vm)
	a.nodes[key] = n
	if e.Follows {
		a.unfollowed = append(a.unfollowed, n)
	}
	if problem := n.vm.Err(); problem != nil && e.Whole {
		a.log.Warn("a node has ended", "node", e.Spec.Name, "err", problem)
	}
	return nil
}

// resumeCut is a cut that an agent before this one took part in: the coordinator, or
// [Agent.Abandon], is to end it.
func (a *Agent) resumeCut(e cutEntry) *hostCut {
	hc := a.newCut(Order{Slice: e.Slice, Networks: e.Networks, Mode: e.Mode}, cut.SendPrepare{Cut: e.ID, From: e.From, To: e.To}, func(cut.Event) {})
	hc.taken = true
	close(hc.prepared)
	ctx, cancel := context.WithTimeout(context.Background(), queueBound)
	defer cancel()
	for _, nc := range hc.nodes {
		if !nc.n.alive() {
			continue
		}
		nc.capture = nc.n.vm.Orphan(e.Mode)
		status, err := nc.n.vm.Status(ctx)
		if err != nil {
			a.log.Warn("a node does not say how it is", "node", nc.n.spec.Name, "err", err)
		}
		// The last step that may have begun, as far as what is to be undone goes.
		flipped, runs := nc.n.gate.Epoch() == e.To, status == "running"
		switch {
		case flipped && runs:
			nc.begun = cut.StepOpen
		case flipped:
			nc.begun = cut.StepResume
		case !runs:
			nc.begun = cut.StepStop
		}
		nc.ordered.Store(nc.begun > 0)
	}
	a.log.Warn("an agent died in a cut, which waits for its coordinator", "cut", e.ID, "from", e.From, "to", e.To)
	return hc
}

// InCut tells whether a cut of the slice has not ended on this host.
func (a *Agent) InCut(slice string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.cuts[slice] != nil
}

// findExits makes the ways to the outside anew, on the devices that they had.
func (a *Agent) findExits(ctx context.Context) error {
	a.book.mu.Lock()
	entries := slices.Clone(a.book.page.Exits)
	a.book.mu.Unlock()
	var errs []error
	for _, e := range entries {
		x := &exit{slice: e.Spec.Slice, network: e.Spec.Network, tap: e.Tap, plugged: a.fabric.Tap(e.Tap) != 0}
		if !e.Whole {
			errs = append(errs, a.closeGateway(x))
			continue
		}
		if err := a.startGateway(x, e.Spec, true); err != nil {
			errs = append(errs, err)
			continue
		}
		a.log.Warn("connections through a way to the outside are cut: it was made anew", "gateway", e.Spec.Address)
		a.mu.Lock()
		a.exits = append(a.exits, x)
		a.mu.Unlock()
	}
	return errors.Join(errs...)
}

// remove removes what is left of a host that can't be taken over.
func (a *Agent) remove() error {
	var errs []error
	all, err := child.Below(a.cfg.Dir)
	errs = append(errs, err)
	for _, p := range all {
		errs = append(errs, p.Kill())
	}
	if a.fabric != nil {
		errs = append(errs, a.fabric.Close())
	} else {
		errs = append(errs, fabric.RemoveDevices(a.cfg.Platform.Netlink))
	}
	for _, x := range a.exits {
		if x.gateway != nil {
			errs = append(errs, x.gateway.Close())
		}
	}
	taps := map[string]bool{}
	for _, e := range a.book.page.Nodes {
		for _, tap := range e.Taps {
			taps[tap] = true
		}
	}
	for _, e := range a.book.page.Exits {
		taps[e.Tap] = true
	}
	for _, tap := range slices.Sorted(maps.Keys(taps)) {
		errs = append(errs, a.cfg.Platform.DeleteTap(tap))
	}
	return errors.Join(errs...)
}
