package topology

import (
	"bytes"
	"fmt"
)

// GuestConfigName is the name of the fw_cfg file that a guest finds its
// configuration in.
const GuestConfigName = "opt/org.violin/node"

// GuestConfig is what a node's guest is told at boot, in lines of key=value:
//
//	hostname=rank0
//	if=52:54:00:aa:bb:cc,10.10.0.1/24,1500    one an interface: MAC, address (or nothing), MTU
//	host=rank1,10.10.0.2                      one an address of each node, its own among them
//	gateway=10.10.0.254                       the way out, which also answers DNS, if there is one
//	run=mpirun ...                            the command line started at boot, if any
//
// Only nodes that share a network with this one are listed as hosts, each with
// the addresses on those networks.
func (t *Topology) GuestConfig(n *Node) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "hostname=%s\n", n.Name)
	attached := make(map[string]bool)
	for _, i := range n.Interfaces {
		attached[i.Network] = true
		address := ""
		if i.Address.IsValid() {
			address = i.Address.String()
		}
		fmt.Fprintf(&b, "if=%v,%s,%d\n", i.MAC, address, t.Network(i.Network).MTU)
	}
	for _, i := range n.Interfaces {
		if gw := t.Network(i.Network).Gateway; gw.IsValid() && i.Address.IsValid() {
			fmt.Fprintf(&b, "gateway=%v\n", gw.Addr())
			break // a guest has one default route
		}
	}
	for _, peer := range t.Nodes {
		for _, i := range peer.Interfaces {
			if attached[i.Network] && i.Address.IsValid() {
				fmt.Fprintf(&b, "host=%s,%v\n", peer.Name, i.Address.Addr())
			}
		}
	}
	if n.Run != "" {
		fmt.Fprintf(&b, "run=%s\n", n.Run)
	}
	return b.Bytes()
}
