package openflow

import (
	"context"
	"errors"
	"fmt"
	"sync"
)

const bundleFlags = BundleAtomic | BundleOrdered

// Bundle is flow mods that wait on the switch to be committed together. It is
// open until one of Commit and Discard has been called, once.
type Bundle struct {
	c    *Conn
	id   uint32
	mods []FlowMod
	xids []uint32 // of the opening and of each flow mod

	mu  sync.Mutex
	err error // the first thing that the switch refused
}

// Bundle makes the switch take all flow mods at once, in order, so that every
// frame sees all of them or none (§6.9). It returns once they are in effect. If
// the switch refuses one, none takes effect, and the error names it; then
// errors.As finds the *[ErrorMessage].
func (c *Conn) Bundle(ctx context.Context, mods []FlowMod) error {
	if len(mods) == 0 {
		return nil
	}
	b, err := c.StageBundle(ctx, mods)
	if err != nil {
		return err
	}
	return b.Commit(ctx)
}

// StageBundle has the switch read and check the flow mods, so that what is left
// to do is one short Commit. The switch drops a bundle that is left alone for
// ten seconds (Open vSwitch's bundle-idle-timeout). The flow mods belong to the
// bundle from now on.
func (c *Conn) StageBundle(ctx context.Context, mods []FlowMod) (*Bundle, error) {
	c.mu.Lock()
	c.bundle++
	b := &Bundle{c: c, id: c.bundle, mods: mods}
	c.mu.Unlock()

	messages := make([]Message, 0, len(mods)+1)
	messages = append(messages, &BundleControl{Bundle: b.id, Command: BundleOpen, Flags: bundleFlags})
	for i := range mods {
		messages = append(messages, &BundleAdd{Bundle: b.id, Flags: bundleFlags, Message: &mods[i]})
	}
	wire := make([][]byte, len(messages))
	for i, m := range messages {
		xid := c.nextXID()
		b.xids = append(b.xids, xid)
		var err error
		if wire[i], err = Marshal(xid, m); err != nil {
			return nil, b.failure(i, err)
		}
	}
	for i, xid := range b.xids {
		c.expect(xid, func(m Message, _ int) (last bool) {
			if e, ok := m.(*ErrorMessage); ok {
				b.fail(b.failure(i, e))
			}
			return false // a flow mod may be refused when it is added, or not before the commit
		})
	}
	// An error of the switch does not undo the bundle so far: only after the
	// barrier is it known that everything is in it.
	err := c.enqueue(wire...)
	if err == nil {
		err = c.Barrier(ctx)
	}
	if err != nil {
		b.fail(fmt.Errorf("openflow: stage bundle of %d flow mods: %w", len(mods), err))
	}
	if err := b.refused(); err != nil {
		b.Discard()
		return nil, err
	}
	return b, nil
}

// failure says what the switch had against the message of index i: the opening, or flow mod i-1.
func (b *Bundle) failure(i int, err error) error {
	if i == 0 {
		return fmt.Errorf("openflow: open bundle: %w", err)
	}
	return fmt.Errorf("openflow: bundle: flow mod %d of %d (%s): %w", i, len(b.mods), b.mods[i-1], err)
}

// fail keeps the first error: what follows from it follows it.
func (b *Bundle) fail(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err == nil {
		b.err = err
	}
}

func (b *Bundle) refused() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.err
}

// Commit puts the flow mods into effect, and returns once they are. After an
// error of the switch none is; after one of ctx or of the connection, all or
// none are.
func (b *Bundle) Commit(ctx context.Context) error {
	defer b.c.forget(b.xids...)
	_, err := one[*BundleControl](b.c.call(ctx, &BundleControl{Bundle: b.id, Command: BundleCommit, Flags: bundleFlags}))
	if err == nil {
		return nil
	}
	// The switch names the flow mod first, then says that the bundle failed.
	b.fail(fmt.Errorf("openflow: commit bundle of %d flow mods: %w", len(b.mods), err))
	var refused *ErrorMessage
	if !errors.As(err, &refused) {
		return fmt.Errorf("%w (whether it took effect is unknown: read the flow tables back)", b.refused())
	}
	return b.refused()
}

// Discard makes the switch forget the flow mods.
func (b *Bundle) Discard() {
	b.c.forget(b.xids...)
	xid := b.c.nextXID()
	m, err := Marshal(xid, &BundleControl{Bundle: b.id, Command: BundleDiscard, Flags: bundleFlags})
	if err != nil {
		return
	}
	// Nobody needs the answer: a bundle that could not be opened cannot be discarded either.
	b.c.expect(xid, func(Message, int) bool { return true })
	if err := b.c.enqueue(m); err != nil {
		b.c.forget(xid)
	}
}
