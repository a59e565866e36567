package topology

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Forward is a port of the machine that a network's gateway runs on, where the gateway
// takes connections, or datagrams, for a node.
type Forward struct {
	Protocol string         // one of Protocols
	Listen   netip.AddrPort // IPv4; port 0 is any that is free
	Yield    bool           // if the port is taken, any that is free will do
	Port     uint16         // the node's, never 0
}

// Protocols are those that can be forwarded.
var Protocols = []string{"tcp", "udp"}

// loopback is where a forward listens that does not say so: what it leads to is nobody's
// but this machine's.
var loopback = netip.AddrFrom4([4]byte{127, 0, 0, 1})

// ParseForward reads a forward as it is written in a topology:
//
//	[ADDRESS:]PORT[?]:NODEPORT[/PROTOCOL]
//
// ADDRESS is 127.0.0.1 and PROTOCOL tcp if not given; a ? lets another port do.
func ParseForward(s string) (Forward, error) {
	text, protocol, given := strings.Cut(s, "/")
	if !given {
		protocol = Protocols[0]
	}
	if !slices.Contains(Protocols, protocol) {
		return Forward{}, fmt.Errorf("there is no protocol %s; %s", quoted(protocol), suggest(protocol, Protocols))
	}
	parts := strings.Split(text, ":")
	address := loopback
	switch len(parts) {
	case 3:
		var err error
		if address, err = netip.ParseAddr(parts[0]); err != nil {
			return Forward{}, fmt.Errorf("%s is not an address; give one of the machine's, or 0.0.0.0 for all", quoted(parts[0]))
		}
		if address.IsMulticast() || address == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
			return Forward{}, fmt.Errorf("address %s is no machine's", address)
		}
		parts = parts[1:]
	case 2:
	case 1:
		return Forward{}, errors.New("a port of the machine and one of the node are needed: 0:80 takes any that is free for the former")
	default:
		return Forward{}, errors.New("only IPv4 is forwarded, from [ADDRESS:]PORT of the machine to a port of the node")
	}
	f := Forward{Protocol: protocol}
	from := strings.TrimSuffix(parts[0], "?")
	f.Yield = from != parts[0]
	port, err := parsePort(from)
	if err != nil {
		return Forward{}, err
	}
	if f.Yield && port == 0 {
		return Forward{}, errors.New("0 is any port already; leave the ? out")
	}
	f.Listen = netip.AddrPortFrom(address, port)
	if f.Port, err = parsePort(parts[1]); err == nil && f.Port == 0 {
		err = errors.New("0 is no port of a node")
	}
	if err != nil {
		return Forward{}, err
	}
	return f, nil
}

func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil {
		return 0, fmt.Errorf("port %s is not a number up to 65535", quoted(s))
	}
	return uint16(n), nil
}

// String is the forward in full, as ParseForward reads it.
func (f Forward) String() string {
	yield := ""
	if f.Yield {
		yield = "?"
	}
	return fmt.Sprintf("%s%s:%d/%s", f.Listen, yield, f.Port, f.Protocol)
}

// Overlaps tells whether two forwards would listen at the same port. Those that take any
// that is free do not.
func (f Forward) Overlaps(g Forward) bool {
	a, b := f.Listen, g.Listen
	return f.Protocol == g.Protocol && a.Port() == b.Port() && a.Port() != 0 && !f.Yield && !g.Yield &&
		(a.Addr() == b.Addr() || a.Addr().IsUnspecified() || b.Addr().IsUnspecified())
}

// Entrance is where a node is reached from outside: its first interface with an IPv4
// address on a network with a gateway. The network is nil if there is none.
func (t *Topology) Entrance(n *Node) (*Network, netip.Addr) {
	for _, i := range n.Interfaces {
		if w := t.Network(i.Network); w != nil && w.Gateway.IsValid() && i.Address.Addr().Is4() {
			return w, i.Address.Addr()
		}
	}
	return nil, netip.Addr{}
}

// forwardAt is a forward and where it is written.
type forwardAt struct {
	Forward
	at   entry
	node string
}

// maxForwards bounds a node's: each is a socket.
const maxForwards = 64

const forwardHint = `write [ADDRESS:]PORT:NODEPORT, such as "8080:80", "127.0.0.1:2222:22" or "5353:53/udp"`

// readForwards reads a node's forwards. What they need of the rest is looked at later.
func (r *reader) readForwards(e entry, node *Node) {
	elements, _ := r.sequence(e)
	if len(elements) > maxForwards {
		r.wrong(e, fmt.Sprintf("%d forwards, more than %d", len(elements), maxForwards), "remove some")
	}
	for _, el := range elements {
		s, ok := r.text(el, forwardHint)
		if !ok {
			continue
		}
		f, err := ParseForward(s)
		if err != nil {
			r.wrong(el, fmt.Sprintf("forward %s: %v", quoted(s), err), forwardHint)
			continue
		}
		node.Forwards = append(node.Forwards, f)
		r.forwards = append(r.forwards, forwardAt{f, el, node.Name})
	}
}

// checkForwards looks at what forwards need, when all networks have their gateways.
func (r *reader) checkForwards() {
	type port struct {
		protocol string
		at       netip.AddrPort
	}
	any := func(f Forward) port { // the port at all addresses
		return port{f.Protocol, netip.AddrPortFrom(netip.IPv4Unspecified(), f.Listen.Port())}
	}
	exact, first := map[port]*forwardAt{}, map[port]*forwardAt{}
	for i := range r.forwards {
		f := &r.forwards[i]
		if f.Listen.Port() != 0 && !f.Yield {
			other := exact[port{f.Protocol, f.Listen}]
			if other == nil {
				other = exact[any(f.Forward)]
			}
			if other == nil && f.Listen.Addr().IsUnspecified() {
				other = first[any(f.Forward)]
			}
			if other != nil {
				r.wrong(f.at, fmt.Sprintf("port %d of %s for %s is forwarded already, to node %s", f.Listen.Port(), f.Listen.Addr(), f.Protocol, plain(other.node)),
					fmt.Sprintf("choose another than in line %d, or 0 for any that is free", other.at.valueAt().line))
			} else {
				exact[port{f.Protocol, f.Listen}] = f
				if first[any(f.Forward)] == nil {
					first[any(f.Forward)] = f
				}
			}
		}
		n := r.t.Node(f.node)
		if n == nil {
			continue // its node has no name
		}
		if w, _ := r.t.Entrance(n); w != nil {
			continue
		}
		on := slices.IndexFunc(n.Interfaces, func(i Interface) bool { return r.exits[i.Network] })
		switch {
		case on < 0:
			r.wrong(f.at, fmt.Sprintf("node %s is on no network with a gateway, which a forward goes by", plain(n.Name)), "give a network of it one: gateway: nat")
		case r.t.Network(n.Interfaces[on].Network).Gateway.IsValid(): // or that is reported already
			r.wrong(f.at, fmt.Sprintf("node %s has no IPv4 address on network %s, by whose gateway a forward would go", plain(n.Name), plain(n.Interfaces[on].Network)), "give its interface one")
		}
	}
}
