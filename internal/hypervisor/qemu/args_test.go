package qemu

import (
	"strings"
	"testing"
)

func TestCheckArgs(t *testing.T) {
	for _, args := range [][]string{
		nil,
		{"-device", "virtio-balloon-pci"},
		{"-device", "usb-ehci,id=usb", "-device", "usb-tablet"},
		{"-cpu", "max,-avx2"},
		{"-rtc", "base=localtime"},
		{"-no-reboot"},
		{"-chardev", "file,id=out,path=/tmp/x", "-device", "isa-debugcon,chardev=out"},
		{"-object", "rng-builtin,id=r", "--device", "virtio-rng-pci,rng=r"},
	} {
		if i, err := CheckArgs(args); err != nil {
			t.Errorf("%q: %d %v", args, i, err)
		}
	}
	for _, c := range []struct {
		args  string // parted by spaces
		index int
		want  string
	}{
		{"-no-reboot -incoming tcp:0:1", 1, "takes a state in"},
		{"-S", 0, "starts, stops"},
		{"--qmp unix:/x", 0, "two masters"},
		{"-mem-path /dev/shm", 0, "memory that others"},
		{"-daemonize", 0, "Violin's to say"},
		{"-snapshot", 0, "Violin's to say"},
		{"-drive file=x", 0, "not be in the cut"},
		{"-hda x", 0, "not be in the cut"},
		{"-nic user", 0, "not be in the cut"},
		{"-virtfs local,path=/", 0, "write shares"},
		{"-machine pc", 0, "change the machine"},
		{"-device vfio-pci,host=00:02.0", 1, "device of the host"},
		{"-no-reboot -device driver=vhost-user-fs-pci,chardev=c", 2, "another process"},
		{"-device virtio-blk-pci,drive=x", 1, "not in the cut"},
		{"-device e1000,netdev=net0", 1, "not in the cut"},
		{`-device {"driver":"vfio-pci"}`, 1, "type,property=value"},
		{"-object memory-backend-file,id=m,share=on", 1, "memory that others"},
		{"-object qom-type=memory-backend-ram,id=m", 1, "memory that others"},
		{"-object filter-mirror,id=f", 1, "behind the cut's back"},
		{"-device", 1, "says nothing"},
		{"-chardev socket,id=qmp", 1, "Violin's own"},
		{"virtio-balloon", 0, "no option"},
	} {
		i, err := CheckArgs(strings.Fields(c.args))
		if err == nil || i != c.index || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: argument %d, %v; want %d, %q", c.args, i, err, c.index, c.want)
		}
	}
}
