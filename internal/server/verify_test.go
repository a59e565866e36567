package server

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	violinv1 "violin/api/violin/v1"
	"violin/internal/agent"
	"violin/internal/catalog"
	"violin/internal/certificate"
	"violin/internal/coordinator"
	"violin/internal/cut"
	"violin/internal/store"
	"violin/internal/topology"
)

// sealed is a server with one snapshot of a slice with one node, as the hosts and
// the coordinator would have witnessed its cut. spoil may spoil what they saw.
func sealed(t *testing.T, spoil func(*agent.HostResult)) (*Server, *catalog.Snapshot) {
	t.Helper()
	s, err := New(t.Context(), Config{StateDir: t.TempDir(), RunDir: t.TempDir(), Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	topo, err := topology.Parse("one.yaml", []byte(`
version: 1
slice: one
sites:
  here: {hosts: [h]}
networks:
  lan: {subnet: 10.20.0.0/24}
nodes:
  n: {host: h, image: mpi, memory: 128MiB, interfaces: [{network: lan, address: 10.20.0.1/24}]}
`))
	if err != nil {
		t.Fatal(err)
	}
	snap := &catalog.Snapshot{ID: "261123-120000-abcd", Slice: "one", Mode: "background", Epoch: 3, Topology: topo.Marshal()}
	if err := seal(t.Context(), s, topo, snap, spoil); err != nil {
		t.Fatal(err)
	}
	return s, snap
}

func seal(ctx context.Context, s *Server, topo *topology.Topology, snap *catalog.Snapshot, spoil func(*agent.HostResult)) error {
	session, err := s.store.Begin(ctx)
	if err != nil {
		return err
	}
	pages, err := session.NewPageWriter(ctx, []store.Region{{ID: "pc.ram", Length: store.PageSize}})
	if err != nil {
		return err
	}
	if err := pages.Page(0, 0, bytes.Repeat([]byte("memory  "), store.PageSize/8)); err != nil {
		return err
	}
	memory, err := pages.Close()
	if err != nil {
		return err
	}
	device, err := session.PutBlob(ctx, []byte("devices"))
	if err != nil {
		return err
	}
	host := agent.HostResult{Host: "h", Counters: certificate.Host{Name: "h", Handed: 1, Seen: 1}, Reads: map[int]int64{1: 200, 2: 300}}
	node := agent.NodeResult{
		Node: "n", CutAt: time.Unix(1_700_000_000, 5), Pause: time.Millisecond, Device: device, Memory: memory, Held: 1,
		Interface: []agent.Interface{{Network: 1}},
		Recorded: []agent.Recorded{
			{Node: "n", Epoch: 3, At: time.Unix(1_700_000_000, 1), Data: []byte("held at the gate")},
			{Node: "n", Epoch: 3, At: time.Unix(1_700_000_001, 0), Data: []byte("copied by the switch")},
		},
		Gate: certificate.Gate{Handed: 1, Held: 1, Delivered: 1, Older: 1, Copies: 1, Recorded: 2},
	}
	for i, step := range cut.Steps() {
		e := certificate.Step{Name: step.String(), Began: int64(10 * i), Ended: int64(10*i + 5), From: 3, To: 3}
		if step >= cut.StepFlip {
			e.To = 4
		}
		if step > cut.StepFlip {
			e.From = 4
		}
		node.Steps = append(node.Steps, e)
	}
	host.Nodes = []agent.NodeResult{node}
	if spoil != nil {
		spoil(&host)
	}
	counts := map[string][]cut.ChannelCount{"h": {{Channel: cut.Channel{From: "h", To: "h", Network: "lan"}, Sent: 1, Received: 1}}}
	return s.seal(ctx, &slice{topo: topo}, snap, session, time.Now(), []agent.HostResult{host}, nil, coordinator.Drained{
		Heard: map[string]time.Duration{"n": 100}, Quiet: time.Second,
		Rounds: []coordinator.Round{{Number: 1, Asked: 110, Ended: 120, Counts: counts}, {Number: 2, Asked: 130, Ended: 140, Counts: counts}},
	})
}

func TestVerify(t *testing.T) {
	s, snap := sealed(t, nil)
	for _, request := range []*violinv1.VerifyRequest{
		{Snapshot: "one@latest"},
		{Snapshot: "one@latest", ReadData: true},
		{Snapshot: "one@latest", Certificate: snap.Certificate.Fingerprint.String()},
		{Snapshot: "one@latest", Certificate: strings.ToUpper(snap.Certificate.Fingerprint.String()[:shortest])},
	} {
		r, err := s.Verify(t.Context(), request)
		if err != nil || !r.GetHolds() || len(r.GetViolations()) > 0 || len(r.GetProves()) == 0 {
			t.Errorf("%v: %v, %v", request, r, err)
		}
	}
	r, err := s.Verify(t.Context(), &violinv1.VerifyRequest{Snapshot: "one@latest", Certificate: strings.Repeat("0", 64)})
	if err != nil || r.GetHolds() || len(r.GetProves()) > 0 || !strings.Contains(fmt.Sprint(r.GetViolations()), "not the one that was expected") {
		t.Errorf("another certificate was expected: %v, %v", r, err)
	}
	for want, request := range map[connect.Code]*violinv1.VerifyRequest{
		connect.CodeInvalidArgument: {Snapshot: "one@latest", Certificate: "abc"},
		connect.CodeNotFound:        {Snapshot: "two@latest"},
	} {
		if _, err := s.Verify(t.Context(), request); connect.CodeOf(err) != want {
			t.Errorf("%v: %v, want %v", request, err, want)
		}
	}
}

func TestVerifyOfAnUnsoundCut(t *testing.T) {
	for want, spoil := range map[string]func(*agent.HostResult){
		"its switch handed 2 frames to its gates, and 1 came": func(h *agent.HostResult) { h.Counters.Handed++ },
		"flip began before flush had ended":                   func(h *agent.HostResult) { h.Nodes[0].Steps[4].Began = 0 },
		"2 frames were in flight to it at its cut":            func(h *agent.HostResult) { h.Nodes[0].Recorded = h.Nodes[0].Recorded[:1] },
		"node n of the slice is missing":                      func(h *agent.HostResult) { h.Nodes = nil },
	} {
		s, _ := sealed(t, spoil)
		r, err := s.Verify(t.Context(), &violinv1.VerifyRequest{Snapshot: "one@latest"})
		if err != nil || r.GetHolds() || !strings.Contains(fmt.Sprint(r.GetViolations()), want) {
			t.Errorf("want %q: %v, %v", want, r, err)
		}
	}
}

func TestVerifyWithoutACertificate(t *testing.T) {
	s, snap := sealed(t, nil)
	old := *snap
	old.ID, old.Certificate = "251123-120000-abcd", nil
	if err := s.catalog.Put(t.Context(), &old); err != nil {
		t.Fatal(err)
	}
	_, err := s.Verify(t.Context(), &violinv1.VerifyRequest{Snapshot: old.Ref()})
	if connect.CodeOf(err) != connect.CodeFailedPrecondition || !strings.Contains(err.Error(), "has no certificate") {
		t.Error(err)
	}
}

// TestVerifyOfATamperedStore flips each byte of each file that the snapshot needs.
func TestVerifyOfATamperedStore(t *testing.T) {
	s, snap := sealed(t, nil)
	root := filepath.Join(s.cfg.StateDir, "store")
	document := "snapshots/one/" + snap.ID + ".json" // which is in etcd
	read, write := os.ReadFile, func(file string, data []byte) error { return os.WriteFile(file, data, 0o600) }
	packs, err := filepath.Glob(filepath.Join(root, "packs", "*", "*"))
	if err != nil || len(packs) < 2 {
		t.Fatalf("packs %q, %v", packs, err)
	}
	for _, file := range append(packs, document) {
		if file == document {
			read = func(name string) ([]byte, error) { return s.led.Get(t.Context(), name) }
			write = func(name string, data []byte) error { return s.led.Replace(t.Context(), name, data) }
		}
		good, err := read(file)
		if err != nil {
			t.Fatal(err)
		}
		for at := 0; at < len(good); at += 1 + len(good)/100 {
			bad := bytes.Clone(good)
			bad[at] ^= 0x10
			if err := write(file, bad); err != nil {
				t.Fatal(err)
			}
			r, err := s.Verify(t.Context(), &violinv1.VerifyRequest{Snapshot: "one@" + snap.ID, ReadData: true})
			if err == nil && r.GetHolds() {
				t.Errorf("%s with byte %d altered: it holds", file, at)
			}
		}
		if err := write(file, good); err != nil {
			t.Fatal(err)
		}
	}
	if r, err := s.Verify(t.Context(), &violinv1.VerifyRequest{Snapshot: "one@latest", ReadData: true}); err != nil || !r.GetHolds() {
		t.Errorf("with every byte as it was: %v, %v", r, err)
	}
}

func TestCertificatesAreAChain(t *testing.T) {
	s, first := sealed(t, nil)
	topo, err := topology.Parse("one.yaml", first.Topology)
	if err != nil {
		t.Fatal(err)
	}
	second := &catalog.Snapshot{ID: "261123-120001-abcd", Slice: "one", Parent: first.ID, Mode: "background", Epoch: 3, Topology: first.Topology}
	if err := seal(t.Context(), s, topo, second, nil); err != nil {
		t.Fatal(err)
	}
	notes := func() string {
		t.Helper()
		r, err := s.Verify(t.Context(), &violinv1.VerifyRequest{Snapshot: second.Ref()})
		if err != nil || !r.GetHolds() {
			t.Fatalf("%v, %v", r, err)
		}
		return fmt.Sprint(r.GetNotes())
	}
	if got := notes(); got != "[]" {
		t.Error(got)
	}
	if err := s.catalog.Delete(t.Context(), "one", first.ID); err != nil {
		t.Fatal(err)
	}
	if got := notes(); !strings.Contains(got, "is not there any more") {
		t.Error(got)
	}
	if err := seal(t.Context(), s, topo, &catalog.Snapshot{ID: first.ID, Slice: "one", Tag: "x", Mode: "precopy", Epoch: 3, Topology: first.Topology}, nil); err != nil {
		t.Fatal(err)
	}
	if got := notes(); !strings.Contains(got, "the parent was replaced") {
		t.Error(got)
	}
}
