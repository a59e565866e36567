package openflow

import (
	"encoding/hex"
	"fmt"
	"strings"
)

// Action is what is done to a frame: one of the types of this file.
type Action interface {
	// String writes the action as ovs-ofctl does.
	String() string
	encodeAction(*encoder)
}

// ControllerNoBuffer as a MaxLen sends the whole frame to the controller.
const ControllerNoBuffer uint16 = 0xffff

// Action types (§7.2.6), and the subtypes of experimenter [experimenterNicira].
const (
	actionOutput       = 0
	actionPushVLAN     = 17
	actionPopVLAN      = 18
	actionGroup        = 22
	actionSetField     = 25
	actionCopyField    = 28
	actionExperimenter = 0xffff

	nxResubmit      = 1
	nxResubmitTable = 14
	nxOutputReg     = 15
	nxController    = 20
	nxOutputReg2    = 32
	nxController2   = 37
	nxClone         = 42

	experimenterNicira = 0x00002320
)

// Properties of the action NXAST_CONTROLLER2.
const (
	controllerMaxLen   = 0
	controllerID       = 1
	controllerReason   = 2
	controllerUserData = 3
)

// maxActionDepth bounds clones within clones.
const maxActionDepth = 16

// Output sends the frame, as it is now, to a port.
type Output struct {
	Port   uint32
	MaxLen uint16 // with PortController: how many bytes of the frame; else 0
}

func (a Output) encodeAction(e *encoder) {
	e.paddedTLV(actionOutput, func() {
		e.u32(a.Port)
		e.u16(a.MaxLen)
		e.zero(6)
	})
}

func (a Output) String() string {
	switch {
	case a.Port == PortController:
		return fmt.Sprintf("CONTROLLER:%d", a.MaxLen)
	case a.Port >= PortMax:
		return portString(a.Port)
	}
	return fmt.Sprintf("output:%d", a.Port)
}

// OutputReg sends the frame to the port whose number stands in bits
// Offset..Offset+Bits-1 of a field (NXAST_OUTPUT_REG).
type OutputReg struct {
	Src    FieldID
	Offset uint16
	Bits   uint16 // 1..64
	MaxLen uint16 // if the port is PortController
}

func (a OutputReg) encodeAction(e *encoder) {
	if a.Bits < 1 || a.Bits > 64 || a.Offset > 0x3ff {
		e.failf("output by %s: %d bits from bit %d", a.Src, a.Bits, a.Offset)
	}
	encodeNicira(e, nxOutputReg2, func() {
		start := len(e.b)
		e.u16(a.Offset<<6 | (a.Bits - 1))
		e.u16(a.MaxLen)
		a.Src.encode(e)
		e.zero(start + 14 - len(e.b))
	})
}

func (a OutputReg) String() string { return "output:" + bitRange(a.Src, a.Offset, a.Bits) }

// SetField writes a value into a field, or with a mask into some of its bits.
type SetField struct{ Field Field }

func (a SetField) encodeAction(e *encoder) {
	e.paddedTLV(actionSetField, func() { a.Field.encode(e) })
}

func (a SetField) String() string {
	return fmt.Sprintf("set_field:%s->%s", a.Field.valueString(), a.Field.id)
}

// CopyField copies Bits bits of one field into another; bit 0 is the lowest.
type CopyField struct {
	Src, Dst             FieldID
	SrcOffset, DstOffset uint16
	Bits                 uint16
}

func (a CopyField) encodeAction(e *encoder) {
	e.paddedTLV(actionCopyField, func() {
		e.u16(a.Bits)
		e.u16(a.SrcOffset)
		e.u16(a.DstOffset)
		e.zero(2)
		a.Src.encode(e)
		a.Dst.encode(e)
	})
}

func (a CopyField) String() string {
	return fmt.Sprintf("move:%s->%s", bitRange(a.Src, a.SrcOffset, a.Bits), bitRange(a.Dst, a.DstOffset, a.Bits))
}

func bitRange(id FieldID, offset, bits uint16) string {
	_, name, _ := id.names()
	switch {
	case offset == 0 && int(bits) == id.Bits():
		return name + "[]"
	case bits == 1:
		return fmt.Sprintf("%s[%d]", name, offset)
	}
	return fmt.Sprintf("%s[%d..%d]", name, offset, int(offset)+int(bits)-1)
}

// Resubmit looks the frame up in a table, with its fields and registers as they
// are now, does what the entry found there says, and comes back
// (NXAST_RESUBMIT_TABLE). What the entry changed stays changed.
type Resubmit struct {
	InPort uint32 // the ingress port to look up with; 0 for the frame's own
	Table  uint8  // TableAll for the current one
}

func (a Resubmit) encodeAction(e *encoder) {
	port := a.InPort
	if port == 0 {
		port = PortInPort
	}
	encodeNicira(e, nxResubmitTable, func() {
		e.u16(shortPort(e, port))
		e.u8(a.Table)
		e.zero(3)
	})
}

func (a Resubmit) String() string {
	port, table := "", ""
	if a.InPort != 0 {
		port = portString(a.InPort)
	}
	if a.Table != TableAll {
		table = fmt.Sprint(a.Table)
	}
	return fmt.Sprintf("resubmit(%s,%s)", port, table)
}

// Clone does the actions to a copy of the frame and of its fields and registers,
// so that what they change is unchanged afterwards (NXAST_CLONE).
type Clone struct{ Actions []Action }

func (a Clone) encodeAction(e *encoder) {
	encodeNicira(e, nxClone, func() {
		e.zero(6)
		encodeActions(e, a.Actions)
	})
}

func (a Clone) String() string { return "clone(" + actionsString(a.Actions) + ")" }

// Controller sends a copy of the frame to the controller as a packet-in
// (NXAST_CONTROLLER2). Unlike an [Output] to [PortController] it can carry data
// of the controller's own, which come back in [PacketIn.UserData].
type Controller struct {
	MaxLen       uint16 // bytes of the frame; 0 stands for all, as ControllerNoBuffer does. Open vSwitch 3.1 sends all in any case
	Reason       uint8  // one of Reason...; 0 stands for ReasonAction
	ControllerID uint16 // 0 for all controllers that have not chosen another
	UserData     []byte
}

func (a Controller) encodeAction(e *encoder) {
	encodeNicira(e, nxController2, func() {
		e.zero(6)
		if a.MaxLen != 0 && a.MaxLen != ControllerNoBuffer {
			e.property(controllerMaxLen, func() { e.u16(a.MaxLen); e.zero(2) })
		}
		if a.ControllerID != 0 {
			e.property(controllerID, func() { e.u16(a.ControllerID); e.zero(2) })
		}
		if a.Reason != 0 && a.Reason != ReasonAction {
			e.property(controllerReason, func() { e.u8(a.Reason) })
		}
		if len(a.UserData) > 0 {
			e.property(controllerUserData, func() { e.bytes(a.UserData) })
		}
	})
}

func (a Controller) String() string {
	var args []string
	if a.Reason != 0 && a.Reason != ReasonAction {
		args = append(args, "reason="+reasonString(a.Reason))
	}
	if a.MaxLen != 0 && a.MaxLen != ControllerNoBuffer {
		args = append(args, fmt.Sprintf("max_len=%d", a.MaxLen))
	}
	if a.ControllerID != 0 {
		args = append(args, fmt.Sprintf("id=%d", a.ControllerID))
	}
	if len(a.UserData) > 0 {
		args = append(args, "userdata="+dotted(a.UserData))
	}
	return "controller(" + strings.Join(args, ",") + ")"
}

// dotted writes bytes as ovs-ofctl does: 01.02.ff.
func dotted(b []byte) string {
	s := make([]string, len(b))
	for i, v := range b {
		s[i] = fmt.Sprintf("%02x", v)
	}
	return strings.Join(s, ".")
}

// Group does what a group says. This package cannot set groups up.
type Group struct{ Group uint32 }

func (a Group) encodeAction(e *encoder) {
	e.paddedTLV(actionGroup, func() { e.u32(a.Group) })
}

func (a Group) String() string { return fmt.Sprintf("group:%d", a.Group) }

// PushVLAN puts a VLAN tag in front, with VLAN and priority 0 if there was none.
type PushVLAN struct{ EthType uint16 } // 0x8100 or 0x88a8

func (a PushVLAN) encodeAction(e *encoder) {
	e.paddedTLV(actionPushVLAN, func() { e.u16(a.EthType) })
}

func (a PushVLAN) String() string { return fmt.Sprintf("push_vlan:%#04x", a.EthType) }

// PopVLAN removes the outermost VLAN tag.
type PopVLAN struct{}

func (PopVLAN) encodeAction(e *encoder) { e.paddedTLV(actionPopVLAN, func() {}) }

func (PopVLAN) String() string { return "pop_vlan" }

// UnknownAction is an action that this package has no type for.
type UnknownAction struct {
	Type uint16
	Body []byte // what follows type and length
}

func (a UnknownAction) encodeAction(e *encoder) {
	e.paddedTLV(a.Type, func() { e.bytes(a.Body) })
}

func (a UnknownAction) String() string {
	return fmt.Sprintf("unknown_action_%d(%s)", a.Type, hex.EncodeToString(a.Body))
}

func encodeNicira(e *encoder, subtype uint16, body func()) {
	e.paddedTLV(actionExperimenter, func() {
		e.u32(experimenterNicira)
		e.u16(subtype)
		body()
	})
}

func encodeActions(e *encoder, actions []Action) {
	for _, a := range actions {
		e.in(fmt.Sprintf("action %T", a), func() { a.encodeAction(e) })
	}
}

func actionsString(actions []Action) string {
	s := make([]string, len(actions))
	for i, a := range actions {
		s[i] = a.String()
	}
	return strings.Join(s, ",")
}

// decodeActions reads actions to the end of the section.
func decodeActions(d *decoder, depth int) []Action {
	if depth > maxActionDepth && d.more() {
		d.failf("actions nested more than %d deep", maxActionDepth)
	}
	var actions []Action
	for d.more() {
		if len(d.b)%8 != 0 {
			d.failf("%d bytes of actions are left, not a multiple of 8", len(d.b))
			break
		}
		typ, a := d.tlv("action", 8)
		if d.ok() && len(a.b)%8 != 4 {
			a.failf("length %d of action type %d is not a multiple of 8", len(a.b)+4, typ)
		}
		if d.ok() {
			actions = append(actions, decodeAction(typ, a, depth))
		}
	}
	if !d.ok() {
		return nil
	}
	return actions
}

func decodeAction(typ uint16, d *decoder, depth int) Action {
	switch typ {
	case actionOutput:
		return Output{Port: d.u32(), MaxLen: d.u16()}
	case actionGroup:
		return Group{Group: d.u32()}
	case actionPushVLAN:
		return PushVLAN{EthType: d.u16()}
	case actionPopVLAN:
		return PopVLAN{}
	case actionSetField:
		return SetField{Field: decodeField(d)}
	case actionCopyField:
		a := CopyField{Bits: d.u16(), SrcOffset: d.u16(), DstOffset: d.u16()}
		d.skip(2)
		a.Src, a.Dst = decodeFieldID(d), decodeFieldID(d)
		return a
	case actionExperimenter:
		if a := decodeNicira(d, depth); a != nil {
			return a
		}
	}
	return UnknownAction{Type: typ, Body: d.rest()}
}

// decodeNicira returns nil, and has read nothing, if it does not know the action.
func decodeNicira(d *decoder, depth int) Action {
	whole := *d
	if d.u32() == experimenterNicira {
		switch d.u16() {
		case nxResubmit:
			return Resubmit{InPort: resubmitPort(d.u16()), Table: TableAll}
		case nxResubmitTable:
			return Resubmit{InPort: resubmitPort(d.u16()), Table: d.u8()}
		case nxOutputReg:
			a := OutputReg{}
			a.Offset, a.Bits = splitRange(d.u16())
			a.Src, a.MaxLen = decodeFieldID(d), d.u16()
			return a
		case nxOutputReg2:
			a := OutputReg{}
			a.Offset, a.Bits = splitRange(d.u16())
			a.MaxLen, a.Src = d.u16(), decodeFieldID(d)
			return a
		case nxController:
			if a := (Controller{MaxLen: wholeFrame(d.u16()), ControllerID: d.u16()}); reason(d.u8(), &a.Reason) {
				return a
			}
		case nxController2:
			if a, ok := decodeController2(d); ok {
				return a
			}
		case nxClone:
			d.skip(6)
			return Clone{Actions: decodeActions(d, depth+1)}
		}
	}
	*d = whole
	return nil
}

// decodeController2 is not ok if there are properties that [Controller] has no field for.
func decodeController2(d *decoder) (a Controller, ok bool) {
	d.skip(6)
	for d.more() {
		typ, p := d.property("property")
		switch typ {
		case controllerMaxLen:
			a.MaxLen = wholeFrame(p.u16())
		case controllerID:
			a.ControllerID = p.u16()
		case controllerReason:
			if !reason(p.u8(), &a.Reason) {
				return a, false
			}
		case controllerUserData:
			a.UserData = p.rest()
		default:
			return a, false
		}
	}
	return a, true
}

// reason is not ok for one that [Controller] cannot say.
func reason(v uint8, to *uint8) (ok bool) {
	if v != ReasonAction {
		*to = v
	}
	return v != ReasonNoMatch
}

func wholeFrame(maxLen uint16) uint16 {
	if maxLen == ControllerNoBuffer {
		return 0
	}
	return maxLen
}

func resubmitPort(p uint16) uint32 {
	if longPort(p) == PortInPort {
		return 0
	}
	return longPort(p)
}

func splitRange(v uint16) (offset, bits uint16) { return v >> 6, v&0x3f + 1 }

// Instruction is what a flow entry does with a frame: one of the types below.
type Instruction interface {
	String() string
	encodeInstruction(*encoder)
}

// Instruction types (§7.2.5).
const (
	instructionGotoTable     = 1
	instructionWriteMetadata = 2
	instructionWriteActions  = 3
	instructionApplyActions  = 4
	instructionClearActions  = 5
)

// ApplyActions does the actions now, in order.
type ApplyActions struct{ Actions []Action }

// WriteActions adds to the action set, which is done when the pipeline ends.
type WriteActions struct{ Actions []Action }

// ClearActions empties the action set.
type ClearActions struct{}

// GotoTable goes on with a later table, and does not come back.
type GotoTable struct{ Table uint8 }

// WriteMetadata writes the masked bits into the metadata.
type WriteMetadata struct{ Value, Mask uint64 }

// UnknownInstruction is an instruction that this package has no type for.
type UnknownInstruction struct {
	Type uint16
	Body []byte // what follows type and length
}

func (i ApplyActions) encodeInstruction(e *encoder) {
	e.paddedTLV(instructionApplyActions, func() { e.zero(4); encodeActions(e, i.Actions) })
}

func (i WriteActions) encodeInstruction(e *encoder) {
	e.paddedTLV(instructionWriteActions, func() { e.zero(4); encodeActions(e, i.Actions) })
}

func (ClearActions) encodeInstruction(e *encoder) {
	e.paddedTLV(instructionClearActions, func() { e.zero(4) })
}

func (i GotoTable) encodeInstruction(e *encoder) {
	e.paddedTLV(instructionGotoTable, func() { e.u8(i.Table); e.zero(3) })
}

func (i WriteMetadata) encodeInstruction(e *encoder) {
	e.paddedTLV(instructionWriteMetadata, func() { e.zero(4); e.u64(i.Value); e.u64(i.Mask) })
}

func (i UnknownInstruction) encodeInstruction(e *encoder) {
	e.paddedTLV(i.Type, func() { e.bytes(i.Body) })
}

func (i ApplyActions) String() string {
	if len(i.Actions) == 0 {
		return "drop"
	}
	return actionsString(i.Actions)
}

func (i WriteActions) String() string { return "write_actions(" + actionsString(i.Actions) + ")" }
func (ClearActions) String() string   { return "clear_actions" }
func (i GotoTable) String() string    { return fmt.Sprintf("goto_table:%d", i.Table) }

func (i WriteMetadata) String() string {
	if i.Mask == ^uint64(0) {
		return fmt.Sprintf("write_metadata:%#x", i.Value)
	}
	return fmt.Sprintf("write_metadata:%#x/%#x", i.Value, i.Mask)
}

func (i UnknownInstruction) String() string {
	return fmt.Sprintf("unknown_instruction_%d(%s)", i.Type, hex.EncodeToString(i.Body))
}

func encodeInstructions(e *encoder, instructions []Instruction) {
	for _, i := range instructions {
		e.in(fmt.Sprintf("instruction %T", i), func() { i.encodeInstruction(e) })
	}
}

func instructionsString(instructions []Instruction) string {
	if len(instructions) == 0 {
		return "drop"
	}
	s := make([]string, len(instructions))
	for i, in := range instructions {
		s[i] = in.String()
	}
	return strings.Join(s, ",")
}

// decodeInstructions reads instructions to the end of the section.
func decodeInstructions(d *decoder) []Instruction {
	var instructions []Instruction
	for d.more() {
		if len(d.b)%8 != 0 {
			d.failf("%d bytes of instructions are left, not a multiple of 8", len(d.b))
			break
		}
		typ, i := d.tlv("instruction", 8)
		if d.ok() && len(i.b)%8 != 4 {
			i.failf("length %d of instruction type %d is not a multiple of 8", len(i.b)+4, typ)
		}
		if d.ok() {
			instructions = append(instructions, decodeInstruction(typ, i))
		}
	}
	if !d.ok() {
		return nil
	}
	return instructions
}

func decodeInstruction(typ uint16, d *decoder) Instruction {
	switch typ {
	case instructionGotoTable:
		return GotoTable{Table: d.u8()}
	case instructionWriteMetadata:
		d.skip(4)
		return WriteMetadata{Value: d.u64(), Mask: d.u64()}
	case instructionWriteActions:
		d.skip(4)
		return WriteActions{Actions: decodeActions(d, 0)}
	case instructionApplyActions:
		d.skip(4)
		return ApplyActions{Actions: decodeActions(d, 0)}
	case instructionClearActions:
		return ClearActions{}
	}
	return UnknownInstruction{Type: typ, Body: d.rest()}
}
