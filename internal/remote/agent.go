package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/klauspost/compress/zstd"
	"google.golang.org/protobuf/types/known/durationpb"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
	"violin/internal/agent"
	"violin/internal/coloring"
	"violin/internal/cut"
	"violin/internal/fabric"
	"violin/internal/frames"
	stream "violin/internal/migration/qemu"
	"violin/internal/qga"
)

const (
	// closeBound bounds the wait for a host to stop what it runs, and askBound that for
	// results and short answers of which the caller sets no bound.
	closeBound = 60 * time.Second
	askBound   = 60 * time.Second
	// ordersWaiting bounds the orders that an agent has not taken. More is as good as a
	// lost connection.
	ordersWaiting = 4096
	loadPart      = 256 << 10
)

// Agent is an agent on a host that has joined, for one slice. It has the methods of an
// [agent.Agent] that a server and a coordinator call, and they mean the same.
type Agent struct {
	host  *joined
	slice string
	run   string

	mu      sync.Mutex
	cut     *cutting
	session string // of the cut that runs or ran last

	following map[string]*given // the memory that follows, or has, by node

	life context.Context // until Close
	end  context.CancelFunc
}

// call calls the agent, as far as there is one.
func (a *Agent) call(ctx context.Context, f func(context.Context, violinv1connect.AgentServiceClient) error) error {
	client, err := a.host.now()
	if err != nil {
		return err
	}
	return a.answered(ctx, f(ctx, client))
}

// answered is how a call to the agent went, for who made it.
func (a *Agent) answered(ctx context.Context, err error) error {
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("host %s: %w", a.host.name, ctx.Err())
	}
	return fmt.Errorf("host %s: %w", a.host.name, said(err))
}

// Run is the name of what the host runs of the slice.
func (a *Agent) Run() string { return a.run }

// Begin makes the host ready for the slice.
func (a *Agent) Begin(ctx context.Context) error {
	return a.call(ctx, func(ctx context.Context, c violinv1connect.AgentServiceClient) error {
		_, err := c.Begin(ctx, &violinv1.BeginRequest{Run: a.run, Slice: a.slice})
		return err
	})
}

// Away tells why the host's agent cannot be called; nil if it is connected.
func (a *Agent) Away() error {
	_, err := a.host.now()
	return err
}

// AwaitConnected waits until the host's agent is connected; false if ctx ends, or the
// run, before.
func (a *Agent) AwaitConnected(ctx context.Context) bool {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(a.life, cancel)()
	for {
		a.host.mu.Lock()
		connected, changed := a.host.client != nil, a.host.changed
		a.host.mu.Unlock()
		if connected {
			return true
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return false
		}
	}
}

// Part ends what the server does with the run, which goes on: for the next server.
func (a *Agent) Part() {
	a.end()
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.cut != nil {
		a.cut.cancel()
	}
	a.host.ingest.close(a.session)
	a.host.supply.close(a.run)
}

// tooLong is how long the host may be away.
func (a *Agent) tooLong() time.Duration {
	if f := a.host.hub.cfg.Patience; f != nil {
		return f(a.slice)
	}
	return DefaultPatience
}

// Underlay is where the host is attached to what joins the hosts.
func (a *Agent) Underlay() agent.Underlay {
	a.host.mu.Lock()
	defer a.host.mu.Unlock()
	return a.host.machine.Underlay
}

// Peer is the host's number among those that have joined: the same for all slices, and
// for as long as one of them runs there.
func (a *Agent) Peer() uint16 { return a.host.number }

// AddPeer joins the host to another one.
func (a *Agent) AddPeer(ctx context.Context, _ string, p fabric.Peer) error {
	return a.call(ctx, func(ctx context.Context, c violinv1connect.AgentServiceClient) error {
		_, err := c.AddPeer(ctx, &violinv1.AddPeerRequest{Run: a.run, Id: uint32(p.ID), Host: p.Host, Address: p.Addr.String(), Mac: p.MAC})
		return err
	})
}

// SetRemotes tells where the interfaces on other hosts are.
func (a *Agent) SetRemotes(ctx context.Context, _ string, remotes []coloring.Remote) error {
	m := &violinv1.SetRemotesRequest{Run: a.run}
	for _, r := range remotes {
		m.Remotes = append(m.Remotes, &violinv1.Remote{Network: uint32(r.Network), Mac: r.Address, Peer: uint32(r.Peer), Outside: r.Outside})
	}
	return a.call(ctx, func(ctx context.Context, c violinv1connect.AgentServiceClient) error {
		_, err := c.SetRemotes(ctx, m)
		return err
	})
}

// AddGateway gives a network a way out.
func (a *Agent) AddGateway(ctx context.Context, g agent.GatewaySpec) error {
	return a.call(ctx, func(ctx context.Context, c violinv1connect.AgentServiceClient) error {
		_, err := c.AddGateway(ctx, &violinv1.AddGatewayRequest{
			Run: a.run, Network: uint32(g.Network), Address: g.Address.String(), Mac: g.MAC, Mtu: uint32(g.MTU), Hold: g.Hold,
			Closed: g.Closed, Forwards: encodeForwards(g.Forwards),
		})
		return err
	})
}

// AddNode makes a node. The host must have the files that it boots from: see [Agent.Fetch].
func (a *Agent) AddNode(ctx context.Context, spec agent.NodeSpec, incoming bool) error {
	m := &violinv1.AddNodeRequest{
		Run: a.run, Node: spec.Name, Epoch: uint32(spec.Epoch), MemoryBytes: spec.Machine.Memory, Cpus: uint32(spec.Machine.CPUs),
		Append: spec.Machine.Append, GuestConfig: spec.Machine.GuestConfig, Generation: spec.Machine.Generation, Arguments: spec.Machine.Args,
		Ports: encodePorts(spec.Interfaces), Incoming: incoming, Firmware: spec.Machine.Firmware,
	}
	var restored map[diskKey]diskSource
	m.Disks, restored = a.encodeDisks(spec)
	a.host.supply.change(a.run, func(o *offer) { maps.Copy(o.disks, restored) })
	defer a.host.supply.change(a.run, func(o *offer) {
		maps.DeleteFunc(o.disks, func(k diskKey, _ diskSource) bool { return k.node == spec.Name })
	})
	for _, f := range []struct{ kind, path string }{{"kernel", spec.Machine.Kernel}, {"initrd", spec.Machine.Initrd}, {"rootfs", spec.Machine.RootFS}} {
		if f.path == "" {
			continue
		}
		file := a.host.hub.file(File{Path: f.path, Hash: spec.Boot[f.kind]})
		file.Kind = f.kind
		m.Files = append(m.Files, file)
	}
	return a.call(ctx, func(ctx context.Context, c violinv1connect.AgentServiceClient) error {
		_, err := c.AddNode(ctx, m)
		return err
	})
}

// LoadNode gives an incoming node its state.
func (a *Agent) LoadNode(ctx context.Context, _, name string, skeleton *stream.Skeleton, pages stream.PageSource) error {
	return a.call(ctx, func(ctx context.Context, c violinv1connect.AgentServiceClient) error {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		up, err := c.Load(ctx)
		if err != nil {
			return err
		}
		if err := up.Send(&violinv1.LoadRequest{Run: a.run, Node: name}); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		err = compressTo(parts(func(b []byte) error { return up.Send(&violinv1.LoadRequest{Data: b}) }), func(w io.Writer) error {
			return stream.Encode(w, skeleton, pages)
		})
		if err != nil && !errors.Is(err, io.EOF) { // the answer says why it reads no more
			return err
		}
		_, err = up.CloseAndReceive()
		return err
	})
}

// compressTo has write write to w, compressed.
func compressTo(w io.Writer, write func(io.Writer) error) error {
	z, err := zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(1<<20))
	if err != nil {
		return err
	}
	if err := write(z); err != nil {
		return err
	}
	return z.Close()
}

// parts sends what is written in messages that are not too large.
type parts func([]byte) error

// Write implements [io.Writer].
func (send parts) Write(b []byte) (int, error) {
	for done := 0; done < len(b); {
		n := min(loadPart, len(b)-done)
		if err := send(b[done : done+n]); err != nil {
			return done, err
		}
		done += n
	}
	return len(b), nil
}

// RunNode lets a node run, and gives it its channel state. It returns when, by the
// host's clock, the vCPUs began to run.
func (a *Agent) RunNode(ctx context.Context, _, name string, channel []frames.Frame, receivers []frames.Receiver) (began time.Time, err error) {
	m := &violinv1.RunNodeRequest{Run: a.run, Node: name}
	for _, f := range channel {
		if r := receivers[f.Receiver]; r.Node == name {
			m.Frames = append(m.Frames, &violinv1.ChannelFrame{Interface: uint32(r.Interface), Epoch: uint32(f.Epoch), At: durationpb.New(f.At), Data: f.Data})
		}
	}
	err = a.call(ctx, func(ctx context.Context, c violinv1connect.AgentServiceClient) error {
		r, err := c.RunNode(ctx, m)
		began = local(r.GetBegan())
		return err
	})
	return began, err
}

// ContinueNode lets the vCPUs of a node that a cut has halted run again.
func (a *Agent) ContinueNode(ctx context.Context, _, name string) error {
	return a.call(ctx, func(ctx context.Context, c violinv1connect.AgentServiceClient) error {
		_, err := c.ContinueNode(ctx, &violinv1.ContinueNodeRequest{Run: a.run, Node: name})
		return err
	})
}

// SetClock steps a node's wall clock to its host's.
func (a *Agent) SetClock(ctx context.Context, _, name string) error {
	return a.call(ctx, func(ctx context.Context, c violinv1connect.AgentServiceClient) error {
		_, err := c.SetClock(ctx, &violinv1.SetClockRequest{Run: a.run, Node: name})
		return err
	})
}

// Status tells how a node is. Its PID is of its own host.
func (a *Agent) Status(ctx context.Context, _, name string) (s agent.NodeStatus, err error) {
	err = a.call(ctx, func(ctx context.Context, c violinv1connect.AgentServiceClient) error {
		r, err := c.NodeStatus(ctx, &violinv1.NodeStatusRequest{Run: a.run, Node: name})
		if err != nil {
			return err
		}
		s = agent.NodeStatus{PID: int(r.GetPid()), Status: r.GetStatus(), Problem: r.GetProblem(), Resident: r.GetResidentBytes()}
		s.Epoch, err = epoch(r.GetEpoch())
		return err
	})
	return s, err
}

// Exec runs a program in a node through its guest agent.
func (a *Agent) Exec(ctx context.Context, _, name string, command []string, stdin []byte) (r qga.Result, err error) {
	err = a.call(ctx, func(ctx context.Context, c violinv1connect.AgentServiceClient) error {
		m, err := c.ExecNode(ctx, &violinv1.ExecNodeRequest{Run: a.run, Node: name, Command: command, Stdin: stdin})
		r = qga.Result{ExitCode: int(m.GetExitCode()), Stdout: m.GetStdout(), Stderr: m.GetStderr()}
		return err
	})
	return r, err
}

// Console joins a node's serial console, until ctx ends or it is closed.
func (a *Agent) Console(ctx context.Context, _, name string) (net.Conn, error) {
	client, err := a.host.now()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	s, err := client.JoinConsole(ctx)
	if err == nil {
		err = s.Send(&violinv1.JoinConsoleRequest{Run: a.run, Node: name})
	}
	if err == nil {
		_, err = s.Receive() // that it is joined
	}
	if err != nil {
		cancel()
		return nil, fmt.Errorf("host %s: %w", a.host.name, said(err))
	}
	ours, theirs := net.Pipe()
	go func() {
		defer cancel()
		defer theirs.Close()
		for {
			m, err := s.Receive()
			if err != nil {
				return
			}
			if _, err := theirs.Write(m.GetData()); err != nil {
				return
			}
		}
	}()
	go func() {
		defer cancel()
		buf := make([]byte, 4096)
		for {
			n, err := theirs.Read(buf)
			if err != nil {
				return
			}
			if err := s.Send(&violinv1.JoinConsoleRequest{Data: buf[:n]}); err != nil {
				return
			}
		}
	}()
	return ours, nil
}

// ConsoleLog reads what a node has printed to its serial console.
func (a *Agent) ConsoleLog(ctx context.Context, _, name string, w agent.LogWish) (io.ReadCloser, error) {
	client, err := a.host.now()
	if err != nil {
		return nil, err
	}
	m := &violinv1.ReadConsoleLogRequest{Run: a.run, Node: name, Follow: w.Follow, Tail: w.Tail}
	ctx, cancel := context.WithCancel(ctx)
	s, err := client.ReadConsoleLog(ctx, m)
	if err != nil {
		cancel()
		return nil, fmt.Errorf("host %s: %w", a.host.name, said(err))
	}
	ours, theirs := io.Pipe()
	go func() {
		defer cancel()
		for s.Receive() {
			if _, err := theirs.Write(s.Msg().GetData()); err != nil {
				return
			}
		}
		err := s.Err()
		if err != nil {
			err = fmt.Errorf("host %s: %w", a.host.name, said(err))
		}
		theirs.CloseWithError(err)
	}()
	return ours, nil
}

// MarkOutput says where the frames end that wait at the host's gateways now.
func (a *Agent) MarkOutput(ctx context.Context, _ string) (marks []uint64, err error) {
	err = a.call(ctx, func(ctx context.Context, c violinv1connect.AgentServiceClient) error {
		r, err := c.MarkOutput(ctx, &violinv1.MarkOutputRequest{Run: a.run})
		marks = r.GetMarks()
		return err
	})
	return marks, err
}

// ReleaseOutput lets the frames before their marks go to the outside.
func (a *Agent) ReleaseOutput(ctx context.Context, _ string, marks []uint64) error {
	return a.call(ctx, func(ctx context.Context, c violinv1connect.AgentServiceClient) error {
		_, err := c.ReleaseOutput(ctx, &violinv1.ReleaseOutputRequest{Run: a.run, Marks: marks})
		return err
	})
}

// Gone returns what is closed when a node's hypervisor has ended.
func (a *Agent) Gone(_, name string) (<-chan struct{}, error) { return a.await(name), nil }

// SwitchGone returns what is closed when the host's switch has ended, or when the host
// has been away for so long that it counts as lost.
func (a *Agent) SwitchGone() <-chan struct{} { return a.await("") }

func (a *Agent) await(node string) <-chan struct{} {
	gone := make(chan struct{})
	go func() {
		for a.life.Err() == nil {
			err := a.call(a.life, func(ctx context.Context, c violinv1connect.AgentServiceClient) error {
				_, err := c.AwaitGone(ctx, &violinv1.AwaitGoneRequest{Run: a.run, Node: node})
				if connect.CodeOf(err) == connect.CodeFailedPrecondition {
					return nil // neither node nor run is known there any more
				}
				return err
			})
			if a.life.Err() == nil && (err == nil || !a.host.back(a.life, a.tooLong) && node == "") {
				close(gone)
				return
			}
		}
	}()
	return gone
}

// Now is the host's clock.
func (a *Agent) Now(ctx context.Context) (now time.Time, err error) {
	err = a.call(ctx, func(ctx context.Context, c violinv1connect.AgentServiceClient) error {
		r, err := c.Now(ctx, &violinv1.NowRequest{})
		now = local(r.GetNow())
		return err
	})
	return now, err
}

// Results returns what the host brings to a snapshot.
func (a *Agent) Results(_, id string) (agent.HostResult, error) {
	ctx, cancel := context.WithTimeout(context.Background(), askBound)
	defer cancel()
	r := agent.HostResult{Host: a.host.name}
	err := a.call(ctx, func(ctx context.Context, c violinv1connect.AgentServiceClient) error {
		s, err := c.Results(ctx, &violinv1.ResultsRequest{Run: a.run, Cut: id})
		if err != nil {
			return err
		}
		defer s.Close()
		for s.Receive() {
			done, err := addResult(&r, s.Msg())
			if done || err != nil {
				return err
			}
		}
		return errors.Join(errors.New("its results are not complete"), s.Err())
	})
	if err != nil {
		return agent.HostResult{}, err
	}
	return r, nil
}

// Close stops the slice's nodes on the host, and if it runs no other, its switch. An
// agent that is away does so when it is back.
func (a *Agent) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), closeBound)
	defer cancel()
	a.Part()
	err := a.call(ctx, func(ctx context.Context, c violinv1connect.AgentServiceClient) error {
		_, err := c.End(ctx, &violinv1.EndRequest{Run: a.run})
		return err
	})
	a.host.mu.Lock()
	delete(a.host.running, a.run)
	a.host.mu.Unlock()
	return err
}

// cutting is one stream of a cut's orders and events. A cut has several of them, one
// after the other, if the connection is lost on the way.
type cutting struct {
	id     string
	orders chan *violinv1.CutRequest
	ctx    context.Context
	cancel context.CancelFunc
}

// Handle takes an order without waiting. A stream that breaks is a failure of the cut;
// the coordinator's next order, which it repeats, is taken to the agent by a new one.
func (a *Agent) Handle(o agent.Order, report func(cut.Event)) {
	id := cutOf(o.Effect)
	failed := func(err error) {
		go report(cut.Failed{Cut: id, Host: a.host.name, Reason: err.Error()})
	}
	m, err := encodeOrder(o)
	if err != nil {
		failed(err)
		return
	}
	m.Run = a.run
	a.mu.Lock()
	defer a.mu.Unlock()
	if p := m.GetPrepare(); p != nil {
		s, ok := o.Session.(agent.StoreSession)
		if !ok {
			failed(fmt.Errorf("host %s: a session of %T cannot be written to from another machine", a.host.name, o.Session))
			return
		}
		a.host.ingest.close(a.session)
		p.Session = a.run + "/" + id
		a.session = p.Session
		a.host.ingest.open(a.session, s.Session)
	}
	if a.cut == nil || a.cut.id != id || a.cut.ctx.Err() != nil {
		if a.cut != nil {
			a.cut.cancel()
		}
		c := &cutting{id: id, orders: make(chan *violinv1.CutRequest, ordersWaiting)}
		c.ctx, c.cancel = context.WithCancel(context.Background())
		a.cut = c
		go func() {
			defer c.cancel()
			if err := a.carry(c, report); err != nil {
				report(cut.Failed{Cut: id, Host: a.host.name, Reason: err.Error()})
			}
		}()
	}
	select {
	case a.cut.orders <- m:
	default:
		a.cut.cancel()
	}
}

// carry carries orders and events until the cut has ended on the host.
func (a *Agent) carry(c *cutting, report func(cut.Event)) error {
	return a.call(c.ctx, func(ctx context.Context, client violinv1connect.AgentServiceClient) error {
		s, err := client.Cut(ctx)
		if err != nil {
			return err
		}
		go func() {
			for {
				select {
				case m := <-c.orders:
					if s.Send(m) != nil {
						return // and Receive says why
					}
				case <-ctx.Done():
					return
				}
			}
		}()
		for {
			m, err := s.Receive()
			if err != nil {
				return lost(err)
			}
			ev, last, err := decodeEvent(m, a.host.name)
			if err != nil {
				return err
			}
			if m.GetCut() != c.id {
				continue // of one before, come late
			}
			if last {
				a.host.ingest.close(a.run + "/" + c.id)
				c.cancel() // before it is known, so that the next order opens a stream of its own
				report(ev)
				return nil
			}
			report(ev)
		}
	})
}

// lost says in plain words that a stream broke.
func lost(err error) error {
	if errors.Is(err, io.EOF) || connect.CodeOf(err) == connect.CodeUnavailable || connect.CodeOf(err) == connect.CodeUnknown || connect.CodeOf(err) == connect.CodeCanceled {
		return fmt.Errorf("the connection to its agent was lost: %w", err)
	}
	return err
}
