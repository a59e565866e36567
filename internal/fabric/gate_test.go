package fabric

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"violin/internal/coloring"
	"violin/internal/cut"
	"violin/internal/lab"
	"violin/internal/openflow"
	"violin/internal/openflow/softswitch"
)

// socket is where a guest plugs into the rig.
type socket struct {
	name    string // of the TAP device: node and index of the interface
	host    string
	network uint16
	addr    net.HardwareAddr
	tap     *os.File
	port    uint32
}

func (s *socket) node() string          { return s.name[:1] }
func (s *socket) key() coloring.NodeKey { return coloring.NodeKey{Slice: "s", Node: s.node()} }
func (s *socket) index() int            { return int(s.name[1] - '0') }
func addr(n byte) net.HardwareAddr      { return net.HardwareAddr{2, 0, 0, 0, 1, n} }

// rig is two hosts at two sites and four nodes: two on each host, one of them
// with two interfaces on one network, two of them on a second network as well.
// Beside each real switch there is one in memory that is told the same.
type rig struct {
	t        *testing.T
	sockets  []*socket
	switches map[string]*Switch
	model    map[string]*softswitch.Switch
	told     map[string]coloring.FlowSet // to the model
	gate     func(host string, p coloring.Packet, data []byte)

	mu   sync.Mutex
	sent map[uint64][]byte
	real map[string]int // what has happened, and how often
	want map[string]int // in the model
	seen map[string][]uint64
	last uint64
}

const magic = 0x76696f6c << 32 // in the frames' numbers: others may send here, too

func newRig(ctx context.Context, t *testing.T) *rig {
	t.Helper()
	r := &rig{
		t: t, model: map[string]*softswitch.Switch{}, told: map[string]coloring.FlowSet{},
		sent: map[uint64][]byte{}, real: map[string]int{}, want: map[string]int{}, seen: map[string][]uint64{}, last: magic,
		gate: func(string, coloring.Packet, []byte) {},
		sockets: []*socket{
			{name: "a0", host: "x", network: 1}, {name: "a1", host: "x", network: 2},
			{name: "b0", host: "x", network: 1}, {name: "b1", host: "x", network: 1},
			{name: "c0", host: "y", network: 1}, {name: "c1", host: "y", network: 2},
			{name: "d0", host: "y", network: 1},
		},
	}
	var l *lab.Lab
	l, r.switches = twoHosts(ctx, t, [2]string{"x", "y"}, 0, r.punted)
	for name, peer := range map[string]string{"x": "y", "y": "x"} {
		p, sw := l.Host(peer), r.switches[name]
		if err := sw.AddPeer(ctx, Peer{ID: peerID(peer), Host: peer, Addr: p.UnderlayAddr.Addr(), MAC: p.UnderlayMAC}); err != nil {
			t.Fatal(err)
		}
		r.model[name] = softswitch.New(func(m []byte) { r.modelPunts(name, m) }, func(f softswitch.Frame) { r.modelLeaves(name, f) })
		r.model[name].AddPort(sw.sw.Peers[0].Port, true)
		r.told[name] = coloring.FlowSet{}
	}
	remotes := map[string][]coloring.Remote{}
	for i, s := range r.sockets {
		h, sw := l.Host(s.host), r.switches[s.host]
		s.addr = addr(byte(i))
		if err := h.CreateTap(s.name, 8950); err != nil {
			t.Fatal(err)
		}
		s.tap = plug(t, h, s.name)
		waitRunning(ctx, t, sw, s.name)
		var err error
		s.port, err = sw.Attach(ctx, Port{Tap: s.name, Slice: "s", Node: s.node(), Interface: s.index(), Network: s.network, Address: s.addr})
		if err != nil {
			t.Fatal(err)
		}
		r.model[s.host].AddPort(s.port, false)
		other := map[string]string{"x": "y", "y": "x"}[s.host]
		remotes[other] = append(remotes[other], coloring.Remote{Network: s.network, Address: s.addr, Peer: peerID(s.host)})
		go r.read(s)
	}
	for name, sw := range r.switches {
		sw.SetRemotes(remotes[name])
	}
	return r
}

func peerID(host string) uint16 { return uint16(host[0]) }

// waitRunning waits until the kernel has noticed that a TAP device is open.
func waitRunning(ctx context.Context, t *testing.T, sw *Switch, tap string) {
	t.Helper()
	for {
		link, err := sw.nl.LinkByName(tap)
		if err != nil {
			t.Fatal(err)
		}
		if link.Attrs().RawFlags&unix.IFF_RUNNING != 0 {
			return
		}
		if err := pause(ctx); err != nil {
			t.Fatalf("device %s: %v", tap, err)
		}
	}
}

// color gives the nodes their colours, on the real switches and in the model.
func (r *rig) color(ctx context.Context, colors map[string]coloring.Color) {
	r.t.Helper()
	for name, sw := range r.switches {
		if err := sw.Update(ctx, func(st *coloring.State) {
			for _, s := range r.sockets {
				if c, ok := colors[s.node()]; ok && s.host == name {
					st.Nodes[s.key()] = c
				}
			}
			st.Counted = map[uint16][]cut.Epoch{1: {255, 0}, 2: {255, 0}}
		}); err != nil {
			r.t.Fatal(err)
		}
		if err := sw.Purge(ctx); err != nil {
			r.t.Fatal(err)
		}
		for _, m := range coloring.Diff(r.told[name], sw.installed) {
			b, err := openflow.Marshal(0, &m)
			if err != nil {
				r.t.Fatal(err)
			}
			if _, err := r.model[name].Handle(b); err != nil {
				r.t.Fatal(err)
			}
		}
		r.told[name] = maps.Clone(sw.installed)
	}
}

// send has a guest send a frame: on the real network and in the model.
func (r *rig) send(from *socket, dst net.HardwareAddr, typ []byte, size int) {
	r.t.Helper()
	r.last++
	data := binary.BigEndian.AppendUint64(slices.Concat(dst, from.addr, typ, bytes.Repeat([]byte{byte(r.last)}, size)), r.last)
	r.mu.Lock()
	r.sent[r.last] = data
	r.mu.Unlock()
	if err := r.model[from.host].Receive(softswitch.Frame{Port: from.port, Data: data}); err != nil {
		r.t.Fatal(err)
	}
	if _, err := from.tap.Write(data); err != nil {
		r.t.Fatal(err)
	}
}

// ---- what happens in the model

func (r *rig) modelLeaves(host string, f softswitch.Frame) {
	if sw := r.switches[host]; f.Port == sw.sw.Peers[0].Port {
		peer := sw.sw.Peers[0].Host
		in := softswitch.Frame{Port: r.switches[peer].sw.Peers[0].Port, TunnelID: f.TunnelID, Data: f.Data}
		if err := r.model[peer].Receive(in); err != nil {
			r.t.Error(err)
		}
		return
	}
	r.note(r.want, "frame %d is delivered to %s", number(f.Data), r.at(host, f.Port))
}

func (r *rig) modelPunts(host string, message []byte) {
	_, m, err := openflow.Unmarshal(message)
	if err != nil {
		r.t.Error(err)
	}
	if in, ok := m.(*openflow.PacketIn); ok {
		p, err := coloring.ReadPacket(in)
		if err != nil {
			r.t.Error(err)
		}
		r.note(r.want, "frame %d for %s, %+v", number(in.Data), r.at(host, p.Port), p)
	}
}

// ---- what happens on the real network

func (r *rig) punted(host string, p coloring.Packet, data []byte) {
	if r.ours(data) {
		r.note(r.real, "frame %d for %s, %+v", number(data), r.at(host, p.Port), p)
	}
	r.gate(host, p, data)
}

func (r *rig) read(s *socket) {
	buf := make([]byte, 10000)
	for {
		n, err := s.tap.Read(buf)
		if err != nil {
			return // closed
		}
		if r.ours(buf[:n]) {
			r.note(r.real, "frame %d is delivered to %s", number(buf[:n]), s.name)
			r.mu.Lock()
			r.seen[s.name] = append(r.seen[s.name], number(buf[:n]))
			r.mu.Unlock()
		}
	}
}

// ours tells whether a frame is of this test, and sees to it that it is what was sent.
func (r *rig) ours(data []byte) bool {
	if len(data) < 22 || number(data)>>32 != magic>>32 {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if want := r.sent[number(data)]; !bytes.Equal(want, data) {
		r.t.Errorf("frame %d of %d bytes comes with %d:\n%x", number(data)-magic, len(want), len(data), data)
	}
	return true
}

func number(data []byte) uint64 { return binary.BigEndian.Uint64(data[len(data)-8:]) }

func (r *rig) at(host string, port uint32) string {
	for _, s := range r.sockets {
		if s.host == host && s.port == port {
			return s.name
		}
	}
	return fmt.Sprintf("port %d of %s", port, host)
}

func (r *rig) note(in map[string]int, format string, id uint64, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	in[fmt.Sprintf(format, append([]any{id - magic}, args...)...)]++
}

// compare waits until all that happened in the model has happened, and finds out
// whether anything else has. The last frame of each sender goes to all, and
// no frame overtakes another of its sender: what was to come before is there.
func (r *rig) compare(ctx context.Context, what string) {
	r.t.Helper()
	missing := func() (m []string) {
		r.mu.Lock()
		defer r.mu.Unlock()
		for e, n := range r.want {
			if r.real[e] < n {
				m = append(m, e)
			}
		}
		return m
	}
	for len(missing()) > 0 {
		if pause(ctx) != nil {
			break
		}
	}
	for _, e := range missing() {
		r.t.Errorf("%s: %s in memory, but not really", what, e)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for e, n := range r.real {
		if r.want[e] < n {
			r.t.Errorf("%s: %s %d times, in memory %d times", what, e, n, r.want[e])
		}
	}
	clear(r.real)
	clear(r.want)
}

// compareCounters compares each entry's packets.
func (r *rig) compareCounters(ctx context.Context, what string) {
	r.t.Helper()
	for name, sw := range r.switches {
		c, err := sw.Counters(ctx)
		if err != nil {
			r.t.Fatal(err)
		}
		if c.Handed != c.Seen {
			r.t.Errorf("%s: %d frames handed over by the switch of %s, %d came", what, c.Handed, name, c.Seen)
		}
		request := openflow.FlowStatsRequest{Table: openflow.TableAll, Cookie: uint64(sw.run) << 48, CookieMask: 0xffff << 48}
		real, err := sw.conn.Load().FlowStats(ctx, request)
		if err != nil {
			r.t.Fatal(err)
		}
		b, err := openflow.Marshal(0, &request)
		if err != nil {
			r.t.Fatal(err)
		}
		if b, err = r.model[name].Handle(b); err != nil {
			r.t.Fatal(err)
		}
		_, m, err := openflow.Unmarshal(b)
		if err != nil {
			r.t.Fatal(err)
		}
		packets := map[string]uint64{}
		for _, s := range m.(*openflow.FlowStatsReply).Flows {
			packets[entry(s)] = s.Packets
		}
		if len(packets) != len(real) {
			r.t.Errorf("%s: %d entries on %s, %d in memory", what, len(real), name, len(packets))
		}
		for _, s := range real {
			if want, ok := packets[entry(s)]; !ok || want != s.Packets {
				r.t.Errorf("%s: %s counts %d packets on %s, in memory %d", what, entry(s), s.Packets, name, want)
			}
		}
	}
}

// entry names an entry by what it is for and where it stands.
func entry(s openflow.FlowStats) string {
	fields := make([]string, len(s.Match))
	for i, f := range s.Match {
		fields[i] = f.String()
	}
	slices.Sort(fields)
	return fmt.Sprintf("%s: table %d, priority %d, %v", coloring.UnpackCookie(s.Cookie), s.Table, s.Priority, fields)
}

// TestLikeInMemory sends every kind of frame through two real switches, in every
// state that a cut brings them into, and finds that they do with it, and count,
// exactly what the switch in memory does, by which the flow tables are proven.
func TestLikeInMemory(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	r := newRig(ctx, t)
	mac := func(s string) net.HardwareAddr { a, _ := net.ParseMAC(s); return a }
	everyone := mac("ff:ff:ff:ff:ff:ff")
	plain, tagged := []byte{0x88, 0xb5}, []byte{0x81, 0x00, 0x20, 0x2a, 0x88, 0xb5}
	type kind struct {
		what string
		dst  net.HardwareAddr
		typ  []byte
		size int
	}
	var kinds []kind
	for _, s := range r.sockets {
		kinds = append(kinds, kind{"unicast", s.addr, plain, 60}) // to itself and to another network as well
	}
	kinds = append(kinds,
		kind{"small unicast", r.sockets[2].addr, plain, 0},
		kind{"jumbo on the host", r.sockets[2].addr, plain, 8900},
		kind{"jumbo to another host", r.sockets[4].addr, plain, 8900},
		kind{"jumbo broadcast", everyone, plain, 8900},
		kind{"tagged", r.sockets[6].addr, tagged, 60},
		kind{"tagged broadcast", everyone, tagged, 60},
		kind{"twice tagged", everyone, []byte{0x88, 0xa8, 0, 5, 0x81, 0x00, 0x20, 0x2a, 0x88, 0xb5}, 60},
		kind{"ARP", everyone, []byte{0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1}, 20},
		kind{"IPv4 multicast", mac("01:00:5e:00:00:fb"), []byte{0x08, 0x00, 0x45, 0, 0, 40}, 60},
		kind{"broken IPv4", everyone, []byte{0x08, 0x00, 0x4f}, 10},
		kind{"neighbour discovery", mac("33:33:ff:00:00:01"), []byte{0x86, 0xdd, 0x60}, 80},
		kind{"spanning tree", mac("01:80:c2:00:00:00"), []byte{0, 38, 0x42, 0x42, 3}, 60},
		kind{"pause", mac("01:80:c2:00:00:01"), []byte{0x88, 0x08, 0, 1}, 60},
		kind{"LLDP", mac("01:80:c2:00:00:0e"), []byte{0x88, 0xcc}, 60},
		kind{"to an address nobody has", mac("06:00:00:00:00:99"), plain, 60},
		kind{"to nobody", mac("00:00:00:00:00:00"), plain, 60},
	)
	at := func(e cut.Epoch) coloring.Color { return coloring.Color{Epoch: e} }
	for _, s := range []struct {
		what   string
		colors map[string]coloring.Color
	}{
		{"all in one epoch", map[string]coloring.Color{"a": at(255), "b": at(255), "c": at(255), "d": at(255)}},
		{"closed", map[string]coloring.Color{"a": {Epoch: 255, Closed: true}, "c": {Epoch: 255, Closed: true}}},
		{"flipped, still closed", map[string]coloring.Color{"a": {Epoch: 0, Closed: true, Recording: true}}},
		{"open again, recording", map[string]coloring.Color{"a": {Epoch: 0, Recording: true}, "c": at(255)}},
		{"a node on each host has cut", map[string]coloring.Color{"c": {Epoch: 0, Recording: true}}},
		{"all have cut", map[string]coloring.Color{"b": {Epoch: 0, Recording: true}, "d": {Epoch: 0, Recording: true}}},
		{"drained", map[string]coloring.Color{"a": at(0), "b": at(0), "c": at(0), "d": at(0)}},
		{"one is ahead, in an epoch that nobody counts", map[string]coloring.Color{"b": at(1)}},
		{"two are two ahead", map[string]coloring.Color{"b": at(2), "d": at(2)}},
		{"back where it began", map[string]coloring.Color{"a": at(255), "b": at(255), "c": at(255), "d": at(255)}},
	} {
		r.color(ctx, s.colors)
		frames := r.last
		for _, from := range r.sockets {
			for _, k := range kinds {
				r.send(from, k.dst, k.typ, k.size)
			}
		}
		for _, from := range r.sockets {
			r.send(from, everyone, plain, 60)
		}
		r.mu.Lock()
		happens := len(r.want)
		r.mu.Unlock()
		r.compare(ctx, s.what)
		r.compareCounters(ctx, s.what)
		t.Logf("%s: %d frames sent, %d delivered or handed over, as in memory", s.what, r.last-frames, happens)
		if t.Failed() {
			t.FailNow() // what follows is not comparable
		}
	}
}

// keeper is a node's gate with the frames it has judged, as an agent has it.
type keeper struct {
	mu       sync.Mutex
	gate     *cut.Gate[[]byte]
	output   func(data []byte)
	recorded []uint64
}

func (k *keeper) arrive(p coloring.Packet, data []byte) {
	k.mu.Lock()
	defer k.mu.Unlock()
	v, err := k.gate.Arrive(cut.Frame[[]byte]{Epoch: p.Epoch, Size: len(data), Delivered: p.Delivered(), Ref: data})
	if err != nil {
		panic(err)
	}
	if v.Deliver {
		k.output(data)
	}
	if v.Record {
		k.recorded = append(k.recorded, number(data))
	}
}

func (k *keeper) count() (held, recorded int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.gate.Held(), len(k.recorded)
}

// TestHeldInOrder takes one node through its cut while newer frames wait for it,
// from its own host and from another: it gets them in order, before what is sent
// afterwards. Then an older frame is delivered and recorded, from either.
func TestHeldInOrder(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	r := newRig(ctx, t)
	a, b, c, d := r.sockets[0], r.sockets[2], r.sockets[4], r.sockets[6]
	sw := r.switches[d.host]
	k := &keeper{gate: cut.NewGate[[]byte](255, cut.Limits{}), output: func(data []byte) {
		if err := sw.Output(d.port, data); err != nil {
			t.Error(err)
		}
	}}
	r.gate = func(host string, p coloring.Packet, data []byte) {
		if host == d.host && p.Port == d.port {
			k.arrive(p, data)
		}
	}
	until := func(what string, ok func() bool) {
		t.Helper()
		for !ok() {
			if err := pause(ctx); err != nil {
				held, recorded := k.count()
				t.Fatalf("%s: %v; %d frames held, %d recorded, %d read", what, err, held, recorded, len(r.readBy(d)))
			}
		}
	}
	const frames = 300
	burst := func(from ...*socket) {
		for range frames {
			for _, s := range from {
				r.send(s, d.addr, []byte{0x88, 0xb5}, 60)
			}
		}
	}
	r.color(ctx, map[string]coloring.Color{"a": {Epoch: 0}, "b": {Epoch: 255}, "c": {Epoch: 0}, "d": {Epoch: 255}})
	burst(a, c)
	until("newer frames are held", func() bool { held, _ := k.count(); return held == 2*frames })
	if n := len(r.readBy(d)); n != 0 {
		t.Fatalf("%d newer frames were delivered", n)
	}

	k.gate.Close()
	r.color(ctx, map[string]coloring.Color{"d": {Epoch: 255, Closed: true}})
	r.color(ctx, map[string]coloring.Color{"d": {Epoch: 0, Closed: true, Recording: true}})
	k.mu.Lock()
	k.gate.Flip(0, true)
	for _, f := range k.gate.Open() {
		if f.Record {
			t.Errorf("frame %d of the node's own epoch is recorded", number(f.Frame.Ref)-magic)
		}
		k.output(f.Frame.Ref)
	}
	k.mu.Unlock()
	r.color(ctx, map[string]coloring.Color{"d": {Epoch: 0, Recording: true}})
	burst(a, c)
	until("all are read", func() bool { return len(r.readBy(d)) == 4*frames })
	last := map[bool]uint64{}
	for i, id := range r.readBy(d) {
		from := bytes.Equal(r.sent[id][6:12], a.addr)
		if last[from] > id {
			t.Fatalf("frame %d is read after %d: no. %d of %d", id-magic, last[from]-magic, i, 4*frames)
		}
		last[from] = id
	}

	burst(b)
	until("older frames are recorded", func() bool { _, recorded := k.count(); return recorded == frames })
	until("and delivered", func() bool { return len(r.readBy(d)) == 5*frames })
	if delivered := r.readBy(d)[4*frames:]; !slices.Equal(delivered, k.recorded) {
		t.Errorf("delivered %v\nrecorded %v", delivered, k.recorded)
	}
	counters, err := sw.Counters(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if n := counters.Records[d.port]; n != frames {
		t.Errorf("%d copies counted, not %d", n, frames)
	}
	if n := counters.Received[coloring.Channel{Peer: peerID(a.host), Network: 1, Epoch: 255}]; n != frames {
		t.Errorf("%d frames of the old epoch counted as received, not %d", n, frames)
	}
}

// readBy returns the frames that a guest has read, in order.
func (r *rig) readBy(s *socket) []uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.seen[s.name])
}
