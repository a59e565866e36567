package openflow

import (
	"fmt"
	"slices"
	"strings"
)

// Version is OpenFlow 1.5's number on the wire.
const Version uint8 = 0x06

// versionName writes a version number as people do.
func versionName(v uint8) string {
	if v >= 1 && v <= 6 {
		return fmt.Sprintf("OpenFlow 1.%d", v-1)
	}
	return fmt.Sprintf("OpenFlow version %#02x", v)
}

// Hello is the first message in both directions (§7.5.1).
type Hello struct {
	Version  uint8   // in the message's header: the highest that the sender speaks
	Versions []uint8 // all that the sender speaks, ascending, below 32; none if it did not list them
}

// speaks tells whether the sender can speak the version.
func (m *Hello) speaks(version uint8) bool {
	if len(m.Versions) > 0 {
		return slices.Contains(m.Versions, version)
	}
	return m.Version >= version
}

func (m *Hello) offer() string {
	versions := m.Versions
	if len(versions) == 0 {
		versions = []uint8{m.Version}
	}
	names := make([]string, len(versions))
	for i, v := range versions {
		names[i] = versionName(v)
	}
	return strings.Join(names, ", ")
}

func (*Hello) messageType() uint8 { return typeHello }

func (m *Hello) encode(e *encoder) {
	e.b[0] = m.Version
	if m.Version == 0 {
		e.b[0] = Version
	}
	if len(m.Versions) == 0 {
		return
	}
	var bitmap uint32
	for _, v := range m.Versions {
		if v >= 32 {
			e.failf("version %d does not fit the bitmap", v)
		}
		bitmap |= 1 << (v & 31)
	}
	e.property(1, func() { e.u32(bitmap) })
}

func decodeHello(d *decoder, version uint8) *Hello {
	m := &Hello{Version: version}
	for d.more() {
		typ, p := d.property("element")
		if typ != 1 || !p.more() {
			continue
		}
		// Further words are for versions that do not exist yet.
		m.Versions = nil
		bitmap := p.u32()
		for v := range uint8(32) {
			if bitmap&(1<<v) != 0 {
				m.Versions = append(m.Versions, v)
			}
		}
	}
	return m
}

// EchoRequest wants an [EchoReply] with the same data.
type EchoRequest struct{ Data []byte }

// EchoReply answers an [EchoRequest].
type EchoReply struct{ Data []byte }

func (*EchoRequest) messageType() uint8  { return typeEchoRequest }
func (m *EchoRequest) encode(e *encoder) { e.bytes(m.Data) }
func (*EchoReply) messageType() uint8    { return typeEchoReply }
func (m *EchoReply) encode(e *encoder)   { e.bytes(m.Data) }

// FeaturesRequest asks the switch who it is.
type FeaturesRequest struct{}

func (*FeaturesRequest) messageType() uint8 { return typeFeaturesRequest }
func (*FeaturesRequest) encode(*encoder)    {}

// Bits of FeaturesReply.Capabilities.
const (
	CapFlowStats  uint32 = 1 << 0
	CapTableStats uint32 = 1 << 1
	CapPortStats  uint32 = 1 << 2
	CapBundles    uint32 = 1 << 9
)

// FeaturesReply tells who the switch is (§7.3.1).
type FeaturesReply struct {
	DatapathID   uint64 // lower 48 bits: the bridge's address
	Buffers      uint32
	Tables       uint8 // number of flow tables
	Auxiliary    uint8 // 0 for the main connection
	Capabilities uint32
}

func (*FeaturesReply) messageType() uint8 { return typeFeaturesReply }

func (m *FeaturesReply) encode(e *encoder) {
	e.u64(m.DatapathID)
	e.u32(m.Buffers)
	e.u8(m.Tables)
	e.u8(m.Auxiliary)
	e.zero(2)
	e.u32(m.Capabilities)
	e.zero(4)
}

func decodeFeaturesReply(d *decoder) *FeaturesReply {
	m := &FeaturesReply{DatapathID: d.u64(), Buffers: d.u32(), Tables: d.u8(), Auxiliary: d.u8()}
	d.skip(2)
	m.Capabilities = d.u32()
	d.skip(4)
	return m
}

// SetConfig sets how the switch treats frames (§7.3.2).
type SetConfig struct {
	Flags       uint16 // fragments: 0 normal, 1 drop, 2 reassemble
	MissSendLen uint16 // bytes of a frame that an entry-less table sends; ControllerNoBuffer for all
}

func (*SetConfig) messageType() uint8 { return typeSetConfig }

func (m *SetConfig) encode(e *encoder) {
	e.u16(m.Flags)
	e.u16(m.MissSendLen)
}

// SetAsync chooses the asynchronous messages that this connection gets, as
// bitmaps of their reasons, for a controller of any role but slave (§7.3.10).
type SetAsync struct {
	PacketIn    uint32
	PortStatus  uint32
	FlowRemoved uint32
}

// Properties of SET_ASYNC; each has its counterpart for slaves one below.
const (
	asyncPacketIn    = 1
	asyncPortStatus  = 3
	asyncFlowRemoved = 5
)

func (*SetAsync) messageType() uint8 { return typeSetAsync }

func (m *SetAsync) encode(e *encoder) {
	e.property(asyncPacketIn, func() { e.u32(m.PacketIn) })
	e.property(asyncPortStatus, func() { e.u32(m.PortStatus) })
	e.property(asyncFlowRemoved, func() { e.u32(m.FlowRemoved) })
}

func decodeSetAsync(d *decoder) *SetAsync {
	m := &SetAsync{}
	for d.more() {
		typ, p := d.property("property")
		switch typ {
		case asyncPacketIn:
			m.PacketIn = p.u32()
		case asyncPortStatus:
			m.PortStatus = p.u32()
		case asyncFlowRemoved:
			m.FlowRemoved = p.u32()
		}
	}
	return m
}

// PacketInFormat chooses how the switch writes packet-ins (NXT_SET_PACKET_IN_FORMAT).
type PacketInFormat struct{ Format uint32 }

// Formats of packet-ins.
const (
	PacketInStandard uint32 = 0
	PacketInNicira2  uint32 = 2 // with user data, and whole
)

func (*PacketInFormat) messageType() uint8 { return typeExperimenter }

func (m *PacketInFormat) encode(e *encoder) {
	e.u32(experimenterNicira)
	e.u32(nxtSetPacketInFormat)
	e.u32(m.Format)
}

// BarrierRequest wants a [BarrierReply] once everything sent before it is done (§7.3.7).
type BarrierRequest struct{}

// BarrierReply answers a [BarrierRequest].
type BarrierReply struct{}

func (*BarrierRequest) messageType() uint8 { return typeBarrierRequest }
func (*BarrierRequest) encode(*encoder)    {}
func (*BarrierReply) messageType() uint8   { return typeBarrierReply }
func (*BarrierReply) encode(*encoder)      {}

// Role is a controller's standing among the controllers of a switch (§6.3.6).
type Role uint32

// The roles.
const (
	RoleNoChange Role = 0 // asks for the role
	RoleEqual    Role = 1 // full access; what a connection begins with
	RoleMaster   Role = 2 // full access, and every other master becomes a slave
	RoleSlave    Role = 3 // reading only
)

// RoleRequest takes a role (§7.3.9).
type RoleRequest struct {
	Role       Role
	Generation uint64 // of a master or slave: an older one than the switch has seen is refused
}

// RoleReply tells the connection's role.
type RoleReply struct {
	Role       Role
	Generation uint64
}

func (*RoleRequest) messageType() uint8  { return typeRoleRequest }
func (m *RoleRequest) encode(e *encoder) { encodeRole(e, m.Role, m.Generation) }
func (*RoleReply) messageType() uint8    { return typeRoleReply }
func (m *RoleReply) encode(e *encoder)   { encodeRole(e, m.Role, m.Generation) }

// The four bytes between role and generation hold a controller's short number
// since 1.5; Open vSwitch wants them zero.
func encodeRole(e *encoder, r Role, generation uint64) {
	e.u32(uint32(r))
	e.zero(4)
	e.u64(generation)
}

func decodeRole(d *decoder) (Role, uint64) {
	r := Role(d.u32())
	d.skip(4)
	return r, d.u64()
}

// BundleCommand is what a [BundleControl] asks or answers (§7.3.9.2).
type BundleCommand uint16

// The commands of bundle control. Each reply is one above its request.
const (
	BundleOpen         BundleCommand = 0
	BundleOpenReply    BundleCommand = 1
	BundleCommit       BundleCommand = 4
	BundleCommitReply  BundleCommand = 5
	BundleDiscard      BundleCommand = 6
	BundleDiscardReply BundleCommand = 7
)

// Bits of the bundle messages' Flags.
const (
	BundleAtomic  uint16 = 1 << 0 // all or nothing, and no frame sees a part of it
	BundleOrdered uint16 = 1 << 1
)

// BundleControl opens, commits or discards a bundle (§7.3.9.2).
type BundleControl struct {
	Bundle  uint32
	Command BundleCommand
	Flags   uint16
}

func (*BundleControl) messageType() uint8 { return typeBundleControl }

func (m *BundleControl) encode(e *encoder) {
	e.u32(m.Bundle)
	e.u16(uint16(m.Command))
	e.u16(m.Flags)
}

func decodeBundleControl(d *decoder) *BundleControl {
	return &BundleControl{Bundle: d.u32(), Command: BundleCommand(d.u16()), Flags: d.u16()}
}

// BundleAdd puts a message into a bundle (§7.3.9.6).
type BundleAdd struct {
	Bundle  uint32
	Flags   uint16
	Message Message // for Open vSwitch a FlowMod or PacketOut; not another BundleAdd
}

func (*BundleAdd) messageType() uint8 { return typeBundleAdd }

func (m *BundleAdd) encode(e *encoder) {
	if !bundlable(m.Message) {
		e.failf("%T cannot be put into a bundle", m.Message)
		return
	}
	e.u32(m.Bundle)
	e.zero(2)
	e.u16(m.Flags)
	start := len(e.b)
	e.u8(Version)
	e.u8(m.Message.messageType())
	e.u16(0)
	e.bytes(e.b[4:8]) // the inner message has the outer's xid
	e.in(messageName(m.Message), func() { m.Message.encode(e) })
	e.length(start+2, start)
}

func decodeBundleAdd(d *decoder, xid uint32) *BundleAdd {
	m := &BundleAdd{Bundle: d.u32()}
	d.skip(2)
	m.Flags = d.u16()
	h := decodeHeader(d)
	inner := d.sub(h.length-headerSize, typeName(h.typ))
	switch {
	case !d.ok():
	case h.version != Version:
		inner.failf("the inner message is of %s", versionName(h.version))
	case h.xid != xid:
		inner.failf("the inner message's xid %#x differs from the outer's, %#x", h.xid, xid)
	case h.typ == typeBundleAdd:
		inner.failf("a bundle in a bundle")
	default:
		m.Message = decodeBody(inner, h)
		if !bundlable(m.Message) {
			inner.failf("not a message for a bundle")
		}
	}
	return m
}

func bundlable(m Message) bool {
	switch m.(type) {
	case *FlowMod, *PacketOut, *Unknown:
		return true
	}
	return false
}

// DescRequest asks for the switch's description.
type DescRequest struct{}

func (*DescRequest) messageType() uint8 { return typeMultipartRequest }
func (*DescRequest) encode(e *encoder)  { encodeMultipart(e, multipartDesc, false) }

// Desc describes the switch for people (§7.3.5.1).
type Desc struct {
	Manufacturer string // "Nicira, Inc."
	Hardware     string // "Open vSwitch"
	Software     string // "3.1.0"
	Serial       string
	Datapath     string
}

func (*Desc) messageType() uint8 { return typeMultipartReply }

func (m *Desc) encode(e *encoder) {
	encodeMultipart(e, multipartDesc, false)
	e.fixed(m.Manufacturer, 256)
	e.fixed(m.Hardware, 256)
	e.fixed(m.Software, 256)
	e.fixed(m.Serial, 32)
	e.fixed(m.Datapath, 256)
}

func decodeDesc(d *decoder) *Desc {
	text := func(n int) string {
		s, _, _ := strings.Cut(string(d.take(n)), "\x00")
		return s[:min(len(s), n-1)]
	}
	return &Desc{Manufacturer: text(256), Hardware: text(256), Software: text(256), Serial: text(32), Datapath: text(256)}
}
