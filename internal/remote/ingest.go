package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"

	"connectrpc.com/connect"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
	"violin/internal/store"
)

// ingest takes in what one host captures, into the sessions of its cuts.
type ingest struct {
	mu       sync.Mutex
	sessions map[string]*store.Session
}

var _ violinv1connect.IngestServiceHandler = (*ingest)(nil)

func (g *ingest) open(id string, s *store.Session) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.sessions[id] = s
}

func (g *ingest) close(id string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.sessions, id)
}

func (g *ingest) session(id string) (*store.Session, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := g.sessions[id]
	if s == nil {
		return nil, connect.NewError(connect.CodeFailedPrecondition, errors.New("the cut that this was captured for is over"))
	}
	return s, nil
}

func refuse(format string, args ...any) error {
	return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf(format, args...))
}

func decodeHashes(b []byte) ([]store.Hash, error) {
	if len(b)%store.HashSize != 0 {
		return nil, refuse("%d bytes of hashes, want a multiple of %d", len(b), store.HashSize)
	}
	hashes := make([]store.Hash, len(b)/store.HashSize)
	for i := range hashes {
		copy(hashes[i][:], b[i*store.HashSize:])
	}
	return hashes, nil
}

// Has implements the agents' protocol.
func (g *ingest) Has(_ context.Context, req *violinv1.HasRequest) (*violinv1.HasResponse, error) {
	s, err := g.session(req.GetSession())
	if err != nil {
		return nil, err
	}
	hashes, err := decodeHashes(req.GetHashes())
	if err != nil {
		return nil, err
	}
	r := &violinv1.HasResponse{Known: make([]bool, len(hashes))}
	for i, h := range hashes {
		r.Known[i] = s.Has(h)
	}
	return r, nil
}

// decompressors hold to what a batch may be: a few bytes could else stand for many.
var decompressors = sync.Pool{New: func() any {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(batchPages*store.PageSize))
	if err != nil {
		panic(err) // only for options that contradict each other
	}
	return d
}}

// PutPages implements the agents' protocol. The hashes are made again here: what a
// host says of a page is not believed.
func (g *ingest) PutPages(ctx context.Context, req *violinv1.PutPagesRequest) (*violinv1.PutPagesResponse, error) {
	s, err := g.session(req.GetSession())
	if err != nil {
		return nil, err
	}
	hashes, err := decodeHashes(req.GetHashes())
	if err != nil {
		return nil, err
	}
	if len(hashes) > batchPages {
		return nil, refuse("%d pages at once, want at most %d", len(hashes), batchPages)
	}
	d := decompressors.Get().(*zstd.Decoder)
	defer decompressors.Put(d)
	pages, err := d.DecodeAll(req.GetPages(), nil)
	if err != nil {
		return nil, refuse("decompress pages: %w", err)
	}
	if len(pages) != len(hashes)*store.PageSize {
		return nil, refuse("%d bytes of pages for %d hashes", len(pages), len(hashes))
	}
	work, ctx := errgroup.WithContext(ctx)
	work.SetLimit(runtime.NumCPU())
	for i, h := range hashes {
		work.Go(func() error {
			got, err := s.Put(ctx, pages[i*store.PageSize:][:store.PageSize])
			if err == nil && got != h {
				err = refuse("page %d has hash %s, and was sent as %s", i, got, h)
			}
			return err
		})
	}
	if err := work.Wait(); err != nil {
		return nil, err
	}
	return &violinv1.PutPagesResponse{}, nil
}

// PutTable implements the agents' protocol.
func (g *ingest) PutTable(ctx context.Context, in *connect.ClientStream[violinv1.PutTableRequest]) (*violinv1.PutTableResponse, error) {
	var w *store.PageWriter
	for in.Receive() {
		m := in.Msg()
		if w == nil {
			s, err := g.session(m.GetSession())
			if err != nil {
				return nil, err
			}
			var regions []store.Region
			for _, r := range m.GetRegions() {
				regions = append(regions, store.Region{ID: r.GetId(), Length: r.GetLength()})
			}
			if w, err = s.NewPageWriter(ctx, regions); err != nil {
				return nil, connect.NewError(connect.CodeInvalidArgument, err)
			}
			continue
		}
		hashes, err := decodeHashes(m.GetHashes())
		if err != nil {
			return nil, err
		}
		for i, h := range hashes {
			if h == store.ZeroPage() {
				continue // as a table is made
			}
			if err := w.Reference(int(m.GetRegion()), m.GetOffset()+uint64(i)*store.PageSize, h); err != nil {
				return nil, connect.NewError(connect.CodeInvalidArgument, err)
			}
		}
	}
	if err := in.Err(); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if w == nil {
		return nil, refuse("a page table of no regions")
	}
	ref, err := w.Close()
	if err != nil {
		return nil, err
	}
	st := w.Stats()
	return &violinv1.PutTableResponse{Table: encodeBlob(ref), Pages: st.Pages, ZeroPages: st.ZeroPages}, nil
}

// PutBlob implements the agents' protocol.
func (g *ingest) PutBlob(ctx context.Context, in *connect.ClientStream[violinv1.PutBlobRequest]) (*violinv1.PutBlobResponse, error) {
	var s *store.Session
	var b []byte
	for in.Receive() {
		var err error
		if s == nil {
			if s, err = g.session(in.Msg().GetSession()); err != nil {
				return nil, err
			}
		}
		if b = append(b, in.Msg().GetData()...); len(b) > messageLimit {
			return nil, refuse("a blob of more than %d bytes", messageLimit)
		}
	}
	if err := in.Err(); err != nil {
		return nil, err
	}
	if s == nil {
		return nil, refuse("a blob of no session")
	}
	ref, err := s.PutBlob(ctx, b)
	if err != nil {
		return nil, err
	}
	return &violinv1.PutBlobResponse{Blob: encodeBlob(ref)}, nil
}
