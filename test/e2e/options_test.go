package e2e

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestOptions gives a node more than a topology has words for, and another network
// interface. What would break a snapshot is refused before anything runs.
func TestOptions(t *testing.T) {
	dirs, runDir := begin(t)
	file := filepath.Join(runDir, "options.yaml")
	topology := func(arguments string) string {
		text := fmt.Sprintf(`version: 1
slice: options
sites: {s: {hosts: [h1]}}
networks: {lan: {subnet: 10.31.0.0/24}}
nodes:
  n1:
    host: h1
    image: mpi
    memory: 96MiB
    interfaces: [{network: lan, address: 10.31.0.1/24}, {network: lan, model: e1000}]
    qemu: [%s]
`, arguments)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	for arguments, want := range map[string]string{
		`-no-reboot, -snapshot`:                      ":11:24: ",
		`-device, "vfio-pci,host=00:02.0"`:           ":11:21: ",
		`-drive, file=/dev/null`:                     "write disks",
		`-device, amd-iommu`:                         "not migratable",
		`-device, violin`:                            "not a valid device model",
		`-object, "memory-backend-ram,id=m,size=1M"`: "is in no snapshot",
	} {
		out, err := exec.CommandContext(t.Context(), filepath.Join(root, "bin/violin"), append(dirs[:len(dirs):len(dirs)], "up", topology(arguments))...).CombinedOutput()
		if err == nil || !bytes.Contains(out, []byte(want)) {
			t.Errorf("[%s]: %v, %s; want %q", arguments, err, out, want)
		}
		if out := must(t, dirs, "ps"); strings.Contains(string(out), "options") {
			t.Errorf("[%s]: there is something left: %s", arguments, out)
		}
	}

	must(t, dirs, "up", topology(`-device, "usb-ehci,id=usb", -device, usb-tablet, -device, virtio-balloon-pci`))
	booted(t, dirs, "options/n1")
	// The tablet is there, and the interface that the guest has no driver for.
	devices := sh(t, dirs, "options/n1", "cat /sys/bus/pci/devices/*/device /sys/bus/pci/devices/*/class")
	for what, id := range map[string]string{"the balloon": "0x1002", "the USB controller": "0x0c0320", "the e1000": "0x100e"} {
		if !strings.Contains(devices, id) {
			t.Errorf("the guest does not have %s, %s: %s", what, id, devices)
		}
	}
	sh(t, dirs, "options/n1", "echo before >/run/mark")
	must(t, dirs, "snapshot", "options")
	verified(t, dirs, "options@latest")
	sh(t, dirs, "options/n1", "echo after >/run/mark")
	must(t, dirs, "restore", "options@latest")
	if got := sh(t, dirs, "options/n1", "cat /run/mark"); got != "before" {
		t.Errorf("restored to %q", got)
	}
}
