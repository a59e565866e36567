package cut

import (
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
)

// explorer walks, depth first, every state of a world that can be reached.
type explorer struct {
	seen    map[[16]byte]bool // true while the walk is below it
	path    []action
	forward bool
	key     []byte
	edges   int
	ends    int
}

// counterexample is how a violation comes about.
type counterexample struct {
	what violation
	path []string
}

func (c *counterexample) String() string {
	return fmt.Sprintf("%s\n  %s", c.what, strings.Join(c.path, "\n  "))
}

// explore returns nil as counterexample if in no state that can be reached any
// invariant is violated, no run goes on forever, and every run ends as it must.
func explore(r *rules) (*explorer, *counterexample) {
	e := &explorer{seen: map[[16]byte]bool{}}
	return e, e.walk(newWorld(r))
}

func (e *explorer) walk(w *world) *counterexample {
	e.key = w.key(e.key[:0])
	sum := sha256.Sum256(e.key)
	k := [16]byte(sum[:])
	if below, ok := e.seen[k]; ok {
		if below {
			return e.counterexample("the walk comes back to where it was: it need not end")
		}
		return nil
	}
	e.seen[k] = true
	defer func() { e.seen[k] = false }()

	actions := w.actions()
	if len(actions) == 0 {
		e.ends++
		return e.try(w.checkEnd)
	}
	if !e.forward {
		slices.Reverse(actions) // sends and faults first: that is where trouble is
	}
	for _, x := range actions {
		next := w.clone()
		e.edges++
		e.path = append(e.path, x)
		bad := e.try(func() { next.apply(x) })
		if bad == nil {
			bad = e.walk(next)
		}
		if bad != nil {
			return bad
		}
		e.path = e.path[:len(e.path)-1]
	}
	return nil
}

// try turns the panic of a violation into a counterexample.
func (e *explorer) try(f func()) (bad *counterexample) {
	defer func() {
		switch p := recover().(type) {
		case nil:
		case violation:
			bad = e.counterexample(p)
		default:
			panic(fmt.Sprintf("%v\n%v", p, e.counterexample("panic")))
		}
	}()
	f()
	return nil
}

func (e *explorer) counterexample(v violation) *counterexample {
	c := &counterexample{what: v}
	for _, x := range e.path {
		c.path = append(c.path, x.String())
	}
	return c
}

// long tells whether to take minutes instead of seconds.
func long() bool { return os.Getenv("VIOLIN_LONG") == "1" }

// TestExplore is the proof: all interleavings of small worlds.
func TestExplore(t *testing.T) {
	apart, three := []int{0, 1}, []int{0, 1, 2}
	for _, r := range []struct {
		long bool
		rules
	}{
		{false, rules{name: "two nodes", hostOf: apart, frames: 2, cuts: 1}},
		{false, rules{name: "a network that loses and reorders", hostOf: apart, frames: 2, cuts: 1, reorder: true, losses: 1}},
		{false, rules{name: "newer frames trigger", hostOf: apart, frames: 1, cuts: 1, trigger: true}},
		{false, rules{name: "a node that need not read", hostOf: apart, frames: 2, cuts: 1, unread: true}},
		{false, rules{name: "one host", hostOf: []int{0, 0}, frames: 1, cuts: 1}},
		{false, rules{name: "three nodes", hostOf: three, frames: 1, cuts: 1}},
		{false, rules{name: "two cuts", hostOf: apart, frames: 1, cuts: 2}},
		{false, rules{name: "a host dies", hostOf: apart, frames: 1, cuts: 1, deaths: 1}},
		{false, rules{name: "a gate overflows", hostOf: apart, frames: 1, cuts: 1, limits: Limits{Bytes: 1}}},
		{false, rules{name: "the coordinator dies", hostOf: apart, frames: 1, cuts: 1, crashes: 1}},
		{false, rules{name: "the coordinator dies between two cuts", hostOf: apart, frames: 1, cuts: 2, crashes: 1, between: true}},
		{true, rules{name: "the coordinator dies after an abort", hostOf: apart, frames: 1, cuts: 2, cancels: 1, crashes: 1, between: true}},

		{true, rules{name: "the coordinator dies, two frames", hostOf: apart, frames: 2, cuts: 1, crashes: 1}},
		{true, rules{name: "the coordinator dies twice", hostOf: apart, frames: 1, cuts: 1, crashes: 2}},
		{true, rules{name: "the coordinator dies, then another cut", hostOf: apart, frames: 1, cuts: 2, crashes: 1}},
		{true, rules{name: "the coordinator dies, and a write or step fails", hostOf: apart, frames: 1, cuts: 1, crashes: 1, failures: 1}},
		{true, rules{name: "the coordinator and a host die", hostOf: apart, frames: 1, cuts: 1, crashes: 1, deaths: 1}},
		{true, rules{name: "newer frames trigger, two frames", hostOf: apart, frames: 2, cuts: 1, trigger: true}},
		{true, rules{name: "one host, two frames", hostOf: []int{0, 0}, frames: 2, cuts: 1}},
		{true, rules{name: "three frames", hostOf: apart, frames: 3, cuts: 1}},
		{true, rules{name: "three frames, loses and reorders", hostOf: apart, frames: 3, cuts: 1, reorder: true, losses: 1}},
		{true, rules{name: "three nodes, two frames", hostOf: three, frames: 2, cuts: 1}},
		{true, rules{name: "three nodes on two hosts", hostOf: []int{0, 0, 1}, frames: 1, cuts: 1}},
		{true, rules{name: "two cuts, two frames", hostOf: apart, frames: 2, cuts: 2}},
		{true, rules{name: "a cancel", hostOf: apart, frames: 1, cuts: 1, cancels: 1}},
		{true, rules{name: "a node that need not read, and a cancel", hostOf: apart, frames: 2, cuts: 1, cancels: 1, unread: true}},
		{true, rules{name: "a node that need not read, two cuts", hostOf: apart, frames: 1, cuts: 2, unread: true}},
		{true, rules{name: "a cancel, two frames", hostOf: apart, frames: 2, cuts: 1, cancels: 1}},
		{true, rules{name: "a cancel, then another cut", hostOf: apart, frames: 1, cuts: 2, cancels: 1}},
		{true, rules{name: "a host dies, two frames", hostOf: apart, frames: 2, cuts: 1, deaths: 1}},
		{true, rules{name: "one of three hosts dies", hostOf: three, frames: 1, cuts: 1, deaths: 1}},
		{true, rules{name: "a step or the seal fails", hostOf: apart, frames: 1, cuts: 1, failures: 1}},
		{true, rules{name: "a deadline passes", hostOf: apart, frames: 1, cuts: 1, timeouts: 1}},
		{true, rules{name: "a late repetition, then another cut", hostOf: apart, frames: 1, cuts: 2, timeouts: 1}},
		{true, rules{name: "a gate overflows, two frames", hostOf: apart, frames: 2, cuts: 1, limits: Limits{Frames: 1}}},
	} {
		t.Run(r.name, func(t *testing.T) {
			if r.long && !long() {
				t.Skip("takes up to minutes: set VIOLIN_LONG=1")
			}
			e, bad := explore(&r.rules)
			if bad != nil {
				t.Fatal(bad)
			}
			t.Logf("%d states, %d transitions, %d ends", len(e.seen), e.edges, e.ends)
		})
	}
}

// TestExploreForward walks the other way round. If it finds more states or fewer,
// two states that differ are taken for one.
func TestExploreForward(t *testing.T) {
	r := &rules{hostOf: []int{0, 1}, frames: 1, cuts: 2, losses: 1}
	back, bad := explore(r)
	if bad != nil {
		t.Fatal(bad)
	}
	forth := &explorer{seen: map[[16]byte]bool{}, forward: true}
	if bad := forth.walk(newWorld(r)); bad != nil {
		t.Fatal(bad)
	}
	if len(back.seen) != len(forth.seen) || back.edges != forth.edges {
		t.Errorf("%d states and %d transitions one way, %d and %d the other", len(back.seen), back.edges, len(forth.seen), forth.edges)
	}
}

// TestRandomWalks goes where the exhaustive walk is too slow: more frames, more
// cuts, and every kind of trouble at once.
func TestRandomWalks(t *testing.T) {
	walks := uint64(200)
	if long() {
		walks = 20_000
	}
	for _, r := range []rules{
		{name: "calm", hostOf: []int{0, 1, 2}, frames: 8, cuts: 3},
		{name: "one host of two nodes", hostOf: []int{0, 0, 1}, frames: 8, cuts: 3, trigger: true},
		{name: "trouble", hostOf: []int{0, 1, 2}, frames: 8, cuts: 4, reorder: true, losses: 2, deaths: 1, cancels: 1, failures: 1},
		{name: "trouble, and the coordinator dies", hostOf: []int{0, 1, 2}, frames: 8, cuts: 4, reorder: true, losses: 2, deaths: 1, cancels: 1, failures: 1, crashes: 2},
		{name: "trouble, and nodes that need not read", hostOf: []int{0, 1, 2}, frames: 8, cuts: 4, reorder: true, losses: 2, deaths: 1, cancels: 1, failures: 1, unread: true},
	} {
		t.Run(r.name, func(t *testing.T) {
			for seed := range walks {
				e := &explorer{}
				w, rnd := newWorld(&r), rand.New(rand.NewPCG(seed, 0))
				bad := e.try(func() {
					for actions := w.actions(); len(actions) > 0; actions = w.actions() {
						x := actions[rnd.IntN(len(actions))]
						e.path = append(e.path, x)
						w.apply(x)
					}
					w.checkEnd()
				})
				if bad != nil {
					t.Fatalf("seed %d: %v", seed, bad)
				}
			}
		})
	}
}
