package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/klauspost/compress/zstd"
	"google.golang.org/protobuf/types/known/timestamppb"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
	"violin/internal/agent"
	"violin/internal/coloring"
	"violin/internal/cut"
	"violin/internal/fabric"
	"violin/internal/frames"
	"violin/internal/hypervisor/qemu"
	"violin/internal/machine"
	stream "violin/internal/migration/qemu"
	"violin/internal/qga"
)

// runner is what a host runs of its slices: an [agent.Agent].
type runner interface {
	AddPeer(ctx context.Context, slice string, peer fabric.Peer) error
	SetRemotes(ctx context.Context, slice string, remotes []coloring.Remote) error
	AddGateway(ctx context.Context, spec agent.GatewaySpec) error
	AddNode(ctx context.Context, spec agent.NodeSpec, incoming bool) error
	LoadNodeLazily(ctx context.Context, slice, name string, skeleton *stream.Skeleton, lazy agent.Lazy) error
	FollowNode(slice, name string) error
	FollowOn(ctx context.Context, lazy func(slice, node string, blocks []stream.RAMBlock) agent.Lazy)
	LoadStream(ctx context.Context, slice, name string, write func(io.Writer) error) error
	RunNode(ctx context.Context, slice, name string, channel []frames.Frame, receivers []frames.Receiver) (time.Time, error)
	ContinueNode(ctx context.Context, slice, name string) error
	SetClock(ctx context.Context, slice, name string) error
	Status(ctx context.Context, slice, name string) (agent.NodeStatus, error)
	Exec(ctx context.Context, slice, name string, command []string, stdin []byte) (qga.Result, error)
	Console(ctx context.Context, slice, name string) (net.Conn, error)
	ConsoleLog(ctx context.Context, slice, name string, w agent.LogWish) (io.ReadCloser, error)
	Handle(o agent.Order, report func(cut.Event))
	Results(slice, id string) (agent.HostResult, error)
	MarkOutput(ctx context.Context, slice string) ([]uint64, error)
	ReleaseOutput(ctx context.Context, slice string, marks []uint64) error
	Forwards(ctx context.Context, slice string) ([]agent.Listening, error)
	Gone(slice, name string) (<-chan struct{}, error)
	SwitchGone() <-chan struct{}
	Abandon(slice string)
	InCut(slice string) bool
	Leave(slice string) error
	Close() error
}

var (
	_ runner                              = (*agent.Agent)(nil)
	_ violinv1connect.AgentServiceHandler = (*Host)(nil)
)

func gone(host string) error {
	return connect.NewError(connect.CodeFailedPrecondition,
		fmt.Errorf("host %s: its agent was started anew, and what ran there is gone; restore the slice from its last snapshot", host))
}

// AddPeer implements the agents' protocol.
func (h *Host) AddPeer(ctx context.Context, req *violinv1.AddPeerRequest) (*violinv1.AddPeerResponse, error) {
	r, err := h.running(req.GetRun())
	if err != nil {
		return nil, err
	}
	p := fabric.Peer{Host: req.GetHost()}
	if p.ID, err = number(req.GetId()); err != nil {
		return nil, refuse("%w", err)
	}
	if p.Addr, err = netip.ParseAddr(req.GetAddress()); err != nil {
		return nil, refuse("%w", err)
	}
	if p.MAC, err = decodeMAC(req.GetMac()); err != nil {
		return nil, refuse("%w", err)
	}
	return &violinv1.AddPeerResponse{}, r.agent.AddPeer(ctx, r.slice, p)
}

// SetRemotes implements the agents' protocol.
func (h *Host) SetRemotes(ctx context.Context, req *violinv1.SetRemotesRequest) (*violinv1.SetRemotesResponse, error) {
	r, err := h.running(req.GetRun())
	if err != nil {
		return nil, err
	}
	var all []coloring.Remote
	for _, m := range req.GetRemotes() {
		var c coloring.Remote
		if c.Network, err = number(m.GetNetwork()); err != nil {
			return nil, refuse("%w", err)
		}
		if c.Peer, err = number(m.GetPeer()); err != nil {
			return nil, refuse("%w", err)
		}
		if c.Address, err = decodeMAC(m.GetMac()); err != nil {
			return nil, refuse("%w", err)
		}
		c.Outside = m.GetOutside()
		all = append(all, c)
	}
	return &violinv1.SetRemotesResponse{}, r.agent.SetRemotes(ctx, r.slice, all)
}

// AddGateway implements the agents' protocol.
func (h *Host) AddGateway(ctx context.Context, req *violinv1.AddGatewayRequest) (*violinv1.AddGatewayResponse, error) {
	r, err := h.running(req.GetRun())
	if err != nil {
		return nil, err
	}
	g := agent.GatewaySpec{Slice: r.slice, MTU: int(req.GetMtu()), Hold: req.GetHold(), Closed: req.GetClosed()}
	if g.Network, err = number(req.GetNetwork()); err != nil {
		return nil, refuse("%w", err)
	}
	if g.Address, err = netip.ParsePrefix(req.GetAddress()); err != nil {
		return nil, refuse("%w", err)
	}
	if g.MAC, err = decodeMAC(req.GetMac()); err != nil {
		return nil, refuse("%w", err)
	}
	if g.Forwards, err = decodeForwards(req.GetForwards()); err != nil {
		return nil, refuse("%w", err)
	}
	return &violinv1.AddGatewayResponse{}, r.agent.AddGateway(ctx, g)
}

// AddNode implements the agents' protocol.
func (h *Host) AddNode(ctx context.Context, req *violinv1.AddNodeRequest) (*violinv1.AddNodeResponse, error) {
	r, err := h.running(req.GetRun())
	if err != nil {
		return nil, err
	}
	if req.GetNode() == "" || filepath.Base(req.GetNode()) != req.GetNode() {
		return nil, refuse("%q is no node's name", req.GetNode())
	}
	spec := agent.NodeSpec{Slice: r.slice, Name: req.GetNode(), Machine: qemu.Spec{
		Name: r.slice + "/" + req.GetNode(), Memory: req.GetMemoryBytes(), CPUs: int(req.GetCpus()), Append: req.GetAppend(),
		GuestConfig: req.GetGuestConfig(), Generation: req.GetGeneration(), Args: req.GetArguments(), Firmware: req.GetFirmware(),
	}}
	if spec.Epoch, err = epoch(req.GetEpoch()); err != nil {
		return nil, refuse("%w", err)
	}
	if spec.Interfaces, err = decodePorts(req.GetPorts()); err != nil {
		return nil, refuse("%w", err)
	}
	for _, f := range req.GetFiles() {
		path, err := h.stock.find(f)
		if err != nil {
			return nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("node %q: %s: %w", req.GetNode(), f.GetKind(), err))
		}
		switch f.GetKind() {
		case "kernel":
			spec.Machine.Kernel = path
		case "initrd":
			spec.Machine.Initrd = path
		case "rootfs":
			spec.Machine.RootFS = path
		default:
			return nil, refuse("node %q: a boot file of kind %q", req.GetNode(), f.GetKind())
		}
	}
	if err := h.decodeDisks(ctx, r.id, req, &spec); err != nil {
		return nil, err
	}
	return &violinv1.AddNodeResponse{}, r.agent.AddNode(ctx, spec, req.GetIncoming())
}

// Load implements the agents' protocol.
func (h *Host) Load(ctx context.Context, in *connect.ClientStream[violinv1.LoadRequest]) (*violinv1.LoadResponse, error) {
	if !in.Receive() {
		return nil, errors.Join(refuse("a state of no node"), in.Err())
	}
	r, err := h.running(in.Msg().GetRun())
	if err != nil {
		return nil, err
	}
	z, err := zstd.NewReader(&messages{in: in}, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(8<<20))
	if err != nil {
		return nil, err
	}
	defer z.Close()
	err = r.agent.LoadStream(ctx, r.slice, in.Msg().GetNode(), func(w io.Writer) error {
		_, err := z.WriteTo(w)
		return err
	})
	return &violinv1.LoadResponse{}, err
}

// messages reads what comes in messages. It is at its end only if the sender says so:
// a connection that is lost is an error.
type messages struct {
	in   *connect.ClientStream[violinv1.LoadRequest]
	rest []byte
}

// Read implements [io.Reader].
func (m *messages) Read(b []byte) (int, error) {
	for len(m.rest) == 0 {
		if !m.in.Receive() {
			if err := m.in.Err(); err != nil {
				return 0, err
			}
			return 0, io.EOF
		}
		m.rest = m.in.Msg().GetData()
	}
	n := copy(b, m.rest)
	m.rest = m.rest[n:]
	return n, nil
}

// RunNode implements the agents' protocol.
func (h *Host) RunNode(ctx context.Context, req *violinv1.RunNodeRequest) (*violinv1.RunNodeResponse, error) {
	r, err := h.running(req.GetRun())
	if err != nil {
		return nil, err
	}
	var channel []frames.Frame
	var receivers []frames.Receiver // one an interface
	for _, f := range req.GetFrames() {
		if f.GetInterface() > 1<<10 {
			return nil, refuse("a frame for interface %d", f.GetInterface())
		}
		for n := len(receivers); n <= int(f.GetInterface()); n++ {
			receivers = append(receivers, frames.Receiver{Node: req.GetNode(), Interface: n})
		}
		e, err := epoch(f.GetEpoch())
		if err != nil {
			return nil, refuse("%w", err)
		}
		channel = append(channel, frames.Frame{Receiver: int(f.GetInterface()), Epoch: e, At: f.GetAt().AsDuration(), Data: f.GetData()})
	}
	// Without its server it is still let run: half of its channel state, and a gate that
	// stays closed, would be no state of the node.
	began, err := r.agent.RunNode(context.WithoutCancel(ctx), r.slice, req.GetNode(), channel, receivers)
	if err != nil {
		return nil, err
	}
	return &violinv1.RunNodeResponse{Began: timestamppb.New(began)}, nil
}

// ContinueNode implements the agents' protocol.
func (h *Host) ContinueNode(ctx context.Context, req *violinv1.ContinueNodeRequest) (*violinv1.ContinueNodeResponse, error) {
	r, err := h.running(req.GetRun())
	if err != nil {
		return nil, err
	}
	return &violinv1.ContinueNodeResponse{}, r.agent.ContinueNode(ctx, r.slice, req.GetNode())
}

// SetClock implements the agents' protocol.
func (h *Host) SetClock(ctx context.Context, req *violinv1.SetClockRequest) (*violinv1.SetClockResponse, error) {
	r, err := h.running(req.GetRun())
	if err != nil {
		return nil, err
	}
	return &violinv1.SetClockResponse{}, r.agent.SetClock(ctx, r.slice, req.GetNode())
}

// NodeStatus implements the agents' protocol.
func (h *Host) NodeStatus(ctx context.Context, req *violinv1.NodeStatusRequest) (*violinv1.NodeStatusResponse, error) {
	r, err := h.running(req.GetRun())
	if err != nil {
		return nil, err
	}
	s, err := r.agent.Status(ctx, r.slice, req.GetNode())
	if err != nil {
		return nil, err
	}
	return &violinv1.NodeStatusResponse{Epoch: uint32(s.Epoch), Pid: int64(s.PID), Status: s.Status, Problem: s.Problem, ResidentBytes: machine.Resident(s.PID)}, nil
}

// ExecNode implements the agents' protocol.
func (h *Host) ExecNode(ctx context.Context, req *violinv1.ExecNodeRequest) (*violinv1.ExecNodeResponse, error) {
	r, err := h.running(req.GetRun())
	if err != nil {
		return nil, err
	}
	if len(req.GetCommand()) == 0 {
		return nil, refuse("no command was given")
	}
	res, err := r.agent.Exec(ctx, r.slice, req.GetNode(), req.GetCommand(), req.GetStdin())
	if err != nil {
		return nil, err
	}
	return &violinv1.ExecNodeResponse{ExitCode: int32(res.ExitCode), Stdout: res.Stdout, Stderr: res.Stderr}, nil
}

// JoinConsole implements the agents' protocol.
func (h *Host) JoinConsole(ctx context.Context, s *connect.BidiStream[violinv1.JoinConsoleRequest, violinv1.JoinConsoleResponse]) error {
	first, err := s.Receive()
	if err != nil {
		return err
	}
	r, err := h.running(first.GetRun())
	if err != nil {
		return err
	}
	c, err := r.agent.Console(ctx, r.slice, first.GetNode())
	if err != nil {
		return err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	if err := s.Send(&violinv1.JoinConsoleResponse{}); err != nil {
		return err
	}
	go func() {
		defer c.Close()
		for {
			m, err := s.Receive()
			if err != nil {
				return
			}
			if _, err := c.Write(m.GetData()); err != nil {
				return
			}
		}
	}()
	buf := make([]byte, 4096)
	for {
		n, err := c.Read(buf)
		if n > 0 {
			if err := s.Send(&violinv1.JoinConsoleResponse{Data: buf[:n]}); err != nil {
				return err
			}
		}
		if err != nil {
			return nil // the node has ended, or the caller
		}
	}
}

// ReadConsoleLog implements the agents' protocol.
func (h *Host) ReadConsoleLog(ctx context.Context, req *violinv1.ReadConsoleLogRequest, s *connect.ServerStream[violinv1.ReadConsoleLogResponse]) error {
	r, err := h.running(req.GetRun())
	if err != nil {
		return err
	}
	log, err := r.agent.ConsoleLog(ctx, r.slice, req.GetNode(), agent.LogWish{Tail: req.Tail, Follow: req.GetFollow()})
	if err != nil {
		return err
	}
	defer log.Close()
	_, err = io.Copy(parts(func(b []byte) error { return s.Send(&violinv1.ReadConsoleLogResponse{Data: b}) }), log)
	return err
}

// AwaitGone implements the agents' protocol.
func (h *Host) AwaitGone(ctx context.Context, req *violinv1.AwaitGoneRequest) (*violinv1.AwaitGoneResponse, error) {
	r, err := h.running(req.GetRun())
	if err != nil {
		return nil, err
	}
	gone := r.agent.SwitchGone()
	if req.GetNode() != "" {
		if gone, err = r.agent.Gone(r.slice, req.GetNode()); err != nil {
			return nil, connect.NewError(connect.CodeFailedPrecondition, err)
		}
	}
	select {
	case <-gone:
		return &violinv1.AwaitGoneResponse{}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// MarkOutput implements the agents' protocol.
func (h *Host) MarkOutput(ctx context.Context, req *violinv1.MarkOutputRequest) (*violinv1.MarkOutputResponse, error) {
	r, err := h.running(req.GetRun())
	if err != nil {
		return nil, err
	}
	marks, err := r.agent.MarkOutput(ctx, r.slice)
	return &violinv1.MarkOutputResponse{Marks: marks}, err
}

// ReleaseOutput implements the agents' protocol.
func (h *Host) ReleaseOutput(ctx context.Context, req *violinv1.ReleaseOutputRequest) (*violinv1.ReleaseOutputResponse, error) {
	r, err := h.running(req.GetRun())
	if err != nil {
		return nil, err
	}
	return &violinv1.ReleaseOutputResponse{}, r.agent.ReleaseOutput(ctx, r.slice, req.GetMarks())
}

// Now implements the agents' protocol.
func (h *Host) Now(context.Context, *violinv1.NowRequest) (*violinv1.NowResponse, error) {
	return &violinv1.NowResponse{Now: timestamppb.Now()}, nil
}

// Results implements the agents' protocol.
func (h *Host) Results(_ context.Context, req *violinv1.ResultsRequest, out *connect.ServerStream[violinv1.ResultsResponse]) error {
	r, err := h.running(req.GetRun())
	if err != nil {
		return err
	}
	res, err := r.agent.Results(r.slice, req.GetCut())
	if err != nil {
		return err
	}
	return sendResults(res, out.Send)
}

// Cut implements the agents' protocol.
func (h *Host) Cut(ctx context.Context, s *connect.BidiStream[violinv1.CutRequest, violinv1.CutResponse]) error {
	m, err := s.Receive()
	if err != nil {
		return err
	}
	r, err := h.running(m.GetRun())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var sending sync.WaitGroup
	defer sending.Wait()
	defer cancel()
	turn := r.box.attach()
	defer r.box.detach(turn)
	sending.Go(func() {
		defer cancel()
		for {
			ev, ok := r.box.next(ctx, turn)
			if !ok || s.Send(ev) != nil {
				return
			}
		}
	})
	for {
		o, err := decodeOrder(m, r.slice, h.cfg.Identity.Host)
		if err != nil {
			return refuse("%w", err)
		}
		if p := m.GetPrepare(); p != nil {
			h.mu.Lock()
			ingest := h.ingest
			h.mu.Unlock()
			o.Session = newSession(p.GetSession(), ingest)
			r.box.open()
		}
		r.agent.Handle(o, r.box.put)
		if m, err = s.Receive(); connect.CodeOf(err) == connect.CodeAborted {
			return err // another server is obeyed
		} else if err != nil {
			return nil // the server has what it wanted, or is gone
		}
		if m.GetRun() != r.id {
			return gone(h.cfg.Identity.Host)
		}
	}
}
