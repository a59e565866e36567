package softswitch

import (
	"net"
	"strings"
	"testing"

	"violin/internal/openflow"
)

// lab is a switch of three ports, the last one a tunnel, and what came out of it.
type lab struct {
	t        *testing.T
	s        *Switch
	out      []Frame
	messages []openflow.Message
}

func newLab(t *testing.T) *lab {
	l := &lab{t: t}
	l.s = New(func(b []byte) {
		_, m, err := openflow.Unmarshal(b)
		if err != nil {
			t.Fatal(err)
		}
		l.messages = append(l.messages, m)
	}, func(f Frame) { l.out = append(l.out, f) })
	l.s.AddPort(1, false)
	l.s.AddPort(2, false)
	l.s.AddPort(3, true)
	return l
}

func (l *lab) send(m openflow.Message) (openflow.Message, error) {
	l.t.Helper()
	b, err := openflow.Marshal(7, m)
	if err != nil {
		l.t.Fatal(err)
	}
	reply, err := l.s.Handle(b)
	if err != nil || reply == nil {
		return nil, err
	}
	xid, answer, err := openflow.Unmarshal(reply)
	if err != nil || xid != 7 {
		l.t.Fatalf("answer %v with xid %d: %v", answer, xid, err)
	}
	return answer, nil
}

func (l *lab) must(ms ...openflow.Message) {
	l.t.Helper()
	for _, m := range ms {
		if _, err := l.send(m); err != nil {
			l.t.Fatal(err)
		}
	}
}

// receive returns the ports by which the frame leaves, and how many packet-ins it makes.
func (l *lab) receive(f Frame) (ports []uint32, ins int) {
	l.t.Helper()
	l.out, l.messages = nil, nil
	if err := l.s.Receive(f); err != nil {
		l.t.Fatal(err)
	}
	for _, o := range l.out {
		ports = append(ports, o.Port)
	}
	return ports, len(l.messages)
}

var (
	addr  = net.HardwareAddr{2, 0, 0, 0, 0, 1}
	frame = []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5, 'x'}
)

func flow(table uint8, priority uint16, match openflow.Match, actions ...openflow.Action) *openflow.FlowMod {
	return &openflow.FlowMod{
		Cookie: uint64(table)<<16 | uint64(priority), Table: table, Priority: priority, Match: match,
		Instructions: []openflow.Instruction{openflow.ApplyActions{Actions: actions}},
	}
}

func (l *lab) packets(cookie uint64) uint64 {
	l.t.Helper()
	m, err := l.send(&openflow.FlowStatsRequest{Table: openflow.TableAll, Cookie: cookie, CookieMask: ^uint64(0)})
	if err != nil {
		l.t.Fatal(err)
	}
	flows := m.(*openflow.FlowStatsReply).Flows
	if len(flows) != 1 {
		l.t.Fatalf("%d entries with cookie %#x", len(flows), cookie)
	}
	return flows[0].Packets
}

// A frame takes the best entry, carries its registers through resubmits and back,
// and leaves with the tunnel id it has by then.
func TestPipeline(t *testing.T) {
	l := newLab(t)
	l.must(
		flow(0, 1, nil, openflow.Output{Port: 1}),
		flow(0, 9, openflow.Match{openflow.EthDst(addr), openflow.InPort(1)},
			openflow.SetField{Field: openflow.Reg(1, 0xabcd)},
			openflow.Resubmit{Table: 5},
			openflow.Output{Port: 3},
		),
		flow(5, 1, openflow.Match{openflow.Reg(1, 0xabcd)},
			openflow.CopyField{Src: openflow.FieldReg(1), SrcOffset: 8, Dst: openflow.FieldTunnelID, DstOffset: 16, Bits: 8},
			openflow.Output{Port: 2},
			openflow.Output{Port: 1}, // where it came from: not done
			openflow.Output{Port: openflow.PortController, MaxLen: openflow.ControllerNoBuffer},
		),
	)
	if ports, ins := l.receive(Frame{Port: 1, Data: frame}); len(ports) != 2 || ports[0] != 2 || ports[1] != 3 || ins != 1 {
		t.Fatalf("leaves by %v, with %d packet-ins", ports, ins)
	}
	if l.out[0].TunnelID != 0 || l.out[1].TunnelID != 0xab0000 {
		t.Errorf("tunnel ids %#x", l.out)
	}
	if in := l.messages[0].(*openflow.PacketIn); in.Cookie != 5<<16|1 || in.Table != 5 || in.InPort() != 1 || in.Reg(1) != 0xabcd ||
		in.TunnelID() != 0xab0000 || string(in.Data) != string(frame) {
		t.Errorf("packet-in %+v", in)
	}
	if ports, _ := l.receive(Frame{Port: 2, Data: frame}); len(ports) != 1 || ports[0] != 1 {
		t.Errorf("from another port it leaves by %v", ports)
	}
	if n := l.packets(9); n != 1 {
		t.Errorf("%d packets counted", n)
	}
	l.must(&openflow.PacketOut{Actions: []openflow.Action{openflow.Output{Port: 2}}, Data: frame})
	if last := l.out[len(l.out)-1]; last.Port != 2 || string(last.Data) != string(frame) {
		t.Errorf("packet-out: %+v", last)
	}
}

// Counters survive a replacement unless they are reset; who deletes is told, who replaces is not.
func TestCounters(t *testing.T) {
	l := newLab(t)
	drop := flow(0, 1, nil)
	drop.Flags = openflow.FlagSendFlowRemoved
	l.must(drop)
	l.receive(Frame{Port: 1, Data: frame})
	again := *drop
	again.Instructions = flow(0, 1, nil, openflow.Output{Port: 2}).Instructions
	l.must(&again)
	if n := l.packets(1); n != 1 {
		t.Errorf("%d packets after a replacement, not 1", n)
	}
	again.Flags |= openflow.FlagResetCounts
	l.must(&again)
	if n := l.packets(1); n != 0 || len(l.messages) != 0 {
		t.Errorf("%d packets after a reset, not 0; messages %v", n, l.messages)
	}
	l.receive(Frame{Port: 1, Data: frame})
	l.must(&openflow.FlowMod{Command: openflow.FlowDeleteStrict, Priority: 1})
	if len(l.messages) != 1 || l.messages[0].(*openflow.FlowRemoved).Packets != 1 {
		t.Errorf("after the deletion: %v", l.messages)
	}
}

// A bundle is in effect when it is committed, whole or not at all.
func TestBundle(t *testing.T) {
	l := newLab(t)
	control := func(c openflow.BundleCommand) *openflow.BundleControl {
		return &openflow.BundleControl{Bundle: 1, Command: c, Flags: openflow.BundleAtomic | openflow.BundleOrdered}
	}
	add := func(m *openflow.FlowMod) *openflow.BundleAdd {
		return &openflow.BundleAdd{Bundle: 1, Flags: openflow.BundleAtomic | openflow.BundleOrdered, Message: m}
	}
	l.must(control(openflow.BundleOpen), add(flow(0, 1, nil, openflow.Output{Port: 2})))
	if ports, _ := l.receive(Frame{Port: 1, Data: frame}); len(ports) != 0 {
		t.Errorf("before the commit it leaves by %v", ports)
	}
	l.must(control(openflow.BundleCommit))
	if ports, _ := l.receive(Frame{Port: 1, Data: frame}); len(ports) != 1 {
		t.Errorf("after the commit it leaves by %v", ports)
	}
	l.must(control(openflow.BundleOpen), add(flow(0, 2, nil)), add(flow(0, 3, nil, openflow.PopVLAN{})))
	if _, err := l.send(control(openflow.BundleCommit)); err == nil {
		t.Error("an unknown action is committed")
	}
	if ports, _ := l.receive(Frame{Port: 1, Data: frame}); len(ports) != 1 {
		t.Errorf("after a refused bundle it leaves by %v", ports)
	}
}

func TestRefuses(t *testing.T) {
	for what, m := range map[string]openflow.Message{
		"an unknown action":        flow(0, 1, nil, openflow.PushVLAN{EthType: 0x8100}),
		"an unknown port":          flow(0, 1, nil, openflow.Output{Port: 9}),
		"a shortened packet-in":    flow(0, 1, nil, openflow.Output{Port: openflow.PortController, MaxLen: 128}),
		"a rewritten address":      flow(0, 1, nil, openflow.SetField{Field: openflow.EthDst(addr)}),
		"a copy out of a field":    flow(0, 1, nil, openflow.CopyField{Src: openflow.FieldReg(0), Dst: openflow.FieldReg(1), SrcOffset: 1, Bits: 32}),
		"an unknown match":         flow(0, 1, openflow.Match{openflow.EthType(0x800)}),
		"a masked match":           flow(0, 1, openflow.Match{openflow.RegMasked(1, 0, 1)}),
		"a contradictory match":    flow(0, 1, openflow.Match{openflow.Reg(1, 0), openflow.Reg(1, 1)}),
		"an unknown instruction":   &openflow.FlowMod{Instructions: []openflow.Instruction{openflow.GotoTable{Table: 1}}},
		"a timeout":                &openflow.FlowMod{IdleTimeout: 1},
		"an unknown flag":          &openflow.FlowMod{Flags: openflow.FlagCheckOverlap},
		"a deletion by cover":      &openflow.FlowMod{Command: openflow.FlowDelete},
		"an unknown message":       &openflow.RoleRequest{},
		"an addition to no bundle": &openflow.BundleAdd{Bundle: 1, Message: flow(0, 1, nil)},
	} {
		if _, err := newLab(t).send(m); err == nil {
			t.Errorf("%s is taken", what)
		}
	}
}

// A packet-out has one ingress port. Two in its match were once sent, and each was
// refused: the codec does not write them.
func TestPacketOutPort(t *testing.T) {
	m := &openflow.PacketOut{Match: openflow.Match{openflow.InPort(1)}, Data: frame}
	if b, err := openflow.Marshal(1, m); err == nil || b != nil {
		t.Errorf("written as %x", b)
	}
}

func TestAmbiguous(t *testing.T) {
	l := newLab(t)
	l.must(flow(0, 1, openflow.Match{openflow.InPort(1)}), flow(0, 1, openflow.Match{openflow.EthDst(addr)}))
	if err := l.s.Receive(Frame{Port: 1, Data: frame}); err == nil || !strings.Contains(err.Error(), "match") {
		t.Errorf("two entries match: %v", err)
	}
	l.must(flow(1, 1, nil, openflow.Resubmit{Table: 1}), flow(0, 2, nil, openflow.Resubmit{Table: 1}))
	if err := l.s.Receive(Frame{Port: 1, Data: frame}); err == nil || !strings.Contains(err.Error(), "resubmits") {
		t.Errorf("endless resubmits: %v", err)
	}
}
