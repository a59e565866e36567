package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
)

func (a *app) protectCommand() *cobra.Command {
	var request violinv1.ProtectRequest
	var every, window, hostTimeout time.Duration
	cmd := &cobra.Command{
		Use:   "protect [SLICE --every TIME]",
		Short: "Take checkpoints of a slice, and roll it back when a node or host is lost",
		Long: `Have a slice guarded. A snapshot of it is taken at once and then on a schedule; when a
node's hypervisor or the switch of a host ends, or a host that has joined is away for too
long, the slice is rolled back to its last snapshot by itself: each node on the host that it
was on, if that takes it, and else on another. Where there is no room, it waits for hosts
to come (back). 'violin events' tells of it, and so does the webhook: every loss,
rollback and failed checkpoint is posted to it as a JSON document, and again, for some
minutes, if nobody takes it.

The protection outlives the server: one that was killed brings the slice back when it is
started again. It ends with 'violin unprotect' and 'violin down'; a suspended slice is
protected again once it is resumed. A slice that is protected already is from now on as
asked.

A slice that goes down again and again is rolled back --max-rollbacks times within
--window and then left as it is; 'violin restore' or 'violin protect' begins anew.
Of the snapshots that the protection took, the youngest --keep stay, and those with a
tag; others are not its to take away.

Without a slice, the slices that are protected are listed.`,
		Example: `  violin protect mandelbrot --every 5m --keep 12
  violin protect mandelbrot --every 30s --webhook https://example.org/hook --dry-run`,
		Args: func(cmd *cobra.Command, args []string) error {
			switch {
			case len(args) > 1:
				return fmt.Errorf("protect takes one slice; %d given", len(args))
			case len(args) == 1 && every <= 0:
				return errors.New("say how often a checkpoint is to be taken, such as --every 5m")
			case len(args) == 0 && cmd.Flags().NFlag() > 0 && every > 0:
				return errors.New("name the slice to protect")
			}
			return nil
		},
		ValidArgsFunction: a.completion(sliceNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return a.protections(cmd.Context())
			}
			request.Slice, request.Every = args[0], durationpb.New(every)
			if window != 0 {
				request.Window = durationpb.New(window)
			}
			if hostTimeout != 0 {
				request.HostTimeout = durationpb.New(hostTimeout)
			}
			return a.protect(cmd.Context(), &request)
		},
	}
	flags := cmd.Flags()
	flags.DurationVar(&every, "every", 0, "take a checkpoint after each such `time`")
	flags.Uint32Var(&request.Keep, "keep", 0, "keep the youngest `n` checkpoints (default 12)")
	flags.Uint32Var(&request.MaxRollbacks, "max-rollbacks", 0, "roll back at most `n` times within the window (default 5)")
	flags.DurationVar(&window, "window", 0, "the `time` that --max-rollbacks is about (default 1h)")
	flags.DurationVar(&hostTimeout, "host-timeout", 0, "count a joined host as lost that has been away for such a `time` (default 1m)")
	flags.StringVar(&request.Webhook, "webhook", "", "post losses, rollbacks and failures to this `URL`")
	flags.BoolVarP(&request.DryRun, "dry-run", "n", false, "take checkpoints, and only tell when it would be rolled back, and to what")
	return cmd
}

func (a *app) protect(ctx context.Context, request *violinv1.ProtectRequest) error {
	if _, err := a.findSliceServer(ctx, request.GetSlice()); err != nil {
		return err
	}
	r, err := violinv1connect.NewProtectionServiceClient(a.connection, a.base).Protect(ctx, request)
	if err != nil {
		return err
	}
	return a.print(r, func(w io.Writer) { a.writeProtections(w, []*violinv1.Protection{r.GetProtection()}) })
}

func (a *app) protections(ctx context.Context) error {
	p := a.progress()
	defer p.done()
	c, err := start(ctx, a, p, violinv1connect.NewProtectionServiceClient)
	if err != nil {
		return err
	}
	list, err := c.ListProtections(ctx, &violinv1.ListProtectionsRequest{})
	if err != nil {
		return err
	}
	p.done()
	if len(list.GetProtections()) == 0 {
		a.note("no slice is protected")
	}
	return a.print(list, func(w io.Writer) {
		if len(list.GetProtections()) > 0 {
			a.writeProtections(w, list.GetProtections())
		}
	})
}

func (a *app) writeProtections(w io.Writer, list []*violinv1.Protection) {
	t := newTable("SLICE", ">EVERY", ">KEEP", ">ROLLBACKS", "SINCE", "WEBHOOK", "LAST", "STATE")
	for _, p := range list {
		state := "on"
		switch {
		case p.GetGaveUp():
			state = "gave up"
		case p.GetDryRun():
			state = "dry run"
		}
		t.row(p.GetSlice(), p.GetEvery().AsDuration().String(), fmt.Sprint(p.GetKeep()),
			fmt.Sprintf("%d of %d in %s", p.GetRollbacks(), p.GetMaxRollbacks(), p.GetWindow().AsDuration()),
			a.formatTime(p.GetSince()), p.GetWebhook(), p.GetHead(), state)
	}
	t.write(w)
}

func (a *app) unprotectCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "unprotect SLICE",
		Short:             "End a slice's protection; its checkpoints stay",
		Long:              `End a slice's protection. The slice runs on, and the checkpoints that there are stay.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completion(sliceNames),
		RunE:              func(cmd *cobra.Command, args []string) error { return a.unprotect(cmd.Context(), args[0]) },
	}
}

func (a *app) unprotect(ctx context.Context, slice string) error {
	p := a.progress()
	defer p.done()
	c, err := start(ctx, a, p, violinv1connect.NewProtectionServiceClient)
	if err != nil {
		return err
	}
	r, err := c.Unprotect(ctx, &violinv1.UnprotectRequest{Slice: slice})
	if err != nil {
		return err
	}
	p.done()
	return a.print(r, func(w io.Writer) { fmt.Fprintf(w, "%s is not protected any more\n", slice) })
}

func (a *app) eventsCommand() *cobra.Command {
	var request violinv1.EventsRequest
	cmd := &cobra.Command{
		Use:   "events [SLICE]",
		Short: "Tell what happened to a slice, or to all",
		Long: `Tell what happened to a slice, or to all, oldest first: that it was started, stopped,
protected, that a node of it died, that it was rolled back, and so on. With --follow it
goes on until Ctrl-C. With --output json, an event is a document on a line of its own.`,
		Example:           "  violin events mandelbrot -f",
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: a.completion(sliceNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			request.Slice = strings.Join(args, "")
			return a.events(cmd.Context(), &request)
		},
	}
	cmd.Flags().BoolVarP(&request.Follow, "follow", "f", false, "go on with what happens")
	cmd.Flags().Uint32VarP(&request.Last, "last", "n", 0, "of what happened before, tell the last `n` only")
	cmd.Flags().Uint64Var(&request.After, "after", 0, "tell only events with higher `number`s")
	return cmd
}

func (a *app) events(ctx context.Context, request *violinv1.EventsRequest) error {
	p := a.progress()
	defer p.done()
	c, err := start(ctx, a, p, violinv1connect.NewProtectionServiceClient)
	if err != nil {
		return err
	}
	stream, err := c.Events(ctx, request)
	if err != nil {
		return err
	}
	defer stream.Close()
	p.done()
	for stream.Receive() {
		if err := a.writeEvent(stream.Msg()); err != nil {
			return err
		}
	}
	return stream.Err()
}

func (a *app) writeEvent(e *violinv1.Event) error {
	if a.output == "json" {
		line, err := marshalLine(e)
		if err != nil {
			return err
		}
		_, err = a.out.Write(line)
		return err
	}
	where := e.GetSlice()
	if e.GetNode() != "" {
		where += "/" + e.GetNode()
	}
	line := fmt.Sprintf("%s  %-5d %-18s %s", a.formatTime(e.GetAt()), e.GetNumber(), e.GetKind(), where)
	if e.GetSnapshot() != "" {
		line += "  " + e.GetSnapshot()
	}
	if e.GetText() != "" {
		line += "  " + e.GetText()
	}
	_, err := fmt.Fprintln(a.out, printable(line))
	return err
}
