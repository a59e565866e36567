// Package qmp is a client of the QEMU Machine Protocol: the JSON lines that
// QEMU speaks on a control monitor (docs/interop/qmp-spec in QEMU's source).
//
// It owns the wire and nothing above it: which commands make a snapshot is
// known to hypervisor/qemu. [Client] is a session with one QEMU; [Decoder] and
// [Message] are the framing, which the guest agent (package qga) shares.
//
// What a session looks like, S for QEMU and C for the client:
//
//	S: {"QMP": {"version": {"qemu": {"major": 7, ...}}, "capabilities": ["oob"]}}
//	C: {"execute": "qmp_capabilities", "id": 1}
//	S: {"return": {}, "id": 1}
//	C: {"execute": "stop", "id": 2}
//	S: {"timestamp": {"seconds": 1700000000, "microseconds": 12}, "event": "STOP"}
//	S: {"return": {}, "id": 2}
//
// Everything is delivered in the order of the wire: when Execute has returned,
// every event that QEMU sent before the reply is in the subscriptions already.
//
// A monitor serves one client at a time: a second one is accepted by the kernel
// but gets no greeting until the first has gone.
package qmp
