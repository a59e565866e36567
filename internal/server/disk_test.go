package server

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"violin/internal/hypervisor/qemu"
	"violin/internal/image"
	"violin/internal/qcow2"
	"violin/internal/topology"
)

// What a restore could not put back is refused, and says what to do.
func TestBases(t *testing.T) {
	dir := t.TempDir()
	s := newServer(t, dir, Storage{})
	file := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	layer := func(name string, change func(b []byte)) string {
		f, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		w, err := qcow2.NewWriter(f, 3<<20)
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(f.Name())
		if err != nil {
			t.Fatal(err)
		}
		change(b)
		return file(name, b)
	}
	be := binary.BigEndian
	for _, tt := range []struct {
		disk topology.Disk
		size uint64
		want string // of the error; empty for none
	}{
		{topology.Disk{Size: 1 << 30}, 1 << 30, ""},
		{topology.Disk{Base: file("raw", make([]byte, 4096))}, 4096, ""},
		{topology.Disk{Base: file("raw", make([]byte, 4096)), Size: 1 << 20}, 1 << 20, ""},
		{topology.Disk{Base: layer("good", func([]byte) {})}, 3 << 20, ""},
		{topology.Disk{Base: layer("good", func([]byte) {}), Size: 1 << 20}, 0, "more than the disk's 1048576; give a larger size"},
		{topology.Disk{Base: layer("overlay", func(b []byte) { be.PutUint64(b[8:], 4096) })}, 0, "another image below it"},
		{topology.Disk{Base: layer("split", func(b []byte) { b[79] |= 4 })}, 0, "its data is in another file"},
		{topology.Disk{Base: layer("crypt", func(b []byte) { be.PutUint32(b[32:], 2) })}, 0, "it is encrypted"},
		{topology.Disk{Base: layer("new", func(b []byte) { be.PutUint32(b[4:], 9) })}, 0, "a qcow2 image of version 9"},
		{topology.Disk{Base: file("packed", append([]byte("\xfd7zXZ\x00"), make([]byte, 506)...))}, 0, "it is packed by xz"},
		{topology.Disk{Base: file("vmdk", append([]byte("KDMV"), make([]byte, 508)...))}, 0, "it is a VMDK image"},
		{topology.Disk{Base: file("odd", make([]byte, 700))}, 0, "it has 700 bytes"},
		{topology.Disk{Base: file("empty", nil)}, 0, "it has 0 bytes"},
		{topology.Disk{Base: "/dev/null"}, 0, "it is no regular file"},
		{topology.Disk{Base: filepath.Join(dir, "none")}, 0, "no such file"},
	} {
		tt.disk.Name = "data"
		disks, err := s.disksOf(&topology.Node{Name: "a", Disks: []topology.Disk{tt.disk}}, nil)
		if tt.want != "" {
			if err == nil || !strings.Contains(err.Error(), tt.want) || disks != nil {
				t.Errorf("%+v: error %v, want one with %q", tt.disk, err, tt.want)
			}
			continue
		}
		if err != nil || disks[0].Size != tt.size {
			t.Errorf("%+v: %+v (%v), want a size of %d", tt.disk, disks, err, tt.size)
		}
	}
}

// The disk of an image is the node's first, and can be made larger.
func TestRootDisk(t *testing.T) {
	s := newServer(t, t.TempDir(), Storage{})
	root := &image.Info{Disk: &image.Disk{Format: "raw", Size: 2 << 20, Firmware: "uefi"}}
	for _, tt := range []struct {
		node topology.Node
		want string // name:size:boot, or a part of the error
	}{
		{topology.Node{}, "root:2:1 uefi"},
		{topology.Node{Firmware: "bios", Disks: []topology.Disk{{Name: "data", Size: 1 << 20}}}, "root:2:1 data:1:0 bios"},
		{topology.Node{Disks: []topology.Disk{{Name: "data", Size: 1 << 20}, {Name: "root", Size: 9 << 20}}, Boot: []string{"data", "root"}}, "root:9:2 data:1:1 uefi"},
		{topology.Node{Disks: []topology.Disk{{Name: "root", Size: 1 << 20}}}, "give a larger size"},
		{topology.Node{Disks: []topology.Disk{{Name: "root", Base: "/x"}}}, "leave the base out"},
		{topology.Node{Boot: []string{"none"}}, `it has no disk "none"`},
		{topology.Node{Append: "quiet"}, "its kernel is on its disk"},
		{topology.Node{Run: "true", CloudInit: &topology.CloudInit{Off: true}}, "nothing on its disk is known to look for it"},
		{topology.Node{Run: "true", Disks: []topology.Disk{{Name: "cidata", Size: 1 << 20}}}, "nothing on its disk is known to look for it"},
		{topology.Node{Run: "true"}, "root:2:1 uefi"},
	} {
		tt.node.Name, tt.node.Image = "a", "web"
		var spec qemu.Spec
		var err error
		if spec.Disks, err = s.disksOf(&tt.node, root); err == nil {
			err = firmware(&tt.node, root, &spec)
		}
		got := spec.Firmware
		for i := len(spec.Disks) - 1; i >= 0; i-- {
			got = fmt.Sprintf("%s:%d:%d ", spec.Disks[i].Name, spec.Disks[i].Size>>20, spec.Disks[i].Boot) + got
		}
		if err != nil {
			got = err.Error()
		}
		if !strings.Contains(got, tt.want) || err == nil && got != tt.want {
			t.Errorf("%+v: %s, want %s", tt.node, got, tt.want)
		}
	}
	root.Disk.Guest = true
	if err := firmware(&topology.Node{Name: "a", Image: "web", Run: "true"}, root, &qemu.Spec{Disks: []qemu.Disk{{Name: "root"}}}); err != nil {
		t.Error(err)
	}
	for _, n := range []topology.Node{{Firmware: "uefi"}, {Boot: []string{"root"}}} {
		if err := firmware(&n, nil, &qemu.Spec{Kernel: "/vmlinuz"}); err == nil || !strings.Contains(err.Error(), "has a kernel") {
			t.Errorf("%+v: %v", n, err)
		}
	}
}
