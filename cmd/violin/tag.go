package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
)

func (a *app) tagCommand() *cobra.Command {
	var request violinv1.TagRequest
	cmd := &cobra.Command{
		Use:   "tag SLICE@SNAPSHOT TAG | --delete SLICE@TAG",
		Short: "Give a snapshot a name, or take one away",
		Long: `Give a snapshot a name, beside those it has, or take one away. A tag names one snapshot
of its slice: one that is taken is refused (exit status 5), or moved with --move. It is
done at once or, whatever happens, not at all; the snapshot itself does not change.

An exported snapshot carries the tag only that it was taken with.`,
		Example: `  violin tag mandelbrot@latest good
  violin tag mandelbrot@260807-1015 good --move
  violin tag --delete mandelbrot@good`,
		Args: func(_ *cobra.Command, args []string) error {
			if want := map[bool]int{true: 1, false: 2}[request.GetDelete()]; len(args) != want {
				return fmt.Errorf("tag takes a snapshot and a tag, or --delete and SLICE@TAG; %d given", len(args))
			}
			return nil
		},
		ValidArgsFunction: a.completion(snapshotNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			request.Snapshot = args[0]
			if len(args) > 1 {
				request.Tag = args[1]
			}
			return a.tag(cmd.Context(), &request)
		},
	}
	cmd.Flags().BoolVar(&request.Move, "move", false, "take the tag from the snapshot that has it")
	cmd.Flags().BoolVarP(&request.Delete, "delete", "d", false, "take the tag away")
	return cmd
}

func (a *app) tag(ctx context.Context, request *violinv1.TagRequest) error {
	if err := checkSnapshotName(request.GetSnapshot()); err != nil {
		return err
	}
	p := a.progress()
	defer p.done()
	c, err := start(ctx, a, p, violinv1connect.NewHistoryServiceClient)
	if err != nil {
		return err
	}
	r, err := c.Tag(ctx, request)
	if err != nil {
		return err
	}
	p.done()
	return a.print(r, func(w io.Writer) {
		if tags := tagsOf(r.GetSnapshot()); tags != "" {
			fmt.Fprintf(w, "%s  %s\n", snapshotName(r.GetSnapshot()), tags)
		} else {
			fmt.Fprintf(w, "%s  no tag\n", snapshotName(r.GetSnapshot()))
		}
	})
}
