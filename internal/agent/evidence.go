package agent

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"violin/internal/certificate"
	"violin/internal/cut"
	"violin/internal/fabric"
)

// seenBound is how long frames that a switch has handed over may take to get
// here: the session between the two is a socket of this machine.
const seenBound = 500 * time.Millisecond

// tally counts, for the certificate, what a node's gate was given and what it
// gave: by the frames alone, not by the gate's verdicts.
type tally struct {
	flipped                    bool // and recording
	handed, delivered, failed  uint64
	newer, older, copies, late uint64
	discarded                  uint64 // by the policy [Drop], instead of being held
}

func (t *tally) arrive(epoch cut.Epoch, copied bool) {
	switch {
	case !copied:
		t.handed++
	case t.flipped:
		t.copies++
	}
}

// deliver counts a frame that the gate gives to the node. One from the outside has
// no colour.
func (t *tally) deliver(epoch, node cut.Epoch, outside bool) {
	t.delivered++
	switch c := epoch.Compare(node); {
	case outside:
	case c > 0:
		t.newer++
	case c < 0 && t.flipped:
		t.older++
	case c < 0:
		t.late++
	}
}

func (t *tally) gate(base, now cut.GateStats, waiting int) certificate.Gate {
	return certificate.Gate{
		Handed: t.handed, Held: now.Held - base.Held, Delivered: t.delivered - t.failed, Waiting: uint64(waiting), Failed: t.failed + t.discarded,
		Newer: t.newer, Copies: t.copies, Older: t.older, Recorded: now.Recorded - base.Recorded, Late: t.late,
	}
}

func (n *node) epoch() cut.Epoch {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.gate.Epoch()
}

// witness puts a step that has been done on record.
func (hc *hostCut) witness(nc *nodeCut, step cut.Step, began time.Time, from cut.Epoch) {
	nc.result.Steps = append(nc.result.Steps, certificate.Step{
		Name: step.String(), Began: int64(began.Sub(hc.began)), Ended: int64(time.Since(hc.began)),
		From: uint8(from), To: uint8(nc.n.epoch()),
	})
}

// awaitSeen waits until all frames that the switch has handed over have come. What
// does not come was dropped between the two, and is then in no memory and no
// record: there must be no such snapshot.
func (hc *hostCut) awaitSeen() error {
	began := time.Now()
	for {
		counters, err := hc.a.fabric.Counters(hc.ctx)
		if err != nil {
			return err
		}
		hc.after = counters
		if n := counters.Refused - hc.before.Refused; n > 0 {
			return fmt.Errorf("the switch did not take %d frames that a gate gave out; its log and the agent's say why", n)
		}
		if done, err := judge(hc.dropped(counters), time.Since(began)); done {
			return err
		}
		select {
		case <-time.After(openQuiet):
		case <-hc.ctx.Done():
			return hc.ctx.Err()
		}
	}
}

// judge tells whether frames that have not come are waited for no longer, and
// what that means.
func judge(missing int64, waited time.Duration) (done bool, err error) {
	switch {
	case missing == 0:
		return true, nil
	case missing < 0:
		// An entry that is put over another takes its count along, as the flip does
		// with that of the closed gate: the switch may have counted too few.
		return waited > 5*openQuiet, nil
	case waited > seenBound:
		return true, fmt.Errorf("%d frames were dropped between the switch and its controller: they would be in no memory and no record; "+
			"try again, or under less traffic", missing)
	}
	return false, nil
}

// dropped is how many frames the switch has handed over, since it counted before,
// that never came here. It is negative if the switch has counted too few.
func dropped(before, now fabric.Counters) int64 {
	return int64(now.Handed-before.Handed) - int64(now.Seen-before.Seen)
}

// dropped is that since the host prepared.
func (hc *hostCut) dropped(now fabric.Counters) int64 {
	return dropped(hc.before, now) - hc.excused
}

// excuse takes note of what the closed entries count that was never handed over:
// frames that the switch delivered between [fabric.Switch.Update]'s purge and its
// bundle, and credits to the gate that closed then. They would pass for dropped.
//
// The counters' answer comes behind all that they count, so the excess over what has
// come is exact if nothing came meanwhile, for which it tries; else what came
// between two answers is excused with it.
func (hc *hostCut) excuse(ctx context.Context) error {
	first, err := hc.a.fabric.Counters(ctx)
	if err != nil {
		return err
	}
	for try := range levelTries {
		second, err := hc.a.fabric.Counters(ctx)
		if err != nil {
			return err
		}
		if second.Seen == first.Seen || try == levelTries-1 {
			second.Seen = first.Seen
			hc.a.mu.Lock()
			hc.excused += max(0, hc.dropped(second))
			hc.a.mu.Unlock()
			return nil
		}
		first = second
	}
	return nil
}

// HostResult is what a host brings to a snapshot.
type HostResult struct {
	Host     string
	Nodes    []NodeResult
	Counters certificate.Host
	Dropped  uint64        // frames that the cut has dropped on this host
	Reads    map[int]int64 // when each round's counters were read: nanoseconds since the host was told to prepare
}

// Results returns what the host brings to the snapshot: complete once it has
// reported Collected, and Stored for each node.
func (a *Agent) Results(slice, id string) (HostResult, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	hc := a.cuts[slice]
	if hc == nil || hc.id != id {
		return HostResult{}, fmt.Errorf("host %s: knows of no cut %s", a.cfg.Host, id)
	}
	r := HostResult{Host: a.cfg.Host, Dropped: uint64(max(0, hc.dropped(hc.after))) + hc.discarded, Reads: map[int]int64{}}
	r.Counters = certificate.Host{Name: a.cfg.Host, Handed: uint64(max(0, int64(hc.after.Handed-hc.before.Handed)-hc.excused)), Seen: hc.after.Seen - hc.before.Seen}
	for round, at := range hc.reads {
		r.Reads[round] = int64(at.Sub(hc.began))
	}
	for _, nc := range hc.nodes {
		r.Nodes = append(r.Nodes, nc.result)
	}
	slices.SortFunc(r.Nodes, func(a, b NodeResult) int { return cmp.Compare(a.Node, b.Node) })
	return r, nil
}
