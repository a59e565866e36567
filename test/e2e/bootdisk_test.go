package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// foreign writes an image that was built as a disk to a file, as one from elsewhere. What
// a test imports is its own, beside the images that it has in common with others.
func foreign(t *testing.T, runDir, name, qcow2 string, others ...string) {
	t.Helper()
	images := filepath.Join(runDir, "state/images")
	shared, err := filepath.EvalSymlinks(images)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(images); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(images, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range append(others, name) {
		if err := os.Symlink(filepath.Join(shared, name), filepath.Join(images, name)); err != nil {
			t.Fatal(err)
		}
	}
	disk := filepath.Join(shared, name, "disk")
	if _, err := os.Stat(disk); err != nil {
		t.Fatalf("%v: make image", err)
	}
	if out, err := exec.Command("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk, qcow2).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img: %v: %s", err, out)
	}
}

// TestBootDisk boots disks, by BIOS and by UEFI: an image that was built as a disk, the same
// file imported, and a disk of no image. Each counts, on its root file system and in
// memory, and the two must be of one instant after every restore.
func TestBootDisk(t *testing.T) {
	dirs, runDir := begin(t)
	qcow2 := filepath.Join(runDir, "appliance.qcow2")
	foreign(t, runDir, "disk", qcow2, "mpi")
	if _, err := command(t, dirs, "image", "import", qcow2, "--sha256", strings.Repeat("00", 32)); err == nil {
		t.Error("a file with another hash is imported")
	}
	must(t, dirs, "image", "import", qcow2, "--firmware", "uefi")

	file := filepath.Join(runDir, "bootdisk.yaml")
	up := func(more string) ([]byte, error) {
		text := `version: 1
slice: bootdisk
sites: {s: {hosts: [h1, h2]}}
networks: {lan: {subnet: 10.33.0.0/24}}
nodes:
  built: {host: h1, image: disk, memory: 160MiB, interfaces: [{network: lan, address: 10.33.0.1/24}], run: "echo ran >/root/ran"}
  imported:
    {host: h2, image: appliance, memory: 160MiB, disks: [{name: data, size: 16MiB}, {name: root, size: 600MiB}], interfaces: [{network: lan, address: 10.33.0.2/24}]` + more + `}
  none: {host: h2, memory: 160MiB, firmware: uefi, disks: [{name: empty, size: 16MiB}, {name: system, base: appliance.qcow2}], boot: [empty, system]}
`
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.CommandContext(t.Context(), filepath.Join(root, "bin/violin"), append(dirs[:len(dirs):len(dirs)], "up", file)...).CombinedOutput()
		return out, err
	}
	for more, want := range map[string]string{
		`, cloud_init: false, run: "echo x"`: ":8:",
		`, append: quiet`:                    "its kernel is on its disk",
		`, boot: [rot]`:                      "did you mean root?",
		`, image: mpi, boot: data`:           "is given twice",
	} {
		if out, err := up(more); err == nil || !strings.Contains(string(out), want) {
			t.Errorf("%s: %v, %s; want %q", more, err, out, want)
		}
	}
	if out, err := up(""); err != nil {
		t.Fatalf("up: %v: %s", err, out)
	}
	nodes := []string{"built", "imported", "none"}
	for _, n := range nodes {
		booted(t, dirs, "bootdisk/"+n)
		sh(t, dirs, "bootdisk/"+n, `mkdir -p /run/c; setsid sh -c 'n=0; while [ ! -e /run/c/stop ]; do n=$((n+1)); echo $n >/run/c/n; echo $n >>/root/count; sleep 0.01; done; touch /run/c/stopped' >/dev/null 2>&1 </dev/null &`)
	}
	for n, want := range map[string]string{"built": "no", "imported": "yes", "none": "yes"} {
		if got := sh(t, dirs, "bootdisk/"+n, "if grep -q '^BOOT_IMAGE' /proc/cmdline; then echo no; else echo yes; fi"); got != want {
			t.Errorf("%s was booted by UEFI: %s, want %s", n, got, want)
		}
	}
	if got := sh(t, dirs, "bootdisk/built", "cat /root/ran"); got != "ran" {
		t.Errorf("run of an image that was built as a disk: %q", got)
	}
	if got := sh(t, dirs, "bootdisk/imported", "cat /sys/block/vda/size /sys/block/vdb/size"); got != fmt.Sprintf("%d\n%d", 600<<20/512, 16<<20/512) {
		t.Errorf("its disks have %q sectors", got)
	}
	must(t, dirs, "snapshot", "bootdisk", "--tag", "first")
	must(t, dirs, "snapshot", "bootdisk", "--tag", "second", "--mode", "precopy")
	for _, tag := range []string{"second", "first", "second"} {
		for _, n := range slice(t, dirs, "").Nodes {
			kill(t, n.PID)
		}
		must(t, dirs, "restore", "bootdisk@"+tag)
		for _, n := range nodes {
			node := "bootdisk/" + n
			sh(t, dirs, node, "touch /run/c/stop; while [ ! -e /run/c/stopped ]; do sleep 0.05; done; sync; echo 3 >/proc/sys/vm/drop_caches")
			memory, err := strconv.Atoi(sh(t, dirs, node, "cat /run/c/n"))
			if err != nil {
				t.Fatal(err)
			}
			want := sh(t, dirs, node, fmt.Sprintf("seq 1 %d | md5sum", memory))
			if got := sh(t, dirs, node, "md5sum </root/count"); got != want || memory == 0 {
				t.Errorf("%s at %s: its disk does not have the numbers up to %d, as its memory: %s", n, tag, memory, sh(t, dirs, node, "tail -3 /root/count"))
			}
		}
		sh(t, dirs, "bootdisk/built", "ping -c 3 -i 0.2 10.33.0.2")
	}
	verified(t, dirs, "bootdisk@latest")
	if out, err := command(t, dirs, "image", "rm", "appliance"); err == nil {
		t.Errorf("an image that is in use is removed: %s", out)
	}
}
