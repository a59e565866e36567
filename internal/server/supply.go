package server

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"

	"golang.org/x/sync/errgroup"

	"violin/internal/catalog"
	"violin/internal/hypervisor/qemu"
	"violin/internal/remote"
)

// supply has the hosts of a slice fetch what they lack of the files that their nodes boot
// from.
func (s *Server) supply(ctx context.Context, sl *slice, machines map[string]qemu.Spec, boot map[string][]catalog.BootFile, tell teller) error {
	files := map[string][]remote.File{} // by host
	for i := range sl.topo.Nodes {
		n := &sl.topo.Nodes[i]
		paths := bootPaths(machines[n.Name])
		for _, f := range boot[n.Name] {
			file := remote.File{Path: paths[f.Kind], Hash: f.Hash, Size: f.Size}
			if !slices.ContainsFunc(files[n.Host], func(o remote.File) bool { return o.Hash == file.Hash }) {
				files[n.Host] = append(files[n.Host], file)
			}
		}
	}
	g, gctx := errgroup.WithContext(ctx)
	for host, wanted := range files {
		a, ok := sl.agents[host].(*remote.Agent)
		if !ok {
			continue
		}
		g.Go(func() error {
			return a.Fetch(gctx, wanted, func(f remote.File, done int64) {
				name := f.Path
				if in, err := filepath.Rel(s.images(), f.Path); err == nil && filepath.IsLocal(in) {
					name = "image " + in
				}
				tell("fetch", "", fmt.Sprintf("host %s has %.1f of %.1f MiB of %s", host, float64(done)/(1<<20), float64(f.Size)/(1<<20), name))
			})
		})
	}
	return g.Wait()
}
