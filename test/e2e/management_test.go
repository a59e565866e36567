package e2e

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"violin/internal/lab"
)

// managementDevice is a machine's end of the management network.
const managementDevice = "office"

// A management network joins machines, servers and etcds, apart from the underlay of
// the slices, which a user-space switch takes. It is a lab of its own, with the distance
// between its sites, in which servers and etcds are hosts; a machine has a cable from it.
// Any two can be kept from each other.
type management struct {
	lab      *lab.Lab
	machines *lab.Lab
}

// manage builds one for machines and others, at sites that are so far apart each way.
func manage(t *testing.T, machines *lab.Lab, sites []lab.Site, delay time.Duration) *management {
	t.Helper()
	config := lab.Config{Sites: sites, Underlay: netip.MustParsePrefix("172.30.0.0/16"), Logger: slog.New(slog.DiscardHandler)}
	for i, a := range sites {
		for _, b := range sites[i+1:] {
			config.Links = append(config.Links, lab.LinkConfig{A: a.Name, B: b.Name, Shape: lab.Shape{Delay: delay}})
		}
	}
	l, err := lab.New(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	m := &management{lab: l, machines: machines}
	for _, h := range machines.Hosts() {
		if err := m.cable(h); err != nil {
			t.Fatalf("cable of machine %s: %v", h.Name, err)
		}
	}
	return m
}

// cable moves the device of a machine's place in the network to the machine.
func (m *management) cable(machine *lab.Host) error {
	f, err := os.Open(machine.NamespacePath())
	if err != nil {
		return err
	}
	defer f.Close()
	place := m.lab.Host(machine.Name)
	err = place.Do(func() error {
		link, err := netlink.LinkByName(place.UnderlayDevice)
		if err != nil {
			return err
		}
		// The machine has one of its own by that name.
		if err := errors.Join(netlink.LinkSetDown(link), netlink.LinkSetName(link, managementDevice)); err != nil {
			return err
		}
		return netlink.LinkSetNsFd(link, int(f.Fd()))
	})
	if err != nil {
		return err
	}
	return machine.Do(func() error {
		link, err := netlink.LinkByName(managementDevice)
		if err != nil {
			return err
		}
		address := &netlink.Addr{IPNet: &net.IPNet{IP: place.UnderlayAddr.Addr().AsSlice(), Mask: net.CIDRMask(place.UnderlayAddr.Bits(), 32)}}
		return errors.Join(netlink.AddrAdd(link, address), netlink.LinkSetUp(link))
	})
}

// address is where a machine, a server or an etcd is found.
func (m *management) address(name string) netip.Addr { return m.lab.Host(name).UnderlayAddr.Addr() }

// host is where the processes of a machine, a server or an etcd run.
func (m *management) host(name string) *lab.Host {
	if h := m.machines.Host(name); h != nil {
		return h
	}
	return m.lab.Host(name)
}

// part keeps two from each other: what either sends to the other is lost. It returns what
// brings them together again.
func (m *management) part(t *testing.T, a, b string) (join func()) {
	t.Helper()
	change := func(name, to string, change func(*netlink.Route) error) {
		t.Helper()
		hole := &netlink.Route{Dst: netlink.NewIPNet(m.address(to).AsSlice()), Type: unix.RTN_BLACKHOLE}
		if err := m.host(name).Do(func() error { return change(hole) }); err != nil {
			t.Errorf("part %s from %s: %v", name, to, err)
		}
	}
	for _, ends := range [][2]string{{a, b}, {b, a}} {
		change(ends[0], ends[1], netlink.RouteAdd)
	}
	return func() {
		t.Helper()
		for _, ends := range [][2]string{{a, b}, {b, a}} {
			change(ends[0], ends[1], netlink.RouteDel)
		}
	}
}

// Two that are parted do not hear each other, all others do, and they do again when they
// are brought together.
func TestManagement(t *testing.T) {
	if os.Getenv("VIOLIN_E2E") == "" {
		t.Skip("set VIOLIN_E2E=1 to run this with namespaces")
	}
	machines, err := lab.New(t.Context(), lab.Config{Sites: []lab.Site{{Name: "west", Hosts: []string{"alpha"}}, {Name: "east", Hosts: []string{"beta"}}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { machines.Close() })
	m := manage(t, machines, []lab.Site{{Name: "west", Hosts: []string{"alpha", "office1"}}, {Name: "east", Hosts: []string{"beta"}}}, time.Millisecond)
	all := []string{"alpha", "beta", "office1"}
	sockets := map[string]*net.UDPConn{}
	for _, name := range all {
		err := m.host(name).Do(func() (err error) {
			sockets[name], err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(m.address(name), 4000)))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { sockets[name].Close() })
	}
	// heard are those whom each hears, of all who speak to it.
	heard := func() (pairs []string) {
		for _, from := range all {
			for _, to := range all {
				if from == to {
					continue
				}
				_, _ = sockets[from].WriteToUDPAddrPort([]byte(from), netip.AddrPortFrom(m.address(to), 4000)) // a hole is an error
				_ = sockets[to].SetReadDeadline(time.Now().Add(300 * time.Millisecond))
				buf := make([]byte, 64)
				if n, err := sockets[to].Read(buf); err == nil {
					pairs = append(pairs, fmt.Sprintf("%s hears %s", to, buf[:n]))
				}
			}
		}
		slices.Sort(pairs)
		return pairs
	}
	everybody := []string{"alpha hears beta", "alpha hears office1", "beta hears alpha", "beta hears office1", "office1 hears alpha", "office1 hears beta"}
	if got := heard(); !slices.Equal(got, everybody) {
		t.Errorf("together: %q", got)
	}
	join := m.part(t, "alpha", "beta")
	if got, want := heard(), []string{"alpha hears office1", "beta hears office1", "office1 hears alpha", "office1 hears beta"}; !slices.Equal(got, want) {
		t.Errorf("parted: %q", got)
	}
	join()
	if got := heard(); !slices.Equal(got, everybody) {
		t.Errorf("together again: %q", got)
	}
}
