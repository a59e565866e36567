package main

import (
	"context"
	"errors"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	violinv1 "violin/api/violin/v1"
)

var storeCommands = []command{
	{why: "what there is", args: []string{"store", "stats"}},
	{why: "a sound store", args: []string{"store", "check"}},
	{why: "damage, found by reading", args: []string{"store", "check", "--read-data", "-q"}},
	{why: "damage, for programs", args: []string{"store", "check", "--read-data", "-q", "-o", "json"}},
	{why: "garbage", args: []string{"store", "gc"}},
	{why: "by rules", args: []string{"forget", "--slice", "mandelbrot", "--keep-last", "1", "--keep-tag", "release"}},
	{why: "only to see", args: []string{"forget", "--slice", "mandelbrot", "--keep-last", "1", "-n"}},
	{why: "by name", args: []string{"forget", "mandelbrot@before-the-crash", "-q"}},
	{why: "no such snapshot", args: []string{"forget", "missing@latest"}},
	{why: "a slice is no snapshot", args: []string{"forget", "mandelbrot"}},
	{why: "both ways at once", args: []string{"forget", "a@b", "--keep-last", "1"}},
	{why: "a slice without a rule is not emptied", args: []string{"forget", "--slice", "mandelbrot"}},
	{why: "nothing named", args: []string{"forget"}},
	{why: "export to nowhere", args: []string{"export", "mandelbrot@latest"}},
	{why: "a slice is no snapshot", args: []string{"export", "mandelbrot", "-f", "/nonexistent/x"}},
	{why: "no such directory", args: []string{"export", "mandelbrot@latest", "-f", "/nonexistent/x"}},
	{why: "no such file", args: []string{"import", "/nonexistent/x"}},
	{why: "an empty passphrase", args: []string{"import", "/dev/null", "--export-passphrase-file", "/dev/null"}},
}

func (f *fakeServer) Stats(context.Context, *violinv1.StatsRequest) (*violinv1.StatsResponse, error) {
	return &violinv1.StatsResponse{Location: "/var/lib/violin/store", Id: "0f4d8c", Encrypted: true, Snapshots: 12, Slices: 2,
		Packs: 9, PackBytes: 210 << 20, Pages: 131072, PageBytes: 512 << 20, Chunks: 800, IndexBytes: 4 << 20, MemoryBytes: 12 << 30}, nil
}

func (f *fakeServer) Check(_ context.Context, request *violinv1.CheckRequest, stream *connect.ServerStream[violinv1.CheckResponse]) error {
	f.got(request)
	if err := stream.Send(&violinv1.CheckResponse{Event: &violinv1.CheckResponse_Progress{Progress: &violinv1.Progress{Step: "check", Detail: "2 of 2 packs"}}}); err != nil {
		return err
	}
	r := &violinv1.CheckReport{Packs: 2, Pages: 9000, Chunks: 40, Bytes: 20 << 20, ReadData: request.GetReadData()}
	if r.GetReadData() {
		offset := int64(4711)
		r.Damage = []*violinv1.Damage{
			{Message: "check page ab3f in pack packs/12/1234 at byte 4711: damaged: it has hash cd", Pack: "packs/12/1234", Page: "ab3f", Offset: &offset,
				NeededBy: []string{"mandelbrot@a rank0 memory", "mandelbrot@b rank0 memory"}},
			{Message: "check pack in pack packs/56/5678: damaged: digest", Pack: "packs/56/5678"},
		}
	}
	return stream.Send(&violinv1.CheckResponse{Event: &violinv1.CheckResponse_Report{Report: r}})
}

func (f *fakeServer) Collect(context.Context, *violinv1.CollectRequest) (*violinv1.CollectResponse, error) {
	return &violinv1.CollectResponse{PacksDeleted: 3, PacksRewritten: 1, PacksInUse: 1, BytesFreed: 90 << 20, BytesKept: 120 << 20,
		Duration: durationpb.New(340 * time.Millisecond)}, nil
}

func (f *fakeServer) Forget(_ context.Context, request *violinv1.ForgetRequest) (*violinv1.ForgetResponse, error) {
	f.got(request)
	if len(request.GetSnapshots()) > 0 && request.GetSnapshots()[0] == "missing@latest" {
		return nil, connect.NewError(connect.CodeNotFound, errors.New(`find snapshot "missing@latest": no such snapshot`))
	}
	second := firstSnapshot()
	second.Tags = []string{"release"}
	second.Id, second.Tag, second.Created = "20261123T120100-5e1d", "release", timestamppb.New(created.Add(time.Minute))
	return &violinv1.ForgetResponse{DryRun: request.GetDryRun(), Verdicts: []*violinv1.Verdict{
		{Snapshot: firstSnapshot(), Reasons: []string{"no rule keeps it"}},
		{Snapshot: second, Kept: true, Reasons: []string{"last 1", "tag release"}},
	}}, nil
}
