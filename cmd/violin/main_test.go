package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
	"violin/internal/access"
	"violin/internal/daemon"
	"violin/internal/trust"
)

var update = flag.Bool("update", false, "rewrite the transcripts in testdata")

// asViolin makes the test binary behave as violin, for the server that a verb starts.
const asViolin = "VIOLIN_TEST_AS_VIOLIN"

func TestMain(m *testing.M) {
	if os.Getenv(asViolin) != "" {
		main()
	}
	os.Exit(m.Run())
}

// fakeServer is the peer on the wire. What it does depends on the slice's name.
type fakeServer struct {
	violinv1connect.UnimplementedSliceServiceHandler
	violinv1connect.UnimplementedStoreServiceHandler
	violinv1connect.UnimplementedHistoryServiceHandler
	violinv1connect.UnimplementedLifecycleServiceHandler
	violinv1connect.UnimplementedImageServiceHandler
	violinv1connect.UnimplementedProtectionServiceHandler
	violinv1connect.UnimplementedHostServiceHandler
	violinv1connect.UnimplementedUserServiceHandler

	slices []*violinv1.Slice

	mu       sync.Mutex
	requests []proto.Message

	begun chan struct{} // closed when a call on slice "slow" runs
	ended chan error    // gets the context's error when that call ends
}

func (f *fakeServer) got(request proto.Message) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.requests = append(f.requests, request)
}

func (f *fakeServer) last() proto.Message {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.requests) == 0 {
		return nil
	}
	return f.requests[len(f.requests)-1]
}

// fault is what a call on a slice of this name meets.
func (f *fakeServer) fault(ctx context.Context, slice string) error {
	failed := func(code connect.Code, format string, args ...any) error {
		return connect.NewError(code, fmt.Errorf(format, args...))
	}
	switch slice {
	case "missing":
		return failed(connect.CodeNotFound, "no slice %q runs", slice)
	case "busy":
		return failed(connect.CodeFailedPrecondition, "slice %q: a cut runs already", slice)
	case "taken":
		return failed(connect.CodeAlreadyExists, "slice %q runs already", slice)
	case "wrong":
		return failed(connect.CodeInvalidArgument, "slice %q: no such thing as that", slice)
	case "aborted":
		return failed(connect.CodeAborted, "snapshot slice %q: node \"rank2\": 4096 frames held: the hold is full", slice)
	case "large":
		return failed(connect.CodeResourceExhausted, "slice %q needs 64.0 GiB of memory, and the hosts have 24.0 GiB", slice)
	case "internal":
		return failed(connect.CodeInternal, "slice %q: the store is broken", slice)
	case "unknown":
		return errors.New("some error without a code")
	case "panic":
		panic("a mistake of the server")
	case "cut-off":
		panic(http.ErrAbortHandler) // net/http breaks the stream
	case "stopping":
		return failed(connect.CodeCanceled, "context canceled")
	case "slow":
		close(f.begun)
		<-ctx.Done()
		f.ended <- ctx.Err()
		return ctx.Err()
	}
	return nil
}

func (f *fakeServer) Up(ctx context.Context, request *violinv1.UpRequest, stream *connect.ServerStream[violinv1.UpResponse]) error {
	f.got(request)
	name, _, _ := strings.Cut(strings.TrimPrefix(string(request.GetTopology()), "slice: "), "\n")
	for _, p := range []*violinv1.Progress{
		{Step: "hosts", Detail: "2 hosts on 2 sites"},
		{Step: "boot", Node: "rank0"},
		{Step: "boot", Node: "rank1", Detail: "kernel\x1b[2Jstarted"},
	} {
		if err := stream.Send(&violinv1.UpResponse{Event: &violinv1.UpResponse_Progress{Progress: p}}); err != nil {
			return err
		}
	}
	if err := f.fault(ctx, name); err != nil || name == "resultless" {
		return err
	}
	return stream.Send(&violinv1.UpResponse{Event: &violinv1.UpResponse_Slice{Slice: mandelbrot()}})
}

func (f *fakeServer) Down(ctx context.Context, request *violinv1.DownRequest) (*violinv1.DownResponse, error) {
	f.got(request)
	if request.GetAll() {
		return &violinv1.DownResponse{Slices: sliceNamesOf(f.slices)}, nil
	}
	if err := f.fault(ctx, request.GetSlice()); err != nil {
		return nil, err
	}
	return &violinv1.DownResponse{Slices: []string{request.GetSlice()}}, nil
}

func sliceNamesOf(list []*violinv1.Slice) (names []string) {
	for _, s := range list {
		names = append(names, s.GetName())
	}
	return names
}

func (f *fakeServer) ListSlices(ctx context.Context, request *violinv1.ListSlicesRequest) (*violinv1.ListSlicesResponse, error) {
	f.got(request)
	if err := f.fault(ctx, request.GetSlice()); err != nil {
		return nil, err
	}
	list := &violinv1.ListSlicesResponse{}
	for _, s := range f.slices {
		if request.GetSlice() == "" || request.GetSlice() == s.GetName() {
			list.Slices = append(list.Slices, s)
		}
	}
	return list, nil
}

func (f *fakeServer) Snapshot(ctx context.Context, request *violinv1.SnapshotRequest, stream *connect.ServerStream[violinv1.SnapshotResponse]) error {
	f.got(request)
	for _, p := range []*violinv1.Progress{
		{Step: "prepare", Detail: "4 nodes on 4 hosts"},
		{Step: "cut", Node: "rank0", Detail: "paused 3.1 ms"},
		{Step: "drain", Detail: "5 frames in flight"},
	} {
		if err := stream.Send(&violinv1.SnapshotResponse{Event: &violinv1.SnapshotResponse_Progress{Progress: p}}); err != nil {
			return err
		}
	}
	if err := f.fault(ctx, request.GetSlice()); err != nil {
		return err
	}
	s := firstSnapshot()
	if s.Tag = request.GetTag(); s.Tag != "" {
		s.Tags = []string{s.Tag}
	}
	return stream.Send(&violinv1.SnapshotResponse{Event: &violinv1.SnapshotResponse_Snapshot{Snapshot: s}})
}

func (f *fakeServer) ListSnapshots(ctx context.Context, request *violinv1.ListSnapshotsRequest) (*violinv1.ListSnapshotsResponse, error) {
	f.got(request)
	if err := f.fault(ctx, request.GetSlice()); err != nil {
		return nil, err
	}
	if request.GetSlice() == "new" {
		return &violinv1.ListSnapshotsResponse{}, nil
	}
	second := firstSnapshot()
	second.Id, second.Tag, second.Parent = "20261123T120100-5e1d", "before-the-crash", second.GetId()
	second.Tags = []string{second.GetTag()}
	second.Created = timestamppb.New(second.GetCreated().AsTime().Add(time.Minute))
	second.Mode = violinv1.CaptureMode_CAPTURE_MODE_PRECOPY
	second.StoredBytes = 900
	return &violinv1.ListSnapshotsResponse{Snapshots: []*violinv1.Snapshot{firstSnapshot(), second}}, nil
}

func (f *fakeServer) Restore(ctx context.Context, request *violinv1.RestoreRequest, stream *connect.ServerStream[violinv1.RestoreResponse]) error {
	f.got(request)
	if err := stream.Send(&violinv1.RestoreResponse{Event: &violinv1.RestoreResponse_Progress{
		Progress: &violinv1.Progress{Step: "load", Node: "rank1", Detail: "92.0 MiB"}}}); err != nil {
		return err
	}
	slice, _, _ := strings.Cut(request.GetSnapshot(), "@")
	if err := f.fault(ctx, slice); err != nil {
		return err
	}
	restored := &violinv1.Restored{
		Slice: mandelbrot(), Snapshot: firstSnapshot(), Duration: durationpb.New(2100 * time.Millisecond),
		Skew: durationpb.New(1800 * time.Microsecond), FramesInjected: 14, Lazy: request.GetLazy(),
	}
	for node, host := range request.GetOn() {
		restored.Moves = append(restored.Moves, &violinv1.NodeMove{Node: node, From: "utah-1", To: host})
	}
	if request.GetPlacement() == violinv1.PlacementPolicy_PLACEMENT_POLICY_AUTO {
		restored.Moves = append(restored.Moves, &violinv1.NodeMove{Node: "rank1", From: "utah-1", To: "utah-2", Why: "its agent has not connected"})
	}
	return stream.Send(&violinv1.RestoreResponse{Event: &violinv1.RestoreResponse_Restored{Restored: restored}})
}

func (f *fakeServer) Verify(ctx context.Context, request *violinv1.VerifyRequest) (*violinv1.VerifyResponse, error) {
	f.got(request)
	slice, tag, _ := strings.Cut(request.GetSnapshot(), "@")
	if err := f.fault(ctx, slice); err != nil {
		return nil, err
	}
	r := &violinv1.VerifyResponse{
		Snapshot: snapshotName(firstSnapshot()), Certificate: strings.Repeat("3f9a6c01", 8), Holds: tag != "tampered",
		Cannot: []string{"That the hosts told the truth."}, Notes: []string{"its parent is not there any more"},
	}
	if r.Holds {
		r.Proves = []string{"Every node went from epoch 2 to 3 once.", "Nothing was dropped."}
	} else {
		r.Violations = []string{"node rank1: flip began before stop had ended: \x1b[2Jframes could be stamped with the wrong epoch"}
	}
	return r, nil
}

func (f *fakeServer) Frames(ctx context.Context, request *violinv1.FramesRequest, stream *connect.ServerStream[violinv1.FramesResponse]) error {
	f.got(request)
	slice, _, _ := strings.Cut(request.GetSnapshot(), "@")
	if err := stream.Send(&violinv1.FramesResponse{Data: []byte("the first piece, ")}); err != nil {
		return err
	}
	if err := f.fault(ctx, slice); err != nil {
		return err
	}
	return stream.Send(&violinv1.FramesResponse{Data: []byte("and the second\n")})
}

func (f *fakeServer) Exec(ctx context.Context, request *violinv1.ExecRequest) (*violinv1.ExecResponse, error) {
	f.got(request)
	if err := f.fault(ctx, request.GetSlice()); err != nil {
		return nil, err
	}
	switch request.GetCommand()[0] {
	case "cat":
		return &violinv1.ExecResponse{Stdout: request.GetStdin()}, nil
	case "exit":
		code, err := strconv.Atoi(request.GetCommand()[1])
		if err != nil {
			return nil, connect.NewError(connect.CodeInvalidArgument, err)
		}
		return &violinv1.ExecResponse{ExitCode: int32(code), Stderr: []byte("said on stderr\n")}, nil
	}
	return &violinv1.ExecResponse{Stdout: fmt.Appendf(nil, "%q in %s/%s\n", request.GetCommand(), request.GetSlice(), request.GetNode())}, nil
}

func (f *fakeServer) ConsoleLog(ctx context.Context, request *violinv1.ConsoleLogRequest, stream *connect.ServerStream[violinv1.ConsoleLogResponse]) error {
	f.got(request)
	if err := f.fault(ctx, request.GetSlice()); err != nil {
		return err
	}
	if request.Tail == nil {
		if err := stream.Send(&violinv1.ConsoleLogResponse{Data: []byte("[    0.0] Linux\r\n")}); err != nil {
			return err
		}
	}
	return stream.Send(&violinv1.ConsoleLogResponse{Data: []byte("login: ")})
}

// Console echoes in capitals, and ends when it has been told "bye".
func (f *fakeServer) Console(ctx context.Context, stream *connect.BidiStream[violinv1.ConsoleRequest, violinv1.ConsoleResponse]) error {
	first, err := stream.Receive()
	if err != nil {
		return err
	}
	if err := f.fault(ctx, first.GetSlice()); err != nil {
		return err
	}
	if err := stream.Send(&violinv1.ConsoleResponse{Data: []byte("login: ")}); err != nil {
		return err
	}
	for {
		request, err := stream.Receive()
		if errors.Is(err, io.EOF) { // the client listens on
			return stream.Send(&violinv1.ConsoleResponse{Data: []byte("[halted]\n")})
		}
		if err != nil {
			return err
		}
		if err := stream.Send(&violinv1.ConsoleResponse{Data: bytes.ToUpper(request.GetData())}); err != nil {
			return err
		}
		if strings.Contains(string(request.GetData()), "bye") {
			return nil
		}
	}
}

func (f *fakeServer) Version(context.Context, *violinv1.VersionRequest) (*violinv1.VersionResponse, error) {
	return &violinv1.VersionResponse{Version: "v9.9.9", Go: "go1.99 linux/amd64", Pid: 4242}, nil
}

var created = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

func mandelbrot() *violinv1.Slice {
	s := &violinv1.Slice{Name: "mandelbrot", Created: timestamppb.New(created), Head: "20261123T120000-7f3a"}
	for i, site := range []string{"utah", "utah", "gpo", "gpo"} {
		s.Nodes = append(s.Nodes, &violinv1.Node{
			Name: fmt.Sprintf("rank%d", i), Site: site, Host: fmt.Sprintf("%s-%d", site, i%2+1),
			State: violinv1.NodeState_NODE_STATE_RUNNING, MemoryBytes: 256 << 20, Cpus: 1, Epoch: 3, Pid: int64(1000 + i),
			Interfaces: []*violinv1.Interface{{Network: "lan", Address: fmt.Sprintf("10.10.0.%d/24", i+1), Mac: fmt.Sprintf("52:54:00:00:00:%02x", i)}},
		})
	}
	return s
}

// pair is a slice in trouble.
func pair() *violinv1.Slice {
	return &violinv1.Slice{Name: "pair", Created: timestamppb.New(created.Add(time.Hour)), Nodes: []*violinv1.Node{
		{Name: "rank0", Site: "here", Host: "h1", State: violinv1.NodeState_NODE_STATE_PAUSED, MemoryBytes: 1536 << 20, Cpus: 2, Pid: 77,
			Interfaces: []*violinv1.Interface{{Network: "a", Mac: "52:54:00:00:01:00"}, {Network: "b", Mac: "52:54:00:00:01:01", Address: "10.1.0.1/24"}},
			Forwards: []*violinv1.Forward{
				{Protocol: "tcp", Listen: "127.0.0.1:8080", Port: 80, Listening: true},
				{Protocol: "udp", Listen: "0.0.0.0:5353", Port: 53, Host: "h1", Problem: "listen at 0.0.0.0:5353: the port is taken"},
			}},
		{Name: "other", Site: "here", Host: "h2", State: violinv1.NodeState_NODE_STATE_DEAD, MemoryBytes: 100_000_000, Cpus: 1, Detail: "killed by signal 9\nat 12:01"},
	}}
}

func firstSnapshot() *violinv1.Snapshot {
	s := &violinv1.Snapshot{
		Id: "20261123T120000-7f3a", Slice: "mandelbrot", Created: timestamppb.New(created), Mode: violinv1.CaptureMode_CAPTURE_MODE_BACKGROUND,
		Duration: durationpb.New(1420 * time.Millisecond), Skew: durationpb.New(2140 * time.Microsecond),
		FramesHeld: 6, FramesRecorded: 14, Certificate: strings.Repeat("3f9a6c01", 8),
	}
	for i, n := range mandelbrot().GetNodes() {
		node := &violinv1.SnapshotNode{
			Name: n.GetName(), Host: n.GetHost(), Pause: durationpb.New(time.Duration(3100+i*250) * time.Microsecond),
			CutAt: timestamppb.New(created), CutOffset: durationpb.New(time.Duration(i) * 713_333),
			FramesHeld: uint64(i), FramesRecorded: uint64(5 - i), RawBytes: 92<<20 + uint64(i)<<18, StoredBytes: uint64(21-6*i) << 20,
			Pages: 23000, ZeroPages: 42536,
		}
		if i == 0 {
			node.Disks = []*violinv1.SnapshotDisk{
				{Name: "data", SizeBytes: 4 << 30, StoredBytes: 5 << 20}, {Name: "tools", SizeBytes: 1 << 20, StoredBytes: 1 << 20, Use: violinv1.DiskUse_DISK_USE_SHARE},
			}
		}
		s.RawBytes += node.GetRawBytes()
		s.StoredBytes += node.GetStoredBytes()
		s.Nodes = append(s.Nodes, node)
	}
	return s
}

// topologyOf is a small one without a mistake.
func topologyOf(slice string) string {
	return "slice: " + slice + `
version: 1
sites: {here: {hosts: [h1]}}
networks: {lan: {subnet: 10.0.0.0/24}}
nodes:
  rank0: {host: h1, image: mpi, memory: 64MiB, interfaces: [{network: lan, address: 10.0.0.1/24}]}
`
}

// fixture is a fake server on the real wire, in directories of its own.
type fixture struct {
	*fakeServer
	dirs daemon.Dirs
}

// shortDirs are short enough for a unix socket's path.
func shortDirs(t *testing.T) daemon.Dirs {
	t.Helper()
	root, err := os.MkdirTemp("", "violin")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(root); err != nil {
			t.Error(err)
		}
	})
	d, err := daemon.NewDirs(filepath.Join(root, "run"), filepath.Join(root, "state"))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

type fakeService struct{ http.Handler }

func (fakeService) Busy() bool   { return false }
func (fakeService) Close() error { return nil }

func newFixture(t *testing.T, version string) *fixture {
	t.Helper()
	f := &fixture{
		fakeServer: &fakeServer{slices: []*violinv1.Slice{mandelbrot(), pair()}, begun: make(chan struct{}), ended: make(chan error, 1)},
		dirs:       shortDirs(t),
	}
	ready, theirs, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer ready.Close()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	logger := slog.New(slog.DiscardHandler)
	go func() {
		ended <- daemon.Serve(ctx, daemon.Config{Dirs: f.dirs, Ready: theirs, Version: version, Logger: logger,
			Start: func(context.Context) (daemon.Service, error) {
				return fakeService{access.As(access.Caller{Role: trust.Operator}, access.Handler(f, nil, logger))}, nil
			}})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	if b, err := io.ReadAll(ready); err != nil || string(b) != "ready\n" {
		t.Fatalf("ready: %q, %v", b, err)
	}
	return f
}

// result is what a run of violin printed and ended with.
type result struct {
	stdout, stderr string
	status         int
}

// violin runs a command line in this process. What it prints names the run's own
// directories as $RUN and $STATE.
func violin(ctx context.Context, d daemon.Dirs, in io.Reader, args ...string) result {
	var out, err bytes.Buffer
	a := &app{stdio: stdio{in: in, out: &out, err: &err}, location: time.UTC}
	code := a.run(ctx, append([]string{"--run-dir", d.Run, "--state-dir", d.State}, args...))
	names := strings.NewReplacer(d.Run, "$RUN", d.State, "$STATE")
	return result{names.Replace(out.String()), names.Replace(err.String()), code}
}

func checkTranscript(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name+".txt")
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (go test ./cmd/violin -update rewrites it): -want +got\n%s", path, diff)
	}
}

type command struct {
	why   string
	stdin string
	args  []string
}

// TestTranscripts runs command lines against the fake server and compares all that
// a user sees with testdata.
func TestTranscripts(t *testing.T) {
	for _, test := range []struct {
		name     string
		idle     bool // no server runs
		commands []command
	}{
		{name: "ps", commands: []command{
			{why: "all slices; one has a dead node", args: []string{"ps"}},
			{why: "one slice", args: []string{"ps", "mandelbrot"}},
			{why: "for programs", args: []string{"ps", "pair", "-o", "json"}},
			{why: "a slice that does not run", args: []string{"ps", "missing"}},
		}},
		{name: "up", commands: []command{
			{why: "progress goes to stderr; control characters from guests do not reach the terminal", stdin: topologyOf("mandelbrot"), args: []string{"up", "-"}},
			{why: "without progress", stdin: topologyOf("mandelbrot"), args: []string{"up", "--quiet", "-"}},
			{why: "no such file", args: []string{"up", "/nonexistent/slice.yaml"}},
			{why: "no such network", stdin: strings.Replace(topologyOf("pair"), "network: lan", "network: wan", 1), args: []string{"up", "-"}},
			{why: "an address twice", stdin: topologyOf("pair") + "  rank1: {host: h1, image: mpi, memory: 64MiB, interfaces: [{network: lan, address: 10.0.0.1/24}]}\n", args: []string{"up", "-"}},
			{why: "no memory", stdin: strings.Replace(topologyOf("pair"), " memory: 64MiB,", "", 1), args: []string{"up", "-"}},
			{why: "no such field", stdin: strings.Replace(topologyOf("pair"), "memory", "memmory", 1), args: []string{"up", "-"}},
			{why: "no YAML", stdin: "slice: [\n", args: []string{"up", "-"}},
			{why: "refused by the server", stdin: topologyOf("wrong"), args: []string{"up", "-"}},
			{why: "runs already", stdin: topologyOf("taken"), args: []string{"up", "-"}},
			{why: "does not fit", stdin: topologyOf("large"), args: []string{"up", "-"}},
			{why: "a server that forgets the result", stdin: topologyOf("resultless"), args: []string{"up", "-"}},
		}},
		{name: "snapshot", commands: []command{
			{why: "the table", args: []string{"snapshot", "mandelbrot"}},
			{why: "with a tag", args: []string{"snapshot", "mandelbrot", "--tag", "before-the-crash", "-q"}},
			{why: "for programs: one document on stdout", args: []string{"snapshot", "mandelbrot", "--output", "json", "--mode", "background"}},
			{why: "aborted", args: []string{"snapshot", "aborted"}},
			{why: "a cut runs already", args: []string{"snapshot", "busy"}},
			{why: "no such mode", args: []string{"snapshot", "mandelbrot", "--mode", "magic"}},
		}},
		{name: "snapshots", commands: []command{
			{why: "the history", args: []string{"snapshots"}},
			{why: "none yet", args: []string{"snapshots", "new"}},
			{why: "none yet, for programs", args: []string{"snapshots", "new", "-o", "json"}},
		}},
		{name: "restore", commands: []command{
			{why: "by tag", args: []string{"restore", "mandelbrot@before-the-crash"}},
			{why: "for programs", args: []string{"restore", "mandelbrot@latest", "-o", "json", "-q"}},
			{why: "memory follows", args: []string{"restore", "--lazy", "mandelbrot@latest", "-q"}},
			{why: "on other hosts", args: []string{"restore", "mandelbrot@latest", "--on", "rank0=gpo-1", "--place", "auto", "-q"}},
			{why: "no such way", args: []string{"restore", "mandelbrot@latest", "--place", "anywhere"}},
			{why: "no host", args: []string{"restore", "mandelbrot@latest", "--on", "rank0"}},
			{why: "two hosts", args: []string{"restore", "mandelbrot@latest", "--on", "rank0=gpo-1", "--on", "rank1=gpo-2,rank0=utah-2"}},
			{why: "neither", args: []string{"restore", "--lazy=perhaps", "mandelbrot@latest"}},
			{why: "not a snapshot's name", args: []string{"restore", "mandelbrot"}},
			{why: "no such snapshot", args: []string{"restore", "missing@latest"}},
		}},
		{name: "log", commands: logCommands},
		{name: "image", commands: imageCommands},
		{name: "lifecycle", commands: lifecycleCommands},
		{name: "protect", commands: protectCommands},
		{name: "verify", commands: []command{
			{why: "it holds", args: []string{"verify", "mandelbrot@latest"}},
			{why: "it does not", args: []string{"verify", "mandelbrot@tampered"}},
			{why: "for programs, the report is there all the same", args: []string{"verify", "mandelbrot@tampered", "-o", "json"}},
			{why: "not a snapshot's name", args: []string{"verify", "mandelbrot"}},
			{why: "no such snapshot", args: []string{"verify", "missing@latest"}},
			{why: "a snapshot without a certificate", args: []string{"verify", "busy@latest"}},
		}},
		{name: "frames", commands: []command{
			{why: "to standard output, which is no terminal here", args: []string{"frames", "mandelbrot@latest"}},
			{why: "no such snapshot", args: []string{"frames", "missing@latest"}},
			{why: "not a snapshot's name", args: []string{"frames", "mandelbrot@"}},
			{why: "nothing for programs but the file", args: []string{"frames", "mandelbrot@latest", "-o", "json"}},
		}},
		{name: "down", commands: []command{
			{why: "one", args: []string{"down", "pair"}},
			{why: "all", args: []string{"down", "--all"}},
			{why: "for programs", args: []string{"down", "--all", "-o", "json"}},
			{why: "none", args: []string{"down"}},
			{why: "both", args: []string{"down", "--all", "pair"}},
			{why: "not running", args: []string{"down", "missing"}},
		}},
		{name: "exec", commands: []command{
			{why: "a node named in full", args: []string{"exec", "pair/rank0", "--", "ls", "-l", "/"}},
			{why: "a node whose name is unique", args: []string{"exec", "other", "--", "ls"}},
			{why: "two slices have this node", args: []string{"exec", "rank0", "--", "ls"}},
			{why: "no slice has this node", args: []string{"exec", "rank9", "--", "ls"}},
			{why: "not a node's name", args: []string{"exec", "pair/", "--", "ls"}},
			{why: "standard input, to standard output", stdin: "some input\n", args: []string{"exec", "other", "--", "cat"}},
			{why: "the program's status", args: []string{"exec", "other", "--", "exit", "3"}},
			{why: "a status that no process has is not taken for success", args: []string{"exec", "other", "--", "exit", "256"}},
			{why: "for programs", args: []string{"exec", "-o", "json", "other", "--", "exit", "3"}},
			{why: "a flag of the program before --", args: []string{"exec", "other", "ls", "-l"}},
			{why: "no program", args: []string{"exec", "other"}},
			{why: "a failure of the server is not the program's", args: []string{"exec", "busy/rank0", "--", "ls"}},
			{why: "no time at all", args: []string{"exec", "--timeout", "-1s", "other", "--", "ls"}},
		}},
		{name: "console", commands: []command{
			{why: "not on a terminal: until the node ends it", stdin: "hello, bye\n", args: []string{"console", "pair/rank0"}},
			{why: "input has ended, the node goes on", args: []string{"console", "other"}},
			{why: "no such slice", args: []string{"console", "missing/rank0"}},
			{why: "nothing for programs", args: []string{"console", "other", "-o", "json"}},
			{why: "its log", args: []string{"console", "other", "--log"}},
			{why: "the end of it", args: []string{"console", "other", "--log", "--tail", "1", "-f"}},
			{why: "no number of lines", args: []string{"console", "other", "--log", "--tail", "-1"}},
			{why: "without it", args: []string{"console", "other", "-f"}},
			{why: "no such slice's", args: []string{"console", "missing/rank0", "--log"}},
		}},
		{name: "store", commands: storeCommands},
		{name: "errors", commands: []command{
			{why: "a mistake in the server", args: []string{"ps", "internal"}},
			{why: "an error without a code", args: []string{"ps", "unknown"}},
			{why: "a panic in the server", args: []string{"ps", "panic"}},
			{why: "the server broke off a call", args: []string{"snapshot", "-q", "cut-off"}},
			{why: "the server was stopped during a call", args: []string{"snapshot", "-q", "stopping"}},
			{why: "no such verb", args: []string{"destroy"}},
			{why: "no such flag", args: []string{"ps", "--wide"}},
			{why: "too many arguments", args: []string{"ps", "a", "b"}},
			{why: "no such output", args: []string{"ps", "-o", "yaml"}},
			{why: "a run directory that no socket fits in", args: []string{"ps", "--run-dir", "/" + strings.Repeat("x", 100)}},
		}},
		{name: "no-server", idle: true, commands: []command{
			{why: "nothing runs, which is no error", args: []string{"ps"}},
			{why: "for programs", args: []string{"ps", "-q", "-o", "json"}},
			{why: "there is no such slice", args: []string{"ps", "mandelbrot"}},
			{why: "no slice to take a snapshot of", args: []string{"snapshot", "mandelbrot"}},
			{why: "nothing to stop", args: []string{"down", "--all"}},
			{why: "no such slice to stop", args: []string{"down", "mandelbrot"}},
			{why: "no node", args: []string{"exec", "mandelbrot/rank0", "--", "ls"}},
			{why: "no node", args: []string{"console", "rank0"}},
			{why: "a topology that is not there starts no server", args: []string{"up", "/nonexistent/slice.yaml"}},
			{why: "a topology with a mistake starts no server", stdin: "slice: pair\n", args: []string{"up", "-"}},
			{why: "a bad name starts no server", args: []string{"restore", "mandelbrot"}},
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			var d daemon.Dirs
			if test.idle {
				d = shortDirs(t)
			} else {
				d = newFixture(t, violinVersion()).dirs
			}
			var b strings.Builder
			for _, c := range test.commands {
				r := violin(t.Context(), d, strings.NewReader(c.stdin), c.args...)
				fmt.Fprintf(&b, "# %s\n$ violin %s\n", c.why, strings.Join(c.args, " "))
				if c.stdin != "" {
					fmt.Fprintf(&b, "-- stdin\n%s", c.stdin)
				}
				for _, s := range []struct{ name, text string }{{"stdout", r.stdout}, {"stderr", r.stderr}} {
					if s.text != "" {
						fmt.Fprintf(&b, "-- %s\n%s", s.name, s.text)
					}
				}
				fmt.Fprintf(&b, "-- status %d\n\n", r.status)
			}
			checkTranscript(t, test.name, b.String())
			if test.idle {
				if _, err := os.Stat(d.Run); err == nil {
					t.Error("a verb that needs no server left a run directory")
				}
			}
		})
	}
}

// TestJSON checks that what programs get are the API's messages, whole.
func TestJSON(t *testing.T) {
	f := newFixture(t, violinVersion())
	for _, test := range []struct {
		args []string
		want proto.Message
	}{
		{[]string{"up", "-"}, mandelbrot()},
		{[]string{"ps"}, &violinv1.ListSlicesResponse{Slices: f.slices}},
		{[]string{"snapshot", "mandelbrot"}, firstSnapshot()},
		{[]string{"restore", "mandelbrot@latest"}, &violinv1.Restored{Slice: mandelbrot(), Snapshot: firstSnapshot(),
			Duration: durationpb.New(2100 * time.Millisecond), Skew: durationpb.New(1800 * time.Microsecond), FramesInjected: 14}},
		{[]string{"down", "pair"}, &violinv1.DownResponse{Slices: []string{"pair"}}},
		{[]string{"exec", "other", "--", "cat"}, &violinv1.ExecResponse{Stdout: []byte(topologyOf("mandelbrot"))}},
	} {
		t.Run(test.args[0], func(t *testing.T) {
			r := violin(t.Context(), f.dirs, strings.NewReader(topologyOf("mandelbrot")), append([]string{"-o", "json"}, test.args...)...)
			if r.status != exitOK {
				t.Fatalf("status %d: %s", r.status, r.stderr)
			}
			got := test.want.ProtoReflect().New().Interface()
			if err := protojson.Unmarshal([]byte(r.stdout), got); err != nil {
				t.Fatal(err)
			}
			if !proto.Equal(got, test.want) {
				t.Errorf("got %v\nwant %v", got, test.want)
			}
		})
	}
}

func TestRequests(t *testing.T) {
	f := newFixture(t, violinVersion())
	file := filepath.Join(t.TempDir(), "pair.yaml")
	if err := os.WriteFile(file, []byte(topologyOf("pair")), 0o600); err != nil {
		t.Fatal(err)
	}
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		args []string
		want proto.Message
	}{
		{[]string{"up", file}, &violinv1.UpRequest{File: file, Topology: []byte(topologyOf("pair")), Directory: filepath.Dir(file)}},
		{[]string{"up", "-"}, &violinv1.UpRequest{File: "-", Topology: []byte(topologyOf("pair")), Directory: here}},
		{[]string{"down", "pair"}, &violinv1.DownRequest{Slice: "pair"}},
		{[]string{"down", "--all"}, &violinv1.DownRequest{All: true}},
		{[]string{"snapshot", "pair"}, &violinv1.SnapshotRequest{Slice: "pair"}},
		{[]string{"snapshot", "pair", "--mode", "precopy", "--tag", "x"}, &violinv1.SnapshotRequest{Slice: "pair", Mode: violinv1.CaptureMode_CAPTURE_MODE_PRECOPY, Tag: "x"}},
		{
			[]string{"snapshot", "pair", "--newer", "trigger", "--at", "2126-01-31T12:00:00Z", "--hold-bytes", "4096", "--hold-time", "2s"},
			&violinv1.SnapshotRequest{
				Slice: "pair", Newer: violinv1.NewerPolicy_NEWER_POLICY_TRIGGER, HoldBytes: 4096, HoldTime: durationpb.New(2 * time.Second),
				At: timestamppb.New(time.Date(2126, 1, 31, 12, 0, 0, 0, time.UTC)),
			},
		},
		{[]string{"snapshots", "pair"}, &violinv1.ListSnapshotsRequest{Slice: "pair"}},
		{[]string{"restore", "pair@x"}, &violinv1.RestoreRequest{Snapshot: "pair@x"}},
		{[]string{"restore", "--lazy", "pair@x"}, &violinv1.RestoreRequest{Snapshot: "pair@x", Lazy: proto.Bool(true)}},
		{[]string{"restore", "--lazy=false", "pair@x"}, &violinv1.RestoreRequest{Snapshot: "pair@x", Lazy: proto.Bool(false)}},
		{[]string{"verify", "pair@x"}, &violinv1.VerifyRequest{Snapshot: "pair@x"}},
		{[]string{"verify", "pair@x", "--read-data", "--certificate", "3f9a6c013f9a6c01"}, &violinv1.VerifyRequest{Snapshot: "pair@x", ReadData: true, Certificate: "3f9a6c013f9a6c01"}},
		{[]string{"frames", "pair@x"}, &violinv1.FramesRequest{Snapshot: "pair@x"}},
		{[]string{"exec", "pair/rank0", "ls"}, &violinv1.ExecRequest{Slice: "pair", Node: "rank0", Command: []string{"ls"}}},
		{[]string{"exec", "--timeout", "2m", "other", "--", "sh", "-c", "exit"}, &violinv1.ExecRequest{Slice: "pair", Node: "other", Command: []string{"sh", "-c", "exit"}, Timeout: durationpb.New(2 * time.Minute)}},
	} {
		t.Run(strings.Join(test.args, " "), func(t *testing.T) {
			in := ""
			if test.args[0] == "up" {
				in = topologyOf("pair")
			}
			if r := violin(t.Context(), f.dirs, strings.NewReader(in), test.args...); r.status != exitOK {
				t.Fatalf("status %d: %s", r.status, r.stderr)
			}
			if got := f.last(); !proto.Equal(got, test.want) {
				t.Errorf("got %v\nwant %v", got, test.want)
			}
		})
	}
}

// TestInterrupt checks that Ctrl-C ends the call on the server too.
func TestInterrupt(t *testing.T) {
	for _, args := range [][]string{{"up", "-"}, {"snapshot", "slow"}, {"restore", "slow@latest"}, {"exec", "slow/rank0", "--", "ls"}, {"console", "slow/rank0"}} {
		t.Run(args[0], func(t *testing.T) {
			f := newFixture(t, violinVersion())
			ctx, cancel := context.WithCancel(t.Context())
			go func() {
				<-f.begun
				cancel()
			}()
			r := violin(ctx, f.dirs, strings.NewReader(topologyOf("slow")), args...)
			if r.status != exitInterrupted || !strings.Contains(r.stderr, "violin: interrupted") {
				t.Errorf("status %d: %s", r.status, r.stderr)
			}
			if err := <-f.ended; !errors.Is(err, context.Canceled) {
				t.Errorf("the server's call ended with %v", err)
			}
		})
	}
}

func TestOtherVersionIsTold(t *testing.T) {
	f := newFixture(t, "v9.9.9")
	r := violin(t.Context(), f.dirs, nil, "ps")
	if want := "the server that runs is violin v9.9.9, this is " + violinVersion(); r.status != exitOK || !strings.Contains(r.stderr, want) {
		t.Errorf("status %d, stderr lacks %q:\n%s", r.status, want, r.stderr)
	}
	if r := violin(t.Context(), f.dirs, nil, "ps", "--quiet"); r.stderr != "" {
		t.Errorf("with --quiet: %s", r.stderr)
	}
}

func TestVersion(t *testing.T) {
	f := newFixture(t, "v9.9.9")
	r := violin(t.Context(), f.dirs, nil, "version")
	if want := "server v9.9.9, go1.99 linux/amd64, pid 4242\n"; r.status != exitOK || !strings.HasPrefix(r.stdout, "violin "+violinVersion()+", go") || !strings.HasSuffix(r.stdout, want) {
		t.Errorf("status %d:\n%s%s", r.status, r.stdout, r.stderr)
	}
	for _, test := range []struct {
		dirs       daemon.Dirs
		wantServer any
	}{{f.dirs, map[string]any{"version": "v9.9.9", "go": "go1.99 linux/amd64", "pid": "4242", "api": "", "formats": map[string]any{}}}, {shortDirs(t), nil}} {
		r := violin(t.Context(), test.dirs, nil, "version", "-o", "json")
		var got struct{ Client, Server any }
		if err := json.Unmarshal([]byte(r.stdout), &got); err != nil {
			t.Fatalf("%v:\n%s%s", err, r.stdout, r.stderr)
		}
		if got.Client == nil {
			t.Error("no client version")
		}
		if diff := cmp.Diff(test.wantServer, got.Server); diff != "" {
			t.Errorf("server: -want +got\n%s", diff)
		}
	}
}

func TestCompletion(t *testing.T) {
	f := newFixture(t, violinVersion())
	for _, test := range []struct {
		verb string
		want []string
	}{
		{"snapshot", []string{"mandelbrot", "pair"}},
		{"exec", []string{"mandelbrot/rank0", "mandelbrot/rank1", "mandelbrot/rank2", "mandelbrot/rank3", "pair/rank0", "pair/other"}},
		{"restore", []string{"mandelbrot@20261123T120000-7f3a", "mandelbrot@20261123T120100-5e1d", "mandelbrot@before-the-crash"}},
	} {
		r := violin(t.Context(), f.dirs, nil, "__complete", test.verb, "")
		got := strings.Fields(strings.SplitN(r.stdout, "\n:", 2)[0])
		if diff := cmp.Diff(test.want, got); diff != "" {
			t.Errorf("%s: -want +got\n%s", test.verb, diff)
		}
	}
	// Without a server it offers nothing and starts none.
	d := shortDirs(t)
	violin(t.Context(), d, nil, "__complete", "snapshot", "")
	if _, err := os.Stat(d.Run); err == nil {
		t.Error("completion started a server")
	}
}

// TestStartsServer checks that a verb that needs a server starts this very program as one.
func TestStartsServer(t *testing.T) {
	d := shortDirs(t)
	t.Setenv(asViolin, "1")
	r := violin(t.Context(), d, nil, "snapshots")
	if want := "server: starting it in the background\n"; !strings.HasPrefix(r.stderr, want) {
		t.Fatalf("stderr does not begin with %q:\n%s", want, r.stderr)
	}
	version, err := daemon.Probe(t.Context(), d)
	if err != nil || version != violinVersion() {
		t.Fatalf("the server: version %q, %v", version, err)
	}
	// Another server is refused while it runs.
	if r := violin(t.Context(), d, nil, "server"); r.status != exitFailure || !strings.Contains(r.stderr, "already serves") {
		t.Errorf("a second server: status %d: %s", r.status, r.stderr)
	}
	text, err := os.ReadFile(filepath.Join(d.Run, "server.lock"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	// Until the signal is noticed it answers, and a server that answers is not waited for.
	for err == nil {
		_, err = daemon.Probe(t.Context(), d)
	}
	// The next one waits for it, and leaves by itself.
	if r := violin(t.Context(), d, nil, "server", "--idle-exit", "1ms"); r.status != exitOK {
		t.Errorf("the next server: status %d: %s", r.status, r.stderr)
	}
}

func TestServerFlags(t *testing.T) {
	d := shortDirs(t)
	for _, args := range [][]string{{"--idle-exit", "-1s"}, {"--log-level", "loud"}, {"-o", "json"}, {"argument"}} {
		if r := violin(t.Context(), d, nil, append([]string{"server"}, args...)...); r.status != exitUsage {
			t.Errorf("server %v: status %d: %s", args, r.status, r.stderr)
		}
	}
}
