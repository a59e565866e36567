package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
	"violin/internal/image"
	"violin/internal/topology"
)

func (a *app) imageCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "image",
		Short: "Build, import and look after what nodes boot from",
		Long: `Build, import and look after images: what a topology's 'image: NAME' stands for. They are in
the state directory. A snapshot is restored on the very build that its nodes booted
from, and on no other, since their memory refers to its blocks.`,
	}
	cmd.AddCommand(a.imageBuildCommand(), a.imageImportCommand(), a.imageListCommand(), a.imageRemoveCommand())
	return cmd
}

func (a *app) imageBuildCommand() *cobra.Command {
	var recipe string
	var verbose bool
	cmd := &cobra.Command{
		Use:   "build NAME -f RECIPE",
		Short: "Build an image of Debian packages and files of your own",
		Long: `Build an image from a recipe, of the packages of the Debian that this machine runs and
by its apt sources. It takes root and some minutes, and no loop device; what is
mounted meanwhile ends with the build, however that ends.

A recipe is YAML:

  version: 1
  packages: [nginx-light, iperf3]     # beside busybox, iproute2 and the guest agent
  modules: [8021q]                    # of the kernel, loaded at boot
  kernel: linux-image-cloud-amd64     # the default
  files:
    - {path: /usr/local/bin/job, from: job, mode: 755}    # from is relative to the recipe
    - {path: /etc/motd, content: "welcome\n"}
  commands:                           # in the image, after packages and files
    - useradd -m alice
  boot: disk                          # all on a disk, for BIOS and UEFI; kernel by default
  size: 2GiB                          # of the disk's root file system

An image of the same name is replaced once the new one is whole; nodes that run from
it are not disturbed, but snapshots of theirs need the old one: 'violin image ls'
tells which. Nothing is done if the image was built of the same recipe and files.`,
		Example: `  violin image build web -f web/image.yaml`,
		Args: func(cmd *cobra.Command, args []string) error {
			if recipe == "" {
				return errors.New("name the recipe by -f FILE")
			}
			return cobra.ExactArgs(1)(cmd, args)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.imageBuild(cmd.Context(), args[0], recipe, verbose)
		},
	}
	cmd.Flags().StringVarP(&recipe, "file", "f", "", "the recipe's `file`")
	cmd.Flags().BoolVarP(&verbose, "verbose", "v", false, "print what the tools and commands print")
	return cmd
}

func (a *app) imageBuild(ctx context.Context, name, recipe string, verbose bool) error {
	if err := image.CheckName(name); err != nil {
		return &failure{code: exitUsage, err: err}
	}
	if err := a.here("image build", "writes to the state directory of the server's machine"); err != nil {
		return err
	}
	dirs, err := a.dirs()
	if err != nil {
		return err
	}
	p := a.progress()
	defer p.done()
	build := image.Build{
		Name: name, Recipe: recipe, Dir: filepath.Join(dirs.State, "images"),
		Step: func(n, of int, what string) { p.step(fmt.Sprintf("%d/%d", n, of), "", what) },
	}
	if verbose {
		build.Log = a.err
	}
	info, made, err := build.Run(ctx)
	var mistake *image.RecipeError
	switch {
	case errors.As(err, &mistake), errors.Is(err, os.ErrNotExist):
		return &failure{code: exitUsage, err: err}
	case err != nil:
		return err
	}
	p.done()
	if !made {
		a.note("image %s is up to date", name)
	}
	return a.print(&violinv1.Image{Name: info.Name, Kernel: info.Kernel, Bytes: uint64(info.Bytes), Built: timestamppb.New(info.Built)}, func(w io.Writer) {
		fmt.Fprintf(w, "%s  kernel %s, %s\n", info.Name, info.Kernel, formatBytes(uint64(info.Bytes)))
	})
}

func (a *app) imageImportCommand() *cobra.Command {
	var m image.Import
	cmd := &cobra.Command{
		Use:   "import FILE",
		Short: "Make an image of a disk image of your own",
		Long: `Make an image of a qcow2 or raw disk image, such as a distribution's cloud image. It is
copied as it is. A node that has it begins with what is on it, on a disk named root, which
is part of the node's snapshots; the image itself is only read.

The disk is booted by the BIOS, or by UEFI (which takes Debian's package ovmf on the
hosts); a node's 'firmware' in the topology overrides that.`,
		Example: `  violin image import debian-12-genericcloud-amd64.qcow2 --name debian
  violin image import appliance.raw --firmware uefi --sha256 9f86d081...`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			m.File = args[0]
			return a.imageImport(cmd.Context(), m)
		},
	}
	cmd.Flags().StringVar(&m.Name, "name", "", "the image's `name`; that of the file, without what follows its last dot, by default")
	cmd.Flags().StringVar(&m.Firmware, "firmware", topology.Firmwares[0], strings.Join(topology.Firmwares, " or "))
	cmd.Flags().StringVar(&m.SHA256, "sha256", "", "refuse a file that has not this `hash`")
	return cmd
}

func (a *app) imageImport(ctx context.Context, m image.Import) error {
	if m.Name == "" {
		m.Name = strings.ToLower(strings.TrimSuffix(filepath.Base(m.File), filepath.Ext(m.File)))
	}
	if err := image.CheckName(m.Name); err != nil {
		return &failure{code: exitUsage, err: fmt.Errorf("%w; give one by --name", err)}
	}
	if err := a.here("image import", "writes to the state directory of the server's machine"); err != nil {
		return err
	}
	dirs, err := a.dirs()
	if err != nil {
		return err
	}
	m.Dir = filepath.Join(dirs.State, "images")
	p := a.progress()
	defer p.done()
	percent := int64(-1)
	m.Copied = func(done, of int64) {
		if now := done * 100 / max(of, 1); now/25 != percent/25 {
			percent = now
			p.step("copy", "", fmt.Sprintf("%d %%", now))
		}
	}
	info, err := m.Run(ctx)
	var unfit *image.UnfitError
	switch {
	case errors.As(err, &unfit):
		return &failure{code: exitUsage, err: err}
	case err != nil:
		return err
	}
	p.done()
	i := &violinv1.Image{
		Name: info.Name, Bytes: uint64(info.Bytes), Built: timestamppb.New(info.Built),
		Disk: &violinv1.ImageDisk{Format: info.Disk.Format, Bytes: info.Disk.Size, Firmware: info.Disk.Firmware},
	}
	return a.print(i, func(w io.Writer) {
		fmt.Fprintf(w, "%s  %s, %s\n", i.GetName(), bootsFrom(i), formatBytes(i.GetBytes()))
	})
}

// bootsFrom says in a few words what an image is.
func bootsFrom(i *violinv1.Image) string {
	if d := i.GetDisk(); d != nil {
		return fmt.Sprintf("disk of %s, %s, %s", formatBytes(d.GetBytes()), d.GetFormat(), d.GetFirmware())
	}
	return "kernel " + i.GetKernel()
}

func (a *app) imageListCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "ls",
		Short: "List the images",
		Long: `List the images. SLICES run from an image of that name; SNAPSHOTS are those that can be
restored on just this build of it.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.imageList(cmd.Context()) },
	}
}

func (a *app) imageList(ctx context.Context) error {
	p := a.progress()
	defer p.done()
	c, err := start(ctx, a, p, violinv1connect.NewImageServiceClient)
	if err != nil {
		return err
	}
	list, err := c.ListImages(ctx, &violinv1.ListImagesRequest{})
	if err != nil {
		return err
	}
	p.done()
	for _, b := range list.GetBroken() {
		a.note("%s", printable(b))
	}
	if len(list.GetImages()) == 0 {
		a.note("no images; 'violin image build' and 'violin image import' make one")
	}
	return a.print(list, func(w io.Writer) {
		if len(list.GetImages()) == 0 {
			return
		}
		t := newTable("IMAGE", "BOOTS", ">SIZE", "BUILT", "SLICES", ">SNAPSHOTS")
		for _, i := range list.GetImages() {
			t.row(i.GetName(), bootsFrom(i), formatBytes(i.GetBytes()), a.formatTime(i.GetBuilt()), strings.Join(i.GetSlices(), " "), fmt.Sprint(len(i.GetSnapshots())))
		}
		t.write(w)
	})
}

func (a *app) imageRemoveCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "rm NAME",
		Short: "Remove an image that nothing needs",
		Long: `Remove an image. One that a slice runs from is refused (exit status 5), and so is one that
snapshots are restored on, unless --force is given: they can then be looked into, but
not be restored, until the very same files are put back.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.imageRemove(cmd.Context(), args[0], force)
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "although snapshots need it")
	return cmd
}

func (a *app) imageRemove(ctx context.Context, name string, force bool) error {
	p := a.progress()
	defer p.done()
	c, err := start(ctx, a, p, violinv1connect.NewImageServiceClient)
	if err != nil {
		return err
	}
	r, err := c.RemoveImage(ctx, &violinv1.RemoveImageRequest{Name: name, Force: force})
	if err != nil {
		return err
	}
	p.done()
	return a.print(r, func(w io.Writer) { fmt.Fprintf(w, "%s removed\n", name) })
}
