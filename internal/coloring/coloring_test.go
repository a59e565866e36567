package coloring

import (
	"math/rand/v2"
	"net"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/quick"

	"violin/internal/cut"
	"violin/internal/openflow"
)

func mac(n int) net.HardwareAddr { return net.HardwareAddr{2, 0, 0, 0, byte(n >> 8), byte(n)} }

// small is a switch of two nodes, a and b, on network 7, with b on network 8 as
// well and another interface of network 7 on host 2.
func small() (Switch, State) {
	sw := Switch{
		Ports: []Port{
			{Number: 1, Slice: "s", Node: "a", Network: 7, Address: mac(1)},
			{Number: 2, Slice: "s", Node: "b", Network: 7, Address: mac(2)},
			{Number: 3, Slice: "s", Node: "b", Interface: 1, Network: 8, Address: mac(3)},
		},
		Peers:   []Peer{{ID: 2, Host: "h2", Port: 10}, {ID: 3, Host: "h3", Port: 11}},
		Remotes: []Remote{{Network: 7, Address: mac(4), Peer: 2}},
	}
	st := State{
		Nodes:   map[NodeKey]Color{{"s", "a"}: {Epoch: 5}, {"s", "b"}: {Epoch: 5}},
		Counted: map[uint16][]cut.Epoch{7: {5}, 8: {5}},
	}
	return sw, st
}

func flows(t *testing.T, sw Switch, st State) FlowSet {
	t.Helper()
	fs, err := Flows(1, sw, st)
	if err != nil {
		t.Fatal(err)
	}
	return fs
}

// text is a set as ovs-ofctl would take it.
func text(fs FlowSet) string {
	var b strings.Builder
	for _, f := range fs.Sorted() {
		b.WriteString(f.String() + "\n")
	}
	return b.String()
}

// The same switch and colours make the same entries, in whatever order they are given.
func TestFlowsDeterministic(t *testing.T) {
	sw, st := small()
	want := text(flows(t, sw, st))
	rnd := rand.New(rand.NewPCG(1, 0))
	for range 20 {
		sw, st := small()
		rnd.Shuffle(len(sw.Ports), func(i, j int) { sw.Ports[i], sw.Ports[j] = sw.Ports[j], sw.Ports[i] })
		rnd.Shuffle(len(sw.Remotes), func(i, j int) { sw.Remotes[i], sw.Remotes[j] = sw.Remotes[j], sw.Remotes[i] })
		if got := text(flows(t, sw, st)); got != want {
			t.Fatalf("other entries:\n%s\nthan\n%s", got, want)
		}
	}
}

// What an entry is to a switch: table, priority, match. Two of them alike would be one.
func TestFlowsDistinct(t *testing.T) {
	sw, st := small()
	all := flows(t, sw, st).Sorted()
	for i, f := range all {
		if f.Command != openflow.FlowAdd {
			t.Errorf("%s: not an addition", f)
		}
		for _, g := range all[:i] {
			if f.Table == g.Table && f.Priority == g.Priority && reflect.DeepEqual(f.Match, g.Match) {
				t.Errorf("twice: %s and %s", f, g)
			}
		}
	}
}

// gateOf lists what the gate of port 1 does with frames, by epoch.
func gateOf(t *testing.T, c Color) map[cut.Epoch]Kind {
	t.Helper()
	sw, st := small()
	st.Nodes[NodeKey{"s", "a"}] = c
	entries := flows(t, sw, st)
	gate := map[cut.Epoch]Kind{}
	for e := range 256 {
		var best openflow.FlowMod
		for _, f := range entries {
			port, _ := f.Match.Get(openflow.FieldReg(regPort))
			epoch, exact := f.Match.Get(openflow.FieldReg(regEpoch))
			_, self := f.Match.Get(openflow.FieldInPort)
			if f.Table == TableGate && port.Uint64() == 1 && !self && (!exact || epoch.Uint64() == uint64(e)) && f.Priority > best.Priority {
				best = f
			}
		}
		gate[cut.Epoch(e)] = UnpackCookie(best.Cookie).Kind
	}
	return gate
}

func TestGate(t *testing.T) {
	for _, at := range []cut.Epoch{0, 1, 5, 127, 128, 254, 255} {
		open, recording := gateOf(t, Color{Epoch: at}), gateOf(t, Color{Epoch: at, Recording: true})
		closed := gateOf(t, Color{Epoch: at, Recording: true, Closed: true})
		for e := cut.Epoch(0); ; e++ {
			want := map[bool]Kind{false: KindHold, true: KindHold}
			switch e {
			case at:
				want = map[bool]Kind{false: KindDeliver, true: KindDeliver}
			case at - 1: // of epoch 0 it is 255
				want = map[bool]Kind{false: KindOlder, true: KindRecord}
			}
			if open[e] != want[false] || recording[e] != want[true] || closed[e] != KindClosed {
				t.Errorf("node in %d, frame of %d: open %s, recording %s, closed %s", at, e, open[e], recording[e], closed[e])
			}
			if e == 255 {
				break
			}
		}
	}
}

// apply does to a table what a switch does with flow mods.
func (fs FlowSet) apply(t *testing.T, mods []openflow.FlowMod) {
	t.Helper()
	for _, m := range mods {
		k := key(m.Table, m.Priority, m.Match)
		switch m.Command {
		case openflow.FlowAdd:
			fs[k] = m
		case openflow.FlowDeleteStrict:
			if _, ok := fs[k]; !ok {
				t.Errorf("%s: there is no such entry", m)
			}
			delete(fs, k)
		default:
			t.Errorf("%s: neither adds nor deletes one entry", m)
		}
	}
}

// randomFlows is of small, with some of it missing and its nodes coloured at random.
func randomFlows(t *testing.T, rnd *rand.Rand) FlowSet {
	t.Helper()
	sw, st := small()
	color := func() Color {
		return Color{Epoch: cut.Epoch(254 + rnd.IntN(4)), Closed: rnd.IntN(2) == 0, Recording: rnd.IntN(2) == 0}
	}
	st.Nodes = map[NodeKey]Color{{"s", "a"}: color(), {"s", "b"}: color()}
	for n := range st.Counted {
		st.Counted[n] = []cut.Epoch{255, 0}[:rnd.IntN(3)]
	}
	sw.Ports = slices.DeleteFunc(sw.Ports, func(Port) bool { return rnd.IntN(4) == 0 })
	sw.Peers = slices.DeleteFunc(sw.Peers, func(Peer) bool { return rnd.IntN(4) == 0 })
	return flows(t, sw, st)
}

// Diff leads from any table to any other, and touches nothing that is right already.
func TestDiff(t *testing.T) {
	for seed := range uint64(300) {
		rnd := rand.New(rand.NewPCG(seed, 0))
		have, want := randomFlows(t, rnd), randomFlows(t, rnd)
		mods := Diff(have, want)
		for _, m := range mods {
			k := key(m.Table, m.Priority, m.Match)
			old, had := have[k]
			if had && m.Command == openflow.FlowAdd && old.String() == want[k].String() {
				t.Fatalf("seed %d: %s is replaced by itself: its counters are at risk", seed, m)
			}
		}
		have.apply(t, mods)
		if text(have) != text(want) {
			t.Fatalf("seed %d: Diff leads to\n%s\nand not to\n%s", seed, text(have), text(want))
		}
		if again := Diff(have, want); len(again) != 0 {
			t.Fatalf("seed %d: still different: %v", seed, again)
		}
	}
}

// Repair leads there too, from what a switch says it holds, and leaves alone what is right.
func TestRepair(t *testing.T) {
	for seed := range uint64(100) {
		rnd := rand.New(rand.NewPCG(seed, 0))
		holds, want := randomFlows(t, rnd), randomFlows(t, rnd)
		reply := &openflow.FlowStatsReply{}
		for _, f := range holds.Sorted() {
			reply.Flows = append(reply.Flows, openflow.FlowStats{
				Table: f.Table, Priority: f.Priority, Cookie: f.Cookie, Flags: f.Flags, Match: f.Match, Instructions: f.Instructions,
			})
		}
		b, err := openflow.Marshal(1, reply)
		if err != nil {
			t.Fatal(err)
		}
		_, m, err := openflow.Unmarshal(b)
		if err != nil {
			t.Fatal(err)
		}
		mods, err := Repair(m.(*openflow.FlowStatsReply).Flows, want)
		if err != nil {
			t.Fatal(err)
		}
		if least := Diff(holds, want); len(mods) != len(least) {
			t.Fatalf("seed %d: %d flow mods, %d would do", seed, len(mods), len(least))
		}
		holds.apply(t, mods)
		if text(holds) != text(want) {
			t.Fatalf("seed %d: Repair leads to\n%s\nand not to\n%s", seed, text(holds), text(want))
		}
	}
}

// A flip changes the stamps of the node and what its gates deliver, and nothing
// else: closed and hold entries count on, or what they have handed over so far
// would be forgotten, since a switch tells nobody of an entry that is replaced.
func TestFlipIsSmall(t *testing.T) {
	for _, at := range []cut.Epoch{5, 254, 255, 0} {
		sw, st := small()
		b := NodeKey{"s", "b"}
		st.Nodes[b] = Color{Epoch: at, Closed: true}
		before := flows(t, sw, st)
		st.Nodes[b] = Color{Epoch: at + 1, Closed: true, Recording: true}
		touched := map[Kind]int{}
		for _, m := range Diff(before, flows(t, sw, st)) {
			c := UnpackCookie(m.Cookie)
			if m.Command == openflow.FlowDeleteStrict {
				c = UnpackCookie(before[key(m.Table, m.Priority, m.Match)].Cookie)
			}
			if c.Port != 2 && c.Port != 3 {
				t.Errorf("epoch %d: the flip of b touches %s", at, m)
			}
			touched[c.Kind]++
		}
		// Of both interfaces: what was delivered as the node's own is recorded, what was older is gone.
		want := map[Kind]int{KindStamp: 2, KindDeliver: 2, KindRecord: 2, KindOlder: 2}
		if !reflect.DeepEqual(touched, want) {
			t.Errorf("epoch %d: the flip touches %v, not %v", at, touched, want)
		}
	}
}

func TestCheck(t *testing.T) {
	for _, c := range []struct {
		want   string
		change func(*Switch, *State)
	}{
		{"outside 1..65279", func(sw *Switch, _ *State) { sw.Ports[0].Number = 0 }},
		{"outside 1..65279", func(sw *Switch, _ *State) { sw.Ports[0].Number = 0xff00 }},
		{"s/a interface 0 and to s/b interface 1", func(sw *Switch, _ *State) { sw.Ports[2].Number = 1 }},
		{"s/b interface 0 and to tunnel to h3", func(sw *Switch, _ *State) { sw.Peers[1].Port = 2 }},
		{"network 0", func(sw *Switch, _ *State) { sw.Ports[1].Network = 0 }},
		{"has no colour", func(_ *Switch, st *State) { delete(st.Nodes, NodeKey{"s", "b"}) }},
		{"number 0 means no peer", func(sw *Switch, _ *State) { sw.Peers[0].ID = 0 }},
		{"number 2 is given to h2 and to h3", func(sw *Switch, _ *State) { sw.Peers[1].ID = 2 }},
		{"02:00:00:00:00:01 on network 7 is given to s/a interface 0 and to s/b interface 0",
			func(sw *Switch, _ *State) { sw.Ports[1].Address = mac(1) }},
		{"is given to s/a interface 0 and to an interface on peer 2", func(sw *Switch, _ *State) { sw.Remotes[0].Address = mac(1) }},
		{"is not an Ethernet address", func(sw *Switch, _ *State) { sw.Ports[1].Address = nil }},
	} {
		sw, st := small()
		c.change(&sw, &st)
		fs, err := Flows(1, sw, st)
		if err == nil || !strings.Contains(err.Error(), c.want) || fs != nil {
			t.Errorf("want an error with %q, got %v and %d entries", c.want, err, len(fs))
		}
	}
	// One address on two networks is two interfaces' own business.
	sw, st := small()
	sw.Ports[2].Address = mac(1)
	flows(t, sw, st)
}

func TestCookie(t *testing.T) {
	roundTrip := func(run uint16, kind, epoch uint8, port, network uint16) bool {
		c := Cookie{Run: run, Kind: Kind(kind), Epoch: cut.Epoch(epoch), Port: port, Network: network}
		return UnpackCookie(c.Pack()) == c
	}
	if err := quick.Check(roundTrip, nil); err != nil {
		t.Error(err)
	}
	unpackPack := func(v uint64) bool { return UnpackCookie(v).Pack() == v }
	if err := quick.Check(unpackPack, nil); err != nil {
		t.Error(err)
	}
	c := Cookie{Run: 0x1234, Kind: KindHold, Epoch: 255, Port: 3, Network: 7}
	if c.Pack() != 0x1234_0b_ff_0003_0007 {
		t.Errorf("cookie %#x", c.Pack())
	}
	if s := c.String(); s != "hold epoch 255 port 3 network 7 (run 0x1234)" {
		t.Error(s)
	}
	for k := KindStamp; k <= KindSent; k++ {
		if strings.HasPrefix(k.String(), "kind(") {
			t.Errorf("kind %d has no name", k)
		}
	}
}

// Network and epoch fill the 24 bits that VXLAN has for them, and do not mix.
func TestTunnelID(t *testing.T) {
	apart := func(n uint16, e uint8) bool {
		id := TunnelID(n, cut.Epoch(e))
		return id>>24 == 0 && uint16(id>>8) == n && uint8(id) == e
	}
	if err := quick.Check(apart, nil); err != nil {
		t.Error(err)
	}
}

func TestReadPacket(t *testing.T) {
	in := &openflow.PacketIn{
		Cookie: Cookie{Run: 1, Kind: KindRecord, Epoch: 4, Port: 2, Network: 7}.Pack(),
		Match:  openflow.Match{openflow.InPort(10), openflow.Reg(regEpoch, 255), openflow.Reg(regTunneled, 1), openflow.Reg(regNetwork, 7)},
	}
	p, err := ReadPacket(in)
	want := Packet{Kind: KindRecord, Port: 2, Network: 7, Epoch: 255, Tunneled: true}
	if err != nil || p != want || !p.Delivered() {
		t.Errorf("read %+v, %v", p, err)
	}
	// A switch leaves registers out that are 0: epoch 0, from this host.
	in = &openflow.PacketIn{Cookie: Cookie{Kind: KindHold, Port: 2, Network: 7}.Pack()}
	p, err = ReadPacket(in)
	if err != nil || p.Epoch != 0 || p.Tunneled || p.Delivered() {
		t.Errorf("read %+v, %v", p, err)
	}
	for _, k := range []Kind{0, KindStamp, KindDeliver, KindOlder, KindFlood, KindSent, 99} {
		if p, err := ReadPacket(&openflow.PacketIn{Cookie: Cookie{Kind: k, Port: 2}.Pack()}); err == nil || p != (Packet{}) {
			t.Errorf("a packet-in of a %s entry is read as %+v", k, p)
		}
	}
}

func TestReadCounters(t *testing.T) {
	stat := func(k Kind, peer, network uint16, e cut.Epoch, n uint64) openflow.FlowStats {
		return openflow.FlowStats{Cookie: Cookie{Run: 1, Kind: k, Epoch: e, Port: peer, Network: network}.Pack(), Packets: n}
	}
	got := ReadCounters([]openflow.FlowStats{
		stat(KindSent, 2, 7, 255, 3), stat(KindSent, 2, 7, 0, 4), stat(KindReceived, 2, 7, 255, 5), stat(KindReceived, 3, 8, 255, 6),
		stat(KindTunnelIn, 2, 0, 0, 7), stat(KindTunnelOut, 2, 0, 0, 8), stat(KindDeliver, 2, 7, 255, 9),
	})
	want := Counters{
		Sent:     map[Channel]uint64{{2, 7, 255}: 3, {2, 7, 0}: 4},
		Received: map[Channel]uint64{{2, 7, 255}: 5, {3, 8, 255}: 6},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("read %v, want %v", got, want)
	}
}

func TestStateClone(t *testing.T) {
	_, st := small()
	c := st.Clone()
	c.Nodes[NodeKey{"s", "a"}] = Color{Epoch: 9}
	c.Counted[7][0] = 9
	if _, same := small(); !reflect.DeepEqual(st, same) {
		t.Errorf("the clone shares: %v", st)
	}
}
