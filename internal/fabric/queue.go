package fabric

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// queuePoll is the time between two looks at a queue.
const queuePoll = 100 * time.Microsecond

// ErrUnread says that frames wait in a device's queue for a guest that does not read them.
var ErrUnread = errors.New("frames to the guest wait, and it does not read them")

// accountQueue gives a TAP device a queueing discipline that counts what it
// passes on, which [Switch.Settle] needs.
func (s *Switch) accountQueue(tap string) error {
	link, err := s.nl.LinkByName(tap)
	if err != nil {
		return fmt.Errorf("device %s: %w", tap, err)
	}
	err = s.nl.QdiscReplace(&netlink.GenericQdisc{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
		QdiscType:  "pfifo",
	})
	if err != nil {
		return fmt.Errorf("device %s: give it a queue that counts: %w", tap, err)
	}
	return nil
}

// Settle returns once every frame that the guest's device was given is in the guest's
// memory, or was dropped by the device. The guest must run, since a stopped one reads
// nothing, and nobody may give it frames meanwhile.
//
// That the queue is empty is not enough. Where the guest has no buffer left, QEMU has
// read one frame more, keeps it, and reads no further until there is room; if its vCPUs
// are stopped before, it throws that frame away (net_vm_change_state_handler in
// net/net.c). So a frame is sent behind the last one that no guest takes: once it has
// been read, all before it are in, and it may be what is thrown away.
//
// One such frame is enough until others come: a guest whose device is not up yet
// takes none, and they would wait for it.
//
// When ctx ends first, the error is [ErrUnread].
func (s *Switch) Settle(ctx context.Context, tap string) error {
	given, err := s.empty(ctx, tap)
	if err != nil {
		return err
	}
	s.mu.Lock()
	port, ok := s.taps[tap]
	behind := s.behind[tap] == given
	s.mu.Unlock()
	if behind {
		return nil
	}
	if !ok {
		return fmt.Errorf("device %s: it is not plugged into the switch", tap)
	}
	if err := s.Output(port, lastFrame); err != nil {
		return fmt.Errorf("device %s: send a frame behind the last: %w", tap, err)
	}
	if err := s.conn.Load().Barrier(ctx); err != nil {
		return fmt.Errorf("device %s: send a frame behind the last: %w", tap, err)
	}
	s.mu.Lock()
	s.behind[tap] = given + 1
	s.mu.Unlock()
	_, err = s.empty(ctx, tap)
	return err
}

// lastFrame is no guest's: to the address of the nearest bridge (IEEE 802.1Q, table 8-1),
// which no bridge passes on, and of an EtherType for experiments (IEEE 802). QEMU's device
// takes it for a guest that asks for all there is, whose kernel then ignores it.
var lastFrame = slices.Concat(
	[]byte{0x01, 0x80, 0xc2, 0x00, 0x00, 0x0e}, []byte{0x02, 0, 0, 0, 0, 0}, []byte{0x88, 0xb6}, make([]byte, 46),
)

// empty returns once the queue from the switch towards the guest is empty: every frame
// that the device was given, and it says how many, has been read by the hypervisor or
// was dropped.
func (s *Switch) empty(ctx context.Context, tap string) (given uint64, err error) {
	for {
		link, err := s.nl.LinkByName(tap)
		if err != nil {
			return 0, fmt.Errorf("device %s: %w", tap, err)
		}
		queues, err := s.nl.QdiscList(link)
		if err != nil {
			return 0, fmt.Errorf("device %s: read its queue: %w", tap, err)
		}
		// The device's counters first: a frame that moves on meanwhile shows as
		// still waiting, not as gone.
		st := link.Attrs().Statistics
		done := st.TxPackets + st.TxDropped
		waiting := true
		for _, q := range queues {
			a := q.Attrs()
			if a.Parent == netlink.HANDLE_ROOT && a.Statistics != nil && a.Statistics.Basic != nil && a.Statistics.Queue != nil {
				given = uint64(a.Statistics.Basic.Packets)
				waiting = a.Statistics.Queue.Qlen > 0 || given > done
			}
		}
		if !waiting {
			return given, nil
		}
		if err := pause(ctx); err != nil {
			return 0, fmt.Errorf("device %s: %w: %w", tap, ErrUnread, err)
		}
	}
}

// TakeBack takes the frames that wait in the device's queue out of it, in their order, by
// reading the device in place of the hypervisor, which is the process pid. It is for when
// Settle has failed with [ErrUnread]; afterwards the device has settled. The guest must
// run, since QEMU reads one frame more when a guest is stopped that it holds one for.
//
// That one, which QEMU read before and has no room for, is not had: it is lost when the
// guest stops. Should the guest read again in the midst of this, what it reads may
// have come later than what is taken.
func (s *Switch) TakeBack(ctx context.Context, tap string, pid int) ([][]byte, error) {
	fail := func(err error) error {
		return fmt.Errorf("device %s: take back the frames that the guest does not read: %w", tap, err)
	}
	f, header, err := openReader(pid, tap)
	if err != nil {
		return nil, fail(err)
	}
	defer unix.Close(f)
	var taken [][]byte
	buf := make([]byte, 1<<16)
	for {
		n, err := unix.Read(f, buf)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			s.mu.Lock()
			delete(s.behind, tap) // the last of Settle's may be among what was taken
			s.mu.Unlock()
			if _, err := s.empty(ctx, tap); err != nil {
				return taken, fail(err)
			}
			return taken, nil
		case err != nil:
			return taken, fail(err)
		case n <= header:
			return taken, fail(fmt.Errorf("read %d bytes, where a frame comes behind a header of %d", n, header))
		}
		if frame := buf[header:n]; !bytes.Equal(frame, lastFrame) {
			taken = append(taken, bytes.Clone(frame))
		}
	}
}

// openReader duplicates the file by which process pid reads a TAP device, and says how many
// bytes come before each frame (tuntap.rst in the kernel's documentation, TUNSETVNETHDRSZ).
// The caller closes it.
func openReader(pid int, tap string) (fd, header int, err error) {
	dir := fmt.Sprintf("/proc/%d/fdinfo", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0, 0, err
	}
	theirs := -1
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if errors.Is(err, os.ErrNotExist) {
			continue // closed meanwhile
		}
		if err != nil {
			return 0, 0, err
		}
		if slices.Contains(strings.Split(string(b), "\n"), "iff:\t"+tap) {
			if theirs, err = strconv.Atoi(e.Name()); err != nil {
				return 0, 0, err
			}
		}
	}
	if theirs < 0 {
		return 0, 0, fmt.Errorf("process %d does not have it open", pid)
	}
	process, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return 0, 0, fmt.Errorf("open process %d: %w", pid, err)
	}
	defer unix.Close(process)
	fd, err = unix.PidfdGetfd(process, theirs, 0)
	if err != nil {
		return 0, 0, fmt.Errorf("share file %d of process %d: %w", theirs, pid, err)
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil {
		return 0, 0, err
	}
	if flags&unix.O_NONBLOCK == 0 {
		return 0, 0, fmt.Errorf("process %d reads it blocking", pid)
	}
	var ifr [40]byte // struct ifreq: the name, then the flags
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TUNGETIFF, uintptr(unsafe.Pointer(&ifr))); errno != 0 {
		return 0, 0, fmt.Errorf("TUNGETIFF: %w", errno)
	}
	if binary.NativeEndian.Uint16(ifr[unix.IFNAMSIZ:])&unix.IFF_VNET_HDR != 0 {
		if header, err = unix.IoctlGetInt(fd, unix.TUNGETVNETHDRSZ); err != nil {
			return 0, 0, fmt.Errorf("TUNGETVNETHDRSZ: %w", err)
		}
	}
	return fd, header, nil
}

// Flush returns once the switch has read every frame that the guest sent: the
// sockets by which it reads the device are empty. (The kernel's datapath has no such
// socket: it takes a frame as it is sent.)
func (s *Switch) Flush(ctx context.Context, tap string) error {
	link, err := s.nl.LinkByName(tap)
	if err != nil {
		return fmt.Errorf("device %s: %w", tap, err)
	}
	for {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/packet", s.daemons.pid()))
		if err != nil {
			return fmt.Errorf("device %s: read the switch's sockets: %w", tap, err)
		}
		if socketsEmpty(b, link.Attrs().Index) {
			return nil
		}
		if err := pause(ctx); err != nil {
			return fmt.Errorf("device %s: the switch has not read all frames of the guest: %w", tap, err)
		}
	}
}

// socketsEmpty reads /proc/net/packet (columns: sk RefCnt Type Proto Iface R Rmem
// User Inode) for the sockets on one interface.
func socketsEmpty(table []byte, index int) bool {
	for sc := bufio.NewScanner(bytes.NewReader(table)); sc.Scan(); {
		f := strings.Fields(sc.Text())
		if len(f) >= 7 && f[4] == strconv.Itoa(index) && f[6] != "0" {
			return false
		}
	}
	return true
}

func pause(ctx context.Context) error {
	select {
	case <-time.After(queuePoll):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
