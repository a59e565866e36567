package lab

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"violin/internal/machine"
)

// A peer that doesn't answer is given up after so long; an answer never is.
const patience = 10 * time.Second

// helperEnv makes the test binary build a lab and wait to be killed.
const helperEnv = "VIOLIN_TEST_LAB_HELPER"

func TestMain(m *testing.M) {
	if os.Getenv(helperEnv) != "" {
		if err := helper(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getenv("VIOLIN_E2E") != "1" {
		t.Skip("needs root for network namespaces; set VIOLIN_E2E=1 to run it")
	}
}

func build(t *testing.T, cfg Config) *Lab {
	t.Helper()
	l, err := New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// twoSites is the lab of most tests: two hosts here, one there.
func twoSites(shape Shape) Config {
	return Config{
		Sites: []Site{{Name: "utah", Hosts: []string{"utah-1", "utah-2"}}, {Name: "gpo", Hosts: []string{"gpo-1"}}},
		Links: []LinkConfig{{A: "utah", B: "gpo", Shape: shape}},
	}
}

// listen opens a UDP socket on the host's underlay address.
func listen(t *testing.T, h *Host) *net.UDPConn {
	t.Helper()
	var c *net.UDPConn
	err := h.Do(func() (err error) {
		c, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(h.UnderlayAddr.Addr(), 0)))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func addrOf(c *net.UDPConn) netip.AddrPort { return c.LocalAddr().(*net.UDPAddr).AddrPort() }

func send(t *testing.T, from, to *net.UDPConn, data []byte) {
	t.Helper()
	if _, err := from.WriteToUDPAddrPort(data, addrOf(to)); err != nil {
		t.Fatal(err)
	}
}

func receive(t *testing.T, c *net.UDPConn) []byte {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1<<16)
	n, _, err := c.ReadFromUDPAddrPort(buf)
	if err != nil {
		t.Fatal(err)
	}
	return buf[:n]
}

// roundTrip has b echo what a sends, and returns the time it took.
func roundTrip(t *testing.T, a, b *net.UDPConn, data []byte) time.Duration {
	t.Helper()
	begin := time.Now()
	send(t, a, b, data)
	send(t, b, a, receive(t, b))
	if got := receive(t, a); !bytes.Equal(got, data) {
		t.Fatalf("echo of %d bytes for %d sent", len(got), len(data))
	}
	return time.Since(begin)
}

func TestUnderlayReaches(t *testing.T) {
	needRoot(t)
	const delay = 20 * time.Millisecond
	// A line of sites, so that a is two links from c.
	l := build(t, Config{
		Sites: []Site{
			{Name: "a", Hosts: []string{"a1", "a2"}}, {Name: "b", Hosts: []string{"b1"}}, {Name: "c", Hosts: []string{"c1"}},
		},
		Links: []LinkConfig{
			{A: "a", B: "b", Shape: Shape{Delay: delay}}, {A: "b", B: "c", Shape: Shape{Delay: delay}},
		},
	})
	conns := make(map[string]*net.UDPConn)
	for _, h := range l.Hosts() {
		conns[h.Name] = listen(t, h)
	}
	big := bytes.Repeat([]byte("violin"), (DefaultMTU-20-8)/6) // IPv4 and UDP headers; nothing is fragmented
	for _, tt := range []struct {
		a, b string
		hops time.Duration
	}{{"a1", "a2", 0}, {"a1", "b1", 1}, {"b1", "c1", 1}, {"c1", "a2", 2}} {
		for _, data := range [][]byte{[]byte("hello"), big} {
			if rtt, least := roundTrip(t, conns[tt.a], conns[tt.b], data), 2*tt.hops*delay; rtt < least {
				t.Errorf("%s to %s and back took %v, want at least %v", tt.a, tt.b, rtt, least)
			}
		}
	}
	for _, ends := range [][2]string{{"a", "b"}, {"c", "b"}} {
		s := l.WAN(ends[0], ends[1]).Stats()
		if s.AtoB.Delivered == 0 || s.BtoA.Delivered == 0 || s.AtoB.Dropped()+s.BtoA.Dropped() > 0 {
			t.Errorf("link %v: %+v; want frames both ways and none dropped", ends, s)
		}
	}
	if l.WAN("a", "c") != nil || l.Host("nobody") != nil {
		t.Error("found a link or a host that isn't there")
	}
}

// In a full mesh a broadcast reaches each host once, and doesn't come back.
func TestMeshDoesNotLoop(t *testing.T) {
	needRoot(t)
	l := build(t, Config{
		Sites: []Site{{Name: "a", Hosts: []string{"a1", "a2"}}, {Name: "b", Hosts: []string{"b1"}}, {Name: "c", Hosts: []string{"c1"}}},
		Links: []LinkConfig{{A: "a", B: "b"}, {A: "b", B: "c"}, {A: "c", B: "a"}},
	})
	src := listen(t, l.Host("a1"))
	const port = 4000
	var dsts []*net.UDPConn
	for _, h := range l.Hosts() {
		err := h.Do(func() error {
			c, err := net.ListenUDP("udp4", &net.UDPAddr{Port: port}) // of no address, to hear broadcasts
			if err == nil {
				dsts = append(dsts, c)
				t.Cleanup(func() { c.Close() })
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for i, h := range l.Hosts() {
		say := func(to string, text string) {
			t.Helper()
			if _, err := src.WriteToUDPAddrPort([]byte(text), netip.AddrPortFrom(netip.MustParseAddr(to), port)); err != nil {
				t.Fatal(err)
			}
		}
		if i == 0 {
			say("172.31.255.255", "all")
		}
		// It takes the same way, so it marks the end of the broadcast's copies.
		say(h.UnderlayAddr.Addr().String(), "end")
		for _, want := range []string{"all", "end"} {
			if got := string(receive(t, dsts[i])); got != want {
				t.Errorf("host %s received %q, want %q", h.Name, got, want)
			}
		}
	}
}

func TestLinkChangesWhileRunning(t *testing.T) {
	needRoot(t)
	l := build(t, twoSites(Shape{}))
	a, b := listen(t, l.Host("utah-1")), listen(t, l.Host("gpo-1"))
	link := l.WAN("gpo", "utah")
	roundTrip(t, a, b, []byte("resolve the addresses"))

	const delay = 30 * time.Millisecond
	if err := link.SetDelay(delay); err != nil {
		t.Fatal(err)
	}
	if rtt := roundTrip(t, a, b, []byte("slow")); rtt < 2*delay {
		t.Errorf("round trip took %v, want at least %v", rtt, 2*delay)
	}
	if err := link.SetLoss(2); err == nil || link.Shape() != (Shape{Delay: delay}) {
		t.Errorf("SetLoss(2) = %v; shape %+v; want an error and no change", err, link.Shape())
	}
	if err := link.SetDelay(0); err != nil {
		t.Fatal(err)
	}

	// What is sent while the link is cut never arrives; what is sent
	// afterwards is the first to. The counter says that it got as far.
	before := link.Stats().AtoB.Partitioned
	link.Partition(true)
	send(t, a, b, []byte("lost"))
	await(t, "the frame is lost in the partition", func() bool { return link.Stats().AtoB.Partitioned > before })
	link.Partition(false)
	send(t, a, b, []byte("found"))
	if got := receive(t, b); string(got) != "found" {
		t.Errorf("received %q after the partition, want %q", got, "found")
	}
}

func TestUnplug(t *testing.T) {
	needRoot(t)
	l := build(t, twoSites(Shape{}))
	h := l.Host("utah-1")
	nl, err := h.Netlink()
	if err != nil {
		t.Fatal(err)
	}
	defer nl.Close()
	carrier := func() bool {
		link, err := nl.LinkByName(h.UnderlayDevice)
		if err != nil {
			t.Fatal(err)
		}
		return link.Attrs().RawFlags&unix.IFF_RUNNING != 0
	}
	await(t, "the cable is in", carrier)
	if err := h.Unplug(true); err != nil {
		t.Fatal(err)
	}
	await(t, "the cable is out", func() bool { return !carrier() })
	if err := h.Unplug(false); err != nil {
		t.Fatal(err)
	}
	await(t, "the cable is in again", carrier)
	roundTrip(t, listen(t, h), listen(t, l.Host("gpo-1")), []byte("back"))
}

// Two hosts that are parted do not reach each other, and both reach the third.
func TestPart(t *testing.T) {
	needRoot(t)
	l := build(t, twoSites(Shape{}))
	conns := map[string]*net.UDPConn{}
	for _, h := range l.Hosts() {
		conns[h.Name] = listen(t, h)
	}
	for _, pair := range [][3]string{{"utah-1", "utah-2", "gpo-1"}, {"utah-1", "gpo-1", "utah-2"}} {
		a, b, third := conns[pair[0]], conns[pair[1]], conns[pair[2]]
		roundTrip(t, a, b, []byte("resolve the addresses"))
		if err := l.Part(pair[0], pair[1], true); err != nil {
			t.Fatal(err)
		}
		send(t, a, b, []byte("lost"))
		send(t, b, a, []byte("lost"))
		roundTrip(t, a, third, []byte("with the third"))
		roundTrip(t, b, third, []byte("with the third"))
		if err := l.Part(pair[0], pair[1], false); err != nil {
			t.Fatal(err)
		}
		roundTrip(t, a, b, []byte("together again"))
	}
	if err := l.Part("utah-1", "nobody", true); err == nil {
		t.Error("a host was parted from one that there is not")
	}
}

func TestStartRunsInsideTheHost(t *testing.T) {
	needRoot(t)
	l := build(t, twoSites(Shape{}))
	seen := make(map[string]string)
	for _, h := range l.Hosts() {
		var out bytes.Buffer
		cmd := exec.Command("ip", "-o", "-4", "addr", "show", "scope", "global")
		cmd.Stdout = &out
		if err := h.Start(cmd); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Fatal(err)
		}
		if want := h.UnderlayAddr.String(); strings.Count(out.String(), "\n") != 1 || !strings.Contains(out.String(), want) {
			t.Errorf("host %s has the addresses %q, want only %s", h.Name, out.String(), want)
		}
		link, err := os.Readlink(h.NamespacePath())
		if err != nil {
			t.Fatal(err)
		}
		if other, dup := seen[link]; dup {
			t.Errorf("hosts %s and %s are in the same namespace", h.Name, other)
		}
		seen[link] = h.Name
	}
	own, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	if h, in := seen[own]; in {
		t.Errorf("host %s is in the namespace of this process", h)
	}
	if err := l.Hosts()[0].Start(exec.Command("/nonexistent")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Start of no program = %v, want %v", err, fs.ErrNotExist)
	}
}

func TestTap(t *testing.T) {
	needRoot(t)
	l := build(t, twoSites(Shape{}))
	h := l.Host("utah-1")
	if err := h.CreateTap("n0", 1600); err != nil {
		t.Fatal(err)
	}
	if err := h.CreateTap("n0", 1600); !errors.Is(err, fs.ErrExist) {
		t.Errorf("second CreateTap = %v, want %v", err, fs.ErrExist)
	}
	if err := h.CreateTap("a-name-that-is-too-long", 1500); err == nil {
		t.Error("made a device with a name too long")
	}
	if err := h.CreateTap("n1", 10); err == nil {
		t.Error("made a device with an MTU of 10")
	}
	nl, err := h.Netlink()
	if err != nil {
		t.Fatal(err)
	}
	defer nl.Close()
	if _, err := nl.LinkByName("n1"); !errors.As(err, new(netlink.LinkNotFoundError)) {
		t.Errorf("CreateTap failed and left its device behind: %v", err)
	}

	link, err := nl.LinkByName("n0")
	if err != nil {
		t.Fatal(err)
	}
	tap, isTap := link.(*netlink.Tuntap)
	if a := link.Attrs(); !isTap || tap.Mode != netlink.TUNTAP_MODE_TAP || tap.NonPersist ||
		a.MTU != 1600 || a.TxQLen != machine.TapQueueLength || a.RawFlags&unix.IFF_UP == 0 {
		t.Errorf("device is %+v, want a persistent TAP, up, with an MTU of 1600 and a queue of %d", link, machine.TapQueueLength)
	}

	// As QEMU would: attach to it, and send an ARP request for the host's own
	// address. The host's stack must not speak. What it has to say it says
	// during the write; a frame of ours from the other side marks the end.
	var f *os.File
	err = h.Do(func() (err error) {
		f, err = machine.MakeTap("n0")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	await(t, "the kernel has noticed the reader", func() bool {
		link, err := nl.LinkByName("n0")
		if err != nil {
			t.Fatal(err)
		}
		return link.Attrs().RawFlags&unix.IFF_RUNNING != 0
	})
	if _, err := f.Write(arpRequest(h.UnderlayAddr.Addr())); err != nil {
		t.Fatal(err)
	}
	end := bytes.Repeat([]byte{0xee}, 60)
	if err := h.Do(func() error { return sendRaw("n0", end) }); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 2000)
	if err := f.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	n, err := f.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(buf[:n], end) {
		t.Errorf("the host's stack sent % x to the machine, want silence", buf[:n])
	}

	for range 2 { // the second time it has gone already
		if err := h.DeleteTap("n0"); err != nil {
			t.Error(err)
		}
	}
	if _, err := nl.LinkByName("n0"); !errors.As(err, new(netlink.LinkNotFoundError)) {
		t.Errorf("after DeleteTap the device is still there: %v", err)
	}
}

func arpRequest(target netip.Addr) []byte {
	b := []byte{
		0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x52, 0x54, 0, 0, 0, 1, 0x08, 0x06,
		0, 1, 0x08, 0, 6, 4, 0, 1, // Ethernet, IPv4, request
		0x52, 0x54, 0, 0, 0, 1, 10, 10, 0, 1,
		0, 0, 0, 0, 0, 0,
	}
	return append(b, target.AsSlice()...)
}

// sendRaw puts a frame on a device of the calling thread's namespace.
func sendRaw(device string, data []byte) error {
	ifi, err := net.InterfaceByName(device)
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Sendto(fd, data, 0, &unix.SockaddrLinklayer{Ifindex: ifi.Index})
}

func TestCloseLeavesNothing(t *testing.T) {
	needRoot(t)
	before := openFiles(t)
	l := build(t, twoSites(Shape{Delay: time.Hour}))
	h := l.Host("utah-1")
	if err := h.CreateTap("n0", 1500); err != nil {
		t.Fatal(err)
	}
	pids := []int{startSleep(t, h), startDaemon(t, h)}
	inodes := l.inodes()
	// A frame is on its way, for ever.
	send(t, listen(t, h), listen(t, l.Host("gpo-1")), []byte("hello"))

	for range 2 {
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for _, pid := range pids {
		awaitDeath(t, pid)
	}
	assertEmpty(t, inodes)
	for name, call := range map[string]func() error{
		"Do":        func() error { return h.Do(func() error { return nil }) },
		"Start":     func() error { return h.Start(exec.Command("true")) },
		"CreateTap": func() error { return h.CreateTap("n1", 1500) },
		"DeleteTap": func() error { return h.DeleteTap("n0") },
		"Unplug":    func() error { return h.Unplug(true) },
		"Netlink":   func() error { _, err := h.Netlink(); return err },
	} {
		if err := call(); !errors.Is(err, ErrClosed) {
			t.Errorf("%s after Close = %v, want %v", name, err, ErrClosed)
		}
	}
	// The test's own two sockets close with it.
	if after := openFiles(t); len(after) > len(before)+2 {
		t.Errorf("open files before: %v; after: %v", before, after)
	}
}

func TestNewLeavesNothingWhenCancelled(t *testing.T) {
	needRoot(t)
	before := openFiles(t)
	for n := range 5 { // 2 sites and 3 hosts are built one after the other
		l, err := New(&lateCancel{Context: t.Context(), left: n}, twoSites(Shape{}))
		if l != nil || !errors.Is(err, context.Canceled) {
			t.Fatalf("cancelled at step %d: New = %v, %v, want %v", n, l, err, context.Canceled)
		}
		if after := openFiles(t); len(after) > len(before) {
			t.Errorf("cancelled at step %d: open files before: %v; after: %v", n, before, after)
		}
	}
}

// lateCancel is cancelled when asked for the left+1st time.
type lateCancel struct {
	context.Context
	left int
}

func (c *lateCancel) Err() error {
	if c.left == 0 {
		return context.Canceled
	}
	c.left--
	return nil
}

func TestKillLeavesNothing(t *testing.T) {
	needRoot(t)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), helperEnv+"=1")
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe() // ends the helper should this test die
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	inodes := make(map[uint64]bool)
	var pid int
	for lines := bufio.NewScanner(stdout); lines.Scan() && lines.Text() != "ready"; {
		word, value, _ := strings.Cut(lines.Text(), " ")
		n, err := strconv.ParseUint(value, 10, 64)
		if err != nil {
			t.Fatalf("helper says %q", lines.Text())
		}
		switch word {
		case "child":
			pid = int(n)
		case "namespace":
			inodes[n] = true
		}
	}
	if pid == 0 || len(inodes) != 5 {
		t.Fatalf("helper built child %d and namespaces %v", pid, inodes)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait() // says that it was killed
	awaitDeath(t, pid)
	assertEmpty(t, inodes)
}

// helper builds a lab with a running child, says so, and waits for the end.
func helper() error {
	l, err := New(context.Background(), twoSites(Shape{Delay: time.Millisecond}))
	if err != nil {
		return err
	}
	defer l.Close()
	cmd := exec.Command("sleep", "1000")
	if err := l.Host("utah-2").Start(cmd); err != nil {
		return err
	}
	fmt.Println("child", cmd.Process.Pid)
	for inode := range l.inodes() {
		fmt.Println("namespace", inode)
	}
	fmt.Println("ready")
	_, err = os.Stdin.Read(make([]byte, 1))
	return err
}

func TestGoexitEndsOnlyItsHost(t *testing.T) {
	needRoot(t)
	l := build(t, twoSites(Shape{}))
	done := make(chan error)
	go func() { done <- l.Host("utah-1").Do(func() error { runtime.Goexit(); return nil }) }()
	if err := <-done; !errors.Is(err, ErrClosed) {
		t.Errorf("Do of a function that ends its goroutine = %v, want %v", err, ErrClosed)
	}
	if err := l.Host("utah-2").Do(func() error { return nil }); err != nil {
		t.Errorf("the other host: %v", err)
	}
}

// await waits for the kernel, or a goroutine of the lab, to come that far.
func await(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited %v in vain until %s", patience, what)
		}
	}
}

func startSleep(t *testing.T, h *Host) int {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	if err := h.Start(cmd); err != nil {
		t.Fatal(err)
	}
	go cmd.Wait()
	return cmd.Process.Pid
}

// startDaemon starts a process that leaves its parent, session and group.
func startDaemon(t *testing.T, h *Host) int {
	t.Helper()
	cmd := exec.Command("sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 & echo $!")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Start(cmd); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

func awaitDeath(t *testing.T, pid int) {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(patience.Milliseconds()))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n != 1 {
			t.Fatalf("process %d lives on (poll: %v)", pid, err)
		}
		return
	}
}

// assertEmpty looks for the namespaces at every thread of the machine.
func assertEmpty(t *testing.T, inodes map[uint64]bool) {
	t.Helper()
	await(t, "no thread lives in the lab's namespaces", func() bool {
		paths, err := fs.Glob(os.DirFS("/proc"), "[0-9]*/task/[0-9]*/ns/net")
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range paths {
			var st unix.Stat_t
			if unix.Stat("/proc/"+p, &st) == nil && inodes[st.Ino] {
				return false
			}
		}
		return true
	})
}

func openFiles(t *testing.T) []string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		name, _ := os.Readlink("/proc/self/fd/" + e.Name())
		names = append(names, name)
	}
	return names
}

// BenchmarkWAN measures TCP from one site to the other, with the kernel's TCP on
// both hosts in the figure. The link has no delay, as TCP would take seconds to
// fill one that has. Run with VIOLIN_E2E=1.
func BenchmarkWAN(b *testing.B) {
	if os.Getenv("VIOLIN_E2E") != "1" {
		b.Skip("needs root for network namespaces; set VIOLIN_E2E=1 to run it")
	}
	l, err := New(b.Context(), twoSites(Shape{}))
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	var lis net.Listener
	err = l.Host("gpo-1").Do(func() (err error) {
		lis, err = net.Listen("tcp4", net.JoinHostPort(l.Host("gpo-1").UnderlayAddr.Addr().String(), "0"))
		return err
	})
	if err != nil {
		b.Fatal(err)
	}
	defer lis.Close()
	var src net.Conn
	err = l.Host("utah-1").Do(func() (err error) {
		src, err = net.Dial("tcp4", lis.Addr().String()) // an address, so that it stays on this thread
		return err
	})
	if err != nil {
		b.Fatal(err)
	}
	defer src.Close()
	dst, err := lis.Accept()
	if err != nil {
		b.Fatal(err)
	}
	defer dst.Close()

	chunk := make([]byte, 1<<20)
	b.SetBytes(int64(len(chunk)))
	end := make(chan error, 1)
	go func() {
		buf := make([]byte, len(chunk)) // with small reads the kernel would not open its window
		total := 0
		for {
			n, err := dst.Read(buf)
			total += n
			if errors.Is(err, io.EOF) && total == b.N*len(chunk) {
				end <- nil
				return
			}
			if err != nil {
				end <- fmt.Errorf("after %d of %d bytes: %w", total, b.N*len(chunk), err)
				return
			}
		}
	}()
	for range b.N {
		if _, err := src.Write(chunk); err != nil {
			b.Fatal(err)
		}
	}
	src.Close()
	if err := <-end; err != nil {
		b.Fatal(err)
	}
	s := l.WAN("utah", "gpo").Stats()
	b.ReportMetric(float64(s.AtoB.Delivered)/b.Elapsed().Seconds(), "frames/s")
	b.ReportMetric(float64(s.AtoB.Dropped()+s.BtoA.Dropped()), "drops")
}
