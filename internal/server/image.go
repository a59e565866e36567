package server

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"connectrpc.com/connect"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
	"violin/internal/access"
	"violin/internal/catalog"
	"violin/internal/image"
	"violin/internal/store"
)

var _ violinv1connect.ImageServiceHandler = (*Server)(nil)

func (s *Server) images() string { return filepath.Join(s.cfg.StateDir, "images") }

// ListImages implements the API.
func (s *Server) ListImages(ctx context.Context, _ *violinv1.ListImagesRequest) (*violinv1.ListImagesResponse, error) {
	all, broken := image.List(s.images())
	users, err := s.imageUsers(ctx)
	if err != nil {
		return nil, apiError(err)
	}
	resp := &violinv1.ListImagesResponse{}
	if broken != nil {
		if access.From(ctx).Operator() { // it has paths in it
			resp.Broken = strings.Split(broken.Error(), "\n")
		}
	}
	for _, i := range all {
		running, snapshots, err := users(i.Name)
		if err != nil {
			return nil, apiError(err)
		}
		running, snapshots = s.ownedNames(ctx, running), s.ownedNames(ctx, snapshots)
		resp.Images = append(resp.Images, &violinv1.Image{
			Name: i.Name, Kernel: i.Kernel, Bytes: uint64(i.Bytes), Built: timestamp(i.Built), Slices: running, Snapshots: snapshots,
		})
		if d := i.Disk; d != nil {
			resp.Images[len(resp.Images)-1].Disk = &violinv1.ImageDisk{Format: d.Format, Bytes: d.Size, Firmware: d.Firmware}
		}
	}
	return resp, nil
}

// RemoveImage implements the API.
func (s *Server) RemoveImage(ctx context.Context, req *violinv1.RemoveImageRequest) (*violinv1.RemoveImageResponse, error) {
	name := req.GetName()
	if err := image.CheckName(name); err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	users, err := s.imageUsers(ctx)
	if err != nil {
		return nil, apiError(err)
	}
	running, snapshots, err := users(name)
	switch {
	case errors.Is(err, image.ErrNotFound):
		return nil, connect.NewError(connect.CodeNotFound, err)
	case err != nil && !req.GetForce():
		return nil, connect.NewError(connect.CodeFailedPrecondition, err)
	case len(running) > 0:
		return nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("image %q: slice %s runs from it; take it down first", name, strings.Join(running, ", ")))
	case len(snapshots) > 0 && !req.GetForce():
		return nil, connect.NewError(connect.CodeFailedPrecondition,
			fmt.Errorf("image %q: %d snapshots can be restored on it only, such as %s; forget them first, or remove it with --force", name, len(snapshots), snapshots[0]))
	}
	if err := image.Remove(s.images(), name); errors.Is(err, image.ErrNotFound) {
		return nil, connect.NewError(connect.CodeNotFound, err)
	} else if err != nil {
		return nil, apiError(err)
	}
	return &violinv1.RemoveImageResponse{}, nil
}

// imageUsers returns what tells who uses an image: the slices that run from it, and the
// snapshots whose nodes booted from this very build.
func (s *Server) imageUsers(ctx context.Context) (func(name string) (running, snapshots []string, err error), error) {
	all, err := s.catalog.List(ctx, "")
	if err != nil {
		return nil, err
	}
	bySlice := map[string][]string{}
	s.mu.Lock()
	for name, sl := range s.slices {
		if sl == nil {
			continue
		}
		for i := range sl.topo.Nodes {
			if img := sl.topo.Nodes[i].Image; img != "" && !slices.Contains(bySlice[img], name) {
				bySlice[img] = append(bySlice[img], name)
			}
		}
	}
	s.mu.Unlock()
	return func(name string) (running, snapshots []string, err error) {
		running = slices.Sorted(slices.Values(bySlice[name]))
		info, err := image.Open(s.images(), name)
		if err != nil {
			return running, nil, err
		}
		main, _, err := s.boot.Of(filepath.Join(s.images(), name, info.Main()))
		if err != nil {
			return running, nil, fmt.Errorf("image %q: %w", name, err)
		}
		for _, snap := range all {
			if bootedFrom(snap, main) {
				snapshots = append(snapshots, snap.Slice+"@"+snap.ID)
			}
		}
		return running, snapshots, nil
	}, nil
}

// bootedFrom tells whether a node of the snapshot needs a file that is of one image alone.
func bootedFrom(snap *catalog.Snapshot, main store.Hash) bool {
	return slices.ContainsFunc(snap.Nodes, func(n catalog.Node) bool {
		return slices.ContainsFunc(n.Boot, func(f catalog.BootFile) bool { return f.Hash == main })
	})
}
