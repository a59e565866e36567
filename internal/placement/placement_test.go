package placement

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"violin/internal/admission"
)

const MiB = 1 << 20

// machine has room for so many nodes of 36 MiB, which need 100 MiB each.
func machine(name string, nodes int) admission.Machine {
	return admission.Machine{Name: name, Free: uint64(nodes) * 100 * MiB, CPUs: 4}
}

// three are hosts in two sites, each a machine with room for so many nodes.
func three(alpha, beta, gamma int) Request {
	return Request{
		Hosts:    []Host{{Name: "gamma", Site: "east", Machine: "c"}, {Name: "alpha", Site: "west", Machine: "a"}, {Name: "beta", Site: "west", Machine: "b"}},
		Machines: []admission.Machine{machine("a", alpha), machine("b", beta), machine("c", gamma)},
	}
}

func (r Request) with(nodes ...Node) Request {
	for _, n := range nodes {
		n.Name, n.Memory, n.CPUs = fmt.Sprintf("n%d", len(r.Nodes)+1), 36*MiB, 1
		r.Nodes = append(r.Nodes, n)
	}
	return r
}

func (r Request) away(host, why string) Request {
	r.Hosts = slices.Clone(r.Hosts)
	for i := range r.Hosts {
		if r.Hosts[i].Name == host {
			r.Hosts[i].Away = why
		}
	}
	return r
}

func (r Request) auto() Request { r.Auto = true; return r }

func (r Request) on(pairs ...string) Request {
	r.On = map[string]string{}
	for i := 0; i < len(pairs); i += 2 {
		r.On[pairs[i]] = pairs[i+1]
	}
	return r
}

func TestPlace(t *testing.T) {
	a, b, c := Node{Host: "alpha", Site: "west"}, Node{Host: "beta", Site: "west"}, Node{Host: "gamma", Site: "east"}
	const gone = "its agent is not connected"
	for _, tt := range []struct {
		why  string
		r    Request
		want string   // hosts of the nodes, in their order
		err  error    // and
		says []string // what it says
	}{
		{"as it was", three(1, 1, 1).with(a, b, c), "alpha beta gamma", nil, nil},
		{"as it was, and may change", three(1, 1, 1).with(a, b, c).auto(), "alpha beta gamma", nil, nil},
		{"nodes of one host stay together where they were", three(3, 9, 9).with(a, a, a).auto(), "alpha alpha alpha", nil, nil},
		{"to another host of the site", three(9, 1, 9).with(a).away("alpha", gone).auto(), "beta", nil, nil},
		{"to another site, if the own has no room", three(9, 1, 9).with(a, a, b).away("alpha", gone).auto(), "gamma gamma beta", nil, nil},
		{"spread", three(9, 4, 4).with(Node{}, Node{}, Node{}).away("alpha", gone), "beta gamma beta", nil, nil},
		{"spread over hosts before memory", three(9, 4, 2).with(Node{}, Node{}, Node{}), "alpha beta gamma", nil, nil},
		{"in a site", three(9, 9, 9).with(Node{Within: "east"}, Node{Within: "east"}), "gamma gamma", nil, nil},
		{"as wished", three(1, 2, 1).with(a, b).on("n1", "beta"), "beta beta", nil, nil},
		{"a wish comes before who was there", three(2, 1, 0).with(a, b).on("n1", "beta").auto(), "beta alpha", nil, nil},
		{"what is too much for a host goes", three(1, 1, 1).with(a, a).auto(), "alpha beta", nil, nil},
		{"no host of that name any more", three(1, 1, 1).with(Node{Host: "delta", Site: "west"}).auto(), "alpha", nil, nil},

		{"away", three(1, 1, 1).with(a, b).away("alpha", gone), "", ErrAway, []string{`node "n1" on host alpha`, gone}},
		{"wished to where nothing goes", three(1, 1, 1).with(b).away("alpha", "it is cordoned").on("n1", "alpha").auto(), "", ErrAway, []string{`node "n1" on host alpha`, "cordoned"}},
		{"there is none", three(1, 1, 1).with(Node{Host: "delta"}), "", ErrAway, []string{"delta", "no such host"}},
		{"a wish for no node", three(1, 1, 1).with(a).on("n7", "beta"), "", ErrUnknown, []string{`"n7"`, "no such node"}},
		{"a wish for no host", three(1, 1, 1).with(a).on("n1", "bet"), "", ErrUnknown, []string{"bet: there is no such host", "alpha, beta, gamma"}},
		{"too little room, and no choice", three(0, 9, 9).with(a), "", admission.ErrShort, []string{"the nodes need 100 MiB of memory on a, and there are 0 MiB: 100 MiB are missing"}},
		{
			"too little room, of all", three(1, 0, 0).with(a, a, c).away("gamma", gone).auto(), "", admission.ErrShort,
			[]string{`node "n2" (36 MiB, 1 CPUs)`, "host alpha: it has 0 MiB of memory left, and 100 MiB are needed", "host beta: it has 0 MiB", "host gamma: " + gone, `node "n3"`},
		},
		{"no room in the site", three(9, 9, 0).with(Node{Within: "east"}), "", admission.ErrShort, []string{"no host that takes it in site east", "gamma"}},
		{"no host at all", Request{}.with(Node{}), "", admission.ErrShort, []string{`node "n1"`, "there is no host"}},
	} {
		p, err := Place(tt.r)
		if !errors.Is(err, tt.err) || (err == nil) != (tt.err == nil) || (p == nil) != (err != nil) {
			t.Errorf("%s: %v, want %v", tt.why, err, tt.err)
			continue
		}
		for _, s := range tt.says {
			if !strings.Contains(err.Error(), s) {
				t.Errorf("%s: %q does not say %q", tt.why, err, s)
			}
		}
		if err != nil {
			continue
		}
		var got []string
		for _, n := range tt.r.Nodes {
			got = append(got, p.Hosts[n.Name])
		}
		if s := strings.Join(got, " "); s != tt.want {
			t.Errorf("%s: on %s, want %s", tt.why, s, tt.want)
		}
	}
}

func TestMoves(t *testing.T) {
	west := func(host string) Node { return Node{Host: host, Site: "west"} }
	p, err := Place(three(1, 3, 0).with(west("alpha"), west("alpha"), west("beta"), west("delta")).on("n1", "beta").auto())
	if err != nil {
		t.Fatal(err)
	}
	want := []Move{{"n1", "alpha", "beta", ""}, {"n4", "delta", "beta", "there is no such host"}}
	if !slices.Equal(p.Moves, want) {
		t.Errorf("%v, want %v", p.Moves, want)
	}
	if s := p.Moves[1].String(); s != "n4 is on beta, and was on delta (there is no such host)" {
		t.Error(s)
	}
}

// Where there is enough room, to overcommit changes nothing; where there is not, nodes
// stay, or go to hosts that take them.
func TestOvercommit(t *testing.T) {
	r := three(0, 0, 0).with(Node{Host: "alpha", Site: "west"}, Node{Host: "gamma", Site: "east"}).away("gamma", "gone").auto()
	r.Overcommit = true
	p, err := Place(r)
	if err != nil || p.Hosts["n1"] != "alpha" || p.Hosts["n2"] != "beta" {
		t.Errorf("%+v, %v", p, err)
	}
	if _, err := Place(r.away("alpha", "gone").away("beta", "gone")); !errors.Is(err, admission.ErrShort) {
		t.Errorf("with no host: %v", err)
	}
}

// random is a request of some nodes and hosts, with little room to spare.
func random(rng *rand.Rand) Request {
	var r Request
	for i := range 1 + rng.IntN(4) {
		m := admission.Machine{Name: fmt.Sprintf("m%d", i), Free: uint64(rng.IntN(8)) * 50 * MiB, CPUs: 1 + rng.IntN(2)}
		m.Virtual = m.CPUs*admission.Ratio - rng.IntN(5)
		r.Machines = append(r.Machines, m)
	}
	for i := range 1 + rng.IntN(4) {
		h := Host{Name: fmt.Sprintf("h%d", i), Site: []string{"east", "west"}[rng.IntN(2)], Machine: r.Machines[rng.IntN(len(r.Machines))].Name}
		if rng.IntN(4) == 0 {
			h.Away = "gone"
		}
		r.Hosts = append(r.Hosts, h)
	}
	for i := range rng.IntN(6) {
		n := Node{Name: fmt.Sprintf("n%d", i), Memory: uint64(1+rng.IntN(3))*50*MiB - 36*MiB, CPUs: 1 + rng.IntN(2)}
		if at := rng.IntN(len(r.Hosts) + 1); at < len(r.Hosts) {
			n.Host, n.Site = r.Hosts[at].Name, r.Hosts[at].Site
		} else if rng.IntN(2) == 0 {
			n.Within = "west"
		}
		if rng.IntN(6) == 0 {
			if r.On == nil {
				r.On = map[string]string{}
			}
			r.On[n.Name] = r.Hosts[rng.IntN(len(r.Hosts))].Name
		}
		r.Nodes = append(r.Nodes, n)
	}
	r.Auto = rng.IntN(4) > 0
	return r
}

// valid tells whether hosts by node do what a request asks for.
func valid(r Request, hosts map[string]string) error {
	if len(hosts) != len(r.Nodes) {
		return fmt.Errorf("%d nodes are placed, of %d", len(hosts), len(r.Nodes))
	}
	var vms []admission.VM
	for _, n := range r.Nodes {
		i := slices.IndexFunc(r.Hosts, func(h Host) bool { return h.Name == hosts[n.Name] })
		if i < 0 {
			return fmt.Errorf("%s is on %q", n.Name, hosts[n.Name])
		}
		h, wished := r.Hosts[i], r.On[n.Name]
		switch {
		case h.Away != "":
			return fmt.Errorf("%s is on %s, which is away", n.Name, h.Name)
		case wished != "" && wished != h.Name:
			return fmt.Errorf("%s is on %s, and was wished to be on %s", n.Name, h.Name, wished)
		case wished == "" && !r.Auto && n.Host != "" && n.Host != h.Name:
			return fmt.Errorf("%s is on %s, and was on %s", n.Name, h.Name, n.Host)
		case wished == "" && n.Within != "" && n.Within != h.Site:
			return fmt.Errorf("%s is in site %s, and was to be in %s", n.Name, h.Site, n.Within)
		}
		vms = append(vms, admission.VM{Name: n.Name, Machine: h.Machine, Memory: n.Memory, CPUs: n.CPUs})
	}
	return admission.Check(r.Machines, vms)
}

// possible tells whether there is a placement: it tries all.
func possible(r Request, hosts map[string]string) bool {
	if len(hosts) == len(r.Nodes) {
		return valid(r, hosts) == nil
	}
	n := r.Nodes[len(hosts)]
	for _, h := range r.Hosts {
		hosts[n.Name] = h.Name
		if possible(r, hosts) {
			return true
		}
		delete(hosts, n.Name)
	}
	return false
}

// What Place answers is right, found whenever there is something to be found, the same
// for hosts in any order, and moves nothing that need not move.
func TestProperties(t *testing.T) {
	placed, refused := 0, 0
	for seed := range uint64(4_000) {
		rng := rand.New(rand.NewPCG(seed, 1))
		r := random(rng)
		p, err := Place(r)
		if can := possible(r, map[string]string{}); can != (err == nil) {
			t.Fatalf("seed %d: %v, and it can be done: %v\n%+v", seed, err, can, r)
		}
		if err != nil {
			refused++
			if !errors.Is(err, admission.ErrShort) && !errors.Is(err, ErrAway) {
				t.Fatalf("seed %d: %v", seed, err)
			}
			continue
		}
		placed++
		if err := valid(r, p.Hosts); err != nil {
			t.Fatalf("seed %d: %v\n%+v", seed, err, r)
		}
		shuffled := r
		shuffled.Hosts, shuffled.Machines = slices.Clone(r.Hosts), slices.Clone(r.Machines)
		rng.Shuffle(len(r.Hosts), func(i, j int) {
			shuffled.Hosts[i], shuffled.Hosts[j] = shuffled.Hosts[j], shuffled.Hosts[i]
		})
		slices.Reverse(shuffled.Machines)
		if again, err := Place(shuffled); err != nil || !maps.Equal(again.Hosts, p.Hosts) {
			t.Fatalf("seed %d: %v, and in another order %v, %v", seed, p.Hosts, again, err)
		}
		stay := map[string]string{}
		for _, n := range r.Nodes {
			if stay[n.Name] = n.Host; r.On[n.Name] != "" {
				stay[n.Name] = r.On[n.Name]
			}
		}
		if valid(r, stay) == nil && !maps.Equal(stay, p.Hosts) {
			t.Fatalf("seed %d: all could stay on %v, and are on %v", seed, stay, p.Hosts)
		}
		for _, n := range r.Nodes {
			moved := slices.ContainsFunc(p.Moves, func(m Move) bool { return m.Node == n.Name && m.From == n.Host && m.To == p.Hosts[n.Name] })
			if moved != (n.Host != "" && n.Host != p.Hosts[n.Name]) {
				t.Fatalf("seed %d: of %s, moves %v, and hosts %v", seed, n.Name, p.Moves, p.Hosts)
			}
		}
	}
	if placed < 500 || refused < 500 {
		t.Errorf("%d were placed, %d refused: the requests are too much alike", placed, refused)
	}
}

// Nodes that may be anywhere are spread evenly over hosts that are alike.
func TestSpread(t *testing.T) {
	for hosts := 1; hosts < 6; hosts++ {
		for nodes := range 12 {
			var r Request
			for i := range hosts {
				name := fmt.Sprintf("h%d", i)
				r.Hosts = append(r.Hosts, Host{Name: name, Site: "here", Machine: name})
				r.Machines = append(r.Machines, machine(name, 12))
			}
			r = r.with(make([]Node, nodes)...)
			p, err := Place(r)
			if err != nil {
				t.Fatal(err)
			}
			count := map[string]int{}
			for _, h := range p.Hosts {
				count[h]++
			}
			for _, h := range r.Hosts {
				if n := count[h.Name]; n < nodes/hosts || n > (nodes+hosts-1)/hosts {
					t.Errorf("%d nodes on %d hosts: %v", nodes, hosts, count)
				}
			}
		}
	}
}

// What is too large to be searched ends nevertheless.
func TestBounds(t *testing.T) {
	var r Request
	for i := range 40 {
		name := fmt.Sprintf("h%d", i)
		r.Hosts = append(r.Hosts, Host{Name: name, Machine: name})
		r.Machines = append(r.Machines, machine(name, 2))
	}
	r = r.with(make([]Node, 81)...)
	if _, err := Place(r); !errors.Is(err, admission.ErrShort) {
		t.Error(err)
	}
}
