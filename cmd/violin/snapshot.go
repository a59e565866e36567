package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	violinv1 "violin/api/violin/v1"
)

func (a *app) snapshotCommand() *cobra.Command {
	var mode, tag, newer, at string
	var holdBytes uint64
	var holdTime time.Duration
	var clock violinv1.ClockPolicy
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
			request := &violinv1.SnapshotRequest{Slice: args[0], Mode: m, Tag: tag, Clock: clock}
			if request.Newer, err = newerPolicy(newer); err != nil {
				return err
			}
			if request.At, err = instant(at, time.Now()); err != nil {
				return err
			}
			request.HoldBytes = holdBytes
			if cmd.Flags().Changed("hold-time") {
				request.HoldTime = durationpb.New(holdTime)
			}
			return a.snapshot(cmd.Context(), request)
		},
	}
	cmd.Flags().StringVar(&mode, "mode", "", "how memory is captured: `MODE` is background (while the node runs on; the default where it works)\nor precopy (before the node is stopped for a moment)")
	cmd.Flags().StringVar(&tag, "tag", "", "a `name` for the snapshot, unique in the slice")
	cmd.Flags().StringVar(&newer, "newer", "", `what becomes of a frame that reaches a node before the node's cut and was sent after
its sender's: hold (it waits; the default), trigger (it waits, and the node is cut at once), or
drop (it is lost, and nothing in flight is recorded: for comparison only)`)
	cmd.Flags().StringVar(&at, "at", "", "cut all nodes at this `INSTANT`: RFC 3339, or +DURATION from now. Makes the skew small")
	cmd.Flags().Uint64Var(&holdBytes, "hold-bytes", 0, "abort when more than these `BYTES` wait at one node's gate (default 64 MiB)")
	cmd.Flags().DurationVar(&holdTime, "hold-time", 0, "abort when the nodes are not all cut within this `TIME` (default 10s)")
	clockFlag(cmd, &clock)
	_ = cmd.RegisterFlagCompletionFunc("newer", cobra.FixedCompletions([]string{"hold", "trigger", "drop"}, cobra.ShellCompDirectiveNoFileComp))
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

func newerPolicy(name string) (violinv1.NewerPolicy, error) {
	switch name {
	case "":
		return violinv1.NewerPolicy_NEWER_POLICY_UNSPECIFIED, nil
	case "hold":
		return violinv1.NewerPolicy_NEWER_POLICY_HOLD, nil
	case "trigger":
		return violinv1.NewerPolicy_NEWER_POLICY_TRIGGER, nil
	case "drop":
		return violinv1.NewerPolicy_NEWER_POLICY_DROP, nil
	}
	return 0, &failure{code: exitUsage, err: fmt.Errorf("--newer %q: it is hold, trigger or drop", name)}
}

// instant reads --at.
func instant(text string, now time.Time) (*timestamppb.Timestamp, error) {
	if text == "" {
		return nil, nil
	}
	if after, ok := strings.CutPrefix(text, "+"); ok {
		if d, err := time.ParseDuration(after); err == nil && d > 0 {
			return timestamppb.New(now.Add(d)), nil
		}
	} else if t, err := time.Parse(time.RFC3339Nano, text); err == nil {
		if t.Before(now) {
			return nil, &failure{code: exitUsage, err: fmt.Errorf("--at %s: that has passed", text)}
		}
		return timestamppb.New(t), nil
	}
	return nil, &failure{code: exitUsage, err: fmt.Errorf("--at %q: it is an instant such as 2026-01-31T12:00:00Z, or a duration from now such as +5s", text)}
}

func modeName(m violinv1.CaptureMode) string {
	if m == violinv1.CaptureMode_CAPTURE_MODE_UNSPECIFIED {
		return ""
	}
	return strings.ToLower(strings.TrimPrefix(m.String(), "CAPTURE_MODE_"))
}

func diskUse(u violinv1.DiskUse) string {
	if u == violinv1.DiskUse_DISK_USE_UNSPECIFIED {
		return ""
	}
	return strings.ToLower(strings.TrimPrefix(u.String(), "DISK_USE_"))
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

	disks := newTable("DISK", "USE", ">SIZE", ">STORED")
	some := false
	for _, n := range s.GetNodes() {
		for _, d := range n.GetDisks() {
			some = true
			disks.row(n.GetName()+"/"+d.GetName(), diskUse(d.GetUse()), formatBytes(d.GetSizeBytes()), formatBytes(d.GetStoredBytes()))
		}
	}
	if some {
		fmt.Fprintln(w)
		disks.write(w)
	}

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
