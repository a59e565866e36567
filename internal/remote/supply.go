package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"connectrpc.com/connect"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
	"violin/internal/store"
)

// filePart is how many bytes of a file go at once. A fetch goes on from a multiple of it.
const filePart = 1 << 20

// File is a file of the server's machine that nodes boot from, or that disks begin as.
type File struct {
	Path string
	Hash store.Hash
	Size int64 // bytes
}

// supply is what one host may ask the server for: what the server's calls have spoken of,
// by run.
type supply struct {
	mu   sync.Mutex
	runs map[string]*offer
}

type offer struct {
	files  map[store.Hash]string  // paths
	disks  map[diskKey]diskSource // that are restored
	memory map[string]*given      // that follows, by node
}

var _ violinv1connect.SupplyServiceHandler = (*supply)(nil)

// change changes what is offered to a run.
func (s *supply) change(run string, f func(*offer)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	o := s.runs[run]
	if o == nil {
		o = &offer{files: map[store.Hash]string{}, disks: map[diskKey]diskSource{}, memory: map[string]*given{}}
		s.runs[run] = o
	}
	f(o)
}

func (s *supply) close(run string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.runs, run)
}

// of looks something up that is offered to a run. what is said of it otherwise.
func (s *supply) of(run string, f func(*offer) bool, what string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if o := s.runs[run]; o == nil || !f(o) {
		return connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("%s is not what this run was told of", what))
	}
	return nil
}

// ReadFile implements the agents' protocol. What a file's content is must not be taken
// for granted: the receiver hashes it.
func (s *supply) ReadFile(ctx context.Context, req *violinv1.ReadFileRequest, out *connect.ServerStream[violinv1.ReadFileResponse]) error {
	hash, err := decodeHash(req.GetHash())
	if err != nil {
		return err
	}
	var path string
	err = s.of(req.GetRun(), func(o *offer) (ok bool) { path, ok = o.files[hash]; return ok }, "file "+hash.String())
	if err != nil {
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return connect.NewError(connect.CodeDataLoss, err)
	}
	defer f.Close()
	if _, err := f.Seek(req.GetOffset(), io.SeekStart); err != nil {
		return refuse("%s: %w", path, err)
	}
	buf := make([]byte, filePart)
	for ctx.Err() == nil {
		n, err := io.ReadFull(f, buf)
		if n > 0 {
			if err := out.Send(&violinv1.ReadFileResponse{Data: compressor.EncodeAll(buf[:n], nil)}); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return nil
		case err != nil:
			return connect.NewError(connect.CodeDataLoss, fmt.Errorf("read %s: %w", path, err))
		}
	}
	return ctx.Err()
}

func decodeHash(b []byte) (h store.Hash, err error) {
	if len(b) != store.HashSize {
		return h, refuse("a hash of %d bytes, want %d", len(b), store.HashSize)
	}
	copy(h[:], b)
	return h, nil
}

// file is a file as it is told to a host.
func (h *Hub) file(f File) *violinv1.NodeFile {
	m := &violinv1.NodeFile{Path: f.Path, Hash: f.Hash[:], Size: f.Size}
	if in, err := filepath.Rel(h.cfg.Images, f.Path); err == nil && in != ".." && !strings.HasPrefix(in, "../") {
		m.Path, m.Image = in, true
	}
	return m
}

// Fetch has the host fetch those of the files that it lacks, over as many connections as
// that takes. progress is told, of those alone, how many bytes the host has.
func (a *Agent) Fetch(ctx context.Context, files []File, progress func(f File, done int64)) error {
	req := &violinv1.FetchRequest{Run: a.run}
	a.host.supply.change(a.run, func(o *offer) {
		for _, f := range files {
			o.files[f.Hash] = f.Path
			req.Files = append(req.Files, a.host.hub.file(f))
		}
	})
	for {
		l, client, err := a.host.provision()
		if err != nil {
			return err
		}
		err = fetch(ctx, client, req, func(r *violinv1.FetchResponse) {
			if i := r.GetFile(); int(i) < len(files) {
				progress(files[i], r.GetDone())
			}
		})
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return fmt.Errorf("host %s: %w", a.host.name, ctx.Err())
		case !a.host.back(ctx, a.tooLong) || a.host.has(l): // that was not it
			return fmt.Errorf("host %s: %w", a.host.name, said(err))
		}
		a.host.log.Info("files are fetched on, by a new connection", "slice", a.slice)
	}
}

func fetch(ctx context.Context, client violinv1connect.ProvisionServiceClient, req *violinv1.FetchRequest, tell func(*violinv1.FetchResponse)) error {
	s, err := client.Fetch(ctx, req)
	if err != nil {
		return err
	}
	defer s.Close()
	for s.Receive() {
		tell(s.Msg())
	}
	return s.Err()
}

// provision returns the client to give the host things by, and its connection.
func (j *joined) provision() (*link, violinv1connect.ProvisionServiceClient, error) {
	if _, err := j.now(); err != nil {
		return nil, nil, err
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.link == nil {
		return nil, nil, fmt.Errorf("host %s: its agent is not connected", j.name)
	}
	return j.link, violinv1connect.NewProvisionServiceClient(j.link.client, "http://agent", j.hub.agentOptions()...), nil
}

// has tells whether a connection is the host's still.
func (j *joined) has(l *link) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.link == l
}
