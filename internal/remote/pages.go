package remote

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/klauspost/compress/zstd"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
	"violin/internal/agent"
	"violin/internal/store"
)

const (
	// batchPages is how many pages a capture asks about, and ships, at once: 1 MiB.
	batchPages = 256
	// batchesUnderWay bounds those of one capture that wait for the server. Then the
	// capture waits: 16 MiB are 130 ms of 1 Gbit/s.
	batchesUnderWay = 16
	// runPages is how many pages' hashes go in one message of a page table.
	runPages = 4096
	blobPart = 1 << 20
)

// session is a session of the server's store, as the agent writes to it: pages are
// hashed here, and those that the store has are not sent.
type session struct {
	id     string
	client violinv1connect.IngestServiceClient

	mu     sync.Mutex
	flying map[store.Hash]*flight // pages that some batch of this host is shipping
}

// flight is a page under way.
type flight struct {
	landed chan struct{} // closed when err is set
	err    error
}

var _ agent.Session = (*session)(nil)

func newSession(id string, client violinv1connect.IngestServiceClient) *session {
	return &session{id: id, client: client, flying: map[store.Hash]*flight{}}
}

// compressor is safe for concurrent use.
var compressor = func() *zstd.Encoder {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(2))
	if err != nil {
		panic(err) // only for options that contradict each other
	}
	return e
}()

// PutBlob implements [agent.Session].
func (s *session) PutBlob(ctx context.Context, b []byte) (store.BlobRef, error) {
	up, err := s.client.PutBlob(ctx)
	if err != nil {
		return store.BlobRef{}, fmt.Errorf("ship a blob: %w", said(err))
	}
	for first := true; first || len(b) > 0; first = false {
		n := min(len(b), blobPart)
		if err := up.Send(&violinv1.PutBlobRequest{Session: s.id, Data: b[:n]}); err != nil {
			break // the answer says why
		}
		b = b[n:]
	}
	r, err := up.CloseAndReceive()
	if err != nil {
		return store.BlobRef{}, fmt.Errorf("ship a blob: %w", said(err))
	}
	return decodeBlob(r.GetBlob())
}

// NewPageWriter implements [agent.Session].
func (s *session) NewPageWriter(ctx context.Context, regions []store.Region) (agent.PageWriter, error) {
	w := &pageWriter{s: s, regions: regions, slots: make(chan struct{}, batchesUnderWay)}
	w.ctx, w.cancel = context.WithCancelCause(ctx)
	for _, r := range regions {
		if r.Length%store.PageSize != 0 || r.Length > 1<<46 {
			return nil, fmt.Errorf("capture memory: region %q of %d bytes, want a multiple of %d", r.ID, r.Length, store.PageSize)
		}
		w.tables = append(w.tables, make(map[uint64]*run))
		w.stats.RawBytes += int64(r.Length)
	}
	return w, nil
}

// pageWriter takes one node's memory. Methods are for one goroutine at a time.
type pageWriter struct {
	s       *session
	ctx     context.Context
	cancel  context.CancelCauseFunc // with the first failure
	regions []store.Region
	cur     *batch
	seq     uint64
	slots   chan struct{} // one for each batch under way
	work    sync.WaitGroup

	mu     sync.Mutex
	tables []map[uint64]*run // a region, by first page
	stats  store.MemoryStats
}

// run is the table of runPages pages. The last write of a page wins, whenever its batch
// ends: stamps hold the batch's number, 0 for none under way.
type run struct {
	hashes [runPages]store.Hash
	stamps [runPages]uint64
}

type batch struct {
	seq    uint64
	places []place
	data   []byte
}

type place struct {
	region int
	page   uint64
}

func (w *pageWriter) check(block int, offset uint64) (place, error) {
	if block < 0 || block >= len(w.regions) {
		return place{}, fmt.Errorf("capture page: region %d of %d", block, len(w.regions))
	}
	if r := w.regions[block]; offset%store.PageSize != 0 || offset >= r.Length {
		return place{}, fmt.Errorf("capture page: offset %#x of region %q, want a multiple of %d below %#x", offset, r.ID, store.PageSize, r.Length)
	}
	return place{block, offset / store.PageSize}, nil
}

// at returns a page's run and its index in it. mu is held.
func (w *pageWriter) at(p place) (*run, int) {
	r := w.tables[p.region][p.page/runPages]
	if r == nil {
		r = new(run)
		for i := range r.hashes {
			r.hashes[i] = store.ZeroPage()
		}
		w.tables[p.region][p.page/runPages] = r
	}
	return r, int(p.page % runPages)
}

// Zero implements [agent.PageWriter].
func (w *pageWriter) Zero(block int, offset uint64) error {
	p, err := w.check(block, offset)
	if err != nil {
		return err
	}
	w.clear(p)
	return nil
}

func (w *pageWriter) clear(p place) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stats.SentPages++
	if w.tables[p.region][p.page/runPages] == nil {
		return
	}
	r, i := w.at(p)
	r.hashes[i], r.stamps[i] = store.ZeroPage(), 0
}

var zeros [store.PageSize]byte

// Page implements [agent.PageWriter].
func (w *pageWriter) Page(block int, offset uint64, data []byte) error {
	p, err := w.check(block, offset)
	if err != nil {
		return err
	}
	if len(data) != store.PageSize {
		return fmt.Errorf("capture page: %d bytes, want %d", len(data), store.PageSize)
	}
	if bytes.Equal(data, zeros[:]) {
		w.clear(p)
		return nil
	}
	if w.cur == nil {
		w.seq++
		w.cur = &batch{seq: w.seq, data: make([]byte, 0, batchPages*store.PageSize)}
	}
	b := w.cur
	b.places = append(b.places, p)
	b.data = append(b.data, data...)
	w.mu.Lock()
	w.stats.SentPages++
	r, i := w.at(p)
	r.stamps[i] = b.seq
	w.mu.Unlock()
	if len(b.places) == batchPages {
		return w.submit()
	}
	return nil
}

// submit has the current batch shipped. It waits while too many are under way.
func (w *pageWriter) submit() error {
	b := w.cur
	w.cur = nil
	select {
	case w.slots <- struct{}{}:
	case <-w.ctx.Done():
		return context.Cause(w.ctx)
	}
	w.work.Go(func() {
		defer func() { <-w.slots }()
		if err := w.ship(b); err != nil {
			w.cancel(err)
		}
	})
	return nil
}

// ship brings a batch's pages into the store, and then into the table.
func (w *pageWriter) ship(b *batch) error {
	hashes := hashesOf(b.data)
	shipped, size, err := w.s.ship(w.ctx, hashes, b.data)
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stats.NewPages += int64(shipped)
	w.stats.StoredBytes += int64(size)
	for k, p := range b.places {
		if r, i := w.at(p); r.stamps[i] == b.seq {
			r.hashes[i] = hashes[k]
		}
	}
	return nil
}

// hashesOf are the hashes of the pages in data.
func hashesOf(data []byte) []store.Hash {
	hashes := make([]store.Hash, len(data)/store.PageSize)
	store.SumPages(hashes, data)
	return hashes
}

// ship sends those pages that neither the store has nor another batch is sending, and
// returns once the store has all. It tells how many it sent, and in how many bytes.
func (s *session) ship(ctx context.Context, hashes []store.Hash, data []byte) (pages, size int, err error) {
	var mine []int                      // pages that nobody else of this host sends
	flights := map[store.Hash]*flight{} // those
	others := map[*flight]bool{}
	s.mu.Lock()
	for i, h := range hashes {
		f := s.flying[h]
		switch {
		case f == nil:
			f = &flight{landed: make(chan struct{})}
			s.flying[h], flights[h] = f, f
			mine = append(mine, i)
		case flights[h] == nil:
			others[f] = true
		}
	}
	s.mu.Unlock()
	pages, size, err = s.send(ctx, mine, hashes, data)
	s.mu.Lock()
	for h, f := range flights {
		f.err = err
		close(f.landed)
		delete(s.flying, h)
	}
	s.mu.Unlock()
	if err != nil {
		return 0, 0, err
	}
	for f := range others {
		select {
		case <-f.landed:
			if f.err != nil {
				return 0, 0, f.err
			}
		case <-ctx.Done():
			return 0, 0, context.Cause(ctx)
		}
	}
	return pages, size, nil
}

// send asks which of the pages the store lacks, and sends those.
func (s *session) send(ctx context.Context, which []int, hashes []store.Hash, data []byte) (pages, size int, err error) {
	if len(which) == 0 {
		return 0, 0, nil
	}
	ask := &violinv1.HasRequest{Session: s.id}
	for _, i := range which {
		ask.Hashes = append(ask.Hashes, hashes[i][:]...)
	}
	has, err := s.client.Has(ctx, ask)
	if err != nil {
		return 0, 0, fmt.Errorf("ask the store for pages: %w", said(err))
	}
	if len(has.GetKnown()) != len(which) {
		return 0, 0, fmt.Errorf("ask the store for pages: it answers for %d of %d", len(has.GetKnown()), len(which))
	}
	put := &violinv1.PutPagesRequest{Session: s.id}
	var raw []byte
	for k, i := range which {
		if !has.GetKnown()[k] {
			raw = append(raw, data[i*store.PageSize:][:store.PageSize]...)
			put.Hashes = append(put.Hashes, hashes[i][:]...)
			pages++
		}
	}
	if pages == 0 {
		return 0, 0, nil
	}
	put.Pages = compressor.EncodeAll(raw, nil)
	if _, err := s.client.PutPages(ctx, put); err != nil {
		return 0, 0, fmt.Errorf("ship pages to the store: %w", said(err))
	}
	return pages, len(put.GetPages()), nil
}

// Close implements [agent.PageWriter].
func (w *pageWriter) Close() (store.BlobRef, error) {
	if w.cur != nil {
		if err := w.submit(); err != nil {
			return store.BlobRef{}, err
		}
	}
	w.work.Wait()
	if err := context.Cause(w.ctx); err != nil {
		return store.BlobRef{}, err
	}
	defer w.cancel(errors.New("the capture is closed"))
	up, err := w.s.client.PutTable(w.ctx)
	if err != nil {
		return store.BlobRef{}, fmt.Errorf("ship a page table: %w", said(err))
	}
	head := &violinv1.PutTableRequest{Session: w.s.id}
	for _, r := range w.regions {
		head.Regions = append(head.Regions, &violinv1.MemoryRegion{Id: r.ID, Length: r.Length})
	}
	if err = up.Send(head); err == nil {
		w.sendTable(up.Send)
	}
	r, err := up.CloseAndReceive()
	if err != nil {
		return store.BlobRef{}, fmt.Errorf("ship a page table: %w", said(err))
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stats.Pages, w.stats.ZeroPages = r.GetPages(), r.GetZeroPages()
	return decodeBlob(r.GetTable())
}

// sendTable sends the runs until one is refused: the answer then says why.
func (w *pageWriter) sendTable(send func(*violinv1.PutTableRequest) error) {
	for region, runs := range w.tables {
		pages := w.regions[region].Length / store.PageSize
		for first := uint64(0); first*runPages < pages; first++ {
			r := runs[first]
			if r == nil {
				continue
			}
			m := &violinv1.PutTableRequest{Session: w.s.id, Region: uint32(region), Offset: first * runPages * store.PageSize}
			for i := range min(runPages, pages-first*runPages) {
				m.Hashes = append(m.Hashes, r.hashes[i][:]...)
			}
			if send(m) != nil {
				return
			}
		}
	}
}

// Stats implements [agent.PageWriter].
func (w *pageWriter) Stats() store.MemoryStats {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.stats
}
