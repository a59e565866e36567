package store

import (
	"errors"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Packs are written to a directory past the page cache. A copy there takes as long as a page's
// compression, and longer where the machine is virtual and its memory not backed yet; it would be written at once
// anyway, and takes room from guests.

// directAlign is what the kernel may ask of the memory, offset and length of a direct write, in bytes.
const directAlign = 4096

// hugePage is the length of the processor's large pages, in bytes.
const hugePage = 2 << 20

// directRoom returns empty memory for n bytes that can be written directly.
func directRoom(n int) []byte {
	n = wholeBlocks(n)
	b := make([]byte, n+directAlign)
	start := -int(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) & (directAlign - 1)
	b = b[start : start : start+n]
	if n >= hugePage {
		// One fault for 512 pages. It only saves time, and not everywhere.
		_ = unix.Madvise(b[:n], unix.MADV_HUGEPAGE)
	}
	return b
}

func wholeBlocks(n int) int { return (n + directAlign - 1) &^ (directAlign - 1) }

// isDirect reports whether data lies in a directRoom.
func isDirect(data []byte) bool {
	return len(data) > 0 && cap(data) >= wholeBlocks(len(data)) && uintptr(unsafe.Pointer(unsafe.SliceData(data)))%directAlign == 0
}

// writeWhole makes data a new file's content: directly if data lies in a [directRoom] and the
// file system knows how to, or through the page cache.
func writeWhole(f *os.File, data []byte) error {
	if isDirect(data) && setFlags(f, unix.O_DIRECT) == nil {
		blocks := data[:wholeBlocks(len(data))]
		clear(blocks[len(data):])
		_, err := f.WriteAt(blocks, 0)
		if err == nil {
			return f.Truncate(int64(len(data)))
		}
		// It may ask for more than directAlign.
		if !errors.Is(err, unix.EINVAL) || setFlags(f, 0) != nil {
			return err
		}
	}
	_, err := f.WriteAt(data, 0)
	return err
}

func setFlags(f *os.File, flags int) error {
	_, err := unix.FcntlInt(f.Fd(), unix.F_SETFL, flags)
	return err
}
