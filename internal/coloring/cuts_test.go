package coloring

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
)

// specs are the shapes that matter, each the smallest of its kind.
var specs = []spec{
	{name: "two hosts", hosts: 2, nodes: []nodeSpec{
		{host: 0, networks: []uint16{1}}, {host: 1, networks: []uint16{1}},
	}},
	{name: "two nodes on one host", hosts: 2, nodes: []nodeSpec{
		{host: 0, networks: []uint16{1}}, {host: 0, networks: []uint16{1}}, {host: 1, networks: []uint16{1}},
	}},
	{name: "two networks per node", hosts: 2, nodes: []nodeSpec{
		{host: 0, networks: []uint16{1, 2}}, {host: 1, networks: []uint16{1, 2}}, {host: 1, networks: []uint16{2}},
	}},
	{name: "two interfaces on one network", hosts: 2, nodes: []nodeSpec{
		{host: 0, networks: []uint16{1, 1}}, {host: 1, networks: []uint16{1, 1}}, {host: 1, networks: []uint16{1}},
	}},
	{name: "a router between two networks", hosts: 3, nodes: []nodeSpec{
		{host: 0, networks: []uint16{1}}, {host: 1, networks: []uint16{1, MaxNetwork}}, {host: 2, networks: []uint16{MaxNetwork}},
	}},
	{name: "three hosts", hosts: 3, nodes: []nodeSpec{
		{host: 0, networks: []uint16{1}}, {host: 1, networks: []uint16{1}}, {host: 2, networks: []uint16{1}},
	}},
	{name: "another slice", hosts: 3, nodes: []nodeSpec{
		{host: 0, networks: []uint16{1}}, {host: 1, networks: []uint16{1, 2}}, {host: 2, networks: []uint16{2}},
		{host: 0, networks: []uint16{3}, other: true}, {host: 1, networks: []uint16{3}, other: true},
	}},
	{name: "a gateway", hosts: 2, nodes: []nodeSpec{
		{host: 0, networks: []uint16{1}}, {host: 1, networks: []uint16{1}}, {host: 0, networks: []uint16{1}, outside: true},
	}},
	{name: "a gateway on one of two networks", hosts: 3, nodes: []nodeSpec{
		{host: 0, networks: []uint16{1, MaxNetwork}}, {host: 1, networks: []uint16{MaxNetwork, 1}}, {host: 2, networks: []uint16{MaxNetwork}},
		{host: 1, networks: []uint16{MaxNetwork}, outside: true},
	}},
}

// randomSpec is up to five nodes of up to three interfaces each, anywhere.
func randomSpec(rnd *rand.Rand) spec {
	s := spec{name: "random", hosts: 2 + rnd.IntN(2)}
	for range 2 + rnd.IntN(4) {
		n := nodeSpec{host: rnd.IntN(s.hosts)}
		for range 1 + rnd.IntN(3) {
			n.networks = append(n.networks, uint16(1+rnd.IntN(3)))
		}
		s.nodes = append(s.nodes, n)
	}
	if n := s.nodes[0]; rnd.IntN(3) == 0 {
		s.nodes = append(s.nodes, nodeSpec{host: n.host, networks: n.networks[:1], outside: true})
	}
	return s
}

// long tells whether to take minutes instead of seconds.
func long() bool { return os.Getenv("VIOLIN_LONG") == "1" }

// TestCuts takes snapshots of networks that are made of flow entries, over the
// wrap of the epochs, and judges each.
func TestCuts(t *testing.T) {
	runs := 3
	if long() {
		runs = 300
	}
	all := append([]spec{{name: "random"}}, specs...)
	for _, s := range all {
		for _, how := range []struct {
			name  string
			rules rules
		}{
			{"calm", rules{}},
			{"loses and reorders", rules{reorder: true}},
			{"trouble", rules{trouble: true}},
			{"all at once", rules{reorder: true, trouble: true}},
		} {
			t.Run(s.name+", "+how.name, func(t *testing.T) {
				t.Parallel()
				total := world{}
				for seed := range uint64(runs) {
					r := how.rules
					r.spec, r.cuts, r.first, r.sends = s, 6, 252, 20
					if s.name == "random" {
						r.spec = randomSpec(rand.New(rand.NewPCG(seed, 1)))
					}
					w := newWorld(r, seed)
					if bad := w.run(); bad != "" {
						t.Fatalf("seed %d: %s\n  %s", seed, bad, story(r, seed))
					}
					total.add(w)
				}
				if slices.ContainsFunc(s.nodes, func(n nodeSpec) bool { return n.outside }) && total.shut == 0 {
					t.Error("no frame from outside came to a closed gate")
				}
				t.Log(total.tried())
				if total.sealed == 0 || total.recorded == 0 || total.held == 0 || how.rules.trouble != (total.aborted > 0) ||
					how.rules.reorder != (total.lost > 0) {
					t.Error("that is not what this is to try")
				}
			})
		}
	}
}

// TestManyCuts goes all the way round: entries and counters of an epoch long
// gone must not be in the way of its namesake.
func TestManyCuts(t *testing.T) {
	r := rules{spec: specs[1], cuts: 270, first: 0, sends: 10, reorder: true}
	w := newWorld(r, 1)
	if bad := w.run(); bad != "" {
		t.Fatalf("%s\n  %s", bad, story(r, 1))
	}
	if w.epoch != 270 {
		t.Errorf("the slice is in epoch %d", w.epoch)
	}
	t.Log(w.tried())
}

func (w *world) add(o *world) {
	w.clock += o.clock
	w.sealed += o.sealed
	w.aborted += o.aborted
	w.recorded += o.recorded
	w.held += o.held
	w.raced += o.raced
	w.lost += o.lost
	w.shut += o.shut
}

func (w *world) tried() string {
	return fmt.Sprintf("%d things happened: %d cuts sealed, %d aborted; %d frames held, %d recorded, %d between switch and gate at an opening, %d lost in tunnels; %d from outside at a closed gate",
		w.clock, w.sealed, w.aborted, w.held, w.recorded, w.raced, w.lost, w.shut)
}
