package image

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// put makes a directory that looks like an image, but for the files left out.
func put(t *testing.T, dir, name, info string, without ...string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
		t.Fatal(err)
	}
files:
	for _, f := range []string{KernelFile, InitrdFile, RootFile, infoFile} {
		for _, w := range without {
			if f == w {
				continue files
			}
		}
		content := "content"
		if f == infoFile {
			content = info
		}
		if err := os.WriteFile(filepath.Join(dir, name, f), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func TestListAndRemove(t *testing.T) {
	dir := t.TempDir()
	good := `{"format": 1, "name": "another", "kernel": "6.1"}`
	put(t, dir, "web", good)
	put(t, dir, ".web-123", good) // a build that was cut short
	put(t, dir, "half", good, RootFile)
	put(t, dir, "bare", good, infoFile)
	put(t, dir, "future", `{"format": 9}`)
	all, err := List(dir)
	if len(all) != 1 || all[0].Name != "web" || all[0].Kernel != "6.1" || all[0].Bytes != 21 {
		t.Errorf("%+v", all)
	}
	for _, want := range []string{`image "half" is not whole`, `image "bare": there is no such image`, `image "future": image.json has format 9`} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	for _, name := range []string{"web", "half", "bare"} {
		if err := Remove(dir, name); err != nil {
			t.Error(err)
		}
		if err := Remove(dir, name); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s, removed twice: %v", name, err)
		}
	}
	for _, name := range []string{"", ".", "..", "../web", "a/b", ".web-123", "Web", "-x", strings.Repeat("x", 64)} {
		if err := Remove(dir, name); err == nil {
			t.Errorf("%q is removed", name)
		}
		if _, err := Open(dir, name); err == nil {
			t.Errorf("%q is opened", name)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, ".web-123")); err != nil {
		t.Error(err)
	}
	if all, err := List(filepath.Join(dir, "none")); err != nil || len(all) != 0 {
		t.Errorf("%v, %v", all, err)
	}
}

// A file goes where its path says, and a link in the image does not lead out of it.
func TestFiles(t *testing.T) {
	top := t.TempDir()
	for _, d := range []string{"image/usr/bin", "image/etc", "outside"} {
		if err := os.MkdirAll(filepath.Join(top, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for link, to := range map[string]string{"image/bin": "usr/bin", "image/out": "../outside", "image/abs": filepath.Join(top, "outside"), "image/etc/hosts": "/run/hosts"} {
		if err := os.Symlink(to, filepath.Join(top, link)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(top, "job"), []byte("a program"), 0o751); err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(filepath.Join(top, "image"))
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	w := &builder{Build: Build{Recipe: filepath.Join(top, "image.yaml")}}
	content := "text"
	for _, test := range []struct {
		file  File
		lands string // below top; none if it is refused
		mode  os.FileMode
	}{
		{File{Path: "/bin/job", From: "job"}, "image/usr/bin/job", 0o751},
		{File{Path: "/bin/job", From: "job", Mode: "700"}, "image/usr/bin/job", 0o700},
		{File{Path: "/etc/new/deep/file", Content: &content}, "image/etc/new/deep/file", 0o644},
		{File{Path: "/etc/hosts", Content: &content}, "image/etc/hosts", 0o644},
		{File{Path: "/out/x", Content: &content}, "", 0},
		{File{Path: "/abs/x", Content: &content}, "", 0},
		{File{Path: "/etc/x", From: "missing"}, "", 0},
		{File{Path: "/etc/x", From: "image"}, "", 0},
	} {
		err := w.file(root, test.file)
		if test.lands == "" {
			if err == nil {
				t.Errorf("%s is taken", test.file.Path)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", test.file.Path, err)
			continue
		}
		st, err := os.Lstat(filepath.Join(top, test.lands))
		if err != nil || st.Mode() != test.mode {
			t.Errorf("%s: %v, %v", test.file.Path, st, err)
		}
	}
	if left, err := os.ReadDir(filepath.Join(top, "outside")); err != nil || len(left) != 0 {
		t.Errorf("outside the image: %v, %v", left, err)
	}
}
