package openflow

import (
	"bytes"
	"encoding/hex"
	"errors"
	"net"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"
)

// samples is a message of every type, with everything in it that it can have.
func samples() []Message {
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 1}
	match := Match{
		InPort(7), EthDst(mac), EthSrcMasked(mac, net.HardwareAddr{255, 255, 255, 0, 0, 0}), EthType(0x0800), VLANVID(42), IPProto(6),
		IPSrc(netip.MustParsePrefix("10.0.0.0/8")), IPDst(netip.MustParsePrefix("10.1.2.3/32")), TCPDst(80),
		Reg(1, 5), RegMasked(15, 0xf0, 0xff), TunnelID(0x123456), Metadata(9),
	}
	actions := []Action{
		Output{Port: 3}, Output{Port: PortController, MaxLen: ControllerNoBuffer}, Group{Group: 4}, PopVLAN{},
		SetField{Field: Reg(2, 77)}, CopyField{Src: FieldTunnelID, SrcOffset: 8, Dst: FieldReg(0), Bits: 16},
		Resubmit{Table: 20}, Controller{MaxLen: 128, Reason: ReasonInvalidTTL, ControllerID: 3, UserData: []byte("why")},
		OutputReg{Src: FieldReg(4), Bits: 16}, Clone{Actions: []Action{Output{Port: 9}, Resubmit{Table: 30}}},
	}
	instructions := []Instruction{ApplyActions{Actions: actions}, ClearActions{}, GotoTable{Table: 10}}
	flow := FlowMod{
		Cookie: 0x0102030405060708, CookieMask: 0xff, Table: 20, Command: FlowModifyStrict, IdleTimeout: 1, HardTimeout: 2, Priority: 300,
		OutPort: PortAny, OutGroup: GroupAny, Flags: FlagSendFlowRemoved, Importance: 4, Match: match, Instructions: instructions,
	}
	return []Message{
		&Hello{Version: Version, Versions: []uint8{4, 6}},
		&ErrorMessage{Type: 4, Code: 10, Data: []byte("the message")},
		&ErrorMessage{Type: 0xffff, Code: 2, Experimenter: experimenterNicira, Data: []byte{}},
		&EchoRequest{Data: []byte("ping")}, &EchoReply{Data: []byte("pong")},
		&FeaturesRequest{}, &FeaturesReply{DatapathID: 0xaabbccddeeff, Buffers: 1, Tables: 254, Capabilities: CapFlowStats | CapBundles},
		&PacketIn{Reason: ReasonAction, Table: 20, Cookie: 5, Match: Match{InPort(2), Reg(1, 6)}, Data: []byte("frame"), Length: 5, UserData: []byte("u")},
		&PacketIn{Match: Match{InPort(2)}, Data: []byte("fra"), Length: 5},
		&PacketOut{InPort: 3, Match: Match{Reg(1, 2)}, Actions: actions, Data: []byte("frame")},
		&flow,
		&FlowRemoved{Table: 3, Reason: 2, Priority: 4, IdleTimeout: 5, HardTimeout: 6, Cookie: 7, Match: match, Duration: 1500 * time.Millisecond, Packets: 8, Bytes: 9},
		&FlowStatsRequest{Table: TableAll, OutPort: PortAny, OutGroup: GroupAny, Cookie: 1, CookieMask: 2, Match: Match{InPort(1)}},
		&FlowStatsReply{More: true, Flows: []FlowStats{{
			Table: 1, Priority: 2, Cookie: 3, Packets: 4, Bytes: 5, Duration: 6 * time.Second, IdleTime: 7 * time.Second, IdleTimeout: 8, HardTimeout: 9,
			Flags: 10, Importance: 11, Match: match, Instructions: instructions,
		}, {Table: 2}}},
		&BarrierRequest{}, &BarrierReply{},
		&BundleControl{Bundle: 9, Command: BundleCommit, Flags: 3},
		&BundleAdd{Bundle: 9, Flags: 3, Message: &flow},
		&DescRequest{}, &Desc{Manufacturer: "Nicira, Inc.", Hardware: "Open vSwitch", Software: "3.1.0", Serial: "None", Datapath: "None"},
		&RoleRequest{Role: 2, Generation: 77}, &RoleReply{Role: 2, Generation: 77},
		&PacketInFormat{Format: 2}, &SetConfig{Flags: 1, MissSendLen: 2},
		&Unknown{Type: 15, Body: []byte("a group-mod")},
	}
}

func wire(t *testing.T, xid uint32, m Message) []byte {
	t.Helper()
	b, err := Marshal(xid, m)
	if err != nil {
		t.Fatalf("%T: %v", m, err)
	}
	return b
}

// What is written is read back, and written again just so. (Two forms may mean the
// same, such as an error's number, which is the header's.)
func TestRoundTrip(t *testing.T) {
	for _, m := range samples() {
		b := wire(t, 7, m)
		xid, got, err := Unmarshal(b)
		if err != nil || xid != 7 || reflect.TypeOf(got) != reflect.TypeOf(m) {
			t.Errorf("%T: %T, %v", m, got, err)
			continue
		}
		if e, ok := got.(*ErrorMessage); ok && e.XID != 7 {
			t.Errorf("error of message %d", e.XID)
		} else if ok {
			e.XID = 0
		}
		if !reflect.DeepEqual(got, m) {
			t.Errorf("%T:\ngot  %+v\nwant %+v", m, got, m)
		}
		if again := wire(t, 7, got); !bytes.Equal(again, b) {
			t.Errorf("%T is written as\n%x and again as\n%x", m, b, again)
		}
	}
}

// The bytes of the OpenFlow 1.5.1 specification, put together by hand.
func TestWire(t *testing.T) {
	for _, test := range []struct {
		section string
		m       Message
		want    string
	}{
		{"7.5.1 hello, element 7.5.1.1", &Hello{Versions: []uint8{6}}, "06000010 00000001 0001 0008 00000040"},
		{"7.3.8 barrier", &BarrierRequest{}, "06140008 00000001"},
		{"7.5.2 echo", &EchoRequest{Data: []byte{0xab}}, "06020009 00000001 ab"},
		{"7.3.9.2 bundle control", &BundleControl{Bundle: 5, Command: BundleOpen, Flags: 3}, "06210010 00000001 00000005 0000 0003"},
		{
			"7.3.4.2 flow mod; 7.2.3.2 match; 7.2.5 instruction; 7.2.6.1 output",
			&FlowMod{Cookie: 1, Table: 2, Priority: 3, Match: Match{InPort(4)}, Instructions: apply(Output{Port: 5})},
			"060e0058 00000001 0000000000000001 0000000000000000 02 00 0000 0000 0003 ffffffff ffffffff ffffffff 0000 0000" +
				" 0001 000c 80000004 00000004 00000000" +
				" 0004 0018 00000000 0000 0010 00000005 0000 000000000000",
		},
	} {
		want, err := hex.DecodeString(strings.ReplaceAll(test.want, " ", ""))
		if err != nil {
			t.Fatal(err)
		}
		if got := wire(t, 1, test.m); !bytes.Equal(got, want) {
			t.Errorf("%s:\ngot  %x\nwant %x", test.section, got, want)
		}
	}
}

// A message that was cut off or says a wrong length is refused, by place and section.
func TestMalformed(t *testing.T) {
	for _, m := range samples() {
		b := wire(t, 1, m)
		for n := range len(b) {
			if _, got, err := Unmarshal(b[:n]); got != nil || !errors.As(err, new(*Error)) {
				t.Errorf("%T, %d bytes of %d: %v, %v", m, n, len(b), got, err)
			}
		}
	}
	flow := wire(t, 1, &FlowMod{Match: Match{InPort(4)}})
	flow[48+3] = 200 // of the match
	var e *Error
	if _, _, err := Unmarshal(flow); !errors.As(err, &e) || !strings.HasPrefix(e.Section, "flow-mod") || e.Offset < 48 {
		t.Errorf("a match that is too long: %v", err)
	}
	barrier := wire(t, 1, &BarrierRequest{})
	barrier[0] = 4
	if _, _, err := Unmarshal(barrier); err == nil || !strings.Contains(err.Error(), "OpenFlow 1.3") {
		t.Errorf("another version: %v", err)
	}
	if _, err := Marshal(1, &EchoRequest{Data: make([]byte, 0x10000)}); !errors.As(err, &e) {
		t.Errorf("a message that is too long: %v", err)
	}
	if _, err := Marshal(1, &FlowMod{Match: Match{NewField(FieldInPort, []byte{1}, nil)}}); !errors.As(err, &e) {
		t.Errorf("a value of a wrong length: %v", err)
	}
	if _, err := Marshal(1, &PacketOut{Match: Match{InPort(1)}}); !errors.As(err, &e) {
		t.Errorf("an ingress port twice: %v", err)
	}
}

func TestErrorNames(t *testing.T) {
	for want, m := range map[string]*ErrorMessage{
		"OFPBMC_DUP_FIELD":                {Type: 4, Code: 10},
		"NXBRC_NXM_INVALID":               {Type: 0xffff, Code: 2, Experimenter: experimenterNicira},
		"error 2 of experimenter 0x1":     {Type: 0xffff, Code: 2, Experimenter: 1},
		"error type 99 code 1":            {Type: 99, Code: 1},
		"error type 4 code 99":            {Type: 4, Code: 99},
		"OFPHFC_INCOMPATIBLE (\"older\")": {Type: 0, Code: 0, Data: []byte("older")},
	} {
		if got := m.Error(); !strings.HasSuffix(got, want) {
			t.Errorf("%q, want %q at its end", got, want)
		}
	}
	m := &ErrorMessage{Type: 4, Code: 10, Data: wire(t, 1, &PacketOut{})}
	if got := m.Error(); got != "openflow: the switch refused a packet-out: OFPBMC_DUP_FIELD" {
		t.Error(got)
	}
}

// Whatever comes from a switch is read or refused, and what is read means the same
// when it is written and read again.
func FuzzUnmarshal(f *testing.F) {
	for _, m := range samples() {
		b, err := Marshal(7, m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		xid, m, err := Unmarshal(b)
		if err != nil {
			if m != nil || xid != 0 || !errors.As(err, new(*Error)) {
				t.Fatalf("%v, %d and %+v", err, xid, m)
			}
			return
		}
		out, err := Marshal(xid, m)
		if err != nil {
			return // such as what is within 65535 bytes only without its padding
		}
		xid2, again, err := Unmarshal(out)
		if err != nil || xid2 != xid {
			t.Fatalf("%+v\nis written as %x\nand then refused: %v", m, out, err)
		}
		if out2, err := Marshal(xid, again); err != nil || !bytes.Equal(out, out2) {
			t.Fatalf("%+v\nis written as %x\nand then as %x: %v", m, out, out2, err)
		}
	})
}
