// Package placement decides which host each node of a slice comes up on: arithmetic and
// a search over what is given to it. It measures nothing, and the same request has the
// same answer.
//
// A node that may go anywhere stays where it was, if that host takes it and has room;
// else it goes to another host of the same site, or of any. Of several, the one that has
// the fewest nodes of the slice takes it, then the one with the most memory left, in GiB. If that
// ends with a node that nothing has room for, other ways are tried, within bounds: the
// largest nodes come first, those that were on a host that takes them before all others.
package placement

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"violin/internal/admission"
)

// What is wrong with a request, in its error's chain; [admission.ErrShort] is another.
var (
	ErrUnknown = errors.New("a node or a host that there is none of")
	ErrAway    = errors.New("it takes nothing")
)

// maxSteps bounds the search: so many nodes are put on a host on trial.
const maxSteps = 20_000

// A Node is what is to come up.
type Node struct {
	Name   string
	Host   string // where it was; empty: nowhere yet
	Site   string // that Host is in
	Within string // the site that it must be in; empty: any
	Memory uint64 // of the guest, in bytes
	CPUs   int
}

// A Host is where nodes can come up.
type Host struct {
	Name, Site string
	Machine    string // that it is, or is on: one of [Request.Machines]
	// Away says why the host takes nothing; empty: it does.
	Away string
}

// A Request is all that there is to know.
type Request struct {
	Nodes    []Node
	Hosts    []Host
	Machines []admission.Machine
	// On are hosts by node: what is wished for.
	On map[string]string
	// Auto lets nodes that were on a host, and that nothing is wished for, go elsewhere;
	// without, such a node stays.
	Auto bool
	// Overcommit goes ahead where there is too little room. Where there is enough, it
	// changes nothing.
	Overcommit bool
}

// A Move is a node that comes up on another host than it was on.
type Move struct {
	Node, From, To string
	Why            string // it does not stay; empty if that was wished for
}

// String implements [fmt.Stringer].
func (m Move) String() string {
	s := fmt.Sprintf("%s is on %s, and was on %s", m.Node, m.To, m.From)
	if m.Why != "" {
		s += " (" + m.Why + ")"
	}
	return s
}

// A Placement says where the nodes go.
type Placement struct {
	Hosts map[string]string // by node
	Moves []Move            // in the order of the nodes
}

// Place places nodes. If it can't, the error says so node by node, and of each host why
// it is not for that node.
func Place(r Request) (*Placement, error) {
	w, err := newWorld(r)
	if err != nil {
		return nil, err
	}
	if w.settled() {
		// Nothing is to be chosen: what is short is told of each host as a whole.
		for _, n := range w.order {
			w.put(n, n.among[0])
		}
		if err := w.check(); err != nil && !r.Overcommit {
			return nil, err
		}
		return w.placement(), nil
	}
	if w.search(0) {
		return w.placement(), nil
	}
	if r.Overcommit && !slices.ContainsFunc(w.nodes, func(n *node) bool { return len(n.among) == 0 }) {
		w.clear()
		for _, n := range w.order {
			w.put(n, w.preferred(n)[0])
		}
		return w.placement(), nil
	}
	return nil, w.shortfall()
}

// world is a request, and how far its nodes are placed.
type world struct {
	r        Request
	hosts    []*host
	machines map[string]*admission.Machine
	nodes    []*node // as requested
	order    []*node // in which they are placed
	steps    int
}

type host struct {
	Host
	machine *admission.Machine
	nodes   int // of the slice, that are on it
}

type node struct {
	Node
	fixed bool    // it has no choice
	home  *host   // where it was; nil: nowhere, or on a host that there is none of
	among []*host // that it may be on, by name
	at    *host   // nil while it is not placed
}

func newWorld(r Request) (*world, error) {
	w := &world{r: r, machines: map[string]*admission.Machine{}}
	for _, m := range r.Machines {
		w.machines[m.Name] = &m
	}
	for _, h := range r.Hosts {
		w.hosts = append(w.hosts, &host{Host: h})
	}
	slices.SortFunc(w.hosts, func(a, b *host) int { return cmp.Compare(a.Name, b.Name) })
	for _, h := range w.hosts {
		if h.machine = w.machines[h.Machine]; h.machine == nil && h.Away == "" {
			return nil, fmt.Errorf("host %s: nothing is known of its machine %q", h.Name, h.Machine)
		}
	}
	for _, n := range r.Nodes {
		w.nodes = append(w.nodes, &node{Node: n, home: w.host(n.Host)})
	}
	if err := w.wishes(); err != nil {
		return nil, err
	}
	var errs []error
	for _, n := range w.nodes {
		if err := w.choices(n); err != nil {
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	w.order = slices.Clone(w.nodes)
	class := func(n *node) int {
		switch {
		case n.fixed:
			return 0
		case n.home != nil && n.home.Away == "":
			return 1
		}
		return 2
	}
	slices.SortStableFunc(w.order, func(a, b *node) int {
		return cmp.Or(cmp.Compare(class(a), class(b)), cmp.Compare(b.Memory, a.Memory), cmp.Compare(b.CPUs, a.CPUs))
	})
	return w, nil
}

func (w *world) host(name string) *host {
	i := slices.IndexFunc(w.hosts, func(h *host) bool { return h.Name == name })
	if i < 0 {
		return nil
	}
	return w.hosts[i]
}

// wishes refuses those that are about nothing.
func (w *world) wishes() error {
	var hosts, unknown []string
	for _, h := range w.hosts {
		hosts = append(hosts, h.Name)
	}
	for name, on := range w.r.On {
		if !slices.ContainsFunc(w.nodes, func(n *node) bool { return n.Name == name }) {
			unknown = append(unknown, fmt.Sprintf("node %q on %s: there is no such node", name, on))
		} else if w.host(on) == nil {
			unknown = append(unknown, fmt.Sprintf("node %q on %s: there is no such host; there are %s", name, on, strings.Join(hosts, ", ")))
		}
	}
	if len(unknown) == 0 {
		return nil
	}
	slices.Sort(unknown)
	return fmt.Errorf("%w: %s", ErrUnknown, strings.Join(unknown, "; "))
}

// choices are the hosts that a node may be on.
func (w *world) choices(n *node) error {
	only := w.r.On[n.Name]
	if only == "" && !w.r.Auto {
		only = n.Host
	}
	if only == "" {
		for _, h := range w.hosts {
			if h.Away == "" && (n.Within == "" || n.Within == h.Site) {
				n.among = append(n.among, h)
			}
		}
		return nil
	}
	h := w.host(only)
	switch {
	case h == nil:
		return fmt.Errorf("node %q on host %s: %w: there is no such host", n.Name, only, ErrAway)
	case h.Away != "":
		return fmt.Errorf("node %q on host %s: %w: %s", n.Name, only, ErrAway, h.Away)
	}
	n.fixed, n.among = true, []*host{h}
	return nil
}

// settled tells whether no node has a choice.
func (w *world) settled() bool {
	return !slices.ContainsFunc(w.nodes, func(n *node) bool { return !n.fixed })
}

func (n *node) vm(h *host) admission.VM {
	return admission.VM{Name: n.Name, Machine: h.Machine, Memory: n.Memory, CPUs: n.CPUs}
}

// put puts a node on a host, be there room or not.
func (w *world) put(n *node, h *host) {
	n.at = h
	h.nodes++
	h.machine.Take(n.vm(h))
}

// lift undoes it.
func (w *world) lift(n *node) {
	n.at.machine.Promised -= n.Memory + admission.Overhead
	n.at.machine.Virtual -= n.CPUs
	n.at.nodes--
	n.at = nil
}

func (w *world) clear() {
	for _, n := range w.nodes {
		if n.at != nil {
			w.lift(n)
		}
	}
}

// check holds the nodes' hosts against what their machines had at first.
func (w *world) check() error {
	var vms []admission.VM
	for _, n := range w.nodes {
		vms = append(vms, n.vm(n.at))
	}
	return admission.Check(w.r.Machines, vms)
}

// step is by how much room must differ to count, in bytes: what a machine has to spare
// changes all the time.
const step = 1 << 30

// preferred are the hosts that a node may be on, the best first.
func (w *world) preferred(n *node) []*host {
	misses := func(b bool) int {
		if b {
			return 0
		}
		return 1
	}
	order := slices.Clone(n.among)
	slices.SortStableFunc(order, func(a, b *host) int {
		return cmp.Or(
			cmp.Compare(misses(a == n.home), misses(b == n.home)),
			cmp.Compare(misses(a.Site == n.Site), misses(b.Site == n.Site)),
			cmp.Compare(a.nodes, b.nodes),
			cmp.Compare(b.machine.Room()/step, a.machine.Room()/step),
		)
	})
	return order
}

// search places the nodes from one on, and tells whether it could.
func (w *world) search(from int) bool {
	if from == len(w.order) {
		return true
	}
	n := w.order[from]
	for _, h := range w.preferred(n) {
		if h.machine.Lacks(n.vm(h)) != "" {
			continue
		}
		if w.steps++; w.steps > maxSteps {
			return false
		}
		w.put(n, h)
		if w.search(from + 1) {
			return true
		}
		w.lift(n)
	}
	return false
}

// shortfall says what is in the way of those nodes that find no room when the others,
// in their order, have taken what they prefer. There is one: the search began like that.
func (w *world) shortfall() error {
	w.clear()
	var short []string
	for _, n := range w.order {
		var why []string
		for _, h := range w.preferred(n) {
			lacks := h.machine.Lacks(n.vm(h))
			if lacks == "" {
				w.put(n, h)
				break
			}
			why = append(why, "host "+h.Name+": "+lacks)
		}
		if n.at != nil {
			continue
		}
		if !n.fixed {
			for _, h := range w.hosts {
				switch {
				case n.Within != "" && n.Within != h.Site:
				case h.Away != "":
					why = append(why, "host "+h.Name+": "+h.Away)
				}
			}
		}
		slices.Sort(why)
		where := "there is no host that takes it"
		if n.Within != "" {
			where += " in site " + n.Within
		}
		if len(why) > 0 {
			where += ": " + strings.Join(why, ", ")
		}
		short = append(short, fmt.Sprintf("node %q (%s, %d CPUs): %s", n.Name, admission.Size(n.Memory), n.CPUs, where))
	}
	return fmt.Errorf("%w: %s", admission.ErrShort, strings.Join(short, "; "))
}

func (w *world) placement() *Placement {
	p := &Placement{Hosts: map[string]string{}}
	for _, n := range w.nodes {
		p.Hosts[n.Name] = n.at.Name
		if n.Host == "" || n.at.Name == n.Host {
			continue
		}
		m := Move{Node: n.Name, From: n.Host, To: n.at.Name}
		switch {
		case w.r.On[n.Name] != "":
		case n.home == nil:
			m.Why = "there is no such host"
		case n.home.Away != "":
			m.Why = n.home.Away
		default:
			m.Why = "it has too little room"
		}
		p.Moves = append(p.Moves, m)
	}
	return p
}
