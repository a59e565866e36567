package gateway_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"

	"violin/internal/gateway"
)

var inside = netip.AddrPortFrom(guestAddress.Addr(), 7)

// at is a forward to the guest's port 7.
func at(protocol, listen string) gateway.Forward {
	return gateway.Forward{Protocol: protocol, Listen: netip.MustParseAddrPort(listen), To: inside}
}

// echoes answers what comes to the guest's port 7, with who it comes from first.
func (g guest) echoes(t *testing.T) {
	t.Helper()
	l, err := gonet.ListenTCP(g.stack, full(inside), ipv4.ProtocolNumber)
	if err != nil {
		t.Fatal(err)
	}
	address := full(inside)
	u, err := gonet.DialUDP(g.stack, &address, nil, ipv4.ProtocolNumber)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close(); u.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
				fmt.Fprintf(c, "%s\n", host) //nolint:errcheck // the client sees
				io.Copy(c, c)                //nolint:errcheck // ditto
			}()
		}
	}()
	go func() {
		buf := make([]byte, 2048)
		for {
			n, from, err := u.ReadFrom(buf)
			if err != nil {
				return
			}
			host, _, _ := net.SplitHostPort(from.String())
			u.WriteTo([]byte(host+" "+string(buf[:n])), from) //nolint:errcheck // a datagram may be lost
		}
	}()
}

// question sends a datagram, again if need be, and returns the answer.
func question(t *testing.T, to, text string) string {
	t.Helper()
	c, err := net.Dial("udp4", to)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	buf := make([]byte, 2048)
	for range 20 {
		if _, err := c.Write([]byte(text)); err != nil {
			t.Fatal(err)
		}
		if err := c.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
			t.Fatal(err)
		}
		if n, err := c.Read(buf); err == nil {
			return string(buf[:n])
		}
	}
	t.Fatalf("nothing answers at %s", to)
	return ""
}

func TestForward(t *testing.T) {
	near, far := cable(t)
	g := start(t, near, gateway.Config{Forwards: []gateway.Forward{at("tcp", "127.0.0.1:0"), at("udp", "0.0.0.0:0")}})
	guest := newGuest(t, far)
	guest.echoes(t)
	on := g.Forwards()
	if len(on) != 2 || on[0].At.Port() == 0 || on[1].At.Port() == 0 || on[0].Problem != "" {
		t.Fatalf("forwards: %+v", on)
	}

	c, err := net.Dial("tcp4", on[0].At.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	text := strings.Repeat("in there ", 50_000)
	go func() {
		io.WriteString(c, text)       //nolint:errcheck // what comes back tells
		c.(*net.TCPConn).CloseWrite() //nolint:errcheck // ditto
	}()
	r := bufio.NewReader(c)
	if from, err := r.ReadString('\n'); err != nil || strings.TrimSpace(from) != gatewayAddress.Addr().String() {
		t.Errorf("the node is called by %q, %v", from, err)
	}
	if got, err := io.ReadAll(r); err != nil || string(got) != text {
		t.Errorf("%d bytes of %d came back, %v", len(got), len(text), err)
	}

	// An answer comes from the address that was asked, of all that the machine has.
	for _, own := range []string{"127.0.0.1", "127.0.0.2"} {
		to := netip.AddrPortFrom(netip.MustParseAddr(own), on[1].At.Port()).String()
		if got := question(t, to, own); got != gatewayAddress.Addr().String()+" "+own {
			t.Errorf("asked at %s: %q", to, got)
		}
	}
}

// Where nobody listens in the node, the connection is reset here.
func TestForwardRefused(t *testing.T) {
	near, far := cable(t)
	g := start(t, near, gateway.Config{Forwards: []gateway.Forward{at("tcp", "127.0.0.1:0")}})
	newGuest(t, far)
	c, err := net.Dial("tcp4", g.Forwards()[0].At.String())
	if err == nil { // else the reset was quicker
		defer c.Close()
		_, err = c.Read(make([]byte, 1))
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the connection ends with %v", err)
	}
}

// What a node answers waits like all that goes out, and the connection for its answer.
func TestForwardHeld(t *testing.T) {
	near, far := cable(t)
	g := start(t, near, gateway.Config{Hold: true, Forwards: []gateway.Forward{at("tcp", "127.0.0.1:0")}})
	guest := newGuest(t, far)
	guest.echoes(t)
	c, err := net.Dial("tcp4", g.Forwards()[0].At.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	// release lets frames out once there are some.
	release := func() {
		t.Helper()
		for n := 0; n == 0; n, _, _ = g.Held() {
			time.Sleep(time.Millisecond)
		}
		if err := c.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil {
			t.Fatalf("%d bytes came out that wait, %v", n, err)
		}
		g.Release(g.Mark())
	}
	release() // that it has taken the connection
	release() // what it says first
	if err := c.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if from, err := bufio.NewReader(c).ReadString('\n'); err != nil || strings.TrimSpace(from) != gatewayAddress.Addr().String() {
		t.Errorf("the outside hears %q, %v", from, err)
	}
}

// A closed gateway lets nothing out, DNS included, but a forward leads in.
func TestClosed(t *testing.T) {
	near, far := cable(t)
	address, heard := outside(t)
	s := server(t, "out there")
	g := start(t, near, gateway.Config{
		Closed: true, Dial: instead(s.Listener.Addr().String()), Resolver: func() (string, error) { return address, nil },
		Forwards: []gateway.Forward{at("tcp", "127.0.0.1:0")},
	})
	guest := newGuest(t, far)
	guest.echoes(t)
	if r, err := guest.browser().Get("http://" + elsewhere.String() + ":80/"); err == nil {
		r.Body.Close()
		t.Error("a guest reached the outside")
	}
	for _, to := range []netip.Addr{elsewhere, gatewayAddress.Addr()} {
		c := guest.dialUDP(t, netip.AddrPortFrom(to, 53))
		if _, err := c.Write([]byte("query")); err != nil {
			t.Fatal(err)
		}
		if err := c.SetReadDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		if n, err := c.Read(make([]byte, 10)); err == nil {
			t.Errorf("%v answers %d bytes", to, n)
		}
	}
	select {
	case got := <-heard:
		t.Errorf("the outside heard %q", got)
	default:
	}
	c, err := net.Dial("tcp4", g.Forwards()[0].At.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if from, err := bufio.NewReader(c).ReadString('\n'); err != nil || strings.TrimSpace(from) != gatewayAddress.Addr().String() {
		t.Errorf("by the forward, %q, %v", from, err)
	}
}

func TestForwardTaken(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	taken := l.Addr().String()
	yields := at("tcp", taken)
	yields.Yield = true
	foreign := at("tcp", "192.0.2.77:0") // TEST-NET-1
	free := at("udp", taken)             // another protocol's
	problems := gateway.Probe([]gateway.Forward{at("tcp", taken), yields, foreign, free})
	if !errors.Is(problems[0], gateway.ErrTaken) || problems[1] != nil || problems[2] == nil || problems[3] != nil {
		t.Errorf("probed: %v", problems)
	}

	cfg := gateway.Config{Forwards: []gateway.Forward{at("tcp", "127.0.0.1:0"), at("tcp", taken)}}
	near, _ := cable(t)
	if _, err := launch(near, cfg); !errors.Is(err, gateway.ErrTaken) {
		t.Fatalf("a gateway with a port that is taken: %v", err)
	}
	// One that takes over from another goes on with what it can have.
	cfg.Forwards, cfg.Lenient = append(cfg.Forwards, yields), true
	near, far := cable(t)
	g := start(t, near, cfg)
	newGuest(t, far).echoes(t)
	on := g.Forwards()
	if on[1].At.IsValid() || on[1].Problem == "" || on[2].At.Port() == netip.MustParseAddrPort(taken).Port() {
		t.Errorf("forwards: %+v", on)
	}
	c, err := net.Dial("tcp4", on[2].At.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if from, err := bufio.NewReader(c).ReadString('\n'); err != nil {
		t.Errorf("%q, %v", from, err)
	}
}

// When the gateway ends, so do its connections, and its ports are free.
func TestForwardEnds(t *testing.T) {
	near, far := cable(t)
	g, err := launch(near, gateway.Config{Forwards: []gateway.Forward{at("tcp", "127.0.0.1:0"), at("udp", "127.0.0.1:0")}})
	if err != nil {
		t.Fatal(err)
	}
	newGuest(t, far).echoes(t)
	on := g.Forwards()
	c, err := net.Dial("tcp4", on[0].At.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	r := bufio.NewReader(c)
	if _, err := r.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	question(t, on[1].At.String(), "still there")
	if err := g.Close(); err != nil {
		t.Error(err)
	}
	if _, err := r.ReadByte(); err == nil {
		t.Error("the connection goes on")
	}
	again := []gateway.Forward{at("tcp", on[0].At.String()), at("udp", on[1].At.String())}
	for i, err := range gateway.Probe(again) {
		if err != nil {
			t.Errorf("%v is not free: %v", again[i], err)
		}
	}
}
