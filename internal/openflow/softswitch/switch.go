// Package softswitch is an OpenFlow switch in memory, for tests: it does what
// its flow entries say, frame by frame, without a datapath, a cache or a clock.
//
// It takes OpenFlow messages as bytes and gives bytes back, so what it executes
// is what goes over the wire to a real switch. It knows what Violin's tables are
// made of and no more: a match, an action or a message of another kind is an
// error, never a guess, and so is a frame for which the specification leaves
// open what happens (two entries of one priority match). Where Open vSwitch
// does more than the specification asks, or less, this switch does as Open
// vSwitch does, and says so.
package softswitch

import (
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"strings"

	"violin/internal/openflow"
)

// maxDepth is Open vSwitch's bound of resubmits within resubmits.
const maxDepth = 64

// Frame is a frame at a port. TunnelID is the key beside it if the port is a tunnel.
type Frame struct {
	Port     uint32
	TunnelID uint64
	Data     []byte
}

// Switch is one switch. It is not safe for concurrent use.
type Switch struct {
	tunnel map[uint32]bool // by port: it is one
	tables map[uint8][]*entry
	bundle map[uint32][]*openflow.FlowMod // those that are open
	in     func(message []byte)
	out    func(Frame)
}

type entry struct {
	openflow.FlowMod
	packets, bytes uint64
}

// New returns a switch without ports or entries. Messages of its own accord
// (packet-ins, flow-removed) go to the controller, frames that leave to out, both
// in the order in which they come about.
func New(controller func(message []byte), out func(Frame)) *Switch {
	return &Switch{
		tunnel: map[uint32]bool{}, tables: map[uint8][]*entry{}, bundle: map[uint32][]*openflow.FlowMod{},
		in: controller, out: out,
	}
}

// AddPort gives the switch a port; at a tunnel's port frames have a key.
func (s *Switch) AddPort(number uint32, tunnel bool) { s.tunnel[number] = tunnel }

// Handle takes a message of the controller's and returns the answer, nil if
// there is none. After an error nothing has changed.
func (s *Switch) Handle(message []byte) (reply []byte, err error) {
	xid, m, err := openflow.Unmarshal(message)
	if err != nil {
		return nil, fmt.Errorf("softswitch: %w", err)
	}
	answer, err := s.handle(m)
	if err != nil {
		return nil, fmt.Errorf("softswitch: %w", err)
	}
	if answer == nil {
		return nil, nil
	}
	return openflow.Marshal(xid, answer)
}

func (s *Switch) handle(m openflow.Message) (openflow.Message, error) {
	switch m := m.(type) {
	case *openflow.BarrierRequest:
		return &openflow.BarrierReply{}, nil // everything is done when Handle returns
	case *openflow.FlowMod:
		return nil, s.commit([]*openflow.FlowMod{m})
	case *openflow.PacketOut:
		return nil, s.packetOut(m)
	case *openflow.FlowStatsRequest:
		return s.stats(m)
	case *openflow.BundleControl:
		return s.control(m)
	case *openflow.BundleAdd:
		mod, ok := m.Message.(*openflow.FlowMod)
		if _, open := s.bundle[m.Bundle]; !open || !ok {
			return nil, fmt.Errorf("bundle %d: add %T: only flow mods to an open bundle are known", m.Bundle, m.Message)
		}
		s.bundle[m.Bundle] = append(s.bundle[m.Bundle], mod)
		return nil, nil
	}
	return nil, fmt.Errorf("message %T is not known", m)
}

func (s *Switch) control(m *openflow.BundleControl) (openflow.Message, error) {
	const flags = openflow.BundleAtomic | openflow.BundleOrdered
	mods, open := s.bundle[m.Bundle]
	if m.Flags != flags || open != (m.Command != openflow.BundleOpen) {
		return nil, fmt.Errorf("bundle %d (open: %t): command %d, flags %#x", m.Bundle, open, m.Command, m.Flags)
	}
	switch m.Command {
	case openflow.BundleOpen:
		s.bundle[m.Bundle] = []*openflow.FlowMod{}
	case openflow.BundleDiscard:
		delete(s.bundle, m.Bundle)
	case openflow.BundleCommit:
		delete(s.bundle, m.Bundle)
		if err := s.commit(mods); err != nil {
			return nil, fmt.Errorf("bundle %d: %w", m.Bundle, err)
		}
	default:
		return nil, fmt.Errorf("bundle %d: command %d is not known", m.Bundle, m.Command)
	}
	return &openflow.BundleControl{Bundle: m.Bundle, Command: m.Command + 1, Flags: m.Flags}, nil
}

// commit does all flow mods, or none.
func (s *Switch) commit(mods []*openflow.FlowMod) error {
	tables := map[uint8][]*entry{}
	for t, entries := range s.tables {
		tables[t] = slices.Clone(entries)
	}
	var removed [][]byte
	for _, m := range mods {
		if err := s.check(m); err != nil {
			return fmt.Errorf("%s: %w", m, err)
		}
		es := tables[m.Table]
		i := slices.IndexFunc(es, func(e *entry) bool { return e.Priority == m.Priority && sameMatch(e.Match, m.Match) })
		switch {
		case m.Command == openflow.FlowDeleteStrict && i >= 0:
			if es[i].Flags&openflow.FlagSendFlowRemoved != 0 {
				b, err := openflow.Marshal(0, es[i].removed())
				if err != nil {
					return fmt.Errorf("%s: %w", m, err)
				}
				removed = append(removed, b)
			}
			tables[m.Table] = slices.Delete(es, i, i+1)
		case m.Command == openflow.FlowDeleteStrict:
		case i >= 0:
			// The place of another: nobody is told that that one is gone.
			e := &entry{FlowMod: *m}
			if m.Flags&openflow.FlagResetCounts == 0 {
				e.packets, e.bytes = es[i].packets, es[i].bytes
			}
			es[i] = e
		default:
			tables[m.Table] = append(es, &entry{FlowMod: *m})
		}
	}
	s.tables = tables
	for _, b := range removed {
		s.in(b)
	}
	return nil
}

func (e *entry) removed() *openflow.FlowRemoved {
	return &openflow.FlowRemoved{
		Table: e.Table, Reason: openflow.RemovedDelete, Priority: e.Priority, Cookie: e.Cookie, Match: e.Match,
		Packets: e.packets, Bytes: e.bytes,
	}
}

// sameMatch: the order of a match's fields carries no meaning.
func sameMatch(a, b openflow.Match) bool {
	if len(a) != len(b) {
		return false
	}
	return !slices.ContainsFunc(a, func(f openflow.Field) bool { return !slices.Contains(b, f) })
}

// check refuses what is not known.
func (s *Switch) check(m *openflow.FlowMod) error {
	const flags = openflow.FlagSendFlowRemoved | openflow.FlagResetCounts
	switch {
	case m.Command != openflow.FlowAdd && m.Command != openflow.FlowDeleteStrict:
		return fmt.Errorf("command %s is not known", m.Command)
	case m.Table == openflow.TableAll || m.CookieMask != 0 || m.IdleTimeout != 0 || m.HardTimeout != 0 || m.Importance != 0:
		return fmt.Errorf("all tables, cookie masks, timeouts and importance are not known")
	case m.OutPort != openflow.PortAny || m.OutGroup != openflow.GroupAny:
		return fmt.Errorf("deletion by port or group is not known")
	case m.Flags&^flags != 0:
		return fmt.Errorf("flags %#x are not known", m.Flags&^flags)
	}
	for i, f := range m.Match {
		if _, ok := (Frame{}).fields()[f.ID()]; !ok && !isRegister(f.ID()) || f.Mask() != nil {
			return fmt.Errorf("match on %s is not known", f)
		}
		if _, twice := m.Match[:i].Get(f.ID()); twice {
			return fmt.Errorf("match on %s twice", f.ID())
		}
	}
	for _, in := range m.Instructions {
		apply, ok := in.(openflow.ApplyActions)
		if !ok {
			return fmt.Errorf("instruction %s is not known", in)
		}
		if err := s.checkActions(apply.Actions); err != nil {
			return err
		}
	}
	return nil
}

func (s *Switch) checkActions(actions []openflow.Action) error {
	for _, a := range actions {
		ok := false
		switch a := a.(type) {
		case openflow.Output:
			_, port := s.tunnel[a.Port]
			ok = port && a.MaxLen == 0 || a.Port == openflow.PortController && a.MaxLen == openflow.ControllerNoBuffer
		case openflow.SetField:
			ok = writable(a.Field.ID()) && a.Field.Mask() == nil
		case openflow.CopyField:
			ok = writable(a.Src) && writable(a.Dst) && a.Bits > 0 &&
				int(a.SrcOffset+a.Bits) <= a.Src.Bits() && int(a.DstOffset+a.Bits) <= a.Dst.Bits()
		case openflow.Resubmit:
			ok = a.InPort == 0 && a.Table != openflow.TableAll
		}
		if !ok {
			return fmt.Errorf("action %s (%T) is not known, or not with these arguments", a, a)
		}
	}
	return nil
}

func isRegister(id openflow.FieldID) bool {
	for n := range 16 {
		if id == openflow.FieldReg(n) {
			return true
		}
	}
	return false
}

func writable(id openflow.FieldID) bool { return id == openflow.FieldTunnelID || isRegister(id) }

// fields are what an entry can match on. A register that is not set is 0.
type fields map[openflow.FieldID]uint64

func (f Frame) fields() fields {
	fs := fields{
		openflow.FieldInPort: uint64(f.Port), openflow.FieldTunnelID: f.TunnelID,
		openflow.FieldEthDst: 0, openflow.FieldEthSrc: 0,
	}
	if len(f.Data) >= 14 {
		fs[openflow.FieldEthDst] = binary.BigEndian.Uint64(f.Data) >> 16
		fs[openflow.FieldEthSrc] = binary.BigEndian.Uint64(f.Data[4:]) & (1<<48 - 1)
	}
	return fs
}

// Receive takes a frame that comes in at a port.
func (s *Switch) Receive(f Frame) error {
	tunnel, ok := s.tunnel[f.Port]
	switch {
	case !ok:
		return fmt.Errorf("softswitch: frame from port %d, which there is not", f.Port)
	case len(f.Data) < 14:
		return fmt.Errorf("softswitch: frame of %d bytes from port %d: no Ethernet header", len(f.Data), f.Port)
	case !tunnel && f.TunnelID != 0:
		return fmt.Errorf("softswitch: frame with tunnel id %#x from port %d, which is no tunnel", f.TunnelID, f.Port)
	}
	w := walk{s: s, fields: f.fields(), data: f.Data}
	if err := w.lookup(0, 0); err != nil {
		return fmt.Errorf("softswitch: frame from port %d: %w", f.Port, err)
	}
	return nil
}

// packetOut does actions to a frame of the controller's.
func (s *Switch) packetOut(m *openflow.PacketOut) error {
	if m.Buffer != 0 {
		return fmt.Errorf("packet-out of buffer %d, and the switch keeps no frames", m.Buffer)
	}
	if len(m.Match) != 0 {
		return fmt.Errorf("packet-out with %s is not known", m.Match)
	}
	if err := s.checkActions(m.Actions); err != nil {
		return fmt.Errorf("packet-out: %w", err)
	}
	w := walk{s: s, fields: Frame{Port: m.InPort, Data: m.Data}.fields(), data: m.Data}
	return w.apply(m.Actions, nil, 0)
}

// walk is one frame on its way through the tables.
type walk struct {
	s      *Switch
	fields fields
	data   []byte
}

// lookup does what the best entry of a table says; nothing if none matches.
func (w *walk) lookup(table uint8, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("table %d: more than %d resubmits within each other", table, maxDepth)
	}
	var best, other *entry
	for _, e := range w.s.tables[table] {
		switch {
		case best != nil && e.Priority < best.Priority || !w.matches(e.Match):
		case best != nil && e.Priority == best.Priority:
			other = e
		default:
			best, other = e, nil
		}
	}
	if best == nil {
		return nil
	}
	if other != nil {
		return fmt.Errorf("table %d: both %s and %s match", table, best.FlowMod, other.FlowMod)
	}
	best.packets++
	best.bytes += uint64(len(w.data))
	for _, in := range best.Instructions {
		if err := w.apply(in.(openflow.ApplyActions).Actions, best, depth); err != nil {
			return err
		}
	}
	return nil
}

func (w *walk) matches(m openflow.Match) bool {
	return !slices.ContainsFunc(m, func(f openflow.Field) bool { return w.fields[f.ID()] != f.Uint64() })
}

func (w *walk) apply(actions []openflow.Action, by *entry, depth int) error {
	for _, a := range actions {
		switch a := a.(type) {
		case openflow.Output:
			if err := w.output(a.Port, by); err != nil {
				return err
			}
		case openflow.SetField:
			w.fields[a.Field.ID()] = a.Field.Uint64()
		case openflow.CopyField:
			mask := uint64(1)<<a.Bits - 1
			bits := w.fields[a.Src] >> a.SrcOffset & mask
			w.fields[a.Dst] = w.fields[a.Dst]&^(mask<<a.DstOffset) | bits<<a.DstOffset
		case openflow.Resubmit:
			if err := w.lookup(a.Table, depth+1); err != nil {
				return err
			}
		default:
			return fmt.Errorf("action %T is not known", a)
		}
	}
	return nil
}

func (w *walk) output(port uint32, by *entry) error {
	if port == openflow.PortController {
		in := &openflow.PacketIn{Reason: openflow.ReasonAction, Cookie: ^uint64(0), Match: w.metadata(), Data: w.data, Length: len(w.data)}
		if by == nil {
			in.Reason = openflow.ReasonPacketOut
		} else {
			in.Table, in.Cookie = by.Table, by.Cookie
		}
		b, err := openflow.Marshal(0, in)
		if err != nil {
			return err
		}
		w.s.in(b)
		return nil
	}
	if uint64(port) == w.fields[openflow.FieldInPort] {
		return nil // a frame leaves by the port it came from only if IN_PORT is said (§5.6)
	}
	out := Frame{Port: port, Data: slices.Clone(w.data)}
	if w.s.tunnel[port] {
		out.TunnelID = w.fields[openflow.FieldTunnelID]
	}
	w.s.out(out)
	return nil
}

// metadata is what a packet-in says beside the frame: as from Open vSwitch,
// without what is zero.
func (w *walk) metadata() openflow.Match {
	m := openflow.Match{openflow.InPort(uint32(w.fields[openflow.FieldInPort]))}
	if id := w.fields[openflow.FieldTunnelID]; id != 0 {
		m = append(m, openflow.TunnelID(id))
	}
	for n := range 16 {
		if v := w.fields[openflow.FieldReg(n)]; v != 0 {
			m = append(m, openflow.Reg(n, uint32(v)))
		}
	}
	return m
}

// stats lists entries by table, falling priority and match.
func (s *Switch) stats(m *openflow.FlowStatsRequest) (openflow.Message, error) {
	if len(m.Match) != 0 || m.OutPort != openflow.PortAny || m.OutGroup != openflow.GroupAny {
		return nil, fmt.Errorf("flow statistics by match, port or group are not known")
	}
	reply := &openflow.FlowStatsReply{}
	for _, t := range slices.Sorted(maps.Keys(s.tables)) {
		if m.Table != openflow.TableAll && m.Table != t {
			continue
		}
		es := slices.Clone(s.tables[t])
		slices.SortFunc(es, func(a, b *entry) int {
			if a.Priority != b.Priority {
				return int(b.Priority) - int(a.Priority)
			}
			return strings.Compare(a.Match.String(), b.Match.String())
		})
		for _, e := range es {
			if (e.Cookie^m.Cookie)&m.CookieMask != 0 {
				continue
			}
			reply.Flows = append(reply.Flows, openflow.FlowStats{
				Table: e.Table, Priority: e.Priority, Cookie: e.Cookie, Packets: e.packets, Bytes: e.bytes,
				Flags: e.Flags, Match: e.Match, Instructions: e.Instructions,
			})
		}
	}
	return reply, nil
}
