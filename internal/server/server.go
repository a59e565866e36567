// Package server is the API's handler: the one place that knows every slice.
package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
	"violin/internal/access"
	"violin/internal/agent"
	"violin/internal/catalog"
	"violin/internal/certificate"
	"violin/internal/coordinator"
	"violin/internal/cut"
	"violin/internal/events"
	"violin/internal/image"
	"violin/internal/metadata"
	"violin/internal/priority"
	"violin/internal/qmp"
	"violin/internal/remote"
	"violin/internal/store"
	"violin/internal/topology"
	"violin/internal/trust"
)

// Config says where a server keeps things and how it presents itself.
type Config struct {
	StateDir string // images/ is below it, and unless Storage says otherwise, store/ and its key
	Storage  Storage
	RunDir   string // sockets of what runs
	Logger   *slog.Logger
	Version  string // told by the Version call
	// Etcd says where metadata are; if neither its Dir nor its Endpoints are given, in an
	// etcd of this process, in etcd/ below StateDir.
	Etcd metadata.Config
	// Listen is the address and port where agents of other machines, and users, are taken
	// in; empty for none.
	Listen string
	// Leave, at the end, tells whether what runs on hosts that have joined is left to the
	// next server; nil for no.
	Leave func() bool
	// Passed is told of the steps of cuts ([coordinator.Config.Passed], and "packed": a
	// snapshot's pages are stored, and it is not visible yet), for tests. Nil for none.
	Passed func(step string)
}

// Server implements the API. It holds the slices that run.
type Server struct {
	cfg     Config
	log     *slog.Logger
	led     *metadata.Leadership
	etcd    *metadata.Client // nil if it is not this server's to close
	store   *store.Store
	catalog *catalog.Catalog
	urgency *priority.Shared // of this process

	authority *trust.Authority // of the machines that join and of users; nil, like hub and door, without [Config.Listen]
	hub       *remote.Hub
	door      *access.Door
	api       http.Handler

	mu      sync.Mutex
	slices  map[string]*slice          // a nil slice is a name taken by one that is coming up
	records map[string]*catalog.Record // what the catalog has; never changed in place
	cordons map[string]time.Time       // by host, since when nothing new comes up there
	// followed are the snapshots, by name, of which memory follows, and to how many nodes.
	followed map[string]int

	recording sync.Mutex // held while a record is changed
	naming    sync.Mutex // held while it is settled whose a slice's name is

	term      uint64          // of this leader
	elsewhere map[string]bool // slices that run on hosts that have joined, without [Config.Listen]

	coming map[*slice]bool // with forwards, of slices that are coming up; of the slices they are no part yet

	forsaken map[string]bool // slices that are to be taken down when they have been rolled back

	events  *events.Log
	life    context.Context // ends when the server closes
	end     context.CancelFunc
	guards  sync.WaitGroup // of what works by itself
	rolling atomic.Int64   // slices that are being rolled back
	posting atomic.Int64   // webhooks that are being posted
	expired atomic.Int64   // checkpoints forgotten since space was freed last

	admitting sync.Mutex        // held from measuring until the room is taken
	arriving  map[string]demand // by machine

	boot image.Hashes
}

var _ violinv1connect.SliceServiceHandler = (*Server)(nil)

// New makes a server with no slice, which leads: another that does, by an etcd
// elsewhere, is an error. ctx bounds the making only.
func New(ctx context.Context, config Config) (*Server, error) {
	etcd, err := config.openEtcd(ctx)
	if err != nil {
		return nil, err
	}
	led, other, err := etcd.Lead(ctx)
	if err == nil && led == nil {
		err = fmt.Errorf("server %s leads already, since %s", other.Name, other.Since.Format(time.RFC3339))
	}
	if err != nil {
		return nil, errors.Join(err, etcd.Close())
	}
	s, err := take(ctx, config, led)
	if err != nil {
		return nil, errors.Join(err, led.Resign(context.WithoutCancel(ctx)), etcd.Close())
	}
	s.etcd = etcd
	return s, nil
}

func (c *Config) openEtcd(ctx context.Context) (*metadata.Client, error) {
	config := c.Etcd
	config.Logger = c.Logger
	if config.Dir == "" && len(config.Endpoints) == 0 {
		config.Dir = filepath.Join(c.StateDir, "etcd")
	}
	return metadata.Open(ctx, config)
}

// take makes the server of a leader.
func take(ctx context.Context, config Config, led *metadata.Leadership) (*Server, error) {
	st, err := openStore(ctx, &config, led)
	if err != nil {
		return nil, err
	}
	s := &Server{
		cfg: config, log: config.Logger, led: led, term: led.Term(), store: st, catalog: catalog.New(st), slices: map[string]*slice{}, cordons: map[string]time.Time{}, elsewhere: map[string]bool{}, forsaken: map[string]bool{}, followed: map[string]int{}, arriving: map[string]demand{}, coming: map[*slice]bool{},
		urgency: &priority.Shared{PID: os.Getpid(), Keep: priority.Lowered, Log: config.Logger},
	}
	if s.records, err = s.catalog.Records(ctx, func(_ string, err error) {
		s.log.Error("what is kept of a slice cannot be read", "err", err)
	}); err != nil {
		return nil, errors.Join(err, st.Close())
	}
	if err := s.readCordons(ctx); err != nil {
		return nil, errors.Join(err, st.Close())
	}
	if s.events, err = s.openEvents(); err != nil {
		return nil, errors.Join(err, st.Close())
	}
	s.api = access.Handler(s, s, s.log)
	s.life, s.end = context.WithCancel(context.WithoutCancel(ctx))
	noted, err := s.noted(ctx)
	if err == nil && config.Listen != "" {
		err = s.listen(ctx, hubRuns(noted))
	}
	if err == nil {
		err = s.adopt(ctx, noted)
	}
	if err != nil {
		s.leaveRuns()
		return nil, errors.Join(err, s.Close())
	}
	s.bringBack()
	return s, nil
}

func (s *Server) listen(ctx context.Context, runs []remote.Run) (err error) {
	if s.authority, err = s.openAuthority(); err != nil {
		return err
	}
	s.door = access.NewDoor(s.authority, s.api, s.log)
	s.hub, err = remote.Listen(ctx, remote.HubConfig{Address: s.cfg.Listen, Authority: s.authority, Images: s.images(), Users: s.door.Take, Term: s.term, Runs: runs, Patience: s.hostTimeout, Logger: s.log})
	return err
}

// Handler serves the API, to callers that the requests' contexts tell: see [access.As].
func (s *Server) Handler() http.Handler { return s.api }

// Busy tells whether a slice runs, or a user is connected: a busy server does not exit
// for being idle.
func (s *Server) Busy() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.slices) > 0 || s.rolling.Load() > 0 || s.door != nil && len(s.door.Connections()) > 0
}

// Close stops every slice, but for those that are to be left, and releases what the
// server holds.
func (s *Server) Close() error {
	if s.door != nil {
		s.door.Close()
	}
	s.end()
	s.guards.Wait()
	if s.cfg.Leave != nil && s.cfg.Leave() {
		s.leaveRuns()
	}
	s.mu.Lock()
	running := s.slices
	s.slices = map[string]*slice{}
	s.mu.Unlock()
	var errs []error
	for _, sl := range running {
		if sl != nil {
			errs = append(errs, sl.close())
		}
	}
	if s.hub != nil {
		errs = append(errs, s.hub.Close())
	}
	errs = append(errs, s.store.Close())
	if s.etcd != nil {
		errs = append(errs, s.led.Resign(context.Background()), s.etcd.Close())
	}
	return errors.Join(errs...)
}

// leaveRuns leaves what runs on hosts that have joined to the next server.
func (s *Server) leaveRuns() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, sl := range s.slices {
		if sl != nil && sl.joined {
			s.log.Info("what runs on hosts that have joined is left to the next server", "slice", name)
			sl.leave()
			delete(s.slices, name)
		}
	}
}

// slice returns a slice that runs.
func (s *Server) slice(name string) (*slice, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if sl := s.slices[name]; sl != nil {
		return sl, nil
	}
	if _, ok := s.slices[name]; ok {
		return nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("slice %q is not up yet", name))
	}
	if err := s.runsElsewhereLocked(name); err != nil {
		return nil, err
	}
	if r := s.records[name]; r != nil && r.Suspended != nil {
		return nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("slice %q is suspended; `violin resume %s` lets it go on", name, name))
	}
	return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("no slice %q runs here", name))
}

// claim takes a slice's name until it is up or has failed.
func (s *Server) claim(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.runsElsewhereLocked(name); err != nil {
		return err
	}
	switch sl, ok := s.slices[name]; {
	case ok && sl == nil:
		return connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("slice %q is coming up or going down just now; wait until it has", name))
	case ok:
		return connect.NewError(connect.CodeAlreadyExists, fmt.Errorf("slice %q runs already; take it down first, or give the other one another name", name))
	}
	s.slices[name] = nil
	return nil
}

func (s *Server) settle(name string, sl *slice) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if sl == nil {
		delete(s.slices, name)
		return
	}
	s.slices[name] = sl
	s.guards.Go(func() { s.watch(sl) })
}

// Up implements the API.
func (s *Server) Up(ctx context.Context, req *violinv1.UpRequest, stream *connect.ServerStream[violinv1.UpResponse]) error {
	topo, err := topology.Parse(req.GetFile(), req.GetTopology())
	if err != nil {
		return connect.NewError(connect.CodeInvalidArgument, err)
	}
	if !access.From(ctx).Operator() {
		if err := harmless(topo); err != nil {
			return connect.NewError(connect.CodePermissionDenied, err)
		}
	}
	if err := mayForward(ctx, topo); err != nil {
		return placeError(req.GetFile(), req.GetTopology(), err)
	}
	if err := resolvePaths(topo, req.GetDirectory()); err != nil {
		return connect.NewError(connect.CodeInvalidArgument, err)
	}
	if err := s.mayTake(ctx, topo.Slice); err != nil {
		return err
	}
	tell := serialize(func(p *violinv1.Progress) error {
		return stream.Send(&violinv1.UpResponse{Event: &violinv1.UpResponse_Progress{Progress: p}})
	})
	if err := s.notSuspended(topo.Slice); err != nil {
		return err
	}
	if err := s.claim(topo.Slice); err != nil {
		return err
	}
	err = s.takeName(ctx, topo.Slice)
	var sl *slice
	if err == nil {
		sl, err = s.start(ctx, topo, req.GetOvercommit(), tell)
	}
	s.settle(topo.Slice, sl)
	if err != nil {
		s.freeName(context.WithoutCancel(ctx), topo.Slice)
		return placeError(req.GetFile(), req.GetTopology(), err)
	}
	s.tell(events.Event{Slice: topo.Slice, Kind: events.Up, Text: req.GetFile()})
	return stream.Send(&violinv1.UpResponse{Event: &violinv1.UpResponse_Slice{Slice: s.message(ctx, sl)}})
}

// start boots a slice.
func (s *Server) start(ctx context.Context, topo *topology.Topology, overcommit bool, tell teller) (*slice, error) {
	room, err := s.admit(ctx, topo, nil, wish{overcommit: overcommit})
	if err != nil {
		return nil, err
	}
	defer room.release()
	topo = room.topo
	free, err := s.takePorts(ctx, topo, nil)
	if err != nil {
		return nil, err
	}
	defer free()
	generation := map[string]string{}
	for _, n := range topo.Nodes {
		generation[n.Name] = newGeneration()
	}
	return s.build(ctx, topo, 0, generation, nil, tell, nil)
}

// Down implements the API.
func (s *Server) Down(ctx context.Context, req *violinv1.DownRequest) (*violinv1.DownResponse, error) {
	if (req.GetSlice() == "") != req.GetAll() {
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("name either one slice or all"))
	}
	s.mu.Lock()
	names := []string{req.GetSlice()}
	if req.GetAll() {
		names = nil
		for name, sl := range s.slices {
			if sl != nil && s.ownsLocked(ctx, name) {
				names = append(names, name)
			}
		}
	}
	s.mu.Unlock()
	if req.GetAll() {
		if err := s.forsake(ctx); err != nil {
			return nil, apiError(err)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		if s.suspension(name) != nil {
			if err := s.record(ctx, name, func(r *catalog.Record) { *r = catalog.Record{Slice: name, Owner: r.Owner} }); err != nil {
				return nil, apiError(err)
			}
			s.tell(events.Event{Slice: name, Kind: events.Down, Text: "it was suspended"})
			s.freeName(ctx, name)
			continue
		}
		sl, err := s.slice(name)
		if err != nil {
			return nil, err
		}
		// The guard must not take it for a failure, nor bring it back.
		if err := s.record(ctx, name, func(r *catalog.Record) { *r = catalog.Record{Slice: name, Owner: r.Owner} }); err != nil {
			return nil, apiError(err)
		}
		if err := sl.close(); err != nil {
			s.log.Error("slice was not taken down cleanly", "slice", name, "err", err)
		}
		s.settle(name, nil)
		s.tell(events.Event{Slice: name, Kind: events.Down})
		s.freeName(ctx, name)
	}
	return &violinv1.DownResponse{Slices: names}, nil
}

// ListSlices implements the API.
func (s *Server) ListSlices(ctx context.Context, req *violinv1.ListSlicesRequest) (*violinv1.ListSlicesResponse, error) {
	var found []*slice
	resp := &violinv1.ListSlicesResponse{}
	if name := req.GetSlice(); name != "" {
		if s.suspension(name) != nil {
			resp.Slices = append(resp.Slices, s.suspendedMessage(ctx, name))
			return resp, nil
		}
		sl, err := s.slice(name)
		if err != nil {
			return nil, err
		}
		found = append(found, sl)
	} else {
		s.mu.Lock()
		for name, sl := range s.slices {
			if sl != nil && s.ownsLocked(ctx, name) {
				found = append(found, sl)
			}
		}
		s.mu.Unlock()
	}
	slices.SortFunc(found, func(a, b *slice) int { return a.created.Compare(b.created) })
	for _, sl := range found {
		m := s.message(ctx, sl)
		m.Protected = s.protection(m.GetName()) != nil
		resp.Slices = append(resp.Slices, m)
	}
	if req.GetSlice() == "" {
		for _, name := range s.suspended() {
			if !s.owns(ctx, name) {
				continue
			}
			resp.Slices = append(resp.Slices, s.suspendedMessage(ctx, name))
		}
	}
	return resp, nil
}

// Exec implements the API.
func (s *Server) Exec(ctx context.Context, req *violinv1.ExecRequest) (*violinv1.ExecResponse, error) {
	sl, err := s.slice(req.GetSlice())
	if err != nil {
		return nil, err
	}
	a, err := sl.agentOf(req.GetNode())
	if err != nil {
		return nil, err
	}
	if len(req.GetCommand()) == 0 {
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("no command was given"))
	}
	timeout := time.Minute
	if d := req.GetTimeout(); d != nil && d.AsDuration() > 0 {
		timeout = d.AsDuration()
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	r, err := a.Exec(ctx, req.GetSlice(), req.GetNode(), req.GetCommand(), req.GetStdin())
	if err != nil {
		if errors.Is(err, context.DeadlineExceeded) {
			return nil, connect.NewError(connect.CodeDeadlineExceeded, fmt.Errorf("after %s: %w", timeout, err))
		}
		var refused *qmp.Error
		if errors.As(err, &refused) { // such as a program that is not there
			return nil, connect.NewError(connect.CodeInvalidArgument, err)
		}
		return nil, connect.NewError(connect.CodeFailedPrecondition, err)
	}
	return &violinv1.ExecResponse{ExitCode: int32(r.ExitCode), Stdout: r.Stdout, Stderr: r.Stderr}, nil
}

// Console implements the API.
func (s *Server) Console(ctx context.Context, stream *connect.BidiStream[violinv1.ConsoleRequest, violinv1.ConsoleResponse]) error {
	first, err := stream.Receive()
	if err != nil {
		return err
	}
	sl, err := s.slice(first.GetSlice())
	if err != nil {
		return err
	}
	a, err := sl.agentOf(first.GetNode())
	if err != nil {
		return err
	}
	conn, err := a.Console(ctx, first.GetSlice(), first.GetNode())
	if err != nil {
		return connect.NewError(connect.CodeFailedPrecondition, err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	go func() {
		for {
			m, err := stream.Receive()
			if err != nil {
				return
			}
			if _, err := conn.Write(m.GetData()); err != nil {
				return
			}
		}
	}()
	buf := make([]byte, 4096)
	for {
		n, err := conn.Read(buf)
		if n > 0 {
			if err := stream.Send(&violinv1.ConsoleResponse{Data: buf[:n]}); err != nil {
				return err
			}
		}
		if err != nil {
			return ctx.Err() // the node's end of its console: the node has ended
		}
	}
}

// ConsoleLog implements the API.
func (s *Server) ConsoleLog(ctx context.Context, req *violinv1.ConsoleLogRequest, out *connect.ServerStream[violinv1.ConsoleLogResponse]) error {
	sl, err := s.slice(req.GetSlice())
	if err != nil {
		return err
	}
	a, err := sl.agentOf(req.GetNode())
	if err != nil {
		return err
	}
	log, err := a.ConsoleLog(ctx, req.GetSlice(), req.GetNode(), agent.LogWish{Tail: req.Tail, Follow: req.GetFollow()})
	if err != nil {
		return connect.NewError(connect.CodeFailedPrecondition, err)
	}
	defer log.Close()
	buf := make([]byte, 32<<10)
	for {
		n, err := log.Read(buf)
		if n > 0 {
			if err := out.Send(&violinv1.ConsoleLogResponse{Data: buf[:n]}); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			return apiError(err)
		}
	}
}

// Version implements the API.
func (s *Server) Version(context.Context, *violinv1.VersionRequest) (*violinv1.VersionResponse, error) {
	return &violinv1.VersionResponse{
		Version: s.cfg.Version, Go: runtime.Version(), Pid: int64(os.Getpid()), Api: string(violinv1.File_violin_v1_violin_proto.Package()),
		Formats: map[string]uint32{
			"topology": topology.Version, "store": store.FormatVersion, "metadata": metadata.FormatVersion, "snapshot": catalog.FormatVersion, "certificate": certificate.Format,
		},
	}, nil
}

// resolvePaths makes the topology's paths independent of where it was read. Without a
// directory it refuses one that means a file of its reader's.
func resolvePaths(t *topology.Topology, dir string) error {
	for i := range t.Nodes {
		n := &t.Nodes[i]
		paths := []*string{&n.Kernel, &n.Initrd, &n.RootFS}
		for k := range n.Disks {
			paths = append(paths, &n.Disks[k].Base)
		}
		for k := range n.Shares {
			paths = append(paths, &n.Shares[k].Directory)
		}
		if n.CloudInit != nil {
			paths = append(paths, &n.CloudInit.UserDataFile)
		}
		for _, p := range paths {
			switch {
			case *p == "" || filepath.IsAbs(*p):
			case dir == "":
				return fmt.Errorf("node %q: %s is to be a file of the server's, with its whole path there; or boot from an image", n.Name, *p)
			default:
				*p = filepath.Join(dir, *p)
			}
		}
	}
	return nil
}

// teller tells a long call's progress to its caller.
type teller func(step, node, detail string)

// serialize makes a teller of a stream's Send, which takes one message at a time.
// A caller who has gone away shows in the context, not here.
func serialize(send func(*violinv1.Progress) error) teller {
	var mu sync.Mutex
	return func(step, node, detail string) {
		mu.Lock()
		defer mu.Unlock()
		_ = send(&violinv1.Progress{Step: step, Node: node, Detail: detail})
	}
}

// apiError gives an error the code that its kind has in the API.
func apiError(err error) error {
	var coded *connect.Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &coded):
		return err
	case errors.Is(err, cut.ErrBusy), errors.Is(err, coordinator.ErrHostLost):
		return connect.NewError(connect.CodeFailedPrecondition, err)
	case errors.Is(err, coordinator.ErrAborted):
		return connect.NewError(connect.CodeAborted, err)
	case errors.Is(err, catalog.ErrNotFound):
		return connect.NewError(connect.CodeNotFound, err)
	case errors.Is(err, catalog.ErrAmbiguous):
		return connect.NewError(connect.CodeInvalidArgument, err)
	case errors.Is(err, store.ErrExists):
		return connect.NewError(connect.CodeAlreadyExists, err)
	case errors.Is(err, store.ErrKey):
		return connect.NewError(connect.CodeInvalidArgument, err)
	case errors.Is(err, store.ErrDamaged), errors.Is(err, store.ErrMissing):
		return connect.NewError(connect.CodeDataLoss, err)
	case errors.Is(err, metadata.ErrDeposed):
		return connect.NewError(connect.CodeUnavailable, err)
	case errors.Is(err, context.Canceled):
		return connect.NewError(connect.CodeCanceled, err)
	}
	return connect.NewError(connect.CodeInternal, err)
}

func timestamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}
