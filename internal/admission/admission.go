// Package admission decides whether what is to run fits: arithmetic over what
// machines have and what VMs need. It measures nothing.
//
// Memory is not overcommitted: a VM that has touched all of its memory must find it,
// or the kernel kills VMs at its own choice. Processors are, up to a bound: VMs that
// share a processor are slow, and right.
package admission

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Ratio is how many virtual CPUs may share a processor.
const Ratio = 16

// Overhead is what a hypervisor takes beside its guest's memory, in bytes: QEMU with
// its translation buffers and its devices.
const Overhead = 64 << 20

// ErrShort is in the chain when something does not fit.
var ErrShort = errors.New("it does not fit")

// A Machine is what VMs run on.
type Machine struct {
	Name string
	// Free is the memory, in bytes, that can be had now.
	Free uint64
	// Promised is what VMs that run here may still take of it, in bytes.
	Promised uint64
	// Reserve is what is to stay free for everything else, in bytes.
	Reserve uint64
	// CPUs are its processors, and Virtual the CPUs of VMs that run here.
	CPUs, Virtual int
}

// A VM is what is to run.
type VM struct {
	Name    string
	Machine string
	Memory  uint64 // of the guest, in bytes
	CPUs    int
}

// Check tells whether the VMs fit beside what runs. If not, the error names every
// shortfall, and has ErrShort in its chain.
func Check(machines []Machine, vms []VM) error {
	var short []string
	machines = slices.SortedFunc(slices.Values(machines), func(a, b Machine) int { return cmp.Compare(a.Name, b.Name) })
	for _, m := range machines {
		var memory uint64
		cpus := 0
		for _, vm := range vms {
			if vm.Machine != m.Name {
				continue
			}
			memory += vm.Memory + Overhead
			cpus += vm.CPUs
			if vm.CPUs > m.CPUs {
				short = append(short, fmt.Sprintf("node %q has %d CPUs, and %s has %d processors", vm.Name, vm.CPUs, m.Name, m.CPUs))
			}
		}
		if room := m.Room(); memory > room {
			short = append(short, fmt.Sprintf("the nodes need %s of memory on %s, and there are %s: %s are missing",
				Size(memory), m.Name, Size(room), Size(memory-room)))
		}
		if most := m.CPUs * Ratio; cpus > 0 && m.Virtual+cpus > most {
			short = append(short, fmt.Sprintf("the nodes need %d CPUs on %s, where %d of at most %d (%d a processor) are in use: %d are missing",
				cpus, m.Name, m.Virtual, most, Ratio, m.Virtual+cpus-most))
		}
	}
	if len(short) > 0 {
		return fmt.Errorf("%w: %s", ErrShort, strings.Join(short, "; "))
	}
	return nil
}

// Room is the memory that a machine can promise, in bytes.
func (m *Machine) Room() uint64 {
	taken := m.Promised + m.Reserve
	return m.Free - min(m.Free, taken)
}

// Lacks says what a machine has too little of for one more VM; nothing if it fits.
func (m *Machine) Lacks(vm VM) string {
	room, most := m.Room(), m.CPUs*Ratio
	switch {
	case vm.CPUs > m.CPUs:
		return fmt.Sprintf("it has %d processors", m.CPUs)
	case vm.Memory+Overhead > room:
		return fmt.Sprintf("it has %s of memory left, and %s are needed", Size(room), Size(vm.Memory+Overhead))
	case m.Virtual+vm.CPUs > most:
		return fmt.Sprintf("%d of its at most %d CPUs (%d a processor) are in use", m.Virtual, most, Ratio)
	}
	return ""
}

// Take takes the room for a VM.
func (m *Machine) Take(vm VM) {
	m.Promised += vm.Memory + Overhead
	m.Virtual += vm.CPUs
}

// Size is a number of bytes for people.
func Size(n uint64) string {
	if n < 1<<30 {
		return fmt.Sprintf("%.0f MiB", float64(n)/(1<<20))
	}
	return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
}
