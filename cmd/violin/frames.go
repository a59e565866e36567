package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	violinv1 "violin/api/violin/v1"
)

func (a *app) framesCommand() *cobra.Command {
	var file string
	var text bool
	cmd := &cobra.Command{
		Use:   "frames SLICE@SNAPSHOT",
		Short: "Get the frames that were in flight at a snapshot's cut, for Wireshark",
		Long: `Get a snapshot's channel state: the frames that were in flight when it was cut, which
a restore injects again. It is a pcapng file that Wireshark and tshark open. An
interface of it is an interface of a node and names its network and the epoch that the
cut took the node to; a frame's comment has the epoch that it was sent in, and its
time minus the interface's cut, which is in the interface's comment, is when it came.

It goes to standard output, unless that is a terminal. With --text, a line a frame is
printed instead: when it came after its receiver's cut, the network, who sent it and what
it is.

Exit status: as in 'violin --help'.`,
		Example:           "  violin frames mandelbrot@latest --file in-flight.pcapng\n  violin frames mandelbrot@latest | tshark -r -",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completion(snapshotNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := a.tableOnly(cmd); err != nil {
				return err
			}
			if text {
				if file != "" {
					return &failure{code: exitUsage, err: errors.New("--text goes to standard output, and a file is in pcapng")}
				}
				return a.framesText(cmd.Context(), args[0])
			}
			return a.frames(cmd.Context(), args[0], file)
		},
	}
	cmd.Flags().BoolVarP(&text, "text", "t", false, "print a line a frame")
	cmd.Flags().StringVarP(&file, "file", "f", "", "write to this `file` instead; one that is there is replaced")
	return cmd
}

func (a *app) frames(ctx context.Context, snapshot, file string) error {
	if err := checkSnapshotName(snapshot); err != nil {
		return err
	}
	if _, ok := terminal(a.out); ok && file == "" {
		return &failure{code: exitUsage, err: errors.New("the frames are no text for a terminal"), hint: "Name a file with --file, or pipe them on: violin frames ... | tshark -r -"}
	}
	p := a.progress()
	defer p.done()
	c, err := a.startServer(ctx, p)
	if err != nil {
		return err
	}
	stream, err := c.Frames(ctx, &violinv1.FramesRequest{Snapshot: snapshot})
	if err != nil {
		return err
	}
	defer stream.Close()
	write := func(w io.Writer) error {
		for stream.Receive() {
			if _, err := w.Write(stream.Msg().GetData()); err != nil {
				return fmt.Errorf("write the frames: %w", err)
			}
		}
		return stream.Err()
	}
	if file == "" {
		return write(a.out)
	}
	return replaceFile(file, write) // half of it would look like a file with fewer frames
}
