package image

import (
	"errors"
	"reflect"
	"slices"
	"strings"
	"testing"
)

const whole = `# a web server
version: 1
kernel: linux-image-amd64
modules: [8021q, nf-tables]
packages: [nginx-light, g++]
files:
  - {path: /usr/local/bin/job, from: job, mode: 755}
  - {path: /etc/motd, content: "hello\n"}
  - path: /etc/empty
    content: ""
commands:
  - useradd -m alice
  - |
    echo one
    echo two
`

func TestParseRecipe(t *testing.T) {
	hello, empty := "hello\n", ""
	got, err := ParseRecipe("web.yaml", []byte(whole))
	want := &Recipe{
		Version: 1, Kernel: "linux-image-amd64", Modules: []string{"8021q", "nf-tables"}, Packages: []string{"nginx-light", "g++"},
		Files:    []File{{Path: "/usr/local/bin/job", From: "job", Mode: "755"}, {Path: "/etc/motd", Content: &hello}, {Path: "/etc/empty", Content: &empty}},
		Commands: []string{"useradd -m alice", "echo one\necho two\n"},
		Boot:     "kernel",
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v\nwant %+v", got, err, want)
	}
	if got, err := ParseRecipe("least.yaml", []byte("version: 1\n")); err != nil || got.Kernel != defaultKernel {
		t.Errorf("%+v, %v", got, err)
	}
	for src, want := range map[string]int64{"boot: disk\n": 1 << 30, "boot: disk\nsize: 2GiB\n": 2 << 30} {
		if r, err := ParseRecipe("disk.yaml", []byte("version: 1\n"+src)); err != nil || r.Boot != "disk" || r.size() != want {
			t.Errorf("%q: %+v, %v", src, r, err)
		}
	}
	for mode, want := range map[string]uint32{"755": 0o755, `"0640"`: 0o640, "0600": 0o600, "600": 0o600} {
		r, err := ParseRecipe("mode.yaml", []byte("version: 1\nfiles: [{path: /x, content: x, mode: "+mode+"}]\n"))
		if err != nil {
			t.Errorf("mode %s: %v", mode, err)
			continue
		}
		if m, err := r.Files[0].mode(0); err != nil || uint32(m) != want {
			t.Errorf("mode %s: %o, %v", mode, m, err)
		}
	}
}

func TestRecipeMistakes(t *testing.T) {
	for _, test := range []struct{ src, want string }{
		{"", "r.yaml:1:1: one document is wanted"},
		{"version: 1\n---\nversion: 1\n", "r.yaml:1:1: one document is wanted"},
		{"version: 2\n", "r.yaml:1:10: version: 2 is none"},
		{"packages: []\n", "r.yaml:1:1: version: 0 is none"},
		{"version: 1\nboot: net\n", `r.yaml:2:7: boot: "net" is neither kernel nor disk`},
		{"version: 1\nboot: disk\ninit: upstart\n", `r.yaml:3:7: init: "upstart" is neither violin nor systemd`},
		{"version: 1\ninit: systemd\n", "r.yaml:2:7: init: systemd needs a disk of its own"},
		{"version: 1\nsize: 2GiB\n", "r.yaml:2:7: size: it is that of a disk"},
		{"version: 1\nboot: disk\nsize: 2 GB\n", `r.yaml:3:7: size: "2 GB": not a whole number with a unit`},
		{"version: 1\nboot: disk\nsize: 1MiB\n", "r.yaml:3:7: size: 1MiB is not between 64 MiB and 16 TiB"},
		{"version: 1\npackage: [x]\n", `r.yaml:2:1: unknown field "package"`},
		{"version: 1\npackages: x\n", "r.yaml:2:11: "},
		{"version: 1\npackages: [nginx, 'rm -rf /']\n", `r.yaml:2:19: packages[1]: "rm -rf /" is no name of a Debian package`},
		{"version: 1\npackages: [--foo]\n", `r.yaml:2:12: packages[0]: "--foo" is no name`},
		{"version: 1\nkernel: ../x\n", "r.yaml:2:9: kernel: "},
		{"version: 1\nmodules: [a/b]\n", "r.yaml:2:11: modules[0]: "},
		{"version: 1\nfiles:\n  - {path: etc/x, content: y}\n", `r.yaml:3:12: files[0].path: "etc/x" is no absolute path`},
		{"version: 1\nfiles:\n  - {path: /a/../b, content: y}\n", "files[0].path: "},
		{"version: 1\nfiles: [{path: /b, content: y}, {path: /b, content: z}]\n", "r.yaml:2:40: files[1].path: /b is there twice"},
		{"version: 1\nfiles: [{path: /b}]\n", "files[0]: /b: give either from"},
		{"version: 1\nfiles: [{path: /b, from: x, content: y}]\n", "files[0]: /b: give either from"},
		{"version: 1\nfiles: [{content: y}]\n", "files[0]: there is no path"},
		{"version: 1\nfiles: [{path: /b, content: y, mode: 4755}]\n", `r.yaml:2:38: files[0].mode: "4755" is no octal mode`},
		{"version: 1\nfiles: [{path: /b, content: y, mode: rwx}]\n", `files[0].mode: "rwx" is no octal mode`},
		{"version: 1\ncommands: ['  ']\n", "r.yaml:2:12: commands[0]: it is no command"},
		{"version: [\n", "r.yaml:1:"},
		{strings.Repeat("#", maxRecipe+1), "this is no recipe"},
	} {
		r, err := ParseRecipe("r.yaml", []byte(test.src))
		var mistake *RecipeError
		if r != nil || !errors.As(err, &mistake) || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%.60q: %v, %v, want %q", test.src, r, err, test.want)
		}
	}
	// All mistakes are told at once.
	if _, err := ParseRecipe("r.yaml", []byte("version: 3\nkernel: X\npackages: [Y]\n")); strings.Count(err.Error(), "\n") != 2 {
		t.Errorf("%v", err)
	}
}

func FuzzParseRecipe(f *testing.F) {
	f.Add([]byte(whole))
	f.Add([]byte("version: 1\nfiles: [{path: /b, from: x}]\n"))
	f.Add([]byte("version: 1\nfiles: &a [*a]\n"))
	f.Fuzz(func(t *testing.T, src []byte) {
		r, err := ParseRecipe("r.yaml", src)
		if (r == nil) == (err == nil) {
			t.Fatalf("%v, %v", r, err)
		}
		if err != nil {
			return
		}
		for _, file := range r.Files {
			if _, err := file.mode(0o644); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func TestModuleFiles(t *testing.T) {
	dep := "kernel/net/8021q/8021q.ko: kernel/net/802/garp.ko kernel/net/llc/llc.ko\n" +
		"kernel/net/802/garp.ko: kernel/net/llc/llc.ko\n" +
		"kernel/net/llc/llc.ko:\nkernel/drivers/virtio-rng.ko.xz:\n"
	builtin := "kernel/fs/squashfs/squashfs.ko\n"
	got, err := moduleFiles([]byte(dep), []byte(builtin), []string{"8021q", "garp", "virtio_rng", "squashfs"})
	want := []string{"kernel/drivers/virtio-rng.ko.xz", "kernel/net/802/garp.ko", "kernel/net/8021q/8021q.ko", "kernel/net/llc/llc.ko"}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := moduleFiles([]byte(dep), []byte(builtin), []string{"no_such"}); err == nil || !strings.Contains(err.Error(), `no module "no_such"`) {
		t.Error(err)
	}
}
