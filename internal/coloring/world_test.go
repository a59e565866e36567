package coloring

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"time"

	"violin/internal/cut"
	"violin/internal/openflow"
	"violin/internal/openflow/softswitch"
)

// This file is the world in which the flow entries are tried: hosts with a
// switch each, tunnels between them that lose and reorder, nodes with guests that
// send what guests send, and every queue between them. What decides is the code
// that runs: the entries of Flows, brought to the switch by Diff and as OpenFlow
// messages, cut.Gate, cut.Steps, cut.AbortSteps and cut.Coordinator. The cut
// package explores every interleaving of a switch that is modelled by its
// promises; here the promises are those of the entries themselves.

// spec says what there is: which node has its interfaces on which networks.
type spec struct {
	name  string
	hosts int
	nodes []nodeSpec
}

type nodeSpec struct {
	host     int
	networks []uint16 // an interface each
	other    bool     // of another slice, which is not cut
	outside  bool     // no node but a gateway, on a host that has nodes of its network
}

// rules say what may happen.
type rules struct {
	spec
	cuts    int
	first   cut.Epoch
	sends   int // guests send while fewer frames than this are under way
	telling bool
	reorder bool // tunnels lose frames and do not keep their order
	trouble bool // cuts are cancelled, steps fail, gates are full
	mutate  func(*host, FlowSet)
}

// slices of the world: the one that is cut, and another on the same switches.
const (
	cutSlice   = "s"
	otherSlice = "other"
	outside    = "outside" // of no slice
	otherEpoch = cut.Epoch(77)
)

type world struct {
	rules
	rnd    *rand.Rand
	clock  int // one more with every action
	hosts  []*host
	nodes  []*node
	ifaces []*iface
	frames map[uint64]*frame
	flown  map[flight]bool // frames that a tunnel was given
	coord  *cut.Coordinator
	now    time.Duration
	epoch  int // of the slice, not modulo 256
	begun  int
	seal   *cut.Seal
	gone   map[channel]uint64 // put into the tunnel
	come   map[channel]uint64 // taken from it
	path   []string           // all that has happened, if it is to be told

	open int            // frames under way, one for each that it is for
	slow [ops][]float64 // how slow each is, in this cut, in doing each thing: the probability of not being next

	sealed, aborted, recorded, held, raced, lost, shut int // how much has been tried
}

type channel struct {
	from, to *host
	network  uint16
	epoch    int
}

// host is one switch and its controller, with the session between them.
type host struct {
	w         *world
	name      string
	id        uint16
	sw        Switch
	state     State
	installed FlowSet
	of        *softswitch.Switch
	ports     map[uint32]*iface
	peers     map[uint32]*host // by tunnel port

	down         []order  // from controller to switch
	told, heard  int      // messages put into down, and taken out
	up           []punted // from switch to controller
	bundles      uint32
	orders       []cut.Effect
	jobs         []part
	tunnels      [][]packet // to each host
	copies       map[uint32]uint64
	handed, seen uint64 // by closed and hold entries that are gone; frames they gave
}

// order is an OpenFlow message on its way to the switch.
type order struct {
	message []byte
	done    func() // what is true when the switch has taken it
	reach   *reach // of a packet-out
}

// punted is one on its way from it.
type punted struct {
	message []byte
	frame   uint64
	aged    bool
	reach   *reach // of a frame that the switch has not delivered
}

// packet is a frame in a tunnel: network and epoch are in the tunnel id.
type packet struct {
	id   uint64
	data []byte
	aged bool
}

type flight struct {
	frame uint64
	to    *host
}

type node struct {
	w        *world
	name     string
	key      NodeKey
	host     *host
	ifaces   []*iface
	running  bool
	epoch    int // the switch stamps with it, not modulo 256
	gate     *cut.Gate[arrival]
	plan     []part
	begun    cut.Step
	abort    bool
	captured int // when; 0 if it is not
}

type iface struct {
	node    *node
	index   int
	network uint16
	addr    net.HardwareAddr
	port    uint32
	tx      []*frame
	rx      []*reach
	last    map[*iface]uint64 // frame from each sender that came last
}

// arrival is a frame at a gate.
type arrival struct {
	reach *reach
	data  []byte
}

// frame is one that a guest sent, and what is to become of it.
type frame struct {
	id    uint64
	data  []byte
	from  *iface
	sent  int // when
	epoch int // of its sender when the switch took it; -1 before
	to    map[*iface]*reach
	aged  bool
}

// reach is what became of a frame at one of those that it is for.
type reach struct {
	frame    *frame
	at       *iface
	placed   bool // in the queue to the guest
	read     int  // when
	lost     bool // by the tunnel
	raced    bool // was between switch and gate when the switch opened
	recorded int  // times, in this cut
}

// part is a part of a step, or of a host's order.
type part struct {
	name  string
	ready func() bool
	do    func()
}

// violation is what must never happen.
type violation string

func (w *world) must(ok bool, format string, args ...any) {
	if !ok {
		panic(violation(fmt.Sprintf(format, args...)))
	}
}

// timing: a frame is under way for less than Quiet. See canTick.
var timing = cut.Timing{Prepare: 1e6, Cut: 1e6, Store: 1e6, Ack: 1e6, Retry: 1e6, Poll: 1, Quiet: 2}

func newWorld(r rules, seed uint64) *world {
	w := &world{
		rules: r, rnd: rand.New(rand.NewPCG(seed, 0)), clock: 1, frames: map[uint64]*frame{}, epoch: int(r.first),
		flown: map[flight]bool{}, gone: map[channel]uint64{}, come: map[channel]uint64{},
	}
	for i := range r.hosts {
		h := &host{
			w: w, name: string(rune('A' + i)), id: uint16(i + 1), installed: FlowSet{},
			state: State{Nodes: map[NodeKey]Color{}, Counted: map[uint16][]cut.Epoch{}},
			ports: map[uint32]*iface{}, peers: map[uint32]*host{}, tunnels: make([][]packet, r.hosts), copies: map[uint32]uint64{},
		}
		h.of = softswitch.New(h.punt, h.leave)
		w.hosts = append(w.hosts, h)
	}
	members := map[string][]string{}
	for i, ns := range r.nodes {
		w.addNode(i, ns)
		if n := w.nodes[i]; n.key.Slice == cutSlice {
			members[n.host.name] = append(members[n.host.name], n.name)
		}
	}
	for _, h := range w.hosts {
		for _, p := range w.hosts {
			if p == h {
				continue
			}
			port := uint32(100 + p.id)
			h.peers[port] = p
			h.of.AddPort(port, true)
			h.sw.Peers = append(h.sw.Peers, Peer{ID: p.id, Host: p.name, Port: port})
		}
		for _, f := range w.ifaces {
			if f.node.host != h {
				h.sw.Remotes = append(h.sw.Remotes, Remote{Network: f.network, Address: f.addr, Peer: f.node.host.id, Outside: f.node.outside()})
			}
		}
		h.update(nil, func(*State) {})
		for len(h.down) > 0 {
			h.listen()
		}
	}
	w.coord = cut.NewCoordinator(cut.Config{Epoch: r.first, Hosts: members, Timing: timing})
	return w
}

func (w *world) addNode(i int, ns nodeSpec) {
	h := w.hosts[ns.host]
	limits := cut.Limits{}
	if w.trouble && w.rnd.IntN(4) == 0 {
		limits.Frames = 1 + w.rnd.IntN(6)
	}
	n := &node{w: w, name: string(rune('a' + i)), host: h, running: true, epoch: int(w.first)}
	n.key = NodeKey{cutSlice, n.name}
	if ns.other {
		n.key.Slice, n.epoch = otherSlice, int(otherEpoch)
	}
	if ns.outside {
		n.key.Slice, n.epoch = outside, 0
	}
	n.gate = cut.NewGate[arrival](cut.Epoch(n.epoch), limits)
	w.nodes = append(w.nodes, n)
	if !ns.outside {
		h.state.Nodes[n.key] = Color{Epoch: cut.Epoch(n.epoch)}
	}
	for k, network := range ns.networks {
		f := &iface{
			node: n, index: k, network: network, addr: mac(len(w.ifaces) + 1), port: uint32(len(h.ports) + 1), last: map[*iface]uint64{},
		}
		n.ifaces = append(n.ifaces, f)
		w.ifaces = append(w.ifaces, f)
		h.ports[f.port] = f
		h.of.AddPort(f.port, false)
		h.sw.Ports = append(h.sw.Ports, Port{
			Number: f.port, Slice: n.key.Slice, Node: n.name, Interface: k, Network: network, Address: f.addr,
			Outside: ns.outside,
		})
		if ns.outside {
			continue
		}
		h.state.Counted[network] = []cut.Epoch{cut.Epoch(n.epoch)}
	}
}

func (n *node) outside() bool { return n.key.Slice == outside }

func (f *iface) String() string { return fmt.Sprintf("%s.%d", f.node.name, f.index) }

// ---- what guests send

// kind is a kind of frame.
type kind struct {
	name string
	dst  func(w *world, from *iface) net.HardwareAddr // nil: there is none here
	typ  []byte
	size int
}

func fixed(addr string) func(*world, *iface) net.HardwareAddr {
	a, err := net.ParseMAC(addr)
	if err != nil {
		panic(err)
	}
	return func(*world, *iface) net.HardwareAddr { return a }
}

// someone picks an interface.
func someone(ok func(from, to *iface) bool) func(*world, *iface) net.HardwareAddr {
	return func(w *world, from *iface) net.HardwareAddr {
		for _, i := range w.rnd.Perm(len(w.ifaces)) {
			if to := w.ifaces[i]; ok(from, to) {
				return to.addr
			}
		}
		return nil
	}
}

var (
	neighbour = someone(func(from, to *iface) bool { return to != from && to.network == from.network })
	stranger  = someone(func(from, to *iface) bool { return to.network != from.network })
	itself    = func(_ *world, from *iface) net.HardwareAddr { return from.addr }

	experimental = []byte{0x88, 0xb5}
	routed       = []byte{0x88, 0xb6} // a guest that reads it sends it on to another of its networks
	tagged       = []byte{0x81, 0x00, 0x20, 0x2a, 0x88, 0xb5}

	kinds = []kind{
		{"unicast", neighbour, experimental, 60},
		{"to be routed", neighbour, routed, 60},
		{"smallest", neighbour, experimental, 0},
		{"jumbo", neighbour, experimental, 9000},
		{"tagged", neighbour, tagged, 60},
		{"tagged broadcast", fixed("ff:ff:ff:ff:ff:ff"), tagged, 60},
		{"ARP", fixed("ff:ff:ff:ff:ff:ff"), []byte{0x08, 0x06}, 28},
		{"IPv4 multicast", fixed("01:00:5e:00:00:fb"), []byte{0x08, 0x00}, 60},
		{"neighbour discovery", fixed("33:33:ff:00:00:01"), []byte{0x86, 0xdd}, 72},
		{"LLDP", fixed("01:80:c2:00:00:0e"), []byte{0x88, 0xcc}, 60},
		{"to an address nobody has", fixed("06:00:00:00:00:99"), experimental, 60},
		{"to an address of another network", stranger, experimental, 60},
		{"to itself", itself, experimental, 60},
	}
)

// compose writes a frame. Its last eight bytes are its number.
func (k kind) compose(dst, src net.HardwareAddr, id uint64) []byte {
	b := slices.Concat(dst, src, k.typ, bytes.Repeat([]byte{byte(id)}, k.size))
	return binary.BigEndian.AppendUint64(b, id)
}

func number(data []byte) uint64 { return binary.BigEndian.Uint64(data[len(data)-8:]) }

// send has a guest send a frame.
func (w *world) send(from *iface, k kind) bool {
	dst := k.dst(w, from)
	if dst == nil {
		return false
	}
	id := uint64(w.clock)
	f := &frame{id: id, data: k.compose(dst, from.addr, id), from: from, sent: w.clock, epoch: -1, to: map[*iface]*reach{}}
	for _, to := range w.ifaces {
		if to.network == from.network && to != from {
			f.to[to] = &reach{frame: f, at: to}
		}
	}
	for _, to := range w.ifaces {
		if to.network == from.network && bytes.Equal(to.addr, dst) {
			maps.DeleteFunc(f.to, func(other *iface, _ *reach) bool { return other != to })
		}
	}
	w.frames[id] = f
	w.open += len(f.to)
	from.tx = append(from.tx, f)
	return true
}

// ---- the switches

// update is what fabric.Switch.Update does: the difference goes to the switch as
// one bundle. It returns when that is in force.
func (h *host) update(done func(), change func(*State)) (inForce func() bool) {
	change(&h.state)
	flows, err := Flows(uint16(h.id), h.sw, h.state)
	if err != nil {
		panic(err)
	}
	if h.w.mutate != nil {
		h.w.mutate(h, flows)
	}
	h.bundles++
	const flags = openflow.BundleAtomic | openflow.BundleOrdered
	h.tell(&openflow.BundleControl{Bundle: h.bundles, Command: openflow.BundleOpen, Flags: flags}, order{})
	for _, m := range Diff(h.installed, flows) {
		h.tell(&openflow.BundleAdd{Bundle: h.bundles, Flags: flags, Message: &m}, order{})
	}
	h.tell(&openflow.BundleControl{Bundle: h.bundles, Command: openflow.BundleCommit, Flags: flags}, order{done: done})
	h.installed = flows
	mark := h.told
	return func() bool { return h.heard >= mark }
}

func (h *host) tell(m openflow.Message, o order) {
	b, err := openflow.Marshal(uint32(h.told), m)
	if err != nil {
		panic(err)
	}
	o.message = b
	h.down = append(h.down, o)
	h.told++
}

// listen has the switch take one message.
func (h *host) listen() {
	o := h.down[0]
	h.down = h.down[1:]
	h.heard++
	_, err := h.of.Handle(o.message)
	h.w.must(err == nil, "the switch of %s refuses: %v", h.name, err)
	if o.done != nil {
		o.done()
	}
}

// punt takes what the switch says of its own accord.
func (h *host) punt(message []byte) {
	p := punted{message: message}
	_, m, err := openflow.Unmarshal(message)
	if err != nil {
		panic(err)
	}
	switch m := m.(type) {
	case *openflow.FlowRemoved:
		h.handed += m.Packets
		return // it is counted when it comes: see counters
	case *openflow.PacketIn:
		in, err := ReadPacket(m)
		h.w.must(err == nil, "a packet-in: %v", err)
		p.frame = number(m.Data)
		if !in.Delivered() {
			p.reach = h.w.reach(h, in.Port, m.Data)
			h.seen++
		}
	}
	h.up = append(h.up, p)
}

// leave takes a frame that the switch puts out.
func (h *host) leave(f softswitch.Frame) {
	w := h.w
	if peer := h.peers[f.Port]; peer != nil {
		w.enterTunnel(h, peer, f)
		return
	}
	r := w.reach(h, f.Port, f.Data)
	w.must(!r.placed, "frame %d is delivered to %s twice", r.frame.id, r.at)
	r.placed = true
	r.at.rx = append(r.at.rx, r)
	if w.reorder {
		return
	}
	last := r.at.last[r.frame.from]
	w.must(r.raced || last < r.frame.id, "frame %d is overtaken on its way to %s by %d", r.frame.id, r.at, last)
	r.at.last[r.frame.from] = max(last, r.frame.id)
}

// reach finds out which frame it is that came to a port, and whether it may.
func (w *world) reach(h *host, port uint32, data []byte) *reach {
	f := w.frames[number(data)]
	at := h.ports[port]
	w.must(f != nil && at != nil && bytes.Equal(f.data, data), "frame %d is not what was sent", number(data))
	r := f.to[at]
	w.must(r != nil, "frame %d of %s comes to %s, which it is not for", f.id, f.from, at)
	return r
}

func (w *world) enterTunnel(from, to *host, p softswitch.Frame) {
	f := w.frames[number(p.Data)]
	w.must(f != nil && bytes.Equal(f.data, p.Data), "frame %d is not what was sent", number(p.Data))
	w.must(from == f.from.node.host, "frame %d goes from %s to %s, and is not of there", f.id, from.name, to.name)
	color := uint64(f.from.network)*256 + uint64(f.epoch%256)
	if f.from.node.outside() {
		color = 0x800000 + uint64(f.from.network)*256
	}
	w.must(p.TunnelID == color, "frame %d of network %d and epoch %d has tunnel id %#x",
		f.id, f.from.network, f.epoch%256, p.TunnelID)
	wanted := false
	for at := range f.to {
		wanted = wanted || at.node.host == to
	}
	w.must(wanted, "frame %d goes to %s, where it is for nobody", f.id, to.name)
	w.must(!w.flown[flight{f.id, to}], "frame %d goes to %s twice", f.id, to.name)
	w.flown[flight{f.id, to}] = true
	if !f.from.node.outside() {
		w.gone[channel{from, to, f.from.network, f.epoch}]++
	}
	from.tunnels[to.id-1] = append(from.tunnels[to.id-1], packet{id: p.TunnelID, data: p.Data})
}

// arrive takes a frame out of a tunnel, or loses it.
func (w *world) arrive(from, to *host, i int, lose bool) {
	p := from.tunnels[to.id-1][i]
	from.tunnels[to.id-1] = slices.Delete(from.tunnels[to.id-1], i, i+1)
	f := w.frames[number(p.data)]
	if lose {
		w.lost++
		for at, r := range f.to {
			if at.node.host == to {
				r.lost = true
				w.open--
			}
		}
		return
	}
	if !f.from.node.outside() {
		w.come[channel{from, to, f.from.network, f.epoch}]++
	}
	err := to.of.Receive(softswitch.Frame{Port: uint32(100 + from.id), TunnelID: p.id, Data: p.data})
	w.must(err == nil, "host %s: %v", to.name, err)
}

// transmit has the switch take a frame that a guest sent.
func (w *world) transmit(from *iface) {
	f := from.tx[0]
	from.tx = from.tx[1:]
	f.epoch = from.node.epoch
	err := from.node.host.of.Receive(softswitch.Frame{Port: from.port, Data: f.data})
	w.must(err == nil, "host %s: %v", from.node.host.name, err)
	for at, r := range f.to {
		local := at.node.host == from.node.host
		w.must(local || w.flown[flight{f.id, at.node.host}], "frame %d for %s does not leave its host", f.id, at)
		w.must(!local || r.placed || r.raced || w.waits(r), "frame %d for %s on the same host is gone", f.id, at)
	}
}

// waits tells whether a frame is on its way to the gate.
func (w *world) waits(r *reach) bool {
	return slices.ContainsFunc(r.at.node.host.up, func(p punted) bool { return p.reach == r })
}

// ---- the controllers

// hear has the controller take a packet-in. It is what the agent does.
func (h *host) hear() {
	p := h.up[0]
	h.up = h.up[1:]
	_, m, err := openflow.Unmarshal(p.message)
	if err != nil {
		panic(err)
	}
	in, err := ReadPacket(m.(*openflow.PacketIn))
	if err != nil {
		panic(err)
	}
	data := m.(*openflow.PacketIn).Data
	r := h.w.reach(h, in.Port, data)
	n := r.at.node
	w := h.w
	w.must(!n.outside(), "frame %d to the outside is handed over", r.frame.id)
	w.must(in.Outside == r.frame.from.node.outside(), "packet-in of frame %d says %+v", r.frame.id, in)
	w.must(!in.Outside || in.Kind == KindClosed, "frame %d from outside is handed over by the %s entry", r.frame.id, in.Kind)
	if in.Outside {
		w.shut++
	}
	if in.Delivered() {
		h.copies[in.Port]++
	}
	h.w.must(in.Network == r.at.network && in.Tunneled == (r.frame.from.node.host != h), "packet-in of frame %d says %+v", r.frame.id, in)
	v, err := n.gate.Arrive(cut.Frame[arrival]{Epoch: in.Epoch, Size: len(data), Delivered: in.Delivered(), Outside: in.Outside, Ref: arrival{r, data}})
	if v.Record {
		h.w.record(r)
	}
	if v.Deliver {
		n.giveUp(arrival{r, data})
	}
	if err != nil {
		h.w.step(cut.Failed{Cut: h.w.coord.Cut(), Host: h.name, Node: n.name, Reason: err.Error()})
	}
}

func (w *world) record(r *reach) {
	r.recorded++
	w.recorded++
}

// giveUp gives a frame back to the switch, for delivery.
func (n *node) giveUp(a arrival) {
	n.host.tell(&openflow.PacketOut{
		Actions: []openflow.Action{openflow.Output{Port: a.reach.at.port}}, Data: a.data,
	}, order{reach: a.reach})
}

// counters reads a switch's counters and compares them with the truth.
func (h *host) counters() (Counters, map[uint32]uint64) {
	w := h.w
	b, err := openflow.Marshal(0, &openflow.FlowStatsRequest{Table: openflow.TableAll, Cookie: uint64(h.id) << 48, CookieMask: 0xffff << 48})
	if err != nil {
		panic(err)
	}
	b, err = h.of.Handle(b)
	w.must(err == nil, "the switch of %s refuses: %v", h.name, err)
	_, m, err := openflow.Unmarshal(b)
	if err != nil {
		panic(err)
	}
	stats := m.(*openflow.FlowStatsReply).Flows
	c := ReadCounters(stats)
	for n, epochs := range h.state.Counted {
		for _, e := range epochs {
			for _, p := range h.peers {
				for _, d := range []struct {
					what      string
					got, want uint64
				}{
					{"sent", c.Sent[Channel{p.id, n, e}], w.gone[w.channel(h, p, n, e)]},
					{"received", c.Received[Channel{p.id, n, e}], w.come[w.channel(p, h, n, e)]},
				} {
					w.must(len(h.down) > 0 || d.got == d.want, "host %s counts %d frames of network %d and epoch %d %s, with %s: there are %d",
						h.name, d.got, n, e, d.what, p.name, d.want)
				}
			}
		}
	}
	records, handed := map[uint32]uint64{}, h.handed
	for _, s := range stats {
		switch k := UnpackCookie(s.Cookie); k.Kind {
		case KindRecord:
			records[uint32(k.Port)] += s.Packets
		case KindHold, KindClosed:
			handed += s.Packets
		}
	}
	w.must(handed == h.seen, "host %s counts %d frames handed over to the controller, not %d", h.name, handed, h.seen)
	return c, records
}

// channel of an epoch modulo 256: the one that is near.
func (w *world) channel(from, to *host, network uint16, e cut.Epoch) channel {
	for _, n := range w.nodes {
		if n.key.Slice == otherSlice && slices.ContainsFunc(n.ifaces, func(f *iface) bool { return f.network == network }) {
			return channel{from, to, network, int(otherEpoch)}
		}
	}
	return channel{from, to, network, w.epoch + int(int8(e-cut.Epoch(w.epoch)))}
}

// ---- a node's cut

// carryOut makes a plan of steps. Each is what the agent does, in its parts.
func (n *node) carryOut(steps []cut.Step, to cut.Epoch) {
	h, w := n.host, n.w
	record := !n.abort
	n.plan = nil
	now := func() bool { return true }
	recolor := func(done func(), change func(*Color)) func() bool {
		return h.update(done, func(st *State) {
			c := st.Nodes[n.key]
			change(&c)
			st.Nodes[n.key] = c
		})
	}
	for _, s := range steps {
		first := true
		inForce := now
		add := func(ready func() bool, do func()) {
			begins := first
			first = false
			n.plan = append(n.plan, part{name: s.String(), ready: ready, do: func() {
				if begins && !n.abort {
					n.begun = s
				}
				do()
			}})
		}
		later := func() bool { return inForce() }
		switch s {
		case cut.StepClose:
			add(now, n.gate.Close)
			add(now, func() { inForce = recolor(nil, func(c *Color) { c.Closed = true }) })
			add(later, func() {})
		case cut.StepSettle:
			add(func() bool { return !slices.ContainsFunc(n.ifaces, func(f *iface) bool { return len(f.rx) > 0 }) }, func() {})
		case cut.StepStop:
			add(now, func() { n.running = false })
		case cut.StepFlush:
			add(func() bool { return !slices.ContainsFunc(n.ifaces, func(f *iface) bool { return len(f.tx) > 0 }) }, func() {})
		case cut.StepFlip:
			add(now, func() {
				for _, f := range n.ifaces {
					h.copies[f.port] = 0
				}
				target := w.epoch + int(int8(to-cut.Epoch(w.epoch)))
				inForce = recolor(func() { n.epoch = target }, func(c *Color) { c.Epoch, c.Recording = to, record })
			})
			add(later, func() { n.gate.Flip(to, record) })
		case cut.StepCapture:
			add(now, func() { n.captured = w.clock })
		case cut.StepResume:
			add(now, func() { n.running = true })
		case cut.StepOpen:
			add(now, func() {
				for _, r := range n.gate.Open() {
					w.held++
					if r.Record {
						w.record(r.Frame.Ref.reach)
					}
					n.giveUp(r.Frame.Ref)
				}
			})
			add(now, func() {
				inForce = recolor(n.opened, func(c *Color) {
					c.Closed = false
					c.Recording = c.Recording && record
				})
			})
			add(later, func() {})
			add(func() bool {
				return !slices.ContainsFunc(h.up, func(p punted) bool { return p.reach != nil && p.reach.at.node == n && p.reach.raced })
			}, func() {})
		}
	}
}

// opened notes what is between switch and gate at the moment the switch opens:
// the one thing that can be overtaken.
func (n *node) opened() {
	for _, p := range n.host.up {
		if p.reach != nil && p.reach.at.node == n {
			p.reach.raced = true
			n.w.raced++
		}
	}
	for _, o := range n.host.down {
		if o.reach != nil && o.reach.at.node == n {
			o.reach.raced = true
		}
	}
}

// goOn does the next part of a node's plan.
func (n *node) goOn() {
	p := n.plan[0]
	n.plan = n.plan[1:]
	p.do()
	if len(n.plan) > 0 || n.abort {
		return
	}
	n.w.step(cut.NodeCut{Cut: n.w.coord.Cut(), Node: n.name})
	n.w.step(cut.Stored{Cut: n.w.coord.Cut(), Node: n.name})
}

// ---- a host's orders

// obey takes one order of the coordinator's.
func (h *host) obey() {
	w := h.w
	e := h.orders[0]
	h.orders = h.orders[1:]
	then := func(name string, ready func() bool, do func()) {
		h.jobs = append(h.jobs, part{name, ready, do})
	}
	switch e := e.(type) {
	case cut.SendPrepare:
		then("prepared", h.count(e.From, e.To), func() { w.step(cut.Prepared{Cut: e.Cut, Host: h.name}) })
	case cut.SendCut:
		for n := range h.members() {
			n.carryOut(cut.Steps(), e.To)
		}
	case cut.SendPoll:
		c, records := h.counters()
		then("counters", func() bool { return true }, func() {
			w.step(cut.Counters{Cut: e.Cut, Host: h.name, Round: e.Round, Counts: h.report(c, records, e.Epoch)})
		})
	case cut.SendCollect:
		ready := h.update(nil, func(st *State) {
			for n := range h.members() {
				n.gate.StopRecording()
				c := st.Nodes[n.key]
				c.Recording = false
				st.Nodes[n.key] = c
			}
		})
		then("collected", ready, func() { w.step(cut.Collected{Cut: e.Cut, Host: h.name}) })
	case cut.SendCommit:
		then("committed", h.count(w.coord.Epoch().Next()), func() { w.step(cut.Committed{Cut: e.Cut, Host: h.name}) })
	case cut.SendAbort:
		h.jobs = nil
		for n := range h.members() {
			n.abort = true
			n.plan = nil
			n.captured = 0
			n.gate.StopRecording()
			if e.To != w.coord.Epoch() {
				n.carryOut(cut.AbortSteps(n.begun), e.To)
			}
		}
		var ready func() bool
		then("counts", func() bool {
			for n := range h.members() {
				if len(n.plan) > 0 {
					return false
				}
			}
			return true
		}, func() { ready = h.count(e.To) })
		then("aborted", func() bool { return ready() }, func() { w.step(cut.Aborted{Cut: e.Cut, Host: h.name}) })
	}
}

// members are the host's nodes that are of the slice.
func (h *host) members() map[*node]bool {
	ns := map[*node]bool{}
	for _, n := range h.w.nodes {
		if n.host == h && n.key.Slice == cutSlice {
			ns[n] = true
		}
	}
	return ns
}

// count says of which epochs the slice's frames are counted.
func (h *host) count(epochs ...cut.Epoch) (inForce func() bool) {
	return h.update(nil, func(st *State) {
		for n := range h.members() {
			for _, f := range n.ifaces {
				st.Counted[f.network] = epochs
			}
		}
	})
}

// report is what a host says of the epoch. The copies that have come are counted
// later than those that were made: the worse order.
func (h *host) report(c Counters, records map[uint32]uint64, epoch cut.Epoch) []cut.ChannelCount {
	var counts []cut.ChannelCount
	add := func(from, to *host, network uint16, sent, received uint64) {
		counts = append(counts, cut.ChannelCount{
			Channel: cut.Channel{From: from.name, To: to.name, Network: fmt.Sprint(network)}, Sent: sent, Received: received,
		})
	}
	for ch, sent := range c.Sent {
		if ch.Epoch == epoch {
			add(h, h.w.hosts[ch.Peer-1], ch.Network, sent, 0)
		}
	}
	for ch, received := range c.Received {
		if ch.Epoch == epoch {
			add(h.w.hosts[ch.Peer-1], h, ch.Network, 0, received)
		}
	}
	for n := range h.members() {
		for _, f := range n.ifaces {
			add(h, h, f.network, records[f.port], h.copies[f.port])
		}
	}
	return counts
}

// step gives an event to the coordinator and carries its effects out.
func (w *world) step(ev cut.Event) {
	effects, err := w.coord.Step(w.now, ev)
	w.must(err == nil, "the coordinator refuses: %v", err)
	send := func(name string, e cut.Effect) {
		h := w.hosts[name[0]-'A']
		h.orders = append(h.orders, e)
	}
	for _, e := range effects {
		switch e := e.(type) {
		case cut.SendPrepare:
			send(e.Host, e)
		case cut.SendCut:
			send(e.Host, e)
		case cut.SendPoll:
			send(e.Host, e)
		case cut.SendCollect:
			send(e.Host, e)
		case cut.SendCommit:
			send(e.Host, e)
		case cut.SendAbort:
			send(e.Host, e)
		case cut.Seal:
			w.seal = &e
		case cut.Done:
			w.done(e)
		}
	}
}

// ---- what must hold

// check judges a snapshot at the moment it becomes visible.
func (w *world) check(s cut.Seal) {
	for _, n := range w.nodes {
		w.must(n.captured > 0 || n.key.Slice != cutSlice, "the snapshot lacks %s", n.name)
	}
	for _, f := range w.frames {
		from := f.from.node
		for at, r := range f.to {
			if from.key.Slice == otherSlice {
				w.must(r.recorded == 0, "frame %d is of another slice, and recorded", f.id)
				continue
			}
			if from.outside() || at.node.outside() {
				w.must(r.recorded == 0, "frame %d from %s to %s is recorded, and one of them is outside", f.id, f.from, at)
				continue
			}
			sent := f.sent < from.captured
			received := r.read > 0 && r.read < at.node.captured
			w.must(!received || sent, "frame %d is received in the snapshot of %s but not sent in that of %s", f.id, at, from.name)
			w.must(r.recorded <= 1, "frame %d is in the channel state of %s %d times", f.id, at, r.recorded)
			w.must(r.recorded == 0 || sent, "frame %d is in the channel state of %s but not sent in the snapshot of %s", f.id, at, from.name)
			w.must(r.recorded == 0 || !received, "frame %d is in the channel state and received in the snapshot of %s too", f.id, at)
			w.must(!sent || received || r.recorded == 1 || r.lost, "frame %d was in flight to %s at the cut and is in no channel state", f.id, at)
		}
	}
	reported := map[cut.Channel]uint64{}
	for _, l := range s.Lost {
		reported[l.Channel] = l.Frames
	}
	for ch, sent := range w.gone {
		name := cut.Channel{From: ch.from.name, To: ch.to.name, Network: fmt.Sprint(ch.network)}
		if lost := sent - w.come[ch]; ch.epoch == w.epoch && lost > 0 {
			w.must(reported[name] == lost, "%d frames are reported lost from %s to %s, %d are", reported[name], name.From, name.To, lost)
			delete(reported, name)
		}
	}
	w.must(len(reported) == 0, "frames are reported lost that are not: %v", reported)
	w.sealed++
}

// done ends a cut, and forgets the frames that have come where they should.
func (w *world) done(d cut.Done) {
	if d.Outcome == cut.OutcomeAborted {
		w.aborted++
		w.must(w.trouble, "cut %s was aborted: %s", d.Cut, d.Reason)
	}
	w.epoch += int(int8(d.Epoch - cut.Epoch(w.epoch)))
	for _, n := range w.nodes {
		if n.key.Slice == cutSlice {
			w.must(n.epoch == w.epoch, "%s is in epoch %d after a cut, the slice in %d", n.name, n.epoch, w.epoch)
		}
	}
	maps.DeleteFunc(w.frames, func(_ uint64, f *frame) bool {
		for _, r := range f.to {
			if r.read == 0 && !r.lost {
				return false
			}
		}
		return f.epoch >= 0 && !w.underWay(f)
	})
	maps.DeleteFunc(w.flown, func(at flight, _ bool) bool { return w.frames[at.frame] == nil })
	for _, m := range []map[channel]uint64{w.gone, w.come} {
		maps.DeleteFunc(m, func(ch channel, _ uint64) bool { return ch.epoch < w.epoch-2 && ch.epoch != int(otherEpoch) })
	}
}

// underWay tells whether a frame, or a copy of it, is in a queue.
func (w *world) underWay(f *frame) bool {
	for _, h := range w.hosts {
		for _, q := range h.tunnels {
			if slices.ContainsFunc(q, func(p packet) bool { return number(p.data) == f.id }) {
				return true
			}
		}
		if slices.ContainsFunc(h.up, func(p punted) bool { return p.frame == f.id }) {
			return true
		}
	}
	return false
}

// checkEnd judges a world in which nothing happens any more.
func (w *world) checkEnd() {
	w.must(w.coord.Phase() == cut.PhaseIdle, "the cut does not end: it is in its %s phase and waits for %v", w.coord.Phase(), w.coord.Waiting())
	for _, n := range w.nodes {
		if n.outside() {
			w.must(n.gate.Stats() == cut.GateStats{}, "frames to the outside were at a gate: %+v", n.gate.Stats())
			continue
		}
		c := n.host.state.Nodes[n.key]
		w.must(n.running && n.gate.Held() == 0 && !c.Closed && !c.Recording, "%s runs: %t; its gate holds %d frames; its switch: %+v",
			n.name, n.running, n.gate.Held(), c)
		if n.key.Slice == otherSlice {
			w.must(n.gate.Stats() == cut.GateStats{} && c.Epoch == otherEpoch, "%s of another slice had frames at its gate: %+v", n.name, n.gate.Stats())
		}
	}
	for _, f := range w.frames {
		for at, r := range f.to {
			w.must(r.read > 0 || r.lost, "frame %d never arrived at %s, and the network did not lose it", f.id, at)
		}
	}
	for _, h := range w.hosts {
		h.counters()
	}
}

// ---- what can happen

type op uint8

const (
	opSend op = iota
	opTransmit
	opArrive
	opRead
	opHear
	opListen
	opStep
	opObey
	opJob
	opSeal
	opTick
	opTrouble
	ops
)

var opNames = [ops]string{"send", "transmit", "arrive", "read", "hear", "listen", "step", "obey", "job", "seal", "tick", "trouble"}

// choices lists of which host, interface or node each thing can happen next.
func (w *world) choices(sending bool) (c [ops][]int) {
	cutting := w.coord.Phase() != cut.PhaseIdle
	for i, f := range w.ifaces {
		if sending && f.node.running && w.open < w.sends && len(f.tx) < 8 { // a frame may be for nobody
			c[opSend] = append(c[opSend], i)
		}
		if len(f.tx) > 0 {
			c[opTransmit] = append(c[opTransmit], i)
		}
		if f.node.running && len(f.rx) > 0 {
			c[opRead] = append(c[opRead], i)
		}
	}
	for i, n := range w.nodes {
		if len(n.plan) > 0 && n.plan[0].ready() {
			c[opStep] = append(c[opStep], i)
		}
	}
	for i, h := range w.hosts {
		for j, q := range h.tunnels {
			if len(q) > 0 {
				c[opArrive] = append(c[opArrive], i*len(w.hosts)+j)
			}
		}
		if len(h.up) > 0 {
			c[opHear] = append(c[opHear], i)
		}
		if len(h.down) > 0 {
			c[opListen] = append(c[opListen], i)
		}
		if len(h.orders) > 0 {
			c[opObey] = append(c[opObey], i)
		}
		if len(h.jobs) > 0 && h.jobs[0].ready() {
			c[opJob] = append(c[opJob], i)
		}
	}
	if w.seal != nil {
		c[opSeal] = []int{0}
	}
	if w.canTick() {
		c[opTick] = []int{0}
	}
	if w.trouble && cutting && w.rnd.IntN(1500) == 0 {
		c[opTrouble] = []int{0}
	}
	return c
}

// canTick tells whether time may pass: only if nothing has been under way for
// as long as anything can be.
func (w *world) canTick() bool {
	if d, ok := w.coord.Deadline(); !ok || d > w.now+timing.Quiet {
		return false
	}
	for _, f := range w.ifaces {
		if slices.ContainsFunc(f.tx, func(f *frame) bool { return f.aged }) {
			return false
		}
	}
	for _, h := range w.hosts {
		if slices.ContainsFunc(h.up, func(p punted) bool { return p.aged }) {
			return false
		}
		for _, q := range h.tunnels {
			if slices.ContainsFunc(q, func(p packet) bool { return p.aged }) {
				return false
			}
		}
	}
	return true
}

func (w *world) tick() {
	w.now++
	for _, f := range w.ifaces {
		for _, x := range f.tx {
			x.aged = true
		}
	}
	for _, h := range w.hosts {
		for i := range h.up {
			h.up[i].aged = true
		}
		for _, q := range h.tunnels {
			for i := range q {
				q[i].aged = true
			}
		}
	}
	w.step(cut.Tick{})
}

// act does one thing that can happen. It returns false if there is none.
func (w *world) act(sending bool) bool {
	w.clock++
	c := w.choices(sending)
	var can []op
	for o := range ops {
		if len(c[o]) > 0 {
			can = append(can, o)
		}
	}
	if len(can) == 0 {
		return false
	}
	for {
		o := can[w.rnd.IntN(len(can))]
		i := c[o][w.rnd.IntN(len(c[o]))]
		if w.rnd.Float64() >= w.slow[o][i] {
			w.do(o, i)
			return true
		}
	}
}

// pace makes some things slow. Were all alike, no node would ever be a whole cut
// ahead of another, and no frame would reach an open gate that is behind.
func (w *world) pace() {
	for o := range ops {
		w.slow[o] = make([]float64, max(len(w.ifaces), len(w.hosts)*len(w.hosts)))
		for i := range w.slow[o] {
			if w.rnd.IntN(3) == 0 {
				w.slow[o][i] = 0.97
			}
		}
	}
}

func (w *world) do(o op, i int) {
	note := func(format string, args ...any) {
		if w.telling {
			w.path = append(w.path, fmt.Sprintf("%s ", opNames[o])+fmt.Sprintf(format, args...))
		}
	}
	switch o {
	case opSend:
		k := kinds[w.rnd.IntN(len(kinds))]
		if w.send(w.ifaces[i], k) {
			note("%d: %s from %s, network %d", w.clock, k.name, w.ifaces[i], w.ifaces[i].network)
		}
	case opTransmit:
		note("%d of %s", w.ifaces[i].tx[0].id, w.ifaces[i])
		w.transmit(w.ifaces[i])
	case opArrive:
		from, to := w.hosts[i/len(w.hosts)], w.hosts[i%len(w.hosts)]
		q := from.tunnels[to.id-1]
		which, lose := 0, false
		if w.reorder {
			which, lose = w.rnd.IntN(len(q)), w.rnd.IntN(10) == 0
		}
		note("%d from %s at %s, lost: %t", number(q[which].data), from.name, to.name, lose)
		w.arrive(from, to, which, lose)
	case opRead:
		f := w.ifaces[i]
		r := f.rx[0]
		f.rx = f.rx[1:]
		r.read = w.clock
		w.open--
		note("%d at %s", r.frame.id, f)
		w.route(r)
	case opHear:
		note("at %s", w.hosts[i].name)
		w.hosts[i].hear()
	case opListen:
		note("at %s", w.hosts[i].name)
		w.hosts[i].listen()
	case opStep:
		note("%s: %s", w.nodes[i].name, w.nodes[i].plan[0].name)
		w.nodes[i].goOn()
	case opObey:
		note("%s: %T", w.hosts[i].name, w.hosts[i].orders[0])
		w.hosts[i].obey()
	case opJob:
		h := w.hosts[i]
		j := h.jobs[0]
		h.jobs = h.jobs[1:]
		note("%s: %s", h.name, j.name)
		j.do()
	case opSeal:
		note("")
		s := *w.seal
		w.seal = nil
		if w.trouble && w.rnd.IntN(8) == 0 {
			w.step(cut.SealFailed{Cut: s.Cut, Reason: "it broke"})
			return
		}
		w.check(s)
		w.step(cut.Sealed{Cut: s.Cut})
	case opTick:
		note("")
		w.tick()
	case opTrouble:
		note("")
		n := w.nodes[w.rnd.IntN(len(w.nodes))]
		if n.key.Slice == cutSlice && len(n.plan) > 0 && !n.abort {
			n.plan = nil // until the abort is ordered
			w.step(cut.Failed{Cut: w.coord.Cut(), Host: n.host.name, Node: n.name, Reason: "it broke"})
		} else {
			w.step(cut.Cancel{Cut: w.coord.Cut(), Reason: "changed my mind"})
		}
	}
}

// route sends a frame on, out of another interface of the node that has read it.
func (w *world) route(r *reach) {
	if !bytes.Equal(r.frame.data[12:14], routed) {
		return
	}
	for _, f := range r.at.node.ifaces {
		if f.network != r.at.network {
			w.send(f, kinds[0])
			return
		}
	}
}

// run is some cuts with traffic all the time.
func (w *world) run() (bad violation) {
	defer func() {
		switch p := recover().(type) {
		case nil:
		case violation:
			bad = p
		default:
			panic(fmt.Sprintf("%v\n%s", p, strings.Join(w.path, "\n  ")))
		}
	}()
	for range w.cuts {
		w.pace()
		for range w.rnd.IntN(100) {
			w.act(true)
		}
		w.begun++
		for _, n := range w.nodes {
			n.begun, n.abort, n.captured = 0, false, 0
		}
		for _, f := range w.frames {
			for _, r := range f.to {
				r.recorded = 0
			}
		}
		w.step(cut.Begin{Cut: fmt.Sprintf("cut-%d", w.begun)})
		for w.coord.Phase() != cut.PhaseIdle {
			w.must(w.act(true), "cut %d stands still in its %s phase", w.begun, w.coord.Phase())
		}
	}
	for w.act(false) {
	}
	w.checkEnd()
	return ""
}

// story tells how a violation came about: the end of it.
func story(r rules, seed uint64) string {
	r.telling = true
	w := newWorld(r, seed)
	w.run()
	return strings.Join(w.path[max(0, len(w.path)-200):], "\n  ")
}
