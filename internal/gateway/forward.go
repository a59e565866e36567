package gateway

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/net/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	tcpipv4 "gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
)

// Forward is a port of this machine that leads to one of a node's. The node sees what
// comes by it come from the gateway's address.
type Forward struct {
	Protocol string         // tcp or udp
	Listen   netip.AddrPort // IPv4; port 0 for any that is free
	Yield    bool           // if the port is taken, any that is free will do
	To       netip.AddrPort // in the gateway's network
}

// String says what leads where.
func (f Forward) String() string {
	return fmt.Sprintf("port %s of %s for %s", f.Protocol, f.Listen, f.To)
}

// Listening is how a forward is.
type Listening struct {
	Forward
	At      netip.AddrPort // where it listens; the zero value if it does not
	Problem string         // why not
}

// ErrTaken is that of a port that another socket of this machine has.
var ErrTaken = errors.New("the port is taken on this machine")

// socket is one of the kernel's that a forward listens at.
type socket struct {
	listener net.Listener     // of TCP
	packets  *ipv4.PacketConn // of UDP
}

func (s socket) close() error {
	if s.listener != nil {
		return s.listener.Close()
	}
	return s.packets.Close()
}

// open begins to listen, and takes nothing yet.
func (f Forward) open() (s socket, at netip.AddrPort, err error) {
	if !f.Listen.Addr().Is4() || !f.To.Addr().Is4() {
		return s, at, fmt.Errorf("listen at %s for %s: only IPv4 is forwarded", f.Listen, f.To)
	}
	var addr net.Addr
	switch f.Protocol {
	case "tcp":
		s.listener, err = net.Listen("tcp4", f.Listen.String())
		if err == nil {
			addr = s.listener.Addr()
		}
	case "udp":
		var c net.PacketConn
		c, err = net.ListenPacket("udp4", f.Listen.String())
		if err == nil {
			addr, s.packets = c.LocalAddr(), ipv4.NewPacketConn(c)
			// An answer comes from the address that was asked.
			if f.Listen.Addr().IsUnspecified() {
				if err = s.packets.SetControlMessage(ipv4.FlagDst, true); err != nil {
					c.Close()
				}
			}
		}
	default:
		err = fmt.Errorf("%q cannot be forwarded", f.Protocol)
	}
	switch {
	case err == nil:
		return s, netip.MustParseAddrPort(addr.String()), nil
	case errors.Is(err, syscall.EADDRINUSE) && f.Yield:
		f.Listen, f.Yield = netip.AddrPortFrom(f.Listen.Addr(), 0), false
		return f.open()
	case errors.Is(err, syscall.EADDRINUSE):
		err = ErrTaken
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		err = fmt.Errorf("%s is no address of this machine", f.Listen.Addr())
	}
	return socket{}, at, fmt.Errorf("listen at %s for %s: %w", f.Listen, f.Protocol, err)
}

// Probe tells for each forward why it could not listen now; nil if it could.
func Probe(forwards []Forward) []error {
	problems := make([]error, len(forwards))
	for i, f := range forwards {
		s, _, err := f.open()
		if err == nil {
			err = s.close()
		}
		problems[i] = err
	}
	return problems
}

// listen opens the forwards' sockets. If it is not strict, one that can't be opened is
// left out, and Forwards says so.
func (g *Gateway) listen(strict bool) error {
	for _, f := range g.cfg.Forwards {
		s, at, err := f.open()
		l := Listening{Forward: f, At: at}
		if err != nil {
			if strict {
				return err
			}
			g.log.Error("a forward does not listen any more", "forward", f.String(), "err", err)
			l.Problem = err.Error()
		} else {
			g.sockets = append(g.sockets, s)
		}
		g.listening = append(g.listening, l)
		switch {
		case s.listener != nil:
			g.spawn(func() { g.acceptTCP(s.listener, f.To) })
		case s.packets != nil:
			g.spawn(func() { g.acceptUDP(s.packets, f) })
		}
	}
	return nil
}

func (g *Gateway) closeSockets() error {
	var errs []error
	for _, s := range g.sockets {
		errs = append(errs, s.close())
	}
	return errors.Join(errs...)
}

// Forwards tells how the forwards are, in their order.
func (g *Gateway) Forwards() []Listening { return g.listening }

// retry is how long a forward rests that can take nothing, such as for want of files.
const retry = 100 * time.Millisecond

// acceptTCP takes connections, and makes another one each to the node. The one here has
// been taken by then: a refusal there is a reset here.
func (g *Gateway) acceptTCP(l net.Listener, to netip.AddrPort) {
	for g.ctx.Err() == nil {
		c, err := l.Accept()
		if err != nil {
			if g.ctx.Err() == nil && !errors.Is(err, net.ErrClosed) {
				g.log.Warn("a forward takes no connection", "to", to, "err", err)
				g.rest()
			}
			continue
		}
		if !g.enter() {
			reset(c)
			continue
		}
		if !g.spawn(func() {
			defer g.leave()
			in, err := g.dialNode(to)
			if err != nil {
				g.log.Debug("a connection from outside was not made", "to", to, "err", err)
				reset(c)
				return
			}
			g.join(in, c)
		}) {
			g.leave()
			reset(c)
		}
	}
}

func (g *Gateway) rest() {
	select {
	case <-time.After(retry):
	case <-g.ctx.Done():
	}
}

// reset closes a connection as one that was not to be.
func reset(c net.Conn) {
	if t, ok := c.(*net.TCPConn); ok {
		_ = t.SetLinger(0) // or it ends in an orderly way
	}
	c.Close()
}

// dialNode connects to a node. Where its answer waits for a snapshot, the bound is the
// stack's, which asks for about two minutes.
func (g *Gateway) dialNode(to netip.AddrPort) (net.Conn, error) {
	ctx := g.ctx
	if !g.cfg.Hold {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, dialTimeout)
		defer cancel()
	}
	return gonet.DialContextTCP(ctx, g.stack, nodeAddress(to), tcpipv4.ProtocolNumber)
}

func nodeAddress(to netip.AddrPort) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: nic, Addr: tcpip.AddrFrom4(to.Addr().As4()), Port: to.Port()}
}

// peer is who sends datagrams to a forward, and to which of the machine's addresses.
type peer struct {
	from netip.AddrPort
	at   string // empty if the forward listens at one
}

// datagrams is a peer's flow to a node.
type datagrams struct {
	node net.Conn
	last atomic.Int64 // when a datagram came, in ns
}

// acceptUDP carries datagrams, a flow a peer, each until nothing has come for a while.
func (g *Gateway) acceptUDP(c *ipv4.PacketConn, f Forward) {
	var mu sync.Mutex
	flows := map[peer]*datagrams{}
	forget := func(p peer, d *datagrams) {
		mu.Lock()
		defer mu.Unlock()
		if flows[p] == d {
			delete(flows, p)
		}
	}
	// begin begins a flow, and carries what the node answers.
	begin := func(p peer, to net.Addr, control *ipv4.ControlMessage) *datagrams {
		if !g.enter() {
			return nil
		}
		address := nodeAddress(f.To)
		node, err := gonet.DialUDP(g.stack, nil, &address, tcpipv4.ProtocolNumber)
		if err != nil {
			g.leave()
			g.log.Debug("a datagram from outside was not sent", "to", f.To, "err", err)
			return nil
		}
		d := &datagrams{node: node}
		mu.Lock()
		flows[p] = d
		mu.Unlock()
		if !g.spawn(func() {
			defer g.leave()
			defer node.Close()
			defer forget(p, d)
			defer context.AfterFunc(g.ctx, func() { node.Close() })()
			buf := make([]byte, 64<<10)
			for {
				n, err := (&idle{node, &d.last}).Read(buf)
				if err != nil {
					return
				}
				if _, err := c.WriteTo(buf[:n], control, to); err != nil {
					g.log.Debug("a datagram to the outside was lost", "from", f.To, "err", err)
				}
			}
		}) {
			g.leave()
			node.Close()
			return nil
		}
		return d
	}
	buf := make([]byte, 64<<10)
	for g.ctx.Err() == nil {
		n, control, from, err := c.ReadFrom(buf)
		if err != nil {
			if g.ctx.Err() == nil && !errors.Is(err, net.ErrClosed) {
				g.log.Warn("a forward takes no datagram", "to", f.To, "err", err)
				g.rest()
			}
			continue
		}
		p := peer{from: from.(*net.UDPAddr).AddrPort()}
		var answer *ipv4.ControlMessage
		if control != nil && (control.Dst.IsGlobalUnicast() || control.Dst.IsLoopback()) {
			p.at, answer = control.Dst.String(), &ipv4.ControlMessage{Src: control.Dst}
		}
		for range 2 { // once more if the flow has just ended
			mu.Lock()
			d := flows[p]
			mu.Unlock()
			if d == nil {
				if d = begin(p, from, answer); d == nil {
					break
				}
			}
			d.last.Store(time.Now().UnixNano())
			if _, err = d.node.Write(buf[:n]); err == nil {
				break
			}
			forget(p, d)
			d.node.Close()
		}
	}
}
