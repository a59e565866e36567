package cut

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"
)

// What [Coordinator.Step] refuses.
var (
	// ErrBusy: a cut runs. Wait for its Done.
	ErrBusy = errors.New("a cut of this slice is running: wait until it has ended")
	// ErrNoNodes: there is nothing to cut.
	ErrNoNodes = errors.New("the slice has no nodes")
	// ErrCutID: the cut's name cannot tell its answers from another's.
	ErrCutID = errors.New("the cut needs a name of its own")
	// ErrMember: a node joins twice, or leaves without having joined.
	ErrMember = errors.New("not possible with the slice's members")
)

// Phase is where a cut stands.
type Phase uint8

// The phases, in the order of a cut that succeeds; PhaseAbort can follow on any
// but PhaseIdle and PhaseCommit.
const (
	PhaseIdle    Phase = iota
	PhasePrepare       // hosts get ready; every node is in the old epoch
	PhaseCut           // nodes go over to the new epoch, each at its own instant
	PhaseDrain         // all are in the new epoch; old frames arrive, states are stored
	PhaseSeal          // the snapshot is being made visible
	PhaseCommit        // it is; hosts tidy up
	PhaseAbort         // nodes are brought into one epoch
)

var phaseNames = [...]string{"idle", "prepare", "cut", "drain", "seal", "commit", "abort"}

func (p Phase) String() string {
	if int(p) >= len(phaseNames) {
		return fmt.Sprintf("phase(%d)", uint8(p))
	}
	return phaseNames[p]
}

// Config is a slice as a [Coordinator] finds it.
type Config struct {
	Epoch  Epoch               // of all nodes
	Hosts  map[string][]string // the slice's nodes by host; a node's name is unique in the slice
	Timing Timing
	// Followed says that the slice had another coordinator before, which may have aborted a
	// cut just now: the first cut waits for the quiet time.
	Followed bool
}

// Coordinator takes the nodes of one slice from cut to cut. It lives as long as
// the slice does.
//
// Step takes an event and returns what is to be done; the time is an argument,
// so that a Coordinator has no clock. It is not safe for concurrent use.
type Coordinator struct {
	timing Timing
	epoch  Epoch
	hosts  map[string][]string // nodes by host, sorted

	phase    Phase
	last     string        // the cut before this one
	settled  time.Duration // no frame from before the last abort is under way any more
	cut      string        // the running cut
	to       Epoch         // where it leads
	hold     time.Duration // bound of PhaseCut
	deadline time.Duration // of the phase
	waiting  set           // hosts, in PhaseCut nodes, that the phase waits for
	unstored set           // nodes whose state is not stored yet
	left     set           // hosts that were left out in this cut
	drain    drain
	retry    time.Duration // next repetition of a commit or abort
	reason   string        // of the abort
	unnoted  bool          // what was noted may be that an abort leads elsewhere
}

type set map[string]struct{}

// NewCoordinator returns the idle coordinator of a slice. A host without nodes
// is none of the slice's.
func NewCoordinator(cfg Config) *Coordinator {
	c := &Coordinator{timing: cfg.Timing.withDefaults(), epoch: cfg.Epoch, hosts: map[string][]string{}}
	for h, nodes := range cfg.Hosts {
		if len(nodes) > 0 {
			c.hosts[h] = slices.Sorted(slices.Values(nodes))
		}
	}
	if cfg.Followed {
		c.settled = c.timing.Quiet
	}
	return c
}

// Resume returns the coordinator of a slice whose coordinator before it died, or was
// followed, in a cut: noted is what that one had noted last, and cfg.Epoch what the cut
// began in. The effects end the cut on all hosts, wherever they are in it: by a commit if
// the snapshot is visible, and else by an abort. Nothing can make it visible any more.
//
// All that has to be known is in what was noted before the first order to prepare, and
// before the first to cut. The rest, repetitions included, is the same whoever orders it.
func Resume(now time.Duration, cfg Config, noted Note, visible bool) (*Coordinator, []Effect) {
	cfg.Followed = true
	c := NewCoordinator(cfg)
	c.settled += now
	c.cut, c.last, c.to, c.left = noted.Cut, noted.Cut, noted.To, set{}
	var effects []Effect
	switch {
	case visible:
		effects = c.enter(now, PhaseCommit)
		effects = append(effects, c.advance(now)...)
	case noted.Ordered:
		c.phase = PhaseCut
		effects = c.abort(now, "its coordinator died")
	default:
		c.phase = PhasePrepare
		effects = c.abort(now, "its coordinator died")
	}
	if c.phase != PhaseIdle {
		c.deadline = now + c.timing.Return
	}
	return c, effects
}

func (t Timing) withDefaults() Timing {
	return Timing{
		Prepare: cmp.Or(t.Prepare, 30*time.Second),
		Cut:     cmp.Or(t.Cut, 10*time.Second),
		Store:   cmp.Or(t.Store, 10*time.Minute),
		Ack:     cmp.Or(t.Ack, 30*time.Second),
		Retry:   cmp.Or(t.Retry, time.Second),
		Return:  cmp.Or(t.Return, time.Minute),
		Poll:    cmp.Or(t.Poll, 20*time.Millisecond),
		Quiet:   cmp.Or(t.Quiet, time.Second),
	}
}

// Phase returns where the running cut stands, PhaseIdle if none runs.
func (c *Coordinator) Phase() Phase { return c.phase }

// Timing returns how long the coordinator waits, defaults filled in.
func (c *Coordinator) Timing() Timing { return c.timing }

// Cut returns the name of the running cut, "" if none runs.
func (c *Coordinator) Cut() string { return c.cut }

// Epoch returns the epoch that all nodes are in; while a cut runs, the one they were in when it began.
func (c *Coordinator) Epoch() Epoch { return c.epoch }

// Waiting returns, sorted, the hosts that the running phase waits for, in
// PhaseCut the nodes: what to tell someone who wonders why a cut takes long.
func (c *Coordinator) Waiting() []string {
	if c.phase == PhaseDrain && len(c.waiting) == 0 {
		return slices.Sorted(maps.Keys(c.unstored))
	}
	return slices.Sorted(maps.Keys(c.waiting))
}

// Deadline returns the time at which a Tick is wanted next; false if none is.
func (c *Coordinator) Deadline() (time.Duration, bool) {
	switch c.phase {
	case PhasePrepare:
		if len(c.waiting) == 0 {
			return c.settled, true
		}
		return c.deadline, true
	case PhaseCut:
		return c.deadline, true
	case PhaseDrain:
		if c.drain.state == drainWaiting {
			return min(c.deadline, c.drain.next), true
		}
		return c.deadline, true
	case PhaseCommit, PhaseAbort:
		return min(c.deadline, c.retry), true
	default:
		return 0, false
	}
}

// Step takes in what happened at a time, measured from any one origin and never
// falling, and returns what is to be done about it, in a fixed order. An error
// refuses the request that the event is; nothing has changed then.
func (c *Coordinator) Step(now time.Duration, ev Event) ([]Effect, error) {
	switch ev := ev.(type) {
	case Begin:
		return c.begin(now, ev)
	case Join:
		return nil, c.join(ev)
	case Leave:
		return nil, c.leave(ev)
	case HostDown:
		return c.hostDown(now, ev), nil
	case Tick:
		return c.tick(now), nil
	case Prepared:
		if c.answers(ev.Cut, PhasePrepare) {
			return c.done(now, ev.Host), nil
		}
	case NodeCut:
		if c.answers(ev.Cut, PhaseCut) {
			return c.done(now, ev.Node), nil
		}
	case Stored:
		if c.answers(ev.Cut, PhaseCut, PhaseDrain) {
			delete(c.unstored, ev.Node)
			return c.advance(now), nil
		}
	case Counters:
		if c.answers(ev.Cut, PhaseDrain) {
			return c.counters(now, ev), nil
		}
	case Collected:
		if c.answers(ev.Cut, PhaseDrain) && c.drain.state == drainCollecting {
			return c.done(now, ev.Host), nil
		}
	case Sealed:
		if c.answers(ev.Cut, PhaseSeal) {
			effects := c.enter(now, PhaseCommit)
			return append(effects, c.advance(now)...), nil // at once if no host is left
		}
	case SealFailed:
		if c.answers(ev.Cut, PhaseSeal) {
			return c.abort(now, "seal: "+ev.Reason), nil
		}
	case Committed:
		if c.answers(ev.Cut, PhaseCommit) {
			return c.done(now, ev.Host), nil
		}
	case Aborted:
		if c.answers(ev.Cut, PhaseAbort) {
			return c.done(now, ev.Host), nil
		}
	case Failed:
		if c.answers(ev.Cut, PhasePrepare, PhaseCut, PhaseDrain) {
			who := "host " + ev.Host
			if ev.Node != "" {
				who = "node " + ev.Node
			}
			return c.abort(now, fmt.Sprintf("%s: %s: %s", c.phase, who, ev.Reason)), nil
		}
	case NoteFailed:
		return c.noteFailed(now, ev), nil
	case Cancel:
		if c.answers(ev.Cut, PhasePrepare, PhaseCut, PhaseDrain) {
			return c.abort(now, ev.Reason), nil
		}
	}
	return nil, nil
}

// answers tells whether something about the cut is of interest now.
func (c *Coordinator) answers(cut string, phases ...Phase) bool {
	return cut == c.cut && slices.Contains(phases, c.phase)
}

func (c *Coordinator) begin(now time.Duration, ev Begin) ([]Effect, error) {
	switch {
	case c.phase != PhaseIdle:
		return nil, fmt.Errorf("begin cut %q while %q is in its %s phase: %w", ev.Cut, c.cut, c.phase, ErrBusy)
	case len(c.hosts) == 0:
		return nil, fmt.Errorf("begin cut %q: %w", ev.Cut, ErrNoNodes)
	case ev.Cut == "" || ev.Cut == c.last:
		return nil, fmt.Errorf("begin cut %q after %q: %w", ev.Cut, c.last, ErrCutID)
	}
	c.cut, c.last = ev.Cut, ev.Cut
	c.to = c.epoch.Next()
	c.hold = cmp.Or(ev.Hold, c.timing.Cut)
	c.reason = ""
	c.left = set{}
	c.drain = drain{}
	return c.enter(now, PhasePrepare), nil
}

// enter begins a phase: what it asks for, of whom, and until when.
func (c *Coordinator) enter(now time.Duration, p Phase) []Effect {
	c.phase = p
	switch p {
	case PhasePrepare:
		c.deadline = now + c.timing.Prepare
		c.waiting = newSet(maps.Keys(c.hosts))
		return append([]Effect{Note{Cut: c.cut, To: c.to}}, c.each(func(h string) Effect {
			return SendPrepare{Cut: c.cut, Host: h, From: c.epoch, To: c.to}
		})...)
	case PhaseCut:
		c.deadline = now + c.hold
		c.waiting = set{}
		for _, nodes := range c.hosts {
			for _, n := range nodes {
				c.waiting[n] = struct{}{}
			}
		}
		c.unstored = maps.Clone(c.waiting)
		return append([]Effect{Note{Cut: c.cut, To: c.to, Ordered: true}}, c.each(func(h string) Effect {
			return SendCut{Cut: c.cut, Host: h, Nodes: slices.Clone(c.hosts[h]), To: c.to}
		})...)
	case PhaseDrain:
		// Only now may counters be read: what is counted as sent in the old epoch
		// has stopped growing, on every host.
		c.deadline = now + c.timing.Store
		return c.poll()
	case PhaseSeal:
		return []Effect{Seal{Cut: c.cut, Lost: slices.Clone(c.drain.lost)}}
	default: // PhaseCommit, PhaseAbort
		c.deadline = now + c.timing.Ack
		c.waiting = newSet(maps.Keys(c.hosts))
		return c.tell(now)
	}
}

// done takes an answer, of a host or in PhaseCut of a node, off what the phase waits for.
func (c *Coordinator) done(now time.Duration, who string) []Effect {
	if _, ok := c.waiting[who]; !ok {
		return nil
	}
	delete(c.waiting, who)
	return c.advance(now)
}

// advance goes on when nothing is waited for any more.
func (c *Coordinator) advance(now time.Duration) []Effect {
	if len(c.waiting) > 0 {
		return nil
	}
	switch c.phase {
	case PhasePrepare:
		// An aborted cut has not drained its channels. What it left under way would
		// be of an epoch that this cut's counters know nothing of.
		if now >= c.settled {
			return c.enter(now, PhaseCut)
		}
	case PhaseCut:
		return c.enter(now, PhaseDrain)
	case PhaseDrain:
		if c.drain.state == drainCollecting && len(c.unstored) == 0 {
			return c.enter(now, PhaseSeal)
		}
	case PhaseCommit, PhaseAbort:
		return c.end(now)
	}
	return nil
}

// abort gives the cut up. While no node can have been cut all stay where they
// are; after that all go over, since to recolour a node without a capture harms
// nothing, and to take a colour back would let one colour mean two things.
func (c *Coordinator) abort(now time.Duration, reason string) []Effect {
	c.reason = reason
	if c.phase == PhasePrepare {
		c.to = c.epoch
	}
	effects := c.enter(now, PhaseAbort)
	return append(effects, c.advance(now)...) // at once if no host is left
}

// tell sends the outcome to the hosts that have not answered it yet.
func (c *Coordinator) tell(now time.Duration) []Effect {
	c.retry = now + c.timing.Retry
	var effects []Effect
	if c.unnoted {
		c.unnoted = false
		effects = append(effects, Note{Cut: c.cut, To: c.epoch.Next()})
	}
	for _, h := range slices.Sorted(maps.Keys(c.waiting)) {
		if c.phase == PhaseCommit {
			effects = append(effects, SendCommit{Cut: c.cut, Host: h})
		} else {
			effects = append(effects, SendAbort{Cut: c.cut, Host: h, To: c.to})
		}
	}
	return effects
}

// noteFailed goes on without the orders that were to follow on what could not be noted.
// Whether it is noted is not known.
func (c *Coordinator) noteFailed(now time.Duration, ev NoteFailed) []Effect {
	if ev.Cut != c.cut {
		return nil
	}
	switch c.phase {
	case PhasePrepare: // no host has heard of the cut
		c.reason, c.to, c.phase = "note: "+ev.Reason, c.epoch, PhaseAbort
		return c.end(now)
	case PhaseCut:
		// No node has been cut, so all may stay where they are. But who comes after this
		// coordinator must not believe otherwise, once the first has been told to.
		c.unnoted, c.phase = true, PhasePrepare
		return c.abort(now, "note: "+ev.Reason)
	case PhaseAbort:
		c.unnoted = true
		c.retry, c.deadline = now+c.timing.Retry, now+c.timing.Ack
	}
	return nil
}

func (c *Coordinator) end(now time.Duration) []Effect {
	if c.phase == PhaseAbort && c.epoch != c.to {
		c.settled = now + c.timing.Quiet
	}
	c.epoch = c.to
	d := Done{
		Cut: c.cut, Outcome: OutcomeCommitted, Epoch: c.epoch,
		Lost: c.drain.lost, Left: slices.Sorted(maps.Keys(c.left)),
	}
	if c.phase == PhaseAbort {
		d.Outcome, d.Reason, d.Lost = OutcomeAborted, c.reason, nil
	}
	c.phase, c.cut = PhaseIdle, ""
	c.waiting, c.unstored, c.left, c.drain, c.unnoted = nil, nil, nil, drain{}, false
	return []Effect{d}
}

func (c *Coordinator) tick(now time.Duration) []Effect {
	due := now >= c.deadline
	switch c.phase {
	case PhasePrepare, PhaseCut:
		if len(c.waiting) == 0 {
			return c.advance(now)
		}
		if due {
			return c.abort(now, fmt.Sprintf("%s: no answer in time from %v", c.phase, c.Waiting()))
		}
	case PhaseDrain:
		if due {
			return c.abort(now, fmt.Sprintf("%s: not done in time: %v", c.phase, c.Waiting()))
		}
		if c.drain.state == drainWaiting && now >= c.drain.next {
			return c.poll()
		}
	case PhaseCommit, PhaseAbort:
		if due {
			// They may run on, unheard; whoever reads Left must see to it that they
			// no longer speak for the slice.
			var effects []Effect
			for _, h := range c.Waiting() {
				effects = append(effects, c.leaveOut(now, h)...)
			}
			return effects
		}
		if now >= c.retry {
			return c.tell(now)
		}
	}
	return nil
}

// hostDown goes on without a host: with the cut if the snapshot needs nothing
// more from it, else with an abort.
func (c *Coordinator) hostDown(now time.Duration, ev HostDown) []Effect {
	if !c.member(ev.Host) {
		return nil
	}
	phase := c.phase
	effects := c.leaveOut(now, ev.Host)
	switch phase {
	case PhasePrepare, PhaseCut, PhaseDrain:
		return c.abort(now, fmt.Sprintf("%s: host %s is down: %s", phase, ev.Host, ev.Reason))
	default:
		return effects
	}
}

// leaveOut drops a host from the slice, and in the last phases goes on without its answer.
func (c *Coordinator) leaveOut(now time.Duration, host string) []Effect {
	delete(c.hosts, host)
	if c.phase == PhaseIdle {
		return nil
	}
	c.left[host] = struct{}{}
	if c.phase == PhaseCommit || c.phase == PhaseAbort {
		return c.done(now, host)
	}
	return nil
}

func (c *Coordinator) join(ev Join) error {
	switch {
	case c.phase != PhaseIdle:
		return fmt.Errorf("join node %q: cut %q is in its %s phase: %w", ev.Node, c.cut, c.phase, ErrBusy)
	case ev.Node == "" || ev.Host == "":
		return fmt.Errorf("join node %q on host %q: both need a name: %w", ev.Node, ev.Host, ErrMember)
	}
	for h, nodes := range c.hosts {
		if slices.Contains(nodes, ev.Node) {
			return fmt.Errorf("join node %q on host %q: it is on host %q already: %w", ev.Node, ev.Host, h, ErrMember)
		}
	}
	c.hosts[ev.Host] = append(c.hosts[ev.Host], ev.Node)
	slices.Sort(c.hosts[ev.Host])
	return nil
}

func (c *Coordinator) leave(ev Leave) error {
	if c.phase != PhaseIdle {
		return fmt.Errorf("remove node %q: cut %q is in its %s phase: %w", ev.Node, c.cut, c.phase, ErrBusy)
	}
	for h, nodes := range c.hosts {
		if i := slices.Index(nodes, ev.Node); i >= 0 {
			c.hosts[h] = slices.Delete(nodes, i, i+1)
			if len(c.hosts[h]) == 0 {
				delete(c.hosts, h)
			}
			return nil
		}
	}
	return fmt.Errorf("remove node %q: no host has it: %w", ev.Node, ErrMember)
}

func (c *Coordinator) member(host string) bool {
	_, ok := c.hosts[host]
	return ok
}

// each makes one effect for every host, by name.
func (c *Coordinator) each(f func(host string) Effect) []Effect {
	var effects []Effect
	for _, h := range slices.Sorted(maps.Keys(c.hosts)) {
		effects = append(effects, f(h))
	}
	return effects
}

func newSet(names func(yield func(string) bool)) set {
	s := set{}
	for n := range names {
		s[n] = struct{}{}
	}
	return s
}
