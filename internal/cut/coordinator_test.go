package cut

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"testing"
	"time"
)

func TestRefusals(t *testing.T) {
	c := NewCoordinator(Config{Hosts: map[string][]string{"A": {"a"}, "none": nil}})
	for _, tt := range []struct {
		ev   Event
		want error
	}{
		{Begin{}, ErrCutID},
		{Join{Host: "B", Node: "a"}, ErrMember},
		{Join{Host: "B"}, ErrMember},
		{Leave{Node: "b"}, ErrMember},
		{Begin{Cut: "s1"}, nil},
		{Begin{Cut: "s2"}, ErrBusy},
		{Join{Host: "B", Node: "b"}, ErrBusy},
		{Leave{Node: "a"}, ErrBusy},
		{HostDown{Host: "A"}, nil},
		{Begin{Cut: "s2"}, ErrNoNodes},
	} {
		before := c.clone()
		effects, err := c.Step(0, tt.ev)
		if !errors.Is(err, tt.want) {
			t.Errorf("%#v: error %v, want %v", tt.ev, err, tt.want)
		}
		if err != nil && (effects != nil || !reflect.DeepEqual(before, c.clone())) {
			t.Errorf("%#v is refused, but has effects", tt.ev)
		}
	}
}

// TestAnythingSaid has hosts say anything at any time: whatever it is, the cut
// ends when its deadlines pass, a snapshot is sealed at most once and only when
// every node has been cut and stored, and the same input gives the same output.
func TestAnythingSaid(t *testing.T) {
	cuts, hosts, nodes := []string{"s1", "s2", ""}, []string{"A", "B", "C"}, []string{"a", "b", "c", "d"}
	for seed := range uint64(500) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		pick := func(names []string) string { return names[rnd.IntN(len(names))] }
		cfg := Config{Epoch: 254, Hosts: map[string][]string{"A": {"a"}, "B": {"b", "c"}}}
		c, twin := NewCoordinator(cfg), NewCoordinator(cfg)
		var now time.Duration
		saidCut, saidStored := set{}, set{}
		sealed := false
		step := func(ev Event) {
			members := c.clone().hosts
			effects, err := c.Step(now, ev)
			again, errAgain := twin.Step(now, ev)
			if !reflect.DeepEqual(effects, again) || (err == nil) != (errAgain == nil) {
				t.Fatalf("seed %d: %#v: %v the first time, %v the second", seed, ev, effects, again)
			}
			for _, e := range effects {
				switch e := e.(type) {
				case SendPrepare:
					saidCut, saidStored, sealed = set{}, set{}, false
				case Seal:
					if sealed {
						t.Fatalf("seed %d: %s is sealed twice", seed, e.Cut)
					}
					sealed = true
					for _, ns := range members {
						for _, n := range ns {
							_, cut := saidCut[n]
							_, stored := saidStored[n]
							if !cut || !stored {
								t.Fatalf("seed %d: %s is sealed without %s", seed, e.Cut, n)
							}
						}
					}
				case Done:
					if c.Phase() != PhaseIdle || c.Epoch() != e.Epoch {
						t.Fatalf("seed %d: %v in phase %v, epoch %d", seed, e, c.Phase(), c.Epoch())
					}
				}
			}
		}
		for range 200 {
			now += time.Duration(rnd.IntN(200)) * time.Millisecond
			switch cut, h, n := pick(cuts), pick(hosts), pick(nodes); rnd.IntN(16) {
			case 0:
				step(Begin{Cut: cut})
			case 1, 2:
				step(Prepared{Cut: cut, Host: h})
			case 3, 4:
				if cut == c.Cut() && c.Phase() == PhaseCut {
					saidCut[n] = struct{}{}
				}
				step(NodeCut{Cut: cut, Node: n})
			case 5, 6:
				if cut == c.Cut() {
					saidStored[n] = struct{}{}
				}
				step(Stored{Cut: cut, Node: n})
			case 7, 8, 9:
				step(Counters{Cut: cut, Host: h, Round: c.drain.round, Counts: []ChannelCount{{
					Channel: Channel{From: h, To: pick(hosts)}, Sent: uint64(rnd.IntN(2)), Received: uint64(rnd.IntN(2)),
				}}})
			case 10:
				step(Collected{Cut: cut, Host: h})
			case 11:
				step(Sealed{Cut: cut})
			case 12:
				step(Committed{Cut: cut, Host: h})
			case 13:
				step(Aborted{Cut: cut, Host: h})
			case 14:
				step(Tick{})
			case 15:
				switch rnd.IntN(8) {
				case 0:
					step(HostDown{Host: h})
				case 1:
					step(Failed{Cut: cut, Host: h})
				case 2:
					step(SealFailed{Cut: cut})
				default:
					step(Join{Host: h, Node: n})
				}
			}
		}
		for range 1000 {
			if c.Phase() == PhaseSeal {
				step(SealFailed{Cut: c.Cut(), Reason: "the disk is full"})
			}
			d, ok := c.Deadline()
			if !ok {
				break
			}
			now = max(now, d)
			step(Tick{})
		}
		if c.Phase() != PhaseIdle {
			t.Fatalf("seed %d: the cut is stuck in %v and waits for %v", seed, c.Phase(), c.Waiting())
		}
	}
}

// BenchmarkCut is a whole cut as the coordinator sees it, with one node a host,
// and each host sending to ten others.
func BenchmarkCut(b *testing.B) {
	for _, n := range []int{10, 1000} {
		b.Run(fmt.Sprintf("%d hosts", n), func(b *testing.B) {
			hosts := map[string][]string{}
			counts := map[string][]ChannelCount{}
			name := func(i int) string { return fmt.Sprint("host", i%n) }
			for i := range n {
				hosts[name(i)] = []string{fmt.Sprint("node", i)}
				for j := range 10 {
					counts[name(i)] = append(counts[name(i)],
						ChannelCount{Channel: Channel{name(i), name(i + j), "lan"}, Sent: 7},
						ChannelCount{Channel: Channel{name(i + n - j), name(i), "lan"}, Received: 7})
				}
			}
			c := NewCoordinator(Config{Hosts: hosts})
			var now time.Duration
			for i := range b.N {
				cut := fmt.Sprint("s", i)
				todo := []Event{Begin{Cut: cut}}
				for len(todo) > 0 {
					ev := todo[0]
					todo = todo[1:]
					effects, err := c.Step(now, ev)
					if err != nil {
						b.Fatal(err)
					}
					for _, e := range effects {
						switch e := e.(type) {
						case SendPrepare:
							todo = append(todo, Prepared{Cut: cut, Host: e.Host})
						case SendCut:
							for _, n := range e.Nodes {
								todo = append(todo, NodeCut{Cut: cut, Node: n}, Stored{Cut: cut, Node: n})
							}
						case SendPoll:
							todo = append(todo, Counters{Cut: cut, Host: e.Host, Round: e.Round, Counts: counts[e.Host]})
						case SendCollect:
							todo = append(todo, Collected{Cut: cut, Host: e.Host})
						case Seal:
							todo = append(todo, Sealed{Cut: cut})
						case SendCommit:
							todo = append(todo, Committed{Cut: cut, Host: e.Host})
						case Done:
							if e.Outcome != OutcomeCommitted {
								b.Fatal(e)
							}
						}
					}
					if d, ok := c.Deadline(); ok && len(todo) == 0 {
						now = d
						todo = append(todo, Tick{})
					}
				}
			}
		})
	}
}
