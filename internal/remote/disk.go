package remote

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"connectrpc.com/connect"
	"github.com/klauspost/compress/zstd"

	violinv1 "violin/api/violin/v1"
	"violin/internal/agent"
	"violin/internal/hypervisor/qemu"
	"violin/internal/store"
)

// diskBatch is how many pages of a disk go into a message at most, most of which may be
// of zeros.
const diskBatch = 4096

// diskWriter takes what was written to one disk. Pages go to the store as memory's do,
// and their hashes into the table, which is made there, in the order of the calls.
type diskWriter struct {
	s      *session
	ctx    context.Context
	cancel context.CancelCauseFunc // with the first failure
	table  *connect.BidiStreamForClientSimple[violinv1.PutDiskRequest, violinv1.PutDiskResponse]
	size   uint64
	cur    *diskPages
	queue  chan *diskPages // under way, in order
	sent   chan struct{}   // closed when all that was queued has been sent, or never will be
	closed sync.Once

	mu    sync.Mutex
	stats store.MemoryStats
}

// diskPages are pages on their way.
type diskPages struct {
	pages  []uint64
	hashes []store.Hash // of zeros, or zero until the batch is ready
	data   []byte       // of the others
	ready  chan struct{}
	err    error // valid once ready is closed
}

// NewDiskWriter implements [agent.Session].
func (s *session) NewDiskWriter(ctx context.Context, size uint64, base store.BlobRef) (agent.DiskWriter, error) {
	w := &diskWriter{s: s, size: size, queue: make(chan *diskPages, batchesUnderWay), sent: make(chan struct{})}
	w.ctx, w.cancel = context.WithCancelCause(ctx)
	if err := w.begin(base); err != nil {
		w.cancel(err)
		return nil, fmt.Errorf("ship a disk: %w", err)
	}
	go func() {
		defer close(w.sent)
		for {
			select {
			case b, more := <-w.queue:
				if !more {
					return
				}
				if err := w.send(b); err != nil {
					w.cancel(err)
				}
			case <-w.ctx.Done(): // also if it is given up, and never closed
				return
			}
		}
	}()
	return w, nil
}

func (w *diskWriter) begin(base store.BlobRef) (err error) {
	if w.table, err = w.s.client.PutDisk(w.ctx); err != nil {
		return said(err)
	}
	head := &violinv1.PutDiskRequest{Session: w.s.id, Size: w.size}
	if !base.IsZero() {
		head.Before = encodeBlob(base)
	}
	if err := w.table.Send(head); err != nil && !errors.Is(err, io.EOF) { // the answer says why
		return said(err)
	}
	r, err := w.table.Receive()
	if err != nil {
		return said(err)
	}
	if r.GetMissing() {
		return fmt.Errorf("it goes on from %s: %w", base.Hash, store.ErrMissing)
	}
	return nil
}

// Page implements [agent.DiskWriter].
func (w *diskWriter) Page(offset uint64, data []byte) error {
	if offset%store.PageSize != 0 || offset >= w.size || data != nil && len(data) != store.PageSize {
		return fmt.Errorf("ship a disk: %d bytes at %#x of %d, want pages of %d", len(data), offset, w.size, store.PageSize)
	}
	if w.cur == nil {
		w.cur = &diskPages{ready: make(chan struct{})}
	}
	b, h := w.cur, store.ZeroPage()
	if data != nil && !bytes.Equal(data, zeros[:]) {
		h = store.Hash{}
		b.data = append(b.data, data...)
	}
	b.pages, b.hashes = append(b.pages, offset/store.PageSize), append(b.hashes, h)
	if len(b.pages) == diskBatch || len(b.data) == batchPages*store.PageSize {
		return w.submit()
	}
	return nil
}

// submit has the current batch shipped. It waits while too many are under way.
func (w *diskWriter) submit() error {
	b := w.cur
	w.cur = nil
	select {
	case w.queue <- b:
	case <-w.ctx.Done():
		return context.Cause(w.ctx)
	}
	go func() {
		defer close(b.ready)
		b.err = w.ship(b)
	}()
	return nil
}

// ship brings a batch's pages into the store.
func (w *diskWriter) ship(b *diskPages) error {
	hashes := hashesOf(b.data)
	shipped, size, err := w.s.ship(w.ctx, hashes, b.data)
	if err != nil {
		return err
	}
	for i, n := 0, 0; i < len(b.hashes); i++ {
		if b.hashes[i].IsZero() {
			b.hashes[i] = hashes[n]
			n++
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stats.SentPages += int64(len(b.pages))
	w.stats.NewPages += int64(shipped)
	w.stats.StoredBytes += int64(size)
	return nil
}

// send puts a batch into the table, when its pages are in the store.
func (w *diskWriter) send(b *diskPages) error {
	select {
	case <-b.ready:
	case <-w.ctx.Done():
		return context.Cause(w.ctx)
	}
	if b.err != nil {
		return b.err
	}
	m := &violinv1.PutDiskRequest{Pages: b.pages}
	for _, h := range b.hashes {
		m.Hashes = append(m.Hashes, h[:]...)
	}
	if err := w.table.Send(m); err != nil {
		_, err = w.table.Receive() // which says why
		return said(errors.Join(err, context.Cause(w.ctx)))
	}
	return nil
}

// Close implements [agent.DiskWriter].
func (w *diskWriter) Close() (ref store.BlobRef, err error) {
	defer func() {
		w.cancel(errors.New("the capture is closed"))
		if err != nil {
			err = fmt.Errorf("ship a disk: %w", err)
		}
	}()
	if w.cur != nil {
		if err := w.submit(); err != nil {
			return ref, err
		}
	}
	w.closed.Do(func() { close(w.queue) })
	<-w.sent
	if err := context.Cause(w.ctx); err != nil {
		return ref, err
	}
	if err := w.table.CloseRequest(); err != nil {
		return ref, said(err)
	}
	r, err := w.table.Receive()
	if err != nil {
		return ref, said(err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stats.Pages, w.stats.ZeroPages = r.GetPages(), r.GetZeroPages()
	w.stats.RawBytes = (w.stats.Pages + w.stats.ZeroPages) * store.PageSize
	return decodeBlob(r.GetTable())
}

// Stats implements [agent.DiskWriter].
func (w *diskWriter) Stats() store.MemoryStats {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.stats
}

// PutDisk implements the agents' protocol.
func (g *ingest) PutDisk(ctx context.Context, in *connect.BidiStream[violinv1.PutDiskRequest, violinv1.PutDiskResponse]) error {
	head, err := in.Receive()
	if err != nil {
		return err
	}
	s, err := g.session(head.GetSession())
	if err != nil {
		return err
	}
	var before store.BlobRef
	if head.GetBefore() != nil {
		if before, err = decodeBlob(head.GetBefore()); err != nil {
			return refuse("%w", err)
		}
	}
	w, err := s.NewDiskWriter(ctx, head.GetSize(), before)
	if errors.Is(err, store.ErrMissing) {
		return in.Send(&violinv1.PutDiskResponse{Missing: true})
	}
	if err != nil {
		return connect.NewError(connect.CodeInvalidArgument, err)
	}
	if err := in.Send(&violinv1.PutDiskResponse{}); err != nil {
		return err
	}
	for {
		m, err := in.Receive()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		hashes, err := decodeHashes(m.GetHashes())
		if err != nil {
			return err
		}
		if len(hashes) != len(m.GetPages()) {
			return refuse("%d hashes of %d pages", len(hashes), len(m.GetPages()))
		}
		for i, page := range m.GetPages() {
			if page > head.GetSize()/store.PageSize {
				return refuse("page %d of a disk of %d bytes", page, head.GetSize())
			}
			if err := w.Reference(page*store.PageSize, hashes[i]); err != nil {
				return connect.NewError(connect.CodeInvalidArgument, err)
			}
		}
	}
	ref, err := w.Close()
	if err != nil {
		return err
	}
	st := w.Stats()
	return in.Send(&violinv1.PutDiskResponse{Table: encodeBlob(ref), Pages: st.Pages, ZeroPages: st.ZeroPages})
}

// encodePages makes a message of pages; nil is one of zeros.
type encodePages struct {
	hashes []byte
	data   []byte
}

func (e *encodePages) add(page []byte) {
	h := store.ZeroPage()
	if page != nil {
		h = store.Sum(page)
		e.data = append(e.data, page...)
	}
	e.hashes = append(e.hashes, h[:]...)
}

func (e *encodePages) message() *violinv1.Pages {
	m := &violinv1.Pages{Hashes: e.hashes}
	if len(e.data) > 0 {
		m.Data = compressor.EncodeAll(e.data, nil)
	}
	e.hashes, e.data = nil, e.data[:0]
	return m
}

// decodePages takes such a message apart, into no more than limit pages that are not of
// zeros. Each must have its hash.
func decodePages(m *violinv1.Pages, d *zstd.Decoder) (pages [][]byte, err error) {
	hashes, err := decodeHashes(m.GetHashes())
	if err != nil {
		return nil, err
	}
	data, err := d.DecodeAll(m.GetData(), nil)
	if err != nil {
		return nil, fmt.Errorf("decompress pages: %w", err)
	}
	for i, h := range hashes {
		if h == store.ZeroPage() {
			pages = append(pages, nil)
			continue
		}
		if len(data) < store.PageSize {
			return nil, fmt.Errorf("%d pages, and content for fewer", len(hashes))
		}
		page := data[:store.PageSize:store.PageSize]
		data = data[store.PageSize:]
		if got := store.Sum(page); got != h {
			return nil, fmt.Errorf("page %d of %d came with hash %s, want %s", i, len(hashes), got, h)
		}
		pages = append(pages, page)
	}
	if len(data) > 0 {
		return nil, fmt.Errorf("%d pages, and content for more", len(hashes))
	}
	return pages, nil
}

// diskKey is a disk of a node.
type diskKey struct{ node, disk string }

// diskSource gives what a disk holds: see [qemu.Disk].Restore.
type diskSource func(page func(offset uint64, data []byte) error) error

// ReadDisk implements the agents' protocol.
func (s *supply) ReadDisk(ctx context.Context, req *violinv1.ReadDiskRequest, out *connect.ServerStream[violinv1.ReadDiskResponse]) error {
	key := diskKey{req.GetNode(), req.GetDisk()}
	var read diskSource
	if err := s.of(req.GetRun(), func(o *offer) bool { read = o.disks[key]; return read != nil }, fmt.Sprintf("disk %q of node %q", key.disk, key.node)); err != nil {
		return err
	}
	m, content := &violinv1.ReadDiskResponse{}, encodePages{}
	flush := func() error {
		if len(m.Pages) == 0 {
			return nil
		}
		m.Content = content.message()
		err := out.Send(m)
		m = &violinv1.ReadDiskResponse{}
		return err
	}
	err := read(func(offset uint64, page []byte) error {
		m.Pages = append(m.Pages, offset/store.PageSize)
		content.add(page)
		if len(m.Pages) == diskBatch || len(content.data) == batchPages*store.PageSize {
			return flush()
		}
		return ctx.Err()
	})
	if err == nil {
		err = flush()
	}
	if err != nil && ctx.Err() == nil {
		return connect.NewError(connect.CodeDataLoss, err)
	}
	return err
}

// readDisk has the server give what a restored disk holds.
func (h *Host) readDisk(ctx context.Context, run, node, disk string, page func(uint64, []byte) error) error {
	h.mu.Lock()
	client := h.supply
	h.mu.Unlock()
	in, err := client.ReadDisk(ctx, &violinv1.ReadDiskRequest{Run: run, Node: node, Disk: disk})
	if err != nil {
		return fmt.Errorf("read it from the server: %w", said(err))
	}
	defer in.Close()
	d := decompressors.Get().(*zstd.Decoder)
	defer decompressors.Put(d)
	for in.Receive() {
		m := in.Msg()
		pages, err := decodePages(m.GetContent(), d)
		if err == nil && len(pages) != len(m.GetPages()) {
			err = fmt.Errorf("%d pages with %d numbers", len(pages), len(m.GetPages()))
		}
		if err != nil {
			return fmt.Errorf("read it from the server: %w", err)
		}
		for i, n := range m.GetPages() {
			if err := page(n*store.PageSize, pages[i]); err != nil {
				return err
			}
		}
	}
	if err := in.Err(); err != nil {
		return fmt.Errorf("read it from the server: %w", said(err))
	}
	return nil
}

// encodeDisks are a node's disks, as its host is told of them. The server then gives what
// restored ones hold.
func (a *Agent) encodeDisks(spec agent.NodeSpec) (disks []*violinv1.DiskSpec, offered map[diskKey]diskSource) {
	offered = map[diskKey]diskSource{}
	for _, d := range spec.Machine.Disks {
		m := &violinv1.DiskSpec{Name: d.Name, Size: d.Size, BaseFormat: d.BaseFormat, Boot: int32(d.Boot), ReadOnly: d.ReadOnly}
		if d.Base != "" {
			m.Base = a.host.hub.file(File{Path: d.Base, Hash: spec.Boot[agent.BaseOf(d.Name)]})
		}
		if d.Restore != nil {
			m.Table = encodeBlob(spec.Disks[d.Name])
			offered[diskKey{spec.Name, d.Name}] = d.Restore
		}
		disks = append(disks, m)
	}
	return disks, offered
}

// decodeDisks is the inverse, on the host. The context bounds the reading of restored ones.
func (h *Host) decodeDisks(ctx context.Context, run string, req *violinv1.AddNodeRequest, spec *agent.NodeSpec) error {
	spec.Disks = map[string]store.BlobRef{}
	for _, m := range req.GetDisks() {
		d := qemu.Disk{Name: m.GetName(), Size: m.GetSize(), BaseFormat: m.GetBaseFormat(), Boot: int(m.GetBoot()), ReadOnly: m.GetReadOnly()}
		var err error
		if m.GetBase() != nil {
			if d.Base, err = h.stock.find(m.GetBase()); err != nil {
				return connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("node %q: %s: %w", spec.Name, agent.BaseOf(d.Name), err))
			}
		}
		if m.GetTable() != nil {
			if spec.Disks[d.Name], err = decodeBlob(m.GetTable()); err != nil {
				return refuse("node %q: disk %q: %w", spec.Name, d.Name, err)
			}
			d.Restore = func(page func(uint64, []byte) error) error {
				return h.readDisk(ctx, run, req.GetNode(), m.GetName(), page)
			}
		}
		spec.Machine.Disks = append(spec.Machine.Disks, d)
	}
	return nil
}
