package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"violin/internal/coloring"
	"violin/internal/fabric"
	"violin/internal/gateway"
)

// GatewaySpec is a network's way out, to be run on this host.
type GatewaySpec struct {
	Slice   string
	Network uint16
	Address netip.Prefix
	MAC     net.HardwareAddr
	MTU     int
	Hold    bool // frames to the outside wait for [Agent.ReleaseOutput]
	Closed  bool // nodes begin nothing with the outside
	// Forwards are ports of this host that lead to nodes.
	Forwards []gateway.Forward
}

// Listening is how a forward of a slice is, on this host.
type Listening struct {
	Network uint16
	gateway.Listening
}

// exit is a gateway and its device.
type exit struct {
	slice   string
	network uint16
	tap     string
	plugged bool
	gateway *gateway.Gateway
}

// AddGateway gives a network a way out. It stays until its slice leaves; a
// failure leaves nothing behind.
func (a *Agent) AddGateway(ctx context.Context, spec GatewaySpec) (err error) {
	x := &exit{slice: spec.Slice, network: spec.Network, tap: a.tapName()}
	defer func() {
		if err != nil {
			err = fmt.Errorf("host %s: gateway %v: %w", a.cfg.Host, spec.Address, errors.Join(err, a.closeGateway(x)))
		}
	}()
	if err := a.book.write(func(p *page) {
		p.Taps++
		p.Exits = append(p.Exits, exitEntry{Spec: spec, Tap: x.tap})
	}); err != nil {
		return err
	}
	if err := a.cfg.Platform.CreateTap(x.tap, spec.MTU); err != nil {
		return err
	}
	if err := a.startGateway(x, spec, false); err != nil {
		return err
	}
	if _, err = a.fabric.Attach(ctx, fabric.Port{
		Tap: x.tap, Slice: spec.Slice, Network: spec.Network, Address: spec.MAC, Outside: true,
	}); err != nil {
		return err
	}
	x.plugged = true
	if err := a.fabric.Update(ctx, func(*coloring.State) {}); err != nil {
		return err
	}
	if err := a.fabric.Purge(ctx); err != nil {
		return err
	}
	if err := a.book.write(func(p *page) {
		e := p.exit(x.tap)
		e.Whole, e.Spec.Forwards = true, settled(x.gateway.Forwards())
	}); err != nil {
		return err
	}
	a.mu.Lock()
	a.exits = append(a.exits, x)
	a.mu.Unlock()
	return nil
}

// settled are forwards that are to listen where they do.
func settled(on []gateway.Listening) []gateway.Forward {
	var all []gateway.Forward
	for _, l := range on {
		f := l.Forward
		if l.At.IsValid() {
			f.Yield = f.Yield || f.Listen.Port() == 0
			f.Listen = l.At
		}
		all = append(all, f)
	}
	return all
}

// startGateway starts a gateway on its device. If it is lenient, forwards that can't listen
// are left out.
func (a *Agent) startGateway(x *exit, spec GatewaySpec, lenient bool) error {
	f, err := a.cfg.Platform.OpenTap(x.tap)
	if err != nil {
		return err
	}
	x.gateway, err = gateway.Start(gateway.Config{
		Tap: f, Address: spec.Address, MAC: spec.MAC, MTU: spec.MTU, Hold: spec.Hold, Closed: spec.Closed,
		Forwards: spec.Forwards, Lenient: lenient, Logger: a.log,
	})
	return err
}

// Forwards tells how the slice's forwards on this host are: by gateway in the order that
// they were added, and then in that of its specification.
func (a *Agent) Forwards(_ context.Context, slice string) ([]Listening, error) {
	var all []Listening
	for _, x := range a.exitsOf(slice) {
		for _, l := range x.gateway.Forwards() {
			all = append(all, Listening{x.network, l})
		}
	}
	return all, nil
}

// exitsOf are the gateways of a slice.
func (a *Agent) exitsOf(slice string) (exits []*exit) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, x := range a.exits {
		if x.slice == slice {
			exits = append(exits, x)
		}
	}
	return exits
}

// MarkOutput says where the frames end that wait at the slice's gateways on this host
// now, a mark a gateway. A frame before its mark was sent before now.
func (a *Agent) MarkOutput(_ context.Context, slice string) ([]uint64, error) {
	var marks []uint64
	for _, x := range a.exitsOf(slice) {
		marks = append(marks, x.gateway.Mark())
	}
	return marks, nil
}

// ReleaseOutput lets the frames before their marks go to the outside.
func (a *Agent) ReleaseOutput(_ context.Context, slice string, marks []uint64) error {
	exits := a.exitsOf(slice)
	for i, x := range exits[:min(len(exits), len(marks))] {
		x.gateway.Release(marks[i])
	}
	return nil
}

// closeGateways closes those of a slice; of all, if it is empty.
func (a *Agent) closeGateways(slice string) error {
	a.mu.Lock()
	var exits, others []*exit
	for _, x := range a.exits {
		if slice == "" || x.slice == slice {
			exits = append(exits, x)
		} else {
			others = append(others, x)
		}
	}
	a.exits = others
	a.mu.Unlock()
	var errs []error
	for _, x := range exits {
		errs = append(errs, a.closeGateway(x))
	}
	return errors.Join(errs...)
}

func (a *Agent) closeGateway(x *exit) error {
	var errs []error
	if x.plugged {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		errs = append(errs, a.fabric.Detach(ctx, x.tap))
	}
	if x.gateway != nil {
		errs = append(errs, x.gateway.Close())
	}
	errs = append(errs, a.cfg.Platform.DeleteTap(x.tap), a.book.write(func(p *page) {
		p.Exits = slices.DeleteFunc(p.Exits, func(e exitEntry) bool { return e.Tap == x.tap })
	}))
	return errors.Join(errs...)
}
