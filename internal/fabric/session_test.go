package fabric

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"violin/internal/coloring"
	"violin/internal/openflow"
)

// While the controller is away, frames pass by the entries that are there. When it
// is back it mends what has changed meanwhile, and only that.
func TestControllerAway(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	p := newPair(ctx, t, 0, func(coloring.Packet, []byte) {})
	sw, a, b := p.switches["b"], p.guests["a"], p.guests["b"]
	for n := range 10 {
		a.send(t, b.addr, n)
	}
	b.receive(t, 10)
	want := entries(ctx, t, sw)

	// Another controller does what no controller of ours would.
	stranger, err := sw.open(ctx)
	if err != nil {
		t.Fatal(err)
	}
	go stranger.Serve(ctx) //nolint:errcheck // it ends with the connection
	var mods []openflow.FlowMod
	for _, st := range want {
		f := st.FlowMod()
		switch coloring.UnpackCookie(f.Cookie).Kind {
		case coloring.KindHold: // lost
			f.Command = openflow.FlowDeleteStrict
			f.OutPort, f.OutGroup = openflow.PortAny, openflow.GroupAny
			mods = append(mods, f)
		case coloring.KindOlder: // of another run, and it drops
			f.Cookie, f.Instructions = 0x1234<<48, nil
			mods = append(mods, f)
		}
	}
	mods = append(mods, openflow.FlowMod{Table: 77, Priority: 7, Cookie: 0x1234 << 48, Match: openflow.Match{openflow.InPort(9)}})
	if err := stranger.Bundle(ctx, mods); err != nil {
		t.Fatal(err)
	}
	stranger.Close()

	socket := filepath.Join(sw.cfg.Dir, integration+".mgmt")
	if err := os.Rename(socket, socket+".away"); err != nil {
		t.Fatal(err)
	}
	lost := sw.conn.Load()
	lost.Close()
	for n := range 10 {
		a.send(t, b.addr, n)
	}
	b.receive(t, 10)
	if err := sw.Update(ctx, func(st *coloring.State) { st.Nodes[p.keys["b"]] = coloring.Color{Epoch: 1} }); err == nil {
		t.Error("an update without a session did not fail")
	}
	if err := os.Rename(socket+".away", socket); err != nil {
		t.Fatal(err)
	}

	for sw.conn.Load() == lost {
		if err := pause(ctx); err != nil {
			t.Fatal("the session was not opened again")
		}
	}
	got := entries(ctx, t, sw)
	if len(got) != len(want) {
		t.Errorf("%d entries after the repair, %d before", len(got), len(want))
	}
	for key, w := range want {
		g, ok := got[key]
		if !ok || g.String() == "" || g.Cookie != w.Cookie || len(g.Instructions) != len(w.Instructions) {
			t.Errorf("%s: not repaired: %s", w, g)
		}
		if k := coloring.UnpackCookie(w.Cookie).Kind; k == coloring.KindDeliver && g.Packets != 20 {
			t.Errorf("%s: counts %d frames of 20", w, g.Packets)
		}
	}
}

// entries are those of the switch, by table, priority and match, with counters
// up to date.
func entries(ctx context.Context, t *testing.T, sw *Switch) map[string]openflow.FlowStats {
	t.Helper()
	sw.mu.Lock() // a repair may be under way
	defer sw.mu.Unlock()
	if err := sw.Purge(ctx); err != nil {
		t.Fatal(err)
	}
	stats, err := sw.conn.Load().FlowStats(ctx, openflow.FlowStatsRequest{Table: openflow.TableAll})
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]openflow.FlowStats{}
	for _, st := range stats {
		f := st.FlowMod()
		f.Cookie, f.Instructions = 0, nil
		found[f.String()] = st
	}
	return found
}
