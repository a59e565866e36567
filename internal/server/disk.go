package server

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	violinv1 "violin/api/violin/v1"
	"violin/internal/agent"
	"violin/internal/catalog"
	"violin/internal/hypervisor/qemu"
	"violin/internal/image"
	"violin/internal/store"
	"violin/internal/topology"
)

// disksOf are a node's disks, that of its image first, if that is one. What could not be
// put back by a restore is refused.
func (s *Server) disksOf(n *topology.Node, root *image.Info) ([]qemu.Disk, error) {
	var disks []qemu.Disk
	if root != nil {
		disks = append(disks, qemu.Disk{
			Name: topology.RootDisk, Size: root.Disk.Size, Base: filepath.Join(s.images(), n.Image, image.DiskFile), BaseFormat: root.Disk.Format,
		})
	}
	for i, d := range n.Disks {
		if root != nil && d.Name == topology.RootDisk {
			if d.Base != "" {
				return nil, wrong(n, fmt.Sprintf("disks[%d].base", i), "disk %q is that of image %q: leave the base out, or name the disk otherwise", d.Name, n.Image)
			}
			if d.Size < disks[0].Size {
				return nil, wrong(n, fmt.Sprintf("disks[%d].size", i), "disk %q: image %q has a disk of %d bytes, more than the %d here; give a larger size", d.Name, n.Image, disks[0].Size, d.Size)
			}
			disks[0].Size = d.Size
			continue
		}
		disk := qemu.Disk{Name: d.Name, Size: d.Size, Base: d.Base}
		if d.Base != "" {
			size, format, err := image.InspectDisk(d.Base)
			if err != nil {
				return nil, wrong(n, fmt.Sprintf("disks[%d].base", i), "disk %q: base %s: %w", d.Name, d.Base, err)
			}
			if disk.BaseFormat = format; disk.Size == 0 {
				disk.Size = size
			}
			if disk.Size < size {
				return nil, wrong(n, fmt.Sprintf("disks[%d].size", i), "disk %q: its base %s has %d bytes, more than the disk's %d; give a larger size, or none", d.Name, d.Base, size, disk.Size)
			}
		}
		disks = append(disks, disk)
	}
	return disks, nil
}

// disksTold are the disks of nodes whose VMs are given, by node, as far as they are known
// before a snapshot.
func disksTold(machines map[string]qemu.Spec, g given) map[string][]catalog.Disk {
	all := map[string][]catalog.Disk{}
	for node, spec := range machines {
		for _, d := range spec.Disks {
			told := catalog.Disk{Name: d.Name, Size: int64(d.Size)}
			for _, o := range g[node] {
				if o.Name == d.Name {
					told.Use = o.Use
				}
			}
			all[node] = append(all[node], told)
		}
	}
	return all
}

// useOf is whose a disk of a node is, as in [catalog.Disk].
func (sl *slice) useOf(node, disk string) string {
	for _, d := range sl.disks[node] {
		if d.Name == disk {
			return d.Use
		}
	}
	return ""
}

// diskUses are the uses of disks as the API tells them.
var diskUses = map[string]violinv1.DiskUse{catalog.Seed: violinv1.DiskUse_DISK_USE_SEED, catalog.Share: violinv1.DiskUse_DISK_USE_SHARE}

// restoreDisks has a node's disks begin as a snapshot has them.
func (s *Server) restoreDisks(ctx context.Context, spec *agent.NodeSpec, snap *catalog.Snapshot) error {
	i := snap.Node(spec.Name)
	if i == nil {
		return fmt.Errorf("node %q is not in snapshot %s", spec.Name, snap.Ref())
	}
	if len(i.Disks) != len(spec.Machine.Disks) {
		return fmt.Errorf("node %q has %d disks, and %d in snapshot %s", spec.Name, len(spec.Machine.Disks), len(i.Disks), snap.Ref())
	}
	spec.Disks = map[string]store.BlobRef{}
	for k := range spec.Machine.Disks {
		d := &spec.Machine.Disks[k]
		saved := i.Disk(d.Name)
		if saved == nil || saved.Size != int64(d.Size) {
			return fmt.Errorf("node %q: disk %q of %d bytes is not in snapshot %s", spec.Name, d.Name, d.Size, snap.Ref())
		}
		s.fromStore(ctx, spec, d, saved.Blocks)
	}
	return nil
}

// fromStore has a disk of a node begin as what is in the store.
func (s *Server) fromStore(ctx context.Context, spec *agent.NodeSpec, d *qemu.Disk, blocks store.BlobRef) {
	spec.Disks[d.Name] = blocks
	d.Restore = func(page func(uint64, []byte) error) error {
		r, err := s.store.OpenDisk(ctx, d.Size, blocks)
		if err != nil {
			return err
		}
		return errors.Join(r.Pages(page), r.Close())
	}
}
