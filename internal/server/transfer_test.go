package server

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"connectrpc.com/connect"

	violinv1 "violin/api/violin/v1"
	"violin/internal/topology"
)

func export(t *testing.T, s *Server, snapshot, passphrase string) []byte {
	t.Helper()
	stream, err := dial(t, s).Export(t.Context(), &violinv1.ExportRequest{Snapshot: snapshot, Passphrase: passphrase})
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	var file []byte
	for stream.Receive() {
		file = append(file, stream.Msg().GetData()...)
	}
	if err := stream.Err(); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestExportImport(t *testing.T) {
	from, to := newServer(t, t.TempDir(), Storage{}), newServer(t, t.TempDir(), Storage{})
	snap := keep(t, from, "one", "release", noon, 1)
	const secret = "correct horse battery"
	file := export(t, from, "pair@release", secret)
	plain := export(t, from, "pair@release", "")
	c := dial(t, to)

	send := func(ctx context.Context, passphrase string, parts ...[]byte) (*violinv1.ImportResponse, error) {
		stream, err := c.Import(ctx)
		if err != nil {
			t.Fatal(err)
		}
		_ = stream.Send(&violinv1.ImportRequest{Passphrase: passphrase})
		for _, p := range parts {
			if p == nil {
				return nil, nil // the caller goes away
			}
			_ = stream.Send(&violinv1.ImportRequest{Data: p})
		}
		return stream.CloseAndReceive()
	}
	gone, cancel := context.WithCancel(t.Context())
	_, _ = send(gone, secret, file[:len(file)-1], nil)
	cancel()
	for _, test := range []struct {
		passphrase string
		file       []byte
		code       connect.Code
	}{
		{"", file, connect.CodeInvalidArgument},
		{"wrong horse battery", file, connect.CodeInvalidArgument},
		{secret, file[:len(file)/2], connect.CodeInvalidArgument}, // of so short a file, nothing opens
		{"", plain[:len(plain)/2], connect.CodeDataLoss},
		{secret, plain, connect.CodeInvalidArgument},
		{secret, []byte("something else"), connect.CodeDataLoss},
	} {
		if _, err := send(t.Context(), test.passphrase, test.file); connect.CodeOf(err) != test.code {
			t.Errorf("passphrase %q: %v, want %v", test.passphrase, err, test.code)
		}
	}
	if all, err := to.catalog.List(t.Context(), ""); err != nil || len(all) > 0 {
		t.Errorf("visible before it is whole: %v, %v", all, err)
	}
	r, err := send(t.Context(), secret, file[:1000], file[1000:])
	if err != nil {
		t.Fatal(err)
	}
	if r.GetPages() != 80 || r.GetNewPages() != 80 || r.GetSnapshot().GetTag() != "release" {
		t.Errorf("imported %v", r)
	}
	if err := to.sound(t.Context(), snap); err != nil {
		t.Error(err)
	}
	if _, err := send(t.Context(), secret, file); connect.CodeOf(err) != connect.CodeAlreadyExists {
		t.Errorf("again: %v", err)
	}
}

// A restore is refused where a node would find another root file system.
func TestBootFilesAreCompared(t *testing.T) {
	s := newServer(t, t.TempDir(), Storage{})
	dir := t.TempDir()
	write := func(name, text string) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	topo := &topology.Topology{Slice: "pair", Nodes: []topology.Node{{Name: "rank0", Kernel: write("kernel", "k"), RootFS: write("rootfs", "root")}}}
	machines, err := s.machines(topo)
	if err != nil {
		t.Fatal(err)
	}
	boot, err := s.bootFiles(machines)
	if err != nil {
		t.Fatal(err)
	}
	snap := keep(t, s, "one", "", noon, 1)
	snap.Nodes = snap.Nodes[:1]
	snap.Nodes[0].Boot = boot["rank0"]
	if err := s.checkBoot(topo, snap); err != nil || len(boot["rank0"]) != 2 {
		t.Errorf("%v: %v", boot, err)
	}
	rootfs := write("rootfs", "another")
	if err := s.checkBoot(topo, snap); err == nil || !strings.Contains(err.Error(), `node "rank0": rootfs `+rootfs) || strings.Contains(err.Error(), "kernel") {
		t.Errorf("another rootfs: %v", err)
	}
	if err := os.Remove(rootfs); err != nil {
		t.Fatal(err)
	}
	if err := s.checkBoot(topo, snap); err == nil {
		t.Error("without a rootfs")
	}
}
