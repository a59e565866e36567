package store

import (
	"context"
	"fmt"
	"slices"
	"sync"
)

// A PageWriter takes one node's memory into a session and makes its page
// table. It has the method set of a migration decoder's page sink. Hashing,
// compression and writing happen on the session's workers; Page only copies,
// and blocks while they have too much to do.
//
// Methods are for one goroutine at a time; several PageWriters of a session
// work side by side.
type PageWriter struct {
	se      *Session
	ctx     context.Context
	regions []Region
	cur     *batch
	seq     uint32 // number of the current batch, from 1
	// free holds the writer's batches that are not in use. They are its own,
	// so that a node whose stream stalls takes nothing from the others.
	free chan *batch
	kept []map[int]Hash // a region: leaves of an earlier table, as they are

	mu       sync.Mutex
	tables   [][]*liveLeaf // a region, a leaf; nil: all zero so far
	stats    MemoryStats
	inFlight int
	closing  bool
	idle     chan struct{} // closed once closing and nothing is in flight
}

// MemoryStats says what a PageWriter was given.
type MemoryStats struct {
	Pages       int64 // pages in the table that are not zero
	ZeroPages   int64 // the rest of the regions' pages
	RawBytes    int64 // bytes of all regions
	SentPages   int64 // pages given, repeats included
	NewPages    int64 // of them, pages that the store did not have
	StoredBytes int64 // bytes that the new pages take in packs, compressed
}

// A liveLeaf is a leaf that is still written to.
type liveLeaf struct {
	bits   [leafBitmap]byte
	hashes [leafPages]Hash
	// stamps holds the batch that carries a page's last content, 0 if none is
	// under way: batches end in any order, and the last write has to win.
	stamps [leafPages]uint32
}

// batchPages is how many pages go to a worker at once: some whole turns of the hash, and as
// many as [Session.knownOf] has bits.
const batchPages = 64

// A batch is a piece of work for a worker.
type batch struct {
	w     *PageWriter
	seq   uint32
	n     int
	place [batchPages]struct{ region, page int }
	data  [batchPages * PageSize]byte
}

// NewPageWriter starts the capture of a node's memory. The regions are those
// of the stream, in its order. The context bounds the whole capture.
func (se *Session) NewPageWriter(ctx context.Context, regions []Region) (*PageWriter, error) {
	if err := checkRegions(regions); err != nil {
		return nil, fmt.Errorf("capture memory: %w", err)
	}
	w := &PageWriter{
		se:      se,
		ctx:     ctx,
		regions: regions,
		free:    make(chan *batch, se.s.opts.Workers+2),
		idle:    make(chan struct{}),
	}
	for range cap(w.free) {
		w.free <- nil // made when first needed
	}
	for _, r := range regions {
		w.tables = append(w.tables, make([]*liveLeaf, r.leaves()))
		w.stats.RawBytes += int64(r.Length)
	}
	return w, nil
}

// inherit has the writer begin with what an earlier table says, which is of the same
// regions. All of it must be in the store, and is kept for this session then. It returns the
// earlier table.
func (w *PageWriter) inherit(table BlobRef) (*tableRoot, error) {
	s := w.se.s
	raw, err := s.GetBlob(w.ctx, table)
	if err != nil {
		return nil, err
	}
	root, err := parseRoot(raw)
	if err != nil {
		return nil, &Error{Op: "parse page table", Hash: table.Hash, Offset: -1, Err: err}
	}
	if !slices.Equal(root.regions, w.regions) {
		return nil, fmt.Errorf("page table %s is of other regions", table.Hash)
	}
	for _, leaves := range root.leaves {
		kept := map[int]Hash{}
		for i, h := range leaves.all() {
			if !w.se.knownChunk(h) {
				return nil, s.notFound("inherit page table", h)
			}
			l, err := s.leaf(w.ctx, h)
			if err != nil {
				return nil, err
			}
			for _, page := range l.all() {
				if !w.se.known(page) {
					return nil, s.notFound("inherit page", page)
				}
			}
			kept[i] = h
			w.stats.Pages += int64(len(l.hashes))
		}
		w.kept = append(w.kept, kept)
	}
	return root, nil
}

// touch makes an inherited leaf one that is written to.
func (w *PageWriter) touch(block, page int) error {
	if w.kept == nil {
		return nil
	}
	h, ok := w.kept[block][page/leafPages]
	if !ok {
		return nil
	}
	old, err := w.se.s.leaf(w.ctx, h)
	if err != nil {
		return fmt.Errorf("capture page %d of region %q: %w", page, w.regions[block].ID, err)
	}
	delete(w.kept[block], page/leafPages)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stats.Pages -= int64(len(old.hashes)) // counted again with the new leaf
	l := w.leaf(block, page)
	for i, hash := range old.all() {
		l.bits[i/8] |= 1 << (i % 8)
		l.hashes[i] = hash
	}
	return nil
}

// Page takes a page's content; data has PageSize bytes and may be reused when
// Page returns. The block is the region's index, the offset is in bytes from
// its start. Content given later replaces what was given before.
func (w *PageWriter) Page(block int, offset uint64, data []byte) error {
	page, err := w.check(block, offset)
	if err != nil {
		return err
	}
	if len(data) != PageSize {
		return fmt.Errorf("capture page %d of region %q: %d bytes, want %d", page, w.regions[block].ID, len(data), PageSize)
	}
	if err := w.touch(block, page); err != nil {
		return err
	}
	w.se.count.pages.Add(1)
	if isZero(data) {
		w.se.count.zeroPages.Add(1)
		w.clear(block, page)
		return nil
	}
	if w.cur == nil {
		if w.cur, err = w.fresh(); err != nil {
			return fmt.Errorf("capture page %d of region %q: %w", page, w.regions[block].ID, err)
		}
	}
	b := w.cur
	w.mu.Lock()
	w.stats.SentPages++
	w.leaf(block, page).stamps[page%leafPages] = b.seq
	w.mu.Unlock()
	b.place[b.n].region, b.place[b.n].page = block, page
	copy(b.data[b.n*PageSize:], data)
	if b.n++; b.n == batchPages {
		return w.submit()
	}
	return nil
}

// Zero takes a page of zeros.
func (w *PageWriter) Zero(block int, offset uint64) error {
	page, err := w.check(block, offset)
	if err != nil {
		return err
	}
	if err := w.touch(block, page); err != nil {
		return err
	}
	w.se.count.pages.Add(1)
	w.se.count.zeroPages.Add(1)
	w.clear(block, page)
	return nil
}

func (w *PageWriter) check(block int, offset uint64) (page int, err error) {
	if block < 0 || block >= len(w.regions) {
		return 0, fmt.Errorf("capture page: region %d of %d", block, len(w.regions))
	}
	if r := w.regions[block]; offset%PageSize != 0 || offset >= r.Length {
		return 0, fmt.Errorf("capture page: offset %#x of region %q, want a multiple of %d below %#x", offset, r.ID, PageSize, r.Length)
	}
	return int(offset / PageSize), nil
}

// leaf returns a page's leaf. mu is held.
func (w *PageWriter) leaf(block, page int) *liveLeaf {
	l := &w.tables[block][page/leafPages]
	if *l == nil {
		*l = new(liveLeaf)
	}
	return *l
}

// Reference takes a page by its hash. The session must have been given its content
// by Put, or have said that it Has it. Unlike Page, it says so at once if not.
func (w *PageWriter) Reference(block int, offset uint64, h Hash) error {
	page, err := w.check(block, offset)
	if err != nil {
		return err
	}
	if err := w.touch(block, page); err != nil {
		return err
	}
	if h == zeroPage {
		w.clear(block, page)
		return nil
	}
	// One that another goroutine is about to place will do: if it is not placed, the
	// session fails.
	if _, own := w.se.own.get(h); !own && !w.se.known(h) {
		return fmt.Errorf("capture page %d of region %q: the session was not given %s", page, w.regions[block].ID, h)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stats.SentPages++
	l, i := w.leaf(block, page), page%leafPages
	l.stamps[i] = 0
	l.bits[i/8] |= 1 << (i % 8)
	l.hashes[i] = h
	return nil
}

// clear makes a page zero.
func (w *PageWriter) clear(block, page int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stats.SentPages++
	if l := w.tables[block][page/leafPages]; l != nil {
		i := page % leafPages
		l.stamps[i] = 0
		l.bits[i/8] &^= 1 << (i % 8)
	}
}

// fresh takes a batch that is not in use. There are few, which bounds what is in
// memory.
func (w *PageWriter) fresh() (*batch, error) {
	select {
	case b := <-w.free:
		if b == nil {
			b = new(batch)
		}
		if w.seq++; w.seq == 0 {
			w.seq = 1 // 0 means none; four billion batches ago nothing is in flight any more
		}
		b.w, b.seq, b.n = w, w.seq, 0
		return b, nil
	case <-w.se.ctx.Done():
		return nil, w.se.failed()
	case <-w.ctx.Done():
		return nil, w.ctx.Err()
	}
}

func (w *PageWriter) submit() error {
	b := w.cur
	w.cur = nil
	w.mu.Lock()
	w.inFlight++
	w.mu.Unlock()
	select {
	case w.se.jobs <- b:
		return nil
	case <-w.se.ctx.Done():
		return w.se.failed()
	}
}

// run hashes and stores a batch's pages on a worker.
func (b *batch) run(se *Session, scratch []byte) {
	var (
		hashes      [batchPages]Hash
		added, size int64
		w           = b.w
	)
	SumPages(hashes[:b.n], b.data[:b.n*PageSize])
	known := se.knownOf(hashes[:b.n])
	for i := range b.n {
		if known&(1<<i) != 0 {
			continue
		}
		// The session's context, not the writer's: a failure in the middle
		// would leave a page claimed but not placed.
		n, err := se.placeNew(se.ctx, hashes[i], b.data[i*PageSize:][:PageSize], scratch)
		if err != nil {
			break // the session has failed, and Close says why
		}
		if n > 0 {
			added++
			size += n
		}
	}
	w.mu.Lock()
	for i := range b.n {
		at := b.place[i]
		l := w.leaf(at.region, at.page)
		k := at.page % leafPages
		if l.stamps[k] == b.seq {
			l.bits[k/8] |= 1 << (k % 8)
			l.hashes[k] = hashes[i]
		}
	}
	w.stats.NewPages += added
	w.stats.StoredBytes += size
	w.inFlight--
	if w.closing && w.inFlight == 0 {
		close(w.idle)
	}
	w.mu.Unlock()
	w.free <- b // never blocks: it has room for all
}

// Close waits until every page is placed, stores the page table and returns
// its reference. A capture that is given up needs no Close, but its session
// has to be aborted.
func (w *PageWriter) Close() (BlobRef, error) {
	ref, err := w.close()
	if err != nil {
		return BlobRef{}, fmt.Errorf("capture memory: %w", err)
	}
	return ref, nil
}

func (w *PageWriter) close() (BlobRef, error) {
	if w.cur != nil {
		if err := w.submit(); err != nil {
			return BlobRef{}, err
		}
	}
	w.mu.Lock()
	if w.closing {
		w.mu.Unlock()
		return BlobRef{}, ErrClosed
	}
	w.closing = true
	if w.inFlight == 0 {
		close(w.idle)
	}
	w.mu.Unlock()
	select {
	case <-w.idle:
	case <-w.se.ctx.Done():
	case <-w.ctx.Done():
		return BlobRef{}, w.ctx.Err()
	}
	if err := w.se.failed(); err != nil {
		return BlobRef{}, err
	}
	return w.table()
}

// table stores leaves and root.
func (w *PageWriter) table() (BlobRef, error) {
	root := tableRoot{regions: w.regions, leaves: make([]sparse, len(w.regions))}
	for i, leaves := range w.tables {
		at := make([]byte, (len(leaves)+7)/8)
		var hashes []Hash
		for n, l := range leaves {
			if l == nil {
				if h, ok := w.inherited(i, n); ok {
					at[n/8] |= 1 << (n % 8)
					hashes = append(hashes, h)
				}
				continue
			}
			var s sparse
			for k := range leafPages {
				if l.bits[k/8]&(1<<(k%8)) != 0 {
					s.hashes = append(s.hashes, l.hashes[k])
				}
			}
			if len(s.hashes) == 0 {
				continue
			}
			s.bits = l.bits[:]
			w.stats.Pages += int64(len(s.hashes))
			data := marshalLeaf(&s)
			w.se.count.blobBytes.Add(int64(len(data)))
			h, err := w.se.putChunk(w.ctx, data)
			if err != nil {
				return BlobRef{}, err
			}
			at[n/8] |= 1 << (n % 8)
			hashes = append(hashes, h)
		}
		root.leaves[i].init(at, hashes)
	}
	w.stats.ZeroPages = w.stats.RawBytes/PageSize - w.stats.Pages
	return w.se.PutBlob(w.ctx, root.marshal())
}

// inherited returns a leaf that is as it was.
func (w *PageWriter) inherited(region, leaf int) (h Hash, ok bool) {
	if w.kept != nil {
		h, ok = w.kept[region][leaf]
	}
	return h, ok
}

// Stats says what the writer was given. Pages and ZeroPages are known once
// Close has returned.
func (w *PageWriter) Stats() MemoryStats {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.stats
}
