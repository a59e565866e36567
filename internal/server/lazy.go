package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"violin/internal/agent"
	"violin/internal/catalog"
	"violin/internal/hypervisor/qemu"
	stream "violin/internal/migration/qemu"
	"violin/internal/pageserver"
	"violin/internal/remote"
)

// How the nodes of a snapshot get their memory: before they run, or lazily, while they
// run. The order in which a lazy load sends what nobody asks for is learnt: what a node
// asked for at its last restore goes first. It is kept in the state directory, by slice
// and node and not by snapshot, since what a guest needs first changes little between
// them. It is a hint: it may be stale, and it may be removed.

// orderPath is where the order of a node's pages is kept.
func (s *Server) orderPath(slice, node string) string {
	return filepath.Join(s.cfg.StateDir, "touched", slice, node)
}

// order is the order of a node's pages that was learnt; none if there is none that can
// be read.
func (s *Server) order(slice, node string) []pageserver.Run {
	f, err := os.Open(s.orderPath(slice, node))
	if err == nil {
		defer f.Close()
		var order []pageserver.Run
		if order, err = pageserver.ReadOrder(f); err == nil {
			return order
		}
	}
	if !errors.Is(err, fs.ErrNotExist) {
		s.log.Warn("the order of a node's pages is not known", "slice", slice, "node", node, "err", err)
	}
	return nil
}

// learn keeps the order of a node's pages.
func (s *Server) learn(slice, node string, order []pageserver.Run) {
	if err := writeOrder(s.orderPath(slice, node), order); err != nil {
		s.log.Warn("the order of a node's pages is not kept", "slice", slice, "node", node, "err", err)
	}
}

func writeOrder(path string, order []pageserver.Run) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // it has another name by then, if all went well
	if err := errors.Join(pageserver.WriteOrder(f, order), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// loadNode gives a node its state; it does not run yet. With lazily, its memory
// follows while it does, if that can be done here; if not, why says so.
func (s *Server) loadNode(ctx context.Context, sl *slice, snap *catalog.Snapshot, n catalog.Node, lazily bool) (why, err error) {
	a, err := sl.agentOf(n.Name)
	if err != nil {
		return nil, err
	}
	b, err := s.store.GetBlob(ctx, n.Device)
	if err != nil {
		return nil, err
	}
	var skeleton stream.Skeleton
	if err := skeleton.UnmarshalBinary(b); err != nil {
		return nil, err
	}
	if lazily {
		why = s.loadLazily(ctx, sl, a, snap, n, &skeleton)
		if !errors.Is(why, qemu.ErrNoPostcopy) {
			return nil, why
		}
	}
	pages, err := s.store.OpenMemory(ctx, n.Memory)
	if err != nil {
		return nil, err
	}
	defer pages.Close()
	return why, a.LoadNode(ctx, sl.topo.Slice, n.Name, &skeleton, pages)
}

func (s *Server) loadLazily(ctx context.Context, sl *slice, a hostAgent, snap *catalog.Snapshot, n catalog.Node, skeleton *stream.Skeleton) error {
	return a.LoadNodeLazily(ctx, sl.topo.Slice, n.Name, skeleton, s.lazy(sl, snap, n))
}

// lazy is how a node gets its memory of a snapshot while it runs. The snapshot is kept
// until it has.
func (s *Server) lazy(sl *slice, snap *catalog.Snapshot, n catalog.Node) agent.Lazy {
	first := s.order(snap.Slice, n.Name)
	s.following(snap, 1)
	return agent.Lazy{
		Open: func(ctx context.Context) (agent.Memory, error) {
			pages, err := s.store.OpenMemory(ctx, n.Memory)
			if err != nil {
				return nil, err
			}
			pages.Unhurried()
			return pages, nil
		},
		First: first,
		Ended: func(touched []pageserver.Run, err error) {
			s.following(snap, -1)
			switch {
			case err == nil:
				s.learn(snap.Slice, n.Name, pageserver.Learn(touched, first))
				s.log.Info("a node has all its memory", "slice", sl.topo.Slice, "node", n.Name, "snapshot", snap.Ref())
			case errors.Is(err, qemu.ErrClosed), errors.Is(err, qemu.ErrNoPostcopy):
			default:
				s.log.Error("a node was stopped, for it could not be given its memory", "slice", sl.topo.Slice, "node", n.Name, "snapshot", snap.Ref(), "err", err)
			}
		},
	}
}

// headOf is the snapshot that a slice descends from; nil for none.
func (s *Server) headOf(ctx context.Context, sl *slice) (*catalog.Snapshot, error) {
	origin, head := sl.getHead()
	if head == "" {
		return nil, nil
	}
	snap, err := s.catalog.Resolve(ctx, cmp.Or(origin, sl.topo.Slice)+"@"+head)
	if errors.Is(err, catalog.ErrNotFound) { // no memory follows of one that was forgotten
		return nil, nil
	}
	return snap, err
}

// goOnFollowing has the nodes of a slice that was taken over from another server get the
// memory that still follows: until they have it, no snapshot is newer than that which it
// is of.
func (s *Server) goOnFollowing(ctx context.Context, sl *slice) error {
	snap, err := s.headOf(ctx, sl)
	if snap == nil {
		return err
	}
	var errs []error
	for _, n := range snap.Nodes {
		a, err := sl.agentOf(n.Name)
		if err != nil {
			continue // it has another topology by now
		}
		if a, ok := a.(*remote.Agent); ok {
			errs = append(errs, a.GoOnWith(ctx, n.Name, s.lazy(sl, snap, n)))
		}
	}
	return errors.Join(errs...)
}

// following counts the nodes that memory of a snapshot follows to.
func (s *Server) following(snap *catalog.Snapshot, change int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.followed[snap.Ref()] += change; s.followed[snap.Ref()] == 0 {
		delete(s.followed, snap.Ref())
	}
}

// awaitMemory returns once all nodes of a slice have their memory: until then they
// cannot be captured.
func (sl *slice) awaitMemory(ctx context.Context, tell teller) error {
	for i := range sl.topo.Nodes {
		n := &sl.topo.Nodes[i]
		err := sl.agents[n.Host].AwaitMemory(ctx, sl.topo.Slice, n.Name, func() {
			tell("wait", n.Name, "its memory still follows since the restore")
		})
		if err != nil {
			return fmt.Errorf("slice %q cannot be cut: %w", sl.topo.Slice, err)
		}
	}
	return nil
}

// follow lets memory follow to nodes that do not run.
func (sl *slice) follow() error {
	var errs []error
	for i := range sl.topo.Nodes {
		n := &sl.topo.Nodes[i]
		errs = append(errs, sl.agents[n.Host].FollowNode(sl.topo.Slice, n.Name))
	}
	return errors.Join(errs...)
}

// reasons gathers why nodes could not be loaded lazily: each reason once.
type reasons []string

func (r *reasons) add(why error) {
	if text := "nodes had all their memory before they ran: " + why.Error(); !slices.Contains(*r, text) {
		*r = append(*r, text)
	}
}
