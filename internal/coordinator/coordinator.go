// Package coordinator drives the cuts of one slice: it feeds the cut package's
// state machine with what the hosts report and the clock says, and carries its
// effects to the hosts and to the store.
package coordinator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"violin/internal/agent"
	"violin/internal/cut"
	"violin/internal/hypervisor/qemu"
)

// ErrAborted is wrapped in the error of a cut that was given up: the nodes run
// on, and no frame was lost by it.
var ErrAborted = errors.New("the cut was aborted; the nodes run on")

// ErrHostLost: a host went down or did not answer at the end of an earlier cut. It is
// of the slice no more, and without its nodes no snapshot of the slice is whole.
var ErrHostLost = errors.New("a host of the slice was lost; restore the slice from its last snapshot")

// Host is what a coordinator asks of a host: an [agent.Agent], here or far away.
type Host interface {
	// Handle takes an order without waiting; orders of one slice are taken in
	// the order of the calls.
	Handle(o agent.Order, report func(cut.Event))
	Results(slice, id string) (agent.HostResult, error)
	// Now is the host's clock.
	Now(ctx context.Context) (time.Time, error)
}

// noteBound bounds the writing of what is noted.
const noteBound = 30 * time.Second

// Journal is where a coordinator writes down what one that follows it has to know.
type Journal interface {
	// Note writes down where a cut is: before the next orders go out. It must fail for
	// whoever is not the slice's coordinator any more.
	Note(ctx context.Context, n cut.Note, halt bool) error
	// End writes down, instead, where a cut has led to.
	End(ctx context.Context, d cut.Done, halt bool) error
}

// Config is a slice as its coordinator finds it.
type Config struct {
	Slice    string
	Epoch    cut.Epoch
	Hosts    map[string]Host
	Nodes    map[string][]string // by host
	Networks map[uint16]string
	Timing   cut.Timing
	Journal  Journal // nil for a slice that ends with this process
	// Followed says that the slice had a coordinator before; Lost are the hosts that it
	// lost.
	Followed bool
	Lost     []string
	// Passed is told of steps of cuts, for tests, which kill this process there: begin,
	// note, prepare, ordering, ordered, cut, store, drain, collect, seal, sealed, commit,
	// abort, end, ended. Nil for none.
	Passed func(step string)
	Logger *slog.Logger
}

// Coordinator takes the cuts of one slice, one at a time.
type Coordinator struct {
	cfg    Config
	origin time.Time

	mu      sync.Mutex // guards the machine
	machine *cut.Coordinator
	lost    []string // hosts

	resumed []cut.Effect // of a cut that was under way, until [Coordinator.Finish] takes them
}

// New returns the idle coordinator of a slice.
func New(cfg Config) *Coordinator {
	c := assemble(cfg)
	c.machine = cut.NewCoordinator(c.machineConfig())
	return c
}

// Resume returns the coordinator of a slice whose coordinator before was in a cut: noted
// is what that one wrote down last. The slice is busy until [Coordinator.Finish] has ended the cut.
func Resume(cfg Config, noted cut.Note, visible bool) *Coordinator {
	cfg.Followed = true
	c := assemble(cfg)
	c.machine, c.resumed = cut.Resume(time.Since(c.origin), c.machineConfig(), noted, visible)
	return c
}

func assemble(cfg Config) *Coordinator {
	if cfg.Passed == nil {
		cfg.Passed = func(string) {}
	}
	return &Coordinator{cfg: cfg, origin: time.Now(), lost: slices.Clone(cfg.Lost)}
}

func (c *Coordinator) machineConfig() cut.Config {
	return cut.Config{Epoch: c.cfg.Epoch, Hosts: c.cfg.Nodes, Timing: c.cfg.Timing, Followed: c.cfg.Followed}
}

// Finish ends the cut that the coordinator resumed. It returns nil if that is committed,
// and an error with [ErrAborted] if it is aborted, on all hosts that answer in time. If
// ctx ends, it is left to the next coordinator.
func (c *Coordinator) Finish(ctx context.Context, halt bool) error {
	c.mu.Lock()
	effects := c.resumed
	c.resumed = nil
	id := c.machine.Cut()
	c.mu.Unlock()
	r := c.newRun(Cut{ID: id, Halt: halt, Progress: func(_, _, _ string) {}})
	r.resumed = true
	defer close(r.gone)
	return r.loop(ctx, effects)
}

// Cutting tells whether a cut runs.
func (c *Coordinator) Cutting() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.machine.Phase() != cut.PhaseIdle
}

// Epoch is that of the slice's nodes.
func (c *Coordinator) Epoch() cut.Epoch {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.machine.Epoch()
}

// Cut is a snapshot in the making.
type Cut struct {
	ID      string
	Mode    qemu.Mode
	Session agent.Session
	Newer   agent.Newer
	Limits  cut.Limits    // of what each gate holds; zero for the agent's default
	Hold    time.Duration // how long it may; 0 for the default
	// At is the instant at which all nodes are to be cut, by this machine's clock; zero
	// or past for at once. It makes the skew small, and nothing rests on it.
	At time.Time
	// Halt leaves the nodes standing still after a cut that is sealed. After one that is
	// aborted they run.
	Halt bool
	// Seal makes the snapshot visible by one atomic write. Its error aborts the cut.
	Seal func(ctx context.Context, hosts []agent.HostResult, lost []cut.ChannelLoss, drained Drained) error
	// Progress is told what happens, for people; nil for none.
	Progress func(step, node, detail string)
}

// Take runs one cut to its end. It is refused with [cut.ErrBusy] while another
// runs. If ctx ends, the cut is aborted, and Take returns once it is.
func (c *Coordinator) Take(ctx context.Context, req Cut) error {
	c.mu.Lock()
	lost := c.lost
	c.mu.Unlock()
	if len(lost) > 0 {
		return fmt.Errorf("snapshot slice %q: %w: %s", c.cfg.Slice, ErrHostLost, strings.Join(lost, ", "))
	}
	if req.Progress == nil {
		req.Progress = func(_, _, _ string) {}
	}
	r := c.newRun(req)
	defer close(r.gone)
	if err := r.agree(ctx); err != nil {
		return fmt.Errorf("snapshot slice %q: %w", c.cfg.Slice, err)
	}
	effects, err := c.step(cut.Begin{Cut: req.ID, Hold: req.Hold})
	if err != nil {
		return fmt.Errorf("snapshot slice %q: %w", c.cfg.Slice, err)
	}
	return r.loop(ctx, effects)
}

func (c *Coordinator) newRun(req Cut) *run {
	return &run{
		c: c, req: req, witness: newWitness(), events: make(chan cut.Event, 64), gone: make(chan struct{}), told: map[string]bool{},
		log: c.cfg.Logger.With("slice", c.cfg.Slice, "cut", req.ID),
	}
}

func (c *Coordinator) step(ev cut.Event) ([]cut.Effect, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.machine.Step(time.Since(c.origin), ev)
}

// run is one cut being driven.
type run struct {
	c       *Coordinator
	req     Cut
	log     *slog.Logger
	events  chan cut.Event
	gone    chan struct{} // closed when nobody reads events any more
	lost    []cut.ChannelLoss
	sealed  error
	witness *witness
	local   map[string]time.Time // the agreed instant, by host and its clock
	told    map[string]bool      // steps that Passed was told of
	resumed bool                 // from a coordinator before
}

func (r *run) report(ev cut.Event) {
	switch e := ev.(type) {
	case cut.Prepared:
		r.req.Progress("prepare", "", "host "+e.Host+" is ready")
	case cut.NodeCut:
		r.req.Progress("cut", e.Node, "has cut")
	case cut.Stored:
		r.req.Progress("store", e.Node, "state stored")
	}
	select {
	case r.events <- ev:
	case <-r.gone:
	}
}

func (r *run) loop(ctx context.Context, effects []cut.Effect) error {
	cancelled := ctx.Done()
	for {
		done, err := r.apply(ctx, effects)
		if done {
			return err
		}
		var timer <-chan time.Time
		r.c.mu.Lock()
		deadline, ok := r.c.machine.Deadline()
		r.c.mu.Unlock()
		if ok {
			timer = time.After(deadline - time.Since(r.c.origin))
		}
		var ev cut.Event
		select {
		case ev = <-r.events:
		case <-timer:
			ev = cut.Tick{}
		case <-cancelled:
			if r.resumed {
				return ctx.Err()
			}
			cancelled = nil
			ev = cut.Cancel{Cut: r.req.ID, Reason: "cancelled"}
		}
		r.passed(ev)
		r.witness.event(ev)
		if r.log.Enabled(ctx, slog.LevelDebug) { // there are thousands, and to print one costs more than to take it in
			r.log.DebugContext(ctx, "event", "event", fmt.Sprintf("%T%+v", ev, ev))
		}
		if effects, err = r.c.step(ev); err != nil {
			r.log.Error("event refused", "event", fmt.Sprintf("%T", ev), "err", err)
		}
	}
}

// apply carries the effects out, in order. It tells whether the cut has ended.
func (r *run) apply(ctx context.Context, effects []cut.Effect) (bool, error) {
	for _, ef := range effects {
		switch e := ef.(type) {
		case cut.Note:
			if err := r.note(ctx, e); err != nil {
				r.log.Error("what the cut has come to cannot be noted", "err", err)
				instead, stepErr := r.c.step(cut.NoteFailed{Cut: e.Cut, Reason: err.Error()})
				if stepErr != nil {
					return true, stepErr
				}
				return r.apply(ctx, instead) // and not what follows
			}
		case cut.Seal:
			r.lost = e.Lost
			r.req.Progress("seal", "", "")
			drained := r.witness.drained(r.c.machine.Timing().Quiet)
			go func() { r.report(r.seal(ctx, drained)) }()
		case cut.Done:
			if len(e.Left) > 0 {
				r.log.Error("hosts were lost", "hosts", e.Left)
				r.c.mu.Lock()
				r.c.lost = append(r.c.lost, e.Left...)
				r.c.mu.Unlock()
			}
			r.end(ctx, e)
			if e.Outcome == cut.OutcomeCommitted {
				return true, nil
			}
			err := fmt.Errorf("snapshot slice %q: %w: %s", r.c.cfg.Slice, ErrAborted, e.Reason)
			if r.sealed != nil {
				err = fmt.Errorf("%w: %w", err, r.sealed)
			}
			return true, err
		default:
			r.send(ef)
		}
	}
	return false, nil
}

// note writes down where the cut is. It is not given up for being cancelled: that is an
// event, and comes next.
func (r *run) note(ctx context.Context, n cut.Note) error {
	before, after := "begin", "note"
	if n.Ordered {
		before, after = "ordering", "ordered"
	}
	r.c.cfg.Passed(before)
	if r.c.cfg.Journal != nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), noteBound)
		defer cancel()
		if err := r.c.cfg.Journal.Note(ctx, n, r.req.Halt); err != nil {
			return err
		}
	}
	r.c.cfg.Passed(after)
	return nil
}

// end writes down where the cut has led to. If it cannot be, whoever follows ends the cut
// once more, to the same effect.
func (r *run) end(ctx context.Context, d cut.Done) {
	r.c.cfg.Passed("end")
	if r.c.cfg.Journal != nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), noteBound)
		defer cancel()
		if err := r.c.cfg.Journal.End(ctx, d, r.req.Halt); err != nil {
			r.log.Error("the end of a cut cannot be noted", "err", err)
		}
	}
	r.c.cfg.Passed("ended")
}

// passed tells of the first answer to each kind of order.
func (r *run) passed(ev cut.Event) {
	step := ""
	switch ev.(type) {
	case cut.Prepared:
		step = "prepare"
	case cut.NodeCut:
		step = "cut"
	case cut.Stored:
		step = "store"
	case cut.Counters:
		step = "drain"
	case cut.Collected:
		step = "collect"
	case cut.Sealed:
		step = "sealed"
	case cut.Committed:
		step = "commit"
	case cut.Aborted:
		step = "abort"
	}
	if step != "" && !r.told[step] {
		r.told[step] = true
		r.c.cfg.Passed(step)
	}
}

func (r *run) send(ef cut.Effect) {
	r.witness.effect(ef)
	host := hostOf(ef)
	h := r.c.cfg.Hosts[host]
	if h == nil {
		r.log.Error("an order for a host that is none of the slice's", "host", host)
		return
	}
	h.Handle(agent.Order{
		Slice: r.c.cfg.Slice, Networks: r.c.cfg.Networks, Effect: ef, Mode: r.req.Mode, Session: r.req.Session,
		Newer: r.req.Newer, Limits: r.req.Limits, At: r.local[host], Halt: r.req.Halt,
	}, r.report)
}

func hostOf(ef cut.Effect) string {
	switch e := ef.(type) {
	case cut.SendPrepare:
		return e.Host
	case cut.SendCut:
		return e.Host
	case cut.SendPoll:
		return e.Host
	case cut.SendCollect:
		return e.Host
	case cut.SendCommit:
		return e.Host
	case cut.SendAbort:
		return e.Host
	}
	return ""
}

func (r *run) seal(ctx context.Context, drained Drained) cut.Event {
	var all []agent.HostResult
	for host := range r.c.cfg.Nodes {
		result, err := r.c.cfg.Hosts[host].Results(r.c.cfg.Slice, r.req.ID)
		if err != nil {
			r.sealed = err
			return cut.SealFailed{Cut: r.req.ID, Reason: err.Error()}
		}
		all = append(all, result)
	}
	r.c.cfg.Passed("seal")
	if err := r.req.Seal(ctx, all, r.lost, drained); err != nil {
		r.sealed = err
		return cut.SealFailed{Cut: r.req.ID, Reason: err.Error()}
	}
	return cut.Sealed{Cut: r.req.ID}
}
