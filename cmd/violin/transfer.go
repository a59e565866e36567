package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
)

const exportPassphraseVariable = "VIOLIN_EXPORT_PASSPHRASE"

// exportPassphrase is the passphrase of an exported file, or empty.
func exportPassphrase(file string) (string, error) {
	if file == "" {
		return os.Getenv(exportPassphraseVariable), nil
	}
	return readPassphrase(file)
}

func (a *app) exportCommand() *cobra.Command {
	var file, passphrase string
	cmd := &cobra.Command{
		Use:   "export SNAPSHOT --file FILE",
		Short: "Write a snapshot to one file, for another machine",
		Long: `Write a snapshot to one file, for 'violin import' on another machine: its topology,
every node's memory and devices, and the frames in flight. Each page is in it once,
and all of it is verified on the way.

The file is sealed with a passphrase of its own, from VIOLIN_EXPORT_PASSPHRASE or
--export-passphrase-file; without one, whoever has the file reads the nodes' memory.
What the nodes booted from (kernel, initrd, rootfs) is not in the file: the other
machine needs the same, and a restore refuses others.`,
		Example:           "  violin export mandelbrot@latest --file mandelbrot.violin",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completion(snapshotNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.export(cmd.Context(), args[0], file, passphrase)
		},
	}
	cmd.Flags().StringVarP(&file, "file", "f", "", "the `file` to write; one that is there is replaced when the new one is whole")
	cmd.Flags().StringVar(&passphrase, "export-passphrase-file", "", "seal with the first line of this `file` (or env VIOLIN_EXPORT_PASSPHRASE)")
	return cmd
}

func (a *app) export(ctx context.Context, snapshot, file, passphraseFile string) error {
	if err := checkSnapshotName(snapshot); err != nil {
		return err
	}
	if file == "" {
		return &failure{code: exitUsage, err: errors.New("--file is missing: say where to write the snapshot"), hint: "See 'violin export --help'."}
	}
	passphrase, err := exportPassphrase(passphraseFile)
	if err != nil {
		return err
	}
	p := a.progress()
	defer p.done()
	c, err := start(ctx, a, p, violinv1connect.NewStoreServiceClient)
	if err != nil {
		return err
	}
	stream, err := c.Export(ctx, &violinv1.ExportRequest{Snapshot: snapshot, Passphrase: passphrase})
	if err != nil {
		return err
	}
	defer stream.Close()
	var exported *violinv1.Snapshot
	size := int64(0)
	err = replaceFile(file, func(w io.Writer) error {
		for stream.Receive() {
			if s := stream.Msg().GetSnapshot(); s != nil {
				exported = s
				p.step("export", "", snapshotName(s))
			}
			n, err := w.Write(stream.Msg().GetData())
			if size += int64(n); err != nil {
				return err
			}
		}
		return stream.Err()
	})
	if err != nil {
		return err
	}
	p.done()
	if passphrase == "" {
		a.note("%s is not sealed: whoever can read it reads the memory of all nodes; VIOLIN_EXPORT_PASSPHRASE seals it", file)
	}
	return a.print(exported, func(w io.Writer) {
		t := newTable("exported", printable(snapshotName(exported)))
		t.row("file", file)
		t.row("size", formatBytes(uint64(size)))
		t.write(w)
	})
}

// replaceFile writes a file, for its owner only, that has its name when it is whole and on the disk.
func replaceFile(file string, write func(io.Writer) error) (err error) {
	f, err := os.CreateTemp(filepath.Dir(file), "."+filepath.Base(file)+".*")
	if err != nil {
		var path *fs.PathError
		if errors.As(err, &path) {
			err = path.Err // of a name that the user did not give
		}
		return &failure{code: exitUsage, err: fmt.Errorf("write %s: %w", file, err)}
	}
	defer os.Remove(f.Name())
	err = write(f)
	if cerr := errors.Join(f.Sync(), f.Close()); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), file)
}

func (a *app) importCommand() *cobra.Command {
	var passphrase string
	cmd := &cobra.Command{
		Use:   "import FILE",
		Short: "Take a snapshot from a file that 'violin export' made",
		Long: `Take a snapshot from a file that 'violin export' made. Every page is verified, and
what the store has already costs no space. The snapshot can be seen and restored once
all of it is here; if anything is wrong with the file, or on Ctrl-C, nothing of it is.

A snapshot is a program that goes on where it was: restore only what you trust.

Exit status: 0 it is here, 2 the passphrase is missing or wrong, 5 the snapshot or its
tag is here already, and the general ones.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return a.importFile(cmd.Context(), args[0], passphrase) },
	}
	cmd.Flags().StringVar(&passphrase, "export-passphrase-file", "", "open with the first line of this `file` (or env VIOLIN_EXPORT_PASSPHRASE)")
	return cmd
}

func (a *app) importFile(ctx context.Context, file, passphraseFile string) error {
	passphrase, err := exportPassphrase(passphraseFile)
	if err != nil {
		return err
	}
	f, err := os.Open(file)
	if err != nil {
		return &failure{code: exitUsage, err: fmt.Errorf("import: %w", err)}
	}
	defer f.Close()
	p := a.progress()
	defer p.done()
	c, err := start(ctx, a, p, violinv1connect.NewStoreServiceClient)
	if err != nil {
		return err
	}
	p.step("import", "", file)
	stream, err := c.Import(ctx)
	if err != nil {
		return err
	}
	err = stream.Send(&violinv1.ImportRequest{Passphrase: passphrase})
	buf := make([]byte, 256<<10)
	for err == nil {
		n, rerr := f.Read(buf)
		if n > 0 {
			// The server's error comes with the end of the stream.
			err = stream.Send(&violinv1.ImportRequest{Data: buf[:n]})
		}
		if errors.Is(rerr, io.EOF) {
			break
		}
		if rerr != nil {
			return fmt.Errorf("import: %w", rerr)
		}
	}
	r, err := stream.CloseAndReceive()
	if err != nil {
		return err
	}
	p.done()
	return a.print(r, func(w io.Writer) {
		t := newTable("imported", printable(snapshotName(r.GetSnapshot())))
		t.row("tag", r.GetSnapshot().GetTag())
		t.row("pages", fmt.Sprintf("%d, %d of them new", r.GetPages(), r.GetNewPages()))
		t.row("stored", formatBytes(r.GetStoredBytes()))
		t.write(w)
	})
}
