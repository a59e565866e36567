package cut

import (
	"fmt"
	"maps"
	"math/bits"
	"slices"
	"strings"
	"time"
)

// This file is the world that the explorer walks: nodes, their switches, the
// network between them, and the hosts' agents, with every queue that a frame or
// an order can wait in. What decides is the code that runs: Gate, Steps,
// AbortSteps, Coordinator. What is modelled is what they are promised: a switch
// that does what its flow tables say, queues that keep their order, a network
// that need not.

const (
	maxNodes  = 3
	maxFrames = 8
)

// frame is one on its way. Frames are numbered in the order they are sent.
type frame struct {
	id    uint8
	epoch Epoch
	why   why
	age   uint8 // ticks it has spent where it is
	raced bool  // was on its way to the gate when the switch opened
}

// why a switch handed a frame to the controller.
type why uint8

const (
	whyClosed why = 1 + iota // its gate was closed
	whyHold                  // no entry of the gate delivers such a frame
	whyCopy                  // delivered, and this is the copy for the record
)

type queue []frame

// node is a virtual machine, its two queues, and what its host knows of it.
type node struct {
	alive, running bool
	sent, received uint8 // memory: the frames, as bits
	tx, rx         queue // from and to the guest

	color color            // the node's part of its switch's flow tables
	punt  queue            // from the switch to the gate (packet-ins)
	out   queue            // from the gate to the switch (packet-outs)
	gate  *Gate[frame]     // never changed in place: see world.ownGate
	plan  []Step           // what is left of the cut or its abort
	micro uint8            // parts of plan[0] that are done
	begun Step             // last step of a cut that was begun
	to    Epoch            // where the plan leads
	abort bool             // the plan is that of an abort
	snap  [2]uint8         // sent and received as captured
	took  bool             // captured
	kept  bool             // stored
	chans [maxFrames]uint8 // channel state: how often each frame was recorded

	inOrder [maxNodes]int8 // id+1 of the last frame from each sender that reached rx
	viaGate [maxNodes]int8 // the same, of those that the gate delivered
}

// color is what the flow tables say of a node.
type color struct {
	epoch             Epoch
	closed, recording bool
}

// host is one switch and one agent.
type host struct {
	alive    bool
	detected bool     // the coordinator knows it is not
	down     []Effect // orders under way to it
	stale    []Effect // those of a coordinator that was followed
	obeys    bool     // the one that followed has been heard of
	cut      string   // the cut that it takes part in; "" for none
	counted  uint8    // epochs that it counts, as bits modulo 8
	sent     [maxNodes][8]uint8
	received [maxNodes][8]uint8
	copied   [8]uint8 // copies for the record by epoch: given to the gates by the switch
	seen     [8]uint8 // and seen by them

	polling bool
	poll    SendPoll
	half    bool  // of the counters are read
	early   uint8 // the count of copies that was read first
	round1  []ChannelCount
	prepare *SendPrepare // not counted yet (flawLatePrepare)
}

// rules say what may happen in a world, and how often.
type rules struct {
	name     string
	hostOf   []int // of each node
	frames   int   // that guests may send
	cuts     int
	reorder, // the network does not keep the order
	trigger, // a newer frame makes an uncut node cut at once (Lai-Yang)
	unread bool // a node need not read what has passed its gate: it is taken back
	limits   Limits
	losses   int // frames the network may lose
	deaths   int // hosts that may die
	cancels  int
	failures int  // steps of nodes, or seals, that may fail
	timeouts int  // deadlines that may pass though all is well
	crashes  int  // of the coordinator, which another one follows
	between  bool // only between two cuts
	flaw     flaw
}

// calm tells whether nothing can go wrong but on the network.
func (r *rules) calm() bool {
	return r.deaths+r.cancels+r.failures+r.timeouts+r.crashes == 0 && r.limits == Limits{}
}

// alike tells whether every node has a host of its own.
func (r *rules) alike() bool {
	for i, h := range r.hostOf {
		if i != h {
			return false
		}
	}
	return true
}

// world is one state. It is copied by clone; what a copy shares is never changed in place.
type world struct {
	r     *rules
	nodes [maxNodes]node
	hosts [maxNodes]host
	net   [maxNodes][maxNodes]queue
	coord *Coordinator
	asKey string // of coord
	now   time.Duration
	cutID int
	seal  *Seal
	begun int

	todo    []Effect            // of the coordinator, not carried out yet
	noted   Note                // of the cut that runs
	settled Epoch               // as noted when the last cut ended
	members map[string][]string // ditto
	visible string              // the snapshot that was sealed last
	ended   int
	frames  int
	src     [maxFrames]uint8
	dst     [maxFrames]uint8
	stamp   [maxFrames]Epoch
	left    uint8 // frames that were stamped
	placed  uint8 // frames that reached rx
	lost    uint8 // by the network or with a host
	astray  uint8 // by the network

	losses, deaths, cancels, failures, timeouts, crashes int
}

// timing: one unit is the time between two rounds. A frame may be under way
// for at most one of them, so two are quiet.
var exploreTiming = Timing{Prepare: 1000, Cut: 1000, Store: 1000, Ack: 15, Return: 15, Retry: 10, Poll: 1, Quiet: 2}

func newWorld(r *rules) *world {
	w := &world{r: r}
	hosts := map[string][]string{}
	for i, h := range r.hostOf {
		w.nodes[i] = node{alive: true, running: true, color: color{epoch: 255}, gate: NewGate[frame](255, r.limits)}
		w.hosts[h].alive = true
		w.hosts[h].counted = 1 << (255 % 8)
		hosts[hostName(h)] = append(hosts[hostName(h)], nodeName(i))
	}
	w.settled, w.members = 255, hosts
	w.coord = NewCoordinator(Config{Epoch: 255, Hosts: hosts, Timing: exploreTiming}) // so that it wraps
	return w
}

func nodeName(i int) string  { return string(rune('a' + i)) }
func hostName(h int) string  { return string(rune('A' + h)) }
func nodeIndex(n string) int { return int(n[0] - 'a') }
func hostIndex(h string) int { return int(h[0] - 'A') }

// violation is what must never happen.
type violation string

func (w *world) must(ok bool, format string, args ...any) {
	if !ok {
		panic(violation(fmt.Sprintf(format, args...)))
	}
}

// ---- what can happen

type op uint8

const (
	opBegin    op = iota
	opSend        // guest a sends to b
	opRead        // guest a reads a frame
	opTransmit    // switch takes a frame that guest a sent
	opArrive      // frame number c of those from host a to b arrives
	opLose        // and is lost instead
	opPunt        // the gate of node a judges a frame
	opOut         // the switch delivers a frame that the gate of node a gave up
	opOrder       // host a takes its next order
	opStep        // node a goes on with its steps
	opFail        // or fails in it
	opStore       // node a's state is stored
	opCount       // host a goes on reading its counters
	opSeal        // the snapshot becomes visible
	opSealFail    // or does not
	opTick        // time passes until the next round of counters
	opTimeout     // time passes until the next deadline
	opDie         // host a dies
	opDetect      // and the coordinator learns of it
	opCancel
	opLate // host a begins to count (flawLatePrepare)

	opEffect   // the coordinator's next effect is carried out
	opNoteFail // or is a note that cannot be written, or for a=1 cannot be told to be
	opCrash    // the coordinator dies, and another follows; for a=1 the seal was carried out
	opStale    // host a takes an order of the coordinator that was followed
)

type action struct{ op, a, b, c uint8 }

func (x action) String() string {
	n, h := nodeName(int(x.a)), hostName(int(x.a))
	switch op(x.op) {
	case opBegin:
		return "a cut is asked for"
	case opSend:
		return fmt.Sprintf("%s sends to %s", n, nodeName(int(x.b)))
	case opRead:
		return n + " reads a frame"
	case opTransmit:
		return n + "'s switch takes a frame from it"
	case opArrive:
		return fmt.Sprintf("frame no. %d from host %s to %s arrives", x.c, h, hostName(int(x.b)))
	case opLose:
		return fmt.Sprintf("frame no. %d from host %s to %s is lost", x.c, h, hostName(int(x.b)))
	case opPunt:
		return n + "'s gate judges a frame"
	case opOut:
		return n + " is given a frame by its gate"
	case opOrder:
		return "host " + h + " takes an order"
	case opStep:
		return fmt.Sprintf("%s: step %s, part %d", n, Step(x.b), x.c)
	case opFail:
		return fmt.Sprintf("%s fails in step %s", n, Step(x.b))
	case opStore:
		return n + " is stored"
	case opCount:
		return "host " + h + " reads counters"
	case opSeal:
		return "sealed"
	case opSealFail:
		return "seal fails"
	case opTick:
		return "a round's time passes"
	case opTimeout:
		return "a deadline passes"
	case opDie:
		return "host " + h + " dies"
	case opDetect:
		return "host " + h + " is found dead"
	case opCancel:
		return "the cut is cancelled"
	case opLate:
		return "host " + h + " begins to count"
	case opEffect:
		return "the coordinator does the next thing"
	case opNoteFail:
		return "the coordinator cannot write its note"
	case opCrash:
		return "the coordinator dies, and another follows"
	case opStale:
		return "host " + h + " takes an order of the coordinator before"
	}
	return "?"
}

// actions lists what the walk tries next, in a fixed order: all that can happen,
// or one thing that can be tried alone.
//
// That is one after which everything else can happen that could have happened
// before it, with the same result, and by which no invariant is judged: then
// every run has a twin in which it comes first. With faults about, what a fault
// can hit or prevent is not tried alone.
func (w *world) actions() []action {
	var as []action
	if len(w.todo) > 0 {
		as = append(as, action{op: uint8(opEffect)})
		if _, note := w.todo[0].(Note); note && w.failures < w.r.failures {
			as = append(as, action{op: uint8(opNoteFail)}, action{op: uint8(opNoteFail), a: 1})
		}
		if w.mayCrash() {
			as = append(as, action{op: uint8(opCrash)})
		}
		return as
	}
	calm := w.r.calm()
	last := w.begun == w.r.cuts
	if !last && w.coord.phase == PhaseIdle && len(w.coord.hosts) > 0 {
		as = append(as, action{op: uint8(opBegin)}) // no frame and no host knows of it yet
		if w.begun > 0 && w.crashes < w.r.crashes {
			as = append(as, action{op: uint8(opCrash)})
		}
		return as
	}
	for i := range w.r.hostOf {
		n := &w.nodes[i]
		switch {
		case !n.alive:
		case last && n.took && n.running && len(n.rx) > 0:
			return []action{{op: uint8(opRead), a: uint8(i)}} // no capture will see it
		case calm && n.took && !n.kept && !n.abort && w.coord.phase != PhaseIdle:
			return []action{{op: uint8(opStore), a: uint8(i)}} // a later seal can only be judged more mildly
		case calm && len(n.plan) > 0 && (n.plan[0] == StepCapture || n.plan[0] == StepFlip && n.micro == 1) &&
			!n.running && n.gate.closed && n.color.closed && len(n.tx) == 0 && len(n.out) == 0:
			return []action{{op: uint8(opStep), a: uint8(i), b: uint8(n.plan[0]), c: n.micro}} // nothing reaches or leaves it
		}
	}
	for a := range maxNodes {
		h := &w.hosts[a]
		if !h.alive || len(h.down) == 0 {
			continue
		}
		one := []action{{op: uint8(opOrder), a: uint8(a)}}
		switch h.down[0].(type) {
		case SendPoll:
			return one // it answers when it answers
		case SendPrepare, SendCommit:
			if calm {
				return one
			}
		case SendCut:
			if calm && !w.r.trigger {
				return one // its steps are done when they are done
			}
		}
	}
	add := func(o op, abc ...int) {
		x := action{op: uint8(o)}
		for i, v := range abc {
			*[]*uint8{&x.a, &x.b, &x.c}[i] = uint8(v)
		}
		as = append(as, x)
	}
	for i := range w.r.hostOf {
		n := &w.nodes[i]
		if !n.alive {
			continue
		}
		if n.running && len(n.rx) > 0 {
			add(opRead, i)
		}
		if len(n.tx) > 0 {
			add(opTransmit, i)
		}
		if len(n.punt) > 0 {
			add(opPunt, i)
		}
		if len(n.out) > 0 {
			add(opOut, i)
		}
		if len(n.plan) > 0 && w.ready(i) {
			add(opStep, i, int(n.plan[0]), int(n.micro))
		}
		if n.took && !n.kept && !n.abort && w.coord.phase != PhaseIdle {
			add(opStore, i)
		}
	}
	for a := range maxNodes {
		h := &w.hosts[a]
		if h.alive && len(h.down) > 0 {
			add(opOrder, a)
		}
		if h.alive && len(h.stale) > 0 {
			add(opStale, a)
		}
		if h.alive && h.polling {
			add(opCount, a)
		}
		if h.alive && h.prepare != nil {
			add(opLate, a)
		}
		for b := range maxNodes {
			for c := range w.net[a][b] {
				if c == 0 || w.r.reorder {
					add(opArrive, a, b, c)
				}
			}
		}
		if w.deadUnknown(a) {
			add(opDetect, a)
		}
	}
	if w.seal != nil {
		add(opSeal)
	}
	if w.canTick() {
		add(opTick)
	}
	if w.coord.phase == PhaseIdle {
		// The last cut has ended. What is still under way is to arrive, and the
		// order is that of the queues.
		return as[:min(len(as), 1)]
	}
	must := len(as)

	// What may happen, but nobody waits for.
	for i := range w.r.hostOf {
		n := &w.nodes[i]
		if !n.alive {
			continue
		}
		if n.running && w.frames < w.r.frames {
			for j := range w.r.hostOf {
				if j == i || w.r.alike() && w.frames == 0 && (i != 0 || j != 1) {
					continue // the first frame goes from a to b: that is how they are named
				}
				add(opSend, i, j)
			}
		}
		if len(n.plan) > 0 && !n.abort && w.failures < w.r.failures {
			add(opFail, i, int(n.plan[0]))
		}
	}
	for a := range maxNodes {
		for b := range maxNodes {
			for c := range w.net[a][b] {
				if w.losses < w.r.losses && (c == 0 || w.r.reorder) {
					add(opLose, a, b, c)
				}
			}
		}
		if w.hosts[a].alive && w.deaths < w.r.deaths {
			add(opDie, a)
		}
	}
	if w.seal != nil && w.failures < w.r.failures {
		add(opSealFail)
	}
	if w.mayCrash() {
		add(opCrash)
		if w.seal != nil {
			add(opCrash, 1)
		}
	}
	if w.cancels < w.r.cancels && w.coord.phase != PhaseIdle {
		add(opCancel)
	}
	// Deadlines may pass at any time, and pass if there is nothing else to wait for.
	if _, ok := w.coord.Deadline(); ok && (must == 0 || w.timeouts < w.r.timeouts) {
		add(opTimeout)
	}
	return as
}

// mayCrash tells whether the coordinator may die in a cut.
func (w *world) mayCrash() bool { return w.crashes < w.r.crashes && !w.r.between }

func (w *world) deadUnknown(a int) bool {
	h := &w.hosts[a]
	return w.coord.member(hostName(a)) && !h.alive && !h.detected
}

// canTick tells whether the time to the next round may pass: only if nothing has
// been under way for as long as anything can be.
func (w *world) canTick() bool {
	switch {
	case w.coord.phase == PhasePrepare && len(w.coord.waiting) == 0:
	case w.coord.phase == PhaseDrain && w.coord.drain.state == drainWaiting:
	default:
		return false
	}
	old := func(q queue) bool {
		return slices.ContainsFunc(q, func(f frame) bool { return f.age > 0 })
	}
	for a := range maxNodes {
		if old(w.nodes[a].punt) || old(w.nodes[a].tx) {
			return false
		}
		for b := range maxNodes {
			if old(w.net[a][b]) {
				return false
			}
		}
	}
	return true
}

// ready tells whether the next part of a node's step can be done.
func (w *world) ready(i int) bool {
	n := &w.nodes[i]
	barrier := len(n.out) == 0 || w.r.flaw == flawNoBarrier
	switch n.plan[0] {
	case StepClose:
		return (n.micro == 0) != (w.r.flaw == flawSwitchClosesFirst) || barrier
	case StepSettle:
		return len(n.rx) == 0 || w.r.unread || w.r.flaw == flawNoSettle
	case StepFlush:
		return len(n.tx) == 0 || w.r.flaw == flawNoFlush
	case StepFlip:
		return n.micro > 0 || barrier
	case StepOpen:
		switch n.micro {
		case 1:
			return barrier
		case 2:
			return w.r.flaw == flawNoFence ||
				!slices.ContainsFunc(n.punt, func(f frame) bool { return f.raced && f.why != whyCopy })
		}
	}
	return true
}

// apply makes it happen. It panics with a violation.
func (w *world) apply(x action) {
	a, b, c := int(x.a), int(x.b), int(x.c)
	n, h := &w.nodes[a], &w.hosts[a]
	switch op(x.op) {
	case opBegin:
		w.begun++
		w.cutID++
		for i := range w.nodes {
			m := &w.nodes[i]
			m.begun, m.abort, m.took, m.kept = 0, false, false, false
			m.snap, m.chans = [2]uint8{}, [maxFrames]uint8{}
		}
		w.step(Begin{Cut: w.cut()})
	case opSend:
		id := w.frames
		w.frames++
		w.src[id], w.dst[id] = uint8(a), uint8(b)
		n.sent |= 1 << id
		n.tx = push(n.tx, frame{id: uint8(id)})
	case opRead:
		n.received |= 1 << pop(&n.rx).id
	case opTransmit:
		w.transmit(a, pop(&n.tx))
	case opArrive:
		f := w.net[a][b][c]
		w.net[a][b] = slices.Concat(w.net[a][b][:c], w.net[a][b][c+1:])
		if to := &w.hosts[b]; to.alive {
			if to.counts(f.epoch) {
				to.received[a][f.epoch%8]++
			}
			w.deliver(f)
		} else {
			w.lost |= 1 << f.id
			w.astray |= 1 << f.id
		}
	case opLose:
		w.losses++
		w.lost |= 1 << w.net[a][b][c].id
		w.astray |= 1 << w.net[a][b][c].id
		w.net[a][b] = slices.Concat(w.net[a][b][:c], w.net[a][b][c+1:])
	case opPunt:
		w.judge(a, pop(&n.punt))
	case opOut:
		w.place(a, pop(&n.out), true)
	case opOrder:
		order := h.down[0]
		h.down = slices.Clone(h.down[1:])
		h.obeys = w.crashes > 0
		w.order(a, order)
	case opStale:
		order := h.stale[0]
		h.stale = slices.Clone(h.stale[1:])
		if !h.obeys || w.r.flaw == flawNoTerm {
			w.order(a, order)
		}
	case opEffect:
		e := w.todo[0]
		w.todo = slices.Clone(w.todo[1:])
		w.carryOut(e)
	case opNoteFail:
		w.failures++
		if a == 1 {
			w.noted = w.todo[0].(Note)
		}
		w.todo = nil
		w.step(NoteFailed{Cut: w.cut(), Reason: "it broke"})
	case opCrash:
		w.crashes++
		w.follow(a == 1)
	case opStep:
		w.part(a)
	case opFail:
		w.failures++
		w.step(Failed{Cut: w.cut(), Host: hostName(w.r.hostOf[a]), Node: nodeName(a), Reason: "it broke"})
		n.plan, n.micro = nil, 0 // until the abort is ordered
	case opStore:
		n.kept = true
		w.step(Stored{Cut: w.cut(), Node: nodeName(a)})
	case opCount:
		w.count(a)
	case opSeal:
		w.seal, w.visible = nil, w.cut()
		w.step(Sealed{Cut: w.cut()})
	case opSealFail:
		w.failures++
		w.seal = nil
		w.step(SealFailed{Cut: w.cut(), Reason: "it broke"})
	case opTick:
		w.now, _ = w.coord.Deadline()
		w.age()
		w.step(Tick{})
	case opTimeout:
		w.timeouts++
		w.now = w.coord.deadline
		if p := w.coord.phase; p == PhaseCommit || p == PhaseAbort {
			w.now, _ = w.coord.Deadline()
		}
		w.step(Tick{})
	case opDie:
		w.deaths++
		h.alive = false
		h.down, h.polling, h.prepare = nil, false, nil
		for i := range w.r.hostOf {
			if w.r.hostOf[i] != a {
				continue
			}
			m := &w.nodes[i]
			for _, f := range slices.Concat(m.tx, m.rx, m.punt, m.out) {
				w.lost |= 1 << f.id
			}
			for _, f := range m.gate.held {
				w.lost |= 1 << f.Ref.id
			}
			*m = node{snap: m.snap, chans: m.chans, took: m.took, kept: m.kept, sent: m.sent, received: m.received, gate: NewGate[frame](0, Limits{})}
		}
	case opDetect:
		h.detected = true
		w.step(HostDown{Host: hostName(a), Reason: "it died"})
	case opCancel:
		w.cancels++
		w.step(Cancel{Cut: w.cut(), Reason: "not wanted any more"})
	case opLate:
		h.counted |= 1 << (h.prepare.To % 8)
		h.prepare = nil
	}
}

func (w *world) cut() string { return fmt.Sprint("cut", w.cutID) }

// step gives the coordinator an event, and carries out what it wants.
func (w *world) step(ev Event) {
	w.coord = w.coord.clone()
	if w.r.flaw == flawNoQuiet {
		w.coord.settled = 0
	}
	effects, err := w.coord.Step(w.now, ev)
	w.asKey = string(w.coord.key(nil, w.now))
	w.must(err == nil, "refused: %v", err)
	if w.r.flaw == flawNoteLate && len(effects) > 1 {
		if n, ok := effects[0].(Note); ok {
			effects = append(slices.Clone(effects[1:]), n)
		}
	}
	if w.mayCrash() || w.failures < w.r.failures {
		w.todo = append(slices.Clone(w.todo), effects...) // one by one: see actions
		return
	}
	for _, e := range effects {
		w.carryOut(e)
	}
}

func (w *world) carryOut(e Effect) {
	switch e := e.(type) {
	case Note:
		w.noted = e
	case Seal:
		w.seal = &e
		w.check(e)
	case Done:
		w.ended++
		w.must(e.Outcome == OutcomeCommitted || !w.r.calm(), "the cut is aborted though nothing was wrong: %s", e.Reason)
		w.must((e.Outcome == OutcomeCommitted) == (w.visible == e.Cut), "the cut is %s, and its snapshot visible: %t", e.Outcome, w.visible == e.Cut)
		w.age() // what is under way now will not be for another quiet time
		for _, name := range e.Left {
			w.must(!w.hosts[hostIndex(name)].alive || w.timeouts > 0, "host %s is left out, but alive", name)
		}
		w.noted, w.settled, w.members = Note{}, e.Epoch, maps.Clone(w.coord.hosts)
	default:
		h := &w.hosts[hostIndex(hostOfEffect(e))]
		if h.alive {
			h.down = append(slices.Clone(h.down), e)
		}
	}
}

// follow has another coordinator take the place of the one that died, of which it knows
// what was noted, and whether the snapshot is visible.
func (w *world) follow(sealed bool) {
	if sealed {
		w.visible = w.cut()
	}
	w.seal, w.todo = nil, nil
	for a := range w.hosts {
		h := &w.hosts[a]
		if h.obeys {
			h.stale = nil // it refuses them from now on
		}
		h.stale, h.down, h.obeys = slices.Concat(h.stale, h.down), nil, false
	}
	cfg := Config{Epoch: w.settled, Hosts: w.members, Timing: exploreTiming, Followed: w.r.flaw != flawFollowAtOnce}
	if w.noted == (Note{}) {
		w.coord = NewCoordinator(cfg)
		w.coord.settled += w.now
		w.ended = w.begun // nobody has heard of one that is not noted, or it has ended
		w.asKey = string(w.coord.key(nil, w.now))
		return
	}
	n, visible := w.noted, w.visible == w.cut()
	switch w.r.flaw {
	case flawResumeBack:
		n.Ordered = false
	case flawResumeForward:
		n.Ordered = true
	case flawResumeAbort:
		visible = false
	}
	var effects []Effect
	w.coord, effects = Resume(w.now, cfg, n, visible)
	w.asKey = string(w.coord.key(nil, w.now))
	for _, e := range effects {
		w.carryOut(e)
	}
}

func hostOfEffect(e Effect) string {
	switch e := e.(type) {
	case SendPrepare:
		return e.Host
	case SendCut:
		return e.Host
	case SendPoll:
		return e.Host
	case SendCollect:
		return e.Host
	case SendCommit:
		return e.Host
	case SendAbort:
		return e.Host
	}
	panic(fmt.Sprintf("unknown effect %T", e))
}

// ---- the switch

// transmit stamps a frame and sends it on.
func (w *world) transmit(i int, f frame) {
	f.epoch = w.nodes[i].color.epoch
	f.age = 0
	w.stamp[f.id] = f.epoch
	w.left |= 1 << f.id
	from, to := w.r.hostOf[i], w.r.hostOf[w.dst[f.id]]
	if from == to {
		w.deliver(f)
		return
	}
	if h := &w.hosts[from]; h.counts(f.epoch) {
		h.sent[to][f.epoch%8]++
	}
	w.net[from][to] = push(w.net[from][to], f)
}

func (h *host) counts(e Epoch) bool { return h.counted>>(e%8)&1 == 1 }

// deliver is the gate table.
func (w *world) deliver(f frame) {
	i := int(w.dst[f.id])
	n := &w.nodes[i]
	f.age = 0
	switch {
	case n.color.closed:
		f.why = whyClosed
		n.punt = push(n.punt, f)
	case f.epoch == n.color.epoch:
		w.place(i, f, false)
	case f.epoch == n.color.epoch-1:
		w.place(i, f, false)
		if n.color.recording {
			f.why = whyCopy
			n.punt = push(n.punt, f)
			w.hosts[w.r.hostOf[i]].copied[f.epoch%8]++
		}
	default:
		f.why = whyHold
		n.punt = push(n.punt, f)
	}
}

// place puts a frame into the queue towards the guest.
func (w *world) place(i int, f frame, viaGate bool) {
	n := &w.nodes[i]
	w.must(w.placed>>f.id&1 == 0, "frame %d is delivered twice", f.id)
	w.placed |= 1 << f.id
	n.rx = push(n.rx, frame{id: f.id})
	if w.r.reorder {
		return
	}
	s := w.src[f.id]
	if viaGate {
		w.must(n.viaGate[s] <= int8(f.id), "the gate of %s gives up frame %d after a later one of the same sender", nodeName(i), f.id)
		n.viaGate[s] = int8(f.id) + 1
	}
	// One thing may be overtaken: a frame that is on its way to the gate at the
	// very moment the switch opens.
	w.must(f.raced || n.inOrder[s] <= int8(f.id), "frame %d is overtaken on its way to %s by a later one of the same sender", f.id, nodeName(i))
	n.inOrder[s] = max(n.inOrder[s], int8(f.id)+1)
}

// ---- the host

// judge runs the gate on one frame that the switch handed over.
func (w *world) judge(i int, f frame) {
	n, h := &w.nodes[i], &w.hosts[w.r.hostOf[i]]
	g := w.ownGate(i)
	in := Frame[frame]{Epoch: f.epoch, Size: 2, Delivered: f.why == whyCopy, Ref: f}
	newer := !in.Delivered && f.epoch.Compare(g.epoch) > 0
	if in.Delivered {
		h.seen[f.epoch%8]++
	}
	var v Verdict
	var err error
	switch {
	case w.r.flaw == flawDeliverNewer && newer:
		v.Deliver = true
	case w.r.flaw == flawDropNewer && newer:
	case w.r.flaw == flawBelieveSwitch && f.why == whyClosed && !g.closed:
		// Judges by why the frame was sent, and waits for an Open that has been.
		g.held = append(g.held, in)
	default:
		v, err = g.Arrive(in)
	}
	if v.Deliver {
		n.out = push(n.out, f)
	}
	if v.Record && w.r.flaw != flawForgetArrived {
		n.chans[f.id]++
	}
	if err != nil {
		w.step(Failed{Cut: w.cut(), Host: hostName(w.r.hostOf[i]), Node: nodeName(i), Reason: err.Error()})
	}
	if v.Newer && w.r.trigger && n.begun == 0 && !n.abort && w.coord.phase == PhaseCut {
		n.plan, n.to = w.steps(), w.coord.to
	}
}

// ownGate makes a node's gate one that this world may change.
func (w *world) ownGate(i int) *Gate[frame] {
	g := *w.nodes[i].gate
	g.held = slices.Clone(g.held)
	w.nodes[i].gate = &g
	return &g
}

// steps are those of a node's cut, in the order that the flaw gives them.
func (w *world) steps() []Step {
	s := Steps()
	move := func(what, before Step) {
		i := slices.Index(s, what)
		s = slices.Delete(s, i, i+1)
		s = slices.Insert(s, slices.Index(s, before), what)
	}
	switch w.r.flaw {
	case flawFlipBeforeStop:
		move(StepFlip, StepStop)
	case flawFlipAfterResume:
		move(StepFlip, StepOpen)
	case flawCaptureBeforeStop:
		move(StepCapture, StepStop)
	case flawCaptureAfterResume:
		move(StepCapture, StepOpen)
	case flawStopBeforeSettle:
		move(StepStop, StepSettle)
	case flawNoClose:
		s = s[1:]
	case sameFlipAfterCapture:
		move(StepFlip, StepResume)
	case sameCaptureBeforeFlush:
		move(StepCapture, StepFlush)
	}
	return s
}

// order is a host's agent taking one order.
func (w *world) order(a int, e Effect) {
	h := &w.hosts[a]
	name := hostName(a)
	switch e := e.(type) {
	case SendPrepare:
		if w.r.flaw == flawLatePrepare {
			h.prepare = &e
		} else {
			h.counted |= 1 << (e.To % 8)
		}
		h.cut = e.Cut
		w.step(Prepared{Cut: e.Cut, Host: name})
	case SendCut:
		if h.cut != e.Cut {
			return
		}
		for _, s := range e.Nodes {
			n := &w.nodes[nodeIndex(s)]
			if n.begun == 0 && len(n.plan) == 0 && !n.abort { // else it was triggered
				n.plan, n.micro, n.to = w.steps(), 0, e.To
			}
		}
	case SendPoll:
		if h.cut == e.Cut {
			h.polling, h.poll, h.half = true, e, false
		}
	case SendCollect:
		if h.cut != e.Cut {
			return
		}
		for i := range w.r.hostOf {
			if w.r.hostOf[i] == a {
				w.ownGate(i).StopRecording()
			}
		}
		w.step(Collected{Cut: e.Cut, Host: name})
	case SendCommit:
		if e.Cut != w.cut() && w.r.flaw != flawStaleCommit {
			return // said again, and heard after the next cut has begun
		}
		h.cut = ""
		h.counted = 1 << (w.coord.to % 8)
		for i := range w.r.hostOf {
			if w.r.hostOf[i] == a {
				w.nodes[i].color.recording = false
			}
		}
		w.step(Committed{Cut: e.Cut, Host: name})
	case SendAbort:
		if e.Cut == w.cut() { // else said again, too
			w.abortHost(a, e)
		}
	}
}

func (w *world) abortHost(a int, e SendAbort) {
	h := &w.hosts[a]
	if h.cut != e.Cut {
		w.step(Aborted{Cut: e.Cut, Host: hostName(a)}) // it has been, or never took part
		return
	}
	h.polling = false
	busy := false
	for i := range w.r.hostOf {
		n := &w.nodes[i]
		if w.r.hostOf[i] != a {
			continue
		}
		if !n.abort {
			n.abort = true
			n.took = false
			n.micro = 0
			n.plan = nil
			n.to = e.To
			w.ownGate(i).StopRecording()
			if e.To != w.coord.epoch {
				n.plan = AbortSteps(n.begun)
				if w.r.flaw == flawAbortBack {
					n.plan = AbortSteps(0)
				}
			}
		}
		busy = busy || len(n.plan) > 0
	}
	if !busy {
		w.aborted(a)
	}
}

// aborted says that a host has aborted its cut.
func (w *world) aborted(a int) {
	id := w.hosts[a].cut
	w.hosts[a].cut = ""
	w.step(Aborted{Cut: id, Host: hostName(a)})
}

// part does one part of a node's step.
func (w *world) part(i int) {
	n := &w.nodes[i]
	s := n.plan[0]
	parts := map[Step]uint8{StepClose: 2, StepFlip: 2, StepOpen: 3}[s]
	if !n.abort {
		n.begun = max(n.begun, s)
	}
	switch {
	case s == StepClose && (n.micro == 0) != (w.r.flaw == flawSwitchClosesFirst):
		w.ownGate(i).Close()
	case s == StepClose:
		n.color.closed = true
	case s == StepSettle && w.r.unread:
		w.takeBack(i)
	case s == StepStop:
		n.running = false
	case s == StepFlip && n.micro == 0:
		n.color = color{epoch: w.flipTo(n), recording: !n.abort, closed: n.color.closed}
	case s == StepFlip:
		w.ownGate(i).Flip(w.flipTo(n), !n.abort)
	case s == StepCapture:
		n.took = true
		n.snap = [2]uint8{n.sent, n.received}
	case s == StepResume:
		n.running = true
	case s == StepOpen && n.micro < 2 && (n.micro == 0) != (w.r.flaw == flawSwitchOpensFirst):
		w.open(i)
	case s == StepOpen && n.micro < 2:
		n.color.closed = false
		if n.abort {
			n.color.recording = false
		}
		n.punt = slices.Clone(n.punt)
		for k := range n.punt {
			n.punt[k].raced = true
		}
	}
	n.micro++
	if n.micro < parts {
		return
	}
	n.micro = 0
	n.plan = n.plan[1:]
	if len(n.plan) > 0 {
		return
	}
	if !n.abort {
		w.step(NodeCut{Cut: w.cut(), Node: nodeName(i)})
		return
	}
	for j := range w.r.hostOf {
		if w.r.hostOf[j] == w.r.hostOf[i] && len(w.nodes[j].plan) > 0 {
			return
		}
	}
	w.aborted(w.r.hostOf[i])
}

// takeBack empties the queue to a node that does not read it.
func (w *world) takeBack(i int) {
	n := &w.nodes[i]
	var taken []Frame[frame]
	for _, f := range n.rx {
		w.placed &^= 1 << f.id
		s := w.src[f.id] // its frames begin anew with the first that was taken
		n.inOrder[s], n.viaGate[s] = min(n.inOrder[s], int8(f.id)), min(n.viaGate[s], int8(f.id))
		taken = append(taken, Frame[frame]{Size: 2, Ref: f})
	}
	n.rx = nil
	switch g := w.ownGate(i); w.r.flaw {
	case flawDropTaken:
	case flawTakeLast:
		for _, f := range taken {
			f.Epoch = g.epoch
			g.held = append(g.held, f)
		}
	default:
		g.TakeBack(taken)
	}
}

func (w *world) flipTo(n *node) Epoch {
	if n.abort && w.r.flaw == flawAbortBack {
		return w.coord.epoch
	}
	return n.to
}

// open releases what the gate holds.
func (w *world) open(i int) {
	n := &w.nodes[i]
	released := w.ownGate(i).Open()
	if w.r.flaw == flawReverseRelease {
		slices.Reverse(released)
	}
	for k, r := range released {
		if w.r.flaw == flawForgetHeld && r.Record {
			r.Record = false
		}
		if w.r.flaw == flawDropHeld && n.abort && k == 0 {
			continue
		}
		n.out = push(n.out, r.Frame.Ref)
		if r.Record {
			n.chans[r.Frame.Ref.id]++
		}
	}
}

// count reads a host's counters, not all of them at one instant: the copies for
// the record first, which is the worse order.
func (w *world) count(a int) {
	h := &w.hosts[a]
	old := h.poll.Epoch % 8
	if !h.half {
		h.half, h.early = true, h.copied[old]
		return
	}
	h.polling = false
	self := ChannelCount{Channel: Channel{hostName(a), hostName(a), "lan"}, Sent: uint64(h.early), Received: uint64(h.seen[old])}
	if w.r.flaw == flawCopiesUncounted {
		self.Sent, self.Received = 0, 0
	}
	counts := []ChannelCount{self}
	for b := range maxNodes {
		if b == a {
			continue
		}
		sent, received := uint64(h.sent[b][old]), uint64(h.received[b][old])
		if w.r.flaw == flawSealUndrained {
			sent, received = 0, 0
		}
		counts = append(counts,
			ChannelCount{Channel: Channel{hostName(a), hostName(b), "lan"}, Sent: sent},
			ChannelCount{Channel: Channel{hostName(b), hostName(a), "lan"}, Received: received})
	}
	if w.r.flaw == flawOneRound {
		if h.poll.Round == 1 {
			h.round1 = counts
		}
		counts = h.round1
	}
	w.step(Counters{Cut: h.poll.Cut, Host: hostName(a), Round: h.poll.Round, Counts: counts})
}

// ---- what must hold

// check judges a snapshot at the moment it may become visible.
func (w *world) check(s Seal) {
	for i := range w.r.hostOf {
		n := &w.nodes[i]
		w.must(!w.member(i) || n.took && n.kept, "the snapshot lacks %s", nodeName(i))
	}
	var missing uint64
	for id := range w.frames {
		from, to := &w.nodes[w.src[id]], &w.nodes[w.dst[id]]
		if !w.member(int(w.src[id])) || !w.member(int(w.dst[id])) {
			continue // one of them was gone before the cut
		}
		sent := from.snap[0]>>id&1 == 1
		received := to.snap[1]>>id&1 == 1
		recorded := to.chans[id]
		lost := w.lost>>id&1 == 1
		w.must(!received || sent, "frame %d is received in the snapshot of %s but not sent in that of %s", id, nodeName(int(w.dst[id])), nodeName(int(w.src[id])))
		w.must(recorded <= 1, "frame %d is in the channel state %d times", id, recorded)
		w.must(recorded == 0 || sent, "frame %d is in the channel state but not sent in the snapshot of %s", id, nodeName(int(w.src[id])))
		w.must(recorded == 0 || !received, "frame %d is in the channel state and received in the snapshot of %s too", id, nodeName(int(w.dst[id])))
		if sent && !received && recorded == 0 {
			w.must(lost, "frame %d was in flight at the cut and is in no channel state", id)
		}
		if sent && w.astray>>id&1 == 1 && w.stamp[id] == w.coord.epoch {
			missing++
		}
	}
	var reported uint64
	for _, l := range s.Lost {
		reported += l.Frames
	}
	w.must(missing == reported, "%d frames are reported lost, %d are", reported, missing)
}

// member tells whether a node is of the slice, as far as the coordinator knows.
func (w *world) member(i int) bool { return w.coord.member(hostName(w.r.hostOf[i])) }

// checkEnd judges a state in which nothing more can happen.
func (w *world) checkEnd() {
	w.must(w.coord.phase == PhaseIdle, "the cut does not end: it is in its %s phase and waits for %v", w.coord.phase, w.coord.Waiting())
	w.must(w.ended == w.begun, "%d of %d cuts have ended", w.ended, w.begun)
	for i := range w.r.hostOf {
		n := &w.nodes[i]
		if !n.alive || !w.member(i) {
			continue
		}
		who := nodeName(i)
		w.must(w.hosts[w.r.hostOf[i]].cut == "", "host %s is still in a cut", hostName(w.r.hostOf[i]))
		w.must(n.running, "%s does not run", who)
		w.must(len(n.gate.held) == 0, "%s's gate still holds %d frames", who, len(n.gate.held))
		w.must(!n.gate.closed && !n.color.closed, "%s's gate is closed", who)
		w.must(!n.gate.recording && !n.color.recording, "%s's gate still records", who)
		w.must(n.gate.epoch == w.coord.epoch && n.color.epoch == w.coord.epoch, "%s is in epoch %d, its switch in %d, the slice in %d", who, n.gate.epoch, n.color.epoch, w.coord.epoch)
	}
	for id := range w.frames {
		from, to := &w.nodes[w.src[id]], &w.nodes[w.dst[id]]
		if !from.alive || !to.alive {
			continue
		}
		w.must(to.received>>id&1 == 1 || w.lost>>id&1 == 1, "frame %d never arrived, and the network did not lose it", id)
	}
}

// ---- copies and keys

func push(q queue, f frame) queue { return append(q[:len(q):len(q)], f) }

func pop(q *queue) frame {
	f := (*q)[0]
	*q = (*q)[1:]
	return f
}

// age lets time pass for everything that is under way.
func (w *world) age() {
	older := func(q *queue) {
		*q = slices.Clone(*q)
		for i := range *q {
			(*q)[i].age = 1
		}
	}
	for i := range maxNodes {
		older(&w.nodes[i].tx)
		older(&w.nodes[i].punt)
		for j := range maxNodes {
			older(&w.net[i][j])
		}
	}
}

func (w *world) clone() *world {
	c := *w
	return &c
}

func (c *Coordinator) clone() *Coordinator {
	d := *c
	d.hosts = maps.Clone(c.hosts)
	d.waiting = maps.Clone(c.waiting)
	d.unstored = maps.Clone(c.unstored)
	d.left = maps.Clone(c.left)
	d.drain.counts = maps.Clone(c.drain.counts)
	return &d
}

// key is equal for two states from which the same can happen.
func (w *world) key(b []byte) []byte {
	flag := func(fs ...bool) {
		var v byte
		for i, f := range fs {
			if f {
				v |= 1 << i
			}
		}
		b = append(b, v)
	}
	one := func(f frame) {
		b = append(b, f.id, byte(f.epoch), byte(f.why)|f.age<<4)
		flag(f.raced)
	}
	q := func(q queue) {
		b = append(b, byte(len(q)))
		for _, f := range q {
			one(f)
		}
	}
	for i := range w.r.hostOf {
		n := &w.nodes[i]
		g := n.gate
		flag(n.alive, n.running, n.color.closed, n.color.recording, n.abort, n.took, n.kept)
		flag(g.closed, g.recording, g.full)
		b = append(b, n.sent, n.received, byte(n.color.epoch), byte(g.epoch), byte(len(n.plan)), n.micro, byte(n.begun), n.snap[0], n.snap[1])
		q(n.tx)
		q(n.rx)
		q(n.punt)
		q(n.out)
		b = append(b, byte(len(g.held)))
		for _, f := range g.held {
			one(f.Ref)
		}
		b = append(b, n.chans[:]...)
		if !w.r.reorder {
			for s := range maxNodes {
				b = append(b, byte(n.inOrder[s]), byte(n.viaGate[s]))
			}
		}
	}
	for a := range maxNodes {
		h := &w.hosts[a]
		flag(h.alive, h.detected, h.polling, h.half, h.polling && h.poll.Round == w.coord.drain.round, h.prepare != nil)
		b = append(b, h.counted, h.early, byte(len(h.down)))
		flag(h.obeys, h.cut != "")
		b = append(b, byte(len(h.stale)))
		for _, e := range slices.Concat(h.down, h.stale) {
			switch e := e.(type) {
			case SendPrepare:
				b = append(b, 'p', e.Cut[len(e.Cut)-1])
			case SendCut:
				b = append(b, 'c')
			case SendPoll:
				b = append(b, 'r')
				flag(e.Round == w.coord.drain.round)
			case SendCollect:
				b = append(b, 'l')
			case SendCommit:
				b = append(b, 'm', e.Cut[len(e.Cut)-1])
			case SendAbort:
				b = append(b, 'a', e.Cut[len(e.Cut)-1])
			}
		}
		for x := range maxNodes {
			b = append(b, h.sent[x][:]...)
			b = append(b, h.received[x][:]...)
		}
		b = append(b, h.copied[:]...)
		b = append(b, h.seen[:]...)
		for _, c := range h.round1 {
			b = append(b, byte(c.Sent), byte(c.Received))
		}
		for x := range maxNodes {
			q(w.net[a][x])
		}
	}
	flag(w.seal != nil, w.visible == w.cut(), w.noted != Note{}, w.noted.Ordered)
	b = append(b, byte(w.settled), byte(len(w.members)), byte(w.crashes), byte(len(w.todo)))
	for _, e := range w.todo {
		switch e.(type) {
		case Note:
			b = append(b, 'n')
		case Seal:
			b = append(b, 's')
		case Done:
			b = append(b, 'd')
		default:
			b = append(b, 'o', hostOfEffect(e)[0])
		}
	}
	b = append(b, byte(w.begun), byte(w.ended), byte(w.frames), w.left, w.placed, w.lost, w.astray)
	for id := range w.frames {
		b = append(b, w.src[id], w.dst[id], byte(w.stamp[id]))
	}
	b = append(b, byte(w.losses), byte(w.deaths), byte(w.cancels), byte(w.failures), byte(min(w.timeouts, w.r.timeouts)))
	return append(b, w.asKey...)
}

func (c *Coordinator) key(b []byte, now time.Duration) []byte {
	b = append(b, byte(c.phase), byte(c.epoch), byte(c.to), byte(c.drain.state))
	names := func(s set) {
		b = append(b, strings.Join(slices.Sorted(maps.Keys(s)), "")...)
		b = append(b, 0)
	}
	names(newSet(maps.Keys(c.hosts)))
	names(c.waiting)
	names(c.unstored)
	counts := func(m map[Channel]ChannelCount) {
		if m == nil {
			b = append(b, 255)
			return
		}
		for x := range maxNodes * maxNodes {
			n := m[Channel{hostName(x / maxNodes), hostName(x % maxNodes), "lan"}]
			b = append(b, byte(n.Sent), byte(n.Received))
		}
	}
	if c.phase == PhaseDrain {
		counts(c.drain.counts)
		counts(c.drain.before)
		b = append(b, byte(min(now-c.drain.since, exploreTiming.Quiet)))
	}
	if c.phase == PhaseIdle || c.phase == PhasePrepare {
		b = append(b, byte(max(0, c.settled-now)))
	}
	if c.phase == PhaseCommit || c.phase == PhaseAbort {
		b = append(b, byte(c.deadline-now), byte(c.retry-now))
	}
	b = append(b, byte(bits.Len(uint(len(c.drain.lost)))))
	return b
}
