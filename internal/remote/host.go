package remote

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
	"violin/internal/agent"
	"violin/internal/machine"
	stream "violin/internal/migration/qemu"
	"violin/internal/priority"
	"violin/internal/record"
	"violin/internal/store"
	"violin/internal/trust"
)

const (
	// DefaultAbandon is how long an agent waits, in a cut, for a server whose
	// connection was lost. It is longer than a coordinator waits for the answer to an
	// abort, so that whoever of the two gives up first, it is not the agent.
	DefaultAbandon = 45 * time.Second

	// dialBound is how long it may take to connect to one of the servers or another,
	// but each has dialLeast.
	dialBound, dialLeast  = 10 * time.Second, 3 * time.Second
	firstRetry, lastRetry = 250 * time.Millisecond, 10 * time.Second
	cutRetry              = time.Second // the longest in a cut, in which frames may wait for what the server orders
)

// HostConfig describes the agent's end.
type HostConfig struct {
	Servers  []string // HOST:PORT of each: one leads, and others hand on to it
	Token    *trust.Token
	Identity *trust.Identity
	Dir      string       // sockets and logs of what runs
	Images   string       // directory
	Files    string       // directory of what the server has sent
	Device   string       // of the underlay; the switch takes it for as long as a slice runs
	Address  netip.Prefix // of the host there
	Version  string
	Site     string        // that the host is in; may be empty
	Abandon  time.Duration // 0 for [DefaultAbandon]
	// Keeper is the command of [agent.Config.Keeper], and Passed is its.
	Keeper []string
	Passed func(node, step string)
	// Leave, at the end, tells whether what runs is left to the next agent of this
	// host; nil for no.
	Leave  func() bool
	Logger *slog.Logger

	// start starts a run's agent; nil for [agent.Start] on this machine, and then mac
	// is that of Device. find takes one over, as [agent.Find].
	start, find func(context.Context, agent.Config) (runner, error)
	mac         net.HardwareAddr
	now         func() time.Time // nil for the clock
}

// Host is one machine's agent. It serves a run a slice; the runs share the machine's
// switch, and so one [agent.Agent].
type Host struct {
	cfg   HostConfig
	log   *slog.Logger
	stock stock

	fence    *fence
	underlay agent.Underlay
	device   *machine.Device // nil where a test has none
	next     int             // of the servers; of the goroutine that connects

	sharing sync.Mutex // held while runs begin and end

	mu     sync.Mutex
	agent  runner                              // nil while there is no run
	runs   map[string]*hostRun                 // by id
	ingest violinv1connect.IngestServiceClient // by the connection there is; nil for none
	supply violinv1connect.SupplyServiceClient // ditto
}

// ServeHost joins the server, if the host has not yet, and serves it until ctx ends,
// over as many connections as it takes. It begins with what an agent before it has left
// running. In the end it stops what runs, or leaves it to the next.
func ServeHost(ctx context.Context, cfg HostConfig) error {
	if cfg.Abandon == 0 {
		cfg.Abandon = DefaultAbandon
	}
	if cfg.now == nil {
		cfg.now = time.Now
	}
	h := &Host{cfg: cfg, log: cfg.Logger, runs: map[string]*hostRun{}, stock: stock{images: cfg.Images, dir: cfg.Files, busy: map[store.Hash]chan struct{}{}}, underlay: agent.Underlay{Device: cfg.Device, Addr: cfg.Address, MAC: cfg.mac}}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return fmt.Errorf("run an agent: %w", err)
	}
	lock, err := h.lock()
	if err != nil {
		return err
	}
	defer lock.Close()
	device, runs, err := h.left()
	if err != nil {
		return err
	}
	if cfg.start == nil {
		if err := h.onThisMachine(device); err != nil {
			return err
		}
	}
	if len(runs) > 0 {
		h.takeOver(ctx, runs)
	}
	if err := h.join(ctx); err != nil {
		return err
	}
	config, err := cfg.Identity.Config()
	if err != nil {
		return err
	}
	authority, err := cfg.Identity.Authority()
	if err != nil {
		return err
	}
	if h.fence, err = newFence(filepath.Join(cfg.Dir, termFile), hex.EncodeToString(authority[:]), cfg.Identity.Host); err != nil {
		return err
	}
	retry := firstRetry
	for ctx.Err() == nil {
		began := time.Now()
		err := h.connect(ctx, config)
		if ctx.Err() != nil {
			break
		}
		if time.Since(began) > lastRetry {
			retry = firstRetry
		}
		if h.inCut() {
			retry = min(retry, cutRetry)
		}
		h.log.Warn("not connected to the server; trying again", "server", h.server(), "in", retry, "err", err)
		select {
		case <-time.After(retry):
		case <-ctx.Done():
		}
		retry = min(2*retry, lastRetry)
	}
	if cfg.Leave != nil && cfg.Leave() {
		h.mu.Lock()
		defer h.mu.Unlock()
		for _, r := range h.runs {
			h.log.Info("what runs is left to the next agent", "slice", r.slice)
		}
		return nil
	}
	return h.endOthers(nil)
}

// inCut tells whether a cut has not ended on the host.
func (h *Host) inCut() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, r := range h.runs {
		if r.agent.InCut(r.slice) {
			return true
		}
	}
	return false
}

// lock sees to it that there is one agent a directory.
func (h *Host) lock() (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(h.cfg.Dir, "agent.lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("run an agent: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("an agent runs here already: lock %s: %w; give another one its own --run-dir", f.Name(), err)
	}
	return f, nil
}

// runEntry is what is written down of a run, before it begins and until it has ended.
type runEntry struct{ Run, Slice string }

// Below the agent's directory: what the runs share, and a file for each run.
const (
	sharedDir  = "host"
	deviceFile = "device.json" // the underlay's device as it was before the switch took it
	runsDir    = "runs"
	runSuffix  = ".json"
	termFile   = "term.json" // of the server that was obeyed last
)

func (h *Host) dir() string { return filepath.Join(h.cfg.Dir, sharedDir) }

func (h *Host) runFile(run string) string { return filepath.Join(h.cfg.Dir, runsDir, run+runSuffix) }

// left finds the runs that an agent before this one has left, and the device.
func (h *Host) left() (device *machine.Device, runs []runEntry, err error) {
	const help = "stop what runs by the agent that wrote it, or remove the file and restart the machine"
	if old, err := filepath.Glob(filepath.Join(h.cfg.Dir, "*", "run.json")); err != nil || len(old) > 0 {
		return nil, nil, errors.Join(fmt.Errorf("take over what runs: %q are of another version of violin; %s", old, help), err)
	}
	files, err := filepath.Glob(h.runFile("*"))
	if err != nil {
		return nil, nil, err
	}
	for _, f := range files {
		var e runEntry
		switch err := record.Read(f, &e); {
		case errors.Is(err, fs.ErrNotExist): // nothing had been begun
		case err != nil:
			return nil, nil, fmt.Errorf("%w; %s", err, help)
		default:
			runs = append(runs, e)
		}
	}
	if len(runs) == 0 {
		return nil, nil, errors.Join(os.RemoveAll(filepath.Join(h.cfg.Dir, runsDir)), os.RemoveAll(h.dir()))
	}
	if err := record.Read(filepath.Join(h.dir(), deviceFile), &device); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("%w; %s", err, help)
	}
	return device, runs, nil
}

// takeOver goes on with what an agent before this one has left running. If that can't
// be, nothing is left of it, and the server is told so when it asks.
func (h *Host) takeOver(ctx context.Context, runs []runEntry) {
	a, err := h.cfg.find(ctx, h.agentConfig())
	if err != nil {
		h.log.Error("what an agent before this one left running is lost", "err", err)
		if err := errors.Join(h.restore(), os.RemoveAll(h.dir()), os.RemoveAll(filepath.Join(h.cfg.Dir, runsDir))); err != nil {
			h.log.Error("its remains were not removed", "err", err)
		}
		return
	}
	h.mu.Lock()
	h.agent = a
	bySlice := map[string]*hostRun{}
	for _, e := range runs {
		r := &hostRun{id: e.Run, slice: e.Slice, agent: a, followers: map[string]*follower{}}
		r.box.init(h.cfg.Abandon, func() { a.Abandon(r.slice) })
		if a.InCut(r.slice) {
			r.box.open()
			r.box.detach(r.box.attach()) // the server has not come yet
		}
		h.runs[r.id], bySlice[r.slice] = r, r
		h.log.Info("taken over from the agent before", "slice", r.slice)
	}
	h.mu.Unlock()
	a.FollowOn(ctx, func(slice, node string, blocks []stream.RAMBlock) agent.Lazy {
		r := bySlice[slice]
		if r == nil { // of no run that is known: the server ends it
			r = &hostRun{followers: map[string]*follower{}}
		}
		return h.lazy(r, node, blocks, nil)
	})
}

func (h *Host) agentConfig() agent.Config {
	return agent.Config{
		Host: h.cfg.Identity.Host, Dir: h.dir(), Underlay: h.underlay, Keeper: h.cfg.Keeper, Passed: h.cfg.Passed, Logger: h.log,
	}
}

// restore gives the underlay's device back what the switch took of it.
func (h *Host) restore() error {
	if h.device == nil {
		return nil
	}
	return h.device.Restore()
}

// onThisMachine makes the runs' agent a real one. While a run goes on the device is not
// as it was.
func (h *Host) onThisMachine(before *machine.Device) (err error) {
	if before != nil && before.Name == h.cfg.Device {
		h.device = before
	} else if h.device, err = machine.FindDevice(h.cfg.Device); err != nil {
		return err
	}
	h.underlay.MAC, h.underlay.MTU = h.device.MAC, h.device.MTU
	if len(h.underlay.MAC) != 6 {
		return fmt.Errorf("network device %q is no Ethernet device", h.cfg.Device)
	}
	platform := machine.New()
	if h.cfg.Keeper != nil {
		platform = machine.Lasting()
	}
	urgency := &priority.Shared{PID: os.Getpid(), Keep: priority.Lowered, Log: h.log}
	h.cfg.start = func(ctx context.Context, c agent.Config) (runner, error) {
		c.Platform, c.Urgency = platform, urgency
		a, err := agent.Start(ctx, c)
		if err != nil {
			return nil, errors.Join(err, h.device.Restore()) // and no nil *agent.Agent in a runner
		}
		return a, nil
	}
	h.cfg.find = func(ctx context.Context, c agent.Config) (runner, error) {
		c.Platform, c.Urgency = platform, urgency
		a, err := agent.Find(ctx, c)
		if err != nil {
			return nil, err
		}
		return a, nil
	}
	return nil
}

// join gets the host its certificate, once.
func (h *Host) join(ctx context.Context) error {
	id, t := h.cfg.Identity, h.cfg.Token
	done, err := id.Joined(t)
	if err != nil || done {
		return err
	}
	if t == nil {
		return fmt.Errorf("host %s has not joined %s yet: --join needs TOKEN@SERVER:PORT; `violin token create`, on the server, makes a token", id.Host, h.server())
	}
	conn, err := h.dial(ctx, trust.JoinConfig(t))
	if err != nil {
		return fmt.Errorf("join %s: %w", h.server(), err)
	}
	l, err := newLink(conn, true, http.NotFoundHandler(), h.log)
	if err != nil {
		return fmt.Errorf("join %s: %w", h.server(), err)
	}
	defer l.close()
	ctx, cancel := context.WithTimeout(ctx, dialBound)
	defer cancel()
	client := violinv1connect.NewJoinServiceClient(l.client, "http://server", callOptions()...)
	err = id.Join(ctx, t, conn.ConnectionState(), func(ctx context.Context, request []byte) ([]byte, error) {
		r, err := client.Enroll(ctx, &violinv1.EnrollRequest{Token: t.String(), Host: id.Host, Request: request})
		if err != nil {
			return nil, said(err)
		}
		return r.GetCertificate(), nil
	})
	if err != nil {
		return fmt.Errorf("join %s: %w", h.server(), err)
	}
	h.log.Info("joined", "server", h.server(), "host", id.Host)
	return nil
}

// server is the one that is tried next, or was connected to last.
func (h *Host) server() string { return h.cfg.Servers[h.next] }

// dial connects to a server: that of before, or else the next that can be reached.
func (h *Host) dial(ctx context.Context, config *tls.Config) (*tls.Conn, error) {
	d := tls.Dialer{NetDialer: &net.Dialer{KeepAlive: keepAlive}, Config: config}
	var errs []error
	for range h.cfg.Servers {
		ctx, cancel := context.WithTimeout(ctx, max(dialBound/time.Duration(len(h.cfg.Servers)), dialLeast))
		c, err := d.DialContext(ctx, "tcp", h.server())
		cancel()
		if err == nil {
			return c.(*tls.Conn), nil
		}
		errs = append(errs, fmt.Errorf("%s: %w", h.server(), err))
		h.next = (h.next + 1) % len(h.cfg.Servers)
	}
	return nil, errors.Join(errs...)
}

// connect serves one connection to its end.
func (h *Host) connect(ctx context.Context, config *tls.Config) error {
	conn, err := h.dial(ctx, config)
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.Handle(violinv1connect.NewAgentServiceHandler(h, append(serveOptions(h.log), connect.WithInterceptors(h.fence))...))
	mux.Handle(violinv1connect.NewProvisionServiceHandler(h, append(serveOptions(h.log), connect.WithInterceptors(h.fence))...))
	l, err := newLink(conn, true, mux, h.log)
	if err != nil {
		return err
	}
	defer l.close()
	h.mu.Lock()
	h.ingest = violinv1connect.NewIngestServiceClient(l.client, "http://server", callOptions()...)
	h.supply = violinv1connect.NewSupplyServiceClient(l.client, "http://server", callOptions()...)
	h.mu.Unlock()
	h.log.Info("connected", "server", h.server())
	renewing, stop := context.WithCancel(ctx)
	defer stop()
	go h.renew(renewing, violinv1connect.NewRenewalServiceClient(l.client, "http://server", callOptions()...))
	select {
	case <-l.done():
	case <-ctx.Done():
		return ctx.Err()
	}
	return errors.New("the connection was lost")
}

// hostRun is what one Begin began.
type hostRun struct {
	id, slice string
	agent     runner
	box       mailbox
	followers map[string]*follower // by node; guarded by the host's mu
}

// running returns what a call is about.
func (h *Host) running(id string) (*hostRun, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	r := h.runs[id]
	if r == nil {
		return nil, gone(h.cfg.Identity.Host)
	}
	return r, nil
}

// endOthers ends the runs that are not to be kept.
func (h *Host) endOthers(keep []string) error {
	h.mu.Lock()
	ids := slices.Sorted(maps.Keys(h.runs))
	h.mu.Unlock()
	var errs []error
	for _, id := range ids {
		if !slices.Contains(keep, id) {
			errs = append(errs, h.end(id))
		}
	}
	return errors.Join(errs...)
}

// end stops what runs of a slice; after the last one, the switch.
func (h *Host) end(id string) error {
	h.sharing.Lock()
	defer h.sharing.Unlock()
	return h.endLocked(id)
}

// endLocked does so with sharing held.
func (h *Host) endLocked(id string) error {
	h.mu.Lock()
	r := h.runs[id]
	delete(h.runs, id)
	last := len(h.runs) == 0
	h.mu.Unlock()
	if r == nil {
		return nil
	}
	h.log.Info("stopping", "slice", r.slice)
	r.box.close()
	err := r.agent.Leave(r.slice)
	if last {
		err = errors.Join(err, h.stopSharing(r.agent))
	}
	return errors.Join(err, h.forget(id), h.stock.sweep(time.Now()))
}

// stopSharing stops the switch, with all that is left on it.
func (h *Host) stopSharing(a runner) error {
	h.mu.Lock()
	h.agent = nil
	h.mu.Unlock()
	return errors.Join(a.Close(), h.restore(), os.RemoveAll(h.dir()))
}

// forget removes what is written down of a run.
func (h *Host) forget(id string) error {
	paths, err := filepath.Glob(h.runFile(id) + "*")
	errs := []error{err}
	for _, p := range paths {
		errs = append(errs, os.Remove(p))
	}
	return errors.Join(errs...)
}

// Describe implements the agents' protocol.
func (h *Host) Describe(_ context.Context, req *violinv1.DescribeRequest) (*violinv1.DescribeResponse, error) {
	if err := h.endOthers(req.GetRuns()); err != nil {
		h.log.Error("what ran for a server that is gone was not stopped cleanly", "err", err)
	}
	total, available, err := machine.Memory()
	if err != nil {
		return nil, err
	}
	u := h.underlay
	return &violinv1.DescribeResponse{
		Version: h.cfg.Version, Device: u.Device, Address: u.Addr.String(), Mac: u.MAC, Mtu: uint32(u.MTU),
		MemoryBytes: total, AvailableBytes: available, Cpus: uint32(runtime.NumCPU()), Site: h.cfg.Site,
	}, nil
}

// Begin implements the agents' protocol.
func (h *Host) Begin(ctx context.Context, req *violinv1.BeginRequest) (*violinv1.BeginResponse, error) {
	if len(req.GetRun()) < 16 || filepath.Base(req.GetRun()) != req.GetRun() {
		return nil, refuse("%q is no name for a run", req.GetRun())
	}
	h.sharing.Lock()
	defer h.sharing.Unlock()
	h.mu.Lock()
	old := ""
	for id, r := range h.runs {
		if r.slice == req.GetSlice() {
			old = id // of a time before
		}
	}
	h.mu.Unlock()
	if err := h.endLocked(old); err != nil {
		h.log.Error("what ran before was not stopped cleanly", "err", err)
	}
	r := &hostRun{id: req.GetRun(), slice: req.GetSlice(), followers: map[string]*follower{}}
	var err error
	if r.agent, err = h.begin(ctx, r); err != nil {
		return nil, errors.Join(err, h.forget(r.id))
	}
	r.box.init(h.cfg.Abandon, func() { r.agent.Abandon(r.slice) })
	h.mu.Lock()
	defer h.mu.Unlock()
	h.agent, h.runs[r.id] = r.agent, r
	h.log.Info("started", "slice", r.slice)
	return &violinv1.BeginResponse{}, nil
}

// begin writes a run down, and starts the switch unless another run has. sharing is held.
func (h *Host) begin(ctx context.Context, r *hostRun) (runner, error) {
	if h.cfg.Keeper != nil {
		if err := os.MkdirAll(filepath.Dir(h.runFile(r.id)), 0o700); err != nil {
			return nil, fmt.Errorf("begin with slice %q: %w", r.slice, err)
		}
		if err := record.Write(h.runFile(r.id), runEntry{Run: r.id, Slice: r.slice}); err != nil {
			return nil, err
		}
	}
	h.mu.Lock()
	a := h.agent
	h.mu.Unlock()
	if a != nil {
		return a, nil
	}
	err := os.MkdirAll(h.dir(), 0o700)
	if err == nil && h.cfg.Keeper != nil {
		err = record.Write(filepath.Join(h.dir(), deviceFile), h.device)
	}
	if err == nil {
		a, err = h.cfg.start(ctx, h.agentConfig())
	}
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(h.dir()))
	}
	return a, nil
}

// End implements the agents' protocol.
func (h *Host) End(_ context.Context, req *violinv1.EndRequest) (*violinv1.EndResponse, error) {
	return &violinv1.EndResponse{}, h.end(req.GetRun())
}
