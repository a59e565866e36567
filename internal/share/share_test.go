package share

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func directory(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string]string{"bin/job": "#!/bin/sh\necho x\n", "large": strings.Repeat("0123456789abcdef", 10_000)} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o755); err != nil {
			t.Fatal(err)
		}
		at := time.Unix(1_700_000_000, 0)
		if err := os.Chtimes(filepath.Join(dir, name), at, at); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("bin/job", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	return dir
}

// made is the file system of a directory, in a file without a name.
func made(t *testing.T, dir string) []byte {
	t.Helper()
	if _, err := exec.LookPath(Program); err != nil {
		t.Skipf("%v: make deps", err)
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "share"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := os.Remove(f.Name()); err != nil {
		t.Fatal(err)
	}
	if err := Make(t.Context(), dir, f); err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<30))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestMake(t *testing.T) {
	dir := directory(t)
	first := made(t, dir)
	if len(first)%4096 != 0 || !bytes.HasPrefix(first, []byte("hsqs")) {
		t.Fatalf("%d bytes, from %.4q on", len(first), first)
	}
	if !bytes.Equal(first, made(t, dir)) {
		t.Error("the same directory makes different bytes")
	}
	file := filepath.Join(t.TempDir(), "share")
	if err := os.WriteFile(file, first, 0o600); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), "out")
	if b, err := exec.Command("unsquashfs", "-quiet", "-no-progress", "-d", out, file).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, b)
	}
	if b, err := exec.Command("diff", "-r", "--no-dereference", dir, out).CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, b)
	}
}

func TestCheck(t *testing.T) {
	dir := directory(t)
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	for _, good := range []string{dir, link} {
		if err := Check(t.Context(), good, DefaultLimits); err != nil {
			t.Error(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Check(ctx, dir, DefaultLimits); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	for want, c := range map[string]struct {
		dir    string
		limits Limits
	}{
		"no such file":      {filepath.Join(dir, "none"), DefaultLimits},
		"is no directory":   {filepath.Join(dir, "large"), DefaultLimits},
		"more than 0 MiB":   {link, Limits{100_000, 100}},
		"more than 3 files": {dir, Limits{1 << 20, 3}},
	} {
		if err := Check(t.Context(), c.dir, c.limits); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	if err := syscall.Mkfifo(filepath.Join(dir, "bin/fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Check(t.Context(), dir, DefaultLimits); err == nil || !strings.Contains(err.Error(), "bin/fifo is no file") {
		t.Error(err)
	}
}
