package topology

import (
	"crypto/sha256"
	"fmt"
	"net"
)

// deriveMACs gives a MAC address to each interface that has none. It depends on
// the slice, the node and the interface's position only, unless two of a slice
// would get the same, so that adding a node changes no other.
func deriveMACs(t *Topology) {
	taken := make(map[string]bool)
	for _, n := range t.Nodes {
		for _, i := range n.Interfaces {
			taken[string(i.MAC)] = true
		}
	}
	for _, n := range t.Nodes {
		for i := range n.Interfaces {
			if n.Interfaces[i].MAC != nil {
				continue
			}
			var mac net.HardwareAddr
			for attempt := 0; mac == nil || taken[string(mac)]; attempt++ {
				mac = deriveMAC(t.Slice, n.Name, i, attempt)
			}
			taken[string(mac)] = true
			n.Interfaces[i].MAC = mac
		}
	}
}

// deriveMAC is in QEMU's range of locally administered addresses, 52:54:00.
func deriveMAC(slice, node string, index, attempt int) net.HardwareAddr {
	h := sha256.Sum256(fmt.Appendf(nil, "violin mac\n%s\n%s\n%d\n%d\n", slice, node, index, attempt))
	return net.HardwareAddr{0x52, 0x54, 0x00, h[0], h[1], h[2]}
}
