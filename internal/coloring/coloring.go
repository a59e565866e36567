package coloring

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"maps"
	"net"
	"reflect"
	"slices"

	"violin/internal/cut"
	"violin/internal/openflow"
)

// The tables of the pipeline. The gaps are for what may come between.
const (
	TableClassify uint8 = 0
	TableForward  uint8 = 10
	TableGate     uint8 = 20
	TableTunnel   uint8 = 30
)

// The registers of the pipeline; see the package documentation.
const (
	regNetwork  = 0
	regEpoch    = 1
	regPort     = 2
	regPeer     = 3
	regTunneled = 4
	regOutside  = 5
)

// The priorities within a table: a more special entry wins.
const (
	prioBase    = 100 // any epoch
	prioExact   = 200 // one epoch
	prioOutside = 250 // no epoch: from outside
	prioClosed  = 300 // a closed gate, whatever the epoch
	prioSelf    = 400 // a frame never returns to the port it came from
)

// MaxNetwork is the highest number of a network: the bit above it marks frames
// from outside in the tunnel id.
const MaxNetwork = 1<<15 - 1

// Port is one interface of a node on this switch, or a gateway to the outside.
type Port struct {
	Number    uint32 // OpenFlow port number, 1..65279
	Slice     string
	Node      string
	Interface int // index among the node's interfaces
	Network   uint16
	Address   net.HardwareAddr
	// Outside says that what is plugged in is no node but a way out of the slice.
	// It has no epoch: its frames have no colour, and it is given every frame.
	Outside bool
}

// Peer is another host, reached through a tunnel port of this switch.
type Peer struct {
	ID   uint16 // number of the peer, the same on every host; never 0
	Host string
	Port uint32 // OpenFlow number of the tunnel port towards it
}

// Remote is an interface of a node, or a gateway to the outside, on a peer.
type Remote struct {
	Network uint16
	Address net.HardwareAddr
	Peer    uint16
	Outside bool
}

// Switch is what is plugged into one host's switch and what lies beyond it.
type Switch struct {
	Ports   []Port
	Peers   []Peer
	Remotes []Remote
}

// Color is what a node's gates and stamps look like now.
type Color struct {
	Epoch     cut.Epoch
	Closed    bool // every frame to the node goes to the controller and waits there
	Recording bool // a copy of every older frame goes to the controller
}

// State is the changing half of a switch: its nodes' colours, and the epochs
// whose frames are counted on each network's channels.
type State struct {
	Nodes   map[NodeKey]Color
	Counted map[uint16][]cut.Epoch // by network
}

// NodeKey names a node of a slice.
type NodeKey struct{ Slice, Node string }

// Clone returns a copy that shares nothing with s.
func (s State) Clone() State {
	c := State{Nodes: make(map[NodeKey]Color, len(s.Nodes)), Counted: make(map[uint16][]cut.Epoch, len(s.Counted))}
	for k, v := range s.Nodes {
		c.Nodes[k] = v
	}
	for k, v := range s.Counted {
		c.Counted[k] = slices.Clone(v)
	}
	return c
}

// TunnelID is the VXLAN network identifier of a frame of the network sent in the epoch.
func TunnelID(network uint16, epoch cut.Epoch) uint64 {
	return uint64(network)<<8 | uint64(epoch)
}

// OutsideTunnelID is the VXLAN network identifier of a frame of the network that
// came from outside and has no epoch.
func OutsideTunnelID(network uint16) uint64 {
	return 1<<23 | uint64(network)<<8
}

// FlowSet is the flow entries a switch should hold, by table, priority and match.
type FlowSet map[string]openflow.FlowMod

func (fs FlowSet) add(f openflow.FlowMod) {
	f.Command = openflow.FlowAdd
	fs[key(f.Table, f.Priority, f.Match)] = f
}

// key identifies an entry as a switch does: by table, priority and match. The
// order of the fields in a match carries no meaning. It is made many times
// within a vCPU pause, so it is bytes and not text.
func key(table uint8, priority uint16, match openflow.Match) string {
	fields := slices.Clone(match)
	slices.SortFunc(fields, func(a, b openflow.Field) int { return cmp.Compare(a.ID(), b.ID()) })
	b := binary.BigEndian.AppendUint16([]byte{table}, ^priority)
	for _, f := range fields {
		b = binary.BigEndian.AppendUint64(b, uint64(f.ID())) // which tells the value's length
		b = append(b, f.Value()...)
		b = append(append(b, byte(len(f.Mask()))), f.Mask()...)
	}
	return string(b)
}

// Sorted returns the entries by table, then falling priority, then match.
func (fs FlowSet) Sorted() []openflow.FlowMod {
	out := make([]openflow.FlowMod, 0, len(fs))
	for _, k := range slices.Sorted(maps.Keys(fs)) {
		out = append(out, fs[k])
	}
	return out
}

// Flows returns everything the switch should hold. It is a function of its
// arguments alone. run marks the entries' cookies (see [Cookie]).
func Flows(run uint16, sw Switch, st State) (FlowSet, error) {
	fs := FlowSet{}
	b := builder{run: run, sw: sw, st: st, fs: fs}
	if err := b.check(); err != nil {
		return nil, err
	}
	for _, p := range sw.Ports {
		if p.Outside {
			b.outside(p)
			continue
		}
		b.stamp(p)
		b.gate(p)
	}
	for _, p := range sw.Peers {
		b.tunnel(p)
	}
	b.forward()
	return fs, nil
}

type builder struct {
	run uint16
	sw  Switch
	st  State
	fs  FlowSet
}

func (b *builder) check() error {
	numbers := map[uint32]string{}
	use := func(n uint32, who string) error {
		if n == 0 || n > 0xfeff {
			return fmt.Errorf("coloring: %s: port number %d is outside 1..65279", who, n)
		}
		if other, ok := numbers[n]; ok {
			return fmt.Errorf("coloring: port number %d is given to %s and to %s", n, other, who)
		}
		numbers[n] = who
		return nil
	}
	// Of two interfaces with one address on one network, one would have no entry.
	addresses := map[string]string{}
	address := func(network uint16, a net.HardwareAddr, who string) error {
		if len(a) != 6 {
			return fmt.Errorf("coloring: %s: %q is not an Ethernet address", who, a)
		}
		k := fmt.Sprintf("%s on network %d", a, network)
		if other, ok := addresses[k]; ok {
			return fmt.Errorf("coloring: address %s is given to %s and to %s", k, other, who)
		}
		addresses[k] = who
		return nil
	}
	for _, p := range b.sw.Ports {
		who := fmt.Sprintf("%s/%s interface %d", p.Slice, p.Node, p.Interface)
		if p.Outside {
			who = fmt.Sprintf("gateway of %s network %d", p.Slice, p.Network)
		}
		if err := use(p.Number, who); err != nil {
			return err
		}
		if p.Network == 0 || p.Network > MaxNetwork {
			return fmt.Errorf("coloring: %s: network %d is outside 1..%d", who, p.Network, MaxNetwork)
		}
		if _, ok := b.st.Nodes[NodeKey{p.Slice, p.Node}]; !ok && !p.Outside {
			return fmt.Errorf("coloring: %s: its node has no colour", who)
		}
		if err := address(p.Network, p.Address, who); err != nil {
			return err
		}
	}
	for _, r := range b.sw.Remotes {
		if err := address(r.Network, r.Address, fmt.Sprintf("an interface on peer %d", r.Peer)); err != nil {
			return err
		}
	}
	peers := map[uint16]string{}
	for _, p := range b.sw.Peers {
		if p.ID == 0 {
			return fmt.Errorf("coloring: peer %s: number 0 means no peer", p.Host)
		}
		if other, ok := peers[p.ID]; ok {
			return fmt.Errorf("coloring: peer number %d is given to %s and to %s", p.ID, other, p.Host)
		}
		peers[p.ID] = p.Host
		if err := use(p.Port, "tunnel to "+p.Host); err != nil {
			return err
		}
	}
	return nil
}

// stamp gives the frames that leave a node its network and epoch. The epoch
// flips by replacing this one entry.
func (b *builder) stamp(p Port) {
	c := b.st.Nodes[NodeKey{p.Slice, p.Node}]
	b.fs.add(openflow.FlowMod{
		Table: TableClassify, Priority: prioBase,
		Cookie: Cookie{Run: b.run, Kind: KindStamp, Epoch: c.Epoch, Port: uint16(p.Number), Network: p.Network}.Pack(),
		Match:  openflow.Match{openflow.InPort(p.Number)},
		Instructions: apply(
			load(regNetwork, uint32(p.Network)),
			load(regEpoch, uint32(c.Epoch)),
			openflow.Resubmit{Table: TableForward},
		),
	})
}

// outside is a port that is no node. Frames from it have a network and no epoch:
// no cut divides what is outside into before and after, so no frame from there
// can be older or newer than its receiver. Frames to it leave the slice; there
// is nothing to hold them for, and no memory that a record would complete.
func (b *builder) outside(p Port) {
	cookie := func(k Kind) uint64 {
		return Cookie{Run: b.run, Kind: k, Port: uint16(p.Number), Network: p.Network}.Pack()
	}
	to := openflow.Reg(regPort, p.Number)
	b.fs.add(openflow.FlowMod{
		Table: TableClassify, Priority: prioBase, Cookie: cookie(KindStamp),
		Match: openflow.Match{openflow.InPort(p.Number)},
		Instructions: apply(
			load(regNetwork, uint32(p.Network)), load(regOutside, 1),
			openflow.Resubmit{Table: TableForward},
		),
	})
	b.fs.add(openflow.FlowMod{
		Table: TableGate, Priority: prioSelf, Cookie: cookie(KindSelf),
		Match: openflow.Match{openflow.InPort(p.Number), to},
	})
	b.fs.add(openflow.FlowMod{
		Table: TableGate, Priority: prioBase, Cookie: cookie(KindOutside),
		Match: openflow.Match{to}, Instructions: apply(openflow.Output{Port: p.Number}),
	})
}

// gate decides, for one receiving port, what becomes of a frame by the
// difference between its epoch and the receiver's. What no entry knows (a newer
// epoch, above all) is held: it goes to the controller and nowhere else.
func (b *builder) gate(p Port) {
	c := b.st.Nodes[NodeKey{p.Slice, p.Node}]
	to := openflow.Reg(regPort, p.Number)
	cookie := func(k Kind, e cut.Epoch) uint64 {
		return Cookie{Run: b.run, Kind: k, Epoch: e, Port: uint16(p.Number), Network: p.Network}.Pack()
	}
	deliver := openflow.Output{Port: p.Number}
	controller := openflow.Output{Port: openflow.PortController, MaxLen: openflow.ControllerNoBuffer}

	b.fs.add(openflow.FlowMod{
		Table: TableGate, Priority: prioSelf, Cookie: cookie(KindSelf, 0),
		Match: openflow.Match{openflow.InPort(p.Number), to},
	})
	if c.Closed {
		b.fs.add(openflow.FlowMod{
			Table: TableGate, Priority: prioClosed, Cookie: cookie(KindClosed, 0),
			// Its count is needed when it is gone: did all it handed over arrive? For
			// the same reason it is the same in every epoch: the flip comes while the
			// gate is closed, and of an entry that is replaced nobody is told.
			Flags: openflow.FlagSendFlowRemoved,
			Match: openflow.Match{to}, Instructions: apply(controller),
		})
	}
	if b.hasOutside(p.Network) {
		b.fs.add(openflow.FlowMod{
			Table: TableGate, Priority: prioOutside, Cookie: cookie(KindOutside, 0),
			Match: openflow.Match{to, openflow.Reg(regOutside, 1)}, Instructions: apply(deliver),
		})
	}
	b.fs.add(openflow.FlowMod{
		Table: TableGate, Priority: prioExact, Cookie: cookie(KindDeliver, c.Epoch),
		Match: openflow.Match{to, openflow.Reg(regEpoch, uint32(c.Epoch))}, Instructions: apply(deliver),
	})
	older := openflow.FlowMod{
		Table: TableGate, Priority: prioExact, Cookie: cookie(KindOlder, c.Epoch-1),
		Match: openflow.Match{to, openflow.Reg(regEpoch, uint32(c.Epoch-1))}, Instructions: apply(deliver),
	}
	if c.Recording {
		// The entry takes the place of the one that delivered this epoch as the
		// node's own; its counter is of the copies alone.
		older.Flags = openflow.FlagResetCounts
		older.Cookie = cookie(KindRecord, c.Epoch-1)
		older.Instructions = apply(deliver, controller)
	}
	b.fs.add(older)
	b.fs.add(openflow.FlowMod{
		Table: TableGate, Priority: prioBase, Cookie: cookie(KindHold, 0),
		Flags: openflow.FlagSendFlowRemoved,
		Match: openflow.Match{to}, Instructions: apply(controller),
	})
}

// tunnel carries network and epoch in the tunnel id, both ways. The entries of
// the counted epochs do what the catch-all does; they are there for their
// packet counters, which are Mattern's message counters of the channel.
func (b *builder) tunnel(p Peer) {
	cookie := func(k Kind, n uint16, e cut.Epoch) uint64 {
		return Cookie{Run: b.run, Kind: k, Epoch: e, Port: p.ID, Network: n}.Pack()
	}
	for _, n := range b.networks() {
		for _, e := range b.st.Counted[n] {
			b.fs.add(openflow.FlowMod{
				Table: TableClassify, Priority: prioExact, Cookie: cookie(KindReceived, n, e),
				Match: openflow.Match{openflow.InPort(p.Port), openflow.TunnelID(TunnelID(n, e))},
				Instructions: apply(
					load(regNetwork, uint32(n)), load(regEpoch, uint32(e)), load(regTunneled, 1),
					openflow.Resubmit{Table: TableForward},
				),
			})
			b.fs.add(openflow.FlowMod{
				Table: TableTunnel, Priority: prioExact, Cookie: cookie(KindSent, n, e),
				Match: openflow.Match{
					openflow.Reg(regPeer, uint32(p.ID)),
					openflow.Reg(regNetwork, uint32(n)), openflow.Reg(regEpoch, uint32(e)),
				},
				Instructions: apply(
					openflow.SetField{Field: openflow.TunnelID(TunnelID(n, e))},
					openflow.Output{Port: p.Port},
				),
			})
		}
	}
	b.tunnelOutside(p)
	b.fs.add(openflow.FlowMod{
		Table: TableClassify, Priority: prioBase, Cookie: cookie(KindTunnelIn, 0, 0),
		Match: openflow.Match{openflow.InPort(p.Port)},
		Instructions: apply(
			openflow.CopyField{Src: openflow.FieldTunnelID, SrcOffset: 8, Dst: openflow.FieldReg(regNetwork), Bits: 16},
			openflow.CopyField{Src: openflow.FieldTunnelID, Dst: openflow.FieldReg(regEpoch), Bits: 8},
			load(regTunneled, 1),
			openflow.Resubmit{Table: TableForward},
		),
	})
	b.fs.add(openflow.FlowMod{
		Table: TableTunnel, Priority: prioBase, Cookie: cookie(KindTunnelOut, 0, 0),
		Match: openflow.Match{openflow.Reg(regPeer, uint32(p.ID))},
		Instructions: apply(
			openflow.SetField{Field: openflow.TunnelID(0)},
			openflow.CopyField{Src: openflow.FieldReg(regNetwork), Dst: openflow.FieldTunnelID, DstOffset: 8, Bits: 16},
			openflow.CopyField{Src: openflow.FieldReg(regEpoch), Dst: openflow.FieldTunnelID, Bits: 8},
			openflow.Output{Port: p.Port},
		),
	})
}

// tunnelOutside carries frames from outside by a tunnel id of their own, past the
// entries that count: a message counter is of one epoch, and they have none.
func (b *builder) tunnelOutside(p Peer) {
	for _, n := range b.networks() {
		for _, g := range b.sw.Ports {
			if !g.Outside || g.Network != n {
				continue
			}
			b.fs.add(openflow.FlowMod{
				Table: TableTunnel, Priority: prioOutside,
				Cookie: Cookie{Run: b.run, Kind: KindOutsideOut, Port: p.ID, Network: n}.Pack(),
				Match: openflow.Match{
					openflow.Reg(regPeer, uint32(p.ID)), openflow.Reg(regNetwork, uint32(n)), openflow.Reg(regOutside, 1),
				},
				Instructions: apply(
					openflow.SetField{Field: openflow.TunnelID(OutsideTunnelID(n))},
					openflow.Output{Port: p.Port},
				),
			})
		}
		for _, r := range b.sw.Remotes {
			if !r.Outside || r.Network != n || r.Peer != p.ID {
				continue
			}
			b.fs.add(openflow.FlowMod{
				Table: TableClassify, Priority: prioOutside,
				Cookie: Cookie{Run: b.run, Kind: KindOutsideIn, Port: p.ID, Network: n}.Pack(),
				Match:  openflow.Match{openflow.InPort(p.Port), openflow.TunnelID(OutsideTunnelID(n))},
				Instructions: apply(
					load(regNetwork, uint32(n)), load(regOutside, 1), load(regTunneled, 1),
					openflow.Resubmit{Table: TableForward},
				),
			})
		}
	}
}

// hasOutside tells whether the network has a gateway to the outside, here or elsewhere.
func (b *builder) hasOutside(network uint16) bool {
	return slices.ContainsFunc(b.sw.Ports, func(p Port) bool { return p.Outside && p.Network == network }) ||
		slices.ContainsFunc(b.sw.Remotes, func(r Remote) bool { return r.Outside && r.Network == network })
}

// forward knows every interface of the slices' topologies: no learning, so no
// frame depends on one before it. An address that no interface was given (a
// bridge or a container inside a guest) goes to all of the network, like a broadcast.
func (b *builder) forward() {
	for _, n := range b.networks() {
		network := openflow.Reg(regNetwork, uint32(n))
		local := openflow.Reg(regTunneled, 0)
		var flood, floodLocal []openflow.Action
		for _, p := range b.portsOf(n) {
			toPort := []openflow.Action{load(regPort, p.Number), openflow.Resubmit{Table: TableGate}}
			floodLocal = append(floodLocal, toPort...)
			b.fs.add(openflow.FlowMod{
				Table: TableForward, Priority: prioExact,
				Cookie:       Cookie{Run: b.run, Kind: KindForward, Port: uint16(p.Number), Network: n}.Pack(),
				Match:        openflow.Match{network, openflow.EthDst(p.Address)},
				Instructions: apply(toPort...),
			})
		}
		peers := map[uint16]bool{}
		for _, r := range b.sw.Remotes {
			if r.Network != n {
				continue
			}
			peers[r.Peer] = true
			b.fs.add(openflow.FlowMod{
				Table: TableForward, Priority: prioExact,
				Cookie: Cookie{Run: b.run, Kind: KindForward, Port: r.Peer, Network: n}.Pack(),
				Match:  openflow.Match{network, local, openflow.EthDst(r.Address)},
				Instructions: apply(
					load(regPeer, uint32(r.Peer)), openflow.Resubmit{Table: TableTunnel},
				),
			})
		}
		flood = slices.Clone(floodLocal)
		for _, p := range b.sw.Peers {
			if peers[p.ID] {
				flood = append(flood, load(regPeer, uint32(p.ID)), openflow.Resubmit{Table: TableTunnel})
			}
		}
		cookie := Cookie{Run: b.run, Kind: KindFlood, Network: n}.Pack()
		b.fs.add(openflow.FlowMod{
			Table: TableForward, Priority: prioBase, Cookie: cookie,
			Match: openflow.Match{network, local}, Instructions: apply(flood...),
		})
		b.fs.add(openflow.FlowMod{
			Table: TableForward, Priority: prioBase, Cookie: cookie,
			Match: openflow.Match{network, openflow.Reg(regTunneled, 1)}, Instructions: apply(floodLocal...),
		})
	}
}

// networks returns the networks that have an interface on this switch, in order.
func (b *builder) networks() []uint16 {
	var ns []uint16
	for _, p := range b.sw.Ports {
		ns = append(ns, p.Network)
	}
	slices.Sort(ns)
	return slices.Compact(ns)
}

func (b *builder) portsOf(network uint16) []Port {
	var ps []Port
	for _, p := range b.sw.Ports {
		if p.Network == network {
			ps = append(ps, p)
		}
	}
	slices.SortFunc(ps, func(x, y Port) int { return cmp.Compare(x.Number, y.Number) })
	return ps
}

func apply(actions ...openflow.Action) []openflow.Instruction {
	return []openflow.Instruction{openflow.ApplyActions{Actions: actions}}
}

func load(reg int, v uint32) openflow.Action {
	return openflow.SetField{Field: openflow.Reg(reg, v)}
}

// Diff returns the flow mods, in a fixed order, that turn a switch which holds
// have into one which holds want. Entries that differ in what they do are
// replaced; those that do not are left alone, and keep their counters.
func Diff(have, want FlowSet) []openflow.FlowMod {
	var mods []openflow.FlowMod
	for _, k := range slices.Sorted(maps.Keys(have)) {
		if _, ok := want[k]; !ok {
			f := have[k]
			mods = append(mods, openflow.FlowMod{
				Command: openflow.FlowDeleteStrict, Table: f.Table, Priority: f.Priority, Match: f.Match,
				OutPort: openflow.PortAny, OutGroup: openflow.GroupAny,
			})
		}
	}
	for _, k := range slices.Sorted(maps.Keys(want)) {
		old, ok := have[k]
		if f := want[k]; !ok || old.Cookie != f.Cookie || !reflect.DeepEqual(old.Instructions, f.Instructions) {
			mods = append(mods, f)
		}
	}
	return mods
}
