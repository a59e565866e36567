package main

import (
	"context"
	"fmt"
	"io"
	"strconv"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	violinv1 "violin/api/violin/v1"
)

func (a *app) restoreCommand() *cobra.Command {
	var request violinv1.RestoreRequest
	cmd := &cobra.Command{
		Use:   "restore SLICE@SNAPSHOT",
		Short: "Bring a slice back to a snapshot",
		Long: `Bring a slice back to a snapshot: its id, the beginning of it if that is unique, its
tag, or 'latest'. What still runs of the slice is stopped first. All nodes go on at
one instant, with the frames that were in flight on their way again.

Where the kernel and QEMU allow it (userfaultfd), the nodes run at once and their memory
follows: a page that a node touches comes first. A node whose memory turns out to be damaged
is stopped, and 'violin ps' says which page of which pack it is. Elsewhere, and with
--lazy=false, they have all their memory before they run.

Nodes come up on the hosts that they were on, unless --on or --place says otherwise. Their
addresses and all that they know of themselves stay the same, and so do their networks. A
host that takes nothing, since its agent is away or it is cordoned, is an error (exit
status 5), and nothing is stopped then.`,
		Example: `  violin restore mandelbrot@latest
  violin restore mandelbrot@before-the-crash --on rank0=gpo-1,rank1=gpo-2
  violin restore mandelbrot@latest --place auto`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completion(snapshotNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			request.Snapshot = args[0]
			return a.restore(cmd.Context(), &request)
		},
	}
	overcommitFlag(cmd, &request.Overcommit)
	clockFlag(cmd, &request.Clock)
	lazyFlag(cmd, &request.Lazy)
	placementFlags(cmd, &request.Placement, &request.On, "as-was")
	return cmd
}

// clockFlag is of all verbs that bring a snapshot to life, or take one.
func clockFlag(cmd *cobra.Command, to *violinv1.ClockPolicy) {
	cmd.Flags().Var((*clockValue)(to), "clock", `what becomes of the guests' wall clocks when they are restored: frozen (they go on from the
cut) or catch-up (they are stepped to now, through the guest agent; timers do not notice).
Of a snapshot: for its restores. Of a restore: instead of what the snapshot says`)
	_ = cmd.RegisterFlagCompletionFunc("clock", cobra.FixedCompletions([]string{"frozen", "catch-up"}, cobra.ShellCompDirectiveNoFileComp))
}

// clockValue is --clock.
type clockValue violinv1.ClockPolicy

func (v *clockValue) Type() string { return "policy" }

func (v *clockValue) String() string {
	switch violinv1.ClockPolicy(*v) {
	case violinv1.ClockPolicy_CLOCK_POLICY_FROZEN:
		return "frozen"
	case violinv1.ClockPolicy_CLOCK_POLICY_CATCH_UP:
		return "catch-up"
	}
	return ""
}

func (v *clockValue) Set(text string) error {
	switch text {
	case "frozen":
		*v = clockValue(violinv1.ClockPolicy_CLOCK_POLICY_FROZEN)
	case "catch-up":
		*v = clockValue(violinv1.ClockPolicy_CLOCK_POLICY_CATCH_UP)
	default:
		return fmt.Errorf("it is frozen or catch-up")
	}
	return nil
}

// lazyFlag is of all verbs that bring a snapshot to life. Not given, it stays nil.
func lazyFlag(cmd *cobra.Command, to **bool) {
	cmd.Flags().Var(&optionalBool{to}, "lazy", `let the nodes run at once, and their memory follow: the default where the machine can do it. Given
as such, the snapshot is not read through before a slice that still runs is stopped. --lazy=false
gives the nodes all their memory before they run`)
	cmd.Flags().Lookup("lazy").NoOptDefVal = "true"
}

// optionalBool is a flag's value that is nil if the flag is not given.
type optionalBool struct{ to **bool }

func (o *optionalBool) Type() string { return "bool" }

func (o *optionalBool) String() string {
	if o.to == nil || *o.to == nil {
		return ""
	}
	return strconv.FormatBool(**o.to)
}

func (o *optionalBool) Set(text string) error {
	b, err := strconv.ParseBool(text)
	if err != nil {
		return fmt.Errorf("%q is neither true nor false", text)
	}
	*o.to = &b
	return nil
}

// overcommitFlag is of all verbs that start VMs.
func overcommitFlag(cmd *cobra.Command, to *bool) {
	cmd.Flags().BoolVar(to, "overcommit", false, "start it though the machine has too little free memory or too few processors for it")
}

func (a *app) restore(ctx context.Context, request *violinv1.RestoreRequest) error {
	if err := checkSnapshotName(request.GetSnapshot()); err != nil {
		return err
	}
	p := a.progress()
	defer p.done()
	c, err := a.startServer(ctx, p)
	if err != nil {
		return err
	}
	stream, err := c.Restore(ctx, request)
	if err != nil {
		return err
	}
	return a.followRestore(stream, p, "restored")
}

// followRestore follows a call that brings a snapshot to life, to its end.
func (a *app) followRestore(stream *connect.ServerStreamForClient[violinv1.RestoreResponse], p *progress, done string) error {
	restored, err := follow(stream, p, func(r *violinv1.RestoreResponse) (*violinv1.Progress, *violinv1.Restored, bool) {
		return r.GetProgress(), r.GetRestored(), r.GetRestored() != nil
	})
	if err != nil {
		return err
	}
	return a.print(restored, func(w io.Writer) {
		a.writeNodes(w, []*violinv1.Slice{restored.GetSlice()})
		fmt.Fprintln(w)
		facts := newTable(done, printable(snapshotName(restored.GetSnapshot())))
		if tags := tagsOf(restored.GetSnapshot()); tags != "" {
			facts.row("tag", tags)
		}
		facts.row("duration", optionalDuration(restored.GetDuration()))
		if !restored.GetSlice().GetPaused() {
			facts.row("skew", optionalDuration(restored.GetSkew()))
			facts.row("injected", frames(restored.GetFramesInjected(), "in flight"))
		}
		if restored.GetLazy() {
			facts.row("memory", "follows")
		}
		facts.write(w)
		for _, m := range restored.GetMoves() {
			fmt.Fprintln(w, printable(moved(m)))
		}
		for _, n := range restored.GetNotes() {
			fmt.Fprintf(w, "note: %s\n", printable(n))
		}
	})
}
