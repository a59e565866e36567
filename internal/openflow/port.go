package openflow

import (
	"fmt"
	"net"
	"strings"
	"time"
)

// Ports with a meaning of their own (§7.2.2.1); ports of a switch are numbered 1..[PortMax].
const (
	PortMax        uint32 = 0xffffff00
	PortInPort     uint32 = 0xfffffff8 // back to where the frame came from
	PortTable      uint32 = 0xfffffff9 // to the first table; in a packet-out only
	PortNormal     uint32 = 0xfffffffa // to the switch's own MAC learning
	PortFlood      uint32 = 0xfffffffb // to all ports but the ingress and those with flooding off
	PortAll        uint32 = 0xfffffffc // to all ports but the ingress
	PortController uint32 = 0xfffffffd // to the controller as a packet-in
	PortLocal      uint32 = 0xfffffffe // to the bridge's own interface on the host
	PortAny        uint32 = 0xffffffff // in requests: whatever the port
)

// GroupAny in requests: whatever the group.
const GroupAny uint32 = 0xffffffff

func portString(p uint32) string {
	switch p {
	case PortInPort:
		return "IN_PORT"
	case PortTable:
		return "TABLE"
	case PortNormal:
		return "NORMAL"
	case PortFlood:
		return "FLOOD"
	case PortAll:
		return "ALL"
	case PortController:
		return "CONTROLLER"
	case PortLocal:
		return "LOCAL"
	case PortAny:
		return "ANY"
	}
	return fmt.Sprint(p)
}

// Open vSwitch's extensions have 16-bit port numbers, with the ports that have a
// meaning of their own at the upper end.
func shortPort(e *encoder, p uint32) uint16 {
	if p > 0xfeff && p < PortMax {
		e.failf("port %d does not fit the 16-bit port numbers of this action", p)
	}
	return uint16(p)
}

func longPort(p uint16) uint32 {
	if p >= 0xff00 {
		return 0xffff0000 | uint32(p)
	}
	return uint32(p)
}

// Bits of PortDesc.Config and PortDesc.State (§7.2.1.1).
const (
	ConfigPortDown   uint32 = 1 << 0 // administratively down
	ConfigNoReceive  uint32 = 1 << 2
	ConfigNoForward  uint32 = 1 << 5
	ConfigNoPacketIn uint32 = 1 << 6

	StateLinkDown uint32 = 1 << 0 // no carrier
	StateBlocked  uint32 = 1 << 1
	StateLive     uint32 = 1 << 2
)

// PortDesc describes a port (§7.2.1).
type PortDesc struct {
	Port    uint32
	Address net.HardwareAddr
	Name    string // at most 15 bytes
	Config  uint32 // Config... bits
	State   uint32 // State... bits
	// Speeds in kbit/s; 0 if the switch does not tell.
	CurrentSpeed, MaxSpeed uint32
}

func (p PortDesc) String() string {
	s := fmt.Sprintf("%s(%s): addr:%s", portString(p.Port), p.Name, p.Address)
	if p.Config&ConfigPortDown != 0 {
		s += " PORT_DOWN"
	}
	if p.State&StateLinkDown != 0 {
		s += " LINK_DOWN"
	}
	return s
}

func decodePortDesc(d *decoder) PortDesc {
	var p PortDesc
	p.Port = d.u32()
	n := int(d.u16())
	if d.ok() && n < 40 {
		d.off -= 2
		d.failf("port length %d, at least 40 wanted", n)
	}
	d = d.sub(n-6, "port")
	d.skip(2)
	p.Address = net.HardwareAddr(d.take(6))
	d.skip(2)
	name, _, _ := strings.Cut(string(d.take(16)), "\x00")
	p.Name = name[:min(len(name), 15)]
	p.Config, p.State = d.u32(), d.u32()
	for d.more() {
		typ, prop := d.property("property")
		if typ != 0 { // not the Ethernet property
			continue
		}
		prop.skip(4 + 4*4) // padding; feature bits that no virtual port has
		p.CurrentSpeed, p.MaxSpeed = prop.u32(), prop.u32()
	}
	return p
}

func (p PortDesc) encode(e *encoder) {
	start := len(e.b)
	e.u32(p.Port)
	e.u16(0)
	e.zero(2)
	if len(p.Address) != 6 {
		e.failf("port %d: address of %d bytes", p.Port, len(p.Address))
		return
	}
	e.bytes(p.Address)
	e.zero(2)
	e.fixed(p.Name, 16)
	e.u32(p.Config)
	e.u32(p.State)
	e.property(0, func() {
		e.zero(4 + 4*4)
		e.u32(p.CurrentSpeed)
		e.u32(p.MaxSpeed)
	})
	e.length(start+4, start)
}

// Reasons of a [PortStatus].
const (
	PortAdded    uint8 = 0
	PortDeleted  uint8 = 1
	PortModified uint8 = 2
)

// PortStatus tells that a port came, went or changed (§7.4.3).
type PortStatus struct {
	Reason uint8
	Desc   PortDesc
}

func (*PortStatus) messageType() uint8 { return typePortStatus }

func (m *PortStatus) encode(e *encoder) {
	e.u8(m.Reason)
	e.zero(7)
	m.Desc.encode(e)
}

func decodePortStatus(d *decoder) *PortStatus {
	m := &PortStatus{Reason: d.u8()}
	d.skip(7)
	m.Desc = decodePortDesc(d)
	return m
}

// PortDescRequest asks for the ports' descriptions (§7.3.5.7).
type PortDescRequest struct {
	Port uint32 // PortAny for all
}

func (*PortDescRequest) messageType() uint8 { return typeMultipartRequest }

func (m *PortDescRequest) encode(e *encoder) {
	encodeMultipart(e, multipartPortDesc, false)
	e.u32(m.Port)
	e.zero(4)
}

// PortDescReply is one part of the answer to a [PortDescRequest].
type PortDescReply struct {
	More  bool
	Ports []PortDesc
}

func (*PortDescReply) messageType() uint8 { return typeMultipartReply }

func (m *PortDescReply) encode(e *encoder) {
	encodeMultipart(e, multipartPortDesc, m.More)
	for _, p := range m.Ports {
		p.encode(e)
	}
}

func decodePortDescReply(d *decoder, more bool) *PortDescReply {
	m := &PortDescReply{More: more}
	for d.more() {
		m.Ports = append(m.Ports, decodePortDesc(d))
	}
	return m
}

// PortStatsRequest asks for the ports' counters (§7.3.5.6).
type PortStatsRequest struct {
	Port uint32 // PortAny for all
}

func (*PortStatsRequest) messageType() uint8 { return typeMultipartRequest }

func (m *PortStatsRequest) encode(e *encoder) {
	encodeMultipart(e, multipartPortStats, false)
	e.u32(m.Port)
	e.zero(4)
}

// PortStats is a port's counters. One that the switch does not keep is all ones.
type PortStats struct {
	Port                 uint32
	Duration             time.Duration // since the port was added
	RxPackets, TxPackets uint64
	RxBytes, TxBytes     uint64
	RxDropped, TxDropped uint64
	RxErrors, TxErrors   uint64
}

// PortStatsReply is one part of the answer to a [PortStatsRequest].
type PortStatsReply struct {
	More  bool
	Ports []PortStats
}

func (*PortStatsReply) messageType() uint8 { return typeMultipartReply }

func (m *PortStatsReply) encode(e *encoder) {
	encodeMultipart(e, multipartPortStats, m.More)
	for _, p := range m.Ports {
		start := len(e.b)
		e.u16(0)
		e.zero(2)
		e.u32(p.Port)
		encodeDuration(e, p.Duration)
		for _, v := range [...]uint64{
			p.RxPackets, p.TxPackets, p.RxBytes, p.TxBytes, p.RxDropped, p.TxDropped, p.RxErrors, p.TxErrors,
		} {
			e.u64(v)
		}
		e.length(start, start)
	}
}

func decodePortStatsReply(d *decoder, more bool) *PortStatsReply {
	m := &PortStatsReply{More: more}
	for d.more() {
		n := int(d.u16())
		if d.ok() && n < 80 {
			d.off -= 2
			d.failf("port statistics length %d, at least 80 wanted", n)
		}
		s := d.sub(n-2, "port")
		s.skip(2)
		p := PortStats{Port: s.u32(), Duration: decodeDuration(s)}
		for _, v := range [...]*uint64{
			&p.RxPackets, &p.TxPackets, &p.RxBytes, &p.TxBytes, &p.RxDropped, &p.TxDropped, &p.RxErrors, &p.TxErrors,
		} {
			*v = s.u64()
		}
		m.Ports = append(m.Ports, p) // properties of physical ports follow; none is of use here
	}
	return m
}

// decodeDuration reads seconds:32 nanoseconds:32.
func decodeDuration(d *decoder) time.Duration {
	s, ns := d.u32(), d.u32()
	return time.Duration(s)*time.Second + time.Duration(ns)
}

func encodeDuration(e *encoder, t time.Duration) {
	e.u32(uint32(t / time.Second))
	e.u32(uint32(t % time.Second))
}
