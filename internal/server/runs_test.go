package server

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"violin/internal/catalog"
	"violin/internal/events"
	"violin/internal/protection"
	"violin/internal/topology"
)

// noteOf is a note of the far slice, whose node n1 is to be on host alpha, n2 on beta.
func noteOf(t *testing.T, slice string) *catalog.Run {
	t.Helper()
	topo, err := topology.Parse("far.yaml", []byte(`version: 1
slice: `+slice+`
sites: {west: {hosts: [alpha, beta]}}
networks: {lan: {subnet: 10.0.0.0/24}}
nodes:
  n1: {host: alpha, image: x, memory: 64MiB, interfaces: [{network: lan, address: 10.0.0.1/24}]}
  n2: {host: beta, image: x, memory: 64MiB, interfaces: [{network: lan, address: 10.0.0.2/24}]}
`))
	if err != nil {
		t.Fatal(err)
	}
	return &catalog.Run{
		Slice: slice, Topology: string(topo.Marshal()), Created: noon, First: 7, Whole: true, Epoch: 255,
		Hosts: map[string]catalog.RunHost{"alpha": {Run: "run-a-" + slice, Peer: 3}, "beta": {Run: "run-b-" + slice, Peer: 1}},
	}
}

// again ends a server, and starts one in its place.
func again(t *testing.T, s *Server, listen string) *Server {
	t.Helper()
	if s != nil {
		s.cfg.Leave = func() bool { return true }
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	next, err := New(t.Context(), Config{StateDir: s.cfg.StateDir, RunDir: t.TempDir(), Logger: slog.New(slog.DiscardHandler), Listen: listen})
	if err != nil {
		t.Fatal(err)
	}
	return next
}

// runsOf are the slices that are noted.
func runsOf(t *testing.T, s *Server) map[string]*catalog.Run {
	t.Helper()
	runs, err := s.catalog.Runs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return runs
}

// What is noted goes on, as it was; what was coming up or suspended does not.
func TestAdopt(t *testing.T) {
	s := newServer(t, t.TempDir(), Storage{})
	ctx := context.WithoutCancel(t.Context())
	far, half, gone, resumed := noteOf(t, "far"), noteOf(t, "half"), noteOf(t, "gone"), noteOf(t, "back")
	half.Whole = false
	gone.Halted = true
	far.Waiting = &catalog.Waiting{Snapshot: "pair@x", Clock: catalog.CatchUp}
	for _, r := range []*catalog.Run{far, half, gone, resumed} {
		if err := s.catalog.PutRun(ctx, r); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"gone", "back"} {
		if err := s.record(ctx, name, func(r *catalog.Record) { r.Suspended = &catalog.Suspension{Snapshot: "x", At: noon} }); err != nil {
			t.Fatal(err)
		}
	}
	p, err := protection.WithDefaults(catalog.Protection{Every: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.record(ctx, "far", func(r *catalog.Record) { r.Protection = &p }); err != nil {
		t.Fatal(err)
	}

	// A server that takes no hosts in leaves all of it as it is.
	s = again(t, s, "")
	if _, err := s.slice("far"); err == nil || !strings.Contains(err.Error(), "start `violin server --listen") {
		t.Error(err)
	}
	if err := s.claim("far"); err == nil {
		t.Error("the name is given to another")
	}
	if got := runsOf(t, s); len(got) != 4 {
		t.Errorf("noted: %v", got)
	}
	if found, _ := s.events.After(0, "far"); len(found) > 0 {
		t.Errorf("%+v", found)
	}

	s = again(t, s, "127.0.0.1:0")
	if got := runsOf(t, s); len(got) != 2 || got["far"] == nil || got["back"] == nil {
		t.Errorf("noted: %v", got)
	}
	sl, err := s.slice("far")
	if err != nil {
		t.Fatal(err)
	}
	if !sl.joined || sl.first != 7 || sl.coord.Epoch() != 255 || !sl.paused() || !sl.waitsAt("pair@x") || !sl.created.Equal(noon) || len(sl.agents) != 2 {
		t.Errorf("%+v", sl)
	}
	m := s.message(t.Context(), sl)
	if n := m.GetNodes()[0]; n.GetState().String() != "NODE_STATE_AWAY" || !strings.Contains(n.GetDetail(), "has not connected") {
		t.Errorf("%v", n)
	}
	if s.suspension("gone") == nil {
		t.Error("a suspension is lost")
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		found, _ := s.events.After(0, "far")
		if slices.ContainsFunc(found, func(e events.Event) bool {
			return e.Kind == events.ServerReturned && strings.Contains(e.Text, "alpha beta")
		}) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%+v", found)
		}
	}
	// Taken down while its hosts are away: nothing is noted any more, and they end it.
	_ = sl.close()
	s.settle("far", nil)
	if got := runsOf(t, s); len(got) != 1 {
		t.Errorf("noted: %v", got)
	}

	// A server that is left has its notes left; one that ends has none.
	s = again(t, s, "127.0.0.1:0")
	if _, err := s.slice("back"); err != nil {
		t.Error(err)
	}

	// What cannot be read is not taken for nothing.
	if err := s.led.Replace(ctx, "runs/odd.json", []byte(`{"format":"violin-run","version":99}`)); err != nil {
		t.Fatal(err)
	}
	s.cfg.Leave = func() bool { return true }
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if next, err := New(t.Context(), Config{StateDir: s.cfg.StateDir, RunDir: t.TempDir(), Logger: slog.New(slog.DiscardHandler), Listen: "127.0.0.1:0"}); err == nil || !strings.Contains(err.Error(), "runs/odd.json") {
		t.Error(err)
		if next != nil {
			_ = next.Close()
		}
	}
}

// A cut that was under way is ended by its snapshot's document and what was noted.
func TestAdoptCut(t *testing.T) {
	s := newServer(t, t.TempDir(), Storage{})
	snap := keep(t, s, "1", "", noon, 1)
	for _, c := range []struct {
		id      string
		ordered bool
		order   string
	}{{snap.ID, true, "commit"}, {"261128-000000-0000", true, "abort"}, {"261128-000000-0000", false, "abort"}} {
		r := noteOf(t, snap.Slice)
		r.Cut = &catalog.RunCut{ID: c.id, To: 0, Ordered: c.ordered}
		if err := s.catalog.PutRun(t.Context(), r); err != nil {
			t.Fatal(err)
		}
		s = again(t, s, "127.0.0.1:0")
		sl, err := s.slice(snap.Slice)
		if err != nil {
			t.Fatal(err)
		}
		if !sl.coord.Cutting() {
			t.Errorf("%+v: the cut is forgotten", c)
		}
		if _, head := sl.getHead(); (head == snap.ID) != (c.order == "commit") {
			t.Errorf("%+v: the slice descends from %q", c, head)
		}
		// Its hosts do not come: the next server has the same to do.
		s = again(t, s, "")
		if got := runsOf(t, s)[snap.Slice]; got == nil || got.Cut == nil || got.Cut.ID != c.id {
			t.Errorf("%+v: noted %+v", c, got)
		}
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}
