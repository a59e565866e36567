package main

import (
	"context"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	violinv1 "violin/api/violin/v1"
)

var lifecycleCommands = []command{
	{why: "suspend", args: []string{"suspend", "mandelbrot"}},
	{why: "all of a host", args: []string{"suspend", "--all", "--host", "utah-1", "-q"}},
	{why: "for programs", args: []string{"suspend", "--all", "--host", "none", "-q", "-o", "json"}},
	{why: "the snapshot fails", args: []string{"suspend", "aborted"}},
	{why: "nothing named", args: []string{"suspend"}},
	{why: "a host, and one slice", args: []string{"suspend", "mandelbrot", "--host", "utah-1"}},
	{why: "resume", args: []string{"resume", "mandelbrot"}},
	{why: "resume what does not fit", args: []string{"resume", "large"}},
	{why: "fork", args: []string{"fork", "mandelbrot@latest", "--as", "whatif"}},
	{why: "fork without a name", args: []string{"fork", "mandelbrot@latest"}},
	{why: "the name is taken", args: []string{"fork", "mandelbrot@latest", "--as", "taken"}},
	{why: "no such fence", args: []string{"fork", "mandelbrot@latest", "--as", "whatif", "--fence", "open"}},
	{why: "a forward to no node", args: []string{"fork", "mandelbrot@latest", "--as", "whatif", "--forward", "9090:80"}},
	{why: "a forward from no port", args: []string{"fork", "mandelbrot@latest", "--as", "whatif", "--forward", "rank0=web:80"}},
	{why: "replay, for programs", args: []string{"replay", "mandelbrot@latest", "--as", "autopsy", "-q", "-o", "json"}},
	{why: "continue", args: []string{"continue", "autopsy"}},
	{why: "continue what is not there", args: []string{"continue", "missing"}},
}

func (f *fakeServer) Suspend(ctx context.Context, request *violinv1.SuspendRequest, stream *connect.ServerStream[violinv1.SuspendResponse]) error {
	f.got(request)
	if err := f.fault(ctx, request.GetSlice()); err != nil {
		return err
	}
	done := &violinv1.Suspended{}
	if request.GetHost() != "none" {
		done.Snapshots = append(done.Snapshots, firstSnapshot())
	}
	return stream.Send(&violinv1.SuspendResponse{Event: &violinv1.SuspendResponse_Suspended{Suspended: done}})
}

func restored(slice string, paused bool, stream *connect.ServerStream[violinv1.RestoreResponse]) error {
	s := &violinv1.Slice{Name: slice, Paused: paused, Nodes: mandelbrot().GetNodes()[:1]}
	return stream.Send(&violinv1.RestoreResponse{Event: &violinv1.RestoreResponse_Restored{Restored: &violinv1.Restored{
		Slice: s, Snapshot: &violinv1.Snapshot{Slice: "mandelbrot", Id: "s1"}, FramesInjected: 14,
	}}})
}

func (f *fakeServer) Resume(ctx context.Context, request *violinv1.ResumeRequest, stream *connect.ServerStream[violinv1.RestoreResponse]) error {
	f.got(request)
	if err := f.fault(ctx, request.GetSlice()); err != nil {
		return err
	}
	return restored(request.GetSlice(), false, stream)
}

func (f *fakeServer) Fork(ctx context.Context, request *violinv1.ForkRequest, stream *connect.ServerStream[violinv1.RestoreResponse]) error {
	f.got(request)
	slice, _, _ := strings.Cut(request.GetSnapshot(), "@")
	for _, name := range []string{slice, request.GetAs()} {
		if err := f.fault(ctx, name); err != nil {
			return err
		}
	}
	return restored(request.GetAs(), request.GetPaused(), stream)
}

func (f *fakeServer) Continue(ctx context.Context, request *violinv1.ContinueRequest) (*violinv1.ContinueResponse, error) {
	f.got(request)
	if err := f.fault(ctx, request.GetSlice()); err != nil {
		return nil, err
	}
	return &violinv1.ContinueResponse{Slice: mandelbrot(), FramesInjected: 14}, nil
}

// TestLifeRequests checks what the verbs ask for.
func TestLifeRequests(t *testing.T) {
	f := newFixture(t, violinVersion())
	catchUp := violinv1.ClockPolicy_CLOCK_POLICY_CATCH_UP
	for _, test := range []struct {
		args []string
		want proto.Message
	}{
		{[]string{"log", "pair"}, &violinv1.LogRequest{Slice: "pair"}},
		{[]string{"tag", "pair@x", "y", "--move"}, &violinv1.TagRequest{Snapshot: "pair@x", Tag: "y", Move: true}},
		{[]string{"tag", "-d", "pair@y"}, &violinv1.TagRequest{Snapshot: "pair@y", Delete: true}},
		{[]string{"snapshot", "pair", "--clock", "catch-up"}, &violinv1.SnapshotRequest{Slice: "pair", Clock: catchUp}},
		{[]string{"resume", "pair", "--place", "as-was"}, &violinv1.ResumeRequest{Slice: "pair", Placement: violinv1.PlacementPolicy_PLACEMENT_POLICY_AS_WAS}},
		{[]string{"fork", "pair@x", "--as", "y", "--on", "a=h,b=i"}, &violinv1.ForkRequest{Snapshot: "pair@x", As: "y", On: map[string]string{"a": "h", "b": "i"}}},
		{[]string{"restore", "pair@x", "--clock", "frozen", "--overcommit"}, &violinv1.RestoreRequest{Snapshot: "pair@x", Clock: violinv1.ClockPolicy_CLOCK_POLICY_FROZEN, Overcommit: true}},
		{[]string{"suspend", "pair", "--tag", "x"}, &violinv1.SuspendRequest{Slice: "pair", Tag: "x"}},
		{[]string{"suspend", "--all", "--host", "h"}, &violinv1.SuspendRequest{All: true, Host: "h"}},
		{[]string{"resume", "pair", "--overcommit"}, &violinv1.ResumeRequest{Slice: "pair", Overcommit: true}},
		{[]string{"fork", "pair@x", "--as", "y", "--new-genid", "--clock", "catch-up"}, &violinv1.ForkRequest{Snapshot: "pair@x", As: "y", NewGeneration: true, Clock: catchUp}},
		{
			[]string{"fork", "pair@x", "--as", "y", "--fence", "nat", "--no-forwards", "--forward", "a=9090:80", "--forward", "b=0:53/udp"},
			&violinv1.ForkRequest{
				Snapshot: "pair@x", As: "y", Fence: violinv1.Fence_FENCE_NAT, NoForwards: true,
				Forwards: []*violinv1.NodeForward{{Node: "a", Forward: "9090:80"}, {Node: "b", Forward: "0:53/udp"}},
			},
		},
		{[]string{"replay", "pair@x", "--as", "y", "--fence", "closed", "-o", "json"}, &violinv1.ForkRequest{Snapshot: "pair@x", As: "y", Paused: true, Fence: violinv1.Fence_FENCE_CLOSED}},
		{[]string{"replay", "pair@x", "--as", "y", "-o", "json"}, &violinv1.ForkRequest{Snapshot: "pair@x", As: "y", Paused: true}},
		{[]string{"continue", "y"}, &violinv1.ContinueRequest{Slice: "y"}},
		{
			[]string{"protect", "pair", "--every", "1m", "--keep", "3", "--max-rollbacks", "2", "--window", "10m", "--webhook", "http://h/x", "--dry-run"},
			&violinv1.ProtectRequest{Slice: "pair", Every: durationpb.New(time.Minute), Keep: 3, MaxRollbacks: 2, Window: durationpb.New(10 * time.Minute), Webhook: "http://h/x", DryRun: true},
		},
		{[]string{"unprotect", "pair"}, &violinv1.UnprotectRequest{Slice: "pair"}},
		{[]string{"events", "pair", "-f", "-n", "1", "--after", "7"}, &violinv1.EventsRequest{Slice: "pair", Follow: true, Last: 1, After: 7}},
	} {
		t.Run(strings.Join(test.args, " "), func(t *testing.T) {
			if r := violin(t.Context(), f.dirs, nil, test.args...); r.status != exitOK {
				t.Fatalf("status %d: %s", r.status, r.stderr)
			}
			if got := f.last(); !proto.Equal(got, test.want) {
				t.Errorf("got %v\nwant %v", got, test.want)
			}
		})
	}
}
