package qemu

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"violin/internal/topology"
)

// uefiFiles are where distributions have OVMF as one file: Debian's first. In this form it
// keeps its variables in the guest's memory, so that a capture has them, of the same
// instant as all else. Those in a flash device of their own QEMU copies while the guest
// may write to them (ram_write_tracking_prepare leaves ROM devices out).
var uefiFiles = []string{"/usr/share/ovmf/OVMF.fd", "/usr/share/OVMF/OVMF.fd", "/usr/share/edk2/ovmf/OVMF.fd", "/usr/share/edk2-ovmf/x64/OVMF.fd", "/usr/share/qemu/OVMF.fd"}

// FindFirmware is the file that this host has of a firmware: one of topology.Firmwares. It
// is empty for none and for the BIOS, which is QEMU's own.
func FindFirmware(name string) (string, error) {
	switch {
	case name == "" || name == "bios":
		return "", nil
	case !slices.Contains(topology.Firmwares, name):
		return "", fmt.Errorf("firmware %q is none of %s", name, strings.Join(topology.Firmwares, ", "))
	}
	for _, path := range uefiFiles {
		if st, err := os.Stat(path); err == nil && st.Mode().IsRegular() {
			return path, nil
		}
	}
	return "", fmt.Errorf("this host has no UEFI firmware in any of %s: install OVMF (Debian's package ovmf)", strings.Join(uefiFiles, ", "))
}
