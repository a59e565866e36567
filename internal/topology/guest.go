package topology

import (
	"bytes"
	"fmt"
	"net/netip"
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
//	share=tools,/opt/tools                    a disk's serial number, and where it is to be mounted
//	run=mpirun ...                            the command line started at boot, if any
//
// The hosts are those of [Topology.Hosts].
func (t *Topology) GuestConfig(n *Node) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "hostname=%s\n", n.Name)
	for _, i := range n.Interfaces {
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
	for _, h := range t.Hosts(n) {
		fmt.Fprintf(&b, "host=%s,%v\n", h.Name, h.Address)
	}
	for _, s := range n.Shares {
		if s.Mount != "" {
			fmt.Fprintf(&b, "share=%s,%s\n", s.Name, s.Mount)
		}
	}
	if n.Run != "" {
		fmt.Fprintf(&b, "run=%s\n", n.Run)
	}
	return b.Bytes()
}

// Host is an address that a guest knows by a name.
type Host struct {
	Name    string // the node's
	Address netip.Addr
}

// Hosts are the nodes that share a network with one, itself among them, each with the
// addresses on those networks.
func (t *Topology) Hosts(n *Node) []Host {
	attached := make(map[string]bool)
	for _, i := range n.Interfaces {
		attached[i.Network] = true
	}
	var hosts []Host
	for _, peer := range t.Nodes {
		for _, i := range peer.Interfaces {
			if attached[i.Network] && i.Address.IsValid() {
				hosts = append(hosts, Host{peer.Name, i.Address.Addr()})
			}
		}
	}
	return hosts
}
