package remote

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
	"violin/internal/agent"
	"violin/internal/coloring"
	"violin/internal/store"
	"violin/internal/trust"
)

// HubConfig is what [Listen] needs.
type HubConfig struct {
	Address   string // to listen on, HOST:PORT
	Authority *trust.Authority
	Images    string // the directory that hosts, too, have images in
	// Users takes connections that are no agents'. It is not to wait for their ends.
	Users func(*tls.Conn)
	// Term is greater than that of any server before this one. Agents obey no server of a
	// term that is lower than one that they have obeyed.
	Term uint64
	// Runs are what servers before this one have begun, and what is to go on. Agents end
	// all else that they run.
	Runs []Run
	// Patience is how long a host may be away until it counts as lost for a slice; nil for
	// [DefaultPatience]. It is asked anew as long as a host is away.
	Patience func(slice string) time.Duration
	Logger   *slog.Logger
}

// DefaultPatience is how long a host may be away where nobody says otherwise.
const DefaultPatience = time.Minute

// Run is what a host runs of a slice, as it was noted.
type Run struct {
	Host, Slice string
	Name        string // of the run
	Peer        uint16 // the host's number among the hosts
}

// Hub is a server's end of its agents' connections.
type Hub struct {
	cfg      HubConfig
	log      *slog.Logger
	listener net.Listener
	serving  sync.WaitGroup
	lifetime context.Context
	end      context.CancelFunc
	began    time.Time

	mu      sync.Mutex
	hosts   map[string]*joined
	number  uint16        // of the network that was numbered last
	changed chan struct{} // closed, and replaced, when a host's connection comes or goes
}

// joined is a host that has joined, connected or not.
type joined struct {
	hub    *Hub
	name   string
	number uint16 // among the hosts, from 1
	log    *slog.Logger
	ingest *ingest
	supply *supply

	mu      sync.Mutex
	link    *link // nil if it is not connected
	client  violinv1connect.AgentServiceClient
	since   time.Time // that it is connected, or is not; zero for never
	address string
	machine Machine
	running map[string]*Agent // by run
	changed chan struct{}     // closed, and replaced, when link changes
}

// Machine is what a host's agent tells of its machine.
type Machine struct {
	Version   string
	Underlay  agent.Underlay
	Memory    uint64 // bytes; what there is
	Available uint64 // and what can be had of it
	CPUs      int
	Site      string // that its agent was told; empty for none
}

// HostInfo is a host as the server sees it.
type HostInfo struct {
	Name      string
	Address   string // of its connection
	Connected bool
	Since     time.Time // that it is, or is not; zero if it has not been since the server started
	Slices    []string  // that run there, by name
	Machine   Machine
}

// Listen begins to take agents' connections in.
func Listen(ctx context.Context, cfg HubConfig) (*Hub, error) {
	config, err := cfg.Authority.ServerConfig()
	if err != nil {
		return nil, err
	}
	h := &Hub{
		cfg: cfg, log: cfg.Logger, began: time.Now(), hosts: map[string]*joined{}, number: uint16(mathrand.N(coloring.MaxNetwork)), changed: make(chan struct{}),
	}
	var lc net.ListenConfig
	if h.listener, err = lc.Listen(ctx, "tcp", cfg.Address); err != nil {
		return nil, fmt.Errorf("listen for agents on %s: %w", cfg.Address, err)
	}
	h.lifetime, h.end = context.WithCancel(context.Background())
	h.goOn(cfg.Runs)
	h.serving.Go(func() { h.accept(config) })
	return h, nil
}

// goOn makes known what is to go on, before any agent can ask.
func (h *Hub) goOn(runs []Run) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, r := range runs {
		j := h.hostLocked(r.Host, r.Peer)
		j.running[r.Name] = newAgent(j, r.Slice, r.Name)
	}
}

// agentOptions are those of all calls to agents.
func (h *Hub) agentOptions() []connect.ClientOption {
	return append(callOptions(), connect.WithInterceptors(asTerm(h.cfg.Term)))
}

// Address is where the hub listens.
func (h *Hub) Address() string { return h.listener.Addr().String() }

// Close ends every connection. The agents go on by themselves.
func (h *Hub) Close() error {
	h.end()
	err := h.listener.Close()
	if errors.Is(err, net.ErrClosed) {
		err = nil // by a call before
	}
	h.mu.Lock()
	for _, j := range h.hosts {
		j.mu.Lock()
		if j.link != nil {
			j.link.close()
		}
		j.mu.Unlock()
	}
	h.mu.Unlock()
	h.serving.Wait()
	return err
}

func (h *Hub) accept(config *tls.Config) {
	for {
		c, err := h.listener.Accept()
		if h.lifetime.Err() != nil {
			return
		}
		if err != nil {
			h.log.Error("a connection was not accepted", "err", err)
			select {
			case <-time.After(time.Second): // such as for want of descriptors
			case <-h.lifetime.Done():
			}
			continue
		}
		h.serving.Go(func() {
			conn := tls.Server(c, config)
			taken := false
			defer func() {
				if !taken {
					conn.Close()
				}
			}()
			ctx, cancel := context.WithTimeout(h.lifetime, handshakeBound)
			err := conn.HandshakeContext(ctx)
			cancel()
			if err != nil {
				h.log.Warn("a connection was refused", "from", c.RemoteAddr().String(), "err", err)
				return
			}
			switch state := conn.ConnectionState(); state.NegotiatedProtocol {
			case trust.AgentProtocol:
				h.serve(conn, trust.Machine(state))
			case trust.JoinProtocol:
				h.serveJoin(conn)
			default:
				if taken = h.cfg.Users != nil; taken {
					h.cfg.Users(conn)
				}
			}
		})
	}
}

// serveJoin serves a stranger, for a while.
func (h *Hub) serveJoin(conn *tls.Conn) {
	mux := http.NewServeMux()
	mux.Handle(violinv1connect.NewJoinServiceHandler(enroll{h}, append(serveOptions(h.log), connect.WithReadMaxBytes(1<<16))...))
	l, err := newLink(conn, false, mux, h.log)
	if err != nil {
		return
	}
	defer l.close()
	select {
	case <-l.done():
	case <-time.After(handshakeBound):
	case <-h.lifetime.Done():
	}
}

type enroll struct{ h *Hub }

// Enroll implements the agents' protocol.
func (e enroll) Enroll(_ context.Context, req *violinv1.EnrollRequest) (*violinv1.EnrollResponse, error) {
	der, err := e.h.cfg.Authority.Admit(req.GetToken(), req.GetHost(), req.GetRequest())
	if err != nil {
		e.h.log.Warn("a host did not join", "host", req.GetHost(), "err", err)
		return nil, connect.NewError(connect.CodePermissionDenied, err)
	}
	e.h.log.Info("a host has joined", "host", req.GetHost())
	return &violinv1.EnrollResponse{Certificate: der}, nil
}

func (h *Hub) host(name string) *joined {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.hostLocked(name, 0)
}

// hostLocked returns a host; a new one gets the number, or for 0 one that none has.
func (h *Hub) hostLocked(name string, number uint16) *joined {
	if j := h.hosts[name]; j != nil {
		return j
	}
	taken := map[uint16]bool{}
	for _, j := range h.hosts {
		taken[j.number] = true
	}
	for n := uint16(1); number == 0; n++ {
		if !taken[n] {
			number = n
		}
	}
	j := &joined{
		hub: h, name: name, number: number, running: map[string]*Agent{}, log: h.log.With("host", name), changed: make(chan struct{}),
		ingest: &ingest{sessions: map[string]*store.Session{}}, supply: &supply{runs: map[string]*offer{}},
	}
	h.hosts[name] = j
	return j
}

// serve serves an agent until its connection ends.
func (h *Hub) serve(conn *tls.Conn, name string) {
	j := h.host(name)
	mux := http.NewServeMux()
	mux.Handle(violinv1connect.NewIngestServiceHandler(j.ingest, serveOptions(j.log)...))
	mux.Handle(violinv1connect.NewSupplyServiceHandler(j.supply, serveOptions(j.log)...))
	mux.Handle(violinv1connect.NewRenewalServiceHandler(&renewal{h: h, cert: conn.ConnectionState().VerifiedChains[0][0]}, serveOptions(j.log)...))
	l, err := newLink(conn, false, mux, j.log)
	if err != nil {
		return
	}
	defer l.close()
	client := violinv1connect.NewAgentServiceClient(l.client, "http://agent", h.agentOptions()...)
	machine, err := j.describe(h.lifetime, client)
	if err != nil {
		j.log.Warn("an agent that connected does not answer", "err", err)
		return
	}
	j.attach(l, client, machine, conn.RemoteAddr().String())
	// Who is put out from now on is cut off; it may have been since the handshake.
	if err := h.cfg.Authority.CheckMachine(conn.ConnectionState()); err != nil {
		j.detach(l)
		j.log.Warn("a connection was refused", "err", err)
		return
	}
	j.log.Info("connected", "from", conn.RemoteAddr().String(), "version", machine.Version)
	select {
	case <-l.done():
	case <-h.lifetime.Done():
	}
	if j.detach(l) {
		j.log.Warn("the connection to its agent was lost")
	}
}

func (j *joined) describe(ctx context.Context, client violinv1connect.AgentServiceClient) (Machine, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeBound)
	defer cancel()
	req := &violinv1.DescribeRequest{}
	j.mu.Lock()
	req.Runs = slices.Collect(maps.Keys(j.running))
	j.mu.Unlock()
	d, err := client.Describe(ctx, req)
	if err != nil {
		return Machine{}, said(err)
	}
	m := Machine{Version: d.GetVersion(), Memory: d.GetMemoryBytes(), Available: d.GetAvailableBytes(), CPUs: int(d.GetCpus()), Site: d.GetSite()}
	addr, err := netip.ParsePrefix(d.GetAddress())
	if err != nil {
		return m, fmt.Errorf("its underlay address: %w", err)
	}
	mac, err := decodeMAC(d.GetMac())
	if err != nil {
		return m, err
	}
	m.Underlay = agent.Underlay{Device: d.GetDevice(), Addr: addr, MAC: mac, MTU: int(d.GetMtu())}
	return m, nil
}

func (j *joined) attach(l *link, client violinv1connect.AgentServiceClient, m Machine, address string) {
	defer j.hub.Wake()
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.link != nil {
		// It connects again before we know that it was gone; or there are two.
		j.link.close()
	}
	j.link, j.client, j.machine, j.address, j.since = l, client, m, address, time.Now()
	close(j.changed)
	j.changed = make(chan struct{})
}

func (j *joined) detach(l *link) bool {
	defer j.hub.Wake()
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.link != l {
		return false
	}
	j.link, j.client, j.since = nil, nil, time.Now()
	close(j.changed)
	j.changed = make(chan struct{})
	return true
}

// now returns the client to call the agent by.
func (j *joined) now() (violinv1connect.AgentServiceClient, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.client == nil {
		if j.since.IsZero() {
			return nil, fmt.Errorf("host %s: its agent has not connected; is `violin agent` running there?", j.name)
		}
		return nil, fmt.Errorf("host %s: its agent is not connected, since %s", j.name, j.since.Format(time.TimeOnly))
	}
	return j.client, nil
}

// Wake wakes whoever waits for what hosts take to be another.
func (h *Hub) Wake() {
	h.mu.Lock()
	defer h.mu.Unlock()
	close(h.changed)
	h.changed = make(chan struct{})
}

// Changed returns what is closed when a host's connection comes or goes next, or by Wake.
func (h *Hub) Changed() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.changed
}

// Away tells whether a host's agent is not connected, and since when: at the earliest,
// since the hub listens.
func (h *Hub) Away(name string) (since time.Time, away bool) {
	j := h.host(name)
	j.mu.Lock()
	defer j.mu.Unlock()
	if since = j.since; since.Before(h.began) {
		since = h.began
	}
	return since, j.client == nil
}

// back waits until the agent is connected. It tells whether it is before it has been
// away for too long, which is asked for from time to time.
func (j *joined) back(ctx context.Context, tooLong func() time.Duration) bool {
	since := time.Now()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	// A call may fail before it is known that its connection did.
	select {
	case <-time.After(firstRetry):
	case <-ctx.Done():
		return false
	}
	for {
		j.mu.Lock()
		connected, changed := j.client != nil, j.changed
		j.mu.Unlock()
		if connected {
			return true
		}
		if time.Since(since) >= tooLong() {
			return false
		}
		select {
		case <-changed:
		case <-tick.C:
		case <-ctx.Done():
			return false
		}
	}
}

// Hosts are those that have joined, by name.
func (h *Hub) Hosts() ([]HostInfo, error) {
	names, err := h.cfg.Authority.Machines()
	if err != nil {
		return nil, err
	}
	var all []HostInfo
	for _, name := range names {
		j := h.host(name)
		j.mu.Lock()
		i := HostInfo{Name: name, Address: j.address, Connected: j.link != nil, Since: j.since, Machine: j.machine, Slices: j.slices()}
		j.mu.Unlock()
		all = append(all, i)
	}
	return all, nil
}

// Place tells whether a slice on these hosts runs on hosts that have joined: on all
// or on none.
func (h *Hub) Place(hosts []string) (bool, error) {
	names, err := h.cfg.Authority.Machines()
	if err != nil {
		return false, err
	}
	var missing []string
	for _, n := range hosts {
		if !slices.Contains(names, n) {
			missing = append(missing, n)
		}
	}
	switch len(missing) {
	case 0:
		return len(hosts) > 0, nil
	case len(hosts):
		return false, nil
	}
	slices.Sort(missing)
	return false, fmt.Errorf("some of its hosts have joined this server, but %s not: a slice runs on joined hosts, or on none of them", strings.Join(missing, ", "))
}

// Measure asks a host for what its machine has now.
func (h *Hub) Measure(ctx context.Context, name string) (Machine, error) {
	j := h.host(name)
	client, err := j.now()
	if err != nil {
		return Machine{}, err
	}
	m, err := j.describe(ctx, client)
	if err != nil {
		return Machine{}, fmt.Errorf("host %s: %w", name, err)
	}
	return m, nil
}

// Number numbers a slice's networks: it returns the first of n numbers in a row, of which
// none is in use. They are not given again until all have been, and a server begins
// anywhere: a host that comes back still running what has gone on elsewhere meanwhile
// reaches nobody.
func (h *Hub) Number(n int, used map[uint16]bool) (first uint16, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	n = max(n, 1)
	at, row := int(h.number), 0
	for range 2 * coloring.MaxNetwork {
		if at++; at > coloring.MaxNetwork {
			at, row = 1, 0
		}
		if row++; used[uint16(at)] {
			row = 0
		}
		if row == n {
			h.number = uint16(at)
			return uint16(at - n + 1), nil
		}
	}
	return 0, fmt.Errorf("number %d networks: the joined hosts' slices have too many of %d; take one down", n, coloring.MaxNetwork)
}

// slices are those that run on the host. j's mu is held.
func (j *joined) slices() []string {
	var names []string
	for _, a := range j.running {
		names = append(names, a.slice)
	}
	slices.Sort(names)
	return names
}

func newAgent(j *joined, slice, run string) *Agent {
	a := &Agent{host: j, slice: slice, run: run}
	a.life, a.end = context.WithCancel(context.Background())
	return a
}

// Reserve returns the agent of a host for a slice that is to begin there: by
// [Agent.Begin], once it is noted.
func (h *Hub) Reserve(name, slice string) *Agent {
	j := h.host(name)
	a := newAgent(j, slice, rand.Text())
	j.mu.Lock()
	defer j.mu.Unlock()
	j.running[a.run] = a
	return a
}

// GoesOn returns the agent for a run of [HubConfig.Runs]; nil if there is no such.
func (h *Hub) GoesOn(host, run string) *Agent {
	j := h.host(host)
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.running[run]
}
