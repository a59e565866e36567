package remote

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	violinv1 "violin/api/violin/v1"
	"violin/internal/agent"
	"violin/internal/hypervisor/qemu"
	"violin/internal/store"
)

// randomBytes is so many bytes that do not compress.
func randomBytes(n int) []byte {
	r := rand.NewChaCha8([32]byte{7})
	b := make([]byte, n)
	_, _ = r.Read(b) // never fails
	return b
}

// A host boots nodes from files of its own that are the server's, and else from what the
// server has sent it.
func TestFiles(t *testing.T) {
	w := newWorld(t)
	path := filepath.Join(t.TempDir(), "kernel")
	kernel := bytes.Join([][]byte{randomBytes(filePart), make([]byte, 3*filePart), randomBytes(1000), make([]byte, 5000)}, nil)
	file := File{Path: path, Hash: store.Sum(kernel), Size: int64(len(kernel))}
	spec := agent.NodeSpec{Name: "n", Machine: qemu.Spec{Kernel: path}, Boot: map[string]store.Hash{"kernel": file.Hash}}
	if err := w.agent.AddNode(t.Context(), spec, false); err == nil || !strings.Contains(err.Error(), "does not have the server's file "+path) {
		t.Error(err)
	}
	write(t, path, string(kernel))
	if err := w.agent.AddNode(t.Context(), spec, false); err != nil || w.host.spec.Machine.Kernel != path {
		t.Error(w.host.spec.Machine.Kernel, err)
	}
	if err := w.agent.Fetch(t.Context(), []File{file}, func(File, int64) { t.Error("a file that the host has was fetched") }); err != nil {
		t.Error(err)
	}

	// One that the server has as an image, and the host not.
	image := filepath.Join(w.hub.cfg.Images, "mpi", "vmlinuz")
	if err := os.MkdirAll(filepath.Dir(image), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path, image); err != nil {
		t.Fatal(err)
	}
	file.Path, spec.Machine.Kernel = image, image
	var done []int64
	if err := w.agent.Fetch(t.Context(), []File{file, file}, func(f File, n int64) { done = append(done, n) }); err != nil {
		t.Fatal(err)
	}
	if len(done) < 2 || done[0] != 0 || done[len(done)-1] != file.Size {
		t.Errorf("told of %v bytes of %d", done, file.Size)
	}
	sent := filepath.Join(w.cfg.Files, file.Hash.String())
	if err := w.agent.AddNode(t.Context(), spec, false); err != nil || w.host.spec.Machine.Kernel != sent {
		t.Error(w.host.spec.Machine.Kernel, err)
	}
	var st unix.Stat_t
	if err := unix.Stat(sent, &st); err != nil || st.Blocks*512 > 2*filePart {
		t.Errorf("%d blocks for a file of mostly zeros: %v", st.Blocks, err)
	}

	// What was damaged is fetched again.
	write(t, sent, "damaged")
	if err := w.agent.AddNode(t.Context(), spec, false); err == nil || !strings.Contains(err.Error(), "is damaged, and removed") {
		t.Error(err)
	}
	if err := w.agent.Fetch(t.Context(), []File{file}, func(File, int64) {}); err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(sent); err != nil || !bytes.Equal(b, kernel) {
		t.Error("not what the server has", err)
	}

	// What the server says a file is, and is no more.
	write(t, image, "changed since")
	file.Hash, file.Size = store.Sum([]byte("before")), 100
	if err := w.agent.Fetch(t.Context(), []File{file}, func(File, int64) {}); err == nil || !strings.Contains(err.Error(), "has changed meanwhile") {
		t.Error(err)
	}
	if left, err := filepath.Glob(filepath.Join(w.cfg.Files, "*")); err != nil || len(left) != 1 {
		t.Error(left, err)
	}
}

// A fetch goes on where it was when its connection was lost.
func TestFetchGoesOn(t *testing.T) {
	w := newWorld(t)
	path := filepath.Join(w.hub.cfg.Images, "disk")
	if err := os.MkdirAll(w.hub.cfg.Images, 0o700); err != nil {
		t.Fatal(err)
	}
	content := randomBytes(24 * filePart)
	write(t, path, string(content))
	file := File{Path: path, Hash: store.Sum(content), Size: int64(len(content))}
	part := filepath.Join(w.cfg.Files, file.Hash.String()+partSuffix)
	var cutAt, began int64
	var cut sync.Once
	go func() {
		for t.Context().Err() == nil {
			if info, err := os.Stat(part); err == nil && info.Size() >= 2*filePart {
				cut.Do(func() {
					w.cable.unplug(true)
					if info, err = os.Stat(part); err == nil {
						cutAt = info.Size()
					}
					time.Sleep(50 * time.Millisecond)
					w.cable.unplug(false)
				})
				return
			}
		}
	}()
	err := w.agent.Fetch(t.Context(), []File{file}, func(_ File, n int64) { began = n })
	if err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(w.cfg.Files, file.Hash.String())); err != nil || !bytes.Equal(b, content) {
		t.Error("not what the server has", err)
	}
	t.Logf("cut off at %d, at the end at %d", cutAt, began)

	// Begun by an agent that has died; and a run gets what it was told of, and nothing else.
	if err := os.Remove(filepath.Join(w.cfg.Files, file.Hash.String())); err != nil {
		t.Fatal(err)
	}
	write(t, part, string(content[:7*filePart+5]))
	first := int64(-1)
	if err := w.agent.Fetch(t.Context(), []File{file}, func(_ File, n int64) {
		if first < 0 {
			first = n
		}
	}); err != nil || first != 7*filePart {
		t.Errorf("went on at %d: %v", first, err)
	}
	other := w.hub.Reserve("alpha", "other")
	if err := other.Begin(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := os.Remove(filepath.Join(w.cfg.Files, file.Hash.String())); err != nil {
		t.Fatal(err)
	}
	_, client, err := other.host.provision()
	if err != nil {
		t.Fatal(err)
	}
	req := &violinv1.FetchRequest{Run: other.run, Files: []*violinv1.NodeFile{w.hub.file(file)}}
	if err := fetch(t.Context(), client, req, func(*violinv1.FetchResponse) {}); err == nil || !strings.Contains(err.Error(), "not what this run was told of") {
		t.Error(err)
	}
}

// Files that have not been used for long go.
func TestSweep(t *testing.T) {
	s := stock{dir: filepath.Join(t.TempDir(), "files")}
	if err := s.sweep(time.Now()); err != nil {
		t.Error(err)
	}
	if err := os.Mkdir(s.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	long := time.Now().Add(-stockFor - time.Hour)
	for _, name := range []string{"old", "used", "new"} {
		write(t, filepath.Join(s.dir, name), name)
		if name != "new" {
			if err := os.Chtimes(filepath.Join(s.dir, name), long, long); err != nil {
				t.Fatal(err)
			}
		}
	}
	s.use(filepath.Join(s.dir, "used"))
	if err := s.sweep(time.Now()); err != nil {
		t.Error(err)
	}
	left, err := filepath.Glob(filepath.Join(s.dir, "*"))
	if err != nil || len(left) != 2 {
		t.Error(left, err)
	}
	if _, err := os.Stat(filepath.Join(s.dir, "old")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}
