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
)

func (a *app) imageCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "image",
		Short: "Build and look after what nodes boot from",
		Long: `Build and look after images: what a topology's 'image: NAME' stands for. They are in
the state directory. A snapshot is restored on the very build that its nodes booted
from, and on no other, since their memory refers to its blocks.`,
	}
	cmd.AddCommand(a.imageBuildCommand(), a.imageListCommand(), a.imageRemoveCommand())
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
		a.note("no images; 'violin image build' makes one")
	}
	return a.print(list, func(w io.Writer) {
		if len(list.GetImages()) == 0 {
			return
		}
		t := newTable("IMAGE", "KERNEL", ">SIZE", "BUILT", "SLICES", ">SNAPSHOTS")
		for _, i := range list.GetImages() {
			t.row(i.GetName(), i.GetKernel(), formatBytes(i.GetBytes()), a.formatTime(i.GetBuilt()), strings.Join(i.GetSlices(), " "), fmt.Sprint(len(i.GetSnapshots())))
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
