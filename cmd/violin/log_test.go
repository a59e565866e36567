package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	violinv1 "violin/api/violin/v1"
)

var logCommands = []command{
	{why: "the youngest first", args: []string{"log", "mandelbrot"}},
	{why: "as a tree", args: []string{"log", "mandelbrot", "--graph"}},
	{why: "for programs", args: []string{"log", "new", "-o", "json"}},
	{why: "no snapshots yet", args: []string{"log", "new"}},
	{why: "no such slice", args: []string{"log", "missing"}},
	{why: "a tag", args: []string{"tag", "mandelbrot@latest", "good"}},
	{why: "a tag that is taken", args: []string{"tag", "taken@latest", "good"}},
	{why: "no tag any more", args: []string{"tag", "--delete", "mandelbrot@good"}},
	{why: "not a snapshot's name", args: []string{"tag", "mandelbrot", "good"}},
	{why: "no tag given", args: []string{"tag", "mandelbrot@latest"}},
	{why: "a tag too many", args: []string{"tag", "-d", "mandelbrot@good", "good"}},
}

func (f *fakeServer) Log(ctx context.Context, request *violinv1.LogRequest) (*violinv1.LogResponse, error) {
	f.got(request)
	if err := f.fault(ctx, request.GetSlice()); err != nil {
		return nil, err
	}
	r := &violinv1.LogResponse{Slice: request.GetSlice(), Running: true}
	if request.GetSlice() == "new" {
		return r, nil
	}
	r.Head = "s3"
	for i, parent := range []string{"s0", "s1", "s2", "s1", "s4"} {
		s := &violinv1.Snapshot{Id: fmt.Sprintf("s%d", i+1), Parent: parent, Created: timestamppb.New(created.Add(time.Duration(i) * time.Minute)),
			RawBytes: 92 << 20, StoredBytes: 9 << 20 >> i}
		if i == 1 {
			s.Tags = []string{"before-the-crash", "good"}
		}
		r.Snapshots = append(r.Snapshots, s)
	}
	return r, nil
}

func (f *fakeServer) Tag(ctx context.Context, request *violinv1.TagRequest) (*violinv1.TagResponse, error) {
	f.got(request)
	slice, _, _ := strings.Cut(request.GetSnapshot(), "@")
	if err := f.fault(ctx, slice); err != nil {
		return nil, err
	}
	s := firstSnapshot()
	if !request.GetDelete() {
		s.Tags = []string{request.GetTag()}
	}
	return &violinv1.TagResponse{Snapshot: s}, nil
}

func TestDrawTree(t *testing.T) {
	for _, test := range []struct {
		commits string // id<parent, oldest first
		want    string
	}{
		{"", ""},
		{"1<", "● 1"},
		{"1< 2<1 3<2", "● 3\n● 2\n● 1"},
		{"1< 2<1 3<2 4<1 5<4", `
● 5
● 4
│ ● 3
│ ● 2
├─╯
● 1`},
		{"1< 2<1 3<1 4<1 5<2", `
● 5
│ ● 4
│ │ ● 3
● │ │ 2
├─┴─╯
● 1`},
		{"1<gone 2<gone 3<2 4<1", `
● 4
│ ● 3
│ ● 2
● 1`},
		{"1< 2< 3<1 4<2 5<1 6<2", `
● 6
│ ● 5
│ │ ● 4
│ │ │ ● 3
├─┼─╯ │
● │   │ 2
  ├───╯
  ● 1`},
		{"1<2 2<1", "● 2\n● 1"}, // a ring, which no server makes
		{"1<1", "● 1"},
	} {
		var commits []commit
		for i, f := range strings.Fields(test.commits) {
			id, parent, _ := strings.Cut(f, "<")
			commits = append(commits, commit{id, parent, created.Add(time.Duration(i) * time.Second)})
		}
		var got []string
		seen := map[string]int{}
		for _, l := range drawTree(commits) {
			if l.commit < 0 {
				got = append(got, l.graph)
				continue
			}
			c := commits[l.commit]
			got = append(got, l.graph+" "+c.id)
			seen[c.id]++
			if seen[c.parent] > 0 && c.parent != c.id && !strings.Contains(test.commits, "1<2 2<1") {
				t.Errorf("%s: %s is drawn above its child %s", test.commits, c.parent, c.id)
			}
		}
		if len(seen) != len(commits) || slices.ContainsFunc(commits, func(c commit) bool { return seen[c.id] != 1 }) {
			t.Errorf("%s: drawn were %v", test.commits, seen)
		}
		if want := strings.TrimPrefix(test.want, "\n"); want != "" && strings.Join(got, "\n") != want {
			t.Errorf("%s:\n%s\nwant\n%s", test.commits, strings.Join(got, "\n"), want)
		}
	}
}

// A child whose clock was behind its parent's is drawn above it all the same.
func TestDrawTreeSkew(t *testing.T) {
	lines := drawTree([]commit{{"1", "", created}, {"2", "1", created.Add(-time.Hour)}})
	if len(lines) != 2 || lines[0].commit != 1 || lines[1].commit != 0 {
		t.Errorf("%+v", lines)
	}
}
