package machine

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// TapQueueLength is the length of a TAP's queue towards its reader in frames: what
// a paused machine's device takes before it drops (as TCP's largest window of
// 4 MiB is some 2,800 full frames).
const TapQueueLength = 4096

// MakeTap makes (or attaches to) the TAP device called name in the calling
// thread's namespace. The device goes when the file is closed, unless it is
// made persistent.
func MakeTap(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("open /dev/net/tun: %w; load the kernel's tun module (modprobe tun)", err)
		}
		return nil, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("device name %q: %w; at most 15 bytes", name, err)
	}
	// One queue, no packet information header, no virtio header: the kernel
	// then completes checksums and segments before we see a frame.
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("make TAP %q: %w", name, err)
	}
	// Only now: a TAP can't be polled before it has a device.
	return os.NewFile(uintptr(fd), "tap "+name), nil
}

// Requests of the SIOCETHTOOL ioctl, from linux/ethtool.h.
const (
	ethtoolSetRxChecksum = 0x15
	ethtoolSetTxChecksum = 0x17
	ethtoolSetSG         = 0x19
	ethtoolSetTSO        = 0x1f
	ethtoolSetGSO        = 0x24
	ethtoolSetGRO        = 0x2c
)

// DisableOffloads makes the device, in the calling thread's namespace, carry
// frames as they would be on a cable. A switch in user space sees them before
// any hardware would have filled in checksums or cut up segments.
func DisableOffloads(device string) error {
	sock, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("switch off offloads of %q: %w", device, err)
	}
	defer unix.Close(sock)
	for _, o := range []struct {
		request uint32
		name    string
	}{
		{ethtoolSetGRO, "generic-receive-offload"},
		{ethtoolSetGSO, "generic-segmentation-offload"},
		{ethtoolSetTSO, "tcp-segmentation-offload"},
		{ethtoolSetSG, "scatter-gather"},
		{ethtoolSetTxChecksum, "tx-checksumming"},
		{ethtoolSetRxChecksum, "rx-checksumming"},
	} {
		err := ethtoolSet(sock, device, o.request, 0)
		if err != nil && !errors.Is(err, unix.EOPNOTSUPP) { // that one is off for good
			return fmt.Errorf("switch off %s of %q: %w", o.name, device, err)
		}
	}
	return nil
}

func ethtoolSet(sock int, device string, request, value uint32) error {
	arg := struct{ request, value uint32 }{request, value} // struct ethtool_value
	ifr := struct {                                        // struct ifreq
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}{data: unsafe.Pointer(&arg)}
	if len(device) >= len(ifr.name) {
		return unix.EINVAL
	}
	copy(ifr.name[:], device)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(sock), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&ifr)))
	runtime.KeepAlive(&arg)
	if errno != 0 {
		return errno
	}
	return nil
}

// persist lets a TAP device outlive its file.
func persist(f *os.File, name string) error {
	if err := unix.IoctlSetInt(int(f.Fd()), unix.TUNSETPERSIST, 1); err != nil {
		return fmt.Errorf("make TAP %q persistent: %w", name, err)
	}
	return nil
}
