package lab

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"violin/internal/machine"
)

// Names of devices in a site's namespace, beside a port for each host.
const (
	siteBridge = "underlay"
	siteTap    = "wan"
)

// underlayDevice is a host's end of its cable, in its namespace.
const underlayDevice = "underlay0"

// Lab is a set of sites with hosts on this machine.
type Lab struct {
	log   *slog.Logger
	sites []*namespace
	hosts []*Host // in the order of the configuration
	names map[string]*Host
	wan   *wan // nil without links

	closing sync.Once
	closed  error
}

// New builds a lab; it needs root. ctx bounds the building only: the lab lives
// until Close. On an error nothing is left behind.
func New(ctx context.Context, cfg Config) (_ *Lab, err error) {
	lay, err := plan(cfg)
	if err != nil {
		return nil, fmt.Errorf("plan lab: %w", err)
	}
	l := &Lab{log: cfg.Logger, names: make(map[string]*Host)}
	if l.log == nil {
		l.log = slog.New(slog.DiscardHandler)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()

	if len(cfg.Links) > 0 {
		if l.wan, err = newWAN(cfg, lay, l.log); err != nil {
			return nil, fmt.Errorf("build WAN: %w", err)
		}
	}
	for i, s := range cfg.Sites {
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("build site %q: %w", s.Name, err)
		}
		if err := l.addSite(i, lay); err != nil {
			return nil, fmt.Errorf("build site %q: %w", s.Name, err)
		}
		for j, p := range lay.hosts[i] {
			if err := ctx.Err(); err != nil {
				return nil, fmt.Errorf("build host %q: %w", p.name, err)
			}
			if err := l.addHost(i, j, s.Name, p, lay.mtu); err != nil {
				return nil, fmt.Errorf("build host %q: %w", p.name, err)
			}
		}
	}
	if err := l.awaitUp(ctx); err != nil {
		return nil, fmt.Errorf("wait for the underlay: %w", err)
	}
	if l.wan != nil {
		l.wan.start(lay.mtu)
	}
	l.log.Debug("lab built", "sites", len(l.sites), "hosts", len(l.hosts), "links", len(cfg.Links))
	return l, nil
}

// addSite makes a site's namespace with its bridge, and its uplink to the WAN.
func (l *Lab) addSite(i int, lay *layout) error {
	ns, err := newNamespace()
	if err != nil {
		return err
	}
	l.sites = append(l.sites, ns)
	return ns.do(func() error {
		if err := loopbackUp(); err != nil {
			return err
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = siteBridge, lay.mtu
		// A fixed address, as a bridge's own would change with its ports.
		attrs.HardwareAddr = net.HardwareAddr{0x02, 0x56, 0, 1, byte(i + 1), 0}
		// With snooping it would hold back multicasts nobody asked it for.
		snooping := false
		bridge := &netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &snooping}
		if err := netlink.LinkAdd(bridge); err != nil {
			return fmt.Errorf("make bridge: %w", err)
		}
		if err := netlink.LinkSetUp(bridge); err != nil {
			return fmt.Errorf("set bridge up: %w", err)
		}
		if l.wan == nil {
			return nil
		}
		tap, err := machine.MakeTap(siteTap)
		if err != nil {
			return err
		}
		l.wan.attach(i, tap)
		return uplink(bridge, lay.mtu)
	})
}

func uplink(bridge netlink.Link, mtu int) error {
	nl, err := netlink.NewHandle()
	if err != nil {
		return err
	}
	defer nl.Close()
	if err := machine.PrepareTap(nl, siteTap, mtu); err != nil {
		return err
	}
	link, err := nl.LinkByName(siteTap)
	if err != nil {
		return err
	}
	if err := nl.LinkSetMaster(link, bridge); err != nil {
		return fmt.Errorf("join WAN TAP to bridge: %w", err)
	}
	return nil
}

// addHost makes a host's namespace and the cable to its site's bridge.
func (l *Lab) addHost(site, index int, siteName string, p hostPlan, mtu int) error {
	ns, err := newNamespace()
	if err != nil {
		return err
	}
	h := &Host{
		Name: p.name, Site: siteName, MTU: mtu,
		UnderlayAddr: p.addr, UnderlayDevice: underlayDevice, UnderlayMAC: p.mac,
		ns: ns, site: l.sites[site], port: fmt.Sprintf("h%d", index),
	}
	l.hosts = append(l.hosts, h)
	l.names[h.Name] = h

	err = h.site.do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = h.port, mtu
		cable := &netlink.Veth{
			LinkAttrs: attrs, PeerName: underlayDevice,
			PeerNamespace: netlink.NsFd(ns.fd.Fd()), PeerHardwareAddr: p.mac,
		}
		if err := netlink.LinkAdd(cable); err != nil {
			return fmt.Errorf("make cable: %w", err)
		}
		if err := machine.DisableOffloads(h.port); err != nil {
			return err
		}
		bridge, err := netlink.LinkByName(siteBridge)
		if err != nil {
			return fmt.Errorf("find bridge: %w", err)
		}
		if err := netlink.LinkSetMaster(cable, bridge); err != nil {
			return fmt.Errorf("plug cable in: %w", err)
		}
		return netlink.LinkSetUp(cable)
	})
	if err != nil {
		return err
	}
	return ns.do(func() error {
		if err := loopbackUp(); err != nil {
			return err
		}
		if err := machine.DisableOffloads(underlayDevice); err != nil {
			return err
		}
		link, err := netlink.LinkByName(underlayDevice)
		if err != nil {
			return fmt.Errorf("find %s: %w", underlayDevice, err)
		}
		if err := netlink.LinkSetMTU(link, mtu); err != nil { // a peer may have the default
			return fmt.Errorf("set MTU of %s to %d: %w", underlayDevice, mtu, err)
		}
		addr := &netlink.Addr{IPNet: &net.IPNet{
			IP:   p.addr.Addr().AsSlice(),
			Mask: net.CIDRMask(p.addr.Bits(), 32),
		}}
		if err := netlink.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("set address %v: %w", p.addr, err)
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return fmt.Errorf("set %s up: %w", underlayDevice, err)
		}
		return nil
	})
}

// carrierTimeout bounds the wait for the kernel, which takes milliseconds, and a
// second where it must catch up with many devices.
const carrierTimeout = 30 * time.Second

// awaitUp waits until every cable carries frames. The kernel gets to know of a
// carrier some milliseconds after the device is set up, and drops frames until
// then: a first ARP request, say, which is sent again only after a second.
func (l *Lab) awaitUp(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, carrierTimeout)
	defer cancel()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		var down string
		for _, h := range l.hosts {
			if err := errors.Join(
				h.ns.do(func() error { return findDown(h.Name, &down) }),
				h.site.do(func() error { return findDown(h.Site, &down) }),
			); err != nil {
				return err
			}
		}
		if down == "" {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("%s has no carrier: %w", down, ctx.Err())
		}
	}
}

// findDown names in down a device of the calling thread's namespace that does
// not pass frames, if there is one.
func findDown(where string, down *string) error {
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("list devices of %q: %w", where, err)
	}
	for _, link := range links {
		a := link.Attrs()
		if a.RawFlags&unix.IFF_RUNNING == 0 {
			*down = fmt.Sprintf("device %q of %q", a.Name, where)
		}
	}
	return nil
}

func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find loopback: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set loopback up: %w", err)
	}
	return nil
}

// Host returns the host of that name, or nil.
func (l *Lab) Host(name string) *Host { return l.names[name] }

// Hosts returns all hosts in the order of the configuration.
func (l *Lab) Hosts() []*Host { return append([]*Host(nil), l.hosts...) }

// Part keeps two hosts' underlays from each other (true), or brings them together again
// (false); both reach all others. At one site that holds for as few as two hosts: any
// that are parted from somebody there are parted from each other.
func (l *Lab) Part(a, b string, apart bool) error {
	fail := func(err error) error { return fmt.Errorf("part hosts %q and %q (%t): %w", a, b, apart, err) }
	one, other := l.Host(a), l.Host(b)
	switch {
	case one == nil || other == nil || one == other:
		return fail(errors.New("they are not two hosts of the lab"))
	case one.site != other.site && l.wan == nil:
		return nil // no path joins them
	case one.site != other.site:
		l.wan.part(mac(one.UnderlayMAC), mac(other.UnderlayMAC), apart)
		return nil
	}
	err := one.site.do(func() error {
		for _, h := range []*Host{one, other} {
			link, err := netlink.LinkByName(h.port)
			if err != nil {
				return err
			}
			if err := netlink.LinkSetIsolated(link, apart); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fail(err)
	}
	return nil
}

// WAN returns the link between two sites, given in either order, or nil.
func (l *Lab) WAN(a, b string) *Link {
	if l.wan == nil {
		return nil
	}
	return l.wan.link(a, b)
}

// Close kills whatever process still runs in the lab and takes it down; frames
// on the WAN are lost. It may be called again and then returns the same.
func (l *Lab) Close() error {
	l.closing.Do(func() {
		if l.wan != nil {
			l.reportOverruns()
			l.wan.close()
		}
		l.closed = killAll(l.inodes())
		for _, h := range l.hosts {
			h.ns.close()
		}
		for _, s := range l.sites {
			s.close()
		}
	})
	return l.closed
}

// inodes are the namespaces of the lab, by their number in /proc.
func (l *Lab) inodes() map[uint64]bool {
	inodes := make(map[uint64]bool)
	for _, s := range l.sites {
		inodes[s.inode] = true
	}
	for _, h := range l.hosts {
		inodes[h.ns.inode] = true
	}
	return inodes
}

// reportOverruns tells of frames that the kernel dropped because this process
// was too slow to take them out of a site. No link counts them.
func (l *Lab) reportOverruns() {
	for i, s := range l.sites {
		err := s.do(func() error {
			link, err := netlink.LinkByName(siteTap)
			if err == nil && link.Attrs().Statistics != nil && link.Attrs().Statistics.TxDropped > 0 {
				l.log.Warn("WAN was too slow for a site: the kernel dropped frames", "site", i, "frames", link.Attrs().Statistics.TxDropped)
			}
			return err
		})
		if err != nil {
			l.log.Debug("WAN overruns are not known", "site", i, "err", err)
		}
	}
}
