package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
	"violin/internal/daemon"
)

// findNode finds the node meant by SLICE/NODE, or by NODE if just one slice that
// runs has a node of that name.
func (a *app) findNode(ctx context.Context, name string) (c violinv1connect.SliceServiceClient, slice, node string, err error) {
	if slice, node, ok := strings.Cut(name, "/"); ok {
		if slice == "" || node == "" {
			return nil, "", "", &failure{code: exitUsage, err: fmt.Errorf("node %q: a node is named SLICE/NODE", name)}
		}
		c, err := a.findSliceServer(ctx, slice)
		return c, slice, node, err
	}
	c, err = a.findServer(ctx)
	if errors.Is(err, daemon.ErrNotRunning) {
		return nil, "", "", &failure{code: exitNotFound, err: fmt.Errorf("node %q does not run: %w", name, err)}
	}
	if err != nil {
		return nil, "", "", err
	}
	list, err := c.ListSlices(ctx, &violinv1.ListSlicesRequest{})
	if err != nil {
		return nil, "", "", err
	}
	var found []string
	for _, s := range list.GetSlices() {
		for _, n := range s.GetNodes() {
			if n.GetName() == name {
				found = append(found, s.GetName()+"/"+name)
				slice = s.GetName()
			}
		}
	}
	switch len(found) {
	case 0:
		return nil, "", "", &failure{code: exitNotFound, err: fmt.Errorf("no slice that runs has a node %q", name), hint: "'violin ps' lists what runs."}
	case 1:
		return c, slice, name, nil
	default:
		slices.Sort(found)
		return nil, "", "", &failure{code: exitUsage, err: fmt.Errorf("node %q: which of %s?", name, strings.Join(found, ", "))}
	}
}

// completion lists candidates for the first argument of a verb. It asks a server
// that runs and starts none: pressing Tab changes nothing.
func (a *app) completion(candidates func(context.Context, violinv1connect.SliceServiceClient) []string) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		a.quiet = true
		c, err := a.findServer(cmd.Context())
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return candidates(cmd.Context(), c), cobra.ShellCompDirectiveNoFileComp
	}
}

func sliceNames(ctx context.Context, c violinv1connect.SliceServiceClient) (names []string) {
	list, err := c.ListSlices(ctx, &violinv1.ListSlicesRequest{})
	if err != nil {
		return nil
	}
	for _, s := range list.GetSlices() {
		names = append(names, s.GetName())
	}
	return names
}

func nodeNames(ctx context.Context, c violinv1connect.SliceServiceClient) (names []string) {
	list, err := c.ListSlices(ctx, &violinv1.ListSlicesRequest{})
	if err != nil {
		return nil
	}
	for _, s := range list.GetSlices() {
		for _, n := range s.GetNodes() {
			names = append(names, s.GetName()+"/"+n.GetName())
		}
	}
	return names
}

func snapshotNames(ctx context.Context, c violinv1connect.SliceServiceClient) (names []string) {
	list, err := c.ListSnapshots(ctx, &violinv1.ListSnapshotsRequest{})
	if err != nil {
		return nil
	}
	for _, s := range list.GetSnapshots() {
		names = append(names, snapshotName(s))
		for _, tag := range s.GetTags() {
			names = append(names, s.GetSlice()+"@"+tag)
		}
	}
	return names
}

// snapshotName is what restore takes.
func snapshotName(s *violinv1.Snapshot) string { return s.GetSlice() + "@" + s.GetId() }

// tagsOf is a snapshot's tags, for a table.
func tagsOf(s *violinv1.Snapshot) string { return strings.Join(s.GetTags(), ",") }
