package topology

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"
	"unicode"
)

// Bounds of single fields.
const (
	maxName       = 63 // of a DNS label
	minMTU        = 576
	minMemory     = 16 << 20
	maxMemory     = 16 << 40
	maxCPUs       = 255
	maxInterfaces = 16 // a PCI slot each
	maxDisks      = 8  // ditto
	maxDevices    = 26 // of both and shares; QEMU's q35 has 30 slots, of which others take up to 4
	maxDiskName   = 20 // of a virtio disk's serial number
	maxDisk       = 16 << 40
	maxDelay      = time.Minute
	maxText       = 4096 // bytes of a path or command line
)

// Parse reads the source of a file, whose name is for errors only. A mistake is
// an [*Error] that holds all of them, and the topology is nil then.
func Parse(file string, src []byte) (*Topology, error) {
	r := reader{
		document:  document{file: file},
		siteOf:    make(map[string]string),
		firstSite: make(map[string]string),
		addresses: make(map[networkAddress]string),
		macs:      make(map[string]string),
		exits:     make(map[string]bool),
	}
	if root, ok := r.root(src); ok {
		r.topology(root)
	}
	if len(r.problems) > 0 {
		return nil, &Error{Problems: tidy(r.problems)}
	}
	deriveMACs(&r.t)
	return &r.t, nil
}

// reader turns a document into a topology and collects what is wrong with it.
type reader struct {
	document
	t Topology

	siteOf    map[string]string         // by host
	firstSite map[string]string         // of a network's members, by network
	addresses map[networkAddress]string // who has it
	macs      map[string]string         // who has it
	gateways  []entry                   // without an address of their own
	exits     map[string]bool           // networks that are to have a gateway
	forwards  []forwardAt
}

type networkAddress struct {
	network string
	address netip.Addr
}

// topology reads the whole file: what is referred to first, what refers to it
// then, whatever their order in the file.
func (r *reader) topology(e entry) {
	f := r.record(e, "version", "slice", "sites", "wan", "networks", "nodes")
	if v, ok := r.required(e, f, "version", "write version: 1"); ok {
		if s, ok := r.text(v, "write version: 1"); ok && s != "1" {
			r.wrong(v, fmt.Sprintf("version %s is not known", quoted(s)), "this violin reads version 1")
		}
	}
	const nameHint = "give the experiment a name, such as slice: pair"
	if v, ok := r.required(e, f, "slice", nameHint); ok {
		if s, ok := r.text(v, nameHint); ok {
			r.checkName("slice", s, v, v.valueAt())
			r.t.Slice = s
		}
	}
	if v, ok := r.required(e, f, "sites", "name a place and its hosts, such as sites: {here: {hosts: [h1]}}"); ok {
		r.sites(v)
	}
	if v, ok := f["wan"]; ok {
		r.wan(v)
	}
	if v, ok := f["networks"]; ok {
		r.networks(v)
	}
	if v, ok := r.required(e, f, "nodes", "name at least one node"); ok {
		r.nodes(v)
	}
	for _, g := range r.gateways {
		r.placeGateway(g)
	}
	r.checkForwards()
}

// required is f[name], which is reported if missing from e (unless e is no
// mapping, which was reported).
func (r *reader) required(e entry, f map[string]entry, name, hint string) (entry, bool) {
	v, ok := f[name]
	if !ok && f != nil {
		path := name
		if e.path != "" {
			path = e.path + "." + name
		}
		r.problem(e.at, path, fmt.Sprintf("%s has no %s", e.label(), name), hint)
	}
	return v, ok
}

func (r *reader) sites(e entry) {
	const hint = "list the site's hosts, such as hosts: [h1, h2]"
	sites, ok := r.mapping(e)
	if ok && len(sites) == 0 {
		r.wrong(e, "there is no site", "name a place and its hosts, such as here: {hosts: [h1]}")
	}
	for _, s := range sites {
		r.checkName("site", s.name, s, s.at)
		site := Site{Name: s.name}
		f := r.record(s, "hosts")
		v, ok := r.required(s, f, "hosts", hint)
		hosts, list := r.sequence(v)
		if ok && list && len(hosts) == 0 {
			r.wrong(v, fmt.Sprintf("site %s has no host", plain(s.name)), hint)
		}
		for _, h := range hosts {
			name, ok := r.text(h, hint)
			if !ok {
				continue
			}
			r.checkName("host", name, h, h.valueAt())
			if other, dup := r.siteOf[name]; dup {
				r.wrong(h, fmt.Sprintf("host %s is in site %s already", quoted(name), plain(other)), "a host is in one site; give this one another name")
				continue
			}
			r.siteOf[name] = s.name
			site.Hosts = append(site.Hosts, name)
		}
		r.t.Sites = append(r.t.Sites, site)
	}
}

func (r *reader) wan(e entry) {
	const betweenHint = "name two sites, such as between: [utah, gpo]"
	sites := make([]string, len(r.t.Sites))
	for i, s := range r.t.Sites {
		sites[i] = s.Name
	}
	type ends [2]string
	lines := make(map[ends]int)
	links, _ := r.sequence(e)
	for _, l := range links {
		var link Link
		f := r.record(l, "between", "delay", "jitter", "loss", "reorder", "rate")
		if between, ok := r.required(l, f, "between", betweenHint); ok {
			names, ok := r.sequence(between)
			if ok && len(names) != 2 {
				r.wrong(between, fmt.Sprintf("a link is between 2 sites, not %d", len(names)), betweenHint)
			}
			known := 0
			for i, n := range names[:min(len(names), 2)] {
				s, ok := r.text(n, betweenHint)
				if !ok {
					continue
				}
				if !slices.Contains(sites, s) && len(sites) > 0 {
					r.wrong(n, fmt.Sprintf("there is no site %s", quoted(s)), suggest(s, sites))
					continue
				}
				link.Between[i] = s
				known++
			}
			if known == 2 {
				key := ends{min(link.Between[0], link.Between[1]), max(link.Between[0], link.Between[1])}
				line, dup := lines[key]
				switch {
				case key[0] == key[1]:
					r.wrong(between, fmt.Sprintf("a link from site %s to itself", plain(key[0])), "hosts of one site reach each other without a link; "+betweenHint)
				case dup:
					r.wrong(between, fmt.Sprintf("there is a link between %s and %s already", plain(key[0]), plain(key[1])), fmt.Sprintf("remove this one or that in line %d", line))
				default:
					lines[key] = between.valueAt().line
				}
			}
		}
		r.duration(f, "delay", &link.Delay)
		if r.duration(f, "jitter", &link.Jitter) && link.Jitter > link.Delay {
			r.wrong(f["jitter"], fmt.Sprintf("jitter %v is more than the delay %v", link.Jitter, link.Delay), "a frame can't arrive before it was sent; lower the jitter")
		}
		r.percent(f, "loss", &link.Loss)
		r.percent(f, "reorder", &link.Reorder)
		if v, ok := f["rate"]; ok {
			const hint = "write bits a second, such as 100Mbit, with bit, kbit, Mbit or Gbit"
			if s, ok := r.text(v, hint); ok {
				n, err := parseUnits(s, rateUnits)
				if err == nil && n == 0 {
					err = fmt.Errorf("nothing gets through")
				}
				if err != nil {
					r.wrong(v, fmt.Sprintf("rate %s: %v", quoted(s), err), hint)
				}
				link.Rate = int64(n)
			}
		}
		r.t.WAN = append(r.t.WAN, link)
	}
}

func (r *reader) networks(e entry) {
	const subnetHint = "write it in CIDR form, such as 10.10.0.0/24"
	networks, _ := r.mapping(e)
	for _, n := range networks {
		r.checkName("network", n.name, n, n.at)
		network := Network{Name: n.name, MTU: DefaultMTU}
		f := r.record(n, "subnet", "mtu", "gateway", "external")
		if v, ok := f["subnet"]; ok {
			if s, ok := r.text(v, subnetHint); ok {
				p, err := netip.ParsePrefix(s)
				switch {
				case err != nil:
					r.wrong(v, fmt.Sprintf("subnet %s is not a network's address with its length", quoted(s)), subnetHint)
				case p.Addr().Is4In6():
					r.wrong(v, fmt.Sprintf("subnet %s is an IPv4 address in IPv6 form", s), subnetHint)
				case p != p.Masked():
					r.wrong(v, fmt.Sprintf("subnet %s has bits set beyond its length", s), fmt.Sprintf("write %v", p.Masked()))
				case hostBits(p) < 2:
					r.wrong(v, fmt.Sprintf("subnet %s has no room for two nodes", s), "make it larger")
				default:
					network.Subnet = p
				}
			}
		}
		if v, ok := f["mtu"]; ok {
			network.MTU = r.number(v, minMTU, MaxMTU, "bytes of a frame's payload")
		}
		if v, ok := f["gateway"]; ok {
			r.exits[n.name] = true
			r.gateway(v, f, &network)
		}
		if v, ok := f["external"]; ok {
			r.external(v, f, &network)
		}
		r.t.Networks = append(r.t.Networks, network)
	}
}

const gatewayHint = "write gateway: nat, or gateway: {nat: 10.10.0.254} to choose its address"

// gateway reads a network's way out. One without an address gets it when the
// nodes have theirs.
func (r *reader) gateway(v entry, f map[string]entry, network *Network) {
	address := ""
	var at entry
	if _, ok := pairs(v.value); ok {
		g := r.record(v, "nat")
		if at, ok = r.required(v, g, "nat", gatewayHint); !ok {
			return
		}
		if address, ok = r.text(at, gatewayHint); !ok {
			return
		}
	} else {
		s, ok := r.text(v, gatewayHint)
		if !ok {
			return
		}
		if s != "nat" {
			r.wrong(v, fmt.Sprintf("gateway %s is not known", quoted(s)), gatewayHint)
			return
		}
	}
	subnet := network.Subnet
	if !subnet.IsValid() {
		if _, given := f["subnet"]; !given { // else it is reported already
			r.wrong(v, fmt.Sprintf("a gateway on network %s, which has no subnet", plain(network.Name)), "give the network one, such as subnet: 10.10.0.0/24")
		}
		return
	}
	if !subnet.Addr().Is4() {
		r.wrong(v, fmt.Sprintf("a gateway on network %s, whose subnet %v is IPv6", plain(network.Name), subnet), "NAT is of IPv4: give an IPv4 subnet, or leave the gateway out")
		return
	}
	if at.value == nil {
		r.gateways = append(r.gateways, entry{name: network.Name, path: v.path, at: v.valueAt()})
		return
	}
	a, err := netip.ParseAddr(address)
	if err != nil {
		r.wrong(at, fmt.Sprintf("gateway %s is not an address", quoted(address)), "write it without a length, such as 10.10.0.254")
		return
	}
	if !a.Is4() || !subnet.Contains(a) {
		r.wrong(at, fmt.Sprintf("gateway %s is outside of network %s, which is %v", address, plain(network.Name), subnet), "choose an address in it")
		return
	}
	network.Gateway = r.checkAddress(at, address, netip.PrefixFrom(a, subnet.Bits()), network, "the gateway of network "+plain(network.Name))
}

// external reads what becomes of frames to the outside.
func (r *reader) external(v entry, f map[string]entry, network *Network) {
	const hint = "write external: hold or external: closed, or leave it out"
	s, ok := r.text(v, hint)
	if !ok {
		return
	}
	if _, given := f["gateway"]; !given {
		r.wrong(v, fmt.Sprintf("network %s has no gateway, and so nothing goes from it to the outside", plain(network.Name)), "give it one (gateway: nat), or leave external out")
		return
	}
	switch s {
	case "hold":
		network.Hold = true
	case "closed":
		network.Closed = true
	case "pass":
	default:
		r.wrong(v, fmt.Sprintf("external %s is not known", quoted(s)), hint)
	}
}

// placeGateway gives a gateway the first address of its network that no node has.
func (r *reader) placeGateway(g entry) {
	network := r.t.Network(g.name)
	for a := network.Subnet.Addr().Next(); network.Subnet.Contains(a.Next()); a = a.Next() {
		if _, taken := r.addresses[networkAddress{g.name, a}]; !taken {
			network.Gateway = netip.PrefixFrom(a, network.Subnet.Bits())
			return
		}
	}
	r.problem(g.at, g.path, fmt.Sprintf("no address of %v is left for the gateway", network.Subnet), "make the subnet larger")
}

func hostBits(p netip.Prefix) int { return p.Addr().BitLen() - p.Bits() }

func (r *reader) nodes(e entry) {
	nodes, ok := r.mapping(e)
	if ok && len(nodes) == 0 {
		r.wrong(e, "there is no node", "name at least one")
	}
	for _, n := range nodes {
		r.checkName("node", n.name, n, n.at)
		r.node(n)
	}
}

func (r *reader) node(n entry) {
	node := Node{Name: n.name, CPUs: 1}
	f := r.record(n, "host", "site", "image", "kernel", "initrd", "rootfs", "append", "firmware", "boot", "memory", "cpus", "disks", "shares", "cloud_init", "interfaces", "forwards", "run", "qemu")

	hosts := r.hosts()
	if v, ok := f["site"]; ok {
		r.nodeSite(v, f, &node)
	} else if v, ok := r.required(n, f, "host", "say which host runs it: "+suggest("", hosts)); ok {
		if s, ok := r.text(v, suggest("", hosts)); ok {
			site, ok := r.siteOf[s]
			if !ok && len(hosts) > 0 {
				r.wrong(v, fmt.Sprintf("there is no host %s", quoted(s)), suggest(s, hosts))
			}
			node.Host, node.Site = s, site
		}
	}

	r.boot(n, f, &node)

	const memoryHint = "say how much, such as memory: 256MiB"
	if v, ok := r.required(n, f, "memory", memoryHint); ok {
		if s, ok := r.text(v, memoryHint); ok {
			m, err := parseUnits(s, sizeUnits)
			switch {
			case err != nil:
				r.wrong(v, fmt.Sprintf("memory %s: %v", quoted(s), err), sizeHint(s))
			case m%(1<<20) != 0:
				r.wrong(v, fmt.Sprintf("memory %s is not in whole MiB", s), "round it to MiB")
			case m < minMemory || m > maxMemory:
				r.wrong(v, fmt.Sprintf("memory %s is not between %s and %s", s, formatUnits(minMemory, sizeUnits), formatUnits(maxMemory, sizeUnits)), memoryHint)
			}
			node.Memory = m
		}
	}
	if v, ok := f["cpus"]; ok {
		node.CPUs = r.number(v, 1, maxCPUs, "virtual CPUs")
	}
	if v, ok := f["disks"]; ok {
		r.disks(v, &node)
	}
	if v, ok := f["shares"]; ok {
		r.shares(v, &node)
	}
	if v, ok := f["cloud_init"]; ok {
		r.cloudInit(v, &node)
		if !node.CloudInit.Off && slices.ContainsFunc(node.Disks, func(d Disk) bool { return d.Name == SeedDisk }) {
			r.problem(v.at, v.path, fmt.Sprintf("cloud_init beside a disk %s", quoted(SeedDisk)), "cloud-init is told by one: leave this out, or name the disk otherwise")
		}
	}
	r.firmware(n, f, &node)
	if v, ok := f["interfaces"]; ok {
		elements, _ := r.sequence(v)
		if len(elements) > maxInterfaces {
			r.wrong(v, fmt.Sprintf("%d interfaces, more than the %d there is room for", len(elements), maxInterfaces), "remove some")
		}
		for i, el := range elements {
			node.Interfaces = append(node.Interfaces, r.iface(el, node, i))
		}
	}
	if v, ok := f["forwards"]; ok {
		r.readForwards(v, &node)
	}
	if many := len(node.Interfaces) + len(node.Disks) + len(node.Shares); many > maxDevices && f != nil {
		r.problem(n.at, n.path, fmt.Sprintf("%d interfaces, disks and shares, more than the %d there is room for", many, maxDevices), "remove some")
	}
	node.Run, _ = r.line(f, "run")
	if v, ok := f["qemu"]; ok {
		node.QEMU = r.texts(v, `write QEMU's arguments one by one, such as [-device, "usb-ehci,id=usb"]`)
	}
	r.t.Nodes = append(r.t.Nodes, node)
}

// boot reads what a node boots: an image, or a kernel and its company.
func (r *reader) boot(n entry, f map[string]entry, node *Node) {
	image, hasImage := f["image"]
	_, hasKernel := f["kernel"]
	if s, ok := r.line(f, "image"); ok {
		r.checkName("image", s, image, image.valueAt())
		node.Image = s
	}
	for _, part := range []struct {
		name string
		path *string
	}{{"kernel", &node.Kernel}, {"initrd", &node.Initrd}, {"rootfs", &node.RootFS}} {
		v, ok := f[part.name]
		if !ok {
			continue
		}
		if *part.path, ok = r.line(f, part.name); ok && *part.path == "" {
			r.wrong(v, part.name+" is empty", "give the path of a file, or leave it out")
		}
		switch {
		case hasImage:
			r.problem(v.at, v.path, part.name+" beside image", "an image brings its own: give one or the other")
		case !hasKernel:
			r.problem(v.at, v.path, part.name+" without kernel", "give the path of a kernel as well")
		}
	}
	node.Append, _ = r.line(f, "append")
}

// firmware reads how a node's disks are booted, and tells if nothing is.
func (r *reader) firmware(n entry, f map[string]entry, node *Node) {
	_, hasImage := f["image"]
	_, hasKernel := f["kernel"]
	_, hasInitrd := f["initrd"]
	_, hasRoot := f["rootfs"]
	kernel := hasKernel || hasInitrd || hasRoot
	if !hasImage && !kernel && node.BootDisk() == "" && f != nil {
		r.problem(n.at, n.path+".image", fmt.Sprintf("%s has no image", n.label()),
			"say what it boots: image: NAME; or kernel: FILE with initrd and rootfs; or one of its disks, with a base")
	}
	if v, ok := f["firmware"]; ok {
		if s, ok := r.text(v, suggest("", Firmwares)); ok {
			switch {
			case !slices.Contains(Firmwares, s):
				r.wrong(v, fmt.Sprintf("there is no firmware %s", quoted(s)), suggest(s, Firmwares))
			case kernel:
				r.problem(v.at, v.path, "firmware beside kernel", "a kernel that is given is booted as it is: give one or the other")
			default:
				node.Firmware = s
			}
		}
	}
	v, ok := f["boot"]
	if !ok {
		return
	}
	if kernel {
		r.problem(v.at, v.path, "boot beside kernel", "a kernel that is given is booted as it is: give one or the other")
		return
	}
	var known []string
	if hasImage {
		known = append(known, RootDisk)
	}
	for _, d := range node.Disks {
		if !slices.Contains(known, d.Name) {
			known = append(known, d.Name)
		}
	}
	elements, _ := r.sequence(v)
	if v.value != nil && len(elements) == 0 {
		r.wrong(v, "boot names no disk", "name those to be tried, in order, or leave it out")
	}
	for _, el := range elements {
		s, ok := r.text(el, suggest("", known))
		switch {
		case !ok:
		case !slices.Contains(known, s):
			r.wrong(el, fmt.Sprintf("%s has no disk %s", n.label(), quoted(s)), suggest(s, known))
		case slices.Contains(node.Boot, s):
			r.wrong(el, fmt.Sprintf("disk %s is there twice", quoted(s)), "remove this one")
		default:
			node.Boot = append(node.Boot, s)
		}
	}
}

// disks reads a node's disks.
func (r *reader) disks(e entry, node *Node) {
	const hint = "write {name: data, size: 1GiB} for an empty disk, or {name: system, base: /images/system.qcow2}"
	elements, _ := r.sequence(e)
	if len(elements) > maxDisks {
		r.wrong(e, fmt.Sprintf("%d disks, more than the %d there is room for", len(elements), maxDisks), "remove some")
	}
	lines := make(map[string]int)
	for _, el := range elements {
		f := r.record(el, "name", "size", "base")
		var d Disk
		if v, ok := r.required(el, f, "name", hint); ok {
			d.Name = r.diskName(v, "disk", hint, lines)
		}
		v, sized := f["size"]
		if sized {
			d.Size = r.diskSize(v)
		}
		v, based := f["base"]
		if s, ok := r.line(f, "base"); ok && s == "" {
			r.wrong(v, "base is empty", "give the path of an image, or leave it out")
		} else {
			d.Base = s
		}
		if f != nil && !sized && !based {
			r.problem(el.at, el.path, "the disk has neither size nor base", hint)
		}
		node.Disks = append(node.Disks, d)
	}
}

// diskName reads the name of what the guest sees as a disk. lines has where others are.
func (r *reader) diskName(v entry, what, hint string, lines map[string]int) string {
	s, ok := r.text(v, hint)
	if !ok {
		return ""
	}
	r.checkName(what, s, v, v.valueAt())
	if len(s) > maxDiskName {
		r.wrong(v, fmt.Sprintf("%s name %s has %d characters, more than %d", what, quoted(s), len(s), maxDiskName), "shorten it: the guest sees it as the disk's serial number")
	}
	if line, dup := lines[s]; dup {
		r.wrong(v, fmt.Sprintf("%s %s is given twice", what, quoted(s)), fmt.Sprintf("give it another name than that in line %d", line))
	}
	lines[s] = v.valueAt().line
	return s
}

func (r *reader) diskSize(v entry) uint64 {
	const hint = "say how large, such as size: 1GiB"
	s, ok := r.text(v, hint)
	if !ok {
		return 0
	}
	n, err := parseUnits(s, sizeUnits)
	switch {
	case err != nil:
		r.wrong(v, fmt.Sprintf("size %s: %v", quoted(s), err), sizeHint(s))
	case n == 0:
		r.wrong(v, "a disk of no size", hint)
	case n%(1<<20) != 0:
		r.wrong(v, fmt.Sprintf("size %s is not in whole MiB", s), "round it to MiB")
	case n > maxDisk:
		r.wrong(v, fmt.Sprintf("size %s is more than %s", s, formatUnits(maxDisk, sizeUnits)), hint)
	}
	return n
}

// maxArguments bounds what a node's QEMU is given beside what is Violin's.
const maxArguments = 64

// texts reads a list of texts of one line each.
func (r *reader) texts(e entry, hint string) []string {
	elements, _ := r.sequence(e)
	if len(elements) > maxArguments {
		r.wrong(e, fmt.Sprintf("%s has %d elements, more than %d", e.label(), len(elements), maxArguments), "remove some")
	}
	var all []string
	for _, el := range elements {
		if s, ok := r.text(el, hint); ok {
			if s, ok = r.oneLine(el, s); ok && s == "" {
				r.wrong(el, fmt.Sprintf("%s is empty", el.label()), hint)
			} else if ok {
				all = append(all, s)
			}
		}
	}
	return all
}

func (r *reader) iface(e entry, node Node, index int) Interface {
	var i Interface
	f := r.record(e, "network", "address", "mac", "model")
	owner := fmt.Sprintf("interface %d of %s", index, plain(node.Name))

	var network *Network
	if v, ok := r.required(e, f, "network", "say which network it attaches to"); ok {
		if s, ok := r.text(v, "name a network"); ok {
			i.Network = s
			network = r.t.Network(s)
			if network == nil {
				r.unknownNetwork(v, s)
			} else if node.Site != "" {
				r.reach(v, s, node.Site)
			}
		}
	}
	if v, ok := f["address"]; ok {
		i.Address = r.address(v, network, owner)
	}
	if v, ok := f["mac"]; ok {
		const hint = "write it as 52:54:00:12:34:56, or leave it out to have one derived"
		if s, ok := r.text(v, hint); ok {
			mac, err := net.ParseMAC(s)
			var other string
			if err == nil {
				other = r.macs[string(mac)]
			}
			switch {
			case err != nil || len(mac) != 6:
				r.wrong(v, fmt.Sprintf("mac %s is not a MAC address of 6 bytes", quoted(s)), hint)
			case mac[0]&1 != 0:
				r.wrong(v, fmt.Sprintf("mac %s is a group's address", s), "make the first byte even, such as 52")
			case slices.Max(mac) == 0:
				r.wrong(v, fmt.Sprintf("mac %s is nobody's", s), hint)
			case other != "":
				r.wrong(v, fmt.Sprintf("mac %s belongs to %s already", s, other), "change one, or leave both out to have them derived")
			default:
				r.macs[string(mac)] = owner
				i.MAC = mac
			}
		}
	}
	if v, ok := f["model"]; ok {
		const hint = "name what QEMU shows the guest, such as model: e1000"
		if s, ok := r.text(v, hint); ok {
			if !slices.Contains(Models, s) {
				r.wrong(v, fmt.Sprintf("model %s is not known", quoted(s)), suggest(s, Models))
			}
			if i.Model = s; s == Models[0] {
				i.Model = "" // so that it is written as it was by those who know no models
			}
		}
	}
	return i
}

func (r *reader) unknownNetwork(v entry, name string) {
	var names []string
	for _, n := range r.t.Networks {
		names = append(names, n.Name)
	}
	if len(names) == 0 {
		r.wrong(v, fmt.Sprintf("there is no network %s", quoted(name)), "define it, such as networks: {lan: {subnet: 10.10.0.0/24}}")
		return
	}
	r.wrong(v, fmt.Sprintf("there is no network %s", quoted(name)), suggest(name, names))
}

// reach checks that a network's members at several sites can reach each other,
// directly or by way of other sites.
func (r *reader) reach(v entry, network, site string) {
	first, ok := r.firstSite[network]
	if !ok {
		r.firstSite[network] = site
		return
	}
	if !r.t.reaches(first, site) {
		r.wrong(v, fmt.Sprintf("network %s spans sites %s and %s, which no WAN link joins", quoted(network), plain(first), plain(site)),
			fmt.Sprintf("add {between: [%s, %s], delay: 30ms} under wan", plain(first), plain(site)))
	}
}

// address reads an interface's address and checks it against its network, which
// may be unknown (nil).
func (r *reader) address(v entry, network *Network, owner string) netip.Prefix {
	const hint = "write it in CIDR form, such as 10.10.0.1/24"
	s, ok := r.text(v, hint)
	if !ok {
		return netip.Prefix{}
	}
	p, err := netip.ParsePrefix(s)
	if err != nil || p.Addr().Is4In6() {
		h := hint
		if a, err := netip.ParseAddr(s); err == nil && network != nil && network.Subnet.Contains(a) {
			h = fmt.Sprintf("write %v/%d", a, network.Subnet.Bits())
		}
		r.wrong(v, fmt.Sprintf("address %s is not an address with its network's length", quoted(s)), h)
		return netip.Prefix{}
	}
	return r.checkAddress(v, s, p, network, owner)
}

// checkAddress checks an address that is written as s against its network.
func (r *reader) checkAddress(v entry, s string, p netip.Prefix, network *Network, owner string) netip.Prefix {
	a := p.Addr()
	if a.IsMulticast() || a.IsUnspecified() || a.IsLoopback() {
		r.wrong(v, fmt.Sprintf("address %s can't be a node's", s), "choose another one")
		return netip.Prefix{}
	}
	if network == nil {
		return p // its network is reported already
	}
	if subnet := network.Subnet; subnet.IsValid() {
		switch {
		case !subnet.Contains(a):
			r.wrong(v, fmt.Sprintf("address %s is outside of network %s, which is %v", s, plain(network.Name), subnet), "choose an address in it")
			return netip.Prefix{}
		case p.Bits() != subnet.Bits():
			r.wrong(v, fmt.Sprintf("address %s does not have the length of network %s, which is %v", s, plain(network.Name), subnet), fmt.Sprintf("write %v/%d", a, subnet.Bits()))
			return netip.Prefix{}
		}
	}
	if a.Is4() && hostBits(p) >= 2 {
		if a == p.Masked().Addr() || !p.Contains(a.Next()) {
			r.wrong(v, fmt.Sprintf("address %s is the network's own or its broadcast address", s), "choose an address between them")
			return netip.Prefix{}
		}
	}
	key := networkAddress{network.Name, a}
	if other, dup := r.addresses[key]; dup {
		r.wrong(v, fmt.Sprintf("address %v belongs to %s already", a, other), "choose another one")
		return netip.Prefix{}
	}
	r.addresses[key] = owner
	return p
}

// checkName checks that a name is a DNS label in lower case.
func (r *reader) checkName(what, name string, e entry, at position) {
	hint := "use a-z, 0-9 and '-', at most 63 of them, with a letter or digit at both ends"
	if !IsName(name) {
		r.problem(at, e.path, fmt.Sprintf("%s name %s is not valid", what, quoted(name)), hint)
	}
}

// IsName tells whether something in a topology can have a name.
func IsName(name string) bool {
	return name != "" && len(name) <= maxName &&
		strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-") == "" &&
		name[0] != '-' && name[len(name)-1] != '-'
}

// line reads a text without control characters, which is empty if not given.
func (r *reader) line(f map[string]entry, name string) (string, bool) {
	v, ok := f[name]
	if !ok {
		return "", false
	}
	s, ok := r.text(v, "write it, or leave the field out")
	if !ok {
		return "", false
	}
	return r.oneLine(v, s)
}

// oneLine checks that a text is one line without control characters.
func (r *reader) oneLine(v entry, s string) (string, bool) {
	name := v.label()
	s = strings.TrimRight(s, "\n") // of a block scalar
	switch {
	case strings.Contains(s, "\n"):
		r.wrong(v, fmt.Sprintf("%s has more than one line", name), "write it in one, such as with &&; or call a script of the image")
	case strings.ContainsFunc(s, unicode.IsControl) || strings.ToValidUTF8(s, "") != s:
		r.wrong(v, fmt.Sprintf("%s has characters that can't be printed", name), "leave them out")
	case len(s) > maxText:
		r.wrong(v, fmt.Sprintf("%s has %d bytes, more than %d", name, len(s), maxText), "shorten it")
	default:
		return s, true
	}
	return "", false
}

func (r *reader) number(v entry, low, high int, what string) int {
	hint := fmt.Sprintf("give the %s, %d to %d", what, low, high)
	s, ok := r.text(v, hint)
	if !ok {
		return 0
	}
	n, err := parseNumber(s)
	if err != nil {
		r.wrong(v, fmt.Sprintf("%s %s is not a whole number", v.name, quoted(s)), hint)
		return 0
	}
	if n < uint64(low) || n > uint64(high) {
		r.wrong(v, fmt.Sprintf("%s %s is not between %d and %d", v.name, s, low, high), hint)
		return 0
	}
	return int(n)
}

func (r *reader) duration(f map[string]entry, name string, d *time.Duration) bool {
	const hint = "write a time with its unit, such as 30ms"
	v, ok := f[name]
	if !ok {
		return false
	}
	s, ok := r.text(v, hint)
	if !ok {
		return false
	}
	n, err := parseDuration(s)
	if err == nil && n > maxDelay {
		err = fmt.Errorf("more than %v", maxDelay)
	}
	if err != nil {
		r.wrong(v, fmt.Sprintf("%s %s: %v", name, quoted(s), err), hint)
		return false
	}
	*d = n
	return true
}

func (r *reader) percent(f map[string]entry, name string, p *Percent) {
	const hint = "write a share of the frames, such as 1%"
	v, ok := f[name]
	if !ok {
		return
	}
	s, ok := r.text(v, hint)
	if !ok {
		return
	}
	n, err := parsePercent(s)
	if err != nil {
		r.wrong(v, fmt.Sprintf("%s %s: %v", name, quoted(s), err), hint)
		return
	}
	*p = n
}

// nodeSite reads the site of a node that may be on any host there.
func (r *reader) nodeSite(v entry, f map[string]entry, node *Node) {
	var sites []string
	for _, s := range r.t.Sites {
		sites = append(sites, s.Name)
	}
	s, ok := r.text(v, suggest("", sites))
	if !ok {
		return
	}
	if !slices.Contains(sites, s) && len(sites) > 0 {
		r.wrong(v, fmt.Sprintf("there is no site %s", quoted(s)), suggest(s, sites))
	}
	if _, both := f["host"]; both {
		r.wrong(v, "the node has a host, too", "leave one of them out: a host is in one site, and a node with a site may be on any host there")
	}
	node.Site = s
}

// hosts are the names of all hosts, in the order of the file.
func (r *reader) hosts() []string {
	var hosts []string
	for _, s := range r.t.Sites {
		hosts = append(hosts, s.Hosts...)
	}
	return hosts
}

// sizeHint tells what a size with another spelling probably means.
func sizeHint(s string) string {
	digits := strings.TrimRight(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
	if _, err := parseNumber(digits); err == nil && len(digits) < 6 {
		switch strings.ToUpper(s[len(digits):]) {
		case "M", "MB", "MIB":
			return fmt.Sprintf("write %sMiB", digits)
		case "G", "GB", "GIB":
			return fmt.Sprintf("write %sGiB", digits)
		}
	}
	return "write a whole number with MiB or GiB, such as 256MiB"
}
