package e2e

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"violin/internal/frames"
)

// TestUnread cuts a slice with a node that reads nothing, as after a crash of its kernel:
// what waits in its device is channel state, and waits there again after a restore.
func TestUnread(t *testing.T) {
	dirs, runDir := begin(t)
	topo, err := os.ReadFile(filepath.Join(root, "examples/pair.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	before, rest, _ := strings.Cut(string(topo), "    run: ")
	_, after, _ := strings.Cut(rest, "\n")
	file := filepath.Join(runDir, "pair.yaml")
	if err := os.WriteFile(file, []byte(before+after), 0o600); err != nil {
		t.Fatal(err)
	}
	must(t, dirs, "up", file)
	in := func(node, script string) string {
		t.Helper()
		return strings.TrimSpace(string(must(t, dirs, "exec", "pair/"+node, "--", "sh", "-c", script)))
	}
	const echoes = 20
	address := in("right", "cat /sys/class/net/eth0/address")
	in("right", `nic=$(basename $(readlink /sys/class/net/eth0/device)) && echo $nic >/run/nic && echo $nic >/sys/bus/virtio/drivers/virtio_net/unbind`)
	in("left", "ip neigh replace 10.20.0.2 lladdr "+address+" dev eth0 nud permanent")
	in("left", "ping -n -q -c 20 -i 0.02 -W 1 10.20.0.2 >/dev/null; true")

	// waiting are the echo requests in a new snapshot's channel state. Each cut costs the
	// node one frame, which QEMU has read already.
	cuts := 0
	waiting := func() (sequence []int) {
		t.Helper()
		must(t, dirs, "snapshot", "pair")
		cuts++
		verified(t, dirs, "pair@latest")
		capture := filepath.Join(runDir, "frames.pcapng")
		must(t, dirs, "frames", "pair@latest", "-f", capture)
		b, err := os.ReadFile(capture)
		if err != nil {
			t.Fatal(err)
		}
		cs, err := frames.Read(bytes.NewReader(b))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range cs.Frames {
			// Ethernet, IPv4 without options, ICMP: type 8 is an echo request (RFC 792).
			if d := f.Data; len(d) > 42 && binary.BigEndian.Uint16(d[12:]) == 0x0800 && d[23] == 1 && d[34] == 8 {
				sequence = append(sequence, int(binary.BigEndian.Uint16(d[40:])))
			}
		}
		var want []int
		for n := max(1, echoes-len(sequence)+1); n <= echoes; n++ {
			want = append(want, n)
		}
		if len(sequence) < echoes-cuts || !slices.Equal(sequence, want) {
			t.Errorf("cut %d: echo requests %v wait for the node, want the last %d of %d in their order, or more", cuts, sequence, echoes-cuts, echoes)
		}
		return sequence
	}
	first := waiting()
	must(t, dirs, "tag", "pair@latest", "first")
	waiting()
	must(t, dirs, "restore", "pair@first")
	cuts = 1
	if again := waiting(); len(again) < len(first)-1 {
		t.Errorf("after the restore %v wait for the node, in the snapshot %v do", again, first)
	}

	in("right", `echo $(cat /run/nic) >/sys/bus/virtio/drivers/virtio_net/bind && ip addr add 10.20.0.2/24 dev eth0 && ip link set eth0 up`)
	in("left", "ping -n -q -c 3 -W 5 10.20.0.2")
}
