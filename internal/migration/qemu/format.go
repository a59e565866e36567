package qemu

import "fmt"

// PageSize is the size of a guest page in the stream, in bytes. It is
// QEMU's target page size, whatever the size of the host's pages.
const PageSize = 4096

const (
	magic         = 0x5145564d // "QEVM"
	multifdMagic  = 0x11223344 // at the start of a connection of multifd
	streamVersion = 3
	ramVersion    = 4
	ramName       = "ram"
)

// Section types (savevm.h: QEMU_VM_*).
const (
	secEOF           = 0x00
	secStart         = 0x01
	secPart          = 0x02
	secEnd           = 0x03
	secFull          = 0x04
	secSubsection    = 0x05
	secVMDescription = 0x06
	secConfiguration = 0x07
	secCommand       = 0x08
	secFooter        = 0x7e
)

// Flags in the low twelve bits of a RAM record (ram.c: RAM_SAVE_FLAG_*).
const (
	flagZero         = 0x002
	flagMemSize      = 0x004
	flagPage         = 0x008
	flagEOS          = 0x010
	flagContinue     = 0x020
	flagXBZRLE       = 0x040
	flagHook         = 0x080
	flagCompressPage = 0x100
	flagMultifdFlush = 0x200

	flagMask = PageSize - 1
)

// Commands (savevm.c: enum qemu_vm_cmd).
const (
	cmdOpenReturnPath  = 1
	cmdPing            = 2
	cmdPostcopyAdvise  = 3
	cmdPostcopyListen  = 4
	cmdPostcopyRun     = 5
	cmdPostcopyDiscard = 6
	cmdPackaged        = 7
	cmdEnableCOLO      = 8
	cmdPostcopyResume  = 9
	cmdRecvBitmap      = 10
	cmdSwitchoverStart = 11
)

// Bounds on what a stream may ask of its reader. QEMU itself stays far below.
const (
	maxBlocks   = 4096
	maxCommands = 64
	// maxRAM keeps the sum of block lengths clear of overflow: 1 PiB.
	maxRAM = 1 << 50
)

// refusedFlag says why a RAM record with such flags is not read, and what
// the user can do about it.
func refusedFlag(flags uint64) error {
	for _, r := range []struct {
		flag uint64
		what string
	}{
		{flagCompressPage, "pages are compressed; switch off the migration capability compress"},
		{flagXBZRLE, "pages are sent as differences; switch off the migration capability xbzrle"},
		{flagHook, "pages travel by RDMA; migrate to a unix socket"},
	} {
		if flags&r.flag != 0 {
			return fmt.Errorf("RAM record with flags %#x: %s", flags, r.what)
		}
	}
	return fmt.Errorf("RAM record with unknown flags %#x: a QEMU newer than this program may send them", flags)
}

// refusedCommand is refusedFlag for a command.
func refusedCommand(cmd uint16) error {
	switch cmd {
	case cmdOpenReturnPath, cmdPing:
		return fmt.Errorf("command %d wants an answer on a return path; switch off the migration capabilities return-path and switchover-ack", cmd)
	case cmdPostcopyAdvise, cmdPostcopyListen, cmdPostcopyRun, cmdPostcopyDiscard, cmdPackaged, cmdPostcopyResume, cmdRecvBitmap:
		return fmt.Errorf("command %d belongs to post-copy; switch off the migration capability postcopy-ram", cmd)
	case cmdEnableCOLO:
		return fmt.Errorf("command %d belongs to COLO; switch off the migration capability x-colo", cmd)
	}
	return fmt.Errorf("unknown command %d: a QEMU newer than this program may send it", cmd)
}

// refusedCapability is refusedFlag for a capability named in the
// configuration section.
func refusedCapability(name string) error {
	why := "changes how memory is sent"
	switch name {
	case "mapped-ram": // QEMU 9.0 and later
		why = "lays pages out at places of their own in a file"
	case "x-ignore-shared":
		why = "leaves shared memory out"
	}
	return fmt.Errorf("migration capability %q %s and is not read; switch it off (migrate-set-capabilities)", name, why)
}
