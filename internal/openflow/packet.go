package openflow

import "fmt"

// Reasons of a [PacketIn] (§7.4.1).
const (
	ReasonNoMatch    uint8 = 0
	ReasonAction     uint8 = 1 // an action of a flow entry
	ReasonInvalidTTL uint8 = 2
	ReasonActionSet  uint8 = 3
	ReasonGroup      uint8 = 4
	ReasonPacketOut  uint8 = 5 // an action of a packet-out
)

func reasonString(r uint8) string {
	names := [...]string{"no_match", "action", "invalid_ttl", "action_set", "group", "packet_out"}
	if int(r) < len(names) {
		return names[r]
	}
	return fmt.Sprint(r)
}

// Properties of NXT_PACKET_IN2.
const (
	packetInData       = 0
	packetInFullLength = 1
	packetInBuffer     = 2
	packetInTable      = 3
	packetInCookie     = 4
	packetInReason     = 5
	packetInMetadata   = 6
	packetInUserData   = 7
)

// PacketIn is a frame that the switch sends to the controller. It is read from
// PACKET_IN (§7.4.1) and from NXT_PACKET_IN2, and written as the latter.
type PacketIn struct {
	Reason   uint8
	Table    uint8  // of the flow entry
	Cookie   uint64 // of the flow entry; all ones if there is none
	Match    Match  // fields of the pipeline: ingress port, tunnel, registers; those that are zero may be missing
	Data     []byte // the frame, without a checksum; its beginning only if it is shorter than Length
	Length   int    // of the frame, in bytes
	UserData []byte // of the [Controller] action
	Buffer   uint32 // under which the frame is kept until a [PacketOut] names it; 0 for none
}

// InPort is the port that the frame came from.
func (m *PacketIn) InPort() uint32 { return uint32(m.field(FieldInPort)) }

// Reg is register n, 0..15, as it was when the frame was sent to the controller.
func (m *PacketIn) Reg(n int) uint32 { return uint32(m.field(FieldReg(n))) }

// TunnelID is the key of the tunnel that the frame came by, or of the one that
// the pipeline had chosen for it.
func (m *PacketIn) TunnelID() uint64 { return m.field(FieldTunnelID) }

func (m *PacketIn) field(id FieldID) uint64 {
	f, _ := m.Match.Get(id)
	return f.Uint64()
}

func (*PacketIn) messageType() uint8 { return typeExperimenter }

func (m *PacketIn) encode(e *encoder) {
	e.u32(experimenterNicira)
	e.u32(nxtPacketIn2)
	e.property(packetInData, func() { e.bytes(m.Data) })
	if m.Length != len(m.Data) {
		e.property(packetInFullLength, func() { e.u32(uint32(m.Length)) })
	}
	e.property(packetInTable, func() { e.u8(m.Table) })
	e.property(packetInCookie, func() { e.zero(4); e.u64(m.Cookie) })
	e.property(packetInReason, func() { e.u8(m.Reason) })
	e.property(packetInMetadata, func() {
		for _, f := range m.Match {
			f.encode(e)
		}
	})
	if m.Buffer != 0 {
		e.property(packetInBuffer, func() { e.u32(m.Buffer) })
	}
	if len(m.UserData) > 0 {
		e.property(packetInUserData, func() { e.bytes(m.UserData) })
	}
}

func decodePacketIn(d *decoder) *PacketIn {
	m := &PacketIn{}
	d.skip(4) // buffer: none, and if there is one, the frame's beginning is here all the same
	m.Length = int(d.u16())
	m.Reason, m.Table, m.Cookie = d.u8(), d.u8(), d.u64()
	m.Match = decodeMatch(d)
	d.skip(2)
	m.Data = d.rest()
	return m
}

func decodePacketIn2(d *decoder) *PacketIn {
	m := &PacketIn{Cookie: ^uint64(0)}
	full := false
	for d.more() {
		typ, p := d.property("property")
		switch typ {
		case packetInData:
			m.Data = p.rest()
		case packetInFullLength:
			m.Length, full = int(p.u32()), true
		case packetInBuffer:
			m.Buffer = p.u32()
		case packetInTable:
			m.Table = p.u8()
		case packetInCookie:
			p.skip(4)
			m.Cookie = p.u64()
		case packetInReason:
			m.Reason = p.u8()
		case packetInMetadata:
			m.Match = decodeFields(p)
		case packetInUserData:
			m.UserData = p.rest()
		}
	}
	if !full {
		m.Length = len(m.Data)
	}
	return m
}

// PacketOut makes the switch do actions to a frame of the controller's (§7.3.6).
type PacketOut struct {
	InPort  uint32 // the port that the frame shall seem to come from; 0 for PortController
	Match   Match  // further fields of the pipeline to begin with: registers, metadata, tunnel
	Actions []Action
	Data    []byte // the frame, without a checksum
	// Buffer is what the frame is kept under by who passes messages on to the switch
	// (package keeper), and ends that; 0 for none. Unlike in the standard the frame is
	// in Data all the same, and a switch, which keeps none, refuses it.
	Buffer uint32
}

func (*PacketOut) messageType() uint8 { return typePacketOut }

func (m *PacketOut) encode(e *encoder) {
	if m.Buffer == 0 {
		e.u32(noBuffer)
	} else {
		e.u32(m.Buffer)
	}
	at := len(e.b)
	e.u16(0)
	e.zero(2)
	port := m.InPort
	if port == 0 {
		port = PortController
	}
	if f, ok := m.Match.Get(FieldInPort); ok {
		e.failf("%s stands in the match: a switch refuses it twice", f)
	}
	append(Match{InPort(port)}, m.Match...).encode(e)
	start := len(e.b)
	encodeActions(e, m.Actions)
	e.length(at, start)
	e.bytes(m.Data)
}

func decodePacketOut(d *decoder) *PacketOut {
	m := &PacketOut{}
	if b := d.u32(); b != noBuffer {
		m.Buffer = b
	}
	n := int(d.u16())
	d.skip(2)
	for _, f := range decodeMatch(d) {
		if f.id == FieldInPort {
			m.InPort = uint32(f.Uint64())
		} else {
			m.Match = append(m.Match, f)
		}
	}
	if m.InPort == 0 {
		m.InPort = PortController
	}
	m.Actions = decodeActions(d.sub(n, "actions"), 0)
	m.Data = d.rest()
	return m
}
