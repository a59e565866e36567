package server

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"violin/internal/qcow2"
	"violin/internal/topology"
)

// What a restore could not put back is refused, and says what to do.
func TestBases(t *testing.T) {
	dir := t.TempDir()
	file := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	image := func(name string, change func(b []byte)) string {
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
		{topology.Disk{Base: image("good", func([]byte) {})}, 3 << 20, ""},
		{topology.Disk{Base: image("good", func([]byte) {}), Size: 1 << 20}, 0, "more than the disk's 1048576; give a larger size"},
		{topology.Disk{Base: image("overlay", func(b []byte) { be.PutUint64(b[8:], 4096) })}, 0, "another image below it"},
		{topology.Disk{Base: image("split", func(b []byte) { b[79] |= 4 })}, 0, "its data is in another file"},
		{topology.Disk{Base: image("crypt", func(b []byte) { be.PutUint32(b[32:], 2) })}, 0, "it is encrypted"},
		{topology.Disk{Base: image("new", func(b []byte) { be.PutUint32(b[4:], 9) })}, 0, "a qcow2 image of version 9"},
		{topology.Disk{Base: file("vmdk", append([]byte("KDMV"), make([]byte, 508)...))}, 0, "it is a VMDK image"},
		{topology.Disk{Base: file("odd", make([]byte, 700))}, 0, "it has 700 bytes"},
		{topology.Disk{Base: file("empty", nil)}, 0, "it has 0 bytes"},
		{topology.Disk{Base: "/dev/null"}, 0, "it is no regular file"},
		{topology.Disk{Base: filepath.Join(dir, "none")}, 0, "no such file"},
	} {
		tt.disk.Name = "data"
		disks, err := disksOf(&topology.Node{Name: "a", Disks: []topology.Disk{tt.disk}})
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
