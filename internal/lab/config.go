package lab

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"time"
)

// Defaults of a [Config].
const (
	// DefaultMTU leaves a tunnel room for its headers (VXLAN over IPv4: 50
	// bytes) around jumbo inner frames of 8950 bytes.
	DefaultMTU = 9000
	// DefaultQueueBytes bounds what may be on its way in one direction of a
	// link: 64 MiB are what 1 Gbit/s puts into a round trip of half a second.
	DefaultQueueBytes = 64 << 20
)

const (
	maxSites = 254 // one octet of the address, without 0 and 255
	maxHosts = 254 // ditto, per site
	minMTU   = 576
	maxMTU   = 65521 // of a TAP device
)

// Config says what a lab consists of.
type Config struct {
	Sites []Site
	Links []LinkConfig
	// Underlay is the /16 that hosts have their addresses from.
	// The zero value means 172.31.0.0/16.
	Underlay netip.Prefix
	// MTU of the underlay in bytes, without the Ethernet header.
	// 0 means DefaultMTU.
	MTU int
	// Seed makes losses, jitter and reordering repeatable: the same frames in
	// the same order meet the same fate.
	Seed uint64
	// Logger may be nil.
	Logger *slog.Logger
}

// Site is a place with hosts, joined by a switch.
type Site struct {
	Name  string
	Hosts []string // names, unique over all sites
}

// LinkConfig is a WAN link between two sites.
type LinkConfig struct {
	A, B  string // names of sites
	Shape Shape
}

// Shape is what a WAN link does to frames, the same in both directions. The
// zero value is a perfect link.
type Shape struct {
	// Delay is the propagation delay each way.
	Delay time.Duration
	// Jitter varies the delay of each frame evenly by up to so much more or
	// less. It never reorders: a frame waits for the one before it.
	Jitter time.Duration
	// Loss is the probability, 0 to 1, that a frame is lost.
	Loss float64
	// Reorder is the probability, 0 to 1, that a frame takes a detour, which
	// takes up to another Delay (or a millisecond, if that is more) and lets
	// the frames behind it overtake.
	Reorder float64
	// Rate in bits of frame per second. 0 means unlimited.
	Rate int64
	// QueueBytes bounds the bytes on their way in one direction, waiting for
	// the rate or propagating. What doesn't fit is dropped at the tail.
	// 0 means DefaultQueueBytes.
	QueueBytes int
}

func (s Shape) validate() error {
	switch {
	case s.Delay < 0:
		return fmt.Errorf("delay %v is negative", s.Delay)
	case s.Jitter < 0 || s.Jitter > s.Delay:
		return fmt.Errorf("jitter %v is not between 0 and the delay %v", s.Jitter, s.Delay)
	case !(s.Loss >= 0 && s.Loss <= 1): // also refuses NaN
		return fmt.Errorf("loss %v is not a probability between 0 and 1", s.Loss)
	case !(s.Reorder >= 0 && s.Reorder <= 1):
		return fmt.Errorf("reorder %v is not a probability between 0 and 1", s.Reorder)
	case s.Rate < 0:
		return fmt.Errorf("rate %d bit/s is negative", s.Rate)
	case s.QueueBytes < 0:
		return fmt.Errorf("queue of %d bytes is negative", s.QueueBytes)
	}
	return nil
}

// A layout is a checked Config with addresses given out and paths chosen.
type layout struct {
	mtu   int
	hosts [][]hostPlan // by site
	// next[a][b] is the link by which a frame for site b leaves site a, or -1
	// if no path leads there.
	next [][]int
	ends [][2]int // of each link, as indexes of sites
}

type hostPlan struct {
	name string
	addr netip.Prefix
	mac  net.HardwareAddr
}

// plan checks the whole of cfg and returns every mistake at once.
func plan(cfg Config) (*layout, error) {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }

	l := &layout{mtu: cfg.MTU}
	if l.mtu == 0 {
		l.mtu = DefaultMTU
	}
	if l.mtu < minMTU || l.mtu > maxMTU {
		bad("mtu %d is not between %d and %d", cfg.MTU, minMTU, maxMTU)
	}
	underlay := cfg.Underlay
	if !underlay.IsValid() {
		underlay = netip.PrefixFrom(netip.AddrFrom4([4]byte{172, 31, 0, 0}), 16)
	}
	if !underlay.Addr().Is4() || underlay.Bits() != 16 || underlay != underlay.Masked() {
		bad("underlay %v is not an IPv4 network of 16 bits, such as 172.31.0.0/16", underlay)
		return nil, errors.Join(errs...)
	}

	if len(cfg.Sites) == 0 {
		bad("no site: a lab needs at least one, with a host")
	}
	if len(cfg.Sites) > maxSites {
		bad("%d sites; the underlay has room for %d", len(cfg.Sites), maxSites)
		return nil, errors.Join(errs...)
	}
	siteIndex := make(map[string]int)
	hostSite := make(map[string]string)
	for i, s := range cfg.Sites {
		if s.Name == "" {
			bad("site %d has no name", i+1)
		}
		if _, dup := siteIndex[s.Name]; dup {
			bad("site %q is given twice", s.Name)
		}
		siteIndex[s.Name] = i
		if len(s.Hosts) > maxHosts {
			bad("site %q has %d hosts; the underlay has room for %d", s.Name, len(s.Hosts), maxHosts)
			continue
		}
		var hosts []hostPlan
		for j, name := range s.Hosts {
			if name == "" {
				bad("host %d of site %q has no name", j+1, s.Name)
			}
			if other, dup := hostSite[name]; dup {
				bad("host %q is given twice, in sites %q and %q", name, other, s.Name)
			}
			hostSite[name] = s.Name
			hosts = append(hosts, hostPlan{name: name, addr: hostAddr(underlay, i, j), mac: hostMAC(i, j)})
		}
		l.hosts = append(l.hosts, hosts)
	}

	seen := make(map[[2]int]bool)
	for _, c := range cfg.Links {
		a, okA := siteIndex[c.A]
		b, okB := siteIndex[c.B]
		switch {
		case !okA:
			bad("WAN link between %q and %q: there is no site %q", c.A, c.B, c.A)
		case !okB:
			bad("WAN link between %q and %q: there is no site %q", c.A, c.B, c.B)
		case a == b:
			bad("WAN link joins site %q to itself", c.A)
		case seen[pair(a, b)]:
			bad("WAN link between %q and %q is given twice", c.A, c.B)
		default:
			seen[pair(a, b)] = true
		}
		if err := c.Shape.validate(); err != nil {
			bad("WAN link between %q and %q: %w", c.A, c.B, err)
		}
		l.ends = append(l.ends, [2]int{a, b})
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	l.next = routes(len(cfg.Sites), l.ends, cfg.Links)
	return l, nil
}

func pair(a, b int) [2]int { return [2]int{min(a, b), max(a, b)} }

func hostAddr(underlay netip.Prefix, site, host int) netip.Prefix {
	a := underlay.Addr().As4()
	a[2], a[3] = byte(site+1), byte(host+1)
	return netip.PrefixFrom(netip.AddrFrom4(a), underlay.Bits())
}

// hostMAC is locally administered; 0x56 is the letter V.
func hostMAC(site, host int) net.HardwareAddr {
	return net.HardwareAddr{0x02, 0x56, 0, 0, byte(site + 1), byte(host + 1)}
}

// routes finds for each pair of sites the path of least delay (of fewest links
// among equals), as a carrier's routing would. Paths are chosen once: a
// partition is a fault to be seen, not one to be routed around.
func routes(sites int, ends [][2]int, links []LinkConfig) [][]int {
	type cost struct {
		delay time.Duration
		hops  int
	}
	less := func(a, b cost) bool { return a.delay < b.delay || a.delay == b.delay && a.hops < b.hops }
	const unreachable = time.Duration(1<<62 - 1)

	dist := make([][]cost, sites)
	next := make([][]int, sites)
	for i := range sites {
		dist[i], next[i] = make([]cost, sites), make([]int, sites)
		for j := range sites {
			dist[i][j], next[i][j] = cost{delay: unreachable}, -1
		}
		dist[i][i] = cost{}
	}
	for i, e := range ends {
		c := cost{delay: min(links[i].Shape.Delay, time.Hour), hops: 1}
		dist[e[0]][e[1]], next[e[0]][e[1]] = c, i
		dist[e[1]][e[0]], next[e[1]][e[0]] = c, i
	}
	for k := range sites { // Floyd and Warshall
		for i := range sites {
			for j := range sites {
				if dist[i][k].delay == unreachable || dist[k][j].delay == unreachable {
					continue
				}
				c := cost{dist[i][k].delay + dist[k][j].delay, dist[i][k].hops + dist[k][j].hops}
				if less(c, dist[i][j]) {
					dist[i][j], next[i][j] = c, next[i][k]
				}
			}
		}
	}
	return next
}
