package fabric

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
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

// Settle returns once the queue from the switch towards the guest is empty: every
// frame that the device was given has been read by the hypervisor or was dropped
// by the device. The guest must run, since a stopped one reads nothing.
func (s *Switch) Settle(ctx context.Context, tap string) error {
	for {
		link, err := s.nl.LinkByName(tap)
		if err != nil {
			return fmt.Errorf("device %s: %w", tap, err)
		}
		queues, err := s.nl.QdiscList(link)
		if err != nil {
			return fmt.Errorf("device %s: read its queue: %w", tap, err)
		}
		// The device's counters first: a frame that moves on meanwhile shows as
		// still waiting, not as gone.
		st := link.Attrs().Statistics
		done := st.TxPackets + st.TxDropped
		waiting := true
		for _, q := range queues {
			a := q.Attrs()
			if a.Parent == netlink.HANDLE_ROOT && a.Statistics != nil && a.Statistics.Basic != nil && a.Statistics.Queue != nil {
				waiting = a.Statistics.Queue.Qlen > 0 || uint64(a.Statistics.Basic.Packets) > done
			}
		}
		if !waiting {
			return nil
		}
		if err := pause(ctx); err != nil {
			return fmt.Errorf("device %s: frames to the guest still wait; the guest does not read them: %w", tap, err)
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
