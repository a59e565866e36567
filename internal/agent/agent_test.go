package agent_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"syscall"
	"testing"
	"time"

	"violin/internal/agent"
	"violin/internal/cut"
	"violin/internal/hypervisor/qemu"
	"violin/internal/lab"
	"violin/internal/store"
)

const slice = "s"

// host is an agent on a lab host, with nodes that count in memory for ever.
type host struct {
	t      *testing.T
	agent  *agent.Agent
	store  *store.Store
	nodes  []string
	events chan cut.Event
}

func newHost(t *testing.T, nodes ...string) *host {
	t.Helper()
	if os.Getenv("VIOLIN_E2E") != "1" {
		t.Skip("runs real VMs and switches, as root: set VIOLIN_E2E=1")
	}
	ctx := t.Context()
	log := slog.New(slog.DiscardHandler)
	l, err := lab.New(ctx, lab.Config{Sites: []lab.Site{{Name: "a", Hosts: []string{"a"}}}, Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	st, err := store.Open(ctx, t.TempDir(), store.Options{Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	dir, err := os.MkdirTemp("", "violin-agent-") // sockets' names are short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	lh := l.Host("a")
	a, err := agent.Start(ctx, agent.Config{
		Host: "a", Dir: dir, Platform: lh, Logger: log,
		Underlay: agent.Underlay{Device: lh.UnderlayDevice, Addr: lh.UnderlayAddr, MAC: lh.UnderlayMAC, MTU: lh.MTU},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	})
	for i, name := range nodes {
		err := a.AddNode(ctx, agent.NodeSpec{
			Slice: slice, Name: name,
			Machine:    qemu.Spec{Name: name, Memory: 16 << 20, CPUs: 1, Kernel: kernel(t), GuestConfig: []byte("{}")},
			Interfaces: []agent.Interface{{Network: 1, Address: net.HardwareAddr{2, 0, 0, 0, 0, byte(i)}, MTU: 1500}},
		}, false)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := a.RunNode(ctx, slice, name, nil, nil); err != nil {
			t.Fatal(err)
		}
	}
	return &host{t: t, agent: a, store: st, nodes: nodes, events: make(chan cut.Event, 64)}
}

// kernel is set-up code behind a boot sector, run in real mode, that counts in memory.
func kernel(t *testing.T) string {
	image := make([]byte, 8192)
	copy(image[512:], []byte{0xfb, 0xb8, 0x00, 0x20, 0x8e, 0xd8, 0xff, 0x06, 0x00, 0x00, 0xeb, 0xfa})
	path := filepath.Join(t.TempDir(), "kernel")
	if err := os.WriteFile(path, image, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func (h *host) session() *store.Session {
	h.t.Helper()
	s, err := h.store.Begin(h.t.Context())
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { _ = s.Abort(context.Background()) })
	return s
}

func (h *host) order(o agent.Order) {
	o.Slice, o.Networks = slice, map[uint16]string{1: "lan"}
	h.agent.Handle(o, func(ev cut.Event) { h.events <- ev })
}

// want waits for events of these types, in any order, and returns the last.
func (h *host) want(events ...cut.Event) cut.Event {
	h.t.Helper()
	missing := map[reflect.Type]int{}
	for _, ev := range events {
		missing[reflect.TypeOf(ev)]++
	}
	for {
		select {
		case ev := <-h.events:
			if missing[reflect.TypeOf(ev)] == 0 {
				h.t.Fatalf("%T%+v came, while %v is waited for", ev, ev, missing)
			}
			if missing[reflect.TypeOf(ev)]--; missing[reflect.TypeOf(ev)] == 0 {
				delete(missing, reflect.TypeOf(ev))
			}
			if len(missing) == 0 {
				return ev
			}
		case <-time.After(30 * time.Second):
			h.t.Fatalf("%v did not come", missing)
		}
	}
}

func (h *host) wantNodes(epoch cut.Epoch) {
	h.t.Helper()
	for _, name := range h.nodes {
		st, err := h.agent.Status(h.t.Context(), slice, name)
		if err != nil || st.Status != "running" || st.Epoch != epoch {
			h.t.Errorf("node %s: %+v, %v; want it running in epoch %d", name, st, err, epoch)
		}
	}
}

func TestCut(t *testing.T) {
	h := newHost(t, "x", "y")
	epoch := cut.Epoch(0)
	for i, o := range []agent.Order{
		{Mode: qemu.Background}, {Mode: qemu.Precopy}, {Mode: qemu.Background, Newer: agent.Trigger}, {Mode: qemu.Background, Newer: agent.Drop},
	} {
		id := fmt.Sprint("cut", i)
		o.Effect, o.Session = cut.SendPrepare{Cut: id, Host: "a", From: epoch, To: epoch.Next()}, agent.InStore(h.session())
		h.order(o)
		h.want(cut.Prepared{})
		h.wantNodes(epoch)
		h.order(agent.Order{Effect: cut.SendCut{Cut: id, Host: "a", Nodes: h.nodes, To: epoch.Next()}, At: time.Now().Add(20 * time.Millisecond)})
		h.want(cut.NodeCut{}, cut.NodeCut{}, cut.Stored{}, cut.Stored{})
		h.order(agent.Order{Effect: cut.SendPoll{Cut: id, Host: "a", Round: 1, Epoch: epoch}})
		h.want(cut.Counters{})
		h.order(agent.Order{Effect: cut.SendCollect{Cut: id, Host: "a"}})
		h.want(cut.Collected{})
		r, err := h.agent.Results(slice, id)
		if err != nil || len(r.Nodes) != 2 || r.Dropped != 0 {
			t.Fatalf("results %+v, %v", r, err)
		}
		for _, n := range r.Nodes {
			if n.Pause <= 0 || n.CutAt.IsZero() || n.RawBytes == 0 || n.Memory == (store.BlobRef{}) || n.Device == (store.BlobRef{}) {
				t.Errorf("%s: %+v lacks something", o.Mode, n)
			}
		}
		h.order(agent.Order{Effect: cut.SendCommit{Cut: id, Host: "a"}})
		h.want(cut.Committed{})
		epoch = epoch.Next()
		h.wantNodes(epoch)
	}
	if _, err := h.agent.Results(slice, "cut0"); err == nil {
		t.Error("results of a cut that is over")
	}
}

// A cut that is given up, wherever it stands, leaves the nodes running in one epoch,
// and able to be cut.
func TestAbort(t *testing.T) {
	h := newHost(t, "x", "y")
	epoch := cut.Epoch(0)
	for i, at := range []string{"preparing", "prepared", "cutting", "waiting", "cut", "stored"} {
		for _, mode := range []qemu.Mode{qemu.Background, qemu.Precopy} {
			id := fmt.Sprint("cut", i, mode)
			to := epoch.Next()
			h.order(agent.Order{Effect: cut.SendPrepare{Cut: id, Host: "a", From: epoch, To: to}, Mode: mode, Session: agent.InStore(h.session())})
			if at != "preparing" {
				h.want(cut.Prepared{})
			}
			order := agent.Order{Effect: cut.SendCut{Cut: id, Host: "a", Nodes: h.nodes, To: to}}
			switch at {
			case "preparing", "prepared":
				to = epoch
			case "waiting":
				order.At = time.Now().Add(time.Hour)
				h.order(order)
			case "cutting":
				h.order(order)
			case "cut", "stored":
				h.order(order)
				h.want(cut.NodeCut{}, cut.NodeCut{}, cut.Stored{}, cut.Stored{})
			}
			h.order(agent.Order{Effect: cut.SendAbort{Cut: id, Host: "a", To: to}})
			for {
				ev := <-h.events
				if _, ok := ev.(cut.Aborted); ok {
					break
				}
			}
			epoch = to
			h.wantNodes(epoch)
			h.order(agent.Order{Effect: cut.SendAbort{Cut: id, Host: "a", To: to}})
			h.want(cut.Aborted{}) // an order that is repeated is answered
		}
	}
}

// A cut whose coordinator does not come back is given up: the nodes run on, in the epoch
// where all others can be, and what is ordered after all is carried out.
func TestAbandon(t *testing.T) {
	h := newHost(t, "x", "y")
	h.agent.Abandon(slice) // no cut runs
	epoch := cut.Epoch(0)
	for _, test := range []struct {
		ordered  bool
		left, to cut.Epoch // by itself, and by what the coordinator then says
	}{{false, 0, 0}, {false, 0, 1}, {true, 2, 2}} {
		id := fmt.Sprint("cut", test)
		h.order(agent.Order{Effect: cut.SendPrepare{Cut: id, Host: "a", From: epoch, To: epoch.Next()}, Session: agent.InStore(h.session())})
		h.want(cut.Prepared{})
		if test.ordered {
			h.order(agent.Order{Effect: cut.SendCut{Cut: id, Host: "a", Nodes: h.nodes, To: epoch.Next()}})
			h.want(cut.NodeCut{}, cut.NodeCut{}, cut.Stored{}, cut.Stored{})
		}
		h.agent.Abandon(slice)
		h.wantNodes(test.left)
		h.order(agent.Order{Effect: cut.SendAbort{Cut: id, Host: "a", To: test.to}})
		for {
			if _, ok := (<-h.events).(cut.Aborted); ok {
				break
			}
		}
		h.wantNodes(test.to)
		epoch = test.to
	}
}

func TestNodeDies(t *testing.T) {
	h := newHost(t, "x", "y")
	h.order(agent.Order{Effect: cut.SendPrepare{Cut: "c", Host: "a", From: 0, To: 1}, Session: agent.InStore(h.session())})
	h.want(cut.Prepared{})
	st, err := h.agent.Status(t.Context(), slice, "x")
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(st.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	h.order(agent.Order{Effect: cut.SendCut{Cut: "c", Host: "a", Nodes: []string{"x"}, To: 1}})
	if f := h.want(cut.Failed{}).(cut.Failed); f.Node != "x" || f.Reason == "" {
		t.Errorf("%+v", f)
	}
	h.order(agent.Order{Effect: cut.SendAbort{Cut: "c", Host: "a", To: 1}})
	for {
		if _, ok := (<-h.events).(cut.Aborted); ok {
			break
		}
	}
	h.nodes = []string{"y"}
	h.wantNodes(1)
	if err := h.agent.RemoveNode(slice, "x"); err != nil {
		t.Error(err)
	}
	if _, err := h.agent.Exec(t.Context(), slice, "x", []string{"true"}, nil); err == nil {
		t.Error("a program ran in a node that is not there")
	}
}

func TestOrdersOfNoCut(t *testing.T) {
	h := newHost(t)
	h.order(agent.Order{Effect: cut.SendCommit{Cut: "c", Host: "a"}})
	h.want(cut.Committed{})
	h.order(agent.Order{Effect: cut.SendAbort{Cut: "c", Host: "a"}})
	h.want(cut.Aborted{})
	h.order(agent.Order{Effect: cut.SendPrepare{Cut: "c", Host: "a", To: 1}, Session: agent.InStore(h.session())})
	h.want(cut.Prepared{})
	h.order(agent.Order{Effect: cut.SendPrepare{Cut: "d", Host: "a", To: 1}, Session: agent.InStore(h.session())})
	if f := h.want(cut.Failed{}).(cut.Failed); f.Cut != "d" {
		t.Errorf("%+v", f)
	}
	h.order(agent.Order{Effect: cut.SendAbort{Cut: "c", Host: "a"}})
	h.want(cut.Aborted{})
	if err := errors.Join(h.agent.RemoveNode(slice, "none")); err != nil {
		t.Error(err)
	}
}
