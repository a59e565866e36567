package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	violinv1 "violin/api/violin/v1"
	"violin/internal/topology"
)

// topologyLimit is far above any topology that people write.
const topologyLimit = 8 << 20

func (a *app) upCommand() *cobra.Command {
	var overcommit bool
	cmd := &cobra.Command{
		Use:   "up FILE",
		Short: "Start a slice from a topology file",
		Long: `Start a slice: its nodes, and the networks between them, as the topology FILE says
('-' reads it from stdin). The file is checked first, and with any mistake in it
nothing is started. If a node does not start, or on Ctrl-C, what was started of
the slice is stopped again.

A slice that does not fit the machine's free memory and its processors (16 virtual CPUs
may share one) is refused with what is missing, unless --overcommit is given.

On a server elsewhere, nodes boot from its images; paths in the topology are those of
its files, in full, and take an operator.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return a.up(cmd.Context(), args[0], overcommit) },
	}
	overcommitFlag(cmd, &overcommit)
	return cmd
}

func (a *app) up(ctx context.Context, file string, overcommit bool) error {
	source, err := a.readTopology(file)
	if err != nil {
		return err
	}
	directory := ""
	if elsewhere, err := a.remote(); err != nil {
		return err
	} else if elsewhere == "" {
		// The server works in another directory; Dir of "-" is ".", as it should be.
		if directory, err = filepath.Abs(filepath.Dir(file)); err != nil {
			return fmt.Errorf("find the topology's directory: %w", err)
		}
	}
	p := a.progress()
	defer p.done()
	c, err := a.startServer(ctx, p)
	if err != nil {
		return err
	}
	stream, err := c.Up(ctx, &violinv1.UpRequest{File: file, Topology: source, Directory: directory, Overcommit: overcommit})
	if err != nil {
		return err
	}
	slice, err := follow(stream, p, func(r *violinv1.UpResponse) (*violinv1.Progress, *violinv1.Slice, bool) {
		return r.GetProgress(), r.GetSlice(), r.GetSlice() != nil
	})
	if err != nil {
		return err
	}
	return a.print(slice, func(w io.Writer) { a.writeNodes(w, []*violinv1.Slice{slice}) })
}

// readTopology reads a topology's source and refuses one with a mistake.
func (a *app) readTopology(file string) ([]byte, error) {
	in := a.in
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return nil, &failure{code: exitUsage, err: fmt.Errorf("read the topology: %w", err)}
		}
		defer f.Close()
		in = f
	}
	source, err := io.ReadAll(io.LimitReader(in, topologyLimit+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("read the topology: %w", err)
	case len(source) > topologyLimit:
		return nil, &failure{code: exitUsage, err: fmt.Errorf("%s is larger than %s: this is no topology", file, formatBytes(topologyLimit))}
	}
	name := file
	if file == "-" {
		name = "stdin"
	}
	if _, err := topology.Parse(name, source); err != nil {
		return nil, &failure{code: exitUsage, err: fmt.Errorf("the topology has a mistake, so nothing was started:\n%w", err)}
	}
	return source, nil
}
