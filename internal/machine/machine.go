// Package machine is this machine as what runs nodes needs it: TAP devices, children
// that die with their parent or outlive it, and what memory and processors there are. Devices are
// those of the calling thread's network namespace.
package machine

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"
)

// Machine is this machine, in the network namespace of this process.
type Machine struct {
	starts  chan start
	lasting bool
}

type start struct {
	cmd *exec.Cmd
	err chan<- error // buffered
}

// New returns this machine. It is kept for as long as the process lives.
func New() *Machine {
	m := &Machine{starts: make(chan start)}
	go m.thread()
	return m
}

// Lasting returns this machine, too, but its children outlive this process.
func Lasting() *Machine { return &Machine{lasting: true} }

// thread starts children on a thread that does not end: the kernel takes the end of
// the thread that started a child for that of its parent.
func (m *Machine) thread() {
	runtime.LockOSThread()
	for s := range m.starts {
		s.err <- s.cmd.Start()
	}
}

// Bind has a child started in a process group of its own, and killed by the kernel with
// SIGKILL when the thread that starts it ends, with its process or by itself.
func Bind(cmd *exec.Cmd) {
	attr := new(syscall.SysProcAttr)
	if cmd.SysProcAttr != nil {
		*attr = *cmd.SysProcAttr
	}
	attr.Pdeathsig = syscall.SIGKILL
	if !attr.Setsid { // a session leader leads a new group anyway
		attr.Setpgid = true
	}
	cmd.SysProcAttr = attr
}

// Start starts cmd in a process group of its own; the caller waits for it. The kernel
// kills it with SIGKILL when this process dies, unless it is to last: then it has a
// session of its own, and no terminal's signals.
func (m *Machine) Start(cmd *exec.Cmd) error {
	if m.lasting {
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if err := cmd.Start(); err != nil {
			return fmt.Errorf("start %s: %w", cmd.Path, err)
		}
		return nil
	}
	Bind(cmd)
	err := make(chan error, 1)
	m.starts <- start{cmd, err}
	if err := <-err; err != nil {
		return fmt.Errorf("start %s: %w", cmd.Path, err)
	}
	return nil
}

// Netlink opens a netlink connection. The caller closes it.
func (m *Machine) Netlink() (*netlink.Handle, error) { return netlink.NewHandle() }

// CreateTap makes a persistent TAP device; see [CreateTap].
func (m *Machine) CreateTap(name string, mtu int) error {
	if err := CreateTap(name, mtu); err != nil {
		return fmt.Errorf("create tap: %w", err)
	}
	return nil
}

// OpenTap opens the far end of a device that CreateTap made; see [OpenTap].
func (m *Machine) OpenTap(name string) (*os.File, error) {
	f, err := OpenTap(name)
	if err != nil {
		return nil, fmt.Errorf("open tap %q: %w", name, err)
	}
	return f, nil
}

// DeleteTap removes a device that CreateTap made. It is no error if it has gone.
func (m *Machine) DeleteTap(name string) error {
	if err := DeleteTap(name); err != nil {
		return fmt.Errorf("delete tap %q: %w", name, err)
	}
	return nil
}

// CreateTap makes a persistent TAP device, up and with the given MTU. The kernel's own
// stack stays silent on it.
func CreateTap(name string, mtu int) error {
	nl, err := netlink.NewHandle()
	if err != nil {
		return err
	}
	defer nl.Close()
	if _, err := nl.LinkByName(name); err == nil {
		// TUNSETIFF would attach to it instead.
		return fmt.Errorf("device %q: %w", name, fs.ErrExist)
	}
	f, err := MakeTap(name)
	if err != nil {
		return err
	}
	defer f.Close() // takes the device along until it is persistent
	if err := PrepareTap(nl, name, mtu); err != nil {
		return err
	}
	// The stack would answer a guest's ARP request for the host's own address, and speak
	// IPv6 by itself.
	if err := os.WriteFile("/proc/sys/net/ipv4/conf/"+name+"/arp_ignore", []byte("8"), 0); err != nil {
		return err
	}
	return persist(f, name)
}

// PrepareTap sets a TAP device up.
func PrepareTap(nl *netlink.Handle, name string, mtu int) error {
	link, err := nl.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find TAP %q: %w", name, err)
	}
	// Before it is up, or the kernel would have announced itself. A kernel may lack IPv6.
	err = os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/disable_ipv6", []byte("1"), 0)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("silence IPv6 on TAP %q: %w", name, err)
	}
	if err := DisableOffloads(name); err != nil {
		return err
	}
	if err := nl.LinkSetMTU(link, mtu); err != nil {
		return fmt.Errorf("set MTU of TAP %q to %d: %w", name, mtu, err)
	}
	if err := nl.LinkSetTxQLen(link, TapQueueLength); err != nil {
		return fmt.Errorf("set queue length of TAP %q: %w", name, err)
	}
	if err := nl.LinkSetUp(link); err != nil {
		return fmt.Errorf("set TAP %q up: %w", name, err)
	}
	return nil
}

// OpenTap opens the far end of a device that CreateTap made, as QEMU does: what the
// switch sends is read, and what is written, the switch receives. A frame a call.
func OpenTap(name string) (*os.File, error) {
	if _, err := netlink.LinkByName(name); err != nil { // MakeTap would make it
		return nil, err
	}
	return MakeTap(name)
}

// DeleteTap removes a device that CreateTap made. It is no error if it has gone.
func DeleteTap(name string) error {
	link, err := netlink.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil
	}
	if err != nil {
		return err
	}
	return netlink.LinkDel(link)
}

// Device is a network device as it was found.
type Device struct {
	Name      string
	MAC       net.HardwareAddr
	MTU       int
	Addresses []Address
}

// Address is one of a device's.
type Address struct {
	Prefix netip.Prefix
	Label  string
}

// FindDevice looks a network device up.
func FindDevice(name string) (*Device, error) {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("network device %q: %w", name, err)
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_V4)
	if err != nil {
		return nil, fmt.Errorf("addresses of network device %q: %w", name, err)
	}
	d := &Device{Name: name, MAC: link.Attrs().HardwareAddr, MTU: link.Attrs().MTU}
	for _, a := range addrs {
		bits, _ := a.Mask.Size()
		if ip, ok := netip.AddrFromSlice(a.IP); ok {
			d.Addresses = append(d.Addresses, Address{netip.PrefixFrom(ip.Unmap(), bits), a.Label})
		}
	}
	return d, nil
}

// Restore gives the device back what a switch has taken of it: its addresses.
func (d *Device) Restore() error {
	link, err := netlink.LinkByName(d.Name)
	if err != nil {
		return fmt.Errorf("restore network device %q: %w", d.Name, err)
	}
	errs := []error{netlink.LinkSetDown(link), netlink.LinkSetHardwareAddr(link, d.MAC), netlink.LinkSetUp(link)}
	for _, a := range d.Addresses {
		ip := &net.IPNet{IP: a.Prefix.Addr().AsSlice(), Mask: net.CIDRMask(a.Prefix.Bits(), a.Prefix.Addr().BitLen())}
		errs = append(errs, netlink.AddrReplace(link, &netlink.Addr{IPNet: ip, Label: a.Label}))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("restore network device %q: %w", d.Name, err)
	}
	return nil
}

// Resident is what a process has of the machine's memory, in bytes; 0 if it is gone.
func Resident(pid int) uint64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		return 0
	}
	f := strings.Fields(string(b))
	if len(f) < 2 {
		return 0
	}
	pages, _ := strconv.ParseUint(f[1], 10, 64)
	return pages * uint64(os.Getpagesize())
}

// Memory is what the machine has and what can be had of it now, in bytes.
func Memory() (total, available uint64, err error) {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, 0, fmt.Errorf("measure memory: %w", err)
	}
	for lines := bufio.NewScanner(bytes.NewReader(b)); lines.Scan(); {
		name, rest, _ := strings.Cut(lines.Text(), ":")
		kib, _ := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
		switch name {
		case "MemTotal":
			total = kib << 10
		case "MemAvailable":
			available = kib << 10
		}
	}
	if total == 0 || available == 0 {
		return 0, 0, errors.New("measure memory: /proc/meminfo does not say what is available")
	}
	return total, available, nil
}
