package server

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	violinv1 "violin/api/violin/v1"
	"violin/internal/catalog"
	"violin/internal/image"
	"violin/internal/topology"
)

// An image that something needs is not removed by mistake.
func TestImages(t *testing.T) {
	state := t.TempDir()
	s := newServer(t, state, Storage{})
	put := func(name, root string) {
		t.Helper()
		dir := filepath.Join(state, "images", name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for f, content := range map[string]string{image.KernelFile: "k", image.InitrdFile: "i", image.RootFile: root, "image.json": `{"format": 1, "kernel": "6.1"}`} {
			if err := os.WriteFile(filepath.Join(dir, f), []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	put("old", "a root file system")
	put("new", "another")
	put("torn", "a third")
	if err := os.Remove(filepath.Join(state, "images/torn", image.KernelFile)); err != nil {
		t.Fatal(err)
	}
	// A snapshot of nodes that booted from what is in old.
	hash, size, err := s.boot.Of(filepath.Join(state, "images/old", image.RootFile))
	if err != nil {
		t.Fatal(err)
	}
	snap := keep(t, s, "260101-1000", "", time.Now(), 1)
	snap.ID, snap.Nodes[0].Boot = "260101-1001", []catalog.BootFile{{Kind: "rootfs", Size: size, Hash: hash}}
	if err := s.catalog.Put(t.Context(), snap); err != nil {
		t.Fatal(err)
	}
	s.slices["web"] = &slice{topo: &topology.Topology{Nodes: []topology.Node{{Name: "a", Image: "new"}, {Name: "b", Image: "new"}}}}
	s.slices["coming"] = nil
	defer clear(s.slices) // there is nothing to stop

	list, err := s.ListImages(operator(t), &violinv1.ListImagesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, i := range list.GetImages() {
		got = append(got, i.GetName()+" "+strings.Join(i.GetSlices(), ",")+" "+strings.Join(i.GetSnapshots(), ","))
	}
	if want := "new web \nold  pair@260101-1001"; strings.Join(got, "\n") != want {
		t.Errorf("%q, want %q", got, want)
	}
	if b := list.GetBroken(); len(b) != 1 || !strings.Contains(b[0], `"torn" is not whole`) {
		t.Errorf("broken: %q", b)
	}

	for _, test := range []struct {
		name  string
		force bool
		code  connect.Code // 0: it is removed
		want  string
	}{
		{"../store", true, connect.CodeInvalidArgument, "is no name"},
		{"none", true, connect.CodeNotFound, "no such image"},
		{"new", true, connect.CodeFailedPrecondition, "slice web runs from it"},
		{"old", false, connect.CodeFailedPrecondition, "such as pair@260101-1001"},
		{"old", true, 0, ""},
		{"torn", false, connect.CodeFailedPrecondition, "is not whole"},
		{"torn", true, 0, ""},
	} {
		_, err := s.RemoveImage(operator(t), &violinv1.RemoveImageRequest{Name: test.name, Force: test.force})
		if test.code == 0 && err != nil || test.code != 0 && (connect.CodeOf(err) != test.code || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("%+v: %v", test, err)
		}
	}
	if left, err := os.ReadDir(filepath.Join(state, "images")); err != nil || len(left) != 1 || left[0].Name() != "new" {
		t.Errorf("left: %v, %v", left, err)
	}
}
