package main

import (
	"cmp"
	"slices"
	"strings"
	"time"
)

// commit is a snapshot as a tree of snapshots is drawn of them.
type commit struct {
	id, parent string
	at         time.Time
}

// line is one of a drawing: what is left of the snapshot's text, or, if it is of
// none, a line that joins branches.
type line struct {
	graph  string
	commit int // index of the commit, or -1
}

// drawTree draws a history: children above their parents, the youngest first, a column
// a branch. A parent that is not there ends its branch.
//
//	● 4
//	│ ● 3
//	├─╯
//	● 1
func drawTree(commits []commit) []line {
	present := map[string]bool{}
	for _, c := range commits {
		present[c.id] = true
	}
	// awaited is, by column, the parent that its branch goes down to; "" is a free one.
	var awaited []string
	var out []line
	for _, i := range downwards(commits) {
		c := commits[i]
		at := slices.Index(awaited, c.id)
		if at < 0 { // nothing came of it: a new branch
			if at = slices.Index(awaited, ""); at < 0 {
				at = len(awaited)
				awaited = append(awaited, "")
			}
		}
		if joined := join(awaited, c.id, at); joined != "" {
			out = append(out, line{joined, -1})
		}
		for k := range awaited {
			if k != at && awaited[k] == c.id {
				awaited[k] = ""
			}
		}
		awaited[at] = c.id
		out = append(out, line{rails(awaited, at), i})
		awaited[at] = ""
		if present[c.parent] && c.parent != c.id {
			awaited[at] = c.parent
		}
		for len(awaited) > 0 && awaited[len(awaited)-1] == "" {
			awaited = awaited[:len(awaited)-1]
		}
	}
	return out
}

// downwards orders the commits for drawing: the youngest first, and none before its
// children, whatever the clocks said.
func downwards(commits []commit) []int {
	children := map[string]int{}
	for _, c := range commits {
		children[c.parent]++
	}
	left := make([]int, len(commits))
	for i := range left {
		left[i] = i
	}
	slices.SortStableFunc(left, func(a, b int) int {
		return cmp.Or(commits[b].at.Compare(commits[a].at), cmp.Compare(commits[b].id, commits[a].id))
	})
	var out []int
	for len(left) > 0 {
		// A ring of parents, which no server makes, is broken anywhere.
		next := max(0, slices.IndexFunc(left, func(i int) bool { return children[commits[i].id] == 0 }))
		i := left[next]
		left = slices.Delete(left, next, next+1)
		out = append(out, i)
		children[commits[i].parent]--
	}
	return out
}

// rails draws the columns beside a commit.
func rails(awaited []string, at int) string {
	var b strings.Builder
	for k, id := range awaited {
		switch {
		case k == at:
			b.WriteString("● ")
		case id == "":
			b.WriteString("  ")
		default:
			b.WriteString("│ ")
		}
	}
	return strings.TrimRight(b.String(), " ")
}

// join draws the line in which all branches that come from a commit meet in its
// column, the leftmost of them; it is empty if there is but one.
func join(awaited []string, id string, at int) string {
	last := at
	for k := range awaited {
		if awaited[k] == id {
			last = max(last, k)
		}
	}
	if last == at {
		return ""
	}
	var b strings.Builder
	for k := range awaited {
		between := k > at && k < last
		switch {
		case k == at:
			b.WriteString("├─")
		case k == last:
			b.WriteString("╯ ")
		case between && awaited[k] == id:
			b.WriteString("┴─")
		case between && awaited[k] == "":
			b.WriteString("──")
		case between:
			b.WriteString("┼─")
		case awaited[k] == "":
			b.WriteString("  ")
		default:
			b.WriteString("│ ")
		}
	}
	return strings.TrimRight(b.String(), " ")
}
