package fabric

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
)

// queuePoll is the time between two looks at a queue.
const queuePoll = 100 * time.Microsecond

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
			return 0, fmt.Errorf("device %s: frames to the guest still wait; the guest does not read them: %w", tap, err)
		}
	}
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
