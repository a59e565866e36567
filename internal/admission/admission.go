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
		if room := room(m); memory > room {
			short = append(short, fmt.Sprintf("the nodes need %s of memory on %s, and there are %s: %s are missing",
				size(memory), m.Name, size(room), size(memory-room)))
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

// room is what a machine can promise.
func room(m Machine) uint64 {
	taken := m.Promised + m.Reserve
	return m.Free - min(m.Free, taken)
}

func size(n uint64) string {
	if n < 1<<30 {
		return fmt.Sprintf("%.0f MiB", float64(n)/(1<<20))
	}
	return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
}
