package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	violinv1 "violin/api/violin/v1"
)

func (a *app) restoreCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "restore SLICE@SNAPSHOT",
		Short: "Bring a slice back to a snapshot",
		Long: `Bring a slice back to a snapshot: its id, the beginning of it if that is unique, its
tag, or 'latest'. What still runs of the slice is stopped first. All nodes go on at
one instant, with the frames that were in flight on their way again.`,
		Example:           "  violin restore mandelbrot@latest\n  violin restore mandelbrot@before-the-crash",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completion(snapshotNames),
		RunE:              func(cmd *cobra.Command, args []string) error { return a.restore(cmd.Context(), args[0]) },
	}
}

func (a *app) restore(ctx context.Context, snapshot string) error {
	if err := checkSnapshotName(snapshot); err != nil {
		return err
	}
	p := a.progress()
	defer p.done()
	c, err := a.startServer(ctx, p)
	if err != nil {
		return err
	}
	stream, err := c.Restore(ctx, &violinv1.RestoreRequest{Snapshot: snapshot})
	if err != nil {
		return err
	}
	restored, err := follow(stream, p, func(r *violinv1.RestoreResponse) (*violinv1.Progress, *violinv1.Restored, bool) {
		return r.GetProgress(), r.GetRestored(), r.GetRestored() != nil
	})
	if err != nil {
		return err
	}
	return a.print(restored, func(w io.Writer) {
		a.writeNodes(w, []*violinv1.Slice{restored.GetSlice()})
		fmt.Fprintln(w)
		facts := newTable("restored", printable(snapshotName(restored.GetSnapshot())))
		if tag := restored.GetSnapshot().GetTag(); tag != "" {
			facts.row("tag", tag)
		}
		facts.row("duration", optionalDuration(restored.GetDuration()))
		facts.row("skew", optionalDuration(restored.GetSkew()))
		facts.row("injected", frames(restored.GetFramesInjected(), "that were in flight"))
		facts.write(w)
	})
}
