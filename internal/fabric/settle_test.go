package fabric

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"violin/internal/coloring"
)

// QEMU reads one frame more than its guest has room for, keeps it, and throws it away
// if the vCPUs are stopped then. A queue that is empty does not tell of it: the node
// has settled only when QEMU reads on.
func TestSettle(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	p := newPair(ctx, t, 0, func(coloring.Packet, []byte) {})
	sw, g := p.switches["b"], p.guests["b"]
	const frames = 20
	for n := range frames {
		p.guests["a"].send(t, g.addr, n)
	}
	g.receive(t, frames) // the last one, say, is in QEMU's hand
	if _, err := sw.empty(ctx, "n0"); err != nil {
		t.Fatalf("the queue is empty: %v", err)
	}
	short, stop := context.WithTimeout(ctx, 300*time.Millisecond)
	defer stop()
	if err := sw.Settle(short, "n0"); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("settled though the guest reads no further: %v", err)
	}

	// The guest has room again, and QEMU reads what the attempt before left.
	settled := make(chan error, 1)
	go func() { settled <- sw.Settle(ctx, "n0") }()
	last := func() {
		t.Helper()
		if err := g.tap.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Fatal(err)
		}
		for buf := make([]byte, 2048); ; {
			n, err := g.tap.Read(buf)
			if err != nil {
				t.Fatalf("the frame behind the last: %v", err)
			}
			if bytes.Equal(buf[:n], lastFrame) {
				return
			}
		}
	}
	last()
	if err := <-settled; err != nil {
		t.Error(err)
	}
	// It is still the last one: a guest that takes none must not find more and more.
	if err := sw.Settle(ctx, "n0"); err != nil {
		t.Error(err)
	}
	// Behind another frame there must be another.
	p.guests["a"].send(t, g.addr, frames)
	g.receive(t, 1)
	go func() { settled <- sw.Settle(ctx, "n0") }()
	last()
	if err := <-settled; err != nil {
		t.Error(err)
	}
	if err := sw.Settle(ctx, "none"); err == nil {
		t.Error("a device that is not there has settled")
	}
}
