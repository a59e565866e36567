package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	violinv1 "violin/api/violin/v1"
)

func (a *app) snapshotCommand() *cobra.Command {
	var mode, tag string
	cmd := &cobra.Command{
		Use:   "snapshot SLICE",
		Short: "Take a consistent live snapshot of a slice",
		Long: `Take a consistent live snapshot of a slice that runs, without the workload noticing.
The table tells for each node:
  PAUSE      how long its vCPUs stood still
  CUT        when it was cut, after the first node of the slice
  HELD       frames from nodes already cut that waited until it was cut
  RECORDED   frames on their way to it during the cut: the channel state, which a restore injects again
  STATE      bytes of its migration stream
  STORED     bytes that were new to the store, compressed; RATIO is STORED to STATE
The last line of the table has the longest pause, the skew (the last node's cut
after the first's) and the sums.

If anything fails, or on Ctrl-C, the cut is aborted: the nodes run on, every held
frame is delivered, and nothing of it remains in the store (exit status 4).`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completion(sliceNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			m, err := captureMode(mode)
			if err != nil {
				return err
			}
			return a.snapshot(cmd.Context(), &violinv1.SnapshotRequest{Slice: args[0], Mode: m, Tag: tag})
		},
	}
	cmd.Flags().StringVar(&mode, "mode", "", "how memory is captured: `MODE` is background (while the node runs on; the default where it works)\nor precopy (before the node is stopped for a moment)")
	cmd.Flags().StringVar(&tag, "tag", "", "a `name` for the snapshot, unique in the slice")
	_ = cmd.RegisterFlagCompletionFunc("mode", cobra.FixedCompletions([]string{"background", "precopy"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func captureMode(name string) (violinv1.CaptureMode, error) {
	switch name {
	case "":
		return violinv1.CaptureMode_CAPTURE_MODE_UNSPECIFIED, nil
	case "background":
		return violinv1.CaptureMode_CAPTURE_MODE_BACKGROUND, nil
	case "precopy":
		return violinv1.CaptureMode_CAPTURE_MODE_PRECOPY, nil
	}
	return 0, &failure{code: exitUsage, err: fmt.Errorf("--mode %q: it is background or precopy", name)}
}

func modeName(m violinv1.CaptureMode) string {
	if m == violinv1.CaptureMode_CAPTURE_MODE_UNSPECIFIED {
		return ""
	}
	return strings.ToLower(strings.TrimPrefix(m.String(), "CAPTURE_MODE_"))
}

func (a *app) snapshot(ctx context.Context, request *violinv1.SnapshotRequest) error {
	c, err := a.findSliceServer(ctx, request.GetSlice())
	if err != nil {
		return err
	}
	p := a.progress()
	defer p.done()
	stream, err := c.Snapshot(ctx, request)
	if err != nil {
		return err
	}
	snapshot, err := follow(stream, p, func(r *violinv1.SnapshotResponse) (*violinv1.Progress, *violinv1.Snapshot, bool) {
		return r.GetProgress(), r.GetSnapshot(), r.GetSnapshot() != nil
	})
	if err != nil {
		return err
	}
	return a.print(snapshot, func(w io.Writer) { writeSnapshot(w, snapshot) })
}

func writeSnapshot(w io.Writer, s *violinv1.Snapshot) {
	t := newTable("NODE", "HOST", ">PAUSE", ">CUT", ">HELD", ">RECORDED", ">STATE", ">STORED", ">RATIO")
	var longest time.Duration
	for _, n := range s.GetNodes() {
		longest = max(longest, n.GetPause().AsDuration())
		t.row(n.GetName(), n.GetHost(), optionalDuration(n.GetPause()), formatOffset(n.GetCutOffset()),
			formatCount(n.GetFramesHeld()), formatCount(n.GetFramesRecorded()),
			formatBytes(n.GetRawBytes()), formatBytes(n.GetStoredBytes()), formatRatio(n.GetStoredBytes(), n.GetRawBytes()))
	}
	t.row("all", "", formatDuration(longest), formatOffset(s.GetSkew()),
		formatCount(s.GetFramesHeld()), formatCount(s.GetFramesRecorded()),
		formatBytes(s.GetRawBytes()), formatBytes(s.GetStoredBytes()), formatRatio(s.GetStoredBytes(), s.GetRawBytes()))
	t.write(w)

	fmt.Fprintln(w)
	facts := newTable("snapshot", printable(snapshotName(s)))
	if s.GetTag() != "" {
		facts.row("tag", s.GetTag())
	}
	facts.row("parent", s.GetParent())
	facts.row("mode", modeName(s.GetMode()))
	facts.row("duration", optionalDuration(s.GetDuration()))
	facts.row("skew", optionalDuration(s.GetSkew()))
	facts.row("dropped", frames(s.GetFramesDropped(), "by the cut"))
	facts.row("lost", frames(s.GetFramesLostByNetwork(), "by the network"))
	if s.GetCertificate() != "" {
		facts.row("certificate", s.GetCertificate())
	}
	facts.write(w)
}

func frames(n uint64, by string) string {
	if n == 1 {
		return "1 frame " + by
	}
	return fmt.Sprintf("%d frames %s", n, by)
}
