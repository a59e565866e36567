// Package agent is a host's half of Violin: it runs the host's nodes, owns its
// Open vSwitch and the OpenFlow session with it, and carries out a cut's orders
// on them.
//
// The controller's session, the holds and the records are here and not in the
// server because a node is flipped while its vCPUs are stopped: a WAN between
// host and server must not lengthen that pause.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"github.com/vishvananda/netlink"

	"violin/internal/coloring"
	"violin/internal/cut"
	"violin/internal/fabric"
	"violin/internal/hypervisor/qemu"
	"violin/internal/priority"
	"violin/internal/store"
)

// Platform is the machine an agent works on: a real one, or a namespace that
// stands for one.
type Platform interface {
	Start(cmd *exec.Cmd) error
	Netlink() (*netlink.Handle, error)
	CreateTap(name string, mtu int) error
	// OpenTap opens the end of a TAP device that a guest would have.
	OpenTap(name string) (*os.File, error)
	DeleteTap(name string) error
}

// Underlay is where a host is attached to what joins the hosts.
type Underlay struct {
	Device string
	Addr   netip.Prefix
	MAC    net.HardwareAddr
	MTU    int
}

// Config describes one host's agent.
type Config struct {
	Host     string
	Dir      string // sockets, logs and databases of what the agent runs
	Platform Platform
	Underlay Underlay
	// Limits bound what the gate of one node holds. At the bound the cut is aborted.
	Limits cut.Limits
	// Urgency is that of the agent's own process: agents of one process share it.
	Urgency *priority.Shared
	// Keeper is the command of the process that keeps what must not die with this one
	// (package keeper). With it, what the agent runs is to outlive it: the platform's
	// children don't die with their parent, and [Find] takes over what is written down
	// in Dir. Nil for neither.
	Keeper []string
	// Passed is told of each step of a cut that a node of this host, or for an empty name
	// the host, has done; for tests, which kill the agent there. Nil for none.
	Passed func(node, step string)
	Logger *slog.Logger
}

// Now is the host's clock.
func (a *Agent) Now(context.Context) (time.Time, error) { return time.Now(), nil }

// DefaultLimits bound a gate where Config gives no limits: 64 MiB of frames.
var DefaultLimits = cut.Limits{Bytes: 64 << 20}

// Agent runs one host.
type Agent struct {
	cfg     Config
	log     *slog.Logger
	fabric  *fabric.Switch
	book    *book
	keeping *keeping // nil if nothing outlives the agent

	sharing sync.Mutex // held while what slices share is made and removed

	mu    sync.Mutex // guards the maps; a node guards itself
	nodes map[coloring.NodeKey]*node
	ports map[uint32]*port
	cuts  map[string]*hostCut // by slice
	peers map[uint16]string   // host by peer number
	uses  map[string]use      // by slice
	taps  int                 // taps made so far, for their names
	exits []*exit

	unfollowed []*node // whose memory followed from an agent before this one
}

// Start brings the host's switch up.
func Start(ctx context.Context, cfg Config) (*Agent, error) {
	a := newAgent(cfg)
	sw, err := fabric.Start(ctx, a.fabricConfig())
	if err == nil {
		a.fabric = sw
		err = a.book.write(func(*page) {})
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("host %s: %w", cfg.Host, err), a.closeSwitch())
	}
	return a, nil
}

func newAgent(cfg Config) *Agent {
	if cfg.Limits == (cut.Limits{}) {
		cfg.Limits = DefaultLimits
	}
	if cfg.Passed == nil {
		cfg.Passed = func(_, _ string) {}
	}
	a := &Agent{
		cfg: cfg, log: cfg.Logger.With("host", cfg.Host), book: newBook(cfg),
		nodes: map[coloring.NodeKey]*node{}, ports: map[uint32]*port{},
		cuts: map[string]*hostCut{}, peers: map[uint16]string{}, uses: map[string]use{},
	}
	a.keeping = newKeeping(cfg, a.log)
	return a
}

func (a *Agent) fabricConfig() fabric.Config {
	u := a.cfg.Underlay
	c := fabric.Config{
		Host: a.cfg.Host, Dir: filepath.Join(a.cfg.Dir, "ovs"), Launcher: a.cfg.Platform, Netlink: a.cfg.Platform.Netlink,
		UnderlayDevice: u.Device, UnderlayAddr: u.Addr, UnderlayMAC: u.MAC, MTU: u.MTU,
		OnPacket: a.packet, OnLost: a.lost, Logger: a.log,
	}
	if a.keeping != nil {
		c.Dial = a.keeping.session
	}
	return c
}

func (a *Agent) closeSwitch() error {
	var err error
	if a.fabric != nil {
		err = a.fabric.Close()
	}
	return errors.Join(err, a.keeping.close())
}

// SwitchGone is closed when the host's switch has ended: without it the host's nodes
// reach nothing.
func (a *Agent) SwitchGone() <-chan struct{} { return a.fabric.Gone() }

// Close stops the host's nodes and its switch.
func (a *Agent) Close() error {
	a.mu.Lock()
	var keys []coloring.NodeKey
	for k := range a.nodes {
		keys = append(keys, k)
	}
	a.mu.Unlock()
	errs := []error{a.closeGateways("")}
	for _, k := range keys {
		errs = append(errs, a.stopNode(k))
	}
	return errors.Join(append(errs, a.closeSwitch())...)
}

// node is one VM with its gate.
type node struct {
	spec  NodeSpec
	vm    *qemu.VM
	ports []*port
	disks map[string]store.BlobRef // its disks as of the last snapshot that counts; of the cut that runs

	running sync.Mutex // held while it is let run
	began   time.Time  // that it has been, by this agent or before it; zero if not

	mu       sync.Mutex // guards what follows; held while frames are given to the guest, so that they stay in order
	gate     *cut.Gate[arrival]
	arrived  time.Time // of the last frame that the switch handed over and did not deliver
	recorded []Recorded
	overflow func(error) // where a gate that is over its bound is reported
	newer    func()      // what a newer frame sets off; nil for nothing
	discard  bool        // newer frames, instead of holding them: see [Drop]
	tally    tally       // of the cut that runs

	following *following // the memory that it gets while it runs; nil if it had it before
}

type port struct {
	node   *node
	number uint32
	index  int // of the interface
	tap    string
	copies uint64 // for the record, that came from the switch in this cut; guarded by the node
	others uint64 // frames that the switch counts as such copies and are none; ditto
}

// arrival is a frame on its way through a gate.
type arrival struct {
	port   *port
	data   []byte
	at     time.Time
	buffer uint32 // of the keeper; 0 for none
}

// Recorded is a frame of the channel state.
type Recorded struct {
	Node      string
	Interface int
	Epoch     cut.Epoch
	At        time.Time
	Data      []byte
}

// lost fails the cuts that run: between switch and gates, frames may be missing.
func (a *Agent) lost(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, hc := range a.cuts {
		if !hc.ended {
			go hc.fail("", fmt.Errorf("the session with the switch was lost: %w", err))
		}
	}
}

// packet takes a frame that the switch handed over. It runs on the session's
// goroutine, in the order of the wire.
func (a *Agent) packet(p coloring.Packet, data []byte) {
	a.mu.Lock()
	to := a.ports[p.Port]
	a.mu.Unlock()
	if to == nil {
		a.forget(p.Buffer) // the node is gone
		return
	}
	to.node.arrive(a, p, arrival{port: to, data: data, at: time.Now(), buffer: p.Buffer})
}

func (n *node) arrive(a *Agent, p coloring.Packet, f arrival) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if p.Delivered() {
		f.port.copies++
	} else {
		n.arrived = f.at
	}
	n.tally.arrive(p.Epoch, p.Delivered())
	if n.discard && !p.Delivered() && !p.Outside && p.Epoch.Compare(n.gate.Epoch()) > 0 {
		n.tally.discarded++
		a.forget(p.Buffer)
		return
	}
	v, err := n.gate.Arrive(cut.Frame[arrival]{Epoch: p.Epoch, Size: len(f.data), Delivered: p.Delivered(), Outside: p.Outside, Ref: f})
	if err != nil && n.overflow != nil {
		n.overflow(err)
	}
	if v.Newer && n.newer != nil {
		go n.newer() // it takes the agent's lock, which is taken before the node's
	}
	if v.Record {
		n.record(p.Epoch, f)
	}
	if v.Deliver {
		n.tally.deliver(p.Epoch, n.gate.Epoch(), p.Outside)
		n.deliver(a, f)
	}
}

func (n *node) record(epoch cut.Epoch, f arrival) {
	n.recorded = append(n.recorded, Recorded{
		Node: n.spec.Name, Interface: f.port.index, Epoch: epoch, At: f.at, Data: f.data,
	})
}

func (n *node) deliver(a *Agent, f arrival) {
	if err := a.fabric.GiveOut(f.buffer, f.port.number, f.data); err != nil {
		n.tally.failed++
		a.log.Error("a held frame was not delivered", "node", n.spec.Name, "bytes", len(f.data), "err", err)
	}
}

// forget says that a frame that was handed over is for nobody.
func (a *Agent) forget(buffer uint32) {
	if err := a.fabric.Forget(buffer); err != nil {
		a.log.Debug("a frame for nobody stays kept", "err", err)
	}
}

func (n *node) alive() bool {
	select {
	case <-n.vm.Done():
		return false
	default:
		return true
	}
}
