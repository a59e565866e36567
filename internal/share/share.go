// Package share makes a read-only file system of a directory, for guests to see it.
//
// It is squashfs, which every kernel of a distribution mounts, and not compressed: it is
// read by guests whose processors are emulated, and the store compresses what it keeps.
// The same files with the same times make the same bytes.
package share

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// Program makes the file system; Debian has it in the package squashfs-tools.
const Program = "mksquashfs"

// Limits bound what a share holds.
type Limits struct {
	Bytes int64 // in its files
	Files int   // and directories, links
}

// DefaultLimits are what one share may hold: each node that has it has a file of it in its
// run directory, which is memory on many machines.
var DefaultLimits = Limits{Bytes: 1 << 30, Files: 200_000}

// Check refuses what can't be shared: what is no directory, has more in it than the limits
// allow, or holds what is no file, directory or link.
func Check(ctx context.Context, dir string, limits Limits) error {
	if st, err := os.Stat(dir); err != nil {
		return err
	} else if !st.IsDir() {
		return fmt.Errorf("%s is no directory", dir)
	}
	at, err := filepath.EvalSymlinks(dir) // which Make follows as well
	if err != nil {
		return err
	}
	var bytes int64
	files := 0
	return filepath.WalkDir(at, func(path string, d fs.DirEntry, err error) error {
		if err == nil {
			err = context.Cause(ctx)
		}
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		files++
		switch mode := info.Mode(); {
		case mode.IsRegular():
			bytes += info.Size()
		case mode.IsDir(), mode&fs.ModeSymlink != 0:
		default:
			return fmt.Errorf("%s is no file, directory or link, and can't be shared: take it out", path)
		}
		if bytes > limits.Bytes {
			return fmt.Errorf("%s holds more than %d MiB, which is the most that is shared: give it to the node as a disk", dir, limits.Bytes>>20)
		}
		if files > limits.Files {
			return fmt.Errorf("%s holds more than %d files, which is the most that is shared", dir, limits.Files)
		}
		return nil
	})
}

// Make writes the file system of a directory to a file. A context that ends ends it.
func Make(ctx context.Context, dir string, to *os.File) error {
	at, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, Program, at, "/proc/self/fd/3", "-noappend", "-no-progress", "-quiet",
		"-mkfs-time", "0", "-processors", "1", "-no-exports", "-noI", "-noD", "-noF", "-noX")
	cmd.ExtraFiles = []*os.File{to}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = 5 * time.Second
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	// The kernel ends it with the thread that starts it, which is to stay until then.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	switch err := cmd.Run(); {
	case errors.Is(err, exec.ErrNotFound):
		return fmt.Errorf("make a file system of %s: %w: install squashfs-tools", dir, err)
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return fmt.Errorf("make a file system of %s: %s: %w: %s", dir, Program, err, strings.TrimSpace(said.String()))
	}
	return nil
}
