package gateway_test

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/link/ethernet"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"violin/internal/gateway"
)

var (
	gatewayAddress = netip.MustParsePrefix("10.10.0.254/24")
	gatewayMAC     = net.HardwareAddr{0x52, 0x54, 0, 0, 0, 0xfe}
	guestAddress   = netip.MustParsePrefix("10.10.0.1/24")
	guestMAC       = net.HardwareAddr{0x52, 0x54, 0, 0, 0, 1}
	elsewhere      = netip.MustParseAddr("192.0.2.1") // TEST-NET-1: nobody's
)

// guest is a node's TCP/IP, with the gateway as its default route.
type guest struct{ stack *stack.Stack }

// newGuest runs a guest behind a device.
func newGuest(t *testing.T, device *os.File) guest {
	t.Helper()
	link := channel.New(256, 1514, tcpip.LinkAddress(guestMAC))
	s := stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4},
	})
	if err := s.CreateNIC(1, ethernet.New(link)); err != nil {
		t.Fatal(err)
	}
	address := tcpip.AddressWithPrefix{Address: tcpip.AddrFrom4(guestAddress.Addr().As4()), PrefixLen: guestAddress.Bits()}
	if err := s.AddProtocolAddress(1, tcpip.ProtocolAddress{Protocol: ipv4.ProtocolNumber, AddressWithPrefix: address}, stack.AddressProperties{}); err != nil {
		t.Fatal(err)
	}
	s.SetRouteTable([]tcpip.Route{
		{Destination: address.Subnet(), NIC: 1},
		{Destination: tcpip.AddressWithPrefix{Address: tcpip.AddrFrom4([4]byte{})}.Subnet(), Gateway: tcpip.AddrFrom4(gatewayAddress.Addr().As4()), NIC: 1},
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{}, 2)
	go func() {
		defer func() { done <- struct{}{} }()
		buf := make([]byte, 2048)
		for {
			n, err := device.Read(buf)
			if err != nil {
				return
			}
			p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(append([]byte(nil), buf[:n]...))})
			link.InjectInbound(0, p)
			p.DecRef()
		}
	}()
	go func() {
		defer func() { done <- struct{}{} }()
		for {
			p := link.ReadContext(ctx)
			if p == nil {
				return
			}
			device.Write(p.ToView().AsSlice()) //nolint:errcheck // a frame may be lost
			p.DecRef()
		}
	}()
	t.Cleanup(func() {
		cancel()
		device.Close()
		s.Close()
		<-done
		<-done
	})
	return guest{s}
}

func full(to netip.AddrPort) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: 1, Addr: tcpip.AddrFrom4(to.Addr().As4()), Port: to.Port()}
}

func (g guest) dial(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	c, err := gonet.DialContextTCP(ctx, g.stack, full(to), ipv4.ProtocolNumber)
	if err != nil {
		return nil, err
	}
	return c, nil
}

func (g guest) dialUDP(t *testing.T, to netip.AddrPort) net.Conn {
	t.Helper()
	address := full(to)
	c, err := gonet.DialUDP(g.stack, nil, &address, ipv4.ProtocolNumber)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return c
}

// browser fetches by way of the guest, a connection for each request.
func (g guest) browser() *http.Client {
	return &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, address string) (net.Conn, error) {
			return g.dial(ctx, netip.MustParseAddrPort(address))
		},
	}}
}

// cable is two ends that frames go through.
func cable(t *testing.T) (a, b *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fds[0]), "a"), os.NewFile(uintptr(fds[1]), "b")
}

// start runs a gateway for which elsewhere is a server of the test.
func start(t *testing.T, device *os.File, cfg gateway.Config) *gateway.Gateway {
	t.Helper()
	g, err := launch(device, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	})
	return g
}

// launch is start for one that may not start, or ends before its test.
func launch(device *os.File, cfg gateway.Config) (*gateway.Gateway, error) {
	cfg.Tap, cfg.Address, cfg.MAC, cfg.MTU, cfg.Logger = device, gatewayAddress, gatewayMAC, 1500, slog.New(slog.DiscardHandler)
	return gateway.Start(cfg)
}

// instead has connections go to another address than the one that the guest named.
func instead(to string) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, network, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, network, to)
	}
}

func server(t *testing.T, body string) *httptest.Server {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte(body)) })) //nolint:errcheck // the client sees
	t.Cleanup(s.Close)
	return s
}
