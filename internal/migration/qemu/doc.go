// Package qemu reads and writes QEMU's migration stream, the form in which
// a node's state leaves a running QEMU and enters a new one.
//
// [Decode] splits a stream in two: pages of guest memory, handed to a
// [PageSink] as they arrive, and a [Skeleton], which is everything else
// byte for byte (header, machine type, RAM block list, device state).
// [Encode] puts the two together again as a stream that an unmodified
// "qemu -incoming" accepts.
//
// All integers are big-endian. A stream is, in this order:
//
//	magic "QEVM" | version 3
//	CONFIGURATION 07      machine type
//	START 01 "ram"        RAM blocks and their lengths
//	PART 02, any number   page records: content, or "all zero"
//	COMMAND 08            at most SWITCHOVER_START (QEMU 10.0 and later)
//	END 03                pre-copy only: the last page records
//	FULL 04, one a device device state, its length not on the wire
//	EOF 00
//	VMDESCRIPTION 06      JSON: the devices above, in order
//
// and after it the sender closes the connection. docs/migration-stream.md
// has the layout byte by byte. The sources are QEMU's docs/devel/migration
// and its migration/savevm.c and ram.c, and streams captured from QEMU 7.2.
//
// What is not understood is refused with an [*Error] that carries the offset
// and the section, never skipped: pages lost without a word are the one
// fault a snapshot can't survive. The package knows no socket, no QMP and no
// store.
package qemu
