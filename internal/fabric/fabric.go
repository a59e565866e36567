// Package fabric is the live network of one host: its private Open vSwitch, the
// ports and tunnels on it, and the OpenFlow session that colours, holds and
// records.
//
// What the switch should hold is computed by the coloring package; this package
// brings it there, and takes back what the switch hands over.
package fabric

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"

	"violin/internal/coloring"
	"violin/internal/cut"
	"violin/internal/openflow"
	"violin/internal/priority"
)

// The bridges of a host: the nodes' and, with the user-space datapath, the
// underlay's, which holds the underlay device so that the switch reaches it.
const (
	integration = "br-int"
	physical    = "br-phy"
	// datapathDevice is one that the user-space datapath makes for itself.
	datapathDevice = "ovs-netdev"
)

// Config describes one host's switch.
type Config struct {
	Host     string
	Dir      string // sockets, database and logs
	Launcher Launcher
	Netlink  func() (*netlink.Handle, error) // into the host's network namespace

	UnderlayDevice string
	UnderlayAddr   netip.Prefix
	UnderlayMAC    net.HardwareAddr
	MTU            int // of the underlay

	// OnPacket takes what the gate table hands over, in the order of the wire. It
	// may call Output; it must not wait for the switch.
	OnPacket func(coloring.Packet, []byte)
	// OnLost is told that the session with the switch was lost: what the switch has
	// handed over since may be lost as well. It is being opened again. May be nil.
	OnLost func(error)
	// Dial reaches the switch by OpenFlow through a keeper; nil for directly. With it
	// the switch is one that may outlive this process, and is written down for [Find].
	Dial   func(context.Context) (net.Conn, error)
	Logger *slog.Logger

	queueBytes int // of the OpenFlow session, each way; 0 for its default
}

// Peer is another host, to be reached by VXLAN.
type Peer struct {
	ID   uint16 // the same on every host; not 0
	Host string
	Addr netip.Addr
	MAC  net.HardwareAddr // of its underlay address, so that no frame waits for ARP
}

// Port is a node's interface or a gateway, on a TAP device.
type Port struct {
	Tap       string
	Slice     string
	Node      string
	Interface int
	Network   uint16
	Address   net.HardwareAddr
	Outside   bool // a gateway to the outside, of no node
}

// Counters are a switch's counters, exact when they are returned.
type Counters struct {
	coloring.Counters
	Records map[uint32]uint64 // by port: copies handed over by the present record entries
	// Handed and Seen count the frames that the switch gave to the controller
	// alone, by hold and closed entries, and those that came here. A difference
	// is frames that the session between the two has dropped.
	Handed, Seen uint64
	// HandedFor and SeenFor are those of each port.
	HandedFor, SeenFor map[uint32]uint64
	// Refused counts the messages that the switch would not obey: each may have
	// been a frame to give out.
	Refused uint64
}

// For returns the counters with Handed and Seen of some ports alone: slices that share
// a switch have nothing to do with each other's frames.
func (c Counters) For(ports []uint32) Counters {
	c.Handed, c.Seen = 0, 0
	for _, p := range ports {
		c.Handed += c.HandedFor[p]
		c.Seen += c.SeenFor[p]
	}
	return c
}

// Switch is one host's running Open vSwitch.
type Switch struct {
	cfg     Config
	log     *slog.Logger
	run     uint16 // in the cookies of its entries
	daemons *daemons
	urgency *priority.Shared
	db      *database
	control *unixctl
	nl      *netlink.Handle
	conn    atomic.Pointer[openflow.Conn] // replaced when the session is opened again
	served  chan struct{}                 // closed when there is no session any more

	lifetime context.Context // until Close
	end      context.CancelFunc

	peering sync.Mutex // held while tunnels are made and removed

	mu        sync.Mutex // guards the desired and the installed state
	sw        coloring.Switch
	state     coloring.State
	installed coloring.FlowSet
	taps      map[string]uint32
	behind    map[string]uint64 // by TAP device: how many frames it had been given with the last of [Switch.Settle]

	counts  sync.Mutex
	handed  map[uint32]uint64 // by port: by entries that are gone
	seen    map[uint32]uint64 // by port
	refused uint64
	pending map[uint32]struct{} // buffers of the frames that OnPacket was given, and the keeper has
}

// Gone is closed when ovs-vswitchd has ended.
func (s *Switch) Gone() <-chan struct{} { return s.daemons.vswitchd.Done() }

// Start starts the switch. A failure leaves nothing running.
func Start(ctx context.Context, cfg Config) (_ *Switch, err error) {
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("start Open vSwitch: %w", err)
	}
	var run [2]byte
	if _, err := rand.Read(run[:]); err != nil {
		return nil, err
	}
	s := newSwitch(cfg)
	s.run = binary.BigEndian.Uint16(run[:]) | 1
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("start Open vSwitch on %s: %w", cfg.Host, err), s.Close())
		}
	}()
	if s.nl, err = cfg.Netlink(); err != nil {
		return nil, err
	}
	if s.daemons, err = startDaemons(ctx, cfg); err != nil {
		return nil, err
	}
	s.urgency = &priority.Shared{PID: s.daemons.pid(), Log: s.log}
	if s.db, err = openDatabase(ctx, s.daemons.socket(), s.log); err != nil {
		return nil, err
	}
	if err := s.bridges(ctx); err != nil {
		return nil, err
	}
	if s.control, err = dialControl(ctx, s.daemons.control()); err != nil {
		return nil, err
	}
	if err := s.connect(ctx); err != nil {
		return nil, err
	}
	return s, s.writeWiring()
}

func newSwitch(cfg Config) *Switch {
	s := &Switch{
		cfg: cfg, log: cfg.Logger,
		state:     coloring.State{Nodes: map[coloring.NodeKey]coloring.Color{}, Counted: map[uint16][]cut.Epoch{}},
		installed: coloring.FlowSet{}, taps: map[string]uint32{}, behind: map[string]uint64{}, pending: map[uint32]struct{}{},
		handed: map[uint32]uint64{}, seen: map[uint32]uint64{},
	}
	s.lifetime, s.end = context.WithCancel(context.Background())
	return s
}

// userspace tells whether this machine's switch must do without the kernel's datapath.
func userspace() bool {
	_, err := os.Stat("/sys/module/openvswitch")
	return err != nil
}

func (s *Switch) bridges(ctx context.Context) error {
	datapath := "system"
	if userspace() {
		datapath = "netdev"
		if err := s.db.addBridge(ctx, physical, datapath, s.cfg.UnderlayMAC); err != nil {
			return err
		}
		if _, err := s.db.addPort(ctx, physical, s.cfg.UnderlayDevice, "", nil); err != nil {
			return err
		}
		if err := s.moveUnderlay(); err != nil {
			return err
		}
	}
	if err := s.db.addBridge(ctx, integration, datapath, nil); err != nil {
		return err
	}
	return s.daemons.raiseBuffers()
}

// moveUnderlay puts the underlay address where the switch's tunnels look for it.
// The device gets another address of its own, or the host's stack would answer
// on it as well.
func (s *Switch) moveUnderlay() error {
	device, err := s.nl.LinkByName(s.cfg.UnderlayDevice)
	if err != nil {
		return fmt.Errorf("underlay device %s: %w", s.cfg.UnderlayDevice, err)
	}
	bridge, err := s.nl.LinkByName(physical)
	if err != nil {
		return fmt.Errorf("bridge %s: %w", physical, err)
	}
	addrs, err := s.nl.AddrList(device, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("addresses of %s: %w", s.cfg.UnderlayDevice, err)
	}
	for _, a := range addrs {
		if err := s.nl.AddrDel(device, &a); err != nil {
			return fmt.Errorf("take %s off %s: %w", a.IPNet, s.cfg.UnderlayDevice, err)
		}
	}
	own := slices.Clone(s.cfg.UnderlayMAC)
	own[2] ^= 0x80
	steps := []func() error{
		func() error { return s.nl.LinkSetDown(device) },
		func() error { return s.nl.LinkSetHardwareAddr(device, own) },
		func() error { return s.nl.LinkSetUp(device) },
		func() error { return s.nl.LinkSetMTU(bridge, s.cfg.MTU) },
		func() error { return s.nl.LinkSetTxQLen(bridge, 4096) },
		func() error {
			return s.nl.AddrAdd(bridge, &netlink.Addr{IPNet: &net.IPNet{
				IP: s.cfg.UnderlayAddr.Addr().AsSlice(), Mask: net.CIDRMask(s.cfg.UnderlayAddr.Bits(), s.cfg.UnderlayAddr.Addr().BitLen()),
			}})
		},
		func() error { return s.nl.LinkSetUp(bridge) },
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return fmt.Errorf("move the underlay address %s from %s to %s: %w", s.cfg.UnderlayAddr, s.cfg.UnderlayDevice, physical, err)
		}
	}
	return nil
}

// handle takes what the switch sends of its own accord.
func (s *Switch) handle(m openflow.Message) {
	switch m := m.(type) {
	case *openflow.PacketIn:
		p, err := coloring.ReadPacket(m)
		if err != nil {
			s.log.Warn("packet-in", "err", err)
			return
		}
		if !p.Delivered() && !s.news(p.Buffer, p.Port) {
			return
		}
		s.cfg.OnPacket(p, m.Data)
	case *openflow.FlowRemoved:
		if k := coloring.UnpackCookie(m.Cookie); k.Run == s.run {
			s.counts.Lock()
			s.handed[uint32(k.Port)] += m.Packets
			s.counts.Unlock()
		}
	case *openflow.ErrorMessage:
		s.log.Error("the switch refuses a message", "err", m)
		s.counts.Lock()
		s.refused++
		s.counts.Unlock()
	}
}

func tunnelName(peer uint16) string { return fmt.Sprintf("vx%d", peer) }

// AddPeer adds the tunnel to another host, unless it is there; it carries frames from
// the next Update on.
func (s *Switch) AddPeer(ctx context.Context, p Peer) error {
	s.peering.Lock()
	defer s.peering.Unlock()
	if slices.ContainsFunc(s.Peers(), func(have coloring.Peer) bool { return have.ID == p.ID }) {
		return nil
	}
	number, err := s.db.addPort(ctx, integration, tunnelName(p.ID), "vxlan", map[string]string{
		"remote_ip": p.Addr.String(), "local_ip": s.cfg.UnderlayAddr.Addr().String(), "key": "flow",
	})
	if err != nil {
		return fmt.Errorf("tunnel to %s: %w", p.Host, err)
	}
	if userspace() && p.MAC != nil {
		if err := s.control.call(ctx, "tnl/neigh/set", physical, p.Addr.String(), p.MAC.String()); err != nil {
			return fmt.Errorf("tunnel to %s: %w", p.Host, err)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sw.Peers = append(s.sw.Peers, coloring.Peer{ID: p.ID, Host: p.Host, Port: number})
	return s.writeWiring()
}

// RemovePeer removes the tunnel to another host, which no slice uses any more.
func (s *Switch) RemovePeer(ctx context.Context, id uint16) error {
	s.peering.Lock()
	defer s.peering.Unlock()
	s.mu.Lock()
	s.sw.Peers = slices.DeleteFunc(s.sw.Peers, func(p coloring.Peer) bool { return p.ID == id })
	err := s.writeWiring()
	s.mu.Unlock()
	if err != nil {
		return err
	}
	if err := s.Update(ctx, func(*coloring.State) {}); err != nil {
		return err
	}
	select {
	case <-s.Gone(): // as in Detach
		return nil
	default:
	}
	return s.db.removePort(ctx, integration, tunnelName(id))
}

// SetRemotes tells where the interfaces on other hosts are, from the next Update on.
func (s *Switch) SetRemotes(remotes []coloring.Remote) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sw.Remotes = slices.Clone(remotes)
	return s.writeWiring()
}

// Attach plugs a TAP device in. Frames pass from the next Update on that gives
// the port's node a colour.
func (s *Switch) Attach(ctx context.Context, p Port) (uint32, error) {
	if err := s.accountQueue(p.Tap); err != nil {
		return 0, err
	}
	number, err := s.db.addPort(ctx, integration, p.Tap, "", nil)
	if err != nil {
		return 0, err
	}
	if err := s.daemons.raiseBuffers(); err != nil {
		return 0, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.taps[p.Tap] = number
	s.sw.Ports = append(s.sw.Ports, coloring.Port{
		Number: number, Slice: p.Slice, Node: p.Node, Interface: p.Interface, Network: p.Network, Address: p.Address,
		Outside: p.Outside,
	})
	return number, s.writeWiring()
}

// Detach unplugs a TAP device.
func (s *Switch) Detach(ctx context.Context, tap string) error {
	s.mu.Lock()
	number, ok := s.taps[tap]
	delete(s.taps, tap)
	delete(s.behind, tap)
	s.sw.Ports = slices.DeleteFunc(s.sw.Ports, func(p coloring.Port) bool { return p.Number == number })
	err := s.writeWiring()
	s.mu.Unlock()
	if !ok || err != nil {
		return err
	}
	select {
	case <-s.Gone(): // it has no ports any more, and nobody would confirm it
		return nil
	default:
	}
	return s.db.removePort(ctx, integration, tap)
}

// Update changes the desired state and brings the switch to it in one atomic
// bundle. It returns after a barrier; decisions that the datapath has cached may
// still be in force then, until Purge. After an error the state is as it was.
func (s *Switch) Update(ctx context.Context, change func(*coloring.State)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	state := s.state.Clone()
	change(&state)
	flows, err := s.flows(state)
	if err != nil {
		return err
	}
	// Before: an agent that takes over brings the switch to what is written down.
	if err := s.writeColors(state); err != nil {
		return err
	}
	if mods := coloring.Diff(s.installed, flows); len(mods) > 0 {
		// What the datapath has counted and not yet told is credited, once the
		// tables have changed, to the entry that matches then: frames of the old
		// epoch would count as the new one's. It must tell before.
		err := s.Purge(ctx)
		if err == nil {
			err = s.conn.Load().Bundle(ctx, mods)
		}
		if err != nil {
			return errors.Join(fmt.Errorf("switch of %s: install %d flow mods: %w", s.cfg.Host, len(mods), err), s.writeColors(s.state))
		}
	}
	s.state, s.installed = state, flows
	return nil
}

// flows are the entries that a state asks for. The caller holds s.mu.
func (s *Switch) flows(state coloring.State) (coloring.FlowSet, error) {
	sw := s.sw
	sw.Ports = nil
	for _, p := range s.sw.Ports {
		if _, ok := state.Nodes[coloring.NodeKey{Slice: p.Slice, Node: p.Node}]; ok || p.Outside {
			sw.Ports = append(sw.Ports, p)
		}
	}
	return coloring.Flows(s.run, sw, state)
}

// Purge empties the datapath's caches, so that no frame is judged by entries that
// are gone, and brings the flow entries' counters up to date. It does not tell by
// which entries a frame was judged: see Update, which purges before it changes any.
func (s *Switch) Purge(ctx context.Context) error {
	return s.control.call(ctx, "revalidator/purge")
}

// Counters reads the counters.
func (s *Switch) Counters(ctx context.Context) (Counters, error) {
	if err := s.Purge(ctx); err != nil {
		return Counters{}, err
	}
	stats, err := s.conn.Load().FlowStats(ctx, openflow.FlowStatsRequest{
		Table: openflow.TableAll, Cookie: uint64(s.run) << 48, CookieMask: 0xffff << 48,
	})
	if err != nil {
		return Counters{}, fmt.Errorf("switch of %s: read the counters: %w", s.cfg.Host, err)
	}
	c := Counters{Counters: coloring.ReadCounters(stats), Records: map[uint32]uint64{}}
	s.counts.Lock()
	defer s.counts.Unlock()
	c.HandedFor, c.SeenFor = maps.Clone(s.handed), maps.Clone(s.seen)
	for _, st := range stats {
		switch k := coloring.UnpackCookie(st.Cookie); k.Kind {
		case coloring.KindRecord:
			c.Records[uint32(k.Port)] += st.Packets
		case coloring.KindHold, coloring.KindClosed:
			c.HandedFor[uint32(k.Port)] += st.Packets
		}
	}
	for _, n := range c.HandedFor {
		c.Handed += n
	}
	for _, n := range c.SeenFor {
		c.Seen += n
	}
	c.Refused = s.refused
	return c, nil
}

// OverflowLag is the longest that the switch's threads keep to themselves what they
// have thrown away: each tells it once a second, and when it next has something to do.
const OverflowLag = 1100 * time.Millisecond

// Overflowed counts the frames for the controller that the switch threw away since it
// started because a queue was full, as told [OverflowLag] ago. Unlike the difference
// of Handed and Seen it does not rest on flow entries, which get credit for what
// others did while the tables change.
func (s *Switch) Overflowed(ctx context.Context) (uint64, error) {
	var sum uint64
	// On the way from the datapath to the OpenFlow half, and from there to the session.
	for _, name := range []string{"packet_in_overflow", "rconn_overflow"} {
		text, err := s.control.query(ctx, "coverage/read-counter", name)
		if err != nil {
			return 0, fmt.Errorf("switch of %s: %w", s.cfg.Host, err)
		}
		n, err := strconv.ParseUint(strings.TrimSpace(text), 10, 64)
		if err != nil {
			return 0, fmt.Errorf("switch of %s: coverage/read-counter %s: %w", s.cfg.Host, name, err)
		}
		sum += n
	}
	return sum, nil
}

// Urgency is that of the switch's process.
func (s *Switch) Urgency() *priority.Shared { return s.urgency }

// Output sends a frame out of a port.
func (s *Switch) Output(port uint32, frame []byte) error { return s.GiveOut(0, port, frame) }

// GiveOut does so with a frame that the switch handed over, under the buffer that came
// with it.
func (s *Switch) GiveOut(buffer, port uint32, frame []byte) error {
	return s.retire(buffer, &openflow.PacketOut{Buffer: buffer, Actions: []openflow.Action{openflow.Output{Port: port}}, Data: frame})
}

// Forget says that a frame that the switch handed over is for nobody.
func (s *Switch) Forget(buffer uint32) error {
	if buffer == 0 {
		return nil
	}
	return s.retire(buffer, &openflow.PacketOut{Buffer: buffer})
}

func (s *Switch) retire(buffer uint32, m *openflow.PacketOut) error {
	if buffer != 0 {
		s.counts.Lock()
		delete(s.pending, buffer)
		s.counts.Unlock()
	}
	return s.conn.Load().Send(m)
}

// news counts a frame that was handed over. It tells whether it is a new one: a keeper
// gives a session that is opened again all that it has.
func (s *Switch) news(buffer, port uint32) bool {
	s.counts.Lock()
	defer s.counts.Unlock()
	if buffer != 0 {
		if _, ok := s.pending[buffer]; ok {
			return false
		}
		s.pending[buffer] = struct{}{}
	}
	s.seen[port]++
	return true
}

// Close stops the switch and waits until it is gone.
func (s *Switch) Close() error {
	s.end()
	if s.served != nil {
		<-s.served
	}
	if s.control != nil {
		s.control.close()
	}
	if s.db != nil {
		s.db.close()
	}
	var err error
	if s.daemons != nil {
		err = s.daemons.stop()
	}
	if s.nl != nil {
		err = errors.Join(err, s.removeDevices())
		s.nl.Close()
	}
	return err
}

// removeDevices removes the devices of the user-space datapath, which outlive it.
func (s *Switch) removeDevices() error { return removeDevices(s.nl) }

// RemoveDevices removes what a switch that is gone has left in a network namespace.
func RemoveDevices(open func() (*netlink.Handle, error)) error {
	nl, err := open()
	if err != nil {
		return err
	}
	defer nl.Close()
	return removeDevices(nl)
}

func removeDevices(nl *netlink.Handle) error {
	if !userspace() {
		return nil
	}
	var errs []error
	for _, name := range []string{physical, integration, datapathDevice} {
		link, err := nl.LinkByName(name)
		if errors.As(err, new(netlink.LinkNotFoundError)) {
			continue
		}
		if err == nil {
			err = nl.LinkDel(link)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("remove the switch's device %s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}
