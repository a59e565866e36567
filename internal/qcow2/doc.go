// Package qcow2 reads and writes the layers of a node's disks: qcow2 files of
// version 3, of which each holds what was written while it was on top.
//
// A layer has clusters of 128 KiB in 32 subclusters of 4 KiB (extended L2 entries),
// so that what QEMU allocates in it is exactly what the guest wrote, in the unit that
// the store keeps. Integers are big-endian.
//
//	cluster 0    the header
//	then         data clusters, in the order in which they were first written
//	then         L2 tables, the L1 table, refcount blocks, the refcount table
//
//	L1 entry     bits 9-55 where the L2 table is, bit 63 set; 0: none
//	L2 entry     8 bytes: bits 9-55 where the cluster is, bit 63 set; 0: nowhere
//	             8 bytes: bits 0-31 a subcluster is in the cluster, 32-63 it is zero
//
// A subcluster that is neither is that of the layer below. QEMU, which writes to the
// file once it is a disk, puts things where it likes; [Open] takes any order.
package qcow2
