// Package qga is a client of the QEMU guest agent (qemu-ga), by which commands
// run and files move inside a guest without a network.
//
// The agent is reached through a virtio-serial port, whose other end is a unix
// socket of QEMU. The wire is that of QMP (package qmp) without greeting and
// events; and because the line outlives both ends, it may hold anything when a
// client comes: half a command of the client before, replies to nobody, or, in
// a guest that was restored, what was under way when its snapshot was taken.
// So a conversation begins with a synchronisation (qga/qapi-schema.json,
// guest-sync-delimited): the byte 0xff resets the agent's parser, and the reply
// is preceded by 0xff and repeats a number that the client has chosen.
//
//	C: \xff {"execute": "guest-sync-delimited", "arguments": {"id": 7123}}
//	S: \xff {"return": 7123}
//	C: {"execute": "guest-ping"}
//	S: {"return": {}}
//
// Whatever goes wrong in between, a timeout above all, the next command
// synchronises anew.
package qga
