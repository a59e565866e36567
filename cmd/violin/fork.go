package main

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
	"violin/internal/topology"
)

func (a *app) forkCommand() *cobra.Command {
	var request violinv1.ForkRequest
	var edge edgeFlags
	cmd := &cobra.Command{
		Use:   "fork SLICE@SNAPSHOT --as NAME",
		Short: "Run a snapshot as another slice, beside the original",
		Long: `Run a snapshot as a slice of another name. The original, if it runs, is not touched: the
fork has networks of its own, in which its nodes keep their names and addresses, and no
frame goes from one to the other. What the fork becomes is a history of its own, which
begins at the snapshot.

A network with a gateway has one in the fork, too, unless --fence closed cuts it off from
the outside. Ports that were forwarded to the original's nodes are the original's; to the
fork's lead others, which are free and are shown. --forward NODE=PORT:NODEPORT, spelled as
in a topology, chooses them, one by one, and --no-forwards leaves them out. Both stay with
the fork: what is a snapshot of it comes back with the same edge.

Guests of a fork have the memory of the original's, the state of their random number
generators with it. --new-genid gives each VM a fresh generation id, at which a Linux
guest of 5.18 or later reseeds its own. A snapshot of VMs that were started without such
an id cannot be given one (exit status 5).`,
		Example:           "  violin fork mandelbrot@before-the-crash --as whatif",
		Args:              forkArgs(&request),
		ValidArgsFunction: a.completion(snapshotNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			request.Snapshot = args[0]
			if err := edge.read(&request); err != nil {
				return err
			}
			return a.fork(cmd.Context(), &request)
		},
	}
	a.forkFlags(cmd, &request, &edge)
	return cmd
}

// edgeFlags say what passes between a fork and the outside.
type edgeFlags struct {
	fence    string
	forwards []string
}

func (e *edgeFlags) read(request *violinv1.ForkRequest) error {
	switch e.fence {
	case "":
	case "nat":
		request.Fence = violinv1.Fence_FENCE_NAT
	case "closed":
		request.Fence = violinv1.Fence_FENCE_CLOSED
	default:
		return &failure{code: exitUsage, err: fmt.Errorf("--fence %q: it is nat or closed", e.fence)}
	}
	for _, text := range e.forwards {
		node, forward, ok := strings.Cut(text, "=")
		err := fmt.Errorf("name the node, such as web=9090:80")
		if ok {
			_, err = topology.ParseForward(forward)
		}
		if err != nil {
			return &failure{code: exitUsage, err: fmt.Errorf("--forward %q: %w", text, err)}
		}
		request.Forwards = append(request.Forwards, &violinv1.NodeForward{Node: node, Forward: forward})
	}
	return nil
}

func (a *app) forkFlags(cmd *cobra.Command, request *violinv1.ForkRequest, edge *edgeFlags) {
	closed := "nat"
	if request.GetPaused() {
		closed = "closed"
	}
	cmd.Flags().StringVar(&edge.fence, "fence", "", "what passes between the networks and the outside (`edge`): nat, what passed the original's gateways, or\nclosed, nothing that nodes begin, and no forwards but those of --forward; "+closed+" if not given")
	_ = cmd.RegisterFlagCompletionFunc("fence", cobra.FixedCompletions([]string{"nat", "closed"}, cobra.ShellCompDirectiveNoFileComp))
	cmd.Flags().StringArrayVar(&edge.forwards, "forward", nil, "a port that leads to a node's, as NODE=[ADDRESS:]PORT[?]:NODEPORT[/PROTOCOL] (`forward`), in the place of\nthose that the snapshot has to that port, or one more; may be given several times")
	cmd.Flags().BoolVar(&request.NoForwards, "no-forwards", false, "forward nothing but what --forward says")
	cmd.Flags().StringVar(&request.As, "as", "", "the new slice's `name`")
	cmd.Flags().BoolVar(&request.NewGeneration, "new-genid", false, "give each VM a fresh VM generation id")
	overcommitFlag(cmd, &request.Overcommit)
	clockFlag(cmd, &request.Clock)
	lazyFlag(cmd, &request.Lazy)
	placementFlags(cmd, &request.Placement, &request.On, "as-was")
}

func forkArgs(request *violinv1.ForkRequest) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if request.GetAs() == "" {
			return fmt.Errorf("name the new slice: %s SLICE@SNAPSHOT --as NAME", cmd.Name())
		}
		return cobra.ExactArgs(1)(cmd, args)
	}
}

func (a *app) fork(ctx context.Context, request *violinv1.ForkRequest) error {
	if err := checkSnapshotName(request.GetSnapshot()); err != nil {
		return err
	}
	p := a.progress()
	defer p.done()
	c, err := start(ctx, a, p, violinv1connect.NewLifecycleServiceClient)
	if err != nil {
		return err
	}
	stream, err := c.Fork(ctx, request)
	if err != nil {
		return err
	}
	return a.followRestore(stream, p, "forked")
}

func (a *app) replayCommand() *cobra.Command {
	request := violinv1.ForkRequest{Paused: true}
	var edge edgeFlags
	cmd := &cobra.Command{
		Use:   "replay SLICE@SNAPSHOT --as NAME",
		Short: "Bring a snapshot up beside the original, paused, and show what was in flight",
		Long: `Do what 'violin fork' does, but leave every node standing still at its cut, and show the
frames that were in flight: with 'violin continue NAME' the nodes run, and get them.
Until then the nodes can be looked into from outside (gdb, the QEMU monitor), and nothing
changes. It is closed to the outside, so that it tells nobody what the original has said
before: --fence nat opens it. The frames are those of 'violin frames --text'; with --output json they are left
out.`,
		Example:           "  violin replay mandelbrot@before-the-crash --as autopsy\n  violin continue autopsy",
		Args:              forkArgs(&request),
		ValidArgsFunction: a.completion(snapshotNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			request.Snapshot = args[0]
			if err := edge.read(&request); err != nil {
				return err
			}
			return a.replay(cmd.Context(), &request)
		},
	}
	a.forkFlags(cmd, &request, &edge)
	return cmd
}

func (a *app) replay(ctx context.Context, request *violinv1.ForkRequest) error {
	if a.output == "table" {
		if err := a.framesText(ctx, request.GetSnapshot()); err != nil {
			return err
		}
		fmt.Fprintln(a.out)
	}
	if err := a.fork(ctx, request); err != nil {
		return err
	}
	a.note("'violin continue %s' lets it run", request.GetAs())
	return nil
}

func (a *app) continueCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "continue SLICE",
		Short: "Let a slice run that 'violin replay' left paused",
		Long: `Let a slice run that 'violin replay' left paused: all nodes at one instant, with the
frames that were in flight on their way again.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completion(sliceNames),
		RunE:              func(cmd *cobra.Command, args []string) error { return a.continues(cmd.Context(), args[0]) },
	}
}

func (a *app) continues(ctx context.Context, slice string) error {
	if _, err := a.findSliceServer(ctx, slice); err != nil {
		return err
	}
	r, err := violinv1connect.NewLifecycleServiceClient(a.connection, a.base).Continue(ctx, &violinv1.ContinueRequest{Slice: slice})
	if err != nil {
		return err
	}
	return a.print(r, func(w io.Writer) {
		fmt.Fprintf(w, "%s runs, with %s\n", slice, frames(r.GetFramesInjected(), "in flight"))
		for _, n := range r.GetNotes() {
			fmt.Fprintf(w, "note: %s\n", printable(n))
		}
	})
}
