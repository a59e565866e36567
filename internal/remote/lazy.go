package remote

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
	"violin/internal/agent"
	"violin/internal/hypervisor/qemu"
	stream "violin/internal/migration/qemu"
	"violin/internal/pageserver"
	"violin/internal/store"
)

// readers is how many pages of one question are read at a time: the store may be far away.
const readers = 8

// given is a node's memory as the server gives it.
type given struct {
	memory  agent.Memory
	reading sync.WaitGroup

	done chan struct{} // closed when the node has it, or never will
	err  error         // valid then
}

func encodeRuns(runs []pageserver.Run) (all []*violinv1.PageRun) {
	for _, r := range runs {
		all = append(all, &violinv1.PageRun{Block: r.Block, Page: r.Page, Pages: r.Pages})
	}
	return all
}

func decodeRuns(runs []*violinv1.PageRun) (all []pageserver.Run) {
	for _, r := range runs {
		all = append(all, pageserver.Run{Block: r.GetBlock(), Page: r.GetPage(), Pages: r.GetPages()})
	}
	return all
}

// provide calls the agent, as [Agent.call] does.
func (a *Agent) provide(ctx context.Context, f func(context.Context, violinv1connect.ProvisionServiceClient) error) error {
	_, client, err := a.host.provision()
	if err != nil {
		return err
	}
	return a.answered(ctx, f(ctx, client))
}

// LoadNodeLazily gives an incoming node its devices; its memory follows, as its host asks
// for it.
func (a *Agent) LoadNodeLazily(ctx context.Context, _, name string, skeleton *stream.Skeleton, lazy agent.Lazy) error {
	b, err := skeleton.MarshalBinary()
	if err != nil {
		lazy.Ended(nil, err)
		return err
	}
	g, err := a.offerMemory(name, lazy)
	if err != nil {
		return err
	}
	err = a.provide(ctx, func(ctx context.Context, c violinv1connect.ProvisionServiceClient) error {
		r, err := c.LoadLazily(ctx, &violinv1.LoadLazilyRequest{Run: a.run, Node: name, Skeleton: b, First: encodeRuns(lazy.First)})
		if err == nil && r.GetImpossible() != "" {
			return fmt.Errorf("%w: %s", qemu.ErrNoPostcopy, r.GetImpossible())
		}
		return err
	})
	if err != nil {
		a.endMemory(name, g, lazy, nil, err)
		return err
	}
	go a.followMemory(name, g, lazy)
	return nil
}

// GoOnWith has the host of a run that goes on be given the memory that still follows to a
// node, if any does: the server before has begun with it.
func (a *Agent) GoOnWith(ctx context.Context, name string, lazy agent.Lazy) error {
	follows := false
	err := a.provide(ctx, func(ctx context.Context, c violinv1connect.ProvisionServiceClient) error {
		r, err := c.AwaitMemory(ctx, &violinv1.AwaitMemoryRequest{Run: a.run, Node: name, Look: true})
		follows = r.GetFollows()
		return err
	})
	if err != nil || !follows {
		lazy.Ended(nil, errors.Join(err, qemu.ErrClosed))
		return err
	}
	g, err := a.offerMemory(name, lazy)
	if err != nil {
		return err
	}
	go a.followMemory(name, g, lazy)
	return nil
}

// offerMemory lets the host ask for a node's memory.
func (a *Agent) offerMemory(name string, lazy agent.Lazy) (*given, error) {
	memory, err := lazy.Open(a.life)
	if err != nil {
		lazy.Ended(nil, err)
		return nil, fmt.Errorf("node %q: %w", name, err)
	}
	g := &given{memory: memory, done: make(chan struct{})}
	a.host.supply.change(a.run, func(o *offer) { o.memory[name] = g })
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.following == nil {
		a.following = map[string]*given{}
	}
	a.following[name] = g
	return g, nil
}

// followMemory waits until a node has its memory, over as many connections as that takes.
func (a *Agent) followMemory(name string, g *given, lazy agent.Lazy) {
	for {
		var r *violinv1.AwaitMemoryResponse
		err := a.provide(a.life, func(ctx context.Context, c violinv1connect.ProvisionServiceClient) (err error) {
			r, err = c.AwaitMemory(ctx, &violinv1.AwaitMemoryRequest{Run: a.run, Node: name})
			if connect.CodeOf(err) == connect.CodeFailedPrecondition {
				r, err = &violinv1.AwaitMemoryResponse{Failed: connectMessage(err)}, nil // the run is gone there
			}
			return err
		})
		switch {
		case a.life.Err() != nil:
			a.endMemory(name, g, lazy, nil, qemu.ErrClosed)
			return
		case err != nil:
			if !a.host.back(a.life, a.tooLong) {
				continue // whether it counts as lost, others decide
			}
		case r.GetClosed():
			a.endMemory(name, g, lazy, decodeRuns(r.GetTouched()), qemu.ErrClosed)
			return
		case r.GetFailed() != "":
			a.endMemory(name, g, lazy, decodeRuns(r.GetTouched()), errors.New(r.GetFailed()))
			return
		default:
			a.endMemory(name, g, lazy, decodeRuns(r.GetTouched()), nil)
			return
		}
	}
}

func connectMessage(err error) string {
	var c *connect.Error
	if errors.As(err, &c) {
		return c.Message()
	}
	return err.Error()
}

// endMemory says what has become of memory that followed.
func (a *Agent) endMemory(name string, g *given, lazy agent.Lazy, touched []pageserver.Run, err error) {
	a.host.supply.change(a.run, func(o *offer) {
		if o.memory[name] == g {
			delete(o.memory, name)
		}
	})
	g.reading.Wait() // whoever looked it up before
	if cerr := g.memory.Close(); err == nil {
		err = cerr
	}
	a.mu.Lock()
	if errors.Is(err, qemu.ErrNoPostcopy) {
		delete(a.following, name)
	}
	a.mu.Unlock()
	g.err = err
	lazy.Ended(touched, err)
	close(g.done)
}

// FollowNode lets memory follow that a node has not asked for. RunNode does as well.
func (a *Agent) FollowNode(_, name string) error {
	ctx, cancel := context.WithTimeout(context.Background(), askBound)
	defer cancel()
	return a.provide(ctx, func(ctx context.Context, c violinv1connect.ProvisionServiceClient) error {
		_, err := c.FollowNode(ctx, &violinv1.FollowNodeRequest{Run: a.run, Node: name})
		return err
	})
}

// AwaitMemory returns once a node has all its memory. It calls waiting if that is not so
// at once.
func (a *Agent) AwaitMemory(ctx context.Context, _, name string, waiting func()) error {
	a.mu.Lock()
	g := a.following[name]
	a.mu.Unlock()
	if g == nil {
		return nil
	}
	select {
	case <-g.done:
	default:
		waiting()
	}
	select {
	case <-g.done:
	case <-ctx.Done():
		return fmt.Errorf("node %q: wait for its memory: %w", name, ctx.Err())
	}
	if g.err != nil {
		return fmt.Errorf("node %q: %w", name, g.err)
	}
	return nil
}

// ReadPages implements the agents' protocol.
func (s *supply) ReadPages(ctx context.Context, req *violinv1.ReadPagesRequest) (*violinv1.ReadPagesResponse, error) {
	var g *given
	if err := s.of(req.GetRun(), func(o *offer) bool {
		if g = o.memory[req.GetNode()]; g != nil {
			g.reading.Add(1)
		}
		return g != nil
	}, fmt.Sprintf("memory of node %q", req.GetNode())); err != nil {
		return nil, err
	}
	defer g.reading.Done()
	type place struct {
		block  int
		offset uint64
	}
	var places []place
	for _, r := range req.GetRanges() {
		if r.GetPages() > batchPages || len(places)+int(r.GetPages()) > batchPages || r.GetPage() > 1<<50 {
			return nil, refuse("more than %d pages at once", batchPages)
		}
		for i := range r.GetPages() {
			places = append(places, place{int(r.GetBlock()), (r.GetPage() + i) * store.PageSize})
		}
	}
	pages := make([][]byte, len(places))
	work, wctx := errgroup.WithContext(ctx)
	work.SetLimit(readers)
	for i, p := range places {
		work.Go(func() error {
			if wctx.Err() != nil {
				return wctx.Err()
			}
			buf := make([]byte, store.PageSize)
			zero, err := g.memory.At(p.block, p.offset, buf)
			if err == nil && !zero {
				pages[i] = buf
			}
			return err
		})
	}
	switch err := work.Wait(); {
	case errors.Is(err, context.Canceled): // the server or the connection ends, and another may follow
		return nil, connect.NewError(connect.CodeUnavailable, err)
	case err != nil:
		return nil, connect.NewError(connect.CodeDataLoss, err)
	}
	var content encodePages
	for _, p := range pages {
		content.add(p)
	}
	return &violinv1.ReadPagesResponse{Content: content.message()}, nil
}

// follower is memory that follows to a node of a host, of which the server is to be told.
type follower struct {
	done    chan struct{} // closed when it has ended
	touched []pageserver.Run
	err     error
}

// lazy is how a node of a host gets its memory from the server.
func (h *Host) lazy(r *hostRun, node string, blocks []stream.RAMBlock, first []pageserver.Run) agent.Lazy {
	f := &follower{done: make(chan struct{})}
	h.mu.Lock()
	r.followers[node] = f
	h.mu.Unlock()
	return agent.Lazy{
		Open: func(ctx context.Context) (agent.Memory, error) {
			return newMemory(ctx, blocks, first, func(ctx context.Context, ranges []*violinv1.PageRange) ([][]byte, error) {
				return h.readPages(ctx, r.id, node, ranges)
			}), nil
		},
		First: first, Cluster: cluster,
		Ended: func(touched []pageserver.Run, err error) {
			f.touched, f.err = touched, err
			close(f.done)
		},
	}
}

// LoadLazily implements the agents' protocol.
func (h *Host) LoadLazily(ctx context.Context, req *violinv1.LoadLazilyRequest) (*violinv1.LoadLazilyResponse, error) {
	r, err := h.running(req.GetRun())
	if err != nil {
		return nil, err
	}
	var skeleton stream.Skeleton
	if err := skeleton.UnmarshalBinary(req.GetSkeleton()); err != nil {
		return nil, refuse("node %q: %w", req.GetNode(), err)
	}
	err = r.agent.LoadNodeLazily(ctx, r.slice, req.GetNode(), &skeleton, h.lazy(r, req.GetNode(), skeleton.Blocks, decodeRuns(req.GetFirst())))
	if errors.Is(err, qemu.ErrNoPostcopy) {
		h.mu.Lock()
		delete(r.followers, req.GetNode())
		h.mu.Unlock()
		return &violinv1.LoadLazilyResponse{Impossible: err.Error()}, nil
	}
	return &violinv1.LoadLazilyResponse{}, err
}

// FollowNode implements the agents' protocol.
func (h *Host) FollowNode(_ context.Context, req *violinv1.FollowNodeRequest) (*violinv1.FollowNodeResponse, error) {
	r, err := h.running(req.GetRun())
	if err != nil {
		return nil, err
	}
	return &violinv1.FollowNodeResponse{}, r.agent.FollowNode(r.slice, req.GetNode())
}

// AwaitMemory implements the agents' protocol.
func (h *Host) AwaitMemory(ctx context.Context, req *violinv1.AwaitMemoryRequest) (*violinv1.AwaitMemoryResponse, error) {
	r, err := h.running(req.GetRun())
	if err != nil {
		return nil, err
	}
	h.mu.Lock()
	f := r.followers[req.GetNode()]
	h.mu.Unlock()
	if f == nil {
		return &violinv1.AwaitMemoryResponse{}, nil
	}
	if req.GetLook() {
		select {
		case <-f.done:
		default:
			return &violinv1.AwaitMemoryResponse{Follows: true}, nil
		}
	}
	select {
	case <-f.done:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	m := &violinv1.AwaitMemoryResponse{Touched: encodeRuns(f.touched), Closed: errors.Is(f.err, qemu.ErrClosed)}
	if f.err != nil {
		m.Failed = f.err.Error()
	}
	return m, nil
}
