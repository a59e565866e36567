package coordinator

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"violin/internal/cut"
)

// Drained is how the coordinator came to know that every node had cut and that
// the channels were empty. Instants are since the cut was asked for.
type Drained struct {
	Heard  map[string]time.Duration // by node: it was said to have cut
	Rounds []Round                  // the last two, and before them the first that read the same
	Quiet  time.Duration            // silence after which a frame counts as lost
}

// Round is one reading of all hosts' counters.
type Round struct {
	Number       int
	Asked, Ended time.Duration
	Counts       map[string][]cut.ChannelCount // by host, as it answered
}

// witness listens to a cut. What it keeps is what was said, before the protocol
// makes anything of it.
type witness struct {
	began  time.Time
	heard  map[string]time.Duration
	open   Round
	rounds []Round
}

func newWitness() *witness {
	return &witness{began: time.Now(), heard: map[string]time.Duration{}}
}

func (w *witness) effect(ef cut.Effect) {
	if e, ok := ef.(cut.SendPoll); ok && e.Round != w.open.Number {
		w.end()
		w.open = Round{Number: e.Round, Asked: time.Since(w.began), Counts: map[string][]cut.ChannelCount{}}
	}
}

func (w *witness) event(ev cut.Event) {
	switch e := ev.(type) {
	case cut.NodeCut:
		if _, ok := w.heard[e.Node]; !ok {
			w.heard[e.Node] = time.Since(w.began)
		}
	case cut.Counters:
		if _, ok := w.open.Counts[e.Host]; e.Round == w.open.Number && !ok {
			w.open.Counts[e.Host] = e.Counts
			w.open.Ended = time.Since(w.began)
		}
	}
}

// end puts the round that is open to the others and forgets those that the
// certificate does not need.
func (w *witness) end() {
	if w.open.Number == 0 {
		return
	}
	if n := len(w.rounds); n > 0 && !same(w.rounds[n-1], w.open) {
		w.rounds = w.rounds[n-1:]
	}
	w.rounds = append(w.rounds, w.open)
	if n := len(w.rounds); n > 3 {
		w.rounds = slices.Delete(w.rounds, 1, n-2)
	}
	// One that reads otherwise stays only until the next is known.
	if n := len(w.rounds); n > 2 && !same(w.rounds[0], w.rounds[1]) {
		w.rounds = w.rounds[1:]
	}
}

func (w *witness) drained(quiet time.Duration) Drained {
	w.end()
	w.open = Round{}
	return Drained{Heard: maps.Clone(w.heard), Rounds: slices.Clone(w.rounds), Quiet: quiet}
}

// same tells whether two rounds read the same, whatever the order of the counts.
func same(a, b Round) bool {
	return maps.EqualFunc(a.Counts, b.Counts, func(a, b []cut.ChannelCount) bool { return slices.Equal(Canonical(a), Canonical(b)) })
}

// Canonical adds a host's counts up by channel, sorts them, and leaves out those
// that are 0.
func Canonical(counts []cut.ChannelCount) []cut.ChannelCount {
	sums := map[cut.Channel]cut.ChannelCount{}
	for _, n := range counts {
		s := sums[n.Channel]
		sums[n.Channel] = cut.ChannelCount{Channel: n.Channel, Sent: s.Sent + n.Sent, Received: s.Received + n.Received}
	}
	maps.DeleteFunc(sums, func(_ cut.Channel, n cut.ChannelCount) bool { return n.Sent == 0 && n.Received == 0 })
	return slices.SortedFunc(maps.Values(sums), func(a, b cut.ChannelCount) int {
		return cmp.Or(cmp.Compare(a.From, b.From), cmp.Compare(a.To, b.To), cmp.Compare(a.Network, b.Network))
	})
}
