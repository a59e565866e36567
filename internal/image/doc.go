// Package image builds and keeps what nodes boot from. An image is a directory of
//
//	vmlinuz           a kernel of Debian's
//	initrd.img        busybox and the modules to reach the disk
//	rootfs.squashfs   Debian packages and what the recipe adds; read-only, a tmpfs above it
//	image.json        what it is: see [Info]. It is written last; without it there is no image
//
// or, rather than the first three, of
//
//	disk              qcow2 or raw, with all that firmware needs to boot from it
//
// which [Import] takes from elsewhere. Either is made of a recipe, a YAML file:
//
//	version: 1
//	kernel: linux-image-cloud-amd64     # a package that depends on the kernel's; this is the default
//	modules: [8021q]                    # of the kernel, loaded at boot, beside those for the virtio devices
//	packages: [openmpi-bin, iperf3]     # of Debian, beside those that every image needs
//	files:
//	  - {path: /usr/local/bin/job, from: job, mode: 755}   # from is relative to the recipe
//	  - {path: /etc/motd, content: "hello\n"}
//	commands:                           # in the image, by /bin/sh -eu, after packages and files
//	  - useradd -m alice
//	boot: disk                          # all on one disk, for BIOS and UEFI; kernel if not given
//	init: systemd                       # Debian's own and cloud-init, on a disk; violin's busybox if not given
//	size: 2GiB                          # of the disk's root file system; 1GiB if not given
//
// Building takes Debian's tools and root, and no loop device. What is mounted
// meanwhile, and what runs, lives in namespaces that end with the build.
package image
