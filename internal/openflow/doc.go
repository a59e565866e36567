// Package openflow speaks OpenFlow 1.5 with one switch.
//
// It is a codec ([Marshal], [Unmarshal]), which knows no network and no clock,
// and a controller's end of a connection ([Conn]). The peer is Open vSwitch
// (tested with 3.1), with the protocol OpenFlow15 enabled on its bridge and
// Nicira's extensions where the standard lacks something: registers, resubmit,
// clone, the controller action with user data, and the packet-in that carries
// it (NXT_PACKET_IN2).
//
// # The wire
//
// Everything is big-endian. Every message begins with eight bytes:
//
//	0      version  0x06 (a HELLO may say otherwise)
//	1      type     FLOW_MOD = 14, PACKET_IN = 10, ...
//	2..3   length   of the whole message, these eight bytes included
//	4..7   xid      a reply, or an error, carries the xid of its request
//
// Most of what follows in a message is made of four kinds of TLV:
//
//	OXM          class:16 field:7 hasmask:1 length:8, value, mask        a [Field]; a [Match] is a list
//	OXS          class:16 field:7 reserved:1 length:8, value             one counter of a flow entry
//	action       type:16 length:16, padded to 8 bytes                    an [Action]
//	             type 0xffff goes on with experimenter:32 subtype:16
//	instruction  type:16 length:16, padded to 8 bytes                    an [Instruction]
//	property     type:16 length:16, then padding to 8 bytes that the     ports, packet-ins,
//	             length does not count                                   asynchronous configuration
//
// Open vSwitch reports register matches as 64-bit pairs (OXM_OF_PKT_REG); they
// are read as the 32-bit registers they were made of, so that a match read back
// equals the one installed.
//
// What this package does not know (a message, action, instruction or field of
// another kind) it keeps as bytes and writes back unchanged; what is malformed
// is refused with an [Error] that tells the section and byte offset.
//
// Sections cited as "§7.2.1" are of the OpenFlow Switch Specification 1.5.1
// (ONF TS-025); names beginning with NX are of Open vSwitch's nicira-ext.h.
package openflow
