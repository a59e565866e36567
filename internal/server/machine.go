package server

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

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
	if n.Image != "" {
		if _, err := image.Open(s.images(), n.Image); err != nil {
			return spec, wrong(n, "image", "%w", err)
		}
		dir := filepath.Join(s.images(), n.Image)
		spec.Kernel, spec.Initrd, spec.RootFS = filepath.Join(dir, image.KernelFile), filepath.Join(dir, image.InitrdFile), filepath.Join(dir, image.RootFile)
	}
	for kind, f := range map[string]string{"kernel": n.Kernel, "initrd": n.Initrd, "rootfs": n.RootFS} {
		if f == "" {
			continue
		}
		if _, err := os.Stat(f); err != nil {
			return spec, wrong(n, kind, "%w", err)
		}
	}
	var err error
	spec.Disks, err = disksOf(n)
	return spec, err
}
