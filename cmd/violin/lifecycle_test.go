package main

import (
	"context"
	"strings"

	"connectrpc.com/connect"

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
