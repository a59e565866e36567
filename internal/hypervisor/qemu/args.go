package qemu

import (
	"fmt"
	"slices"
	"strings"
)

// refused are QEMU's options that are not to be given beside Violin's own, and why.
var refused = []struct {
	why     string
	options []string
}{
	{"it would change the machine that a snapshot is of; the topology says what that is", []string{
		"M", "machine", "accel", "enable-kvm", "m", "smp", "numa", "kernel", "initrd", "append", "dtb", "bios", "pflash", "boot",
		"no-hpet", "no-acpi", "set", "global", "nodefaults", "no-user-config", "readconfig", "xen-attach", "xen-domid", "xen-domid-restrict",
	}},
	{"memory that others can write to, or that lies in a file, is in no snapshot", []string{"mem-path", "mem-prealloc"}},
	{"when the VM starts, stops and takes a state in is Violin's to say", []string{
		"S", "incoming", "loadvm", "preconfig", "only-migratable", "no-shutdown", "daemonize", "pidfile", "runas", "chroot", "sandbox",
		"icount", "action", "snapshot", "gdb", "s",
	}},
	{"two masters of a VM spoil each other's captures; its monitor is Violin's", []string{"qmp", "qmp-pretty", "mon", "monitor", "nographic"}},
	{"such a disk would not be in the cut; write disks, or shares for what is only read", []string{
		"drive", "blockdev", "hda", "hdb", "hdc", "hdd", "cdrom", "fda", "fdb", "mtdblock", "sd", "iscsi", "usbdevice",
	}},
	{"such a network would not be in the cut; write interfaces", []string{"net", "nic", "netdev"}},
	{"a directory of the host can't be in a snapshot; write shares", []string{"virtfs", "fsdev"}},
	{"it runs no VM", []string{"help", "h", "version", "dump-vmstate", "audio-help", "writeconfig"}},
	{"it is Violin's own", []string{"name", "uuid", "add-fd"}},
}

// refusedTypes are beginnings of types of devices and objects, and why they are refused.
// What else can't be migrated QEMU finds itself, before the vCPUs run.
var refusedTypes = []struct{ begin, why string }{
	{"vfio", "a device of the host can't be in a snapshot"},
	{"usb-host", "a device of the host can't be in a snapshot"},
	{"pci-assign", "a device of the host can't be in a snapshot"},
	{"scsi-block", "a device of the host can't be in a snapshot"},
	{"scsi-generic", "a device of the host can't be in a snapshot"},
	{"vhost", "its state is in another process, which a snapshot does not reach"},
	{"virtio-9p", "a directory of the host can't be in a snapshot; write shares"},
	{"ivshmem", "memory that others can write to is in no snapshot"},
	{"memory-backend", "memory that others can write to, or that lies in a file, is in no snapshot"},
	{"nvdimm", "memory that lies in a file is in no snapshot"},
	{"virtio-pmem", "memory that lies in a file is in no snapshot"},
	{"virtio-mem", "memory that comes and goes is in no snapshot"},
	{"x-remote", "its state is in another process, which a snapshot does not reach"},
	{"filter-", "it holds or copies frames behind the cut's back"},
	{"colo-", "it holds or copies frames behind the cut's back"},
}

// CheckArgs refuses arguments for QEMU that would break a VM's snapshots. The index is
// that of the argument at fault.
func CheckArgs(args []string) (index int, err error) {
	for i := 0; i < len(args); i++ {
		option, ok := strings.CutPrefix(args[i], "-")
		if !ok {
			return i, fmt.Errorf("argument %q is no option of QEMU's, which begins with -", args[i])
		}
		option = strings.TrimPrefix(option, "-") // QEMU takes either
		for _, r := range refused {
			if slices.Contains(r.options, option) {
				return i, fmt.Errorf("argument -%s: %s", option, r.why)
			}
		}
		at := i
		value := ""
		if i+1 < len(args) && !strings.HasPrefix(args[i+1], "-") {
			i++
			value = args[i]
		}
		switch option {
		case "device", "object":
			if err := checkType(option, value); err != nil {
				return at + 1, err
			}
		case "chardev":
			if slices.Contains([]string{"qmp", "console", "agent"}, property(value, "id")) {
				return at + 1, fmt.Errorf("argument -chardev %s: that id is Violin's own", value)
			}
		}
	}
	return 0, nil
}

func checkType(option, value string) error {
	if value == "" {
		return fmt.Errorf("argument -%s: it says nothing of what", option)
	}
	if strings.HasPrefix(value, "{") {
		return fmt.Errorf("argument -%s %s: write it as type,property=value", option, value)
	}
	kind, _, _ := strings.Cut(value, ",")
	if kind == "" || strings.Contains(kind, "=") {
		if kind = property(value, "driver"); kind == "" {
			kind = property(value, "qom-type")
		}
	}
	for _, t := range refusedTypes {
		if strings.HasPrefix(kind, t.begin) {
			return fmt.Errorf("argument -%s %s: %s", option, value, t.why)
		}
	}
	for _, p := range []string{"drive", "netdev", "bootindex"} {
		if property(value, p) != "" {
			return fmt.Errorf("argument -%s %s: disks and networks that are not in the cut; write disks, interfaces and boot", option, value)
		}
	}
	return nil
}

// property is one of name=value,... ; empty if it is not there.
func property(value, name string) string {
	for part := range strings.SplitSeq(value, ",") {
		if k, v, ok := strings.Cut(part, "="); ok && k == name {
			return v
		}
	}
	return ""
}
