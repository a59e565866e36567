package server

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"violin/internal/agent"
	"violin/internal/catalog"
	"violin/internal/cloudinit"
	"violin/internal/hypervisor/qemu"
	"violin/internal/share"
	"violin/internal/topology"
)

// giveable is a slice of a node that boots a disk of its own, and one that boots a kernel.
func giveable(t *testing.T, dir, disk, kernel string) *topology.Topology {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "base"), make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	topo, err := topology.Parse("test", []byte(`version: 1
slice: s
sites: {here: {hosts: [h]}}
nodes:
  disk: {host: h, memory: 64MiB, disks: [{name: system, base: base}]`+disk+`}
  kernel: {host: h, memory: 64MiB, kernel: base`+kernel+`}
`))
	if err != nil {
		t.Fatal(err)
	}
	if err := resolvePaths(topo, dir); err != nil {
		t.Fatal(err)
	}
	return topo
}

// What nodes are given to read is in the store before they start: a seed for who looks for
// one, the same for the same, and directories once, whoever has them.
func TestGive(t *testing.T) {
	if _, err := exec.LookPath(share.Program); err != nil {
		t.Skipf("%v: make deps", err)
	}
	dir := t.TempDir()
	s := newServer(t, t.TempDir(), Storage{})
	if err := os.MkdirAll(filepath.Join(dir, "tools"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "tools/job"), bytes.Repeat([]byte("job\n"), 5000), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "user-data"), []byte("#!/bin/sh\ntrue\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	tell := func(_, _, _ string) {}
	give := func(disk, kernel string) (*topology.Topology, given) {
		t.Helper()
		topo := giveable(t, dir, disk, kernel)
		g, err := s.give(t.Context(), topo, tell)
		if err != nil {
			t.Fatal(err)
		}
		return topo, g
	}
	content := func(g given, node, name string) []byte {
		t.Helper()
		machines := map[string]qemu.Spec{node: {}}
		g.add(machines)
		spec := agent.NodeSpec{Name: node, Machine: machines[node]}
		s.fillGiven(t.Context(), &spec, g[node])
		for _, d := range spec.Machine.Disks {
			if d.Name != name {
				continue
			}
			b := make([]byte, d.Size)
			if err := d.Restore(func(offset uint64, page []byte) error { copy(b[offset:], page); return nil }); err != nil || !d.ReadOnly || spec.Disks[name].IsZero() {
				t.Errorf("disk %s: read-only %v, %v", name, d.ReadOnly, err)
			}
			return b
		}
		t.Fatalf("node %s is not given %s, but %+v", node, name, g[node])
		return nil
	}

	const shares = `, shares: [{name: tools, directory: tools}]`
	topo, g := give(shares+", cloud_init: {user_data_file: user-data}", shares)
	want, err := cloudinit.Seed(topo, topo.Node("disk"), []byte("#!/bin/sh\ntrue\n"))
	if err != nil {
		t.Fatal(err)
	}
	if got := content(g, "disk", "cidata"); !bytes.Equal(got, want) {
		t.Error("the seed is another one")
	}
	if got := content(g, "disk", "tools"); !bytes.Contains(got, []byte("job\njob\n")) {
		t.Error("the share has nothing of the directory")
	}
	if len(g["disk"]) != 2 || len(g["kernel"]) != 1 || g["disk"][0].Blocks != g["kernel"][0].Blocks {
		t.Errorf("given %+v", g)
	}
	// The bytes are those of when the node was started.
	if err := os.WriteFile(filepath.Join(dir, "tools/job"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := content(g, "kernel", "tools"); !bytes.Contains(got, []byte("job\njob\n")) {
		t.Error("the share has changed with the directory")
	}
	snap := &catalog.Snapshot{Nodes: []catalog.Node{{Name: "disk", Disks: append([]catalog.Disk{{Name: "system"}}, g["disk"]...)}}}
	if again := givenIn(snap); len(again["disk"]) != 2 || again["disk"][1] != g["disk"][1] {
		t.Errorf("of the snapshot: %+v", again)
	}

	for _, more := range []string{"", ", cloud_init: true"} {
		if _, g := give(more, ""); len(g["disk"]) != 1 || len(g["kernel"]) != 0 {
			t.Errorf("%q: given %+v", more, g)
		}
	}
	if _, g := give(", cloud_init: false", ", cloud_init: true"); len(g["disk"]) != 0 || len(g["kernel"]) != 1 {
		t.Errorf("given %+v", g)
	}

	for _, c := range []struct{ more, field, want string }{
		{`, shares: [{name: tools, directory: none}]`, "nodes.disk.shares[0].directory", "no such file"},
		{`, shares: [{name: tools, directory: base}]`, "nodes.disk.shares[0].directory", "is no directory"},
		{`, cloud_init: {user_data_file: none}`, "nodes.disk.cloud_init.user_data_file", "no such file"},
		{`, cloud_init: {user_data_file: base}`, "nodes.disk.cloud_init.user_data_file", "can't be printed"},
		{`, cloud_init: {user_data_file: tools}`, "nodes.disk.cloud_init.user_data_file", "is no regular file"},
	} {
		_, err := s.give(t.Context(), giveable(t, dir, c.more, ""), tell)
		var f *fieldError
		if !errors.As(err, &f) || f.field != c.field || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", c.more, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.give(ctx, giveable(t, dir, shares, ""), tell); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if left, _ := filepath.Glob(filepath.Join(s.cfg.StateDir, "share-*")); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}
