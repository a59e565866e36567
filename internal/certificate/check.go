package certificate

import (
	"cmp"
	"fmt"
	"maps"
	"slices"

	"violin/internal/topology"
)

// Subject is the snapshot that a certificate is to be about: what its sealed
// document says and what the store holds.
type Subject struct {
	Certificate Hash // the fingerprint in the document
	Bytes       []byte

	Slice, ID, Parent, Mode string
	Epoch                   uint8 // that the cut began in
	Topology                []byte
	Nodes                   []SubjectNode
	Lost, Held, Recorded    int64 // the document's totals

	Channel      Blob
	ChannelState []byte // the file
}

// SubjectNode is what the document says of a node.
type SubjectNode struct {
	Name, Host     string
	CutAt          int64 // nanoseconds since 1970
	Device, Memory Blob
	Disks          []Disk
	Held, Recorded int64
}

// Report is what a check found, in plain words.
type Report struct {
	Violations []string // empty if the certificate holds
	Proves     []string // what was shown; nil if it does not hold
	Cannot     []string // what no certificate shows
	Notes      []string // no violations, but worth knowing
}

// Holds tells whether there were no violations.
func (r *Report) Holds() bool { return len(r.Violations) == 0 }

// order is that of a node's steps, each with what would be wrong if it were not
// done, or not after the one before it.
var order = []struct{ name, reason string }{
	{"close", "a frame could reach the node unseen by gate and record"},
	{"settle", "a frame that had passed the gate could be in no memory and no record"},
	{"stop", "the node could receive or send while its state was taken"},
	{"flush", "a frame that the node sent before its cut could be stamped with the new epoch"},
	{"flip", "frames could be stamped with the wrong epoch: sent in the snapshot and yet new, or old and never sent"},
	{"capture", "the state could be of another epoch than the frames"},
	{"resume", "the node could send before its epoch changed or its state was taken"},
	{"open", "frames could overtake those that waited"},
}

// Check judges a snapshot by its certificate. It needs nothing else: no server,
// no host, no clock.
func Check(s *Subject) *Report {
	k := &checker{s: s, report: &Report{Cannot: cannot()}}
	if got := Sum(s.Bytes); got != s.Certificate {
		k.bad("the certificate was altered: its fingerprint is %s, and the snapshot's document names %s", got, s.Certificate)
	}
	c, err := Decode(s.Bytes)
	if err != nil {
		k.bad("the certificate cannot be read: %v", err)
		return k.report
	}
	k.c = c
	if k.topo, err = topology.Parse("topology", s.Topology); err != nil {
		k.bad("the snapshot's topology cannot be read: %v", err)
		return k.report
	}
	k.binding()
	k.members()
	for i := range c.Nodes {
		k.node(&c.Nodes[i])
	}
	k.hosts()
	k.rounds()
	k.channel()
	if k.report.Holds() {
		k.report.Proves = k.proves()
	}
	return k.report
}

type checker struct {
	s      *Subject
	c      *Certificate
	topo   *topology.Topology
	report *Report
	lost   uint64
}

func (k *checker) bad(format string, args ...any) {
	k.report.Violations = append(k.report.Violations, fmt.Sprintf(format, args...))
}

func (k *checker) note(format string, args ...any) {
	k.report.Notes = append(k.report.Notes, fmt.Sprintf(format, args...))
}

func must[T comparable](k *checker, what string, certificate, snapshot T) {
	if certificate != snapshot {
		k.bad("%s: the certificate says %v, the snapshot %v", what, certificate, snapshot)
	}
}

// older tells whether a frame of epoch e is older than a node in epoch f:
// RFC 1982 with eight bits.
func older(e, f uint8) bool { return e != f && f-e < 128 }

// binding checks that the certificate is of this snapshot and no other.
func (k *checker) binding() {
	c, s := k.c, k.s
	must(k, "slice", c.Slice, s.Slice)
	must(k, "snapshot", c.Snapshot, s.ID)
	must(k, "parent", c.Parent, s.Parent)
	must(k, "mode", c.Mode, s.Mode)
	must(k, "epoch before the cut", c.From, s.Epoch)
	must(k, "topology", c.Topology, Sum(s.Topology))
	must(k, "slice of the topology", k.topo.Slice, s.Slice)
	must(k, "channel state", c.Channel.Blob, s.Channel)
	if c.To != c.From+1 {
		k.bad("the cut led from epoch %d to epoch %d, which is not the next", c.From, c.To)
	}
	if len(c.Nodes) != len(s.Nodes) {
		k.bad("the certificate is of %d nodes, the snapshot has %d", len(c.Nodes), len(s.Nodes))
	}
	of := map[string]*Node{}
	for i := range c.Nodes {
		of[c.Nodes[i].Name] = &c.Nodes[i]
	}
	var held, recorded int64
	for _, n := range s.Nodes {
		e := of[n.Name]
		if e == nil {
			k.bad("node %s is in the snapshot and not in the certificate", n.Name)
			continue
		}
		must(k, "host of node "+n.Name, e.Host, n.Host)
		must(k, "cut instant of node "+n.Name, e.CutAt, n.CutAt)
		must(k, "device state of node "+n.Name, e.Device, n.Device)
		must(k, "memory of node "+n.Name, e.Memory, n.Memory)
		must(k, "number of disks of node "+n.Name, len(e.Disks), len(n.Disks))
		for i, d := range n.Disks[:min(len(n.Disks), len(e.Disks))] {
			must(k, "disk "+d.Name+" of node "+n.Name, e.Disks[i], d)
		}
		must(k, "frames held for node "+n.Name, int64(e.Gate.Held), n.Held)
		must(k, "frames recorded for node "+n.Name, int64(len(e.Recorded)), n.Recorded)
		held += int64(e.Gate.Held)
		recorded += int64(len(e.Recorded))
	}
	must(k, "frames held in all", held, s.Held)
	must(k, "frames recorded in all", recorded, s.Recorded)
}

// members checks that every node of the slice is there, once, where it belongs.
func (k *checker) members() {
	seen := map[string]bool{}
	for i, n := range k.c.Nodes {
		if i > 0 && k.c.Nodes[i-1].Name >= n.Name {
			k.bad("node %s is not in its place in the list of nodes, or is there twice", n.Name)
		}
		seen[n.Name] = true
		t := k.topo.Node(n.Name)
		if t == nil {
			k.bad("node %s is none of the slice's", n.Name)
			continue
		}
		must(k, "host of node "+n.Name+" in the topology", n.Host, t.Host)
	}
	for _, t := range k.topo.Nodes {
		if !seen[t.Name] {
			k.bad("node %s of the slice is missing: its part of the state is not in the snapshot", t.Name)
		}
	}
}

// node checks one node's steps and what its gate did.
func (k *checker) node(n *Node) {
	at := map[string]int{}
	for i, s := range n.Steps {
		if _, ok := at[s.Name]; ok {
			k.bad("node %s: step %s was done twice", n.Name, s.Name)
		}
		at[s.Name] = i
		if s.Began < 0 || s.Ended < s.Began {
			k.bad("node %s: step %s ended before it began", n.Name, s.Name)
		}
		want := [2]uint8{s.From, s.From}
		if s.Name == "flip" {
			want = [2]uint8{k.c.From, k.c.To}
		}
		if [2]uint8{s.From, s.To} != want {
			k.bad("node %s: step %s took it from epoch %d to %d", n.Name, s.Name, s.From, s.To)
		}
	}
	var before *Step
	flipped := false
	for i, o := range order {
		j, ok := at[o.name]
		if !ok {
			k.bad("node %s: step %s was not done: %s", n.Name, o.name, o.reason)
			before = nil
			continue
		}
		s := &n.Steps[j]
		if before != nil && s.Began < before.Ended {
			k.bad("node %s: %s began before %s had ended: %s", n.Name, s.Name, before.Name, o.reason)
		}
		epoch := k.c.From
		if flipped {
			epoch = k.c.To
		}
		if o.name != "flip" && s.From != epoch {
			k.bad("node %s: it was in epoch %d at step %s, and should have been in %d", n.Name, s.From, s.Name, epoch)
		}
		flipped = flipped || o.name == "flip"
		if j != i {
			k.bad("node %s: step %s was number %d of its steps, and should be %d", n.Name, o.name, j+1, i+1)
		}
		before = s
	}
	if len(n.Steps) > len(order) {
		k.bad("node %s: %d steps, there are %d", n.Name, len(n.Steps), len(order))
	}

	g := n.Gate
	if g.Waiting != 0 {
		k.bad("node %s: %d held frames were not given to it", n.Name, g.Waiting)
	}
	if g.Failed != 0 {
		k.bad("node %s: %d frames were lost on their way from its gate to it", n.Name, g.Failed)
	}
	if given := g.Handed + g.Taken; given != g.Delivered+g.Waiting+g.Failed {
		k.bad("node %s: its gate was given %d frames, and accounts for %d", n.Name, given, g.Delivered+g.Waiting+g.Failed)
	}
	if g.Held > g.Handed+g.Taken || g.Held < g.Taken {
		k.bad("node %s: its gate held %d frames of %d, %d of them taken back", n.Name, g.Held, g.Handed+g.Taken, g.Taken)
	}
	if g.Newer != 0 {
		k.bad("node %s: it was given %d frames from the future: newer than itself", n.Name, g.Newer)
	}
	if g.Older > g.Delivered {
		k.bad("node %s: %d older frames of %d that its gate delivered", n.Name, g.Older, g.Delivered)
	}
	if want := g.Copies + g.Older; g.Recorded != want || uint64(len(n.Recorded)) != want {
		k.bad("node %s: %d frames were in flight to it at its cut, %d were recorded as its gate counts, and %d are in the record",
			n.Name, want, g.Recorded, len(n.Recorded))
	}
	if g.Taken != 0 {
		k.note("node %s did not read what came to it: %d frames were taken back out of its devices into the channel state, and each device may have dropped one more when the node stood still", n.Name, g.Taken)
		if g.Older < g.Taken {
			k.bad("node %s: %d frames were taken back out of its devices, and its gate delivered %d older ones after the flip", n.Name, g.Taken, g.Older)
		}
	}
	if g.Late != 0 {
		k.note("node %s got %d frames of an earlier epoch before its cut: they are in its memory, and were lost to an earlier snapshot", n.Name, g.Late)
	}
	interfaces := 0
	if t := k.topo.Node(n.Name); t != nil {
		interfaces = len(t.Interfaces)
	}
	for i, f := range n.Recorded {
		if !older(f.Epoch, k.c.To) {
			k.bad("node %s: recorded frame %d is of epoch %d, which is not older than the node's %d", n.Name, i, f.Epoch, k.c.To)
		}
		if f.At < 0 {
			k.bad("node %s: recorded frame %d came before the node's cut", n.Name, i)
		}
		if f.Interface < 0 || f.Interface >= interfaces {
			k.bad("node %s: recorded frame %d is for interface %d of %d", n.Name, i, f.Interface, interfaces)
		}
	}
}

// hosts checks that nothing was lost between switches and gates.
func (k *checker) hosts() {
	var names []string
	for i, h := range k.c.Hosts {
		if i > 0 && k.c.Hosts[i-1].Name >= h.Name {
			k.bad("host %s is not in its place in the list of hosts, or is there twice", h.Name)
		}
		names = append(names, h.Name)
		// A switch may have counted too few: the flip replaces the entry of the closed
		// gate, and with it what that had counted.
		if h.Handed > h.Seen {
			k.bad("host %s: its switch handed %d frames to its gates, and %d came", h.Name, h.Handed, h.Seen)
		}
		var given uint64
		for _, n := range k.c.Nodes {
			if n.Host == h.Name {
				given += n.Gate.Handed
			}
		}
		if given > h.Seen {
			k.bad("host %s: its gates were given %d frames, and %d came from its switch", h.Name, given, h.Seen)
		}
	}
	if want := k.hostNames(); !slices.Equal(names, want) {
		k.bad("the hosts are %v, those of the slice's nodes %v", names, want)
	}
}

func (k *checker) hostNames() []string {
	set := map[string]bool{}
	for _, n := range k.topo.Nodes {
		set[n.Host] = true
	}
	return slices.Sorted(maps.Keys(set))
}

// way is a channel.
type way struct{ from, to, network string }

func (w way) String() string {
	if w.from == w.to {
		return fmt.Sprintf("copies of host %s on network %s", w.from, w.network)
	}
	return fmt.Sprintf("%s to %s on network %s", w.from, w.to, w.network)
}

// rounds checks that the channels of the old epoch were empty when they were
// taken for empty.
func (k *checker) rounds() {
	rs := k.c.Rounds
	if len(rs) < 2 || len(rs) > 3 {
		k.bad("%d rounds of counters, want the last two and the first that read the same: one reading is not made at one instant, and proves nothing", len(rs))
		return
	}
	var cut int64
	for _, n := range k.c.Nodes {
		cut = max(cut, n.Heard)
	}
	hosts := k.hostNames()
	read := map[string]int64{}
	var first, last map[way][2]uint64
	for i, r := range rs {
		if r.Ended < r.Asked {
			k.bad("round %d of counters ended before it was asked for", r.Number)
		}
		if r.Asked < cut {
			k.bad("round %d of counters was asked for before every node was known to have cut: frames of the old epoch could still be sent", r.Number)
		}
		if i > 0 && r.Asked < rs[i-1].Ended {
			k.bad("round %d of counters was asked for before round %d had ended", r.Number, rs[i-1].Number)
		}
		if i > 0 && r.Number <= rs[i-1].Number || i == len(rs)-1 && r.Number != rs[i-1].Number+1 {
			k.bad("round %d of counters follows on round %d", r.Number, rs[i-1].Number)
		}
		var names []string
		for _, a := range r.Answers {
			names = append(names, a.Host)
			for _, n := range k.c.Nodes {
				if n.Host == a.Host && len(n.Steps) > 0 && a.Read < n.Steps[len(n.Steps)-1].Ended {
					k.bad("host %s read its counters for round %d before its node %s had cut", a.Host, r.Number, n.Name)
				}
			}
			if a.Read < read[a.Host] {
				k.bad("host %s read its counters for round %d before it did for the round before", a.Host, r.Number)
			}
			read[a.Host] = a.Read
		}
		if !slices.Equal(names, hosts) {
			k.bad("round %d of counters was answered by %v, and the slice is on %v", r.Number, names, hosts)
		}
		last = k.sum(r)
		if i == 0 {
			first = last
		}
		if !maps.Equal(first, last) {
			k.bad("rounds %d and %d of counters differ: frames were still under way", rs[0].Number, r.Number)
		}
	}
	k.balance(last)
	k.copies(last)
	if k.lost > 0 && rs[len(rs)-1].Ended-rs[0].Ended < k.c.QuietNS {
		k.bad("%d frames were taken for lost after less than the silence of %d ns: they could still arrive", k.lost, k.c.QuietNS)
	}
}

// sum adds a round's counts up by channel.
func (k *checker) sum(r Round) map[way][2]uint64 {
	sums := map[way][2]uint64{}
	hosts := k.hostNames()
	for _, a := range r.Answers {
		for _, n := range a.Counts {
			w := way{n.From, n.To, n.Network}
			if k.topo.Network(n.Network) == nil || !slices.Contains(hosts, n.From) || !slices.Contains(hosts, n.To) {
				k.bad("round %d: host %s counted %s, which is no channel of the slice", r.Number, a.Host, w)
			}
			if n.Sent > 0 && a.Host != n.From || n.Received > 0 && a.Host != n.To {
				k.bad("round %d: host %s counted %s, which it cannot see", r.Number, a.Host, w)
			}
			s := sums[w]
			sums[w] = [2]uint64{s[0] + n.Sent, s[1] + n.Received}
		}
	}
	return sums
}

// balance checks that all that was sent was received or is declared lost.
func (k *checker) balance(sums map[way][2]uint64) {
	lost := map[way]uint64{}
	for _, l := range k.c.Lost {
		w := way{l.From, l.To, l.Network}
		if _, ok := lost[w]; ok || l.Frames == 0 {
			k.bad("%s: declared lost twice, or none", w)
		}
		lost[w] = l.Frames
		k.lost += l.Frames
		if _, ok := sums[w]; !ok {
			k.bad("%s: %d frames are declared lost and none was counted", w, l.Frames)
		}
	}
	ways := slices.SortedFunc(maps.Keys(sums), func(a, b way) int {
		return cmp.Or(cmp.Compare(a.from, b.from), cmp.Compare(a.to, b.to), cmp.Compare(a.network, b.network))
	})
	for _, w := range ways {
		n := sums[w]
		switch {
		case n[0] == n[1]+lost[w] && (w.from != w.to || lost[w] == 0):
		case w.from == w.to:
			k.bad("%s: %d were made for the record, and %d came: the channel state is not whole", w, n[0], n[1])
		default:
			k.bad("%s: %d frames were sent in epoch %d, %d received and %d declared lost: the channel was not empty, or brought what was not sent",
				w, n[0], k.c.From, n[1], lost[w])
		}
	}
	must(k, "frames lost by the network", int64(k.lost), k.s.Lost)
	if k.lost > 0 {
		k.note("the network had lost %d frames of epoch %d, before the cut or in it: they are neither received nor in flight in the snapshot", k.lost, k.c.From)
	}
}

// copies checks that the record has what the switches copied for it.
func (k *checker) copies(sums map[way][2]uint64) {
	made := map[string]uint64{}
	for w, n := range sums {
		if w.from == w.to {
			made[w.from] += n[0]
		}
	}
	for _, host := range k.hostNames() {
		var seen uint64
		for _, n := range k.c.Nodes {
			if n.Host == host {
				seen += n.Gate.Copies
			}
		}
		switch {
		case seen < made[host]:
			k.bad("host %s: its switch copied %d frames for the record, and its gates have %d", host, made[host], seen)
		case seen > made[host] && k.lost == 0:
			k.bad("host %s: its gates have %d copies for the record, and its switch made %d", host, seen, made[host])
		}
	}
}

// blobOf is the reference that the store gives to b: the hash of b, or, above one
// chunk, that of its chunks' hashes.
func blobOf(b []byte) Blob {
	const chunk = 1 << 20
	if len(b) <= chunk {
		return Blob{Hash: Sum(b), Size: int64(len(b))}
	}
	var list []byte
	for part := range slices.Chunk(b, chunk) {
		h := Sum(part)
		list = append(list, h[:]...)
	}
	return Blob{Hash: Sum(list), Size: int64(len(b))}
}

// channel checks that the file of the recorded frames is what the nodes recorded.
func (k *checker) channel() {
	if got := blobOf(k.s.ChannelState); got != k.c.Channel.Blob {
		k.bad("the channel state was altered: it has %d bytes and hash %s, and should have %d and %s", got.Size, got.Hash, k.c.Channel.Blob.Size, k.c.Channel.Blob.Hash)
	}
	about, receivers, frames, err := readChannel(k.s.ChannelState)
	if err != nil {
		k.bad("the channel state cannot be read: %v", err)
		return
	}
	must(k, "slice of the channel state", k.c.Slice, about.Slice)
	must(k, "snapshot of the channel state", k.c.Snapshot, about.Snapshot)
	must(k, "frames that the channel state says it holds", k.c.Channel.Frames, about.Frames)
	must(k, "frames in the channel state", k.c.Channel.Frames, len(frames))
	cuts := map[string]int64{}
	left := map[string][]Frame{}
	for _, n := range k.c.Nodes {
		cuts[n.Name] = n.CutAt
		left[n.Name] = slices.Clone(n.Recorded)
		slices.SortStableFunc(left[n.Name], func(a, b Frame) int { return cmp.Compare(a.At, b.At) })
	}
	for _, r := range receivers {
		t := k.topo.Node(r.Node)
		if t == nil || r.Interface < 0 || r.Interface >= len(t.Interfaces) || t.Interfaces[r.Interface].Network != r.Network {
			if r.Node != "" {
				k.bad("the channel state has a receiver %s:%d on network %s, which the slice has not", r.Node, r.Interface, r.Network)
			}
			continue
		}
		must(k, "epoch of receiver "+r.Node, k.c.To, r.Epoch)
		must(k, "cut of receiver "+r.Node, cuts[r.Node], r.Cut.UnixNano())
	}
	for i, f := range frames {
		e := Frame{Interface: f.receiver.Interface, Epoch: f.epoch, At: f.at, Size: len(f.data), Hash: Sum(f.data)}
		if to := left[f.receiver.Node]; len(to) == 0 || to[0] != e {
			k.bad("frame %d of the channel state, to %s:%d, is not the one that the node recorded", i, f.receiver.Node, f.receiver.Interface)
			return
		}
		left[f.receiver.Node] = left[f.receiver.Node][1:]
	}
	for _, n := range k.c.Nodes {
		if missing := len(left[n.Name]); missing > 0 {
			k.bad("node %s: %d frames that it recorded are not in the channel state", n.Name, missing)
		}
	}
}

func (k *checker) proves() []string {
	c := k.c
	frames := 0
	for _, n := range c.Nodes {
		frames += len(n.Recorded)
	}
	return []string{
		fmt.Sprintf("The snapshot is that of this certificate: the topology, the memory and devices of all %d nodes of slice %s, and the channel state.", len(c.Nodes), c.Slice),
		fmt.Sprintf("Every node went from epoch %d to %d once, while it stood still, behind a closed gate, before its state was taken.", c.From, c.To),
		"No gate gave a node a frame that was newer than the node: nothing that a gate let pass comes from the future.",
		fmt.Sprintf("After every node had cut, two readings of the counters agreed that every frame of epoch %d had been received%s: nothing was in flight any more.",
			c.From, lossWords(k.lost)),
		fmt.Sprintf("Every frame in flight to a node at its cut that switch or gate saw is in the channel state, once: %d in all, each older than its receiver, none from before its receiver's cut.", frames),
		"Nothing that a gate held was dropped: all of it was given to its node.",
	}
}

func lossWords(n uint64) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprintf(", but for %d that the network lost", n)
}

func cannot() []string {
	return []string{
		"That the hosts told the truth: the evidence is their own word, and whoever can write to the store can write a whole new certificate. Its fingerprint, noted when the snapshot was taken, shows that (--certificate).",
		"That the switches did what their flow tables say, and counted what they did.",
		"That the queues between guest and switch were empty when they looked so, and that the hypervisor's state is the guest's.",
		"That a frame taken for lost does not arrive later than the time of silence.",
		"That frames and memory mean something to the programs in the nodes.",
	}
}
