package topology

import (
	"net"
	"net/netip"
	"time"
)

// Version is the version of the format that Parse reads and Marshal writes.
const Version = 1

// DefaultMTU is the MTU of a network that gives none, in bytes.
const DefaultMTU = 1500

// MaxMTU is what an underlay of 9000 bytes has room for beside the headers of
// VXLAN over IPv4 and the inner Ethernet header.
const MaxMTU = 9000 - 50

// Topology is an experiment without a mistake, defaults filled in. Everything is
// in the order of the file.
type Topology struct {
	Slice    string
	Sites    []Site
	WAN      []Link
	Networks []Network
	Nodes    []Node
}

// Site is a place with hosts.
type Site struct {
	Name  string
	Hosts []string // names, unique over all sites
}

// Link is a WAN link between two sites. What it does, it does each way.
type Link struct {
	Between [2]string     // sites
	Delay   time.Duration // propagation
	Jitter  time.Duration // 0 <= Jitter <= Delay
	Loss    Percent
	Reorder Percent
	Rate    int64 // bits a second; 0 is unlimited
}

// Percent is a probability in hundredths, 0 to 100.
type Percent float64

// Probability is p as a fraction of one.
func (p Percent) Probability() float64 { return float64(p) / 100 }

// Network is a layer-2 network that interfaces attach to.
type Network struct {
	Name   string
	Subnet netip.Prefix // the zero Prefix if none is given
	MTU    int          // bytes of payload in a frame, as an interface's MTU is
	// Gateway is the address of the way out, with the subnet's length, and the zero
	// Prefix if there is none: the network reaches nothing but its nodes then.
	Gateway netip.Prefix
	// Hold keeps frames to the outside back until a snapshot covers them.
	Hold bool
	// Closed refuses whatever nodes would begin with the outside; forwards work.
	Closed bool
}

// GatewayMAC is the Ethernet address of the network's gateway. It depends on the
// network's name alone, so that the guests of a fork know it already.
func (t *Topology) GatewayMAC(network string) net.HardwareAddr {
	taken := make(map[string]bool)
	for _, n := range t.Nodes {
		for _, i := range n.Interfaces {
			taken[string(i.MAC)] = true
		}
	}
	for attempt := 0; ; attempt++ {
		if mac := deriveMAC("", "gateway of "+network, 0, attempt); !taken[string(mac)] {
			return mac
		}
	}
}

// GatewayHost is the host of the network's gateway, where its first node is. It is
// empty if the network has no node.
func (t *Topology) GatewayHost(network string) string {
	for _, n := range t.Nodes {
		for _, i := range n.Interfaces {
			if i.Network == network {
				return n.Host
			}
		}
	}
	return ""
}

// Node is a VM.
type Node struct {
	Name string
	Host string // empty while it is open which one of Site it will be
	Site string // the host's

	// Image is the name of an image. It is empty if Kernel, and maybe Initrd
	// and RootFS, say what boots, or if Firmware boots one of the disks. Those are
	// paths as written in the file.
	Image  string
	Kernel string
	Initrd string
	RootFS string
	Append string // added to the kernel's command line
	// Firmware is bios or uefi, and empty for what goes with the image; a kernel is
	// booted without one's help.
	Firmware string
	Boot     []string // names of the disks that the firmware tries, in order; empty for [Node.BootDisk]

	Memory     uint64 // bytes, whole MiB
	CPUs       int
	Disks      []Disk
	Shares     []Share
	CloudInit  *CloudInit // nil for what goes with the image
	Interfaces []Interface
	Forwards   []Forward
	Run        string   // command line started at boot; may be empty
	QEMU       []string // arguments for QEMU, beside those that are Violin's
}

// Share is a directory that the guest sees, read-only, as it was when the node was
// started: a disk of that name, with a squashfs of it.
type Share struct {
	Name      string // the disk's serial number
	Directory string // as written
	Mount     string // where the guest mounts it; empty if nothing of ours is to
}

// CloudInit is what a node's guest is told by cloud-init's NoCloud data source, beside
// what the topology says of it: host name, interfaces, peers, the command to run.
type CloudInit struct {
	Off          bool     // it is given none; nothing else is given then
	UserData     string   // as cloud-init takes it: #cloud-config, a script, ...
	UserDataFile string   // path of a file with it, as written, instead
	Keys         []string // public ssh keys, as in authorized_keys
}

// SeedDisk is the name of the disk that cloud-init is told by.
const SeedDisk = "cidata"

// RootDisk is the name of the disk that an image is, of a node that boots such an image.
// Among the node's disks it says how large that is to be.
const RootDisk = "root"

// BootDisk is the disk that the firmware tries if Boot names none: the first that does not
// begin empty. It is empty if there is none, and for a node with an image or a kernel.
func (n *Node) BootDisk() string {
	if n.Image != "" || n.Kernel != "" {
		return ""
	}
	for _, d := range n.Disks {
		if d.Base != "" {
			return d.Name
		}
	}
	return ""
}

// Disk is a disk of a node, which is part of its snapshots.
type Disk struct {
	Name string // the guest sees it as the disk's serial number
	Size uint64 // bytes, whole MiB; 0 for the size of the base
	Base string // path of a read-only qcow2 or raw image, as written; empty for a disk that begins empty
}

// Interface is a node's attachment to a network.
type Interface struct {
	Network string
	Address netip.Prefix // with the subnet's length; the zero Prefix if none is given
	MAC     net.HardwareAddr
	Model   string // one of Models; empty for virtio
}

// Models are the network interfaces that a node can have. All can be migrated.
var Models = []string{"virtio", "e1000", "e1000e", "rtl8139"}

// Firmwares are what can boot a node's disks.
var Firmwares = []string{"bios", "uefi"}

// Node returns the node of that name, or nil.
func (t *Topology) Node(name string) *Node {
	for i := range t.Nodes {
		if t.Nodes[i].Name == name {
			return &t.Nodes[i]
		}
	}
	return nil
}

// Network returns the network of that name, or nil.
func (t *Topology) Network(name string) *Network {
	for i := range t.Networks {
		if t.Networks[i].Name == name {
			return &t.Networks[i]
		}
	}
	return nil
}

// NodesOn returns the nodes of a host, in the order of the file.
func (t *Topology) NodesOn(host string) []*Node {
	var nodes []*Node
	for i := range t.Nodes {
		if t.Nodes[i].Host == host {
			nodes = append(nodes, &t.Nodes[i])
		}
	}
	return nodes
}
