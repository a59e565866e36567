package server

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"

	"connectrpc.com/connect"

	"violin/internal/admission"
	"violin/internal/topology"
)

// thisMachine is what all hosts of a lab are.
const thisMachine = "this machine"

// admit takes room for a slice until it has come up or has failed, or refuses it. What
// replaces is stopped first, and counts as room; it may be nil. The slice's name must
// be claimed, or be that of replaces.
func (s *Server) admit(ctx context.Context, topo *topology.Topology, replaces *slice, overcommit bool) (release func(), err error) {
	s.admitting.Lock()
	defer s.admitting.Unlock()
	if !overcommit {
		m, err := s.machineNow(ctx, replaces)
		if err != nil {
			return nil, err
		}
		if err := admission.Check([]admission.Machine{m}, vmsOf(topo)); err != nil {
			return nil, connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("slice %q: %w", topo.Slice, err))
		}
	}
	for _, vm := range vmsOf(topo) {
		s.arriving.memory += vm.Memory + admission.Overhead
		s.arriving.cpus += vm.CPUs
	}
	return func() {
		s.admitting.Lock()
		defer s.admitting.Unlock()
		for _, vm := range vmsOf(topo) {
			s.arriving.memory -= vm.Memory + admission.Overhead
			s.arriving.cpus -= vm.CPUs
		}
	}, nil
}

// demand is what slices need that are coming up: their VMs are not seen yet.
type demand struct {
	memory uint64
	cpus   int
}

func vmsOf(topo *topology.Topology) []admission.VM {
	var vms []admission.VM
	for _, n := range topo.Nodes {
		vms = append(vms, admission.VM{Name: n.Name, Machine: thisMachine, Memory: n.Memory, CPUs: n.CPUs})
	}
	return vms
}

// machineNow measures this machine, as if one slice were gone.
func (s *Server) machineNow(ctx context.Context, without *slice) (admission.Machine, error) {
	total, free, err := memory()
	if err != nil {
		return admission.Machine{}, err
	}
	m := admission.Machine{
		Name: thisMachine, Free: free, Reserve: min(total/20, 1<<30), CPUs: runtime.NumCPU(),
		Promised: s.arriving.memory, Virtual: s.arriving.cpus,
	}
	s.mu.Lock()
	var running []*slice
	for _, sl := range s.slices {
		if sl != nil {
			running = append(running, sl)
		}
	}
	s.mu.Unlock()
	for _, sl := range running {
		for i := range sl.topo.Nodes {
			n := &sl.topo.Nodes[i]
			st, err := sl.agents[n.Host].Status(ctx, sl.topo.Slice, n.Name)
			if err != nil || st.PID == 0 {
				continue // it has died, and takes nothing
			}
			has := resident(st.PID)
			if sl == without {
				m.Free += has
				continue
			}
			m.Promised += n.Memory + admission.Overhead - min(has, n.Memory+admission.Overhead)
			m.Virtual += n.CPUs
		}
	}
	return m, nil
}

// memory is what the machine has and what can be had of it now, in bytes.
func memory() (total, available uint64, err error) {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, 0, fmt.Errorf("measure memory: %w", err)
	}
	for lines := bufio.NewScanner(bytes.NewReader(b)); lines.Scan(); {
		name, rest, _ := strings.Cut(lines.Text(), ":")
		kib, _ := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
		switch name {
		case "MemTotal":
			total = kib << 10
		case "MemAvailable":
			available = kib << 10
		}
	}
	if total == 0 || available == 0 {
		return 0, 0, errors.New("measure memory: /proc/meminfo does not say what is available")
	}
	return total, available, nil
}

// resident is what a process has of the machine's memory, in bytes; 0 if it is gone.
func resident(pid int) uint64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		return 0
	}
	f := strings.Fields(string(b))
	if len(f) < 2 {
		return 0
	}
	pages, _ := strconv.ParseUint(f[1], 10, 64)
	return pages * uint64(os.Getpagesize())
}
