package image

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"violin/internal/topology"
)

//go:embed guest
var guest embed.FS

// basePackages are in every image: what /etc/violin/boot needs.
var basePackages = []string{"busybox-static", "iproute2", "qemu-guest-agent"}

// systemdPackages are what an image with systemd has besides: what a cloud's image brings a
// guest up with. busybox is for the initrd.
var systemdPackages = []string{"systemd-sysv", "systemd-resolved", "udev", "dbus", "kmod", "cloud-init", "cloud-guest-utils"}

// virtioModules reach the disk, the network and the hypervisor.
var virtioModules = []string{
	"virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "virtio_rng", "squashfs", "overlay", "qemu_fw_cfg",
}

// tools are what a build runs, and the Debian packages that have them.
var tools = map[string]string{
	"mmdebstrap": "mmdebstrap", "mksquashfs": "squashfs-tools", "cpio": "cpio", "depmod": "kmod",
	"apt-get": "apt", "apt-cache": "apt", "dpkg-deb": "dpkg", "unshare": "util-linux", "chroot": "coreutils",
}

// Build describes a build.
type Build struct {
	Name   string
	Recipe string // the recipe's file
	Dir    string // of all images
	// Step is told what is being done, of how many steps; nil for nobody.
	Step func(n, of int, what string)
	// Log gets what the tools and the recipe's commands print; nil for nobody.
	Log io.Writer
}

const steps = 6

// builder is a build under way.
type builder struct {
	Build
	recipe  *Recipe
	id      string // of the recipe and all that it refers to
	work    string // gone with the build
	root    string // the guest's root file system
	kernel  string // the unpacked kernel package
	version string // of the kernel
}

// Run makes the image, in place of one of the same name once it is whole. It makes
// none, and tells so, if there is one that was made of the same recipe and files.
func (b Build) Run(ctx context.Context) (_ *Info, made bool, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("build image %q: %w", b.Name, err)
		}
	}()
	if err := CheckName(b.Name); err != nil {
		return nil, false, err
	}
	if b.Step == nil {
		b.Step = func(int, int, string) {}
	}
	if b.Log == nil {
		b.Log = io.Discard
	}
	src, err := os.ReadFile(b.Recipe)
	if err != nil {
		return nil, false, err
	}
	w := &builder{Build: b}
	if w.recipe, err = ParseRecipe(b.Recipe, src); err != nil {
		return nil, false, err
	}
	if w.id, err = w.identity(); err != nil {
		return nil, false, err
	}
	if have, err := Open(b.Dir, b.Name); err == nil && have.Recipe == w.id {
		return have, false, nil
	}
	if err := w.check(); err != nil {
		return nil, false, err
	}
	if w.work, err = os.MkdirTemp("", "violin-image-"); err != nil {
		return nil, false, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(w.work)) }()
	w.root, w.kernel = filepath.Join(w.work, "root"), filepath.Join(w.work, "kernel")
	last := w.squash
	if w.recipe.Boot == bootDisk {
		last = w.disk
	}
	for i, step := range [steps]struct {
		what string
		do   func(context.Context) error
	}{
		{"Debian packages (about a minute)", w.packages},
		{"kernel", w.unpackKernel},
		{"initrd", w.initrd},
		{"files", w.files},
		{"commands", w.commands},
		{"root file system", last},
	} {
		b.Step(i+1, steps, step.what)
		if err := step.do(ctx); err != nil {
			return nil, false, fmt.Errorf("%s: %w", step.what, err)
		}
	}
	info, err := w.install()
	return info, err == nil, err
}

// identity is a hash of all that an image is made of, but for the packages' versions.
func (w *builder) identity() (string, error) {
	h := sha256.New()
	part := func(name string, b []byte) { fmt.Fprintf(h, "%s %d\n%s", name, len(b), b) }
	recipe, err := json.Marshal(w.recipe)
	if err != nil {
		return "", err
	}
	part("recipe", recipe)
	err = fs.WalkDir(guest, "guest", func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := guest.ReadFile(p)
		part(p, b)
		return err
	})
	if err != nil {
		return "", err
	}
	for _, f := range w.recipe.Files {
		if f.From == "" {
			continue
		}
		s, err := sum(w.from(f))
		if err != nil {
			return "", fmt.Errorf("%s: file %s: %w", w.Recipe, f.Path, err)
		}
		part(f.Path, []byte(s))
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func (w *builder) from(f File) string {
	if filepath.IsAbs(f.From) {
		return f.From
	}
	return filepath.Join(filepath.Dir(w.Recipe), f.From)
}

// check tells before anything is done whether it can be.
func (w *builder) check() error {
	if os.Geteuid() != 0 {
		return errors.New("it takes root, to make files that belong to others; run it by sudo")
	}
	var missing []string
	needed := maps.Clone(tools)
	if w.recipe.Boot == bootDisk {
		maps.Copy(needed, diskTools)
	}
	for tool, pkg := range needed {
		_, err := exec.LookPath(tool)
		if filepath.IsAbs(tool) {
			_, err = os.Stat(tool) // it runs elsewhere
		}
		if err != nil {
			missing = append(missing, pkg)
		}
	}
	if len(missing) > 0 {
		slices.Sort(missing)
		return fmt.Errorf("this machine lacks the packages %[1]s: apt-get install %[1]s", strings.Join(slices.Compact(missing), " "))
	}
	return nil
}

// run runs a tool. All that it starts ends with it: it has a process namespace of its
// own, and its mounts are its own as well.
func (w *builder) run(ctx context.Context, dir string, stdout io.Writer, name string, args ...string) error {
	args = append([]string{"--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--", name}, args...)
	cmd := exec.CommandContext(ctx, "unshare", args...)
	cmd.Dir = dir
	// A Ctrl-C is for us to tell.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = 10 * time.Second
	tail := &tail{w: w.Log}
	cmd.Stderr = tail
	if cmd.Stdout = stdout; stdout == nil {
		cmd.Stdout = tail
	}
	// The kernel ends it with the thread that starts it, which is to stay until then.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("%s: %w:\n%s", name, err, tail)
	}
	return nil
}

// tail passes on what is written, and keeps the end of it.
type tail struct {
	w   io.Writer
	end []byte
}

const tailBytes = 4 << 10

func (t *tail) Write(p []byte) (int, error) {
	t.end = append(t.end, p...)
	if len(t.end) > tailBytes {
		t.end = bytes.Clone(t.end[len(t.end)-tailBytes:])
	}
	return t.w.Write(p)
}

func (t *tail) String() string { return strings.TrimSpace(string(t.end)) }

// packages makes the root file system, of the sources that this machine uses.
func (w *builder) packages(ctx context.Context) error {
	release, err := codename("/etc/os-release")
	if err != nil {
		return err
	}
	base := slices.Clone(basePackages)
	if w.recipe.Init == initSystemd {
		base = append(base, systemdPackages...)
	}
	args := []string{
		"--quiet", "--variant=minbase", "--mode=root", "--skip=check/empty",
		"--include=" + strings.Join(append(base, w.recipe.Packages...), ","),
		"--aptopt=APT::Install-Recommends \"false\"",
	}
	for _, dir := range []string{"doc", "man", "locale", "info"} {
		args = append(args, "--dpkgopt=path-exclude=/usr/share/"+dir+"/*")
	}
	args = append(args, release, w.root)
	found := 0
	for _, pattern := range []string{"sources.list", "sources.list.d/*.sources", "sources.list.d/*.list"} {
		files, err := filepath.Glob(filepath.Join("/etc/apt", pattern))
		if err != nil {
			return err
		}
		for _, f := range files {
			if st, err := os.Stat(f); err == nil && st.Size() > 0 {
				args = append(args, f)
				found++
			}
		}
	}
	if found == 0 {
		return errors.New("this machine has no apt sources in /etc/apt")
	}
	return w.run(ctx, "", nil, "mmdebstrap", args...)
}

// codename is that of this machine's Debian.
func codename(osRelease string) (string, error) {
	b, err := os.ReadFile(osRelease)
	if err != nil {
		return "", err
	}
	fields := map[string]string{}
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), "="); ok {
			fields[k] = strings.Trim(v, `"'`)
		}
	}
	if fields["ID"] != "debian" || fields["VERSION_CODENAME"] == "" {
		return "", fmt.Errorf("%s: images are made on Debian and of its packages; this is %q", osRelease, fields["PRETTY_NAME"])
	}
	return fields["VERSION_CODENAME"], nil
}

// unpackKernel finds the package that the kernel's depends on, and unpacks it.
func (w *builder) unpackKernel(ctx context.Context) error {
	var out bytes.Buffer
	if err := w.run(ctx, "", &out, "apt-cache", "depends", "--important", w.recipe.Kernel); err != nil {
		return err
	}
	pkg := w.recipe.Kernel // it may be the kernel's own
	for line := range strings.Lines(out.String()) {
		if d, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: linux-image-"); ok {
			pkg = "linux-image-" + d
			break
		}
	}
	if err := w.run(ctx, w.work, nil, "apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", pkg); err != nil {
		return err
	}
	debs, err := filepath.Glob(filepath.Join(w.work, pkg+"_*.deb"))
	if err != nil || len(debs) != 1 {
		return fmt.Errorf("apt-get download %s: %d files came, %w", pkg, len(debs), errors.Join(err))
	}
	if err := w.run(ctx, "", nil, "dpkg-deb", "-x", debs[0], w.kernel); err != nil {
		return err
	}
	versions, err := os.ReadDir(filepath.Join(w.kernel, "lib/modules"))
	if err != nil || len(versions) != 1 {
		return fmt.Errorf("package %s has the modules of %d kernels, not one: is it a kernel's?", pkg, len(versions))
	}
	w.version = versions[0].Name()
	return w.run(ctx, "", nil, "depmod", "-b", w.kernel, w.version)
}

// initrd makes the file system that the kernel finds first.
func (w *builder) initrd(ctx context.Context) error {
	dir := filepath.Join(w.work, "initrd")
	for _, d := range []string{"bin", "proc", "sys", "dev", "ro", "rw", "root"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	modules := virtioModules
	if w.recipe.Boot == bootDisk {
		modules = append(slices.Clone(modules), diskModules...)
	}
	if err := w.modules(ctx, dir, modules); err != nil {
		return err
	}
	if err := copyFile(filepath.Join(w.root, "bin/busybox"), filepath.Join(dir, "bin/busybox"), 0o755); err != nil {
		return err
	}
	if err := os.Symlink("busybox", filepath.Join(dir, "bin/sh")); err != nil {
		return err
	}
	if err := writeGuest("initrd-init", filepath.Join(dir, "init"), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "modules"), []byte(strings.Join(modules, "\n")+"\n"), 0o644); err != nil {
		return err
	}
	f, err := os.Create(filepath.Join(w.work, InitrdFile))
	if err != nil {
		return err
	}
	defer f.Close()
	z, err := gzip.NewWriterLevel(f, gzip.BestSpeed)
	if err != nil {
		return err
	}
	if err := w.run(ctx, dir, z, "sh", "-c", "find . -print0 | sort -z | cpio --quiet --null --reproducible -o -H newc"); err != nil {
		return err
	}
	return errors.Join(z.Close(), f.Close())
}

// modules copies modules of the kernel, and those that they need, below dir. What is
// built into the kernel is there anyway.
func (w *builder) modules(ctx context.Context, dir string, names []string) error {
	from := filepath.Join(w.kernel, "lib/modules", w.version)
	needs, err := os.ReadFile(filepath.Join(from, "modules.dep"))
	if err != nil {
		return err
	}
	builtin, err := os.ReadFile(filepath.Join(from, "modules.builtin"))
	if err != nil {
		return err
	}
	files, err := moduleFiles(needs, builtin, names)
	if err != nil {
		return fmt.Errorf("kernel %s: %w", w.version, err)
	}
	to := filepath.Join(dir, "lib/modules", w.version)
	for _, f := range append(files, "modules.builtin", "modules.order") {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(to, f)), 0o755); err != nil {
			return err
		}
		if err := copyFile(filepath.Join(from, f), filepath.Join(to, f), 0o644); err != nil {
			return err
		}
	}
	return w.run(ctx, "", nil, "depmod", "-b", dir, w.version)
}

// moduleFiles finds modules, and those that they need, in what depmod has written
// (modules.dep(5)).
func moduleFiles(dep, builtin []byte, names []string) ([]string, error) {
	key := func(file string) string { // in a module's name, - and _ are the same
		name, _, _ := strings.Cut(path.Base(file), ".ko")
		return strings.ReplaceAll(name, "-", "_")
	}
	need := map[string][]string{}
	for s := bufio.NewScanner(bytes.NewReader(dep)); s.Scan(); {
		file, others, _ := strings.Cut(s.Text(), ":")
		need[key(file)] = append([]string{file}, strings.Fields(others)...)
	}
	inside := map[string]bool{}
	for line := range strings.Lines(string(builtin)) {
		inside[key(strings.TrimSpace(line))] = true
	}
	var files []string
	for _, n := range names {
		k := key(n)
		if need[k] == nil && !inside[k] {
			return nil, fmt.Errorf("it has no module %q", n)
		}
		files = append(files, need[k]...)
	}
	slices.Sort(files)
	return slices.Compact(files), nil
}

// files puts in what makes the root a guest, and the recipe's files.
func (w *builder) files(ctx context.Context) error {
	begin := w.violinInit
	if w.recipe.Init == initSystemd {
		begin = w.systemdInit
	}
	root, err := os.OpenRoot(w.root) // a link in the image must not lead out of it
	if err != nil {
		return err
	}
	defer root.Close()
	if err := begin(ctx, root); err != nil {
		return err
	}
	for _, f := range w.recipe.Files {
		if err := w.file(root, f); err != nil {
			return fmt.Errorf("%s: file %s: %w", w.Recipe, f.Path, err)
		}
	}
	return nil
}

// systemdInit has systemd find the kernel's modules, and a machine of its own at each first
// boot.
func (w *builder) systemdInit(ctx context.Context, root *os.Root) error {
	from := filepath.Join(w.kernel, "lib/modules", w.version)
	to := filepath.Join(w.root, "usr/lib/modules", w.version)
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		return err
	}
	if err := w.run(ctx, "", nil, "depmod", "-b", w.root, w.version); err != nil {
		return err
	}
	if len(w.recipe.Modules) > 0 {
		content := strings.Join(w.recipe.Modules, "\n") + "\n"
		if err := w.file(root, File{Path: "/etc/modules-load.d/violin.conf", Content: &content}); err != nil {
			return err
		}
	}
	empty := ""
	if err := w.file(root, File{Path: "/etc/machine-id", Content: &empty}); err != nil {
		return err
	}
	if err := root.Remove("etc/hostname"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return w.run(ctx, "", nil, "chroot", w.root, "systemctl", "enable", "systemd-networkd")
}

// violinInit has busybox and /etc/violin/boot bring the guest up.
func (w *builder) violinInit(ctx context.Context, root *os.Root) error {
	for _, f := range []struct {
		name, path string
		mode       fs.FileMode
	}{{"boot", "etc/violin/boot", 0o755}, {"inittab", "etc/inittab", 0o644}} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(w.root, f.path)), 0o755); err != nil {
			return err
		}
		if err := writeGuest(f.name, filepath.Join(w.root, f.path), f.mode); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(filepath.Join(w.root, "var/lib/violin"), 0o755); err != nil {
		return err
	}
	if len(w.recipe.Modules) > 0 {
		if err := w.modules(ctx, w.root, w.recipe.Modules); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(w.root, "etc/modules"), []byte(strings.Join(w.recipe.Modules, "\n")+"\n"), 0o644); err != nil {
			return err
		}
	}
	for _, l := range []struct{ path, to string }{
		{"sbin/init", "/bin/busybox"}, {"etc/hosts", "/run/hosts"}, {"etc/resolv.conf", "/run/resolv.conf"}, {"etc/hostname", ""},
	} {
		if err := root.Remove(l.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if l.to != "" {
			if err := root.Symlink(l.to, l.path); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *builder) file(root *os.Root, f File) error {
	otherwise := fs.FileMode(0o644)
	var in io.Reader
	if f.Content != nil {
		in = strings.NewReader(*f.Content)
	} else {
		src, err := os.Open(w.from(f))
		if err != nil {
			return err
		}
		defer src.Close()
		st, err := src.Stat()
		if err != nil {
			return err
		}
		if !st.Mode().IsRegular() {
			return fmt.Errorf("%s is no regular file", src.Name())
		}
		in, otherwise = src, st.Mode().Perm()
	}
	mode, err := f.mode(otherwise)
	if err != nil {
		return err
	}
	name := strings.TrimPrefix(f.Path, "/")
	if err := root.MkdirAll(path.Dir(name), 0o755); err != nil {
		return err
	}
	if err := root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	out, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Chmod(mode), out.Close())
}

// commands runs the recipe's commands in the root file system.
func (w *builder) commands(ctx context.Context) error {
	for i, line := range w.recipe.Commands {
		fmt.Fprintf(w.Log, "+ %s\n", line)
		err := w.run(ctx, "", nil, "sh", "-euc", `
			mount --rbind /dev "$0/dev"
			mount -t proc proc "$0/proc"
			mount -t tmpfs run "$0/run"
			for f in hosts resolv.conf; do [ ! -r "/etc/$f" ] || cp "/etc/$f" "$0/run/$f"; done
			exec chroot "$0" /usr/bin/env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive /bin/sh -euc "$1"`,
			w.root, line)
		if err != nil {
			return fmt.Errorf("%s: commands[%d] (%s): %w", w.Recipe, i, line, err)
		}
	}
	return nil
}

// squash makes the root file system's file.
func (w *builder) squash(ctx context.Context) error {
	if err := w.clean(); err != nil {
		return err
	}
	return w.run(ctx, "", nil, "mksquashfs", w.root, filepath.Join(w.work, RootFile), "-quiet", "-no-progress", "-comp", "lz4", "-Xhc", "-noappend")
}

// install puts the image where it belongs: whole, or not at all.
func (w *builder) install() (_ *Info, err error) {
	if err := os.MkdirAll(w.Dir, 0o755); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(w.Dir, "."+w.Name+"-") // no image's name
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	info := &Info{Format: kernelFormat, Name: w.Name, Recipe: w.id, Kernel: w.version, Built: time.Now().UTC().Truncate(time.Second), SHA256: map[string]string{}}
	files := map[string]string{
		KernelFile: filepath.Join(w.kernel, "boot/vmlinuz-"+w.version), InitrdFile: filepath.Join(w.work, InitrdFile), RootFile: filepath.Join(w.work, RootFile),
	}
	if w.recipe.Boot == bootDisk {
		from := filepath.Join(w.work, DiskFile)
		size, format, err := InspectDisk(from)
		if err != nil {
			return nil, err
		}
		info.Format, info.Disk = diskFormat, &Disk{Format: format, Size: size, Firmware: topology.Firmwares[0], Guest: w.recipe.Init != initSystemd}
		files = map[string]string{DiskFile: from}
	}
	for name, from := range files {
		if err := copyFile(from, filepath.Join(dir, name), 0o644); err != nil {
			return nil, err
		}
		if info.SHA256[name], err = sum(filepath.Join(dir, name)); err != nil {
			return nil, err
		}
	}
	return place(dir, w.Dir, info)
}

func writeGuest(name, to string, mode fs.FileMode) error {
	b, err := guest.ReadFile("guest/" + name)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, mode)
}

func copyFile(from, to string, mode fs.FileMode) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	n, err := copySparse(out, 0, in, nil)
	return errors.Join(err, out.Truncate(n), out.Sync(), out.Close())
}
