package server

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"violin/internal/agent"
	"violin/internal/catalog"
	"violin/internal/hypervisor/qemu"
	"violin/internal/store"
	"violin/internal/topology"
)

// bootPaths are the files that a VM boots from and that its disks are based on, by kind.
func bootPaths(spec qemu.Spec) map[string]string {
	paths := map[string]string{"kernel": spec.Kernel, "initrd": spec.Initrd, "rootfs": spec.RootFS}
	for _, d := range spec.Disks {
		paths[agent.BaseOf(d.Name)] = d.Base
	}
	return paths
}

// bootFiles says what the nodes boot from whose VMs are given, by node.
func (s *Server) bootFiles(machines map[string]qemu.Spec) (map[string][]catalog.BootFile, error) {
	all := map[string][]catalog.BootFile{}
	for name, spec := range machines {
		paths := bootPaths(spec)
		for _, kind := range slices.Sorted(maps.Keys(paths)) {
			if paths[kind] == "" {
				continue
			}
			h, size, err := s.boot.Of(paths[kind])
			if err != nil {
				return nil, fmt.Errorf("node %q: %w", name, err)
			}
			all[name] = append(all[name], catalog.BootFile{Kind: kind, Size: size, Hash: h})
		}
	}
	return all, nil
}

// checkBoot refuses a restore on other files than the nodes booted from: a guest's
// memory refers to its root file system's blocks.
func (s *Server) checkBoot(topo *topology.Topology, snap *catalog.Snapshot) error {
	var errs []error
	for _, n := range snap.Nodes {
		node := topo.Node(n.Name)
		if node == nil {
			errs = append(errs, fmt.Errorf("node %q is not in the snapshot's topology", n.Name))
			continue
		}
		spec, err := s.machine(topo, node)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		paths := bootPaths(spec)
		for _, f := range n.Boot {
			path := paths[f.Kind]
			if path == "" {
				errs = append(errs, fmt.Errorf("node %q: the snapshot was taken with a %s, and the topology has none", n.Name, f.Kind))
				continue
			}
			h, _, err := s.boot.Of(path)
			switch {
			case err != nil:
				errs = append(errs, fmt.Errorf("node %q: %w", n.Name, err))
			case h != f.Hash:
				errs = append(errs, fmt.Errorf("node %q: %s %s is not the one that the snapshot was taken with: it has hash %.16s, want %.16s and %d bytes; put that file back",
					n.Name, f.Kind, path, store.Hash(h), f.Hash, f.Size))
			}
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("restore snapshot %s: %w", snap.Ref(), err)
	}
	return nil
}
