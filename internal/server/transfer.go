package server

import (
	"bufio"
	"context"
	"errors"
	"io"

	"connectrpc.com/connect"

	violinv1 "violin/api/violin/v1"
	"violin/internal/transfer"
)

// messageSize is how many bytes of a file a message carries.
const messageSize = 256 << 10

// Export implements the API.
func (s *Server) Export(ctx context.Context, req *violinv1.ExportRequest, out *connect.ServerStream[violinv1.ExportResponse]) error {
	snap, err := s.catalog.Resolve(ctx, req.GetSnapshot())
	if err != nil {
		return apiError(err)
	}
	if err := out.Send(&violinv1.ExportResponse{Event: &violinv1.ExportResponse_Snapshot{Snapshot: snapshotMessage(snap)}}); err != nil {
		return err
	}
	w := bufio.NewWriterSize(exportWriter{out}, messageSize)
	if _, err := transfer.Export(ctx, s.store, snap, w, req.GetPassphrase()); err != nil {
		return apiError(err)
	}
	return w.Flush()
}

type exportWriter struct {
	out *connect.ServerStream[violinv1.ExportResponse]
}

func (w exportWriter) Write(b []byte) (int, error) {
	for part := b; len(part) > 0; {
		n := min(len(part), messageSize)
		if err := w.out.Send(&violinv1.ExportResponse{Event: &violinv1.ExportResponse_Data{Data: part[:n]}}); err != nil {
			return 0, err
		}
		part = part[n:]
	}
	return len(b), nil
}

// Import implements the API.
func (s *Server) Import(ctx context.Context, in *connect.ClientStream[violinv1.ImportRequest]) (*violinv1.ImportResponse, error) {
	r := &importReader{in: in}
	passphrase := ""
	if in.Receive() {
		passphrase, r.data = in.Msg().GetPassphrase(), in.Msg().GetData()
	}
	snap, stats, err := transfer.Import(ctx, s.store, r, passphrase)
	if err != nil {
		return nil, apiError(err)
	}
	return &violinv1.ImportResponse{
		Snapshot: snapshotMessage(snap), Pages: uint64(stats.Pages), NewPages: uint64(stats.NewPages), StoredBytes: uint64(stats.StoredBytes),
	}, nil
}

type importReader struct {
	in   *connect.ClientStream[violinv1.ImportRequest]
	data []byte
}

func (r *importReader) Read(b []byte) (int, error) {
	for len(r.data) == 0 {
		if !r.in.Receive() {
			// A client that went away is no end of the file.
			if err := r.in.Err(); err != nil && !errors.Is(err, io.EOF) {
				return 0, err
			}
			return 0, io.EOF
		}
		r.data = r.in.Msg().GetData()
	}
	n := copy(b, r.data)
	r.data = r.data[n:]
	return n, nil
}
