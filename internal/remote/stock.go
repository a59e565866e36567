package remote

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
	"violin/internal/image"
	"violin/internal/store"
)

const (
	// stockFor is how long a file that was fetched is kept after it was used last.
	stockFor = 7 * 24 * time.Hour
	// tellEvery is how often it is told how far a fetch is.
	tellEvery  = time.Second
	partSuffix = ".part"
)

// errLacks says that a host does not have a file.
var errLacks = errors.New("this host does not have the server's file")

// stock is the files that a host has of its server's: its own, of the same path and
// content, and those that it was sent, which are named by their hashes.
type stock struct {
	images string // directory
	dir    string // of those that it was sent
	hashes image.Hashes

	mu   sync.Mutex
	busy map[store.Hash]chan struct{} // closed when the fetch that is under way has ended
}

// find returns the path of a file that holds what the server's does.
func (s *stock) find(m *violinv1.NodeFile) (string, error) {
	want, err := decodeHash(m.GetHash())
	if err != nil {
		return "", err
	}
	own := m.GetPath()
	switch {
	case m.GetImage() && !filepath.IsLocal(own), !m.GetImage() && !filepath.IsAbs(own):
		return "", refuse("%q is no path of a file", own)
	case m.GetImage():
		own = filepath.Join(s.images, own)
	}
	if h, _, err := s.hashes.Of(own); err == nil && h == want {
		return own, nil
	}
	sent := s.path(want)
	switch h, _, err := s.hashes.Of(sent); {
	case errors.Is(err, fs.ErrNotExist):
		return "", fmt.Errorf("%w %s, neither as %s nor as %s", errLacks, m.GetPath(), own, sent)
	case err != nil:
		return "", err
	case h != want:
		return "", errors.Join(fmt.Errorf("%w %s: %s is damaged, and removed", errLacks, m.GetPath(), sent), os.Remove(sent))
	}
	s.use(sent)
	return sent, nil
}

func (s *stock) path(h store.Hash) string { return filepath.Join(s.dir, h.String()) }

// use notes that a file is used now: when it was changed is part of what its hash is
// known by, so it is when it was read.
func (s *stock) use(path string) {
	times := []unix.Timespec{{Nsec: unix.UTIME_NOW}, {Nsec: unix.UTIME_OMIT}}
	_ = unix.UtimesNanoAt(unix.AT_FDCWD, path, times, 0) // it is removed earlier than it might be
}

// sweep removes what has not been used for long. Hypervisors keep what they have open.
func (s *stock) sweep(now time.Time) error {
	entries, err := os.ReadDir(s.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	errs := []error{err}
	for _, e := range entries {
		path := filepath.Join(s.dir, e.Name())
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			errs = append(errs, err)
			continue
		}
		used := time.Unix(max(st.Atim.Sec, st.Mtim.Sec), 0)
		if now.Sub(used) > stockFor {
			errs = append(errs, os.Remove(path))
		}
	}
	return errors.Join(errs...)
}

// fetch has the server send a file that the host lacks; what an earlier attempt has
// brought is not sent again. Two that want the same file fetch it once.
func (s *stock) fetch(ctx context.Context, client violinv1connect.SupplyServiceClient, run string, m *violinv1.NodeFile, tell func(done int64)) error {
	hash, err := decodeHash(m.GetHash())
	if err != nil {
		return err
	}
	for {
		s.mu.Lock()
		other := s.busy[hash]
		mine := make(chan struct{})
		if other == nil {
			s.busy[hash] = mine
		}
		s.mu.Unlock()
		if other == nil {
			defer func() {
				s.mu.Lock()
				delete(s.busy, hash)
				s.mu.Unlock()
				close(mine)
			}()
			break
		}
		select {
		case <-other:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if _, err := s.find(m); !errors.Is(err, errLacks) {
		return err // another has brought it meanwhile
	}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return fmt.Errorf("fetch %s: %w", m.GetPath(), err)
	}
	part := s.path(hash) + partSuffix
	f, err := os.OpenFile(part, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("fetch %s: %w", m.GetPath(), err)
	}
	defer f.Close()
	if err := s.receive(ctx, client, run, hash, m, f, tell); err != nil {
		return fmt.Errorf("fetch %s: %w", m.GetPath(), err)
	}
	if h, _, err := s.hashes.Of(part); err != nil || h != hash {
		return errors.Join(fmt.Errorf("fetch %s: what came has hash %.16s, want %s: the server's file has changed meanwhile, try again", m.GetPath(), store.Hash(h), hash), err, os.Remove(part))
	}
	if err := os.Rename(part, s.path(hash)); err != nil {
		return fmt.Errorf("fetch %s: %w", m.GetPath(), err)
	}
	return nil
}

// receive brings a file to its full length. Its length is at all times how much has come.
func (s *stock) receive(ctx context.Context, client violinv1connect.SupplyServiceClient, run string, hash store.Hash, m *violinv1.NodeFile, f *os.File, tell func(int64)) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	at := info.Size() / filePart * filePart
	if info.Size() > m.GetSize() {
		at = 0
	}
	if err := f.Truncate(at); err != nil {
		return err
	}
	in, err := client.ReadFile(ctx, &violinv1.ReadFileRequest{Run: run, Hash: hash[:], Offset: at})
	if err != nil {
		return said(err)
	}
	defer in.Close()
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(filePart))
	if err != nil {
		return err
	}
	defer d.Close()
	tell(at)
	told := time.Now()
	var buf []byte
	for in.Receive() {
		if buf, err = d.DecodeAll(in.Msg().GetData(), buf[:0]); err != nil {
			return err
		}
		if at+int64(len(buf)) > m.GetSize() {
			return fmt.Errorf("more comes than its %d bytes", m.GetSize())
		}
		if err := writeSparsely(f, buf, at); err != nil {
			return err
		}
		if at += int64(len(buf)); time.Since(told) >= tellEvery {
			tell(at)
			told = time.Now()
		}
	}
	if err := in.Err(); err != nil {
		return said(err)
	}
	tell(at)
	return nil
}

// writeSparsely writes at the end of a file, and leaves a hole for zeros.
func writeSparsely(f *os.File, b []byte, at int64) error {
	for i := 0; i < len(b); {
		n := min(len(b)-i, store.PageSize)
		var err error
		if piece := b[i : i+n]; bytes.Equal(piece, zeros[:n]) {
			err = f.Truncate(at + int64(i+n))
		} else {
			_, err = f.WriteAt(piece, at+int64(i))
		}
		if err != nil {
			return err
		}
		i += n
	}
	return nil
}

// Fetch implements the agents' protocol.
func (h *Host) Fetch(ctx context.Context, req *violinv1.FetchRequest, out *connect.ServerStream[violinv1.FetchResponse]) error {
	if _, err := h.running(req.GetRun()); err != nil {
		return err
	}
	h.mu.Lock()
	client := h.supply
	h.mu.Unlock()
	for i, m := range req.GetFiles() {
		_, err := h.stock.find(m)
		if errors.Is(err, errLacks) {
			h.log.Info("fetching a file of the server's", "file", m.GetPath(), "bytes", m.GetSize(), "hash", fmt.Sprintf("%x", m.GetHash()))
			err = h.stock.fetch(ctx, client, req.GetRun(), m, func(done int64) {
				_ = out.Send(&violinv1.FetchResponse{File: uint32(i), Done: done}) // who has gone away ends ctx
			})
		}
		if err != nil {
			return connect.NewError(connect.CodeFailedPrecondition, err)
		}
	}
	return nil
}
