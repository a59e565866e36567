package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
)

// placementFlags are of all verbs that bring a snapshot to life; without --place, otherwise
// is what the server does.
func placementFlags(cmd *cobra.Command, policy *violinv1.PlacementPolicy, on *map[string]string, otherwise string) {
	cmd.Flags().Var(&onValue{on}, "on", "the hosts that nodes are to come up on, as `NODE=HOST,...`; all else about them stays as it was")
	cmd.Flags().Var((*placementValue)(policy), "place", `where nodes come up: as-was (on the hosts that they were on) or auto (there if the host
takes them and has room, else on another one of the site, else on any); `+otherwise+` if not given`)
	_ = cmd.RegisterFlagCompletionFunc("place", cobra.FixedCompletions([]string{"as-was", "auto"}, cobra.ShellCompDirectiveNoFileComp))
}

// onValue is --on, which may be given more than once.
type onValue struct{ to *map[string]string }

func (v *onValue) Type() string { return "NODE=HOST,..." }

func (v *onValue) String() string {
	if v.to == nil {
		return ""
	}
	var all []string
	for _, node := range slices.Sorted(maps.Keys(*v.to)) {
		all = append(all, node+"="+(*v.to)[node])
	}
	return strings.Join(all, ",")
}

func (v *onValue) Set(text string) error {
	on := map[string]string{}
	maps.Copy(on, *v.to)
	for pair := range strings.SplitSeq(text, ",") {
		node, host, _ := strings.Cut(pair, "=")
		switch before, twice := on[node]; {
		case node == "" || host == "":
			return fmt.Errorf("%q is no NODE=HOST", pair)
		case twice && before != host:
			return fmt.Errorf("node %q is to be on %s and on %s", node, before, host)
		}
		on[node] = host
	}
	*v.to = on
	return nil
}

// placementValue is --place.
type placementValue violinv1.PlacementPolicy

func (v *placementValue) Type() string { return "policy" }

func (v *placementValue) String() string {
	switch violinv1.PlacementPolicy(*v) {
	case violinv1.PlacementPolicy_PLACEMENT_POLICY_AS_WAS:
		return "as-was"
	case violinv1.PlacementPolicy_PLACEMENT_POLICY_AUTO:
		return "auto"
	}
	return ""
}

func (v *placementValue) Set(text string) error {
	switch text {
	case "as-was":
		*v = placementValue(violinv1.PlacementPolicy_PLACEMENT_POLICY_AS_WAS)
	case "auto":
		*v = placementValue(violinv1.PlacementPolicy_PLACEMENT_POLICY_AUTO)
	default:
		return errors.New("it is as-was or auto")
	}
	return nil
}

// moved says of a node that it is on another host than it was on.
func moved(m *violinv1.NodeMove) string {
	s := fmt.Sprintf("%s is on %s, and was on %s", m.GetNode(), m.GetTo(), m.GetFrom())
	if m.GetWhy() != "" {
		s += " (" + m.GetWhy() + ")"
	}
	return s
}

func (a *app) cordonCommand(on bool) *cobra.Command {
	use, short, done := "cordon HOST", "Let nothing new come up on a machine", "takes nothing new"
	long := `Let nothing new come up on a machine. What runs there goes on; 'violin suspend --all --host
HOST' brings it to snapshots, and 'violin resume' to other hosts then. Restores and rollbacks
count as new, too. It lasts until 'violin hosts uncordon', also over restarts of the server.`
	if !on {
		use, short, done = "uncordon HOST", "Let a machine that was cordoned take nodes again", "takes nodes again"
		long = `Let a machine that was cordoned take nodes again. Nodes that went elsewhere meanwhile stay there.`
	}
	return &cobra.Command{
		Use: use, Short: short, Long: long, Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := find(cmd.Context(), a, violinv1connect.NewHostServiceClient)
			if err != nil {
				return err
			}
			r, err := c.CordonHost(cmd.Context(), &violinv1.CordonHostRequest{Name: args[0], Cordoned: on})
			if err != nil {
				return err
			}
			return a.print(r, func(w io.Writer) { fmt.Fprintf(w, "%s %s\n", args[0], done) })
		},
	}
}
