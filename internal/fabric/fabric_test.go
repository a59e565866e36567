package fabric

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"violin/internal/coloring"
	"violin/internal/cut"
	"violin/internal/lab"
)

// guest is a node's end of a TAP device.
type guest struct {
	tap  *os.File
	addr net.HardwareAddr
}

// plug opens the far end of a TAP device of the host, as QEMU does.
func plug(t *testing.T, h *lab.Host, name string) *os.File {
	t.Helper()
	var f *os.File
	err := h.Do(func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		ifr, err := unix.NewIfreq(name)
		if err != nil {
			return err
		}
		ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
			unix.Close(fd)
			return err
		}
		f = os.NewFile(uintptr(fd), name)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func (g *guest) send(t *testing.T, to net.HardwareAddr, n int) {
	t.Helper()
	frame := append(append(append([]byte{}, to...), g.addr...), 0x88, 0xb5)
	frame = append(frame, fmt.Sprintf("%086d", n)...)
	if _, err := g.tap.Write(frame); err != nil {
		t.Fatal(err)
	}
}

// receive waits for n frames of the test's own kind.
func (g *guest) receive(t *testing.T, n int) {
	t.Helper()
	if err := g.tap.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 2048)
	for got := 0; got < n; {
		m, err := g.tap.Read(buf)
		if err != nil {
			t.Fatalf("after %d of %d frames: %v", got, n, err)
		}
		if m == 100 && buf[12] == 0x88 && buf[13] == 0xb5 {
			got++
		}
	}
}

// pair is two hosts at two sites, a guest on each.
type pair struct {
	guests   map[string]*guest
	switches map[string]*Switch
	keys     map[string]coloring.NodeKey
}

// twoHosts is two hosts at two sites, each with a switch.
func twoHosts(ctx context.Context, t *testing.T, names [2]string, queueBytes int, onPacket func(host string, p coloring.Packet, data []byte)) (*lab.Lab, map[string]*Switch) {
	t.Helper()
	if os.Getenv("VIOLIN_E2E") != "1" {
		t.Skip("runs real Open vSwitches, as root: set VIOLIN_E2E=1")
	}
	log := slog.New(slog.DiscardHandler)
	l, err := lab.New(ctx, lab.Config{
		Sites:  []lab.Site{{Name: names[0], Hosts: names[:1]}, {Name: names[1], Hosts: names[1:]}},
		Links:  []lab.LinkConfig{{A: names[0], B: names[1], Shape: lab.Shape{Delay: time.Millisecond}}},
		Logger: log,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	switches := map[string]*Switch{}
	for _, name := range names {
		h := l.Host(name)
		sw, err := Start(ctx, Config{
			Host: name, Dir: t.TempDir(), Launcher: h, Netlink: h.Netlink,
			UnderlayDevice: h.UnderlayDevice, UnderlayAddr: h.UnderlayAddr, UnderlayMAC: h.UnderlayMAC, MTU: h.MTU,
			OnPacket: func(p coloring.Packet, data []byte) { onPacket(name, p, data) }, Logger: log, queueBytes: queueBytes,
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { sw.Close() })
		switches[name] = sw
	}
	return l, switches
}

func newPair(ctx context.Context, t *testing.T, queueBytes int, onPacket func(coloring.Packet, []byte)) *pair {
	t.Helper()
	names := [2]string{"a", "b"}
	l, switches := twoHosts(ctx, t, names, queueBytes, func(_ string, p coloring.Packet, data []byte) { onPacket(p, data) })
	p := &pair{guests: map[string]*guest{}, switches: switches, keys: map[string]coloring.NodeKey{}}
	guests, keys := p.guests, p.keys
	for i, name := range names {
		h := l.Host(name)
		if err := h.CreateTap("n0", 1500); err != nil {
			t.Fatal(err)
		}
		keys[name] = coloring.NodeKey{Slice: "s", Node: name}
		guests[name] = &guest{tap: plug(t, h, "n0"), addr: net.HardwareAddr{2, 0, 0, 0, 0, byte(i + 1)}}
	}
	for i, name := range names {
		other := names[1-i]
		sw, o := switches[name], l.Host(other)
		if err := sw.AddPeer(ctx, Peer{ID: uint16(2 - i), Host: other, Addr: o.UnderlayAddr.Addr(), MAC: o.UnderlayMAC}); err != nil {
			t.Fatal(err)
		}
		sw.SetRemotes([]coloring.Remote{{Network: 1, Address: guests[other].addr, Peer: uint16(2 - i)}})
		if _, err := sw.Attach(ctx, Port{Tap: "n0", Slice: "s", Node: name, Network: 1, Address: guests[name].addr}); err != nil {
			t.Fatal(err)
		}
		if err := sw.Update(ctx, func(st *coloring.State) {
			st.Nodes[keys[name]] = coloring.Color{}
			st.Counted[1] = []cut.Epoch{0, 1}
		}); err != nil {
			t.Fatal(err)
		}
		if err := sw.Purge(ctx); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

// The counters are Mattern's: a frame must be counted in the epoch it was sent in,
// also when its sender flips before the switch has read its datapath's counters.
// Open vSwitch credits what it has not read yet to the entry that matches then.
func TestCountersAcrossFlips(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	p := newPair(ctx, t, 0, func(coloring.Packet, []byte) {})
	guests, switches, keys := p.guests, p.switches, p.keys

	const frames = 60 // in each epoch
	a, b := guests["a"], guests["b"]
	for epoch := range cut.Epoch(8) {
		for n := range frames {
			a.send(t, b.addr, n)
		}
		b.receive(t, frames) // so the sender's switch has sent them all
		if err := switches["a"].Update(ctx, func(st *coloring.State) {
			st.Nodes[keys["a"]] = coloring.Color{Epoch: epoch + 1}
			st.Counted[1] = []cut.Epoch{epoch, epoch + 1, epoch + 2}
		}); err != nil {
			t.Fatal(err)
		}
		if err := switches["a"].Purge(ctx); err != nil {
			t.Fatal(err)
		}
		c, err := switches["a"].Counters(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if sent := c.Sent[coloring.Channel{Peer: 2, Network: 1, Epoch: epoch}]; sent != frames {
			t.Errorf("epoch %d: %d frames counted as sent, of %d", epoch, sent, frames)
		}
		if early := c.Sent[coloring.Channel{Peer: 2, Network: 1, Epoch: epoch + 1}]; early != 0 {
			t.Errorf("epoch %d: %d frames counted as sent in the next epoch, before any was", epoch, early)
		}
		if err := switches["b"].Update(ctx, func(st *coloring.State) {
			st.Nodes[keys["b"]] = coloring.Color{Epoch: epoch + 1}
			st.Counted[1] = []cut.Epoch{epoch, epoch + 1, epoch + 2}
		}); err != nil {
			t.Fatal(err)
		}
		if err := switches["b"].Purge(ctx); err != nil {
			t.Fatal(err)
		}
	}
}

// A closed gate hands every frame over; none may be lost on the way to the
// controller, however fast they come.
func TestNoHeldFrameIsLost(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	const frames = 5000
	p := newPair(ctx, t, 0, func(coloring.Packet, []byte) {})
	sw := p.switches["b"]
	if err := sw.Update(ctx, func(st *coloring.State) { st.Nodes[p.keys["b"]] = coloring.Color{Closed: true} }); err != nil {
		t.Fatal(err)
	}
	if err := sw.Purge(ctx); err != nil {
		t.Fatal(err)
	}
	for n := range frames {
		p.guests["a"].send(t, p.guests["b"].addr, n)
	}
	// Frames may be lost before the gate (a queue on the way is full); what reached
	// it is final once it no longer grows.
	var last, same uint64
	for same < 20 {
		if err := pause(ctx); err != nil {
			t.Fatal(err)
		}
		c, err := sw.Counters(ctx)
		if err != nil {
			t.Fatal(err)
		}
		// The answer comes behind all that the switch had handed over before.
		if c.Seen < c.Handed {
			t.Fatalf("%d frames handed over, %d came", c.Handed, c.Seen)
		}
		if c.Handed != last || c.Handed == 0 {
			last, same = c.Handed, 0
		}
		same++
	}
	if last < frames/2 {
		t.Errorf("only %d of %d frames reached the gate", last, frames)
	}
	sent, err := p.switches["a"].Counters(ctx)
	if err != nil {
		t.Fatal(err)
	}
	got, err := sw.Counters(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d of %d frames reached the gate; sent %v, received %v", last, frames, sent.Sent, got.Received)
}
