package server

import (
	"context"
	"runtime"

	"violin/internal/admission"
	"violin/internal/machine"
	"violin/internal/placement"
	"violin/internal/topology"
)

// thisMachine is what all hosts of a lab are.
const thisMachine = "this machine"

// admitted is a slice that has a place.
type admitted struct {
	topo    *topology.Topology // with its nodes where they go
	moves   []placement.Move   // those that were elsewhere
	release func()             // gives the room back; once they take it themselves
}

// admit places a slice's nodes, and takes room for them until it has come up or has failed,
// or refuses it. What replaces is stopped first, and counts as room; it may be nil. The
// slice's name must be claimed, or be that of replaces.
func (s *Server) admit(ctx context.Context, topo *topology.Topology, replaces *slice, w wish) (*admitted, error) {
	s.admitting.Lock()
	defer s.admitting.Unlock()
	topo, moves, err := s.place(ctx, topo, replaces, w)
	if err != nil {
		return nil, err
	}
	joined, err := s.placed(topo)
	if err != nil {
		return nil, err
	}
	vms := vmsOf(topo, joined)
	for _, vm := range vms {
		d := s.arriving[vm.Machine]
		s.arriving[vm.Machine] = demand{d.memory + vm.Memory + admission.Overhead, d.cpus + vm.CPUs}
	}
	return &admitted{topo: topo, moves: moves, release: func() {
		s.admitting.Lock()
		defer s.admitting.Unlock()
		for _, vm := range vms {
			d := s.arriving[vm.Machine]
			d = demand{d.memory - vm.Memory - admission.Overhead, d.cpus - vm.CPUs}
			if s.arriving[vm.Machine] = d; d == (demand{}) {
				delete(s.arriving, vm.Machine)
			}
		}
	}}, nil
}

// demand is what slices need that are coming up: their VMs are not seen yet.
type demand struct {
	memory uint64
	cpus   int
}

func vmsOf(topo *topology.Topology, joined bool) []admission.VM {
	var vms []admission.VM
	for _, n := range topo.Nodes {
		machine := thisMachine
		if joined {
			machine = joinedMachine(n.Host)
		}
		vms = append(vms, admission.VM{Name: n.Name, Machine: machine, Memory: n.Memory, CPUs: n.CPUs})
	}
	return vms
}

// machineNow measures this machine, as if one slice were gone.
func (s *Server) machineNow(ctx context.Context, without *slice) (admission.Machine, error) {
	total, free, err := machine.Memory()
	if err != nil {
		return admission.Machine{}, err
	}
	m := admission.Machine{
		Name: thisMachine, Free: free, Reserve: min(total/20, 1<<30), CPUs: runtime.NumCPU(),
	}
	s.reckon(ctx, &m, "", without)
	return m, nil
}

// reckon adds to a machine what slices take of it: those that run on the host that has
// joined, or for no host on this machine, and those that are coming up.
func (s *Server) reckon(ctx context.Context, m *admission.Machine, host string, without *slice) {
	d := s.arriving[m.Name]
	m.Promised, m.Virtual = d.memory, d.cpus
	s.mu.Lock()
	var running []*slice
	for _, sl := range s.slices {
		if sl != nil && sl.joined == (host != "") {
			running = append(running, sl)
		}
	}
	s.mu.Unlock()
	for _, sl := range running {
		for i := range sl.topo.Nodes {
			n := &sl.topo.Nodes[i]
			if host != "" && n.Host != host {
				continue
			}
			st, err := sl.agents[n.Host].Status(ctx, sl.topo.Slice, n.Name)
			if err != nil || st.PID == 0 {
				continue // it has died, and takes nothing
			}
			has := st.Resident
			if host == "" {
				has = machine.Resident(st.PID)
			}
			if sl == without {
				m.Free += has
				continue
			}
			m.Promised += n.Memory + admission.Overhead - min(has, n.Memory+admission.Overhead)
			m.Virtual += n.CPUs
		}
	}
}
