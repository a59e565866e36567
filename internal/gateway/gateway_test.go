package gateway_test

import (
	"bytes"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"violin/internal/gateway"
)

func TestTCP(t *testing.T) {
	near, far := cable(t)
	body := strings.Repeat("out there ", 100_000)
	s := server(t, body)
	start(t, near, gateway.Config{Dial: instead(s.Listener.Addr().String())})
	r, err := newGuest(t, far).browser().Get("http://" + elsewhere.String() + ":80/")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	got, err := io.ReadAll(r.Body)
	if err != nil || string(got) != body {
		t.Fatalf("%d bytes of %d, %v", len(got), len(body), err)
	}
}

// A guest has no way to what listens on this machine.
func TestThisMachineIsRefused(t *testing.T) {
	s := server(t, "secret")
	_, port, err := net.SplitHostPort(s.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	own := []string{"127.0.0.1", "127.1.2.3", "0.0.0.0", "169.254.169.254", "224.0.0.1", "255.255.255.255", "240.0.0.1"}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		if p := a.(*net.IPNet); p.IP.To4() != nil {
			own = append(own, p.IP.String())
		}
	}
	for _, a := range own {
		if c, err := gateway.Dial(t.Context(), "tcp4", net.JoinHostPort(a, port)); err == nil {
			t.Errorf("connected to %s", a)
			c.Close()
		} else if !strings.Contains(err.Error(), "guests are not let there") {
			t.Errorf("%s: %v", a, err)
		}
	}
	// The gateway's own address is no way around it.
	near, far := cable(t)
	start(t, near, gateway.Config{})
	g := newGuest(t, far)
	if c, err := g.dial(t.Context(), netip.MustParseAddrPort(net.JoinHostPort(gatewayAddress.Addr().String(), port))); err == nil {
		t.Error("connected to the gateway's own address")
		c.Close()
	}
}

func echo(t *testing.T) string {
	t.Helper()
	c, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 2048)
		for {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			c.WriteTo(bytes.ToUpper(buf[:n]), from) //nolint:errcheck // the client sees
		}
	}()
	t.Cleanup(func() { c.Close(); <-done })
	return c.LocalAddr().String()
}

func TestUDPAndDNS(t *testing.T) {
	near, far := cable(t)
	address := echo(t)
	start(t, near, gateway.Config{Dial: instead(address), Resolver: func() (string, error) { return address, nil }})
	g := newGuest(t, far)
	for _, to := range []netip.AddrPort{netip.AddrPortFrom(elsewhere, 9), netip.AddrPortFrom(gatewayAddress.Addr(), 53)} {
		c := g.dialUDP(t, to)
		for _, say := range []string{"first", "second"} {
			if _, err := c.Write([]byte(say)); err != nil {
				t.Fatal(err)
			}
			buf := make([]byte, 100)
			n, err := c.Read(buf)
			if err != nil || string(buf[:n]) != strings.ToUpper(say) {
				t.Errorf("%v answers %q, %v", to, buf[:n], err)
			}
		}
	}
}

// frames that a guest sends by hand.
func ask(target netip.Addr) []byte {
	f := make([]byte, header.EthernetMinimumSize+header.ARPSize)
	header.Ethernet(f).Encode(&header.EthernetFields{
		SrcAddr: tcpip.LinkAddress(guestMAC), DstAddr: header.EthernetBroadcastAddress, Type: header.ARPProtocolNumber,
	})
	a := header.ARP(f[header.EthernetMinimumSize:])
	a.SetIPv4OverEthernet()
	a.SetOp(header.ARPRequest)
	copy(a.HardwareAddressSender(), guestMAC)
	copy(a.ProtocolAddressSender(), guestAddress.Addr().AsSlice())
	copy(a.ProtocolAddressTarget(), target.AsSlice())
	return f
}

func ping(target netip.Addr) []byte {
	const ip = header.EthernetMinimumSize
	f := make([]byte, ip+header.IPv4MinimumSize+header.ICMPv4MinimumSize)
	header.Ethernet(f).Encode(&header.EthernetFields{
		SrcAddr: tcpip.LinkAddress(guestMAC), DstAddr: tcpip.LinkAddress(gatewayMAC), Type: header.IPv4ProtocolNumber,
	})
	p := header.IPv4(f[ip:])
	p.Encode(&header.IPv4Fields{
		TotalLength: uint16(len(f) - ip), TTL: 64, Protocol: uint8(header.ICMPv4ProtocolNumber),
		SrcAddr: tcpip.AddrFrom4(guestAddress.Addr().As4()), DstAddr: tcpip.AddrFrom4(target.As4()),
	})
	p.SetChecksum(^p.CalculateChecksum())
	m := header.ICMPv4(f[ip+header.IPv4MinimumSize:])
	m.SetType(header.ICMPv4Echo)
	m.SetChecksum(header.ICMPv4Checksum(m, 0))
	return f
}

// The gateway answers for itself, and in nobody else's name. What it must not answer
// comes first, so that the answers that come show that it did not.
func TestAnswersForItselfAlone(t *testing.T) {
	near, far := cable(t)
	start(t, near, gateway.Config{})
	defer far.Close()
	own := gatewayAddress.Addr()
	exchange := func(answered func([]byte) bool, unanswered []byte, question []byte) {
		t.Helper()
		for _, f := range [][]byte{unanswered, question} {
			if _, err := far.Write(f); err != nil {
				t.Fatal(err)
			}
		}
		if err := far.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 2048)
		n, err := far.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		if !answered(buf[:n]) {
			t.Fatalf("unexpected frame % x", buf[:n])
		}
	}
	from := func(offset int) func([]byte) bool {
		return func(f []byte) bool {
			return len(f) >= offset+4 && bytes.Equal(f[6:12], gatewayMAC) && bytes.Equal(f[offset:offset+4], own.AsSlice())
		}
	}
	exchange(from(28), ask(netip.MustParseAddr("10.10.0.7")), ask(own))
	exchange(func(f []byte) bool { return from(26)(f) && f[34] == byte(header.ICMPv4EchoReply) }, ping(elsewhere), ping(own))
}

// A guest that was restored knows the gateway and does not ask for it. The gateway
// does not know the guest, and asks in its own name before it answers.
func TestGuestThatDoesNotAsk(t *testing.T) {
	near, far := cable(t)
	s := server(t, "")
	start(t, near, gateway.Config{Dial: instead(s.Listener.Addr().String())})
	defer far.Close()
	from, to := tcpip.AddrFrom4(guestAddress.Addr().As4()), tcpip.AddrFrom4(elsewhere.As4())
	f := ping(elsewhere)[:header.EthernetMinimumSize+header.IPv4MinimumSize]
	f = append(f, make([]byte, header.TCPMinimumSize)...)
	p := header.IPv4(f[header.EthernetMinimumSize:])
	p.Encode(&header.IPv4Fields{TotalLength: uint16(len(p)), TTL: 64, Protocol: uint8(header.TCPProtocolNumber), SrcAddr: from, DstAddr: to})
	p.SetChecksum(^p.CalculateChecksum())
	syn := header.TCP(p[header.IPv4MinimumSize:])
	syn.Encode(&header.TCPFields{SrcPort: 1234, DstPort: 80, SeqNum: 1, DataOffset: header.TCPMinimumSize, Flags: header.TCPFlagSyn, WindowSize: 1000})
	syn.SetChecksum(^syn.CalculateChecksum(header.PseudoHeaderChecksum(header.TCPProtocolNumber, from, to, header.TCPMinimumSize)))
	if _, err := far.Write(f); err != nil {
		t.Fatal(err)
	}
	if err := far.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 2048)
	n, err := far.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	question := header.ARP(buf[header.EthernetMinimumSize:n])
	own := gatewayAddress.Addr()
	if !question.IsValid() || question.Op() != header.ARPRequest || !bytes.Equal(question.ProtocolAddressSender(), own.AsSlice()) {
		t.Fatalf("the gateway says % x", buf[:n])
	}
	answer := ask(own)
	copy(answer, gatewayMAC)
	a := header.ARP(answer[header.EthernetMinimumSize:])
	a.SetOp(header.ARPReply)
	copy(a.HardwareAddressTarget(), gatewayMAC)
	if _, err := far.Write(answer); err != nil {
		t.Fatal(err)
	}
	if n, err = far.Read(buf); err != nil {
		t.Fatal(err)
	}
	if p = header.IPv4(buf[header.EthernetMinimumSize:n]); n < len(f) || p.SourceAddress() != to ||
		header.TCP(p[header.IPv4MinimumSize:]).Flags() != header.TCPFlagSyn|header.TCPFlagAck {
		t.Fatalf("no SYN-ACK but % x", buf[:n])
	}
}

func TestStartRefuses(t *testing.T) {
	near, far := cable(t)
	defer far.Close()
	if g, err := gateway.Start(gateway.Config{Tap: near, Address: netip.MustParsePrefix("fd00::1/64"), MAC: gatewayMAC}); err == nil || g != nil {
		t.Error("an IPv6 address was taken")
	}
	if _, err := near.Write(nil); err == nil || !strings.Contains(err.Error(), os.ErrClosed.Error()) {
		t.Errorf("its device stays open: %v", err)
	}
}
