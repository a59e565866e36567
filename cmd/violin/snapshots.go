package main

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	violinv1 "violin/api/violin/v1"
)

func (a *app) snapshotsCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "snapshots [SLICE]",
		Short: "List the snapshots of a slice, or of all, oldest first",
		Long: `List the snapshots of a slice, or of all, oldest first. PARENT is the snapshot that
the slice had last been taken to or restored from. A slice need not run for this. DISKS is
how large the disks in it are, and what of STORED is theirs; -o json tells it of each.`,
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: a.completion(sliceNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.snapshots(cmd.Context(), strings.Join(args, ""))
		},
	}
}

func (a *app) snapshots(ctx context.Context, slice string) error {
	p := a.progress()
	defer p.done()
	c, err := a.startServer(ctx, p)
	if err != nil {
		return err
	}
	list, err := c.ListSnapshots(ctx, &violinv1.ListSnapshotsRequest{Slice: slice})
	if err != nil {
		return err
	}
	p.done()
	if len(list.GetSnapshots()) == 0 {
		a.note("no snapshots; 'violin snapshot SLICE' takes one")
	}
	return a.print(list, func(w io.Writer) {
		if len(list.GetSnapshots()) == 0 {
			return
		}
		t := newTable("SNAPSHOT", "TAG", "PARENT", "CREATED", "MODE", ">NODES", ">SKEW", ">RECORDED", ">STATE", ">STORED", ">DISKS", ">TOOK")
		for _, s := range list.GetSnapshots() {
			t.row(snapshotName(s), tagsOf(s), s.GetParent(), a.formatTime(s.GetCreated()), modeName(s.GetMode()),
				fmt.Sprint(len(s.GetNodes())), optionalDuration(s.GetSkew()), formatCount(s.GetFramesRecorded()),
				formatBytes(s.GetRawBytes()), formatBytes(s.GetStoredBytes()), disksOf(s), optionalDuration(s.GetDuration()))
		}
		t.write(w)
	})
}

// disksOf sums a snapshot's disks up: their sizes, and what the store grew by for them.
func disksOf(s *violinv1.Snapshot) string {
	var size, stored uint64
	n := 0
	for _, node := range s.GetNodes() {
		for _, d := range node.GetDisks() {
			n, size, stored = n+1, size+d.GetSizeBytes(), stored+d.GetStoredBytes()
		}
	}
	if n == 0 {
		return ""
	}
	return formatBytes(size) + " (" + formatBytes(stored) + " new)"
}
