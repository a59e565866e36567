package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"violin/internal/coloring"
	"violin/internal/fabric"
)

// leaveBound bounds the wait for the switch when a slice leaves it.
const leaveBound = 30 * time.Second

// use is what one slice has of the switch, which the slices of a host share, beside
// its nodes and gateways.
type use struct {
	Peers   []uint16
	Remotes []coloring.Remote
}

// change changes what a slice uses, on record first.
func (a *Agent) change(slice string, change func(*use)) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	u := a.uses[slice]
	u.Peers = slices.Clone(u.Peers)
	change(&u)
	uses := maps.Clone(a.uses)
	uses[slice] = u
	if err := a.book.write(func(p *page) { p.Uses = uses }); err != nil {
		return err
	}
	a.uses = uses
	return a.setRemotes()
}

// setRemotes gives the switch what all slices have. The agent's mu is held.
func (a *Agent) setRemotes() error {
	var all []coloring.Remote
	for _, slice := range slices.Sorted(maps.Keys(a.uses)) {
		all = append(all, a.uses[slice].Remotes...)
	}
	return a.fabric.SetRemotes(all)
}

// AddPeer joins the host to another one, for a slice. Slices share the tunnel: a peer has
// the same number in all of them.
func (a *Agent) AddPeer(ctx context.Context, slice string, peer fabric.Peer) error {
	a.sharing.Lock()
	defer a.sharing.Unlock()
	a.mu.Lock()
	other, known := a.peers[peer.ID]
	a.peers[peer.ID] = peer.Host
	a.mu.Unlock()
	if known && other != peer.Host {
		return fmt.Errorf("host %s: peer %d is %s, and not %s", a.cfg.Host, peer.ID, other, peer.Host)
	}
	err := a.change(slice, func(u *use) { u.Peers = append(u.Peers, peer.ID) })
	if err == nil {
		err = a.fabric.AddPeer(ctx, peer)
	}
	if err != nil {
		return fmt.Errorf("host %s: %w", a.cfg.Host, err)
	}
	return nil
}

// SetRemotes tells where a slice's interfaces on other hosts are; it takes effect
// with the next node that is added. Networks have other numbers in each slice.
func (a *Agent) SetRemotes(_ context.Context, slice string, remotes []coloring.Remote) error {
	if err := a.change(slice, func(u *use) { u.Remotes = slices.Clone(remotes) }); err != nil {
		return fmt.Errorf("host %s: %w", a.cfg.Host, err)
	}
	return nil
}

// Leave stops the nodes and gateways of a slice, and takes it off the switch, which
// goes on for the others. Of a slice that the agent does not know it does nothing.
func (a *Agent) Leave(slice string) error {
	a.mu.Lock()
	networks := map[uint16]bool{}
	var keys []coloring.NodeKey
	for k, n := range a.nodes {
		if k.Slice == slice {
			keys = append(keys, k)
			for _, ifc := range n.spec.Interfaces {
				networks[ifc.Network] = true
			}
		}
	}
	a.mu.Unlock()
	errs := []error{a.closeGateways(slice)}
	for _, k := range keys {
		errs = append(errs, a.stopNode(k))
	}
	ctx, cancel := context.WithTimeout(context.Background(), leaveBound)
	defer cancel()
	a.sharing.Lock()
	defer a.sharing.Unlock()
	a.mu.Lock()
	gone := a.uses[slice].Peers
	uses := maps.Clone(a.uses)
	delete(uses, slice)
	var unused []uint16
	for _, id := range gone {
		if !slices.ContainsFunc(slices.Collect(maps.Values(uses)), func(u use) bool { return slices.Contains(u.Peers, id) }) {
			unused = append(unused, id)
		}
	}
	a.uses = uses
	errs = append(errs, a.setRemotes())
	a.mu.Unlock()
	errs = append(errs, a.fabric.Update(ctx, func(st *coloring.State) {
		for n := range networks {
			delete(st.Counted, n)
		}
	}))
	for _, id := range unused {
		errs = append(errs, a.fabric.RemovePeer(ctx, id))
		a.mu.Lock()
		delete(a.peers, id)
		a.mu.Unlock()
	}
	return errors.Join(append(errs, a.book.write(func(p *page) { p.Uses = uses }))...)
}
