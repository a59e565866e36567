// Package topology owns the file that describes an experiment: what is in it,
// how its mistakes are told, and its canonical form.
//
//	version: 1
//	slice: mandelbrot
//	sites:
//	  utah: {hosts: [utah-1, utah-2]}
//	  gpo:  {hosts: [gpo-1, gpo-2]}
//	wan:
//	  - {between: [utah, gpo], delay: 30ms}
//	networks:
//	  lan: {subnet: 10.10.0.0/24}
//	nodes:
//	  rank0:
//	    host: utah-1
//	    image: mpi
//	    memory: 256MiB
//	    interfaces: [{network: lan, address: 10.10.0.1/24}]
//
// The fields, in the order of the canonical form; those marked * must be given:
//
//	version*                1
//	slice*                  name
//	sites*.NAME.hosts*      list of names, each in one site only
//	wan[].between*          two sites
//	wan[].delay             each way, such as 30ms; up to 1m
//	wan[].jitter            up to the delay
//	wan[].loss, .reorder    such as 0.5%
//	wan[].rate              such as 100Mbit (a second, each way); unlimited if not given
//	networks.NAME.subnet    CIDR, such as 10.10.0.0/24 or fd00::/64
//	networks.NAME.mtu       of the nodes' interfaces, in bytes: 576 to 8950; 1500 if not given
//	networks.NAME.external  hold: frames to the outside wait until a snapshot covers them; pass: they do not (the default);
//	                        closed: nodes begin nothing with the outside, which forwards still lead in from
//	networks.NAME.gateway   nat: a way out to whatever the server's machine reaches, at the subnet's first free
//	                        address, or {nat: ADDRESS}; the subnet must be given, and be IPv4
//	nodes*.NAME.host*       one of the hosts, or
//	nodes*.NAME.site        one of the sites: the node comes up on a host there that takes it and has room
//	nodes*.NAME.image       name of an image; this, or kernel, or a disk with a base must be given
//	nodes*.NAME.kernel      file, as are initrd and rootfs, which go with it
//	nodes*.NAME.append      more of a kernel command line
//	nodes*.NAME.firmware    bios or uefi, which boots disks; what goes with the image, or bios, if not given
//	nodes*.NAME.boot        list of names of disks that the firmware tries, in order; root is the image itself, if that
//	                        is a disk, which is tried alone if not given, as is the first disk with a base
//	nodes*.NAME.memory*     such as 256MiB; whole MiB, at least 16MiB
//	nodes*.NAME.cpus        1 if not given
//	nodes*.NAME.disks       list of {name*, size, base}: size such as 1GiB, of an empty disk; or base, the file of
//	                        a read-only qcow2 or raw image that the disk begins as, and size if it is to be larger;
//	                        one named root with a size alone is the image itself, if that is a disk, made larger
//	nodes*.NAME.interfaces  list of {network*, address, mac, model}: address in CIDR form;
//	                        mac derived from slice, node and position if not given; model e1000, e1000e or
//	                        rtl8139 rather than virtio
//	nodes*.NAME.forwards    list of [ADDRESS:]PORT:NODEPORT[/PROTOCOL], such as "8080:80" or "0.0.0.0:5353:53/udp": a port
//	                        of the machine that the gateway runs on, for one of the node, which must have an IPv4
//	                        address on a network with a gateway; at 127.0.0.1 and tcp if not given, PORT 0 for
//	                        any that is free, and with a ? (8080?:80) any that is free if that one is taken
//	nodes*.NAME.run         command line that the guest starts at boot
//	nodes*.NAME.qemu        list of arguments for QEMU, as the way out where the fields above don't suffice; those
//	                        that would break a snapshot are refused
//
// A name is what DNS takes for a label: a-z, 0-9 and '-', at most 63 of them, 20 for a disk.
// YAML's anchors, aliases and merge keys (<<) work; tags do not.
//
// The package is pure: it reads no file and asks no machine.
package topology
