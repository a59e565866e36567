package openflow

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"strings"
)

// FieldID names a field of a packet or of its way through the pipeline: the
// 32-bit OXM header without a mask (§7.2.3.2) in the upper half; in the lower
// half the experimenter, of a field of class 0xffff.
type FieldID uint64

// The OXM classes.
const (
	classNXM1         = 0x0001 // Nicira's extended match
	classBasic        = 0x8000
	classRegisters    = 0x8001 // 64-bit registers: xreg N is reg 2N (upper half) and reg 2N+1
	classExperimenter = 0xffff
)

// The fields, under the names that the specification or nicira-ext.h gives them.
const (
	FieldInPort     FieldID = classBasic<<48 | 0<<41 | 4<<32
	FieldMetadata   FieldID = classBasic<<48 | 2<<41 | 8<<32
	FieldEthDst     FieldID = classBasic<<48 | 3<<41 | 6<<32
	FieldEthSrc     FieldID = classBasic<<48 | 4<<41 | 6<<32
	FieldEthType    FieldID = classBasic<<48 | 5<<41 | 2<<32
	FieldVLANVID    FieldID = classBasic<<48 | 6<<41 | 2<<32
	FieldVLANPCP    FieldID = classBasic<<48 | 7<<41 | 1<<32
	FieldIPDSCP     FieldID = classBasic<<48 | 8<<41 | 1<<32
	FieldIPECN      FieldID = classBasic<<48 | 9<<41 | 1<<32
	FieldIPProto    FieldID = classBasic<<48 | 10<<41 | 1<<32
	FieldIPv4Src    FieldID = classBasic<<48 | 11<<41 | 4<<32
	FieldIPv4Dst    FieldID = classBasic<<48 | 12<<41 | 4<<32
	FieldTCPSrc     FieldID = classBasic<<48 | 13<<41 | 2<<32
	FieldTCPDst     FieldID = classBasic<<48 | 14<<41 | 2<<32
	FieldUDPSrc     FieldID = classBasic<<48 | 15<<41 | 2<<32
	FieldUDPDst     FieldID = classBasic<<48 | 16<<41 | 2<<32
	FieldSCTPSrc    FieldID = classBasic<<48 | 17<<41 | 2<<32
	FieldSCTPDst    FieldID = classBasic<<48 | 18<<41 | 2<<32
	FieldICMPv4Type FieldID = classBasic<<48 | 19<<41 | 1<<32
	FieldICMPv4Code FieldID = classBasic<<48 | 20<<41 | 1<<32
	FieldARPOp      FieldID = classBasic<<48 | 21<<41 | 2<<32
	FieldARPSPA     FieldID = classBasic<<48 | 22<<41 | 4<<32
	FieldARPTPA     FieldID = classBasic<<48 | 23<<41 | 4<<32
	FieldARPSHA     FieldID = classBasic<<48 | 24<<41 | 6<<32
	FieldARPTHA     FieldID = classBasic<<48 | 25<<41 | 6<<32
	FieldIPv6Src    FieldID = classBasic<<48 | 26<<41 | 16<<32
	FieldIPv6Dst    FieldID = classBasic<<48 | 27<<41 | 16<<32
	FieldICMPv6Type FieldID = classBasic<<48 | 29<<41 | 1<<32
	FieldICMPv6Code FieldID = classBasic<<48 | 30<<41 | 1<<32
	FieldNDTarget   FieldID = classBasic<<48 | 31<<41 | 16<<32
	FieldTunnelID   FieldID = classBasic<<48 | 38<<41 | 8<<32
	FieldTCPFlags   FieldID = classBasic<<48 | 42<<41 | 2<<32
	FieldPacketType FieldID = classBasic<<48 | 44<<41 | 4<<32

	FieldTunnelIPv4Src FieldID = classNXM1<<48 | 31<<41 | 4<<32
	FieldTunnelIPv4Dst FieldID = classNXM1<<48 | 32<<41 | 4<<32
	FieldPacketMark    FieldID = classNXM1<<48 | 33<<41 | 4<<32
	FieldTunnelFlags   FieldID = classNXM1<<48 | 104<<41 | 2<<32
)

// registers is the number of 32-bit registers: that of Open vSwitch 3.1.
const registers = 16

// FieldReg is the 32-bit register n, 0..15. It panics for another n.
func FieldReg(n int) FieldID {
	if n < 0 || n >= registers {
		panic(fmt.Sprintf("openflow: register %d: there are 0..%d", n, registers-1))
	}
	return classNXM1<<48 | FieldID(n)<<41 | 4<<32
}

func (id FieldID) class() int  { return int(id >> 48) }
func (id FieldID) number() int { return int(id>>41) & 0x7f }

// size is the length of a value in bytes.
func (id FieldID) size() int {
	n := int(id>>32) & 0xff
	if id.class() == classExperimenter {
		n -= 4
	}
	return n
}

// Bits is the width of the field's values on the wire, in bits.
func (id FieldID) Bits() int { return 8 * id.size() }

// format says how a field's values are written.
type format uint8

const (
	formatHex format = iota
	formatDecimal
	formatPort
	formatMAC
	formatIP
)

// names returns the field's name in a match and in a copy, as Open vSwitch writes them.
func (id FieldID) names() (match, copied string, f format) {
	switch {
	case id.class() == classNXM1 && id.number() < registers && id.size() == 4:
		return fmt.Sprintf("reg%d", id.number()), fmt.Sprintf("NXM_NX_REG%d", id.number()), formatHex
	case id.class() == classRegisters && id.size() == 8:
		return fmt.Sprintf("xreg%d", id.number()), fmt.Sprintf("OXM_OF_PKT_REG%d", id.number()), formatHex
	}
	switch id {
	case FieldInPort:
		return "in_port", "OXM_OF_IN_PORT", formatPort
	case FieldMetadata:
		return "metadata", "OXM_OF_METADATA", formatHex
	case FieldEthDst:
		return "dl_dst", "NXM_OF_ETH_DST", formatMAC
	case FieldEthSrc:
		return "dl_src", "NXM_OF_ETH_SRC", formatMAC
	case FieldEthType:
		return "dl_type", "NXM_OF_ETH_TYPE", formatHex
	case FieldVLANVID:
		return "vlan_vid", "OXM_OF_VLAN_VID", formatHex
	case FieldVLANPCP:
		return "dl_vlan_pcp", "OXM_OF_VLAN_PCP", formatDecimal
	case FieldIPDSCP:
		return "ip_dscp", "OXM_OF_IP_DSCP", formatDecimal
	case FieldIPECN:
		return "nw_ecn", "NXM_NX_IP_ECN", formatDecimal
	case FieldIPProto:
		return "nw_proto", "NXM_OF_IP_PROTO", formatDecimal
	case FieldIPv4Src:
		return "nw_src", "NXM_OF_IP_SRC", formatIP
	case FieldIPv4Dst:
		return "nw_dst", "NXM_OF_IP_DST", formatIP
	case FieldTCPSrc:
		return "tcp_src", "NXM_OF_TCP_SRC", formatDecimal
	case FieldTCPDst:
		return "tcp_dst", "NXM_OF_TCP_DST", formatDecimal
	case FieldUDPSrc:
		return "udp_src", "NXM_OF_UDP_SRC", formatDecimal
	case FieldUDPDst:
		return "udp_dst", "NXM_OF_UDP_DST", formatDecimal
	case FieldSCTPSrc:
		return "sctp_src", "OXM_OF_SCTP_SRC", formatDecimal
	case FieldSCTPDst:
		return "sctp_dst", "OXM_OF_SCTP_DST", formatDecimal
	case FieldICMPv4Type:
		return "icmp_type", "NXM_OF_ICMP_TYPE", formatDecimal
	case FieldICMPv4Code:
		return "icmp_code", "NXM_OF_ICMP_CODE", formatDecimal
	case FieldARPOp:
		return "arp_op", "NXM_OF_ARP_OP", formatDecimal
	case FieldARPSPA:
		return "arp_spa", "NXM_OF_ARP_SPA", formatIP
	case FieldARPTPA:
		return "arp_tpa", "NXM_OF_ARP_TPA", formatIP
	case FieldARPSHA:
		return "arp_sha", "NXM_NX_ARP_SHA", formatMAC
	case FieldARPTHA:
		return "arp_tha", "NXM_NX_ARP_THA", formatMAC
	case FieldIPv6Src:
		return "ipv6_src", "NXM_NX_IPV6_SRC", formatIP
	case FieldIPv6Dst:
		return "ipv6_dst", "NXM_NX_IPV6_DST", formatIP
	case FieldICMPv6Type:
		return "icmpv6_type", "NXM_NX_ICMPV6_TYPE", formatDecimal
	case FieldICMPv6Code:
		return "icmpv6_code", "NXM_NX_ICMPV6_CODE", formatDecimal
	case FieldNDTarget:
		return "nd_target", "NXM_NX_ND_TARGET", formatIP
	case FieldTunnelID:
		return "tun_id", "NXM_NX_TUN_ID", formatHex
	case FieldTCPFlags:
		return "tcp_flags", "NXM_NX_TCP_FLAGS", formatHex
	case FieldPacketType:
		return "packet_type", "OXM_OF_PACKET_TYPE", formatHex
	case FieldTunnelIPv4Src:
		return "tun_src", "NXM_NX_TUN_IPV4_SRC", formatIP
	case FieldTunnelIPv4Dst:
		return "tun_dst", "NXM_NX_TUN_IPV4_DST", formatIP
	case FieldPacketMark:
		return "pkt_mark", "NXM_NX_PKT_MARK", formatHex
	case FieldTunnelFlags:
		return "tun_flags", "NXM_NX_TUN_FLAGS", formatHex
	}
	s := fmt.Sprintf("oxm_%#x_%d", id.class(), id.number())
	if id.class() == classExperimenter {
		s = fmt.Sprintf("oxm_%#x_%d", uint32(id), id.number())
	}
	return s, s, formatHex
}

// String is the field's name in the syntax of ovs-ofctl.
func (id FieldID) String() string {
	name, _, _ := id.names()
	return name
}

// Field is one value of a field, or with a mask a set of values: an OXM TLV. It
// is comparable, and immutable.
type Field struct {
	id    FieldID
	value string
	mask  string // as long as the value; "" means every bit counts
}

// NewField is the general form of the constructors below. A nil mask means that
// every bit counts. Value bits that the mask does not select are cleared, as a
// switch demands. Values of a wrong length are refused by [Marshal].
func NewField(id FieldID, value, mask []byte) Field {
	if mask == nil || len(mask) != len(value) {
		return Field{id: id, value: string(value), mask: string(mask)}
	}
	masked, exact := make([]byte, len(value)), true
	for i := range value {
		masked[i] = value[i] & mask[i]
		exact = exact && mask[i] == 0xff
	}
	if exact {
		mask = nil
	}
	return Field{id: id, value: string(masked), mask: string(mask)}
}

func field8(id FieldID, v uint8) Field { return NewField(id, []byte{v}, nil) }

func field16(id FieldID, v uint16) Field {
	return NewField(id, binary.BigEndian.AppendUint16(nil, v), nil)
}

func field32(id FieldID, v uint32) Field {
	return NewField(id, binary.BigEndian.AppendUint32(nil, v), nil)
}

func field64(id FieldID, v uint64) Field {
	return NewField(id, binary.BigEndian.AppendUint64(nil, v), nil)
}

func fieldPrefix(v4, v6 FieldID, p netip.Prefix) Field {
	id := v4
	if p.Addr().Is6() {
		id = v6
	}
	return NewField(id, p.Addr().AsSlice(), net.CIDRMask(p.Bits(), p.Addr().BitLen()))
}

// InPort matches the port that a frame came from.
func InPort(port uint32) Field { return field32(FieldInPort, port) }

// Metadata matches the register that the write-metadata instruction writes.
func Metadata(v uint64) Field { return field64(FieldMetadata, v) }

// MetadataMasked matches the bits of the metadata that mask selects.
func MetadataMasked(v, mask uint64) Field {
	return NewField(FieldMetadata, binary.BigEndian.AppendUint64(nil, v), binary.BigEndian.AppendUint64(nil, mask))
}

// EthDst matches the destination address.
func EthDst(addr net.HardwareAddr) Field { return NewField(FieldEthDst, addr, nil) }

// EthDstMasked matches the bits of the destination address that mask selects.
func EthDstMasked(addr, mask net.HardwareAddr) Field { return NewField(FieldEthDst, addr, mask) }

// EthSrc matches the source address.
func EthSrc(addr net.HardwareAddr) Field { return NewField(FieldEthSrc, addr, nil) }

// EthSrcMasked matches the bits of the source address that mask selects.
func EthSrcMasked(addr, mask net.HardwareAddr) Field { return NewField(FieldEthSrc, addr, mask) }

// EthType matches the Ethernet type after any VLAN tags.
func EthType(t uint16) Field { return field16(FieldEthType, t) }

// vlanPresent is OFPVID_PRESENT: a frame has a tag.
const vlanPresent = 0x1000

// VLANVID matches frames tagged with the VLAN, 0..4095.
func VLANVID(vid uint16) Field { return field16(FieldVLANVID, vid|vlanPresent) }

// VLANPresent matches tagged frames.
func VLANPresent() Field {
	return NewField(FieldVLANVID, []byte{vlanPresent >> 8, 0}, []byte{vlanPresent >> 8, 0})
}

// VLANAbsent matches untagged frames.
func VLANAbsent() Field { return field16(FieldVLANVID, 0) }

// VLANPCP matches the tag's priority, 0..7.
func VLANPCP(pcp uint8) Field { return field8(FieldVLANPCP, pcp) }

// IPProto matches the protocol of IPv4 or IPv6; an [EthType] must stand before it.
func IPProto(p uint8) Field { return field8(FieldIPProto, p) }

// IPSrc matches IPv4 or IPv6 sources; the [EthType] must stand before it.
func IPSrc(p netip.Prefix) Field { return fieldPrefix(FieldIPv4Src, FieldIPv6Src, p) }

// IPDst matches IPv4 or IPv6 destinations; the [EthType] must stand before it.
func IPDst(p netip.Prefix) Field { return fieldPrefix(FieldIPv4Dst, FieldIPv6Dst, p) }

// TCPSrc matches the source port; EthType and IPProto must stand before it.
func TCPSrc(port uint16) Field { return field16(FieldTCPSrc, port) }

// TCPDst matches the destination port; EthType and IPProto must stand before it.
func TCPDst(port uint16) Field { return field16(FieldTCPDst, port) }

// UDPSrc matches the source port; EthType and IPProto must stand before it.
func UDPSrc(port uint16) Field { return field16(FieldUDPSrc, port) }

// UDPDst matches the destination port; EthType and IPProto must stand before it.
func UDPDst(port uint16) Field { return field16(FieldUDPDst, port) }

// ARPOp matches 1 (request) or 2 (reply); EthType 0x0806 must stand before it.
func ARPOp(op uint16) Field { return field16(FieldARPOp, op) }

// ARPTPA matches the address asked for; EthType 0x0806 must stand before it.
func ARPTPA(p netip.Prefix) Field { return fieldPrefix(FieldARPTPA, FieldARPTPA, p) }

// ARPSPA matches the asker's address; EthType 0x0806 must stand before it.
func ARPSPA(p netip.Prefix) Field { return fieldPrefix(FieldARPSPA, FieldARPSPA, p) }

// Reg matches the register n, 0..15. It panics for another n.
func Reg(n int, v uint32) Field { return field32(FieldReg(n), v) }

// RegMasked matches the bits of register n that mask selects.
func RegMasked(n int, v, mask uint32) Field {
	return NewField(FieldReg(n), binary.BigEndian.AppendUint32(nil, v), binary.BigEndian.AppendUint32(nil, mask))
}

// TunnelID matches a tunnel's key: for VXLAN the 24-bit network identifier.
func TunnelID(v uint64) Field { return field64(FieldTunnelID, v) }

// TunnelIDMasked matches the bits of a tunnel's key that mask selects.
func TunnelIDMasked(v, mask uint64) Field {
	return NewField(FieldTunnelID, binary.BigEndian.AppendUint64(nil, v), binary.BigEndian.AppendUint64(nil, mask))
}

// TunnelSrc matches the outer IPv4 source of a frame from a tunnel; in a
// set-field it is the source of a frame to a tunnel port with local_ip=flow.
func TunnelSrc(addr netip.Addr) Field { return NewField(FieldTunnelIPv4Src, addr.AsSlice(), nil) }

// TunnelDst matches the outer IPv4 destination; see [TunnelSrc].
func TunnelDst(addr netip.Addr) Field { return NewField(FieldTunnelIPv4Dst, addr.AsSlice(), nil) }

// ID tells which field it is.
func (f Field) ID() FieldID { return f.id }

// Value returns the value, big-endian.
func (f Field) Value() []byte { return []byte(f.value) }

// Mask returns the mask, or nil if every bit counts.
func (f Field) Mask() []byte {
	if f.mask == "" {
		return nil
	}
	return []byte(f.mask)
}

// Uint64 returns the value as a number; of a longer field its last eight bytes.
func (f Field) Uint64() uint64 { return number(f.value) }

func number(s string) uint64 {
	var v uint64
	for i := range len(s) {
		v = v<<8 | uint64(s[i])
	}
	return v
}

// String writes the field as ovs-ofctl does: "reg0=0x1", "dl_dst=01:00:00:00:00:00/01:00:00:00:00:00".
func (f Field) String() string {
	name, _, _ := f.id.names()
	return name + "=" + f.valueString()
}

// valueString writes value and mask.
func (f Field) valueString() string {
	_, _, how := f.id.names()
	s := how.write(f.value)
	switch {
	case f.mask == "":
	case how == formatIP:
		if ones, bits := net.IPMask(f.mask).Size(); bits != 0 {
			return fmt.Sprintf("%s/%d", s, ones)
		}
		s += "/" + formatIP.write(f.mask)
	case how == formatMAC:
		s += "/" + how.write(f.mask)
	default:
		s += "/" + formatHex.write(f.mask)
	}
	return s
}

func (how format) write(v string) string {
	switch {
	case how == formatMAC && len(v) == 6:
		return net.HardwareAddr(v).String()
	case how == formatIP && (len(v) == 4 || len(v) == 16):
		addr, _ := netip.AddrFromSlice([]byte(v))
		return addr.String()
	case how == formatDecimal && len(v) <= 8:
		return fmt.Sprint(number(v))
	case how == formatPort && len(v) == 4:
		return portString(uint32(number(v)))
	case len(v) <= 8:
		if number(v) == 0 {
			return "0"
		}
		return fmt.Sprintf("%#x", number(v))
	}
	return "0x" + hex.EncodeToString([]byte(v))
}

// Match is the fields that a frame must have, all of them. None matches every frame.
type Match []Field

// Get returns the match's first field of the id.
func (m Match) Get(id FieldID) (Field, bool) {
	for _, f := range m {
		if f.id == id {
			return f, true
		}
	}
	return Field{}, false
}

// String writes the match as ovs-ofctl does: fields joined by commas.
func (m Match) String() string {
	s := make([]string, len(m))
	for i, f := range m {
		s[i] = f.String()
	}
	return strings.Join(s, ",")
}

// decodeField reads an OXM TLV.
func decodeField(d *decoder) Field {
	start := d.off
	h := d.u32()
	id := FieldID(h&^0x100) << 32
	n := int(h & 0xff)
	if id.class() == classExperimenter {
		id |= FieldID(d.u32())
		n -= 4
	}
	if !d.ok() {
		return Field{}
	}
	if n < 1 {
		d.off = start
		d.failf("OXM header %#08x: no value", h)
		return Field{}
	}
	if h&0x100 == 0 {
		return Field{id: id, value: string(d.take(n))}
	}
	if n%2 != 0 {
		d.off = start
		d.failf("OXM header %#08x: value and mask have different lengths", h)
		return Field{}
	}
	// From now on the header's length is the value's alone.
	id -= FieldID(n/2) << 32
	value := d.take(n / 2)
	return NewField(id, value, d.take(n/2))
}

// encode writes an OXM TLV.
func (f Field) encode(e *encoder) {
	if len(f.value) == 0 || len(f.value) != f.id.size() || f.mask != "" && len(f.mask) != len(f.value) {
		e.failf("field %s wants %d bytes, its value has %d and its mask %d", f.id, f.id.size(), len(f.value), len(f.mask))
		return
	}
	h := uint32(f.id >> 32)
	if f.mask != "" {
		if h&0xff+uint32(len(f.mask)) > 0xff {
			e.failf("field %s: value and mask have more than 255 bytes", f.id)
			return
		}
		h += 0x100 + uint32(len(f.mask))
	}
	e.u32(h)
	if f.id.class() == classExperimenter {
		e.u32(uint32(f.id))
	}
	e.str(f.value)
	e.str(f.mask)
}

// decodeFieldID reads an OXM header that stands for the field itself, as in a copy.
func decodeFieldID(d *decoder) FieldID {
	id := FieldID(d.u32()) << 32
	if id.class() == classExperimenter {
		id |= FieldID(d.u32())
	}
	return id
}

func (id FieldID) encode(e *encoder) {
	e.u32(uint32(id >> 32))
	if id.class() == classExperimenter {
		e.u32(uint32(id))
	}
}

// decodeFields reads OXM TLVs to the end of the section.
func decodeFields(d *decoder) Match {
	var m Match
	for d.more() {
		f := decodeField(d)
		if !d.ok() {
			return nil
		}
		m = append(m, splitRegisters(f)...)
	}
	return m
}

// splitRegisters makes of a 64-bit register the 32-bit registers it consists
// of. Open vSwitch reports matches on registers in pairs whatever was asked of
// it, with a mask that covers half if only one of the two is matched.
func splitRegisters(f Field) []Field {
	if f.id.class() != classRegisters || f.id.size() != 8 || 2*f.id.number()+1 >= registers {
		return []Field{f}
	}
	mask := f.Mask()
	if mask == nil {
		mask = bytes.Repeat([]byte{0xff}, 8)
	}
	var out []Field
	for half := range 2 {
		if m := mask[4*half : 4*half+4]; binary.BigEndian.Uint32(m) != 0 {
			out = append(out, NewField(FieldReg(2*f.id.number()+half), f.Value()[4*half:4*half+4], m))
		}
	}
	return out
}

// decodeMatch reads a match with its header and padding (§7.2.3.1).
func decodeMatch(d *decoder) Match {
	typ, m := d.tlv("match", 4)
	if d.ok() && typ != 1 {
		d.failf("match type %d, only 1 (OXM) is known", typ)
	}
	n := 4 + len(m.b)
	fields := decodeFields(m)
	d.skip(padding(n))
	return fields
}

func (m Match) encode(e *encoder) {
	e.in("match", func() {
		start := len(e.b)
		e.tlv(1, func() {
			for _, f := range m {
				f.encode(e)
			}
		})
		e.pad(start)
	})
}
