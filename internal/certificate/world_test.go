package certificate_test

import (
	"bytes"
	"slices"
	"testing"
	"time"

	"violin/internal/certificate"
	"violin/internal/cut"
	"violin/internal/frames"
)

// The world of these tests: nodes a and b on hosts ha and hb, one network, and the
// protocol's own coordinator and gates. Three frames are under way in the cut:
//
//	1  a to b, before a's cut; reaches b while b's gate is closed: held, then recorded
//	2  a to b, after a's cut; reaches b before b's: held, and of the future
//	3  b to a, before b's cut; reaches a after a's: delivered by the switch, and copied
//	4  b to a, as 3, but the network loses it if told so
//
// A mutant makes one mistake on the way, and the evidence is what its hosts saw.
const source = `
version: 1
slice: pair
sites:
  here: {hosts: [ha, hb]}
networks:
  lan: {subnet: 10.20.0.0/24}
nodes:
  a: {host: ha, image: mpi, memory: 128MiB, interfaces: [{network: lan, address: 10.20.0.1/24}]}
  b: {host: hb, image: mpi, memory: 128MiB, interfaces: [{network: lan, address: 10.20.0.2/24}]}
`

const (
	from  = cut.Epoch(255) // so that it wraps
	to    = cut.Epoch(0)
	quiet = time.Second
)

type world struct {
	t      *testing.T
	mutant string
	loses  bool
	now    time.Duration
	coord  *cut.Coordinator
	nodes  map[string]*node
	sent   map[string]uint64 // of the old epoch, by sending host
	got    map[string]uint64 // and by receiving host
	copied map[string]uint64
	rounds []certificate.Round
	lost   []cut.ChannelLoss
	sealed bool
}

type node struct {
	certificate.Node
	gate    *cut.Gate[[]byte]
	flipped bool
	cutAt   time.Time
	cut     time.Duration
	data    [][]byte
	seen    uint64   // copies
	unread  [][]byte // in its device
}

func take(t *testing.T, mutant string, loses bool) *certificate.Subject {
	t.Helper()
	w := &world{
		t: t, mutant: mutant, loses: loses, nodes: map[string]*node{}, sent: map[string]uint64{}, got: map[string]uint64{}, copied: map[string]uint64{},
		coord: cut.NewCoordinator(cut.Config{Epoch: from, Hosts: map[string][]string{"ha": {"a"}, "hb": {"b"}},
			Timing: cut.Timing{Quiet: quiet, Poll: time.Millisecond}}),
	}
	for i, name := range []string{"a", "b"} {
		w.nodes[name] = &node{Node: certificate.Node{Name: name, Host: []string{"ha", "hb"}[i]}, gate: cut.NewGate[[]byte](from, cut.Limits{})}
	}
	w.step(cut.Begin{Cut: "s1"})
	if !w.sealed {
		t.Fatalf("%s: the cut was not sealed", mutant)
	}
	return w.subject()
}

// tick is the clock of everyone: what follows on something is later.
func (w *world) tick() int64 {
	w.now += time.Microsecond
	return int64(w.now)
}

func (w *world) step(ev cut.Event) {
	effects, err := w.coord.Step(w.now, ev)
	if err != nil {
		w.t.Fatal(err)
	}
	var counters []cut.Event
	for _, ef := range effects {
		w.tick()
		switch e := ef.(type) {
		case cut.SendPrepare:
			defer w.step(cut.Prepared{Cut: e.Cut, Host: e.Host})
		case cut.SendCut:
			if e.Host == "hb" {
				w.run()
			}
		case cut.SendPoll:
			counters = append(counters, w.count(e))
		case cut.SendCollect:
			defer w.step(cut.Collected(e))
		case cut.Seal:
			w.lost, w.sealed = e.Lost, true
		}
	}
	for _, ev := range counters {
		w.tick()
		w.rounds[len(w.rounds)-1].Ended = int64(w.now)
		w.step(ev)
	}
	if deadline, ok := w.coord.Deadline(); ok && len(counters) > 0 && !w.sealed && w.coord.Phase() == cut.PhaseDrain && deadline < w.now+2*time.Second {
		w.now = max(w.now, deadline)
		w.step(cut.Tick{})
	}
}

// run is the cut of both nodes, with the frames between them.
func (w *world) run() {
	a, b := w.nodes["a"], w.nodes["b"]
	frame := func(id byte) []byte { return append(make([]byte, 13), id) }
	w.sent["ha"], w.sent["hb"] = 2, 1 // frames 1 and 4, and 3
	if w.loses {
		w.sent["hb"]++
	}
	w.cutNode(a, func() {})
	w.hand(b, to, frame(2)) // from the future
	w.copy(a, from, frame(3))
	w.got["hb"]++
	b.unread = [][]byte{frame(4)}
	w.cutNode(b, func() {
		w.got["hb"]++
		w.hand(b, from, frame(1))
	})
	for _, n := range []*node{a, b} {
		n.Heard = w.tick()
		w.step(cut.NodeCut{Cut: "s1", Node: n.Name})
		w.step(cut.Stored{Cut: "s1", Node: n.Name})
	}
}

// cutNode does the steps; closed is what happens while its gate is closed.
func (w *world) cutNode(n *node, closed func()) {
	steps := cut.Steps()
	move := func(what, before cut.Step) {
		steps = slices.DeleteFunc(steps, func(s cut.Step) bool { return s == what })
		steps = slices.Insert(steps, slices.Index(steps, before), what)
	}
	leave := func(what cut.Step) {
		steps = slices.DeleteFunc(steps, func(s cut.Step) bool { return s == what })
	}
	if n.Name == "b" {
		switch w.mutant {
		case "flip before stop":
			move(cut.StepFlip, cut.StepStop)
		case "flip after resume":
			move(cut.StepFlip, cut.StepOpen)
		case "capture before stop":
			move(cut.StepCapture, cut.StepStop)
		case "capture after resume":
			move(cut.StepCapture, cut.StepOpen)
		case "stop before settle":
			move(cut.StepStop, cut.StepSettle)
		case "no close":
			leave(cut.StepClose)
		case "no settle":
			leave(cut.StepSettle)
		case "no flush":
			leave(cut.StepFlush)
		case "no flip":
			leave(cut.StepFlip)
		case "never opened":
			leave(cut.StepOpen)
		}
	}
	for _, s := range steps {
		began, before := w.tick(), n.gate.Epoch()
		if s == cut.StepFlip && n.Name == "b" && w.mutant == "no barrier" {
			began -= 1500 // the switch has not answered for the step before
		}
		switch s {
		case cut.StepClose:
			n.gate.Close()
			closed()
		case cut.StepSettle:
			for _, data := range n.unread {
				n.Gate.Taken++
				if w.mutant != "drop what was taken back" {
					n.gate.TakeBack([]cut.Frame[[]byte]{{Size: len(data), Ref: data}})
				}
			}
		case cut.StepStop:
			n.cut = w.now
			n.cutAt = time.Unix(1_700_000_000, 0).Add(w.now)
			n.CutAt = n.cutAt.UnixNano()
		case cut.StepFlip:
			n.gate.Flip(to, true)
			n.flipped = true
			if w.mutant == "abort back" && n.Name == "b" {
				n.gate.Flip(from, true)
			}
		case cut.StepOpen:
			for i, r := range n.gate.Open() {
				if w.mutant == "drop a held frame" && i == 0 {
					continue
				}
				w.deliver(n, r.Frame.Epoch)
				if r.Record && w.mutant != "forget a held record" {
					w.record(n, r.Frame.Epoch, r.Frame.Ref)
				}
			}
		}
		n.Steps = append(n.Steps, certificate.Step{Name: s.String(), Began: began, Ended: w.tick(), From: uint8(before), To: uint8(n.gate.Epoch())})
	}
}

// hand is the switch giving a frame to the gate alone.
func (w *world) hand(n *node, epoch cut.Epoch, data []byte) {
	if w.mutant == "drop between switch and gate" {
		return
	}
	n.Gate.Handed++
	newer := epoch.Compare(n.gate.Epoch()) > 0
	switch {
	case newer && w.mutant == "deliver newer":
		w.deliver(n, epoch)
		return
	case newer && w.mutant == "drop newer":
		return
	}
	v, err := n.gate.Arrive(cut.Frame[[]byte]{Epoch: epoch, Size: len(data), Ref: data})
	if err != nil {
		w.t.Fatal(err)
	}
	if v.Deliver {
		w.deliver(n, epoch)
	}
	if v.Record {
		w.record(n, epoch, data)
	}
}

// copy is the switch delivering an older frame, with a copy for the record.
func (w *world) copy(n *node, epoch cut.Epoch, data []byte) {
	w.got[n.Host]++
	w.copied[n.Host]++
	if w.mutant == "drop a copy" {
		return
	}
	n.seen++
	n.Gate.Copies++
	v, err := n.gate.Arrive(cut.Frame[[]byte]{Epoch: epoch, Size: len(data), Delivered: true, Ref: data})
	if err != nil {
		w.t.Fatal(err)
	}
	if v.Record && w.mutant != "forget a record" {
		w.record(n, epoch, data)
	}
	if w.mutant == "record twice" {
		w.record(n, epoch, data)
	}
}

func (w *world) deliver(n *node, epoch cut.Epoch) {
	n.Gate.Delivered++
	switch c := epoch.Compare(n.gate.Epoch()); {
	case c > 0:
		n.Gate.Newer++
	case c < 0 && n.flipped:
		n.Gate.Older++
	}
}

func (w *world) record(n *node, epoch cut.Epoch, data []byte) {
	at := max(0, w.now-n.cut)
	if w.mutant == "record newer" {
		epoch = to
	}
	n.data = append(n.data, data)
	n.Recorded = append(n.Recorded, certificate.Frame{Epoch: uint8(epoch), At: int64(at), Size: len(data), Hash: certificate.Sum(data)})
}

func (w *world) count(e cut.SendPoll) cut.Event {
	if len(w.rounds) < e.Round {
		w.rounds = append(w.rounds, certificate.Round{Number: e.Round, Asked: int64(w.now)})
	}
	r := &w.rounds[e.Round-1]
	peer := map[string]string{"ha": "hb", "hb": "ha"}[e.Host]
	n := w.nodes[map[string]string{"ha": "a", "hb": "b"}[e.Host]]
	lan := func(from, to string) cut.Channel { return cut.Channel{From: from, To: to, Network: "lan"} }
	counts := []cut.ChannelCount{
		{Channel: lan(e.Host, e.Host), Sent: w.copied[e.Host], Received: n.seen},
		{Channel: lan(e.Host, peer), Sent: w.sent[e.Host]},
		{Channel: lan(peer, e.Host), Received: w.got[e.Host]},
	}
	a := certificate.Answer{Host: e.Host, Read: w.tick()}
	if w.mutant == "count before the cut" {
		a.Read = n.Steps[0].Began
	}
	for _, c := range counts {
		if c.Sent+c.Received > 0 {
			a.Counts = append(a.Counts, certificate.Count{From: c.From, To: c.To, Network: c.Network, Sent: c.Sent, Received: c.Received})
		}
	}
	r.Answers = append(r.Answers, a)
	if w.mutant == "seal undrained" || w.mutant == "copies uncounted" {
		for i := range counts {
			if w.mutant == "seal undrained" || counts[i].From == counts[i].To {
				counts[i].Sent, counts[i].Received = 0, 0 // what the coordinator is told
			}
		}
	}
	return cut.Counters{Cut: e.Cut, Host: e.Host, Round: e.Round, Counts: counts}
}

func (w *world) subject() *certificate.Subject {
	topo := []byte(source)
	c := &certificate.Certificate{
		Format: certificate.Format, Slice: "pair", Snapshot: "s1", Parent: "s0", ParentCertificate: certificate.Sum([]byte("s0")), Mode: "background",
		From: uint8(from), To: uint8(to), Topology: certificate.Sum(topo), QuietNS: int64(quiet),
	}
	last := w.rounds[len(w.rounds)-1]
	if n := len(w.rounds); n > 2 {
		w.rounds = []certificate.Round{w.rounds[0], w.rounds[n-2], last}
	}
	switch w.mutant {
	case "one round":
		w.rounds = []certificate.Round{last}
	case "no quiet":
		for i := range w.rounds {
			w.rounds[i].Ended = w.rounds[0].Ended
			w.rounds[i].Asked = w.rounds[0].Asked
		}
	}
	c.Rounds = w.rounds
	s := &certificate.Subject{Slice: "pair", ID: "s1", Parent: "s0", Mode: "background", Epoch: uint8(from), Topology: topo}
	for _, l := range w.lost {
		if w.mutant != "hide a loss" {
			c.Lost = append(c.Lost, certificate.Loss{From: l.From, To: l.To, Network: l.Network, Frames: l.Frames})
			s.Lost += int64(l.Frames)
		}
	}
	cs := &frames.ChannelState{Slice: "pair", Snapshot: "s1"}
	for i, name := range []string{"a", "b"} {
		n := w.nodes[name]
		stats := n.gate.Stats()
		n.Gate.Held, n.Gate.Recorded, n.Gate.Waiting = stats.Held, stats.Recorded, uint64(n.gate.Held())
		n.Device = certificate.Blob{Hash: certificate.Sum([]byte("device" + name)), Size: 7}
		n.Memory = certificate.Blob{Hash: certificate.Sum([]byte("memory" + name)), Size: 7}
		n.Disks = []certificate.Disk{{Name: "data", Blocks: certificate.Blob{Hash: certificate.Sum([]byte("disk" + name)), Size: 7}}}
		h := certificate.Host{Name: n.Host, Handed: n.Gate.Handed, Seen: n.Gate.Handed}
		if w.mutant == "drop between switch and gate" && name == "b" {
			h.Handed += 2
		}
		c.Hosts = append(c.Hosts, h)
		cs.Receivers = append(cs.Receivers, frames.Receiver{Node: name, Network: "lan", Epoch: to, Cut: n.cutAt.UTC()})
		for j, f := range n.Recorded {
			if w.mutant == "lose a frame of the file" {
				continue
			}
			cs.Frames = append(cs.Frames, frames.Frame{Receiver: i, Epoch: cut.Epoch(f.Epoch), At: time.Duration(f.At), Data: n.data[j]})
		}
		if w.mutant == "missing node" && name == "b" {
			continue
		}
		c.Nodes = append(c.Nodes, n.Node)
		s.Held += int64(n.Gate.Held)
		s.Recorded += int64(len(n.Recorded))
		s.Nodes = append(s.Nodes, certificate.SubjectNode{
			Name: name, Host: n.Host, CutAt: n.CutAt, Device: n.Device, Memory: n.Memory, Disks: slices.Clone(n.Disks), Held: int64(n.Gate.Held), Recorded: int64(len(n.Recorded)),
		})
	}
	slices.SortStableFunc(cs.Frames, func(a, b frames.Frame) int { return int(a.At - b.At) })
	var b bytes.Buffer
	if err := frames.Write(&b, cs); err != nil {
		w.t.Fatal(err)
	}
	s.ChannelState = b.Bytes()
	s.Channel = certificate.Blob{Hash: certificate.Sum(s.ChannelState), Size: int64(len(s.ChannelState))}
	c.Channel = certificate.Channel{Blob: s.Channel, Frames: len(cs.Frames)}
	sign(w.t, s, c)
	return s
}

// sign puts a certificate into a snapshot, as one who can write to the store may.
func sign(t *testing.T, s *certificate.Subject, c *certificate.Certificate) {
	t.Helper()
	b, err := certificate.Encode(c)
	if err != nil {
		t.Fatal(err)
	}
	s.Bytes, s.Certificate = b, certificate.Sum(b)
}
