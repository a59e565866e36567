package lab

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"violin/internal/machine"
)

// Host stands for one machine of a site. Its methods may be called from any
// goroutine; after [Lab.Close] they return [ErrClosed].
type Host struct {
	Name string
	Site string
	// UnderlayAddr is the host's address with the length of the underlay's
	// prefix. The hosts of its site, and of all sites that a path of links leads
	// to, are in the same Ethernet.
	UnderlayAddr netip.Prefix
	// UnderlayDevice is the end of the host's cable, in its namespace, that has
	// the address; a switch may take both over.
	UnderlayDevice string
	UnderlayMAC    net.HardwareAddr
	MTU            int // of the underlay, in bytes

	ns   *namespace
	site *namespace
	port string // the other end of the host's cable, in the site's namespace
}

// Do runs fn on the host's thread: sockets and devices that fn makes, and files
// under /proc/sys/net that it opens, are the host's. Calls run one at a time, so
// fn must not call Do (nor a method that does) of the same host, and must not
// wait for long. It must return, not end its goroutine as testing.T.Fatal does.
func (h *Host) Do(fn func() error) error {
	return h.ns.do(fn)
}

// Start starts cmd inside the host's namespace, in a process group of its own;
// the caller waits for it. The kernel kills it with SIGKILL when this process
// dies or the lab is closed. The kernel forgets that bond for a child's own
// children, so don't let a daemon detach.
func (h *Host) Start(cmd *exec.Cmd) error {
	machine.Bind(cmd)
	if err := h.ns.do(cmd.Start); err != nil {
		return fmt.Errorf("start %s on host %q: %w", cmd.Path, h.Name, err)
	}
	return nil
}

// Netlink opens a netlink connection to the host. The caller closes it.
func (h *Host) Netlink() (*netlink.Handle, error) {
	var nl *netlink.Handle
	err := h.ns.do(func() (err error) {
		nl, err = netlink.NewHandleAt(netns.NsHandle(h.ns.fd.Fd()), unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open netlink on host %q: %w", h.Name, err)
	}
	return nl, nil
}

// NamespacePath is a file that opens the host's network namespace for as long
// as the lab lives, as `nsenter --net=PATH` takes it.
func (h *Host) NamespacePath() string {
	return fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), h.ns.tid)
}

// CreateTap makes a persistent TAP device on the host, up and with the given
// MTU, for QEMU to open by `-netdev tap,ifname=NAME,script=no,downscript=no`
// and for a switch to take as a port. The kernel's own stack stays silent on it.
//
// The kernel drops frames sent to the device until QEMU has opened it and the
// kernel has noticed, some milliseconds later, which the flag IFF_RUNNING tells.
func (h *Host) CreateTap(name string, mtu int) error {
	err := h.ns.do(func() error { return machine.CreateTap(name, mtu) })
	if err != nil {
		return fmt.Errorf("create tap on host %q: %w", h.Name, err)
	}
	return nil
}

// OpenTap opens the far end of a device that CreateTap made, as QEMU does: what the
// switch sends is read, and what is written, the switch receives. A frame a call.
func (h *Host) OpenTap(name string) (*os.File, error) {
	var f *os.File
	err := h.ns.do(func() (err error) {
		f, err = machine.OpenTap(name)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open tap %q on host %q: %w", name, h.Name, err)
	}
	return f, nil
}

// DeleteTap removes a device that CreateTap made. It is no error if it has gone.
func (h *Host) DeleteTap(name string) error {
	err := h.ns.do(func() error { return machine.DeleteTap(name) })
	if err != nil {
		return fmt.Errorf("delete tap %q on host %q: %w", name, h.Name, err)
	}
	return nil
}

// Unplug pulls the host's underlay cable (true) or puts it back (false).
func (h *Host) Unplug(out bool) error {
	err := h.site.do(func() error {
		link, err := netlink.LinkByName(h.port)
		if err != nil {
			return err
		}
		if out {
			return netlink.LinkSetDown(link)
		}
		return netlink.LinkSetUp(link)
	})
	if err != nil {
		return fmt.Errorf("unplug host %q (%t): %w", h.Name, out, err)
	}
	return nil
}
