package remote

import (
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
	"violin/internal/agent"
	"violin/internal/cut"
)

// said is what a log has been told.
type saidLog struct {
	mu   sync.Mutex
	text strings.Builder
}

// Write implements [io.Writer].
func (l *saidLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *saidLog) await(t *testing.T, want string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		l.mu.Lock()
		text := l.text.String()
		l.mu.Unlock()
		if strings.Contains(text, want) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("in vain: %q in\n%s", want, text)
		}
	}
}

// A server that follows another goes on with what is noted, and with nothing else; one
// that has been followed is not obeyed any more.
func TestNextServer(t *testing.T) {
	w := newWorld(t)
	other := w.hub.Reserve("alpha", "other")
	if err := other.Begin(t.Context()); err != nil {
		t.Fatal(err)
	}
	run := Run{Host: "alpha", Slice: "s", Name: w.agent.Run(), Peer: 5}
	w.hub.Close()
	w.listen(t, slog.New(slog.DiscardHandler), 4, []Run{run, {Host: "beta", Slice: "s", Name: "x", Peer: 1}})
	a := w.hub.GoesOn("alpha", run.Name)
	if a == nil || a.Away() == nil {
		t.Fatal("what is noted is not known before its agent has come")
	}
	if !a.AwaitConnected(t.Context()) || a.Away() != nil {
		t.Fatal("the agent does not come")
	}
	if a.Peer() != 5 || w.hub.Reserve("gamma", "s").Peer() != 2 {
		t.Errorf("host alpha has number %d, the first new one %d", a.Peer(), w.hub.host("gamma").number)
	}
	if r, err := a.Exec(t.Context(), "s", "n", []string{"echo", "x"}, nil); err != nil || string(r.Stdout) != "echo x" {
		t.Error(r, err)
	}
	if !slices.Equal(w.host.left, []string{"other"}) {
		t.Errorf("ended: %v", w.host.left)
	}

	w.hub.Close()
	said := &saidLog{}
	w.listen(t, slog.New(slog.NewTextHandler(said, nil)), 3, []Run{run})
	said.await(t, "this server is of term 3, and one of term 4 has followed it")
	if len(w.host.left) != 1 {
		t.Errorf("a server that was followed had %v ended", w.host.left)
	}
	w.hub.Close()
	w.listen(t, slog.New(slog.DiscardHandler), 4, []Run{run})
	w.agent = w.hub.GoesOn("alpha", run.Name)
	if !w.agent.AwaitConnected(t.Context()) {
		t.Fatal("the agent does not come")
	}

	// An order on a stream that was opened before: a server of a higher term has been
	// obeyed meanwhile.
	events := make(chan cut.Event, 64)
	w.prepare(t, "c", w.session(t), func(ev cut.Event) { events <- ev })
	j := w.hub.host("alpha")
	j.mu.Lock()
	next := violinv1connect.NewAgentServiceClient(j.link.client, "http://agent", append(callOptions(), connect.WithInterceptors(asTerm(5)))...)
	j.mu.Unlock()
	if _, err := next.Now(t.Context(), &violinv1.NowRequest{}); err != nil {
		t.Fatal(err)
	}
	w.agent.Handle(agent.Order{Slice: "s", Effect: cut.SendAbort{Cut: "c", Host: "alpha", To: 0}}, func(ev cut.Event) { events <- ev })
	if f, ok := (<-events).(cut.Failed); !ok || !strings.Contains(f.Reason, "of term 4, and one of term 5") {
		t.Errorf("%+v", f)
	}
	if len(w.host.arrived) > 0 {
		t.Error("an order of a server that was followed is obeyed")
	}
}

// What was obeyed is known to the next agent, and to that of another authority no matter.
func TestFence(t *testing.T) {
	path := filepath.Join(t.TempDir(), termFile)
	f, err := newFence(path, "a", "alpha")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		term uint64
		ok   bool
	}{{0, true}, {3, true}, {2, false}, {3, true}, {7, true}, {3, false}} {
		if err := f.admit(c.term); (err == nil) != c.ok {
			t.Errorf("term %d: %v", c.term, err)
		}
	}
	if f, err = newFence(path, "a", "alpha"); err != nil || f.admit(6) == nil || f.admit(7) != nil {
		t.Error("the next agent does not know", err)
	}
	if f, err = newFence(path, "b", "alpha"); err != nil || f.admit(1) != nil {
		t.Error("another authority's terms count", err)
	}
	f.path = filepath.Join(t.TempDir(), "none", "x")
	if f.admit(2) == nil || f.obeyed != 1 {
		t.Error("a term that is not written down is obeyed")
	}
}
