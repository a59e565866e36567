package image

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What is imported is byte for byte the file; what does not fit leaves nothing behind, and
// what was there before.
func TestImport(t *testing.T) {
	top := t.TempDir()
	dir := filepath.Join(top, "images")
	file := func(name string, b []byte) string {
		t.Helper()
		path := filepath.Join(top, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	raw := make([]byte, 3*copyBytes+512) // with holes
	copy(raw[copyBytes+7:], "a boot loader")
	copy(raw[3*copyBytes:], "the end")
	disk := file("raw", raw)
	var copied int64
	info, err := Import{Name: "web", File: disk, Dir: dir, Copied: func(done, of int64) {
		if copied = done; of != int64(len(raw)) {
			t.Errorf("of %d bytes", of)
		}
	}}.Run(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	sha := info.SHA256[DiskFile]
	if info.Name != "web" || info.Disk.Size != uint64(len(raw)) || info.Disk.Format != "raw" || info.Disk.Firmware != "bios" || info.Disk.Guest || copied != int64(len(raw)) {
		t.Errorf("%+v, %+v, %d bytes copied", info, info.Disk, copied)
	}
	same := func() {
		t.Helper()
		if b, err := os.ReadFile(filepath.Join(dir, "web", DiskFile)); err != nil || !bytes.Equal(b, raw) {
			t.Errorf("the file was changed: %d bytes, %v", len(b), err)
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
			t.Errorf("there is %v, %v", entries, err)
		}
		if all, err := List(dir); err != nil || len(all) != 1 || all[0].Main() != DiskFile {
			t.Errorf("%v, %v", all, err)
		}
	}
	same()
	ended, end := context.WithCancel(t.Context())
	end()
	for _, tt := range []struct {
		m    Import
		ctx  context.Context
		want string
		fit  bool
	}{
		{m: Import{Name: "Web", File: disk}, want: "is no name of an image", fit: true},
		{m: Import{Name: "web", File: filepath.Join(top, "none")}, want: "no such file"},
		{m: Import{Name: "web", File: file("xz", append([]byte("\xfd7zXZ\x00"), raw...))}, want: "unpack it first"},
		{m: Import{Name: "web", File: disk, Firmware: "coreboot"}, want: "is none of bios, uefi"},
		{m: Import{Name: "web", File: disk, SHA256: "123"}, want: "is no SHA-256"},
		{m: Import{Name: "web", File: disk, SHA256: strings.Repeat("5a", 32)}, want: "it has SHA-256 " + sha},
		{m: Import{Name: "web", File: disk}, ctx: ended, want: context.Canceled.Error(), fit: true},
	} {
		tt.m.Dir = dir
		if tt.ctx == nil {
			tt.ctx = t.Context()
		}
		var unfit *UnfitError
		info, err := tt.m.Run(tt.ctx)
		if info != nil || err == nil || !strings.Contains(err.Error(), tt.want) || errors.As(err, &unfit) == tt.fit {
			t.Errorf("%+v: %+v, %v; want %q", tt.m, info, err, tt.want)
		}
		same()
	}
	// Another of the same name takes its place.
	raw[5] = 1
	if _, err := (Import{Name: "web", File: file("raw", raw), SHA256: "", Firmware: "uefi", Dir: dir}).Run(t.Context()); err != nil {
		t.Error(err)
	}
	same()
	if info, err := Open(dir, "web"); err != nil || info.Disk.Firmware != "uefi" {
		t.Errorf("%+v, %v", info, err)
	}
}
