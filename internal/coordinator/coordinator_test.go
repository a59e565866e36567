package coordinator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"violin/internal/agent"
	"violin/internal/cut"
)

// host answers each order as an agent does, but for what a test makes of it.
type host struct {
	name  string
	nodes []string
	ahead time.Duration // of its clock

	// answer changes the answers to an order; nil leaves them.
	answer func(effect cut.Effect, answers []cut.Event) []cut.Event

	mu     sync.Mutex
	orders []agent.Order
}

func (h *host) Handle(o agent.Order, report func(cut.Event)) {
	h.mu.Lock()
	h.orders = append(h.orders, o)
	h.mu.Unlock()
	var answers []cut.Event
	switch e := o.Effect.(type) {
	case cut.SendPrepare:
		answers = append(answers, cut.Prepared{Cut: e.Cut, Host: h.name})
	case cut.SendCut:
		for _, n := range e.Nodes {
			answers = append(answers, cut.NodeCut{Cut: e.Cut, Node: n}, cut.Stored{Cut: e.Cut, Node: n})
		}
	case cut.SendPoll:
		answers = append(answers, cut.Counters{Cut: e.Cut, Host: h.name, Round: e.Round})
	case cut.SendCollect:
		answers = append(answers, cut.Collected{Cut: e.Cut, Host: h.name})
	case cut.SendCommit:
		answers = append(answers, cut.Committed{Cut: e.Cut, Host: h.name})
	case cut.SendAbort:
		answers = append(answers, cut.Aborted{Cut: e.Cut, Host: h.name})
	}
	if h.answer != nil {
		answers = h.answer(o.Effect, answers)
	}
	go func() {
		for _, ev := range answers {
			report(ev)
		}
	}()
}

func (h *host) Results(_, id string) (agent.HostResult, error) {
	if id == "" {
		return agent.HostResult{}, errors.New("no such cut")
	}
	return agent.HostResult{Host: h.name}, nil
}

func (h *host) Now(context.Context) (time.Time, error) { return time.Now().Add(h.ahead), nil }

func newCoordinator() (*Coordinator, *host, *host) {
	a, b := &host{name: "a", nodes: []string{"x", "y"}}, &host{name: "b", nodes: []string{"z"}}
	return New(Config{
		Slice: "s", Epoch: 255, Hosts: map[string]Host{"a": a, "b": b}, Nodes: map[string][]string{"a": a.nodes, "b": b.nodes},
		Networks: map[uint16]string{1: "lan"}, Logger: slog.New(slog.DiscardHandler),
		Timing: cut.Timing{Poll: time.Millisecond, Quiet: 10 * time.Millisecond, Retry: 10 * time.Millisecond, Ack: 100 * time.Millisecond, Prepare: 200 * time.Millisecond},
	}), a, b
}

// take takes a cut, and tells what Seal was given.
func take(ctx context.Context, c *Coordinator, id string) (sealed []agent.HostResult, err error) {
	err = c.Take(ctx, Cut{ID: id, Seal: func(_ context.Context, hosts []agent.HostResult, _ []cut.ChannelLoss, d Drained) error {
		if len(d.Heard) != 3 || len(d.Rounds) < 2 {
			return fmt.Errorf("the witness heard %v and saw %d rounds", d.Heard, len(d.Rounds))
		}
		sealed = hosts
		return nil
	}})
	return sealed, err
}

func TestTake(t *testing.T) {
	c, a, b := newCoordinator()
	for i := range 3 { // the first over the wrap of the epochs
		sealed, err := take(t.Context(), c, fmt.Sprint("cut", i))
		if err != nil || len(sealed) != 2 {
			t.Fatalf("%v, %v", sealed, err)
		}
		if want := cut.Epoch(i); c.Epoch() != want || c.Cutting() {
			t.Errorf("epoch %d, want %d; cutting %t", c.Epoch(), want, c.Cutting())
		}
	}
	for _, h := range []*host{a, b} {
		kinds := ""
		for _, o := range h.orders {
			kinds += strings.TrimPrefix(fmt.Sprintf("%T ", o.Effect), "cut.Send")
		}
		if n := strings.Count(kinds, "Prepare Cut Poll Poll "); n != 3 || strings.Count(kinds, "Collect Commit ") != 3 {
			t.Errorf("host %s was ordered %s", h.name, kinds)
		}
	}
}

func TestAborted(t *testing.T) {
	fails := func(effect cut.Effect, host string) cut.Event {
		switch e := effect.(type) {
		case cut.SendPrepare:
			return cut.Failed{Cut: e.Cut, Host: host, Reason: "no room"}
		case cut.SendCut:
			return cut.Failed{Cut: e.Cut, Host: host, Node: "z", Reason: "no room"}
		case cut.SendPoll:
			return cut.Failed{Cut: e.Cut, Host: host, Reason: "no room"}
		case cut.SendCollect:
			return cut.Failed{Cut: e.Cut, Host: host, Reason: "no room"}
		}
		return nil
	}
	for _, test := range []struct {
		at   cut.Effect
		gone cut.Epoch // where all nodes are then
	}{{cut.SendPrepare{}, 255}, {cut.SendCut{}, 0}, {cut.SendPoll{}, 0}, {cut.SendCollect{}, 0}} {
		t.Run(fmt.Sprintf("%T", test.at), func(t *testing.T) {
			c, _, b := newCoordinator()
			b.answer = func(effect cut.Effect, answers []cut.Event) []cut.Event {
				if fmt.Sprintf("%T", effect) == fmt.Sprintf("%T", test.at) {
					return []cut.Event{fails(effect, "b")}
				}
				return answers
			}
			sealed, err := take(t.Context(), c, "c")
			if !errors.Is(err, ErrAborted) || !strings.Contains(err.Error(), "no room") || sealed != nil {
				t.Errorf("sealed %v, %v", sealed, err)
			}
			if c.Epoch() != test.gone || c.Cutting() {
				t.Errorf("epoch %d, want %d", c.Epoch(), test.gone)
			}
			b.answer = nil
			if _, err := take(t.Context(), c, "d"); err != nil {
				t.Errorf("the next cut: %v", err)
			}
		})
	}
}

func TestSealFails(t *testing.T) {
	c, _, _ := newCoordinator()
	full := errors.New("the disk is full")
	err := c.Take(t.Context(), Cut{ID: "c", Seal: func(context.Context, []agent.HostResult, []cut.ChannelLoss, Drained) error { return full }})
	if !errors.Is(err, ErrAborted) || !errors.Is(err, full) {
		t.Error(err)
	}
}

func TestCancelled(t *testing.T) {
	c, a, _ := newCoordinator()
	ctx, cancel := context.WithCancel(t.Context())
	a.answer = func(effect cut.Effect, answers []cut.Event) []cut.Event {
		if _, ok := effect.(cut.SendPrepare); ok {
			cancel()
			return nil
		}
		return answers
	}
	if _, err := take(ctx, c, "c"); !errors.Is(err, ErrAborted) {
		t.Error(err)
	}
	if c.Cutting() {
		t.Error("Take returned before the abort had ended")
	}
}

func TestBusy(t *testing.T) {
	c, a, _ := newCoordinator()
	entered, release := make(chan struct{}), make(chan struct{})
	a.answer = func(effect cut.Effect, answers []cut.Event) []cut.Event {
		if _, ok := effect.(cut.SendPrepare); ok {
			close(entered)
			<-release
		}
		return answers
	}
	done := make(chan error)
	go func() {
		_, err := take(t.Context(), c, "c")
		done <- err
	}()
	<-entered
	if _, err := take(t.Context(), c, "d"); !errors.Is(err, cut.ErrBusy) {
		t.Error(err)
	}
	close(release)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// A host that never answers is given up; without it there are no more snapshots.
func TestHostLost(t *testing.T) {
	c, _, b := newCoordinator()
	b.answer = func(cut.Effect, []cut.Event) []cut.Event { return nil }
	if _, err := take(t.Context(), c, "c"); !errors.Is(err, ErrAborted) {
		t.Error(err)
	}
	if _, err := take(t.Context(), c, "d"); !errors.Is(err, ErrHostLost) || !strings.HasSuffix(err.Error(), ": b") {
		t.Error(err)
	}
}

// An agreed instant is the same for all hosts, each by its own clock.
func TestAgreedInstant(t *testing.T) {
	c, a, b := newCoordinator()
	a.ahead, b.ahead = time.Hour, -time.Minute
	at := time.Now().Add(50 * time.Millisecond)
	err := c.Take(t.Context(), Cut{ID: "c", At: at, Seal: func(context.Context, []agent.HostResult, []cut.ChannelLoss, Drained) error { return nil }})
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range []*host{a, b} {
		for _, o := range h.orders {
			if _, ok := o.Effect.(cut.SendCut); !ok {
				continue
			}
			if off := o.At.Add(-h.ahead).Sub(at).Abs(); off > time.Second {
				t.Errorf("host %s is to cut at %s by its clock, off by %s", h.name, o.At, off)
			}
		}
	}
}

// book is a [Journal], and what it was told, in words.
type book struct {
	mu    sync.Mutex
	notes []string
	last  cut.Note
	fail  func(cut.Note) error
}

func (b *book) Note(_ context.Context, n cut.Note, halt bool) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.fail != nil {
		if err := b.fail(n); err != nil {
			return err
		}
	}
	b.last = n
	b.notes = append(b.notes, fmt.Sprintf("%s to %d ordered %t halt %t", n.Cut, n.To, n.Ordered, halt))
	return nil
}

func (b *book) End(_ context.Context, d cut.Done, halt bool) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.notes = append(b.notes, fmt.Sprintf("%s %s in %d halt %t", d.Cut, d.Outcome, d.Epoch, halt))
	return nil
}

// What is noted is noted before the hosts hear of it, and what can't be is not ordered.
func TestJournal(t *testing.T) {
	c, a, b := newCoordinator()
	j := &book{}
	c.cfg.Journal = j
	early := func(effect cut.Effect, answers []cut.Event) []cut.Event {
		j.mu.Lock()
		defer j.mu.Unlock()
		if _, ok := effect.(cut.SendPrepare); ok && j.last.Cut != cutOf(effect) {
			t.Error("a host is to prepare before that is noted")
		}
		if _, ok := effect.(cut.SendCut); ok && !j.last.Ordered {
			t.Error("a host is to cut before that is noted")
		}
		return answers
	}
	a.answer, b.answer = early, early
	if _, err := take(t.Context(), c, "c"); err != nil {
		t.Fatal(err)
	}
	full := errors.New("the disk is full")
	j.fail = func(cut.Note) error { return full }
	orders := len(a.orders)
	if _, err := take(t.Context(), c, "d"); !errors.Is(err, ErrAborted) || !strings.Contains(err.Error(), full.Error()) {
		t.Error(err)
	}
	if len(a.orders) != orders || c.Epoch() != 0 {
		t.Errorf("%d orders of a cut that is not noted; epoch %d", len(a.orders)-orders, c.Epoch())
	}
	fails := 3
	j.fail = func(n cut.Note) error {
		if n.Ordered || n.Cut == "e" && j.last.Cut == "e" && fails > 0 {
			fails--
			return full
		}
		return nil
	}
	if _, err := take(t.Context(), c, "e"); !errors.Is(err, ErrAborted) || c.Epoch() != 0 {
		t.Error(c.Epoch(), err)
	}
	want := []string{
		"c to 0 ordered false halt false", "c to 0 ordered true halt false", "c committed in 0 halt false",
		"d aborted in 0 halt false",
		"e to 1 ordered false halt false", "e to 1 ordered false halt false", "e aborted in 0 halt false",
	}
	if !slices.Equal(j.notes, want) {
		t.Errorf("noted:\n%s\nwant:\n%s", strings.Join(j.notes, "\n"), strings.Join(want, "\n"))
	}
}

func cutOf(e cut.Effect) string {
	if p, ok := e.(cut.SendPrepare); ok {
		return p.Cut
	}
	return ""
}

// Who follows ends the cut of the one before, on hosts that come back late, and goes on.
func TestResume(t *testing.T) {
	for _, test := range []struct {
		ordered, visible bool
		epoch            cut.Epoch
	}{{false, false, 255}, {true, false, 0}, {true, true, 0}} {
		before, a, b := newCoordinator()
		cfg := before.cfg
		j := &book{}
		cfg.Journal = j
		away := 3
		b.answer = func(_ cut.Effect, answers []cut.Event) []cut.Event {
			if away--; away >= 0 {
				return []cut.Event{cut.Failed{Cut: "c", Host: "b", Reason: "its agent has not connected"}}
			}
			return answers
		}
		c := Resume(cfg, cut.Note{Cut: "c", To: 0, Ordered: test.ordered}, test.visible)
		if _, err := take(t.Context(), c, "d"); !errors.Is(err, cut.ErrBusy) {
			t.Errorf("%+v: a cut beside the one before: %v", test, err)
		}
		if err := c.Finish(t.Context(), true); test.visible != (err == nil) || !test.visible && !errors.Is(err, ErrAborted) {
			t.Errorf("%+v: %v", test, err)
		}
		if c.Epoch() != test.epoch || len(j.notes) != 1 || !strings.HasSuffix(j.notes[0], fmt.Sprintf("in %d halt true", test.epoch)) {
			t.Errorf("%+v: epoch %d, noted %q", test, c.Epoch(), j.notes)
		}
		if want := 1; len(a.orders) != want {
			t.Errorf("%+v: host a was told %d times, and answered once", test, len(a.orders))
		}
		if _, err := take(t.Context(), c, "d"); err != nil {
			t.Errorf("%+v: the next cut: %v", test, err)
		}
	}
	// A server that ends meanwhile leaves it to the next.
	before, _, b := newCoordinator()
	b.answer = func(cut.Effect, []cut.Event) []cut.Event { return nil }
	cfg := before.cfg
	cfg.Journal = &book{}
	c := Resume(cfg, cut.Note{Cut: "c", To: 0, Ordered: true}, false)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.Finish(ctx, false); !errors.Is(err, context.Canceled) || len(cfg.Journal.(*book).notes) > 0 {
		t.Error(err, cfg.Journal)
	}
}
