package main

import (
	"context"
	"errors"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	violinv1 "violin/api/violin/v1"
)

var imageCommands = []command{
	{why: "the table", args: []string{"image", "ls"}},
	{why: "for programs", args: []string{"image", "ls", "-o", "json", "-q"}},
	{why: "removed", args: []string{"image", "rm", "old"}},
	{why: "a snapshot needs it", args: []string{"image", "rm", "mpi"}},
	{why: "no such image", args: []string{"image", "rm", "missing"}},
	{why: "no image's name", args: []string{"image", "build", "../x", "-f", "x.yaml"}},
	{why: "no recipe", args: []string{"image", "build", "web", "-f", "/nonexistent/image.yaml"}},
	{why: "a name that a file's name does not give", args: []string{"image", "import", "/nonexistent/My Disk.qcow2"}},
	{why: "no file", args: []string{"image", "import", "/nonexistent/disk.qcow2"}},
	{why: "not told which recipe", args: []string{"image", "build", "web"}},
}

func (f *fakeServer) ListImages(context.Context, *violinv1.ListImagesRequest) (*violinv1.ListImagesResponse, error) {
	return &violinv1.ListImagesResponse{
		Images: []*violinv1.Image{
			{Name: "mpi", Kernel: "6.1.0-56-cloud-amd64", Bytes: 104_000_000, Built: timestamppb.New(created), Slices: []string{"mandelbrot", "pair"}, Snapshots: []string{"pair@s1"}},
			{
				Name: "debian", Bytes: 340_000_000, Built: timestamppb.New(created), Slices: []string{"cloud"},
				Disk: &violinv1.ImageDisk{Format: "qcow2", Bytes: 3 << 30, Firmware: "uefi"},
			},
			{Name: "old", Kernel: "6.1.0-9-amd64", Bytes: 80_000_000, Built: timestamppb.New(created.Add(-time.Hour))},
		},
		Broken: []string{`image "half" is not whole`},
	}, nil
}

func (f *fakeServer) RemoveImage(_ context.Context, request *violinv1.RemoveImageRequest) (*violinv1.RemoveImageResponse, error) {
	f.got(request)
	switch request.GetName() {
	case "mpi":
		return nil, connect.NewError(connect.CodeFailedPrecondition, errors.New("image mpi: a snapshot needs it"))
	case "missing":
		return nil, connect.NewError(connect.CodeNotFound, errors.New("image missing: there is no such image"))
	}
	return &violinv1.RemoveImageResponse{}, nil
}
