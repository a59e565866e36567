package remote

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"violin/internal/agent"
	"violin/internal/certificate"
	"violin/internal/coloring"
	"violin/internal/cut"
	"violin/internal/fabric"
	"violin/internal/frames"
	"violin/internal/gateway"
	"violin/internal/hypervisor/qemu"
	stream "violin/internal/migration/qemu"
	"violin/internal/qga"
	"violin/internal/store"
	"violin/internal/trust"
)

// cable is what an agent dials: a way to the hub that can be cut.
type cable struct {
	l  net.Listener
	to string

	mu    sync.Mutex
	out   bool
	conns []net.Conn
}

func newCable(t *testing.T, to string) *cable {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &cable{l: l, to: to}
	t.Cleanup(func() { l.Close(); c.unplug(true) })
	go func() {
		for {
			a, err := l.Accept()
			if err != nil {
				return
			}
			c.mu.Lock()
			to := c.to
			c.mu.Unlock()
			b, err := net.Dial("tcp", to)
			c.mu.Lock()
			if err != nil || c.out {
				a.Close()
				c.mu.Unlock()
				continue
			}
			c.conns = append(c.conns, a, b)
			c.mu.Unlock()
			go func() { io.Copy(a, b); a.Close() }() //nolint:errcheck // it ends when it is cut
			go func() { io.Copy(b, a); b.Close() }() //nolint:errcheck // it ends when it is cut
		}
	}()
	return c
}

func (c *cable) unplug(out bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.out = out
	if out {
		for _, x := range c.conns {
			x.Close()
		}
		c.conns = nil
	}
}

// host is the agent at the far end of the wire, as scripted by a test.
type host struct {
	inCut bool

	mu        sync.Mutex
	orders    []agent.Order
	report    func(cut.Event)
	arrived   chan agent.Order
	abandoned chan string
	closed    chan struct{}
	loaded    []byte
	spec      agent.NodeSpec
	restored  map[string]diskOf
	exit      agent.GatewaySpec
	lazy      chan agent.Lazy
	lazyErr   error

	interrupted bool // memory followed when the agent died
	blocks      []stream.RAMBlock
	ran         []frames.Frame
	results     agent.HostResult
	gone        chan struct{}
	left        []string // slices, in their order
}

func newHost() *host {
	return &host{arrived: make(chan agent.Order, 64), lazy: make(chan agent.Lazy, 4), abandoned: make(chan string, 4), closed: make(chan struct{}), gone: make(chan struct{})}
}

func (h *host) AddPeer(context.Context, string, fabric.Peer) error          { return nil }
func (h *host) SetRemotes(context.Context, string, []coloring.Remote) error { return nil }

func (h *host) AddGateway(_ context.Context, spec agent.GatewaySpec) error { h.exit = spec; return nil }
func (h *host) Forwards(context.Context, string) (all []agent.Listening, err error) {
	for _, f := range h.exit.Forwards {
		all = append(all, agent.Listening{Network: h.exit.Network, Listening: gateway.Listening{Forward: f, At: f.Listen, Problem: "none"}})
	}
	return all, nil
}
func (h *host) ContinueNode(context.Context, string, string) error    { return nil }
func (h *host) SetClock(context.Context, string, string) error        { return nil }
func (h *host) MarkOutput(context.Context, string) ([]uint64, error)  { return []uint64{7}, nil }
func (h *host) ReleaseOutput(context.Context, string, []uint64) error { return nil }
func (h *host) SwitchGone() <-chan struct{}                           { return nil }
func (h *host) Gone(_, _ string) (<-chan struct{}, error)             { return h.gone, nil }
func (h *host) Results(string, string) (agent.HostResult, error)      { return h.results, nil }
func (h *host) Abandon(slice string)                                  { h.abandoned <- slice }
func (h *host) Leave(slice string) error                              { h.left = append(h.left, slice); return nil }
func (h *host) InCut(string) bool                                     { return h.inCut }
func (h *host) Close() error                                          { close(h.closed); return nil }

func (h *host) AddNode(_ context.Context, spec agent.NodeSpec, _ bool) error {
	h.spec, h.restored = spec, map[string]diskOf{}
	for _, d := range spec.Machine.Disks {
		if d.Restore == nil {
			continue
		}
		h.restored[d.Name] = diskOf{}
		if err := d.Restore(h.restored[d.Name].take); err != nil {
			return err
		}
	}
	return nil
}

func (h *host) LoadNodeLazily(_ context.Context, _, _ string, _ *stream.Skeleton, lazy agent.Lazy) error {
	if h.lazyErr != nil {
		lazy.Ended(nil, h.lazyErr)
		return h.lazyErr
	}
	h.lazy <- lazy
	return nil
}

func (h *host) FollowNode(string, string) error { return nil }

func (h *host) FollowOn(_ context.Context, lazy func(slice, node string, blocks []stream.RAMBlock) agent.Lazy) {
	if h.interrupted {
		h.lazy <- lazy("s", "n", h.blocks)
	}
}

func (h *host) LoadStream(_ context.Context, _, _ string, write func(io.Writer) error) error {
	var b bytes.Buffer
	err := write(&b)
	h.loaded = b.Bytes()
	return err
}

func (h *host) RunNode(_ context.Context, _, _ string, channel []frames.Frame, _ []frames.Receiver) (time.Time, error) {
	h.ran = channel
	return time.Unix(1, 5), nil
}

func (h *host) Status(context.Context, string, string) (agent.NodeStatus, error) {
	return agent.NodeStatus{}, errors.New("there is no such node")
}

func (h *host) Exec(_ context.Context, _, _ string, command []string, stdin []byte) (qga.Result, error) {
	return qga.Result{ExitCode: 3, Stdout: []byte(strings.Join(command, " ")), Stderr: stdin}, nil
}

func (h *host) Console(context.Context, string, string) (net.Conn, error) {
	a, b := net.Pipe()
	go func() { io.Copy(b, b); b.Close() }() //nolint:errcheck // an echo, until it is closed
	return a, nil
}

func (h *host) ConsoleLog(_ context.Context, _, name string, w agent.LogWish) (io.ReadCloser, error) {
	if name != "n" {
		return nil, errors.New("there is no such node")
	}
	return io.NopCloser(strings.NewReader(fmt.Sprintf("%d %v", *w.Tail, w.Follow))), nil
}

func (h *host) Handle(o agent.Order, report func(cut.Event)) {
	h.mu.Lock()
	h.orders = append(h.orders, o)
	h.report = report
	h.mu.Unlock()
	h.arrived <- o
}

// world is a hub and a host that has joined it, with all that is real between them.
type world struct {
	hub   *Hub
	host  *host
	cable *cable
	agent *Agent
	store *store.Store

	authority *trust.Authority
	identity  *trust.Identity
	cfg       HostConfig
	end       func() error // of the host's agent
	leave     atomic.Bool  // it then leaves what runs
	hasty     atomic.Int64 // 1: nobody waits for the host
	found     string       // the directory that an agent took over from
	lost      error        // why it can't
}

// patience is how long the host may be away.
func (w *world) patience(string) time.Duration {
	return time.Hour - time.Duration(w.hasty.Load())*time.Hour
}

// serve runs the host's agent until end.
func (w *world) serve() {
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- ServeHost(ctx, w.cfg) }()
	w.end = sync.OnceValue(func() error {
		cancel()
		return <-served
	})
}

func newWorld(t *testing.T) *world {
	t.Helper()
	return newWorldAt(t, nil)
}

// newWorldAt is newWorld whose host has a clock of its own.
func newWorldAt(t *testing.T, now func() time.Time) *world {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	authority, err := trust.OpenAuthority(trust.Directory(t.TempDir()))
	if err != nil {
		t.Fatal(err)
	}
	w := &world{host: newHost(), authority: authority}
	w.listen(t, log, 2, nil)
	if w.store, err = store.Open(t.Context(), t.TempDir(), store.Options{Logger: log}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.store.Close() })
	w.cable = newCable(t, w.hub.Address())
	token, err := authority.NewToken("alpha", time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	identity, err := trust.OpenIdentity(t.TempDir(), "alpha")
	if err != nil {
		t.Fatal(err)
	}
	w.identity = identity
	w.cfg = HostConfig{
		// The first is one that does not answer: it is passed over, each time.
		Servers: []string{"127.0.0.1:1", w.cable.l.Addr().String()}, Token: token, Identity: identity, Dir: t.TempDir(), Images: "/nowhere", Files: filepath.Join(t.TempDir(), "files"),
		Device: "eth9", Address: netip.MustParsePrefix("10.0.0.1/24"), Version: "test", mac: net.HardwareAddr{2, 0, 0, 0, 0, 9}, Abandon: 500 * time.Millisecond, Logger: log,
		start: func(context.Context, agent.Config) (runner, error) { return w.host, nil }, now: now,
		// What runs is written down, and left to the next.
		Keeper: []string{"none"}, Leave: func() bool { return w.leave.Load() },
		find: func(_ context.Context, c agent.Config) (runner, error) {
			w.found = c.Dir
			return w.host, w.lost
		},
	}
	w.serve()
	t.Cleanup(func() {
		if err := w.end(); err != nil {
			t.Error(err)
		}
	})
	w.await(t, true)
	w.agent = w.hub.Reserve("alpha", "s")
	if err := w.agent.Begin(t.Context()); err != nil {
		t.Fatal(err)
	}
	return w
}

// listen begins with a hub, a server's of a term.
func (w *world) listen(t *testing.T, log *slog.Logger, term uint64, runs []Run) {
	t.Helper()
	hub, err := Listen(t.Context(), HubConfig{Address: "127.0.0.1:0", Authority: w.authority, Images: filepath.Join(t.TempDir(), "images"), Term: term, Runs: runs, Patience: w.patience, Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { hub.Close() })
	w.hub = hub
	if w.cable != nil {
		w.cable.mu.Lock()
		w.cable.to = hub.Address()
		w.cable.mu.Unlock()
	}
}

// await waits until the host is connected, or is not.
func (w *world) await(t *testing.T, connected bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		hosts, err := w.hub.Hosts()
		if err != nil {
			t.Fatal(err)
		}
		if len(hosts) == 1 && hosts[0].Connected == connected {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("in vain: connected %t, %+v", connected, hosts)
		}
	}
}

func (w *world) session(t *testing.T) *store.Session {
	t.Helper()
	s, err := w.store.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Abort(context.Background()) })
	return s
}

// prepare begins a cut, and returns the order as it arrived.
func (w *world) prepare(t *testing.T, id string, s *store.Session, report func(cut.Event)) agent.Order {
	t.Helper()
	w.agent.Handle(agent.Order{Slice: "s", Effect: cut.SendPrepare{Cut: id, Host: "alpha", From: 255, To: 0}, Session: agent.InStore(s), Networks: map[uint16]string{1: "lan"}}, report)
	return w.arrived(t)
}

func (w *world) arrived(t *testing.T) agent.Order {
	t.Helper()
	select {
	case o := <-w.host.arrived:
		return o
	case <-time.After(time.Minute):
		t.Fatal("no order arrived")
		panic("unreachable")
	}
}

// Every call means at the far end what it means here.
func TestCalls(t *testing.T) {
	w := newWorld(t)
	ctx := t.Context()
	if m, err := w.hub.Measure(ctx, "alpha"); err != nil || m.Memory == 0 || m.CPUs == 0 || m.Version != "test" {
		t.Error(m, err)
	}
	if r, err := w.agent.Exec(ctx, "s", "n", []string{"echo", "x"}, []byte("in")); err != nil || r.ExitCode != 3 || string(r.Stdout) != "echo x" || string(r.Stderr) != "in" {
		t.Error(r, err)
	}
	if _, err := w.agent.Status(ctx, "s", "n"); err == nil || err.Error() != "host alpha: there is no such node" {
		t.Error(err)
	}
	if marks, err := w.agent.MarkOutput(ctx, "s"); err != nil || len(marks) != 1 || marks[0] != 7 {
		t.Error(marks, err)
	}
	channel := []frames.Frame{{Receiver: 0, Data: []byte("other's")}, {Receiver: 2, Epoch: 255, At: time.Second, Data: []byte("x")}}
	receivers := []frames.Receiver{{Node: "m"}, {Node: "n"}, {Node: "n", Interface: 1}}
	began, err := w.agent.RunNode(ctx, "s", "n", channel, receivers)
	if err != nil || !began.Equal(time.Unix(1, 5)) || len(w.host.ran) != 1 || w.host.ran[0].Receiver != 1 || w.host.ran[0].Epoch != 255 || w.host.ran[0].At != time.Second {
		t.Error(began, w.host.ran, err)
	}
	c, err := w.agent.Console(ctx, "s", "n")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 5)
	if _, err := io.ReadFull(c, got); err != nil || string(got) != "hello" {
		t.Errorf("%q, %v", got, err)
	}
	tail := uint32(7)
	log, err := w.agent.ConsoleLog(ctx, "s", "n", agent.LogWish{Tail: &tail, Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(log); err != nil || string(b) != "7 true" || log.Close() != nil {
		t.Errorf("%q, %v", b, err)
	}
	if log, err = w.agent.ConsoleLog(ctx, "s", "none", agent.LogWish{Tail: &tail}); err == nil {
		_, err = io.ReadAll(log)
	}
	if err == nil || err.Error() != "host alpha: there is no such node" {
		t.Error(err)
	}
	gone, err := w.agent.Gone("s", "n")
	if err != nil {
		t.Fatal(err)
	}
	close(w.host.gone)
	<-gone

	// Another slice beside it, and the first goes.
	other := w.hub.Reserve("alpha", "other")
	if err := other.Begin(ctx); err != nil {
		t.Fatal(err)
	}
	if hosts, err := w.hub.Hosts(); err != nil || !slices.Equal(hosts[0].Slices, []string{"other", "s"}) {
		t.Error(hosts, err)
	}
	if err := w.agent.Close(); err != nil {
		t.Error(err)
	}
	select {
	case <-w.host.closed:
		t.Error("the switch was stopped under the other slice")
	default:
	}
	if _, err := other.Exec(ctx, "other", "n", []string{"true"}, nil); err != nil {
		t.Error(err)
	}
	defer func() {
		if err := other.Close(); err != nil || !slices.Equal(w.host.left, []string{"s", "other"}) {
			t.Error(w.host.left, err)
		}
		<-w.host.closed
	}()
	if _, err := w.agent.Exec(ctx, "s", "n", []string{"true"}, nil); err == nil || !strings.Contains(err.Error(), "is gone") {
		t.Error(err)
	}
}

// Networks of different slices have different numbers, and those of one are in a row.
func TestNumber(t *testing.T) {
	h := &Hub{number: coloring.MaxNetwork - 2}
	used := map[uint16]bool{2: true}
	for _, want := range []uint16{3, 6} { // past the end, and past what is in use
		if first, err := h.Number(3, used); err != nil || first != want {
			t.Error(first, err)
		}
	}
	for n := range uint16(coloring.MaxNetwork) {
		used[n+1] = n%2 == 0
	}
	if first, err := h.Number(1, used); err != nil || used[first] {
		t.Error(first, err)
	}
	if first, err := h.Number(2, used); err == nil {
		t.Error(first)
	}
}

// What a host captures is in the store, whole, and each page went there once.
func TestPages(t *testing.T) {
	w := newWorld(t)
	s := w.session(t)
	o := w.prepare(t, "c", s, func(cut.Event) {})
	const pages = 3 * batchPages
	regions := []store.Region{{ID: "pc.ram", Length: (pages + 100) * store.PageSize}, {ID: "vga", Length: store.PageSize}}
	content := func(i int) []byte {
		b := make([]byte, store.PageSize)
		r := rand.New(rand.NewPCG(uint64(i), 1))
		for k := range b {
			b[k] = byte(r.Uint32())
		}
		return b
	}
	capture := func(session agent.Session, last int) (store.BlobRef, store.MemoryStats) {
		p, err := session.NewPageWriter(t.Context(), regions)
		if err != nil {
			t.Error(err)
			return store.BlobRef{}, store.MemoryStats{}
		}
		for i := range pages {
			err = errors.Join(err, p.Page(0, uint64(i)*store.PageSize, content(i%(pages-7))))
		}
		err = errors.Join(err, p.Page(0, 5*store.PageSize, content(last)), p.Zero(0, 6*store.PageSize), p.Page(1, 0, content(1)))
		ref, cerr := p.Close()
		if err = errors.Join(err, cerr); err != nil {
			t.Error(err)
		}
		return ref, p.Stats()
	}
	var refs [2]store.BlobRef
	var stats [2]store.MemoryStats
	var all sync.WaitGroup
	for i := range refs {
		all.Go(func() { refs[i], stats[i] = capture(o.Session, 100000+i) })
	}
	all.Wait()
	if got := stats[0].NewPages + stats[1].NewPages; got != pages-7+2 {
		t.Errorf("%d pages were sent, want each of %d once", got, pages-7+2)
	}
	if st := stats[0]; st.Pages != pages || st.ZeroPages != 101 || st.SentPages != pages+3 {
		t.Errorf("%+v", st)
	}
	blob, err := o.Session.PutBlob(t.Context(), content(9))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if b, err := w.store.GetBlob(t.Context(), blob); err != nil || !bytes.Equal(b, content(9)) {
		t.Error("the blob is not what was put", err)
	}
	for n, ref := range refs {
		r, err := w.store.OpenMemory(t.Context(), ref)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		buf := make([]byte, store.PageSize)
		for i := range pages + 100 {
			zero, err := r.Page(0, uint64(i)*store.PageSize, buf)
			want := content(i % (pages - 7))
			if i == 5 {
				want = content(100000 + n)
			}
			if wantZero := i == 6 || i >= pages; err != nil || zero != wantZero || !zero && !bytes.Equal(buf, want) {
				t.Fatalf("page %d: zero %t, %v", i, zero, err)
			}
		}
	}
	// The next cut finds all of it there.
	s = w.session(t)
	o = w.prepare(t, "d", s, func(cut.Event) {})
	if _, st := capture(o.Session, 100000); st.NewPages != 0 {
		t.Errorf("%d pages were sent again", st.NewPages)
	}
}

// What a host says is not believed, and its sessions are its cuts' alone.
func TestPagesRefused(t *testing.T) {
	w := newWorld(t)
	o := w.prepare(t, "c", w.session(t), func(cut.Event) {})
	s := o.Session.(*session)
	page := bytes.Repeat([]byte{1}, store.PageSize)
	if _, _, err := s.send(t.Context(), []int{0}, []store.Hash{store.Sum([]byte("another"))}, page); err == nil || !strings.Contains(err.Error(), "was sent as") {
		t.Error(err)
	}
	p := &pageWriter{s: s, regions: []store.Region{{ID: "r", Length: store.PageSize}}, tables: []map[uint64]*run{{0: {}}}}
	p.ctx, p.cancel = context.WithCancelCause(t.Context())
	p.tables[0][0].hashes[0] = store.Sum([]byte("another"))
	if ref, err := p.Close(); err == nil || !ref.IsZero() || !strings.Contains(err.Error(), "was not given") {
		t.Error(ref, err)
	}
	w.host.report(cut.Aborted{Cut: "c", Host: "alpha"})
	other := newSession(s.id+"x", s.client)
	if _, err := other.PutBlob(t.Context(), page); err == nil || !strings.Contains(err.Error(), "is over") {
		t.Error(err)
	}
}

// Orders and events pass as they are, and in order.
func TestOrdersAndEvents(t *testing.T) {
	w := newWorld(t)
	events := make(chan cut.Event, 64)
	o := agent.Order{
		Slice: "s", Effect: cut.SendPrepare{Cut: "c", Host: "alpha", From: 255, To: 0}, Session: agent.InStore(w.session(t)), Mode: qemu.Precopy,
		Newer: agent.Trigger, Limits: cut.Limits{Frames: 3, Bytes: 1 << 20}, Halt: true, Networks: map[uint16]string{1: "lan", 65535: "wan"},
	}
	w.agent.Handle(o, func(ev cut.Event) { events <- ev })
	got := w.arrived(t)
	o.Session, got.Session = nil, nil
	if !reflect.DeepEqual(got, o) {
		t.Errorf("arrived %+v, want %+v", got, o)
	}
	at := time.Unix(1e9, 7)
	for _, ef := range []cut.Effect{
		cut.SendCut{Cut: "c", Host: "alpha", Nodes: []string{"m", "n"}, To: 0}, cut.SendPoll{Cut: "c", Host: "alpha", Round: 9, Epoch: 255},
		cut.SendCollect{Cut: "c", Host: "alpha"}, cut.SendAbort{Cut: "c", Host: "alpha", To: 255}, cut.SendCommit{Cut: "c", Host: "alpha"},
	} {
		w.agent.Handle(agent.Order{Slice: "s", Effect: ef, At: at}, func(ev cut.Event) { events <- ev })
		got := w.arrived(t)
		if !reflect.DeepEqual(got.Effect, ef) {
			t.Errorf("arrived %+v, want %+v", got.Effect, ef)
		}
		if _, ok := ef.(cut.SendCut); ok && !got.At.Equal(at) {
			t.Errorf("at %s, want %s", got.At, at)
		}
	}
	for _, ev := range []cut.Event{
		cut.Prepared{Cut: "c", Host: "alpha"}, cut.NodeCut{Cut: "c", Node: "n"}, cut.Stored{Cut: "c", Node: "n"},
		cut.Counters{Cut: "c", Host: "alpha", Round: 2, Counts: []cut.ChannelCount{{Channel: cut.Channel{From: "alpha", To: "beta", Network: "lan"}, Sent: 5, Received: 1 << 40}}},
		cut.Failed{Cut: "c", Host: "alpha", Node: "n", Reason: "no room"}, cut.Collected{Cut: "c", Host: "alpha"}, cut.Committed{Cut: "c", Host: "alpha"},
	} {
		w.host.report(ev)
		if got := <-events; !reflect.DeepEqual(got, ev) {
			t.Errorf("heard %+v, want %+v", got, ev)
		}
	}
	w.host.results = agent.HostResult{Host: "alpha", Dropped: 2, Reads: map[int]int64{1: 5}, Counters: certificate.Host{Name: "alpha", Handed: 4, Seen: 4}, Nodes: []agent.NodeResult{
		{Node: "m", CutAt: at.UTC(), Pause: time.Millisecond, Stats: store.MemoryStats{Pages: 1, ZeroPages: 2, RawBytes: 3, SentPages: 4, NewPages: 5, StoredBytes: 6}, RawBytes: 9, Held: 1},
		{
			Node: "n", CutAt: at.UTC(), Device: store.BlobRef{Hash: store.Sum(nil), Size: 7}, Interface: []agent.Interface{{Network: 1, Address: net.HardwareAddr{2, 0, 0, 0, 0, 1}, MTU: 1500}},
			Steps: []certificate.Step{{Name: "close", Began: 1, Ended: 2, From: 255, To: 255}}, Gate: certificate.Gate{Handed: 3, Late: 1},
			Recorded: []agent.Recorded{{Node: "n", Epoch: 255, At: at.UTC(), Data: []byte("x")}},
		},
	}}
	if got, err := w.agent.Results("s", "c"); err != nil || !reflect.DeepEqual(got, w.host.results) {
		t.Errorf("%v\n got %+v\nwant %+v", err, got, w.host.results)
	}
}

// A connection that is lost in a cut is a failure of it, and what the coordinator then
// orders is taken there as soon as the agent is back.
func TestConnectionLost(t *testing.T) {
	w := newWorld(t)
	events := make(chan cut.Event, 1024)
	report := func(ev cut.Event) { events <- ev }
	w.prepare(t, "c", w.session(t), report)
	w.cable.unplug(true)
	if f, ok := (<-events).(cut.Failed); !ok || f.Host != "alpha" || f.Cut != "c" {
		t.Fatalf("%+v", f)
	}
	w.await(t, false)
	abort := agent.Order{Slice: "s", Effect: cut.SendAbort{Cut: "c", Host: "alpha", To: 0}}
	w.agent.Handle(abort, report)
	if f, ok := (<-events).(cut.Failed); !ok || !strings.Contains(f.Reason, "not connected") {
		t.Errorf("%+v", f)
	}
	// The agent has something to say that nobody hears yet.
	w.host.report(cut.Failed{Cut: "c", Host: "alpha", Reason: "the store is away"})
	if got := <-w.host.abandoned; got != "s" {
		t.Errorf("the cut of %q is given up", got)
	}
	w.cable.unplug(false)
	w.await(t, true)
	w.agent.Handle(abort, report)
	if o := w.arrived(t); !reflect.DeepEqual(o.Effect, abort.Effect) {
		t.Errorf("%+v", o.Effect)
	}
	w.host.report(cut.Aborted{Cut: "c", Host: "alpha"})
	for ev := range events {
		if _, ok := ev.(cut.Aborted); ok {
			break
		}
	}
	// The run is the same one, and goes on.
	if _, err := w.agent.Exec(t.Context(), "s", "n", []string{"true"}, nil); err != nil {
		t.Error(err)
	}
	w.prepare(t, "d", w.session(t), report)
	w.host.report(cut.Prepared{Cut: "d", Host: "alpha"})
	if ev := <-events; !reflect.DeepEqual(ev, cut.Prepared{Cut: "d", Host: "alpha"}) {
		t.Errorf("%+v", ev)
	}
}

// A cut that has ended is not given up when the connection is lost later.
func TestNothingToAbandon(t *testing.T) {
	w := newWorld(t)
	events := make(chan cut.Event, 64)
	w.prepare(t, "c", w.session(t), func(ev cut.Event) { events <- ev })
	w.host.report(cut.Aborted{Cut: "c", Host: "alpha"})
	<-events
	w.cable.unplug(true)
	w.await(t, false)
	time.Sleep(time.Second) // twice the bound
	if len(w.host.abandoned) > 0 {
		t.Error("a cut that had ended was given up")
	}
	w.cable.unplug(false)
	w.await(t, true)
}

// A host that is away is lost when it has been for too long, and what that is may change
// meanwhile.
func TestAwayForTooLong(t *testing.T) {
	w := newWorld(t)
	gone, changed := w.agent.SwitchGone(), w.hub.Changed()
	if since, away := w.hub.Away("alpha"); away || since.Before(w.hub.began) {
		t.Errorf("connected: away %t since %s", away, since)
	}
	w.cable.unplug(true)
	w.await(t, false)
	<-changed
	if since, away := w.hub.Away("alpha"); !away || since.Before(w.hub.began) {
		t.Errorf("unplugged: away %t since %s", away, since)
	}
	if _, away := w.hub.Away("never"); !away {
		t.Error("a host that was never here is not away")
	}
	select {
	case <-gone:
		t.Error("lost too soon")
	case <-time.After(2 * firstRetry):
	}
	w.hasty.Store(1)
	<-gone
}

// What ran for a slice that was taken down meanwhile is stopped when the agent is back.
func TestDownWhileAway(t *testing.T) {
	w := newWorld(t)
	w.cable.unplug(true)
	w.await(t, false)
	if err := w.agent.Close(); err == nil || !strings.Contains(err.Error(), "not connected") {
		t.Error(err)
	}
	w.cable.unplug(false)
	<-w.host.closed
}

// A state comes whole or not at all.
func TestLoad(t *testing.T) {
	w := newWorld(t)
	skeleton := decoded(t)
	var want bytes.Buffer
	if err := stream.Encode(&want, skeleton, noise{}); err != nil {
		t.Fatal(err)
	}
	if err := w.agent.LoadNode(t.Context(), "s", "n", skeleton, noise{}); err != nil || !bytes.Equal(w.host.loaded, want.Bytes()) {
		t.Errorf("%d bytes came, want %d, %v", len(w.host.loaded), want.Len(), err)
	}
	if err := w.agent.LoadNode(t.Context(), "s", "n", skeleton, noise{fail: true}); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Error(err)
	}
}

// decoded is a real VM's state, without its pages.
func decoded(t *testing.T) *stream.Skeleton {
	t.Helper()
	f, err := os.Open("../migration/qemu/testdata/microvm-precopy.bin.gz")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	skeleton, err := stream.NewDecoder(z).Decode(func([]stream.RAMBlock) (stream.PageSink, error) { return nowhere{}, nil })
	if err != nil {
		t.Fatal(err)
	}
	return skeleton
}

type nowhere struct{}

func (nowhere) Page(int, uint64, []byte) error { return nil }
func (nowhere) Zero(int, uint64) error         { return nil }

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// noise is memory that no compression makes smaller.
type noise struct{ fail bool }

func (n noise) Page(_ int, offset uint64, buf []byte) (bool, error) {
	if n.fail && offset > 0 {
		return false, fmt.Errorf("page at %#x is damaged", offset)
	}
	r := rand.New(rand.NewPCG(offset, 2))
	for i := range buf[:store.PageSize] {
		buf[i] = byte(r.Uint32())
	}
	return false, nil
}

// An agent that follows another goes on with its run, and the server with it.
func TestTakeOver(t *testing.T) {
	w := newWorld(t)
	w.leave.Store(true)
	for _, inCut := range []bool{false, true} {
		if err := w.end(); err != nil {
			t.Fatal(err)
		}
		w.await(t, false)
		select {
		case <-w.host.closed:
			t.Fatal("what runs was stopped")
		default:
		}
		w.host.inCut = inCut
		w.serve()
		w.await(t, true)
		if want := filepath.Join(w.cfg.Dir, sharedDir); w.found != want {
			t.Errorf("taken over from %q, want %q", w.found, want)
		}
		if r, err := w.agent.Exec(t.Context(), "s", "n", []string{"echo", "hello"}, nil); err != nil || string(r.Stdout) != "echo hello" {
			t.Errorf("%q, %v", r.Stdout, err)
		}
	}
	// Of the cut nobody has spoken since.
	if slice := <-w.host.abandoned; slice != "s" {
		t.Errorf("the cut of %q was given up", slice)
	}
	// Two agents do not share a directory.
	if err := ServeHost(t.Context(), w.cfg); err == nil || !strings.Contains(err.Error(), "an agent runs here already") {
		t.Error(err)
	}
	w.leave.Store(false)
	if err := w.agent.Close(); err != nil {
		t.Fatal(err)
	}
	<-w.host.closed
	if left, err := filepath.Glob(filepath.Join(w.cfg.Dir, "*", "*")); err != nil || len(left) > 0 {
		t.Errorf("left: %q, %v", left, err)
	}
}

// One that can't says so when it is asked, and leaves nothing.
func TestTakeOverFails(t *testing.T) {
	w := newWorld(t)
	w.leave.Store(true)
	if err := w.end(); err != nil {
		t.Fatal(err)
	}
	w.await(t, false)
	w.lost = errors.New("the switch has ended")
	w.serve()
	w.await(t, true)
	if _, err := w.agent.Exec(t.Context(), "s", "n", []string{"echo"}, nil); err == nil || !strings.Contains(err.Error(), "what ran there is gone") {
		t.Error(err)
	}
	if left, err := filepath.Glob(filepath.Join(w.cfg.Dir, "*", "*")); err != nil || len(left) > 0 {
		t.Errorf("left: %q, %v", left, err)
	}
	w.leave.Store(false)
}
