package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"time"

	"violin/internal/coloring"
	"violin/internal/cut"
	"violin/internal/fabric"
	"violin/internal/frames"
	"violin/internal/hypervisor/qemu"
	stream "violin/internal/migration/qemu"
	"violin/internal/qga"
	"violin/internal/store"
)

// Interface is one of a node's network interfaces.
type Interface struct {
	Network uint16
	Address net.HardwareAddr
	MTU     int
	Model   string // as in [qemu.NIC]
}

// NodeSpec is a node to run.
type NodeSpec struct {
	Slice, Name string
	Epoch       cut.Epoch
	Machine     qemu.Spec // Dir and NICs are the agent's to fill in
	Interfaces  []Interface
	Disks       map[string]store.BlobRef // what the restored ones are in the store
	// Boot are the hashes of the files that the machine boots from, by kind (kernel,
	// initrd, rootfs, [BaseOf] a disk): for an agent on another machine, which has files of
	// its own.
	Boot map[string]store.Hash
}

// BaseOf is the kind of the file that a disk begins as.
func BaseOf(disk string) string { return "base of disk " + disk }

// AddNode makes a node with its ports and starts its hypervisor; the vCPUs do
// not run yet, and the node's gate is closed.
// An incoming node waits for [Agent.LoadNode]. A failure leaves nothing behind.
func (a *Agent) AddNode(ctx context.Context, spec NodeSpec, incoming bool) (err error) {
	key := coloring.NodeKey{Slice: spec.Slice, Node: spec.Name}
	n := &node{spec: spec, disks: spec.Disks, gate: cut.NewGate[arrival](spec.Epoch, a.cfg.Limits)}
	n.gate.Close()

	a.mu.Lock()
	if _, ok := a.nodes[key]; ok {
		a.mu.Unlock()
		return fmt.Errorf("host %s: node %s/%s is there already", a.cfg.Host, spec.Slice, spec.Name)
	}
	a.nodes[key] = n
	a.mu.Unlock()
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("node %q: %w", spec.Name, err), a.stopNode(key))
		}
	}()

	var taps []string
	for range spec.Interfaces {
		taps = append(taps, a.tapName())
	}
	if err := a.book.write(func(p *page) {
		p.Taps += len(taps)
		p.Nodes = append(p.Nodes, nodeEntry{Spec: spec, Taps: taps})
	}); err != nil {
		return err
	}
	spec.Machine.Dir = a.dirOf(spec)
	spec.Machine.NICs = nil
	for i, ifc := range spec.Interfaces {
		p, err := a.addPort(ctx, n, i, ifc, taps[i])
		if err != nil {
			return err
		}
		spec.Machine.NICs = append(spec.Machine.NICs, qemu.NIC{Tap: p.tap, MAC: ifc.Address, MTU: ifc.MTU, Model: ifc.Model})
	}
	if err := a.fabric.Update(ctx, func(st *coloring.State) {
		st.Nodes[key] = coloring.Color{Epoch: spec.Epoch, Closed: true}
		for _, ifc := range spec.Interfaces {
			st.Counted[ifc.Network] = []cut.Epoch{spec.Epoch}
		}
	}); err != nil {
		return err
	}
	if err := a.fabric.Purge(ctx); err != nil {
		return err
	}
	vm, err := qemu.Start(ctx, a.cfg.Platform, spec.Machine, incoming, a.log)
	if err != nil {
		return err
	}
	n.vm = vm
	a.keep(vm)
	return a.book.write(func(p *page) { e := p.node(key); e.Whole, e.Stored = true, vm.Stored() })
}

// dirOf is the directory of a node, and the name that its hypervisor is found by.
func (a *Agent) dirOf(spec NodeSpec) string { return filepath.Join(a.cfg.Dir, spec.Slice, spec.Name) }

func (a *Agent) tapName() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.taps++
	return fmt.Sprintf("vtap%d", a.taps)
}

func (a *Agent) addPort(ctx context.Context, n *node, index int, ifc Interface, tap string) (*port, error) {
	if err := a.cfg.Platform.CreateTap(tap, ifc.MTU); err != nil {
		return nil, err
	}
	p := &port{node: n, index: index, tap: tap}
	n.ports = append(n.ports, p)
	number, err := a.fabric.Attach(ctx, fabric.Port{
		Tap: tap, Slice: n.spec.Slice, Node: n.spec.Name, Interface: index, Network: ifc.Network, Address: ifc.Address,
	})
	if err != nil {
		return nil, err
	}
	p.number = number
	a.mu.Lock()
	a.ports[number] = p
	a.mu.Unlock()
	return p, nil
}

// LoadNode gives an incoming node its state. The vCPUs do not run yet.
func (a *Agent) LoadNode(ctx context.Context, slice, name string, skeleton *stream.Skeleton, pages stream.PageSource) error {
	return a.LoadStream(ctx, slice, name, func(w io.Writer) error { return stream.Encode(w, skeleton, pages) })
}

// LoadStream does so with a migration stream that is made already.
func (a *Agent) LoadStream(ctx context.Context, slice, name string, write func(io.Writer) error) error {
	n, err := a.node(slice, name)
	if err != nil {
		return err
	}
	if err := n.vm.Load(ctx, write); err != nil {
		return fmt.Errorf("node %q: %w", name, err)
	}
	return nil
}

// RunNode lets a node's vCPUs run, gives it the channel state at the frames'
// relative times, in order, and only then opens its gate. It returns when the
// vCPUs began to run. One that has been let run is left as it is: a server that comes
// back may say it again.
func (a *Agent) RunNode(ctx context.Context, slice, name string, channel []frames.Frame, receivers []frames.Receiver) (time.Time, error) {
	n, err := a.node(slice, name)
	if err != nil {
		return time.Time{}, err
	}
	n.running.Lock()
	defer n.running.Unlock()
	if !n.began.IsZero() {
		return n.began, nil
	}
	began, err := n.vm.Resume(ctx)
	if err != nil {
		return time.Time{}, fmt.Errorf("node %q: %w", name, err)
	}
	n.follow()
	start := time.Now()
	for _, f := range channel {
		r := receivers[f.Receiver]
		if r.Node != name || r.Interface >= len(n.ports) {
			continue
		}
		if wait := f.At - time.Since(start); wait > 0 {
			select {
			case <-time.After(wait):
			case <-ctx.Done():
				return time.Time{}, ctx.Err()
			}
		}
		if err := a.fabric.Output(n.ports[r.Interface].number, f.Data); err != nil {
			return time.Time{}, fmt.Errorf("node %q: give it its channel state: %w", name, err)
		}
	}
	if err := a.open(ctx, n); err != nil {
		return time.Time{}, err
	}
	n.began = began
	return began, nil
}

// ContinueNode lets the vCPUs of a node that a cut has halted run again.
func (a *Agent) ContinueNode(ctx context.Context, slice, name string) error {
	n, err := a.node(slice, name)
	if err != nil {
		return err
	}
	if _, err := n.vm.Resume(ctx); err != nil {
		return fmt.Errorf("node %q: let it run again: %w", name, err)
	}
	return nil
}

// Gone returns what is closed when a node's hypervisor has ended.
func (a *Agent) Gone(slice, name string) (<-chan struct{}, error) {
	n, err := a.node(slice, name)
	if err != nil {
		return nil, err
	}
	return n.vm.Done(), nil
}

// open lets the frames that waited at a node's gate go in, in order, and the
// switch deliver by itself from then on.
func (a *Agent) open(ctx context.Context, n *node) error {
	n.mu.Lock()
	for _, r := range n.gate.Open() {
		if r.Record {
			n.record(r.Frame.Epoch, r.Frame.Ref)
		}
		n.tally.deliver(r.Frame.Epoch, n.gate.Epoch(), r.Frame.Outside)
		n.deliver(a, r.Frame.Ref)
	}
	n.mu.Unlock()
	return a.recolor(ctx, n, func(c *coloring.Color) { c.Closed = false })
}

// recolor changes a node's colour in the switch, and returns once no frame is
// judged by the old one.
func (a *Agent) recolor(ctx context.Context, n *node, change func(*coloring.Color)) error {
	key := coloring.NodeKey{Slice: n.spec.Slice, Node: n.spec.Name}
	err := a.fabric.Update(ctx, func(st *coloring.State) {
		c := st.Nodes[key]
		change(&c)
		st.Nodes[key] = c
	})
	if err != nil {
		return err
	}
	return a.fabric.Purge(ctx)
}

// RemoveNode stops a node and removes what belongs to it.
func (a *Agent) RemoveNode(slice, name string) error {
	return a.stopNode(coloring.NodeKey{Slice: slice, Node: name})
}

func (a *Agent) stopNode(key coloring.NodeKey) error {
	a.mu.Lock()
	n := a.nodes[key]
	delete(a.nodes, key)
	a.mu.Unlock()
	if n == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	var errs []error
	if n.vm != nil {
		errs = append(errs, n.vm.Close())
	}
	if f := n.followed(); f != nil {
		<-f.done
	}
	for _, p := range n.ports {
		if p.number != 0 {
			errs = append(errs, a.fabric.Detach(ctx, p.tap))
		}
	}
	errs = append(errs, a.fabric.Update(ctx, func(st *coloring.State) { delete(st.Nodes, key) }))
	for _, p := range n.ports {
		a.mu.Lock()
		delete(a.ports, p.number)
		a.mu.Unlock()
		errs = append(errs, a.cfg.Platform.DeleteTap(p.tap))
	}
	errs = append(errs, a.book.write(func(p *page) {
		p.Nodes = slices.DeleteFunc(p.Nodes, func(e nodeEntry) bool { return e.Spec.Slice == key.Slice && e.Spec.Name == key.Node })
	}))
	return errors.Join(errs...)
}

func (a *Agent) node(slice, name string) (*node, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	n := a.nodes[coloring.NodeKey{Slice: slice, Node: name}]
	if n == nil || n.vm == nil {
		return nil, fmt.Errorf("host %s: there is no node %s/%s", a.cfg.Host, slice, name)
	}
	return n, nil
}

// NodeStatus is what is known of a node.
type NodeStatus struct {
	Epoch   cut.Epoch
	PID     int
	Status  string // QEMU's run state; empty if the hypervisor is gone
	Problem string // why it is gone
	// Resident is, of a node on another machine, what the hypervisor has of its memory, in
	// bytes.
	Resident uint64
}

// Status tells how a node is.
func (a *Agent) Status(ctx context.Context, slice, name string) (NodeStatus, error) {
	n, err := a.node(slice, name)
	if err != nil {
		return NodeStatus{}, err
	}
	n.mu.Lock()
	s := NodeStatus{Epoch: n.gate.Epoch()}
	n.mu.Unlock()
	if !n.alive() {
		if err := n.vm.Err(); err != nil {
			s.Problem = err.Error()
		}
		return s, nil
	}
	s.PID = n.vm.PID()
	if s.Status, err = n.vm.Status(ctx); err != nil {
		s.Problem = err.Error()
	}
	return s, nil
}

// guest speaks to a node's guest agent. The caller closes it.
func (a *Agent) guest(ctx context.Context, slice, name string) (*qga.Client, error) {
	n, err := a.node(slice, name)
	if err != nil {
		return nil, err
	}
	c, err := qga.Dial(ctx, n.vm.AgentPath())
	if err != nil {
		return nil, fmt.Errorf("node %q: %w", name, err)
	}
	return c, nil
}

// Exec runs a program in a node through its guest agent.
func (a *Agent) Exec(ctx context.Context, slice, name string, command []string, stdin []byte) (qga.Result, error) {
	c, err := a.guest(ctx, slice, name)
	if err != nil {
		return qga.Result{}, err
	}
	defer c.Close()
	r, err := c.Exec(ctx, command[0], command[1:], stdin)
	if err != nil {
		return qga.Result{}, fmt.Errorf("node %q: run %s: %w", name, command[0], err)
	}
	return r, nil
}

// SetClock steps a node's wall clock to this host's, through its guest agent.
func (a *Agent) SetClock(ctx context.Context, slice, name string) error {
	c, err := a.guest(ctx, slice, name)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetClock(ctx, time.Now); err != nil {
		return fmt.Errorf("node %q: %w", name, err)
	}
	return nil
}

// Console joins a node's serial console.
func (a *Agent) Console(ctx context.Context, slice, name string) (net.Conn, error) {
	n, err := a.node(slice, name)
	if err != nil {
		return nil, err
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", n.vm.ConsolePath())
	if err != nil {
		return nil, fmt.Errorf("node %q: join its console: %w", name, err)
	}
	return c, nil
}

// LogWish is what of a node's console log is wanted.
type LogWish struct {
	Tail   *uint32 // of what is there, only the last so many lines; nil for all
	Follow bool    // what comes, too, until the node ends
}

// ConsoleLog reads what a node has printed to its serial console, until ctx ends or it
// is closed.
func (a *Agent) ConsoleLog(ctx context.Context, slice, name string, w LogWish) (io.ReadCloser, error) {
	n, err := a.node(slice, name)
	if err != nil {
		return nil, err
	}
	log, err := n.vm.ReadConsoleLog(ctx, w.Tail, w.Follow)
	if err != nil {
		return nil, fmt.Errorf("node %q: read its console's log: %w", name, err)
	}
	return log, nil
}
