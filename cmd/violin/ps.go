package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	violinv1 "violin/api/violin/v1"
	"violin/internal/daemon"
	"violin/internal/server"
)

func (a *app) psCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "ps [SLICE]",
		Short: "List the slices that run or are suspended, and their nodes",
		Long: `List the slices that run or are suspended, and their nodes. A node that died stays in
the list, with the reason as far as it is known; one is away whose host's agent is not
connected, and as far as is known it runs on. HEAD is the snapshot that the slice
descends from last; of a fork it names that snapshot's slice, too. Where ports of nodes are
forwarded, they are listed with the address on the machine of the gateway: the server's, or
the joined host that is named. One in parentheses does not listen now.`,
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: a.completion(sliceNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.ps(cmd.Context(), strings.Join(args, ""))
		},
	}
}

func (a *app) ps(ctx context.Context, slice string) error {
	var list *violinv1.ListSlicesResponse
	var err error
	if slice != "" {
		c, err := a.findSliceServer(ctx, slice)
		if err != nil {
			return err
		}
		if list, err = c.ListSlices(ctx, &violinv1.ListSlicesRequest{Slice: slice}); err != nil {
			return err
		}
	} else if list, err = a.runningSlices(ctx); err != nil {
		return err
	}
	if len(list.GetSlices()) == 0 {
		a.note("no slice runs; 'violin up FILE' starts one")
	}
	return a.print(list, func(w io.Writer) {
		if len(list.GetSlices()) == 0 {
			return
		}
		a.writeSlices(w, list.GetSlices())
		fmt.Fprintln(w)
		a.writeNodes(w, list.GetSlices())
	})
}

// runningSlices lists all slices; where no server runs, none does.
func (a *app) runningSlices(ctx context.Context) (*violinv1.ListSlicesResponse, error) {
	c, err := a.findServer(ctx)
	if errors.Is(err, daemon.ErrNotRunning) {
		dirs, err := a.dirs()
		if err != nil {
			return nil, err
		}
		if !server.Remembers(dirs.State) {
			return &violinv1.ListSlicesResponse{}, nil
		}
		// Suspended slices, say: a server knows.
		p := a.progress()
		defer p.done()
		if c, err = a.startServer(ctx, p); err != nil {
			return nil, err
		}
		return c.ListSlices(ctx, &violinv1.ListSlicesRequest{})
	}
	if err != nil {
		return nil, err
	}
	return c.ListSlices(ctx, &violinv1.ListSlicesRequest{})
}

func (a *app) writeSlices(w io.Writer, list []*violinv1.Slice) {
	headings := []string{"SLICE", ">RUNNING", "STATE", "CREATED", "HEAD"}
	owners := slices.ContainsFunc(list, func(s *violinv1.Slice) bool { return s.GetOwner() != "" })
	if owners {
		headings = append(headings, "OWNER")
	}
	t := newTable(headings...)
	for _, s := range list {
		counts := make(map[violinv1.NodeState]int)
		for _, n := range s.GetNodes() {
			counts[n.GetState()]++
		}
		cells := []string{s.GetName(),
			fmt.Sprintf("%d of %d", counts[violinv1.NodeState_NODE_STATE_RUNNING], len(s.GetNodes())),
			protectedState(s, sliceState(s, counts)), a.formatTime(s.GetCreated()), headOf(s.GetOrigin(), s.GetHead())}
		if owners {
			cells = append(cells, s.GetOwner())
		}
		t.row(cells...)
	}
	t.write(w)
}

// sliceState sums a slice up in a word: what most needs attention wins.
func sliceState(s *violinv1.Slice, counts map[violinv1.NodeState]int) string {
	switch {
	case s.GetSuspended():
		return "suspended"
	case counts[violinv1.NodeState_NODE_STATE_DEAD] > 0:
		return "broken"
	case counts[violinv1.NodeState_NODE_STATE_AWAY] > 0:
		return "away"
	case counts[violinv1.NodeState_NODE_STATE_SILENT] > 0:
		return "silent"
	case s.GetCutting():
		return "cutting"
	case counts[violinv1.NodeState_NODE_STATE_STARTING] > 0:
		return "starting"
	case counts[violinv1.NodeState_NODE_STATE_PAUSED] > 0:
		return "paused"
	default:
		return "running"
	}
}

// protectedState is a slice's state with whether it is protected.
func protectedState(s *violinv1.Slice, state string) string {
	if s.GetProtected() {
		return state + ", protected"
	}
	return state
}

// headOf names what a slice descends from.
func headOf(origin, id string) string {
	if origin != "" {
		return origin + "@" + id
	}
	return id
}

func (a *app) writeNodes(w io.Writer, list []*violinv1.Slice) {
	headings := []string{"NODE", "SITE", "HOST", "STATE", ">CPUS", ">MEMORY", "INTERFACES", ">EPOCH", ">PID"}
	details := slices.ContainsFunc(list, func(s *violinv1.Slice) bool {
		return slices.ContainsFunc(s.GetNodes(), func(n *violinv1.Node) bool { return n.GetDetail() != "" })
	})
	if details {
		headings = append(headings, "DETAIL")
	}
	t := newTable(headings...)
	for _, s := range list {
		for _, n := range s.GetNodes() {
			pid := ""
			if n.GetPid() != 0 {
				pid = fmt.Sprint(n.GetPid())
			}
			cells := []string{s.GetName() + "/" + n.GetName(), n.GetSite(), n.GetHost(), nodeState(n.GetState()),
				fmt.Sprint(n.GetCpus()), formatMemory(n.GetMemoryBytes()), interfaces(n), fmt.Sprint(n.GetEpoch()), pid}
			if details {
				cells = append(cells, n.GetDetail())
			}
			t.row(cells...)
		}
	}
	t.write(w)
	writeForwards(w, list)
}

// writeForwards writes where ports of nodes are reached from outside, if there are any. One
// that does not listen is in parentheses.
func writeForwards(w io.Writer, list []*violinv1.Slice) {
	var all []*violinv1.Forward
	var nodes []string
	for _, s := range list {
		for _, n := range s.GetNodes() {
			for _, f := range n.GetForwards() {
				all, nodes = append(all, f), append(nodes, s.GetName()+"/"+n.GetName())
			}
		}
	}
	if len(all) == 0 {
		return
	}
	headings := []string{"FORWARDED", "PORT", "LISTENS AT"}
	hosts := slices.ContainsFunc(all, func(f *violinv1.Forward) bool { return f.GetHost() != "" })
	problems := slices.ContainsFunc(all, func(f *violinv1.Forward) bool { return f.GetProblem() != "" })
	if hosts {
		headings = append(headings, "ON HOST")
	}
	if problems {
		headings = append(headings, "DETAIL")
	}
	t := newTable(headings...)
	for i, f := range all {
		at := f.GetListen()
		if !f.GetListening() {
			at = "(" + at + ")"
		}
		cells := []string{nodes[i], fmt.Sprintf("%d/%s", f.GetPort(), f.GetProtocol()), at}
		if hosts {
			cells = append(cells, f.GetHost())
		}
		if problems {
			cells = append(cells, f.GetProblem())
		}
		t.row(cells...)
	}
	fmt.Fprintln(w)
	t.write(w)
}

func nodeState(s violinv1.NodeState) string {
	return strings.ToLower(strings.TrimPrefix(s.String(), "NODE_STATE_"))
}

// interfaces names each interface's network, with its address or else its MAC.
func interfaces(n *violinv1.Node) string {
	var all []string
	for _, i := range n.GetInterfaces() {
		address := i.GetAddress()
		if address == "" {
			address = i.GetMac()
		}
		all = append(all, i.GetNetwork()+":"+address)
	}
	return strings.Join(all, " ")
}
