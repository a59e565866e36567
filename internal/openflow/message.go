package openflow

import (
	"encoding/binary"
	"fmt"
)

// Message is one OpenFlow message: a pointer to one of this package's message types.
type Message interface {
	messageType() uint8
	encode(*encoder) // what follows the header
}

// Message types (§7.1.1).
const (
	typeHello            = 0
	typeError            = 1
	typeEchoRequest      = 2
	typeEchoReply        = 3
	typeExperimenter     = 4
	typeFeaturesRequest  = 5
	typeFeaturesReply    = 6
	typeSetConfig        = 9
	typePacketIn         = 10
	typeFlowRemoved      = 11
	typePortStatus       = 12
	typePacketOut        = 13
	typeFlowMod          = 14
	typeMultipartRequest = 18
	typeMultipartReply   = 19
	typeBarrierRequest   = 20
	typeBarrierReply     = 21
	typeRoleRequest      = 24
	typeRoleReply        = 25
	typeSetAsync         = 28
	typeBundleControl    = 33
	typeBundleAdd        = 34
)

// typeNames are the names of §7.1.1, for errors.
var typeNames = [...]string{
	"hello", "error", "echo-request", "echo-reply", "experimenter", "features-request", "features-reply",
	"get-config-request", "get-config-reply", "set-config", "packet-in", "flow-removed", "port-status", "packet-out",
	"flow-mod", "group-mod", "port-mod", "table-mod", "multipart-request", "multipart-reply", "barrier-request",
	"barrier-reply", "", "", "role-request", "role-reply", "get-async-request", "get-async-reply", "set-async",
	"meter-mod", "role-status", "table-status", "request-forward", "bundle-control", "bundle-add", "controller-status",
}

func typeName(t uint8) string {
	if int(t) < len(typeNames) && typeNames[t] != "" {
		return typeNames[t]
	}
	return fmt.Sprintf("message type %d", t)
}

func messageName(m Message) string { return typeName(m.messageType()) }

// Types of multipart messages (§7.3.5), and of messages of [experimenterNicira].
const (
	multipartDesc      = 0
	multipartFlowDesc  = 1
	multipartAggregate = 2
	multipartPortStats = 4
	multipartPortDesc  = 13

	multipartMore = 1 << 0 // further parts follow

	nxtSetPacketInFormat = 16
	nxtPacketIn2         = 30
)

// headerSize is the length of what every message begins with.
const headerSize = 8

type header struct {
	version, typ uint8
	length       int
	xid          uint32
}

func decodeHeader(d *decoder) header {
	h := header{version: d.u8(), typ: d.u8(), length: int(d.u16()), xid: d.u32()}
	if d.ok() && h.length < headerSize {
		d.off -= 6
		d.failf("length %d, at least %d wanted", h.length, headerSize)
	}
	return h
}

// Unknown is a message that this package has no type for.
type Unknown struct {
	Type uint8
	Body []byte // what follows the header
}

func (m *Unknown) messageType() uint8 { return m.Type }
func (m *Unknown) encode(e *encoder)  { e.bytes(m.Body) }

// Marshal writes a message. It fails with an [Error] if the message has no form
// on the wire: a field's value of a wrong length, or more than 65535 bytes.
func Marshal(xid uint32, m Message) ([]byte, error) {
	e := &encoder{section: messageName(m)}
	e.u8(Version)
	e.u8(m.messageType())
	e.u16(0)
	e.u32(xid)
	m.encode(e)
	e.length(2, 0)
	if e.err != nil {
		return nil, e.err
	}
	return e.b, nil
}

// Unmarshal reads one message, which must be all of b. The message refers to b,
// which must not be changed afterwards. It fails with an [Error].
func Unmarshal(b []byte) (xid uint32, m Message, err error) {
	d := newDecoder(b, "header")
	h := decodeHeader(d)
	if d.ok() && h.length != len(b) {
		d.off = 2
		d.failf("length %d in a message of %d bytes", h.length, len(b))
	}
	// A switch of another version says so in its hello, or in an error in answer to ours.
	if d.ok() && h.version != Version && h.typ != typeHello && h.typ != typeError {
		d.off = 0
		d.failf("%s of %s, which is not what was agreed on", typeName(h.typ), versionName(h.version))
	}
	d.section = typeName(h.typ)
	m = decodeBody(d, h)
	if !d.ok() {
		return 0, nil, *d.err
	}
	return h.xid, m, nil
}

// decodeBody reads what follows the header. After an error its result means nothing.
func decodeBody(d *decoder, h header) Message {
	switch h.typ {
	case typeHello:
		return decodeHello(d, h.version)
	case typeError:
		return decodeErrorMessage(d, h.xid)
	case typeEchoRequest:
		return &EchoRequest{Data: d.rest()}
	case typeEchoReply:
		return &EchoReply{Data: d.rest()}
	case typeExperimenter:
		return decodeExperimenter(d)
	case typeFeaturesRequest:
		return &FeaturesRequest{}
	case typeFeaturesReply:
		return decodeFeaturesReply(d)
	case typeSetConfig:
		return &SetConfig{Flags: d.u16(), MissSendLen: d.u16()}
	case typePacketIn:
		return decodePacketIn(d)
	case typeFlowRemoved:
		return decodeFlowRemoved(d)
	case typePortStatus:
		return decodePortStatus(d)
	case typePacketOut:
		return decodePacketOut(d)
	case typeFlowMod:
		return decodeFlowMod(d)
	case typeMultipartRequest, typeMultipartReply:
		return decodeMultipart(d, h.typ)
	case typeBarrierRequest:
		return &BarrierRequest{}
	case typeBarrierReply:
		return &BarrierReply{}
	case typeRoleRequest:
		role, generation := decodeRole(d)
		return &RoleRequest{Role: role, Generation: generation}
	case typeRoleReply:
		role, generation := decodeRole(d)
		return &RoleReply{Role: role, Generation: generation}
	case typeSetAsync:
		return decodeSetAsync(d)
	case typeBundleControl:
		return decodeBundleControl(d)
	case typeBundleAdd:
		return decodeBundleAdd(d, h.xid)
	}
	return &Unknown{Type: h.typ, Body: d.rest()}
}

func decodeExperimenter(d *decoder) Message {
	if len(d.b) >= 8 && binary.BigEndian.Uint32(d.b) == experimenterNicira {
		switch binary.BigEndian.Uint32(d.b[4:]) {
		case nxtPacketIn2:
			d.skip(8)
			return decodePacketIn2(d)
		case nxtSetPacketInFormat:
			d.skip(8)
			return &PacketInFormat{Format: d.u32()}
		}
	}
	return &Unknown{Type: typeExperimenter, Body: d.rest()}
}

func decodeMultipart(d *decoder, typ uint8) Message {
	whole := *d
	kind, flags := d.u16(), d.u16()
	d.skip(4)
	more := flags&multipartMore != 0
	if typ == typeMultipartRequest {
		switch kind {
		case multipartDesc:
			return &DescRequest{}
		case multipartFlowDesc:
			return decodeFlowStatsRequest(d)
		case multipartAggregate:
			return &AggregateStatsRequest{*decodeFlowStatsRequest(d)}
		case multipartPortStats:
			return &PortStatsRequest{Port: d.u32()}
		case multipartPortDesc:
			return &PortDescRequest{Port: d.u32()}
		}
	} else {
		switch kind {
		case multipartDesc:
			return decodeDesc(d)
		case multipartFlowDesc:
			return decodeFlowStatsReply(d, more)
		case multipartAggregate:
			return decodeAggregateStats(d)
		case multipartPortStats:
			return decodePortStatsReply(d, more)
		case multipartPortDesc:
			return decodePortDescReply(d, more)
		}
	}
	if d.ok() {
		*d = whole
	}
	return &Unknown{Type: typ, Body: d.rest()}
}

func encodeMultipart(e *encoder, kind uint16, more bool) {
	e.u16(kind)
	if more {
		e.u16(multipartMore)
	} else {
		e.u16(0)
	}
	e.zero(4)
}
