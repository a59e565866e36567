package cut

import (
	"cmp"
	"maps"
	"slices"
	"time"
)

// drain finds out when the old epoch's channels are empty, by Mattern's message
// counters: every frame that was sent has been received. It starts when no node
// sends in the old epoch any more, so what was sent is a number that no longer
// changes, and what was received can only grow up to it.
//
// Counters are read in rounds. One round in which all are equal is not enough: a
// host does not read its counters at one instant, and may have read how many
// frames its switch gave to the gates before it read how many the switch
// received. All that a round saw received is, in the next, seen given to the
// gates as well. So two rounds in a row have to agree.
//
// A frame that the network lost never arrives. If the counters do not move for
// the quiet time, what is missing is lost.
type drain struct {
	state  drainState
	round  int
	next   time.Duration // when the next round begins, in drainWaiting
	counts map[Channel]ChannelCount
	before map[Channel]ChannelCount // of the round before
	since  time.Duration            // end of the first round that read what the last one read
	lost   []ChannelLoss
}

type drainState uint8

const (
	drainPolling    drainState = iota // a round runs
	drainWaiting                      // for the next round
	drainCollecting                   // drained; the channel state is being collected
)

// poll begins a round.
func (c *Coordinator) poll() []Effect {
	d := &c.drain
	d.state = drainPolling
	d.round++
	d.counts = map[Channel]ChannelCount{}
	c.waiting = newSet(maps.Keys(c.hosts))
	return c.each(func(h string) Effect {
		return SendPoll{Cut: c.cut, Host: h, Round: d.round, Epoch: c.epoch}
	})
}

// counters takes one host's answer, and at a round's last one decides.
func (c *Coordinator) counters(now time.Duration, ev Counters) []Effect {
	d := &c.drain
	if _, ok := c.waiting[ev.Host]; !ok || d.state != drainPolling || ev.Round != d.round {
		return nil
	}
	delete(c.waiting, ev.Host)
	for _, n := range ev.Counts {
		if !c.member(n.From) || !c.member(n.To) {
			continue // nobody will ever tell what arrived at a host that is gone
		}
		sum := d.counts[n.Channel]
		sum.Channel = n.Channel
		sum.Sent += n.Sent
		sum.Received += n.Received
		d.counts[n.Channel] = sum
	}
	if len(c.waiting) > 0 {
		return nil
	}
	if d.before == nil || !maps.Equal(d.counts, d.before) {
		d.before, d.since = d.counts, now
	} else if d.balanced() || now-d.since >= c.timing.Quiet {
		d.lost = d.missing()
		return c.collect(now)
	}
	d.state, d.next = drainWaiting, now+c.timing.Poll
	return nil
}

// collect ends the recording everywhere.
func (c *Coordinator) collect(now time.Duration) []Effect {
	c.drain.state = drainCollecting
	c.waiting = newSet(maps.Keys(c.hosts))
	return c.each(func(h string) Effect { return SendCollect{Cut: c.cut, Host: h} })
}

func (d *drain) balanced() bool {
	for _, n := range d.counts {
		if n.Sent != n.Received {
			return false
		}
	}
	return true
}

// missing lists what was sent and not received. A channel that brought more than
// it was given (a network that duplicates) has lost nothing that could be told.
func (d *drain) missing() []ChannelLoss {
	var lost []ChannelLoss
	for _, n := range d.counts {
		if n.Sent > n.Received {
			lost = append(lost, ChannelLoss{Channel: n.Channel, Frames: n.Sent - n.Received})
		}
	}
	slices.SortFunc(lost, func(a, b ChannelLoss) int {
		return cmp.Or(cmp.Compare(a.From, b.From), cmp.Compare(a.To, b.To), cmp.Compare(a.Network, b.Network))
	})
	return lost
}
