// Package gateway is a network's way out: a NAT in user space, behind a TAP
// device that is a port of the network like another.
//
// What a guest sends to the outside ends in a TCP/IP stack in this process
// (gVisor's), and goes on through an ordinary socket of this process. So it needs
// no device, address, route or packet filter on the machine, and leaves none.
//
//	TCP, UDP  to any IPv4 address outside of the network, but see Config.Dial
//	DNS       to the gateway's own address, port 53: to the machine's resolver
//	ICMP      echo to the gateway's own address; nothing else
//
// Nothing outside can begin a connection to a guest but by a [Forward], a port of this
// machine. The flows are this process's: a guest that is restored finds its TCP
// connections reset when it next uses them.
package gateway

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/link/ethernet"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// Bounds of what guests can have this process keep.
const (
	maxConnecting = 256              // TCP connections that are being made
	maxFlows      = 4096             // TCP connections and UDP flows
	udpIdle       = 60 * time.Second // after which a UDP flow is forgotten; no less than RFC 4787's for DNS-like use
	dialTimeout   = 20 * time.Second
	queue         = 1024 // frames towards the network
	nic           = 1
	dnsPort       = 53
)

// Config describes a gateway.
type Config struct {
	// Tap is the far end of the TAP device, without a header before the frames. The
	// gateway owns it.
	Tap     *os.File
	Address netip.Prefix // the gateway's own, with the network's length; IPv4
	MAC     net.HardwareAddr
	MTU     int
	// Dial opens a connection to an address that is written as a number. Nil is
	// [Dial], which keeps guests from this machine's own services.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Resolver gives the address of the DNS server. Nil takes the first of
	// /etc/resolv.conf, read anew for each flow.
	Resolver func() (string, error)
	// Hold keeps frames to the outside back until [Gateway.Release]: see HoldBytes.
	Hold bool
	// Closed refuses what guests would begin with the outside. Forwards work.
	Closed bool
	// Forwards are ports of this machine that lead in.
	Forwards []Forward
	// Lenient leaves a forward out that cannot listen, rather than not to start.
	Lenient bool
	Logger  *slog.Logger
}

// Gateway is one that runs.
type Gateway struct {
	cfg    Config
	log    *slog.Logger
	link   *channel.Endpoint
	stack  *stack.Stack
	ctx    context.Context
	cancel context.CancelFunc
	work   sync.WaitGroup
	flows  chan struct{} // a token each
	hold   hold

	sockets   []socket
	listening []Listening

	mu     sync.Mutex
	closed bool
}

// Start starts a gateway.
func Start(cfg Config) (*Gateway, error) {
	if !cfg.Address.Addr().Is4() || len(cfg.MAC) != 6 {
		cfg.Tap.Close()
		return nil, fmt.Errorf("start gateway: address %v, Ethernet address %v: NAT needs an IPv4 one and one of 6 bytes", cfg.Address, cfg.MAC)
	}
	if cfg.Dial == nil {
		cfg.Dial = Dial
	}
	if cfg.Resolver == nil {
		cfg.Resolver = resolver
	}
	g := &Gateway{cfg: cfg, log: cfg.Logger.With("gateway", cfg.Address.String()), flows: make(chan struct{}, maxFlows)}
	g.ctx, g.cancel = context.WithCancel(context.Background())
	g.hold.begin()
	g.link = channel.New(queue, uint32(cfg.MTU+header.EthernetMinimumSize), tcpip.LinkAddress(cfg.MAC))
	if err := g.makeStack(); err != nil {
		g.cancel()
		cfg.Tap.Close()
		return nil, fmt.Errorf("start gateway %v: %w", cfg.Address, err)
	}
	g.spawn(g.read)
	g.spawn(g.write)
	if err := g.listen(!cfg.Lenient); err != nil {
		return nil, errors.Join(fmt.Errorf("start gateway %v: %w", cfg.Address, err), g.Close())
	}
	return g, nil
}

func (g *Gateway) makeStack() error {
	g.stack = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4},
	})
	if err := g.stack.CreateNIC(nic, ethernet.New(g.link)); err != nil {
		return errors.New(err.String())
	}
	own := tcpip.AddrFrom4(g.cfg.Address.Addr().As4())
	address := tcpip.ProtocolAddress{
		Protocol: ipv4.ProtocolNumber, AddressWithPrefix: tcpip.AddressWithPrefix{Address: own, PrefixLen: g.cfg.Address.Bits()},
	}
	if err := g.stack.AddProtocolAddress(nic, address, stack.AddressProperties{}); err != nil {
		return errors.New(err.String())
	}
	// The stack speaks in the name of every address outside. What is not for it to
	// answer never gets to it: see wanted.
	if err := errors.Join(text(g.stack.SetSpoofing(nic, true)), text(g.stack.SetPromiscuousMode(nic, true))); err != nil {
		return err
	}
	g.stack.SetRouteTable([]tcpip.Route{{Destination: address.AddressWithPrefix.Subnet(), NIC: nic}})
	g.stack.SetTransportProtocolHandler(tcp.ProtocolNumber, tcp.NewForwarder(g.stack, 0, maxConnecting, g.tcp).HandlePacket)
	g.stack.SetTransportProtocolHandler(udp.ProtocolNumber, g.udp)
	return nil
}

func text(err tcpip.Error) error {
	if err == nil {
		return nil
	}
	return errors.New(err.String())
}

// Close ends all connections and waits until nothing of the gateway runs.
func (g *Gateway) Close() error {
	g.mu.Lock()
	g.closed = true
	g.mu.Unlock()
	g.cancel()
	err := errors.Join(g.cfg.Tap.Close(), g.closeSockets())
	g.stack.Close()
	g.link.Close()
	g.work.Wait()
	return err
}

// spawn runs f in a goroutine that Close waits for; not if the gateway is being closed.
func (g *Gateway) spawn(f func()) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return false
	}
	g.work.Add(1)
	go func() {
		defer g.work.Done()
		f()
	}()
	return true
}

// read takes frames from the network.
func (g *Gateway) read() {
	buf := make([]byte, g.cfg.MTU+header.EthernetMinimumSize+4)
	for {
		n, err := g.cfg.Tap.Read(buf)
		if err != nil {
			if g.ctx.Err() == nil {
				g.log.Error("the gateway can't read its device: the network has no way out any more", "err", err)
			}
			return
		}
		if !g.wanted(buf[:n]) {
			continue
		}
		f := slices.Clone(buf[:n])
		if !g.cfg.Hold || !g.outbound(f) {
			g.inject(f)
			continue
		}
		if !g.hold.put(f) {
			g.log.Debug("a frame to the outside was lost: too many wait for a snapshot", "bytes", HoldBytes)
		}
	}
}

// write gives frames to the network.
func (g *Gateway) write() {
	for {
		p := g.link.ReadContext(g.ctx)
		if p == nil {
			return
		}
		v := p.ToView()
		g.sign(v.AsSlice())
		_, err := g.cfg.Tap.Write(v.AsSlice())
		v.Release()
		p.DecRef()
		if err != nil && g.ctx.Err() == nil {
			g.log.Debug("a frame from outside was lost", "err", err)
		}
	}
}

// sign puts the gateway's own address into an ARP request. The stack asks in the name
// of whoever is outside, which a guest may not answer, and should not learn.
func (g *Gateway) sign(f []byte) {
	const arp = header.EthernetMinimumSize
	if len(f) < arp+header.ARPSize || binary.BigEndian.Uint16(f[12:]) != uint16(header.ARPProtocolNumber) {
		return
	}
	if a := header.ARP(f[arp:]); a.Op() == header.ARPRequest {
		copy(a.ProtocolAddressSender(), g.cfg.Address.Addr().AsSlice())
	}
}

// wanted tells whether a frame is for the gateway. The stack answers whatever it
// is given, also in the name of a node, so this decides.
func (g *Gateway) wanted(f []byte) bool {
	const ethernet = header.EthernetMinimumSize
	if len(f) < ethernet {
		return false
	}
	own := g.cfg.Address.Addr()
	mine := slices.Equal(f[:6], g.cfg.MAC)
	switch binary.BigEndian.Uint16(f[12:]) {
	case uint16(header.ARPProtocolNumber):
		a := f[ethernet:]
		return len(a) >= header.ARPSize && own == netip.AddrFrom4([4]byte(a[24:28]))
	case uint16(header.IPv4ProtocolNumber):
		p := header.IPv4(f[ethernet:])
		if !mine || len(p) < header.IPv4MinimumSize {
			return false
		}
		from, to := netip.AddrFrom4(p.SourceAddress().As4()), netip.AddrFrom4(p.DestinationAddress().As4())
		if !g.cfg.Address.Masked().Contains(from) || from == own {
			return false // there is no way back
		}
		return to == own || p.TransportProtocol() != header.ICMPv4ProtocolNumber && !g.cfg.Address.Masked().Contains(to)
	}
	return false
}

// target is where a flow goes, and false if it goes nowhere.
func (g *Gateway) target(id stack.TransportEndpointID) (string, bool) {
	if g.cfg.Closed {
		return "", false
	}
	to := netip.AddrFrom4(id.LocalAddress.As4())
	if to != g.cfg.Address.Addr() {
		return netip.AddrPortFrom(to, id.LocalPort).String(), true
	}
	if id.LocalPort != dnsPort {
		return "", false
	}
	server, err := g.cfg.Resolver()
	if err != nil {
		g.log.Warn("a guest's DNS query was refused", "err", err)
		return "", false
	}
	return server, true
}

// dial connects a flow to the outside.
func (g *Gateway) dial(network string, id stack.TransportEndpointID) (net.Conn, error) {
	to, ok := g.target(id)
	if !ok {
		return nil, fmt.Errorf("port %d of %s: %w", id.LocalPort, id.LocalAddress, errRefused)
	}
	ctx, cancel := context.WithTimeout(g.ctx, dialTimeout)
	defer cancel()
	if netip.AddrFrom4(id.LocalAddress.As4()) == g.cfg.Address.Addr() {
		var d net.Dialer // the machine's resolver may well listen on its loopback
		return d.DialContext(ctx, network, to)
	}
	return g.cfg.Dial(ctx, network, to)
}

// tcp takes a guest's connection once the outside has taken it: a refusal there is
// one here. It runs in a goroutine of the stack's.
func (g *Gateway) tcp(r *tcp.ForwarderRequest) {
	id := r.ID()
	if !g.enter() {
		r.Complete(true)
		return
	}
	g.spawn(func() {
		defer g.leave()
		out, err := g.dial("tcp4", id)
		if err != nil {
			g.log.Debug("a guest's connection was not made", "err", err)
			r.Complete(true)
			return
		}
		var wq waiter.Queue
		ep, terr := r.CreateEndpoint(&wq)
		r.Complete(false)
		if terr != nil {
			out.Close()
			return
		}
		ep.SocketOptions().SetKeepAlive(true)
		g.join(gonet.NewTCPConn(&wq, ep), out)
	})
}

// udp begins a flow with its first datagram. False has the stack answer that the
// port is unreachable.
func (g *Gateway) udp(id stack.TransportEndpointID, p *stack.PacketBuffer) bool {
	if _, ok := g.target(id); !ok || !g.enter() {
		return false
	}
	return udp.NewForwarder(g.stack, func(r *udp.ForwarderRequest) {
		var wq waiter.Queue
		ep, err := r.CreateEndpoint(&wq) // at once, or the next datagram would begin another
		if err != nil {
			g.leave()
			return
		}
		in := gonet.NewUDPConn(&wq, ep)
		g.spawn(func() {
			defer g.leave()
			out, err := g.dial("udp4", id)
			if err != nil {
				g.log.Debug("a guest's datagram was not sent", "err", err)
				in.Close()
				return
			}
			var last atomic.Int64
			g.join(&idle{in, &last}, &idle{out, &last})
		})
	}).HandlePacket(id, p)
}

func (g *Gateway) enter() bool {
	select {
	case g.flows <- struct{}{}:
		return true
	default:
		g.log.Warn("a guest's connection was refused: the gateway has as many as it keeps", "flows", maxFlows)
		return false
	}
}

func (g *Gateway) leave() { <-g.flows }

// join carries bytes both ways until both ends have said all, or one is gone.
func (g *Gateway) join(in, out net.Conn) {
	defer context.AfterFunc(g.ctx, func() { in.Close(); out.Close() })()
	var both sync.WaitGroup
	carry := func(to, from net.Conn) {
		// A read is a datagram, which may have 64 KiB.
		_, err := io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{from}, make([]byte, 64<<10))
		if half, ok := to.(interface{ CloseWrite() error }); ok && err == nil {
			err = half.CloseWrite()
		} else if err == nil {
			err = io.EOF
		}
		if err != nil {
			in.Close()
			out.Close()
		}
	}
	both.Go(func() { carry(in, out) })
	both.Go(func() { carry(out, in) })
	both.Wait()
	in.Close()
	out.Close()
}

// idle is an end of a UDP flow, which ends when nothing has come from either for a while.
type idle struct {
	net.Conn
	last *atomic.Int64 // when a datagram came, in ns
}

func (c *idle) Read(b []byte) (int, error) {
	for {
		began := time.Now()
		if err := c.SetReadDeadline(began.Add(udpIdle)); err != nil {
			return 0, err
		}
		n, err := c.Conn.Read(b)
		if err == nil {
			c.last.Store(time.Now().UnixNano())
			return n, nil
		}
		if timeout, ok := err.(net.Error); !ok || !timeout.Timeout() || c.last.Load() < began.UnixNano() {
			return n, err
		}
	}
}

var errRefused = errors.New("guests are not let there")

// Dial connects to what is outside of this machine. Addresses of the machine itself,
// its loopback above all, are refused: services there trust whoever reaches them. So
// are link-local ones, among them where clouds tell machines their secrets.
func Dial(ctx context.Context, network, address string) (net.Conn, error) {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, err
	}
	to := ap.Addr().Unmap()
	if !to.IsGlobalUnicast() || to.As4()[0] == 0 || to.As4()[0] >= 240 {
		return nil, fmt.Errorf("connect to %s: %w", address, errRefused)
	}
	own, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("connect to %s: this machine's addresses, which guests are not let to: %w", address, err)
	}
	for _, a := range own {
		if p, ok := a.(*net.IPNet); ok && p.IP.Equal(to.AsSlice()) {
			return nil, fmt.Errorf("connect to %s, which is this machine: %w", address, errRefused)
		}
	}
	var d net.Dialer
	return d.DialContext(ctx, network, address)
}

// resolver is the machine's first DNS server.
func resolver() (string, error) {
	const file = "/etc/resolv.conf"
	b, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "nameserver" {
			if a, err := netip.ParseAddr(f[1]); err == nil && a.Is4() {
				return netip.AddrPortFrom(a, dnsPort).String(), nil
			}
		}
	}
	return "", fmt.Errorf("%s names no server with an IPv4 address", file)
}
