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
	taken                      uint64 // out of the device of a node that does not read
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
		Handed: t.handed, Taken: t.taken, Held: now.Held - base.Held, Delivered: t.delivered - t.failed, Waiting: uint64(waiting), Failed: t.failed + t.discarded,
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

// counters are the switch's, as far as they are of this slice: another's cut is none of
// this one's business.
func (hc *hostCut) counters(ctx context.Context) (fabric.Counters, error) {
	c, err := hc.a.fabric.Counters(ctx)
	if err != nil {
		return c, err
	}
	var ports []uint32
	for _, nc := range hc.nodes {
		for _, p := range nc.n.ports {
			ports = append(ports, p.number)
		}
	}
	return c.For(ports), nil
}

// awaitSeen waits until all frames that the switch has handed over have come. What
// does not come was dropped between the two, and is then in no memory and no
// record: there must be no such snapshot.
func (hc *hostCut) awaitSeen() error {
	began := time.Now()
	for {
		counters, err := hc.counters(hc.ctx)
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
		if err := hc.sleep(openQuiet); err != nil {
			return err
		}
	}
}

// overflowed fails if the switch has thrown frames for the gates away. Where the flow
// entries' counters do not say that by themselves, it gives the switch the time to tell.
func (hc *hostCut) overflowed() error {
	hc.a.mu.Lock()
	exact := !hc.guessed && dropped(hc.before, hc.after) == hc.excused
	hc.a.mu.Unlock()
	if !exact {
		if err := hc.sleep(fabric.OverflowLag); err != nil {
			return err
		}
	}
	n, err := hc.a.fabric.Overflowed(hc.ctx)
	if err != nil {
		return err
	}
	if n > hc.overflows {
		return droppedError(int64(n - hc.overflows))
	}
	return nil
}

func (hc *hostCut) sleep(d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-hc.ctx.Done():
		return hc.ctx.Err()
	}
}

func droppedError(n int64) error {
	return fmt.Errorf("%d frames were dropped between the switch and its controller: they would be in no memory and no record; "+
		"try again, or under less traffic", n)
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
		return true, droppedError(missing)
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
	hc.a.mu.Lock()
	defer hc.a.mu.Unlock()
	return dropped(hc.before, now) - hc.excused
}

// excuse takes note of what the closed entries count that was never handed over:
// frames that the switch delivered between [fabric.Switch.Update]'s purge and its
// bundle, and credits to the gate that closed then. They would pass for dropped.
//
// The counters' answer comes behind all that they count, so the excess over what has
// come is exact if nothing came meanwhile, for which it tries. Else the least of the
// excesses is a bound from above, and whether frames were dropped is for
// [hostCut.overflowed] to say.
func (hc *hostCut) excuse(ctx context.Context) error {
	hc.excusing.Lock() // two gates must not excuse the same frames
	defer hc.excusing.Unlock()
	last, err := hc.counters(ctx)
	if err != nil {
		return err
	}
	var bound int64
	for try := 1; ; try++ {
		now, err := hc.counters(ctx)
		if err != nil {
			return err
		}
		excess := max(0, hc.dropped(fabric.Counters{Handed: now.Handed, Seen: last.Seen}))
		if try == 1 || excess < bound {
			bound = excess
		}
		if exact := now.Seen == last.Seen; exact || try == levelTries {
			hc.a.mu.Lock()
			hc.excused += bound
			hc.guessed = hc.guessed || !exact
			hc.a.mu.Unlock()
			return nil
		}
		last = now
	}
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
	r := HostResult{Host: a.cfg.Host, Dropped: uint64(max(0, dropped(hc.before, hc.after)-hc.excused)) + hc.discarded, Reads: map[int]int64{}}
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
