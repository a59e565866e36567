package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"violin/internal/coloring"
	"violin/internal/hypervisor/qemu"
	stream "violin/internal/migration/qemu"
	"violin/internal/pageserver"
	"violin/internal/priority"
)

// Memory is a node's memory, to be read in any order.
type Memory interface {
	pageserver.Source
	io.Closer
}

// Lazy is how a node gets its memory while it runs.
type Lazy struct {
	// Open opens it. The context ends when the node does.
	Open func(context.Context) (Memory, error)
	// First are the pages to be sent first of those that the node does not ask for.
	First []pageserver.Run
	// Cluster is as in [pageserver.Config].
	Cluster int
	// Ended is called once, whatever happens: when the node has all its memory, or never will: err then
	// says why. touched are the pages that it asked for.
	Ended func(touched []pageserver.Run, err error)
}

// following is memory on its way to a node.
type following struct {
	server *pageserver.Server
	done   chan struct{}
	err    error // valid once done is closed
}

// LoadNodeLazily gives an incoming node its devices; its memory follows while it runs.
// The vCPUs do not run yet. Where that cannot be done the error is
// [violin/internal/hypervisor/qemu.ErrNoPostcopy], and [Agent.LoadNode] can.
func (a *Agent) LoadNodeLazily(ctx context.Context, slice, name string, skeleton *stream.Skeleton, lazy Lazy) error {
	n, err := a.node(slice, name)
	if err != nil {
		lazy.Ended(nil, err)
		return err
	}
	reading, cancel := context.WithCancel(context.WithoutCancel(ctx)) // it goes on after this call
	memory, err := lazy.Open(reading)
	if err != nil {
		cancel()
		lazy.Ended(nil, err)
		return fmt.Errorf("node %q: %w", name, err)
	}
	f := &following{done: make(chan struct{})}
	f.server = pageserver.New(pageserver.Config{
		Skeleton: skeleton, Source: memory, First: lazy.First, Cluster: lazy.Cluster,
		StartWorker: func() { priority.Background(a.log) },
	})
	if err := a.noteFollows(n, skeleton, true); err != nil {
		cancel()
		err = errors.Join(err, memory.Close())
		lazy.Ended(nil, err)
		return err
	}
	err = n.vm.LoadLazily(ctx, f.server.Serve, a.follows(n, f, memory, lazy, cancel))
	if errors.Is(err, qemu.ErrNoPostcopy) {
		n.mu.Lock()
		n.following = nil
		n.mu.Unlock()
	}
	if err != nil {
		return fmt.Errorf("node %q: %w", name, err)
	}
	return nil
}

// follows says of a node that memory follows to it, and returns what is to be called when
// that has ended.
func (a *Agent) follows(n *node, f *following, memory Memory, lazy Lazy, cancel func()) (ended func(error)) {
	n.mu.Lock()
	n.following = f
	n.mu.Unlock()
	go func() {
		select {
		case <-n.vm.Done():
		case <-f.done:
		}
		cancel()
	}()
	return func(err error) {
		if cerr := memory.Close(); err == nil {
			err = cerr
		}
		if err == nil || errors.Is(err, qemu.ErrNoPostcopy) {
			err = errors.Join(err, a.noteFollows(n, nil, false))
		}
		f.err = err
		lazy.Ended(f.server.Touched(), err)
		close(f.done)
	}
}

// errUnfollowed is of a VM that waits for pages which nobody sends it any more.
var errUnfollowed = errors.New("its memory still followed since a restore when its agent ended, and could not follow on; restore the slice again")

// FollowOn goes on with the memory of nodes that it followed to from an agent before this
// one, as far as their hypervisors let it: a node that is in the middle of waiting for a
// page may not answer. Those are ended, and say why. lazy says where memory comes from.
func (a *Agent) FollowOn(ctx context.Context, lazy func(slice, node string, blocks []stream.RAMBlock) Lazy) {
	var all sync.WaitGroup
	for _, n := range a.unfollowed {
		all.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, followedBound)
			defer cancel()
			if err := a.followOn(ctx, n, lazy); err != nil {
				a.log.Warn("a node is lost", "node", n.spec.Name, "err", err)
				n.vm.End(fmt.Errorf("%w: %w", errUnfollowed, err))
			}
		})
	}
	all.Wait()
	a.unfollowed = nil
}

func (a *Agent) followOn(ctx context.Context, n *node, lazy func(slice, node string, blocks []stream.RAMBlock) Lazy) error {
	b, err := os.ReadFile(a.skeletonOf(n))
	if err != nil {
		return err
	}
	var skeleton stream.Skeleton
	if err := skeleton.UnmarshalBinary(b); err != nil {
		return err
	}
	l := lazy(n.spec.Slice, n.spec.Name, skeleton.Blocks)
	reading, cancel := context.WithCancel(context.WithoutCancel(ctx))
	memory, err := l.Open(reading)
	if err != nil {
		cancel()
		l.Ended(nil, err)
		return err
	}
	f := &following{done: make(chan struct{})}
	f.server = pageserver.New(pageserver.Config{
		Skeleton: &skeleton, Source: memory, Cluster: l.Cluster, StartWorker: func() { priority.Background(a.log) },
	})
	f.server.Follow()
	return n.vm.GoOnLazily(ctx, f.server.Resume, a.follows(n, f, memory, l, cancel))
}

// skeletonOf is the file of what an agent that takes over needs of a node's state.
func (a *Agent) skeletonOf(n *node) string { return filepath.Join(a.dirOf(n.spec), "skeleton") }

// noteFollows writes down whether memory follows to a node.
func (a *Agent) noteFollows(n *node, skeleton *stream.Skeleton, follows bool) error {
	if skeleton != nil && a.cfg.Keeper != nil {
		b, err := skeleton.MarshalBinary()
		if err == nil {
			err = os.WriteFile(a.skeletonOf(n), b, 0o600)
		}
		if err != nil {
			return fmt.Errorf("node %q: %w", n.spec.Name, err)
		}
	}
	return a.book.write(func(p *page) {
		p.node(coloring.NodeKey{Slice: n.spec.Slice, Node: n.spec.Name}).Follows = follows
	})
}

// FollowNode lets the memory that a node has not asked for be sent to it. RunNode
// does as well.
func (a *Agent) FollowNode(slice, name string) error {
	n, err := a.node(slice, name)
	if err != nil {
		return err
	}
	n.follow()
	return nil
}

func (n *node) follow() {
	if f := n.followed(); f != nil {
		f.server.Follow()
	}
}

func (n *node) followed() *following {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.following
}

// AwaitMemory returns once a node has all its memory. It calls waiting if that is not
// so at once.
func (a *Agent) AwaitMemory(ctx context.Context, slice, name string, waiting func()) error {
	n, err := a.node(slice, name)
	if err != nil {
		return err
	}
	f := n.followed()
	if f == nil {
		return nil
	}
	select {
	case <-f.done:
	default:
		waiting()
	}
	select {
	case <-f.done:
	case <-ctx.Done():
		return fmt.Errorf("node %q: wait for its memory: %w", name, ctx.Err())
	}
	if f.err != nil {
		return fmt.Errorf("node %q: %w", name, f.err)
	}
	return nil
}
