package server

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"connectrpc.com/connect"

	"violin/internal/hypervisor/qemu"
	"violin/internal/image"
	"violin/internal/topology"
)

// fieldError is what is wrong with a field of a topology.
type fieldError struct {
	field string
	err   error
}

func (e *fieldError) Error() string { return e.err.Error() }
func (e *fieldError) Unwrap() error { return e.err }

// wrong says what is wrong with a field of a node's.
func wrong(n *topology.Node, field, format string, args ...any) error {
	return &fieldError{fmt.Sprintf("nodes.%s.%s", n.Name, field), fmt.Errorf("node %q: "+format, append([]any{n.Name}, args...)...)}
}

// placeError gives an error about a field of a topology the place that it has in its file.
func placeError(file string, src []byte, err error) error {
	var f *fieldError
	if !errors.As(err, &f) {
		return err
	}
	return connect.NewError(connect.CodeOf(err), topology.Place(file, src, f.field, f.err))
}

// machines are the nodes' VMs, by name.
func (s *Server) machines(topo *topology.Topology) (map[string]qemu.Spec, error) {
	machines := map[string]qemu.Spec{}
	for i := range topo.Nodes {
		spec, err := s.machine(topo, &topo.Nodes[i])
		if err != nil {
			return nil, connect.NewError(connect.CodeFailedPrecondition, err)
		}
		machines[topo.Nodes[i].Name] = spec
	}
	return machines, nil
}

// machine is a node's VM. What it boots from must be there before anything starts.
func (s *Server) machine(topo *topology.Topology, n *topology.Node) (qemu.Spec, error) {
	spec := qemu.Spec{
		Name: topo.Slice + "/" + n.Name, Memory: n.Memory, CPUs: n.CPUs,
		Kernel: n.Kernel, Initrd: n.Initrd, RootFS: n.RootFS, Append: n.Append, GuestConfig: topo.GuestConfig(n), Args: n.QEMU,
	}
	if i, err := qemu.CheckArgs(n.QEMU); err != nil {
		return spec, wrong(n, fmt.Sprintf("qemu[%d]", i), "%w", err)
	}
	root, err := s.rootOf(n)
	if err != nil {
		return spec, err
	}
	if n.Image != "" {
		dir := filepath.Join(s.images(), n.Image)
		if root == nil {
			spec.Kernel, spec.Initrd, spec.RootFS = filepath.Join(dir, image.KernelFile), filepath.Join(dir, image.InitrdFile), filepath.Join(dir, image.RootFile)
		}
	}
	for kind, f := range map[string]string{"kernel": n.Kernel, "initrd": n.Initrd, "rootfs": n.RootFS} {
		if f == "" {
			continue
		}
		if _, err := os.Stat(f); err != nil {
			return spec, wrong(n, kind, "%w", err)
		}
	}
	if spec.Disks, err = s.disksOf(n, root); err != nil {
		return spec, err
	}
	if err := firmware(n, root, &spec); err != nil {
		return spec, err
	}
	if _, err := qemu.FindFirmware(spec.Firmware); err != nil {
		return spec, wrong(n, "firmware", "%w", err)
	}
	return spec, nil
}

// rootOf is the image that a node boots from; nil if that is none that is a disk.
func (s *Server) rootOf(n *topology.Node) (*image.Info, error) {
	if n.Image == "" {
		return nil, nil
	}
	info, err := image.Open(s.images(), n.Image)
	if err != nil {
		return nil, wrong(n, "image", "%w", err)
	}
	if info.Disk == nil {
		return nil, nil
	}
	return info, nil
}

// firmware says what boots a node that has no kernel, and from which disks.
func firmware(n *topology.Node, root *image.Info, spec *qemu.Spec) error {
	if spec.Kernel != "" {
		const not = "its image %q has a kernel, which is booted as it is; leave this out, or take an image that is a disk"
		switch {
		case n.Firmware != "":
			return wrong(n, "firmware", not, n.Image)
		case len(n.Boot) > 0:
			return wrong(n, "boot", not, n.Image)
		}
		return nil
	}
	if n.Append != "" {
		return wrong(n, "append", "its kernel is on its disk, and is not told: leave this out, or boot from an image that is no disk")
	}
	if n.Run != "" && (root == nil || !root.Disk.Guest) && !seeded(n, root) {
		return wrong(n, "run", "nothing on its disk is known to look for it: leave this out, let cloud-init have it (cloud_init: true), or boot from an image that 'violin image build' made")
	}
	order := n.Boot
	switch {
	case len(order) > 0:
	case root != nil:
		order = []string{topology.RootDisk}
	default:
		order = []string{n.BootDisk()}
	}
	for i, name := range order {
		at := slices.IndexFunc(spec.Disks, func(d qemu.Disk) bool { return d.Name == name })
		if at < 0 {
			return wrong(n, fmt.Sprintf("boot[%d]", i), "it has no disk %q", name)
		}
		spec.Disks[at].Boot = i + 1
	}
	switch spec.Firmware = n.Firmware; {
	case spec.Firmware != "":
	case root != nil:
		spec.Firmware = root.Disk.Firmware
	default:
		spec.Firmware = topology.Firmwares[0]
	}
	return nil
}
