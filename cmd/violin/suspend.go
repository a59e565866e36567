package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
	"violin/internal/daemon"
)

func (a *app) suspendCommand() *cobra.Command {
	var request violinv1.SuspendRequest
	cmd := &cobra.Command{
		Use:   "suspend SLICE | --all [--host HOST]",
		Short: "Snapshot a slice and free the memory and CPU it takes",
		Long: `Take a snapshot of a slice and, once it is sealed, stop the slice: nothing of it takes
memory or CPU any more. From their cuts on the nodes stand still, so that nothing they
do is lost. If the snapshot fails, the slice runs on (exit status 4). 'violin ps' lists
suspended slices, 'violin resume' lets one go on, 'violin down' gives the suspension up.

With --all, one slice after the other is suspended; with --host, those that have a node
on that host, which drains it; 'violin hosts cordon' keeps new ones from it. Slices that cannot be suspended run on and are told.`,
		Example: `  violin suspend mandelbrot
  violin suspend --all --host utah-1`,
		Args: func(_ *cobra.Command, args []string) error {
			switch {
			case request.GetAll() && len(args) > 0:
				return errors.New("a slice and --all: name the slice, or say --all")
			case !request.GetAll() && len(args) != 1:
				return fmt.Errorf("suspend takes one slice, or --all; %d given", len(args))
			case !request.GetAll() && request.GetHost() != "":
				return errors.New("--host goes with --all")
			case request.GetAll() && request.GetTag() != "":
				return errors.New("--tag goes with one slice, not with --all")
			}
			return nil
		},
		ValidArgsFunction: a.completion(sliceNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			request.Slice = strings.Join(args, "")
			return a.suspend(cmd.Context(), &request)
		},
	}
	cmd.Flags().BoolVar(&request.All, "all", false, "suspend every slice")
	cmd.Flags().StringVar(&request.Host, "host", "", "with --all: only slices that have a node on this `host`")
	cmd.Flags().StringVar(&request.Tag, "tag", "", "a `name` for the snapshot, unique in the slice")
	return cmd
}

func (a *app) suspend(ctx context.Context, request *violinv1.SuspendRequest) error {
	done := &violinv1.Suspended{}
	var err error
	if request.GetAll() {
		_, err = a.findServer(ctx)
	} else {
		_, err = a.findSliceServer(ctx, request.GetSlice())
	}
	if err != nil && !(request.GetAll() && errors.Is(err, daemon.ErrNotRunning)) {
		return err
	}
	if err == nil {
		p := a.progress()
		defer p.done()
		stream, err := violinv1connect.NewLifecycleServiceClient(a.connection, a.base).Suspend(ctx, request)
		if err != nil {
			return err
		}
		done, err = follow(stream, p, func(r *violinv1.SuspendResponse) (*violinv1.Progress, *violinv1.Suspended, bool) {
			return r.GetProgress(), r.GetSuspended(), r.GetSuspended() != nil
		})
		if err != nil {
			return err
		}
	}
	if len(done.GetSnapshots()) == 0 {
		a.note("no slice runs that would be suspended")
	}
	return a.print(done, func(w io.Writer) {
		for _, s := range done.GetSnapshots() {
			fmt.Fprintf(w, "%s suspended at %s\n", s.GetSlice(), snapshotName(s))
		}
	})
}

func (a *app) resumeCommand() *cobra.Command {
	var request violinv1.ResumeRequest
	cmd := &cobra.Command{
		Use:   "resume SLICE",
		Short: "Let a suspended slice go on",
		Long: `Let a suspended slice go on where it stands: all nodes at one instant, with the frames
that were in flight on their way again. If it fails, the slice stays suspended. The
guests' wall clocks catch up, unless --clock frozen is given.

Nodes whose hosts are away, are cordoned or have too little room come up on others, with
the same addresses on the same networks; --place as-was refuses that, and --on chooses.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completion(sliceNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			request.Slice = args[0]
			return a.resume(cmd.Context(), &request)
		},
	}
	overcommitFlag(cmd, &request.Overcommit)
	clockFlag(cmd, &request.Clock)
	lazyFlag(cmd, &request.Lazy)
	placementFlags(cmd, &request.Placement, &request.On, "auto")
	return cmd
}

func (a *app) resume(ctx context.Context, request *violinv1.ResumeRequest) error {
	p := a.progress()
	defer p.done()
	c, err := start(ctx, a, p, violinv1connect.NewLifecycleServiceClient)
	if err != nil {
		return err
	}
	stream, err := c.Resume(ctx, request)
	if err != nil {
		return err
	}
	return a.followRestore(stream, p, "resumed")
}
