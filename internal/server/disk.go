package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"violin/internal/agent"
	"violin/internal/catalog"
	"violin/internal/hypervisor/qemu"
	"violin/internal/qcow2"
	"violin/internal/store"
	"violin/internal/topology"
)

// disksOf are a node's disks. What could not be put back by a restore is refused.
func disksOf(n *topology.Node) ([]qemu.Disk, error) {
	var disks []qemu.Disk
	for i, d := range n.Disks {
		disk := qemu.Disk{Name: d.Name, Size: d.Size, Base: d.Base}
		if d.Base != "" {
			size, format, err := inspectBase(d.Base)
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

// foreign are the beginnings of images in formats that must not be taken for raw ones.
var foreign = map[string]string{"KDMV": "VMDK", "COWD": "VMDK", "QED\x00": "QED", "vhdxfile": "VHDX", "conectix": "VHD", "<<< ": "VDI"}

// inspectBase tells the size, in bytes, of the disk in an image, and the image's
// format. The image must be whole in its one file, which its hash is of.
func inspectBase(path string) (size uint64, format string, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, "", err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return 0, "", err
	}
	if !info.Mode().IsRegular() {
		return 0, "", errors.New("it is no regular file: a device's content can't be part of a snapshot; copy it into an image, with qemu-img convert")
	}
	h, err := qcow2.ReadHeader(f)
	switch {
	case errors.Is(err, qcow2.ErrFormat):
		begin := make([]byte, 8)
		if _, err := f.ReadAt(begin, 0); err != nil && err != io.EOF {
			return 0, "", err
		}
		for magic, name := range foreign {
			if bytes.HasPrefix(begin, []byte(magic)) {
				return 0, "", fmt.Errorf("it is a %s image; make a qcow2 one of it, with qemu-img convert -O qcow2", name)
			}
		}
		if n := info.Size(); n == 0 || n%512 != 0 {
			return 0, "", fmt.Errorf("it has %d bytes: neither a qcow2 image nor a raw one, which has whole sectors of 512 bytes", n)
		}
		return uint64(info.Size()), "raw", nil
	case err != nil:
		return 0, "", err
	case h.Backing:
		return 0, "", errors.New("it refers to another image below it, which a snapshot would not know; make one file of them, with qemu-img convert -O qcow2")
	case h.DataFile:
		return 0, "", errors.New("its data is in another file, which a snapshot would not know; make one file of them, with qemu-img convert -O qcow2")
	case h.Crypt:
		return 0, "", errors.New("it is encrypted; use one that is not")
	case h.Size == 0 || h.Size%512 != 0:
		return 0, "", fmt.Errorf("its disk has %d bytes, want sectors of 512", h.Size)
	}
	return h.Size, "qcow2", nil
}

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
		spec.Disks[d.Name] = saved.Blocks
		d.Restore = func(page func(uint64, []byte) error) error {
			r, err := s.store.OpenDisk(ctx, d.Size, saved.Blocks)
			if err != nil {
				return err
			}
			return errors.Join(r.Pages(page), r.Close())
		}
	}
	return nil
}
