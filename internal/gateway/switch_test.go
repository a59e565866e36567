package gateway_test

import (
	"context"
	"io"
	"log/slog"
	"os"
	"sync"
	"testing"
	"time"

	"violin/internal/coloring"
	"violin/internal/cut"
	"violin/internal/fabric"
	"violin/internal/gateway"
	"violin/internal/lab"
)

// handed is what a switch hands over to its controller.
type handed struct {
	mu      sync.Mutex
	packets []coloring.Packet
	frames  [][]byte
}

func (h *handed) take(p coloring.Packet, frame []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.packets = append(h.packets, p)
	h.frames = append(h.frames, frame)
}

// empty returns what has come since it was last called.
func (h *handed) empty() ([]coloring.Packet, [][]byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	p, f := h.packets, h.frames
	h.packets, h.frames = nil, nil
	return p, f
}

// A guest reaches the outside through real switches, by way of the host that has
// the gateway, whatever its colour. Only its own closed gate holds what comes back.
func TestThroughSwitches(t *testing.T) {
	if os.Getenv("VIOLIN_E2E") != "1" {
		t.Skip("runs real Open vSwitches, as root: set VIOLIN_E2E=1")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	log := slog.New(slog.DiscardHandler)
	l, err := lab.New(ctx, lab.Config{
		Sites:  []lab.Site{{Name: "near", Hosts: []string{"near"}}, {Name: "far", Hosts: []string{"far"}}},
		Links:  []lab.LinkConfig{{A: "near", B: "far", Shape: lab.Shape{Delay: time.Millisecond}}},
		Logger: log,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	switches := map[string]*fabric.Switch{}
	taken := map[string]*handed{"near": {}, "far": {}}
	for name := range taken {
		h := l.Host(name)
		switches[name], err = fabric.Start(ctx, fabric.Config{
			Host: name, Dir: t.TempDir(), Launcher: h, Netlink: h.Netlink,
			UnderlayDevice: h.UnderlayDevice, UnderlayAddr: h.UnderlayAddr, UnderlayMAC: h.UnderlayMAC, MTU: h.MTU,
			OnPacket: taken[name].take, Logger: log,
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { switches[name].Close() })
	}
	const network = 1
	numbers := map[string]uint16{"near": 1, "far": 2}
	join := func(host, other string, remote coloring.Remote) {
		o := l.Host(other)
		if err := switches[host].AddPeer(ctx, fabric.Peer{ID: numbers[other], Host: other, Addr: o.UnderlayAddr.Addr(), MAC: o.UnderlayMAC}); err != nil {
			t.Fatal(err)
		}
		remote.Network, remote.Peer = network, numbers[other]
		switches[host].SetRemotes([]coloring.Remote{remote})
	}
	join("near", "far", coloring.Remote{Address: guestMAC})
	join("far", "near", coloring.Remote{Address: gatewayMAC, Outside: true})
	plug := func(host string, p fabric.Port) (*os.File, uint32) {
		t.Helper()
		if err := l.Host(host).CreateTap("n0", 1500); err != nil {
			t.Fatal(err)
		}
		f, err := l.Host(host).OpenTap("n0")
		if err != nil {
			t.Fatal(err)
		}
		p.Tap, p.Slice, p.Network = "n0", "s", network
		number, err := switches[host].Attach(ctx, p)
		if err != nil {
			t.Fatal(err)
		}
		return f, number
	}
	way, _ := plug("near", fabric.Port{Address: gatewayMAC, Outside: true})
	device, port := plug("far", fabric.Port{Node: "guest", Address: guestMAC})
	node := coloring.NodeKey{Slice: "s", Node: "guest"}
	paint := func(c coloring.Color) {
		t.Helper()
		for _, sw := range switches {
			if err := sw.Update(ctx, func(st *coloring.State) {
				if sw == switches["far"] {
					st.Nodes[node] = c
				}
				st.Counted[network] = []cut.Epoch{c.Epoch - 1, c.Epoch, c.Epoch + 1}
			}); err != nil {
				t.Fatal(err)
			}
			if err := sw.Purge(ctx); err != nil {
				t.Fatal(err)
			}
		}
	}
	paint(coloring.Color{})

	const body = "out there"
	s := server(t, body)
	start(t, way, gateway.Config{Dial: instead(s.Listener.Addr().String())})
	g := newGuest(t, device)
	fetch := func() {
		t.Helper()
		r, err := g.browser().Get("http://" + elsewhere.String() + ":80/")
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		if got, err := io.ReadAll(r.Body); err != nil || string(got) != body {
			t.Fatalf("%q, %v", got, err)
		}
	}
	for _, c := range []coloring.Color{{}, {Epoch: 1, Recording: true}, {Epoch: 1}, {Epoch: 2, Recording: true}, {Epoch: 255}} {
		paint(c)
		fetch()
		for host, h := range taken {
			if p, _ := h.empty(); len(p) > 0 {
				t.Errorf("%+v: the switch of %s hands %d frames over, first %+v", c, host, len(p), p[0])
			}
		}
		sent, err := switches["far"].Counters(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if sent.Sent[coloring.Channel{Peer: numbers["near"], Network: network, Epoch: c.Epoch}] == 0 {
			t.Errorf("%+v: the guest's frames are not counted: %v", c, sent.Sent)
		}
		came, err := switches["near"].Counters(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for what, m := range map[string]map[coloring.Channel]uint64{"sent at the gateway": came.Sent, "received at the guest": sent.Received} {
			for ch, n := range m {
				if n > 0 {
					t.Errorf("%+v: frames from outside are counted as %s: %v, %d", c, what, ch, n)
				}
			}
		}
	}

	// A connection that waits while the node is cut: what comes is held, as of no
	// epoch, and goes on when the gate gives it out.
	paint(coloring.Color{Epoch: 2, Closed: true})
	held := cut.NewGate[[]byte](2, cut.Limits{})
	held.Close()
	done := make(chan error, 1)
	go func() {
		r, err := g.browser().Get("http://" + elsewhere.String() + ":80/")
		if err == nil {
			var got []byte
			if got, err = io.ReadAll(r.Body); err == nil && string(got) != body {
				err = io.ErrUnexpectedEOF
			}
			r.Body.Close()
		}
		done <- err
	}()
	arrive := func() (some bool) {
		packets, frames := taken["far"].empty()
		for i, p := range packets {
			if !p.Outside || p.Kind != coloring.KindClosed || !p.Tunneled {
				t.Fatalf("handed over: %+v", p)
			}
			v, err := held.Arrive(cut.Frame[[]byte]{Epoch: p.Epoch, Outside: p.Outside, Size: len(frames[i]), Ref: frames[i]})
			if err != nil || v.Record || v.Newer || v.Deliver {
				t.Fatalf("the gate says %+v, %v", v, err)
			}
		}
		return len(packets) > 0
	}
	for !arrive() {
		if ctx.Err() != nil {
			t.Fatal("nothing from outside came to the closed gate")
		}
		time.Sleep(time.Millisecond)
	}
	held.Flip(3, true)
	for _, r := range held.Open() {
		if r.Record {
			t.Error("a frame from outside is channel state")
		}
		if err := switches["far"].Output(port, r.Frame.Ref); err != nil {
			t.Fatal(err)
		}
	}
	paint(coloring.Color{Epoch: 3, Recording: true})
	if err := <-done; err != nil {
		t.Error(err)
	}
}
