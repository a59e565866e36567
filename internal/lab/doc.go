// Package lab makes one machine stand for many: every host of a slice becomes
// a network namespace, every site a bridge, and every WAN link between sites a
// shaped path in user space.
//
//	     site utah (namespace)                          site gpo (namespace)
//	┌───────────────────────────────┐              ┌───────────────────────────┐
//	│ bridge "underlay"             │              │ bridge "underlay"         │
//	│  ├ h0 ──── utah-1/underlay0   │              │  ├ h0 ──── gpo-1/underlay0│
//	│  ├ h1 ──── utah-2/underlay0   │              │  └ wan (TAP)              │
//	│  └ wan (TAP)                  │              │       │                   │
//	└───────┼───────────────────────┘              └───────┼───────────────────┘
//	        └───────────── [Link]: delay, loss, … ─────────┘
//
// The package owns the underlay, that is what a data centre and a carrier give
// to real hosts: cables, addresses, and the distance between sites. What the
// hosts do with it (switches, tunnels, machines) belongs to packages fabric and
// hypervisor, which see a [Host] only as a place to start processes in.
//
// Two rules keep the machine clean:
//
//   - Namespaces have no name. Each exists because a thread of this process
//     lives in it; there is no file under /run/netns and no mount. No device is
//     ever made in the namespace that the process was started in.
//   - A child started by [Host.Start] is killed by the kernel when that thread
//     dies (PR_SET_PDEATHSIG). So kill -9 of this process takes all hosts, their
//     devices and their children with it.
//
// The underlay is one flat Ethernet, by default 172.31.0.0/16 with an MTU of
// 9000 so that a tunnel's headers fit around full-sized inner frames. The h-th
// host of the s-th site (both counted from one) has 172.31.s.h and the MAC
// address 02:56:00:00:s:h.
package lab
