package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"connectrpc.com/connect"

	"violin/internal/agent"
	"violin/internal/catalog"
	"violin/internal/cloudinit"
	"violin/internal/hypervisor/qemu"
	"violin/internal/image"
	"violin/internal/share"
	"violin/internal/store"
	"violin/internal/topology"
)

// given are the disks that nodes are given to read, by node: in the store, so that they
// reach a host, and a snapshot, as other disks do.
type given map[string][]catalog.Disk

// seeded tells whether a node that boots for the first time is given a seed: unless its
// topology says, if it boots a disk on which nothing of ours looks for what it is.
func seeded(n *topology.Node, root *image.Info) bool {
	switch {
	case n.CloudInit != nil:
		return !n.CloudInit.Off
	case n.Kernel != "" || slices.ContainsFunc(n.Disks, func(d topology.Disk) bool { return d.Name == topology.SeedDisk }):
		return false
	case n.Image == "":
		return true
	}
	return root != nil && !root.Disk.Guest
}

// give makes what the nodes of a new slice are given to read.
func (s *Server) give(ctx context.Context, topo *topology.Topology, tell teller) (_ given, err error) {
	g := given{}
	if none, err := s.givesNone(topo); none || err != nil {
		return g, err
	}
	session, err := s.store.Begin(ctx)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, session.Abort(context.WithoutCancel(ctx)))
		}
	}()
	shared := map[string]catalog.Disk{} // by directory
	for i := range topo.Nodes {
		n := &topo.Nodes[i]
		for k, sh := range n.Shares {
			d, ok := shared[sh.Directory]
			if !ok {
				tell("share", n.Name, sh.Directory)
				if d, err = s.share(ctx, session, sh.Directory); err != nil {
					return nil, refused(ctx, wrong(n, fmt.Sprintf("shares[%d].directory", k), "share %q: %w", sh.Name, err))
				}
				shared[sh.Directory] = d
			}
			d.Name = sh.Name
			g[n.Name] = append(g[n.Name], d)
		}
		d, err := s.seed(ctx, session, topo, n)
		if err != nil {
			return nil, refused(ctx, err)
		}
		if d != nil {
			g[n.Name] = append(g[n.Name], *d)
		}
	}
	return g, session.Commit(ctx, nil)
}

// givesNone tells whether none of the nodes of a new slice is given anything to read.
func (s *Server) givesNone(topo *topology.Topology) (bool, error) {
	for i := range topo.Nodes {
		n := &topo.Nodes[i]
		root, err := s.rootOf(n)
		if err != nil {
			return false, connect.NewError(connect.CodeFailedPrecondition, err)
		}
		if len(n.Shares) > 0 || seeded(n, root) {
			return false, nil
		}
	}
	return true, nil
}

// refused is an error about what a topology asks for, unless it is the caller who ended it.
func refused(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return connect.NewError(connect.CodeFailedPrecondition, err)
}

// seed is what cloud-init of a node reads; nil if it is not given any.
func (s *Server) seed(ctx context.Context, session *store.Session, topo *topology.Topology, n *topology.Node) (*catalog.Disk, error) {
	root, err := s.rootOf(n)
	if err != nil || !seeded(n, root) {
		return nil, err
	}
	var userData []byte
	if n.CloudInit != nil && n.CloudInit.UserDataFile != "" {
		if userData, err = readUserData(n.CloudInit.UserDataFile); err != nil {
			return nil, wrong(n, "cloud_init.user_data_file", "%w", err)
		}
	}
	volume, err := cloudinit.Seed(topo, n, userData)
	if err != nil {
		return nil, err
	}
	d := &catalog.Disk{Name: topology.SeedDisk, Size: int64(len(volume)), Use: catalog.Seed}
	d.Blocks, err = fill(ctx, session, d.Size, func(offset int64, page []byte) error { copy(page, volume[offset:]); return nil })
	return d, err
}

// readUserData reads a file that cloud-init is to be told.
func readUserData(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err == nil && !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no regular file", path)
	}
	b, err := io.ReadAll(io.LimitReader(f, topology.MaxUserData+1))
	if err != nil {
		return nil, err
	}
	if err := topology.CheckUserData(string(b)); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return b, nil
}

// share puts a directory into the store. The file system of it that is made meanwhile has
// no name, so that nothing is left of it.
func (s *Server) share(ctx context.Context, session *store.Session, dir string) (d catalog.Disk, err error) {
	if err := share.Check(ctx, dir, share.DefaultLimits); err != nil {
		return d, err
	}
	f, err := os.CreateTemp(s.cfg.StateDir, "share-")
	if err != nil {
		return d, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := os.Remove(f.Name()); err != nil {
		return d, err
	}
	if err := share.Make(ctx, dir, f); err != nil {
		return d, err
	}
	st, err := f.Stat()
	if err != nil {
		return d, err
	}
	d = catalog.Disk{Size: st.Size(), Use: catalog.Share}
	d.Blocks, err = fill(ctx, session, d.Size, func(offset int64, page []byte) error {
		n, err := f.ReadAt(page, offset)
		if clear(page[n:]); errors.Is(err, io.EOF) {
			err = nil
		}
		return err
	})
	return d, err
}

// fill puts a disk into the store whose pages read reads.
func fill(ctx context.Context, session *store.Session, size int64, read func(offset int64, page []byte) error) (store.BlobRef, error) {
	w, err := session.NewDiskWriter(ctx, uint64(size), store.BlobRef{})
	if err != nil {
		return store.BlobRef{}, err
	}
	page := make([]byte, store.PageSize)
	for offset := int64(0); offset < size; offset += store.PageSize {
		clear(page)
		if err := read(offset, page); err != nil {
			return store.BlobRef{}, err
		}
		if err := w.Page(uint64(offset), page); err != nil {
			return store.BlobRef{}, err
		}
	}
	return w.Close()
}

// givenIn is what the nodes of a snapshot were given.
func givenIn(snap *catalog.Snapshot) given {
	g := given{}
	for _, n := range snap.Nodes {
		for _, d := range n.Disks {
			if d.Use != "" {
				g[n.Name] = append(g[n.Name], d)
			}
		}
	}
	return g
}

// add adds what a node is given to its VM.
func (g given) add(machines map[string]qemu.Spec) {
	for node, disks := range g {
		m := machines[node]
		for _, d := range disks {
			m.Disks = append(m.Disks, qemu.Disk{Name: d.Name, Size: uint64(d.Size), ReadOnly: true})
		}
		machines[node] = m
	}
}

// fillGiven has what a new node is given to read come out of the store.
func (s *Server) fillGiven(ctx context.Context, spec *agent.NodeSpec, disks []catalog.Disk) {
	spec.Disks = map[string]store.BlobRef{}
	for _, d := range disks {
		i := slices.IndexFunc(spec.Machine.Disks, func(m qemu.Disk) bool { return m.Name == d.Name })
		s.fromStore(ctx, spec, &spec.Machine.Disks[i], d.Blocks)
	}
}
