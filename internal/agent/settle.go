package agent

import (
	"context"
	"errors"
	"time"

	"violin/internal/cut"
	"violin/internal/fabric"
)

// queueBound is how long a step waits for a queue to run empty.
const queueBound = 2 * time.Second

// settle sees to it that no frame that has passed the node's gate is on its way into the
// node's memory. Those for a node that reads nothing, such as one whose kernel has crashed
// or has not started yet, go back to the gate, and wait there with what came later.
func (hc *hostCut) settle(ctx context.Context, n *node) error {
	for _, p := range n.ports {
		bounded, cancel := context.WithTimeout(ctx, queueBound)
		err := hc.a.fabric.Settle(bounded, p.tap)
		cancel()
		if errors.Is(err, fabric.ErrUnread) && ctx.Err() == nil {
			err = hc.takeBack(ctx, p)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (hc *hostCut) takeBack(ctx context.Context, p *port) error {
	ctx, cancel := context.WithTimeout(ctx, queueBound)
	defer cancel()
	n := p.node
	data, err := hc.a.fabric.TakeBack(ctx, p.tap, n.vm.PID())
	if err != nil && len(data) == 0 {
		return err
	}
	now := time.Now()
	taken := make([]cut.Frame[arrival], 0, len(data))
	for _, d := range data {
		taken = append(taken, cut.Frame[arrival]{Size: len(d), Ref: arrival{port: p, data: d, at: now}})
	}
	n.mu.Lock()
	n.gate.TakeBack(taken)
	n.tally.taken += uint64(len(taken))
	n.mu.Unlock()
	hc.a.log.Warn("the node reads nothing: frames were taken back out of its device", "cut", hc.id, "node", n.spec.Name, "interface", p.index, "frames", len(taken))
	return err
}

// flush returns once the switch has stamped all that the node had sent.
func (hc *hostCut) flush(ctx context.Context, n *node) error {
	ctx, cancel := context.WithTimeout(ctx, queueBound)
	defer cancel()
	for _, p := range n.ports {
		if err := hc.a.fabric.Flush(ctx, p.tap); err != nil {
			return err
		}
	}
	return nil
}
