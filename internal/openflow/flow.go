package openflow

import (
	"fmt"
	"strings"
	"time"
)

// TableAll in requests and deletions: every table.
const TableAll uint8 = 0xff

// FlowModCommand says what a [FlowMod] does (§7.3.4.2).
type FlowModCommand uint8

// The commands of a flow mod.
const (
	FlowAdd          FlowModCommand = 0 // replaces an entry with the same table, priority and match, and counts on where that was
	FlowModify       FlowModCommand = 1 // instructions of all entries that the match covers
	FlowModifyStrict FlowModCommand = 2 // instructions of the one entry with that priority and match
	FlowDelete       FlowModCommand = 3 // all entries that the match covers
	FlowDeleteStrict FlowModCommand = 4 // the one entry with that priority and match
)

func (c FlowModCommand) String() string {
	names := [...]string{"add", "modify", "modify_strict", "delete", "delete_strict"}
	if int(c) < len(names) {
		return names[c]
	}
	return fmt.Sprintf("command(%d)", uint8(c))
}

// Bits of FlowMod.Flags.
const (
	FlagSendFlowRemoved uint16 = 1 << 0 // tell when the entry goes
	FlagCheckOverlap    uint16 = 1 << 1 // refuse to overlap an entry of the same priority
	FlagResetCounts     uint16 = 1 << 2 // set the counters of a replaced or modified entry to zero
	FlagNoPacketCounts  uint16 = 1 << 3
	FlagNoByteCounts    uint16 = 1 << 4
)

// noBuffer is OFP_NO_BUFFER. Switches have long stopped to keep frames for the
// controller (Open vSwitch 2.7), so this package has no buffer numbers.
const noBuffer = 0xffffffff

// FlowMod adds, changes or deletes flow entries (§7.3.4.2).
type FlowMod struct {
	Cookie      uint64
	CookieMask  uint64 // to modify and delete: only entries whose cookie equals Cookie in these bits
	Table       uint8  // or TableAll, to delete
	Command     FlowModCommand
	IdleTimeout uint16 // seconds without a frame after which the entry goes; 0 for never
	HardTimeout uint16 // seconds after which the entry goes; 0 for never
	Priority    uint16 // the highest that matches wins
	OutPort     uint32 // to delete: only entries that output there; 0 and PortAny for all
	OutGroup    uint32 // to delete: only entries that go through it; 0 and GroupAny for all
	Flags       uint16 // Flag... bits
	Importance  uint16 // the lowest goes first when a table is full and evicts
	Match       Match
	// Instructions to add and modify. None means that the frame is dropped.
	Instructions []Instruction
}

func (*FlowMod) messageType() uint8 { return typeFlowMod }

func (m *FlowMod) encode(e *encoder) {
	e.u64(m.Cookie)
	e.u64(m.CookieMask)
	e.u8(m.Table)
	e.u8(uint8(m.Command))
	e.u16(m.IdleTimeout)
	e.u16(m.HardTimeout)
	e.u16(m.Priority)
	e.u32(noBuffer)
	e.u32(anyIfZero(m.OutPort))
	e.u32(anyIfZero(m.OutGroup))
	e.u16(m.Flags)
	e.u16(m.Importance)
	m.Match.encode(e)
	encodeInstructions(e, m.Instructions)
}

func decodeFlowMod(d *decoder) *FlowMod {
	m := &FlowMod{Cookie: d.u64(), CookieMask: d.u64(), Table: d.u8(), Command: FlowModCommand(d.u8())}
	m.IdleTimeout, m.HardTimeout, m.Priority = d.u16(), d.u16(), d.u16()
	d.noBuffer()
	m.OutPort, m.OutGroup = anyIfZero(d.u32()), anyIfZero(d.u32())
	m.Flags, m.Importance = d.u16(), d.u16()
	m.Match = decodeMatch(d)
	m.Instructions = decodeInstructions(d)
	return m
}

func (d *decoder) noBuffer() {
	if b := d.u32(); d.ok() && b != noBuffer {
		d.failf("buffer %d: frames kept by the switch are not supported", b)
	}
}

// anyIfZero makes the zero value of a filter mean no filter. Port 0 does not
// exist, and nobody asks for group 0.
func anyIfZero(v uint32) uint32 {
	if v == 0 {
		return PortAny
	}
	return v
}

// String writes the flow mod as an argument of ovs-ofctl's command of that name:
//
//	cookie=0x1, table=20, priority=200,reg2=0x1,reg1=0x7 actions=output:1
//
// Of an addition the command itself is left out.
func (m FlowMod) String() string {
	var b strings.Builder
	if m.Command != FlowAdd {
		fmt.Fprintf(&b, "%s ", m.Command)
	}
	fmt.Fprintf(&b, "cookie=%#x", m.Cookie)
	if m.CookieMask != 0 {
		fmt.Fprintf(&b, "/%#x", m.CookieMask)
	}
	b.WriteString(", ")
	if m.Table != TableAll {
		fmt.Fprintf(&b, "table=%d, ", m.Table)
	}
	if m.OutPort != 0 && m.OutPort != PortAny {
		fmt.Fprintf(&b, "out_port=%s, ", portString(m.OutPort))
	}
	if m.OutGroup != 0 && m.OutGroup != GroupAny {
		fmt.Fprintf(&b, "out_group=%d, ", m.OutGroup)
	}
	writeEntry(&b, m.IdleTimeout, m.HardTimeout, m.Importance, m.Flags, m.Priority, m.Match)
	if m.Command != FlowDelete && m.Command != FlowDeleteStrict {
		b.WriteString(" actions=" + instructionsString(m.Instructions))
	}
	return b.String()
}

func writeEntry(b *strings.Builder, idle, hard, importance, flags, priority uint16, match Match) {
	if idle != 0 {
		fmt.Fprintf(b, "idle_timeout=%d, ", idle)
	}
	if hard != 0 {
		fmt.Fprintf(b, "hard_timeout=%d, ", hard)
	}
	for i, name := range [...]string{"send_flow_rem", "check_overlap", "reset_counts", "no_packet_counts", "no_byte_counts"} {
		if flags&(1<<i) != 0 {
			b.WriteString(name + " ")
		}
	}
	if importance != 0 {
		fmt.Fprintf(b, "importance=%d, ", importance)
	}
	fmt.Fprintf(b, "priority=%d", priority)
	if len(match) > 0 {
		b.WriteString("," + match.String())
	}
}

// FlowStatsRequest asks for flow entries with their counters (OFPMP_FLOW_DESC,
// §7.3.5.2). The zero value asks for table 0.
type FlowStatsRequest struct {
	Table      uint8  // or TableAll
	OutPort    uint32 // only entries that output there; 0 and PortAny for all
	OutGroup   uint32 // only entries that go through it; 0 and GroupAny for all
	Cookie     uint64
	CookieMask uint64 // only entries whose cookie equals Cookie in these bits
	Match      Match  // only entries whose match it covers
}

func (*FlowStatsRequest) messageType() uint8 { return typeMultipartRequest }

func (m *FlowStatsRequest) encode(e *encoder) {
	encodeMultipart(e, multipartFlowDesc, false)
	m.encodeBody(e)
}

func (m *FlowStatsRequest) encodeBody(e *encoder) {
	e.u8(m.Table)
	e.zero(3)
	e.u32(anyIfZero(m.OutPort))
	e.u32(anyIfZero(m.OutGroup))
	e.zero(4)
	e.u64(m.Cookie)
	e.u64(m.CookieMask)
	m.Match.encode(e)
}

func decodeFlowStatsRequest(d *decoder) *FlowStatsRequest {
	m := &FlowStatsRequest{Table: d.u8()}
	d.skip(3)
	m.OutPort, m.OutGroup = anyIfZero(d.u32()), anyIfZero(d.u32())
	d.skip(4)
	m.Cookie, m.CookieMask = d.u64(), d.u64()
	m.Match = decodeMatch(d)
	return m
}

// FlowStats is a flow entry as the switch has it, with its counters.
type FlowStats struct {
	Table        uint8
	Priority     uint16
	Cookie       uint64
	Packets      uint64        // frames that matched
	Bytes        uint64        // their lengths, Ethernet headers included
	Duration     time.Duration // since the entry was added
	IdleTime     time.Duration // since a frame matched, in whole seconds
	IdleTimeout  uint16        // seconds; 0 for none
	HardTimeout  uint16        // seconds; 0 for none
	Flags        uint16
	Importance   uint16
	Match        Match
	Instructions []Instruction
}

// FlowMod returns the flow mod that would add the entry.
func (s FlowStats) FlowMod() FlowMod {
	return FlowMod{
		Cookie: s.Cookie, Table: s.Table, Command: FlowAdd, IdleTimeout: s.IdleTimeout, HardTimeout: s.HardTimeout,
		Priority: s.Priority, Flags: s.Flags, Importance: s.Importance, Match: s.Match, Instructions: s.Instructions,
	}
}

// String writes the entry as ovs-ofctl dump-flows does.
func (s FlowStats) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "cookie=%#x, duration=%.3fs, table=%d, n_packets=%d, n_bytes=%d, idle_age=%d, ",
		s.Cookie, s.Duration.Seconds(), s.Table, s.Packets, s.Bytes, s.IdleTime/time.Second)
	writeEntry(&b, s.IdleTimeout, s.HardTimeout, s.Importance, s.Flags, s.Priority, s.Match)
	return b.String() + " actions=" + instructionsString(s.Instructions)
}

// FlowStatsReply is one part of the answer to a [FlowStatsRequest].
type FlowStatsReply struct {
	More  bool
	Flows []FlowStats
}

func (*FlowStatsReply) messageType() uint8 { return typeMultipartReply }

func (m *FlowStatsReply) encode(e *encoder) {
	encodeMultipart(e, multipartFlowDesc, m.More)
	for _, f := range m.Flows {
		start := len(e.b)
		e.u16(0)
		e.zero(2)
		e.u8(f.Table)
		e.zero(1)
		e.u16(f.Priority)
		e.u16(f.IdleTimeout)
		e.u16(f.HardTimeout)
		e.u16(f.Flags)
		e.u16(f.Importance)
		e.u64(f.Cookie)
		f.Match.encode(e)
		counters{duration: f.Duration, idle: f.IdleTime, packets: f.Packets, bytes: f.Bytes}.encode(e)
		encodeInstructions(e, f.Instructions)
		e.length(start, start)
	}
}

func decodeFlowStatsReply(d *decoder, more bool) *FlowStatsReply {
	m := &FlowStatsReply{More: more}
	for d.more() {
		n := int(d.u16())
		if d.ok() && n < 24 {
			d.off -= 2
			d.failf("flow entry length %d, at least 24 wanted", n)
		}
		s := d.sub(n-2, "flow entry")
		s.skip(2)
		f := FlowStats{Table: s.u8()}
		s.skip(1)
		f.Priority, f.IdleTimeout, f.HardTimeout, f.Flags, f.Importance = s.u16(), s.u16(), s.u16(), s.u16(), s.u16()
		f.Cookie = s.u64()
		f.Match = decodeMatch(s)
		c := decodeCounters(s)
		f.Duration, f.IdleTime, f.Packets, f.Bytes = c.duration, c.idle, c.packets, c.bytes
		f.Instructions = decodeInstructions(s)
		m.Flows = append(m.Flows, f)
	}
	return m
}

// counters is what OXS TLVs say of one flow entry or of several (§7.2.4).
type counters struct {
	duration, idle time.Duration
	flows          uint32
	packets, bytes uint64
}

// The OXS fields of class 0x8002.
const (
	oxsClass    = 0x8002
	oxsDuration = 0
	oxsIdle     = 1
	oxsFlows    = 3
	oxsPackets  = 4
	oxsBytes    = 5
)

func decodeCounters(d *decoder) counters {
	d.skip(2)
	n := int(d.u16())
	if d.ok() && n < 4 {
		d.off -= 2
		d.failf("counters length %d, at least 4 wanted", n)
	}
	s := d.sub(n-4, "counters")
	d.skip(padding(n))
	var c counters
	for s.more() {
		class, field, size := s.u16(), s.u8()>>1, int(s.u8())
		v := s.sub(size, "value")
		if class != oxsClass {
			continue
		}
		switch field {
		case oxsDuration:
			c.duration = decodeDuration(v)
		case oxsIdle:
			c.idle = decodeDuration(v)
		case oxsFlows:
			c.flows = v.u32()
		case oxsPackets:
			c.packets = v.u64()
		case oxsBytes:
			c.bytes = v.u64()
		}
	}
	return c
}

func (c counters) encode(e *encoder) {
	start := len(e.b)
	header := func(field, size uint8) { e.u16(oxsClass); e.u8(field << 1); e.u8(size) }
	e.u16(0)
	e.u16(0)
	header(oxsDuration, 8)
	encodeDuration(e, c.duration)
	header(oxsIdle, 8)
	encodeDuration(e, c.idle)
	header(oxsFlows, 4)
	e.u32(c.flows)
	header(oxsPackets, 8)
	e.u64(c.packets)
	header(oxsBytes, 8)
	e.u64(c.bytes)
	e.length(start+2, start)
	e.pad(start)
}

// AggregateStatsRequest asks for the sums over the flow entries that a
// [FlowStatsRequest] would list (§7.3.5.4).
type AggregateStatsRequest struct{ FlowStatsRequest }

func (*AggregateStatsRequest) messageType() uint8 { return typeMultipartRequest }

func (m *AggregateStatsRequest) encode(e *encoder) {
	encodeMultipart(e, multipartAggregate, false)
	m.encodeBody(e)
}

// AggregateStats answers an [AggregateStatsRequest].
type AggregateStats struct {
	Flows          uint32
	Packets, Bytes uint64
}

func (*AggregateStats) messageType() uint8 { return typeMultipartReply }

func (m *AggregateStats) encode(e *encoder) {
	encodeMultipart(e, multipartAggregate, false)
	counters{flows: m.Flows, packets: m.Packets, bytes: m.Bytes}.encode(e)
}

func decodeAggregateStats(d *decoder) *AggregateStats {
	c := decodeCounters(d)
	return &AggregateStats{Flows: c.flows, Packets: c.packets, Bytes: c.bytes}
}

// Reasons of a [FlowRemoved].
const (
	RemovedIdle   uint8 = 0
	RemovedHard   uint8 = 1
	RemovedDelete uint8 = 2
)

// FlowRemoved tells that an entry with [FlagSendFlowRemoved] is gone (§7.4.2).
type FlowRemoved struct {
	Table          uint8
	Reason         uint8 // Removed...
	Priority       uint16
	IdleTimeout    uint16
	HardTimeout    uint16
	Cookie         uint64
	Match          Match
	Duration       time.Duration
	Packets, Bytes uint64
}

func (*FlowRemoved) messageType() uint8 { return typeFlowRemoved }

func (m *FlowRemoved) encode(e *encoder) {
	e.u8(m.Table)
	e.u8(m.Reason)
	e.u16(m.Priority)
	e.u16(m.IdleTimeout)
	e.u16(m.HardTimeout)
	e.u64(m.Cookie)
	m.Match.encode(e)
	counters{duration: m.Duration, packets: m.Packets, bytes: m.Bytes}.encode(e)
}

func decodeFlowRemoved(d *decoder) *FlowRemoved {
	m := &FlowRemoved{Table: d.u8(), Reason: d.u8(), Priority: d.u16(), IdleTimeout: d.u16(), HardTimeout: d.u16()}
	m.Cookie = d.u64()
	m.Match = decodeMatch(d)
	c := decodeCounters(d)
	m.Duration, m.Packets, m.Bytes = c.duration, c.packets, c.bytes
	return m
}
