package main

import (
	"context"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	violinv1 "violin/api/violin/v1"
)

var protectCommands = []command{
	{why: "protect", args: []string{"protect", "mandelbrot", "--every", "5m", "--keep", "3", "--webhook", "https://example.org/hook"}},
	{why: "what is protected", args: []string{"protect"}},
	{why: "for programs", args: []string{"protect", "-o", "json"}},
	{why: "no schedule", args: []string{"protect", "mandelbrot"}},
	{why: "no slice", args: []string{"protect", "--every", "5m"}},
	{why: "no such slice", args: []string{"protect", "missing", "--every", "5m"}},
	{why: "unprotect", args: []string{"unprotect", "mandelbrot"}},
	{why: "it was not protected", args: []string{"unprotect", "missing"}},
	{why: "what happened", args: []string{"events"}},
	{why: "for programs, a line an event", args: []string{"events", "mandelbrot", "-n", "1", "-o", "json"}},
}

func (f *fakeServer) Protect(ctx context.Context, request *violinv1.ProtectRequest) (*violinv1.ProtectResponse, error) {
	f.got(request)
	if err := f.fault(ctx, request.GetSlice()); err != nil {
		return nil, err
	}
	return &violinv1.ProtectResponse{Protection: &violinv1.Protection{
		Slice: request.GetSlice(), Every: request.GetEvery(), Keep: request.GetKeep(), MaxRollbacks: 5, Window: durationpb.New(time.Hour),
		Webhook: request.GetWebhook(), DryRun: request.GetDryRun(), Since: timestamppb.New(created),
	}}, nil
}

func (f *fakeServer) Unprotect(ctx context.Context, request *violinv1.UnprotectRequest) (*violinv1.UnprotectResponse, error) {
	f.got(request)
	return &violinv1.UnprotectResponse{}, f.fault(ctx, request.GetSlice())
}

func (f *fakeServer) ListProtections(_ context.Context, request *violinv1.ListProtectionsRequest) (*violinv1.ListProtectionsResponse, error) {
	f.got(request)
	p := &violinv1.Protection{Slice: "mandelbrot", Every: durationpb.New(5 * time.Minute), Keep: 12, MaxRollbacks: 5, Window: durationpb.New(time.Hour),
		Since: timestamppb.New(created), Head: "mandelbrot@s1", Rollbacks: 2}
	dry := &violinv1.Protection{Slice: "pair", Every: durationpb.New(90 * time.Second), Keep: 1, MaxRollbacks: 1, Window: durationpb.New(time.Minute), Since: timestamppb.New(created), DryRun: true}
	gone := &violinv1.Protection{Slice: "loop", Every: durationpb.New(time.Hour), Keep: 1, MaxRollbacks: 3, Rollbacks: 3, Window: durationpb.New(time.Hour), Since: timestamppb.New(created), GaveUp: true}
	return &violinv1.ListProtectionsResponse{Protections: []*violinv1.Protection{p, dry, gone}}, nil
}

func (f *fakeServer) Events(_ context.Context, request *violinv1.EventsRequest, stream *connect.ServerStream[violinv1.Event]) error {
	f.got(request)
	all := []*violinv1.Event{
		{Number: 1, At: timestamppb.New(created), Slice: "mandelbrot", Kind: "node-died", Node: "rank0", Host: "utah-1", Text: "killed\x1b[2J"},
		{Number: 2, At: timestamppb.New(created.Add(time.Second)), Slice: "mandelbrot", Kind: "rolled-back", Snapshot: "mandelbrot@s1", Text: "took 2.1s"},
	}
	for _, e := range all[int(request.GetLast()):] {
		if err := stream.Send(e); err != nil {
			return err
		}
	}
	return nil
}
