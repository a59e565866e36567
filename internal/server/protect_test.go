package server

import (
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"

	violinv1 "violin/api/violin/v1"
	"violin/internal/catalog"
	"violin/internal/machine"
	"violin/internal/topology"
)

// happened waits until a slice's last event is of a kind, and returns all of them.
func happened(t *testing.T, s *Server, slice, last string) []string {
	t.Helper()
	for {
		found, more := s.events.After(0, slice)
		var kinds []string
		for _, e := range found {
			kinds = append(kinds, string(e.Kind))
		}
		if len(kinds) > 0 && kinds[len(kinds)-1] == last {
			return kinds
		}
		select {
		case <-more:
		case <-t.Context().Done():
			t.Fatalf("%s: %v, and no %s", slice, kinds, last)
		}
	}
}

// A server that starts brings back what was protected; what is suspended, or was given
// up, it leaves alone. Here nothing can be brought back, which it must say, once and
// for all.
func TestServerReturns(t *testing.T) {
	state := t.TempDir()
	s := newServer(t, state, Storage{})
	policy := catalog.Protection{Every: time.Hour, Keep: 1, MaxRollbacks: 2, Window: time.Hour, Since: time.Now()}
	for name, change := range map[string]func(*catalog.Record){
		"none":      func(*catalog.Record) {},
		"gone":      func(r *catalog.Record) { r.Protection.Head = "gone@1" },
		"suspended": func(r *catalog.Record) { r.Suspended = &catalog.Suspension{Snapshot: "1", At: time.Now()} },
		"given-up":  func(r *catalog.Record) { r.Protection.GaveUp = true },
	} {
		if err := s.record(t.Context(), name, func(r *catalog.Record) {
			p := policy
			r.Protection = &p
			change(r)
		}); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.store.Copied(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !Remembers(state) {
		t.Error("nobody would start a server for them")
	}
	// again starts a new server in the place of the old one.
	again := func() {
		t.Helper()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s = newServer(t, state, Storage{})
	}
	again()
	for _, name := range []string{"none", "gone"} {
		if got := strings.Join(happened(t, s, name, "gave-up"), " "); got != "server-returned gave-up" {
			t.Errorf("%s: %s", name, got)
		}
	}
	again()
	for name, want := range map[string]string{"none": "server-returned gave-up", "gone": "server-returned gave-up", "suspended": "", "given-up": ""} {
		found, _ := s.events.After(0, name)
		var got []string
		for _, e := range found {
			got = append(got, string(e.Kind))
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s after another start: %v, want %q", name, got, want)
		}
	}
	list, err := s.ListProtections(operator(t), &violinv1.ListProtectionsRequest{})
	if err != nil || len(list.GetProtections()) != 4 {
		t.Fatalf("%v, %v", list, err)
	}
	for _, p := range list.GetProtections() {
		if p.GetGaveUp() != (p.GetSlice() != "suspended") {
			t.Errorf("%s: gave up: %v", p.GetSlice(), p.GetGaveUp())
		}
	}
	for _, name := range []string{"none", "gone", "given-up"} {
		if _, err := s.Unprotect(t.Context(), &violinv1.UnprotectRequest{Slice: name}); err != nil {
			t.Error(err)
		}
	}
	if _, err := s.Unprotect(t.Context(), &violinv1.UnprotectRequest{Slice: "none"}); connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("unprotected twice: %v", err)
	}
	if _, err := s.Protect(t.Context(), &violinv1.ProtectRequest{Slice: "none", Every: durationpb.New(time.Minute)}); connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("protect what does not run: %v", err)
	}
	// A suspension that is given up takes the protection along.
	if _, err := s.Down(t.Context(), &violinv1.DownRequest{Slice: "suspended"}); err != nil {
		t.Error(err)
	}
	if Remembers(state) {
		t.Error("records are left")
	}
}

// What a suspended or a protected slice goes back to is not forgotten.
func TestNeededSnapshotsStay(t *testing.T) {
	s := newServer(t, t.TempDir(), Storage{})
	now := time.Now()
	for i, id := range []string{"1", "2", "3"} {
		keep(t, s, id, "", now.Add(time.Duration(i)*time.Second), i)
	}
	if err := s.record(t.Context(), "pair", func(r *catalog.Record) { r.Suspended = &catalog.Suspension{Snapshot: "1", At: now} }); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Forget(t.Context(), &violinv1.ForgetRequest{Snapshots: []string{"pair@1"}}); connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Errorf("by name: %v", err)
	}
	if _, err := s.Forget(t.Context(), &violinv1.ForgetRequest{Slice: "pair", KeepLast: 1}); err != nil {
		t.Error(err)
	}
	all, err := s.catalog.List(t.Context(), "pair")
	if err != nil || len(all) != 2 || all[0].ID != "1" || all[1].ID != "3" {
		t.Errorf("by rule: %v, %v", all, err)
	}
}

// Checkpoints go when others have come, and their space with them.
func TestExpire(t *testing.T) {
	s := newServer(t, t.TempDir(), Storage{})
	for i, id := range []string{"1", "2", "3", "4"} {
		snap := keep(t, s, id, "", time.Now().Add(time.Duration(i)*time.Second), i)
		if id == "2" {
			continue // the user's own
		}
		if err := s.catalog.Delete(t.Context(), "pair", id); err != nil {
			t.Fatal(err)
		}
		snap.Checkpoint = true
		if err := s.catalog.Put(t.Context(), snap); err != nil {
			t.Fatal(err)
		}
	}
	before := s.store.Stats().PackBytes
	if err := s.expire(t.Context(), "pair", 1, "4"); err != nil {
		t.Fatal(err)
	}
	all, err := s.catalog.List(t.Context(), "pair")
	if err != nil || len(all) != 2 || all[0].ID != "2" || all[1].ID != "4" {
		t.Errorf("%v, %v", all, err)
	}
	if after := s.store.Stats().PackBytes; after >= before {
		t.Errorf("%d bytes before, %d after", before, after)
	}
}

func TestAdmit(t *testing.T) {
	s := newServer(t, t.TempDir(), Storage{})
	topo := func(memory uint64, cpus int) *topology.Topology {
		return &topology.Topology{Slice: "pair", Sites: []topology.Site{{Name: "here", Hosts: []string{"h"}}}, Nodes: []topology.Node{{Name: "rank0", Host: "h", Site: "here", Memory: memory, CPUs: cpus}}}
	}
	total, available, err := machine.Memory()
	if err != nil || available == 0 || total < available {
		t.Fatalf("%d of %d bytes, %v", available, total, err)
	}
	small, err := s.admit(t.Context(), topo(64<<20, 1), nil, wish{})
	if err != nil {
		t.Fatal(err)
	}
	// Room that is taken is not there for others: two halves of what there is, and more.
	half := topo(available/2+1<<20, 1)
	first, err := s.admit(t.Context(), half, nil, wish{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.admit(t.Context(), half, nil, wish{}); connect.CodeOf(err) != connect.CodeResourceExhausted {
		t.Errorf("the other half: %v", err)
	}
	over, err := s.admit(t.Context(), topo(2*total, 10_000), nil, wish{overcommit: true})
	if err != nil {
		t.Errorf("overcommitted: %v", err)
	}
	for _, r := range []*admitted{small, first, over} {
		r.release()
	}
	if len(s.arriving) > 0 {
		t.Errorf("after all have come up: %+v", s.arriving)
	}
}
