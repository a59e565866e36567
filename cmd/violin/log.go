package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
)

func (a *app) logCommand() *cobra.Command {
	var graph bool
	cmd := &cobra.Command{
		Use:   "log SLICE",
		Short: "Tell a slice's history",
		Long: `Tell a slice's history, the youngest snapshot first. It is a tree: a slice that was
restored goes on from the snapshot that it was restored to, and the next snapshot is a
child of that one. HEAD is the one that what runs now descends from last. A slice need
not run for this.`,
		Example:           "  violin log mandelbrot --graph",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completion(sliceNames),
		RunE:              func(cmd *cobra.Command, args []string) error { return a.log(cmd.Context(), args[0], graph) },
	}
	cmd.Flags().BoolVarP(&graph, "graph", "g", false, "draw the tree")
	return cmd
}

func (a *app) log(ctx context.Context, slice string, graph bool) error {
	p := a.progress()
	defer p.done()
	c, err := start(ctx, a, p, violinv1connect.NewHistoryServiceClient)
	if err != nil {
		return err
	}
	r, err := c.Log(ctx, &violinv1.LogRequest{Slice: slice})
	if err != nil {
		return err
	}
	p.done()
	if len(r.GetSnapshots()) == 0 {
		a.note("no snapshots; 'violin snapshot %s' takes one", slice)
	}
	return a.print(r, func(w io.Writer) {
		if len(r.GetSnapshots()) > 0 {
			a.writeLog(w, r, graph)
		}
	})
}

func (a *app) writeLog(w io.Writer, r *violinv1.LogResponse, graph bool) {
	all := r.GetSnapshots()
	known := map[string]bool{}
	commits := make([]commit, len(all))
	for i, s := range all {
		known[s.GetId()] = true
		commits[i] = commit{id: s.GetId(), parent: s.GetParent(), at: s.GetCreated().AsTime()}
	}
	if !graph {
		t := newTable("SNAPSHOT", "PARENT", "CREATED", ">STATE", ">STORED", "TAGS", "NOTE")
		for _, i := range downwards(commits) {
			s := all[i]
			t.row(s.GetId(), s.GetParent(), a.formatTime(s.GetCreated()), formatBytes(s.GetRawBytes()), formatBytes(s.GetStoredBytes()),
				tagsOf(s), strings.Join(notes(s, r, known), ", "))
		}
		t.write(w)
		return
	}
	lines := drawTree(commits)
	wide := 0
	for _, l := range lines {
		wide = max(wide, utf8.RuneCountInString(l.graph))
	}
	var ids, times, sizes []string
	for _, s := range all {
		ids, times, sizes = append(ids, s.GetId()), append(times, a.formatTime(s.GetCreated())), append(sizes, formatBytes(s.GetStoredBytes()))
	}
	for _, l := range lines {
		if l.commit < 0 {
			fmt.Fprintln(w, l.graph)
			continue
		}
		s := all[l.commit]
		text := fmt.Sprintf("%s%s  %-*s  %s  %*s", l.graph, strings.Repeat(" ", wide-utf8.RuneCountInString(l.graph)),
			longest(ids), ids[l.commit], times[l.commit], longest(sizes), sizes[l.commit])
		if tags := tagsOf(s); tags != "" {
			text += "  [" + printable(tags) + "]"
		}
		if n := notes(s, r, known); len(n) > 0 {
			text += "  " + strings.Join(n, ", ")
		}
		fmt.Fprintln(w, text)
	}
}

func longest(list []string) int {
	return len(slices.MaxFunc(list, func(a, b string) int { return len(a) - len(b) }))
}

// notes are what is to be said of a snapshot's place in the history.
func notes(s *violinv1.Snapshot, r *violinv1.LogResponse, known map[string]bool) (n []string) {
	switch {
	case s.GetId() != r.GetHead() || r.GetOrigin() != "":
	case r.GetSuspended():
		n = append(n, "HEAD, suspended")
	default:
		n = append(n, "HEAD")
	}
	if o := s.GetParentSlice(); o != "" {
		return append(n, "fork of "+o+"@"+s.GetParent())
	}
	if p := s.GetParent(); p != "" && !known[p] {
		n = append(n, "parent "+p+" is forgotten")
	}
	return n
}
