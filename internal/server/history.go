package server

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"connectrpc.com/connect"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
	"violin/internal/catalog"
)

var _ violinv1connect.HistoryServiceHandler = (*Server)(nil)

// Log implements the API.
func (s *Server) Log(ctx context.Context, req *violinv1.LogRequest) (*violinv1.LogResponse, error) {
	if err := catalog.CheckName(req.GetSlice()); err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	all, err := s.catalog.List(ctx, req.GetSlice())
	if err != nil {
		return nil, apiError(err)
	}
	resp := &violinv1.LogResponse{Slice: req.GetSlice()}
	sl, err := s.slice(req.GetSlice())
	switch {
	case err == nil:
		resp.Running = true
		resp.Origin, resp.Head = sl.getHead()
	case s.suspension(req.GetSlice()) != nil:
		resp.Suspended, resp.Head = true, s.suspension(req.GetSlice()).Snapshot
	case len(all) == 0:
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("slice %q neither runs nor has snapshots", req.GetSlice()))
	}
	for _, snap := range all {
		resp.Snapshots = append(resp.Snapshots, snapshotMessage(snap))
	}
	return resp, nil
}

// Tag implements the API.
func (s *Server) Tag(ctx context.Context, req *violinv1.TagRequest) (*violinv1.TagResponse, error) {
	invalid := func(err error) error { return connect.NewError(connect.CodeInvalidArgument, err) }
	slice, tag, _ := strings.Cut(req.GetSnapshot(), "@")
	if req.GetDelete() == (req.GetTag() != "") {
		return nil, invalid(errors.New("name the snapshot and its new tag, or SLICE@TAG of the tag that is to go"))
	}
	if req.GetDelete() {
		if err := errors.Join(catalog.CheckName(slice), catalog.CheckTag(tag)); err != nil {
			return nil, invalid(err)
		}
	} else if err := catalog.CheckTag(req.GetTag()); err != nil {
		return nil, invalid(err)
	}
	snap, err := s.catalog.Resolve(ctx, req.GetSnapshot())
	if err != nil {
		return nil, apiError(err)
	}
	if req.GetDelete() {
		err = s.catalog.DeleteTag(ctx, snap.Slice, tag)
	} else {
		err = s.catalog.SetTag(ctx, snap.Slice, snap.ID, req.GetTag(), req.GetMove())
	}
	if err != nil {
		return nil, apiError(err)
	}
	if snap, err = s.catalog.Get(ctx, snap.Slice, snap.ID); err != nil {
		return nil, apiError(err)
	}
	return &violinv1.TagResponse{Snapshot: snapshotMessage(snap)}, nil
}
