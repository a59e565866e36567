package store

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
)

// A Session is everything that one cut writes. All nodes of the cut share it,
// from as many goroutines as they like. What it stores becomes visible to
// other sessions and to readers when it commits; until then an abort may
// delete it, as nobody else can refer to it.
//
// A session that is neither committed nor aborted (the process died) leaves
// packs that no snapshot refers to. They do no harm, and the next collection
// removes them.
type Session struct {
	s      *Store
	ctx    context.Context // ends with the session; carries the first failure
	cancel context.CancelCauseFunc

	own    index // this session's pages; pending until placed
	pages  *packer
	chunks *packer

	chunkMu  sync.Mutex
	chunkMap map[Hash]chunkPlace // this session's chunks

	// pins are the committed packs that this session deduplicated against:
	// the collector leaves them alone. Guarded by pinMu.
	pinMu sync.Mutex
	pins  pinSet

	jobs    chan *batch   // full ones, to the workers
	stop    chan struct{} // closed to end the workers
	workers sync.WaitGroup

	end   sync.Mutex // held while committing or aborting
	ended bool

	count counters
}

type counters struct {
	pages, zeroPages, newPages, newStored atomic.Int64
	blobBytes, newBlobStored              atomic.Int64
}

// SessionStats says what a session was given and what it stored.
type SessionStats struct {
	Pages         int64 // pages given, those of zeros included
	ZeroPages     int64 // of them, pages of zeros
	NewPages      int64 // of them, pages that the store did not have
	RawBytes      int64 // bytes of all pages given
	StoredBytes   int64 // bytes that the new pages take in packs, compressed
	BlobBytes     int64 // bytes of all blobs and page tables given
	BlobBytesKept int64 // bytes that the new ones of their chunks take in packs
}

// Stats returns what the session was given so far.
func (se *Session) Stats() SessionStats {
	st := SessionStats{
		Pages:         se.count.pages.Load(),
		ZeroPages:     se.count.zeroPages.Load(),
		NewPages:      se.count.newPages.Load(),
		StoredBytes:   se.count.newStored.Load(),
		BlobBytes:     se.count.blobBytes.Load(),
		BlobBytesKept: se.count.newBlobStored.Load(),
	}
	st.RawBytes = st.Pages * PageSize
	return st
}

// Begin starts a session. The context bounds this call only.
func (s *Store) Begin(ctx context.Context) (*Session, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("begin session: %w", err)
	}
	if s.opts.ReadOnly {
		return nil, errors.New("begin session: the store was opened read-only")
	}
	se := &Session{s: s, own: index{shortLived: true}, chunkMap: make(map[Hash]chunkPlace)}
	se.ctx, se.cancel = context.WithCancelCause(context.Background())
	se.pages = newPacker(se, kindPages)
	se.chunks = newPacker(se, kindChunks)

	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, fmt.Errorf("begin session: store is %w", ErrClosed)
	}
	s.sessions[se] = struct{}{}

	se.stop = make(chan struct{})
	n := s.opts.Workers
	se.jobs = make(chan *batch, 2*n)
	for range n {
		se.workers.Go(func() {
			if s.opts.StartWorker != nil {
				s.opts.StartWorker()
			}
			se.work()
		})
	}
	return se, nil
}

// work runs batches until the session ends. What is left in the queue then is
// of page writers that fail anyway.
func (se *Session) work() {
	scratch := make([]byte, 0, 2*PageSize)
	for {
		select {
		case b := <-se.jobs:
			b.run(se, scratch)
		case <-se.stop:
			return
		}
	}
}

// fail ends the session's work; the first failure is what its callers see.
func (se *Session) fail(err error) { se.cancel(err) }

func (se *Session) failed() error { return context.Cause(se.ctx) }

// Put stores a page of PageSize bytes and returns its hash. The page may be
// reused when Put returns. Known pages and pages of zeros cost no space. Put
// blocks while too much waits to be written; it is safe for concurrent use,
// and that is how it uses several cores.
func (se *Session) Put(ctx context.Context, page []byte) (Hash, error) {
	if len(page) != PageSize {
		return Hash{}, fmt.Errorf("store page: %d bytes, want %d", len(page), PageSize)
	}
	se.count.pages.Add(1)
	if isZero(page) {
		se.count.zeroPages.Add(1)
		return zeroPage, nil
	}
	w := pageBufs.Get().(*pageBuf)
	defer pageBufs.Put(w)
	h := Sum(page)
	if _, err := se.place(ctx, h, page, w[:0]); err != nil {
		return Hash{}, fmt.Errorf("store page: %w", err)
	}
	return h, nil
}

// place stores a page under its hash unless it is known, and returns the
// bytes it took. scratch is room for the compressed page.
func (se *Session) place(ctx context.Context, h Hash, page, scratch []byte) (int64, error) {
	if se.known(h) {
		return 0, nil
	}
	return se.placeNew(ctx, h, page, scratch)
}

// placeNew is place for a page that is not committed.
func (se *Session) placeNew(ctx context.Context, h Hash, page, scratch []byte) (int64, error) {
	if !se.own.add(h, pending) {
		return 0, nil
	}
	stored := se.s.codec.compress(kindPages, scratch, page)
	e, no, err := se.pages.add(ctx, h, stored, PageSize)
	if err != nil {
		// The hash was claimed and would stay pending: the session is over.
		se.fail(err)
		return 0, err
	}
	se.own.set(h, makeLocation(no, e.offset, e.stored))
	se.count.newPages.Add(1)
	se.count.newStored.Add(int64(e.stored))
	return int64(e.stored), nil
}

// known reports whether a page is committed, and pins its pack if so.
func (se *Session) known(h Hash) bool {
	s := se.s
	s.mu.RLock()
	defer s.mu.RUnlock()
	loc, ok := s.pages.get(h)
	return ok && se.pin(loc.pack())
}

// knownOf is known for up to 64 pages at once: bit i is that of hashes[i].
func (se *Session) knownOf(hashes []Hash) (known uint64) {
	s := se.s
	s.mu.RLock()
	defer s.mu.RUnlock()
	se.pinMu.Lock()
	defer se.pinMu.Unlock()
	for i, h := range hashes {
		if loc, ok := s.pages.get(h); ok && se.pinLocked(loc.pack()) {
			known |= 1 << i
		}
	}
	return known
}

// pin keeps a pack from the collector. It reports false for one that the
// collector is about to delete. The store's mu is held.
func (se *Session) pin(no uint32) bool {
	se.pinMu.Lock()
	defer se.pinMu.Unlock()
	return se.pinLocked(no)
}

// pinLocked is pin; pinMu is held, too.
func (se *Session) pinLocked(no uint32) bool {
	p := se.s.packs[no]
	if p.state != packCommitted {
		return false
	}
	if !se.pins.has(no) {
		p.reliedOn.Store(true)
		se.pins.add(no)
	}
	return true
}

// Has reports whether the session or the store has a page already, so that a
// sender far away need not ship it. The page is kept for this session from
// then on.
func (se *Session) Has(h Hash) bool {
	if h == zeroPage || se.known(h) {
		return true
	}
	loc, ok := se.own.get(h)
	return ok && loc != pending
}

// putChunk stores a chunk of at most ChunkSize bytes.
func (se *Session) putChunk(ctx context.Context, data []byte) (Hash, error) {
	h := Sum(data)
	if se.knownChunk(h) {
		return h, nil
	}
	se.chunkMu.Lock()
	_, claimed := se.chunkMap[h]
	if !claimed {
		se.chunkMap[h] = chunkPlace{}
	}
	se.chunkMu.Unlock()
	if claimed {
		return h, nil
	}
	e, no, err := se.chunks.add(ctx, h, se.s.codec.compress(kindChunks, nil, data), len(data))
	if err != nil {
		se.fail(err)
		return Hash{}, err
	}
	se.chunkMu.Lock()
	se.chunkMap[h] = chunkPlace{no, e.offset, e.stored, e.plain}
	se.chunkMu.Unlock()
	se.count.newBlobStored.Add(int64(e.stored))
	return h, nil
}

func (se *Session) knownChunk(h Hash) bool {
	s := se.s
	s.mu.RLock()
	defer s.mu.RUnlock()
	at, ok := s.chunks[h]
	return ok && se.pin(at.pack)
}

// Commit writes what is still in memory, waits until all of it is safe, shows
// it to readers and other sessions, and calls seal, which makes the result
// count: it writes the document that refers to what the session stored. If
// anything fails, seal included, the session is aborted and its packs are
// deleted; but for those that another session found a page in meanwhile, or if
// it is not known whether the document was written: the next collection sees to
// them. A nil seal does nothing.
//
// Every Put, PutBlob and PageWriter.Close of the session must have returned.
func (se *Session) Commit(ctx context.Context, seal func(context.Context) error) error {
	se.end.Lock()
	defer se.end.Unlock()
	if se.ended {
		return fmt.Errorf("commit session: %w", se.closedErr())
	}
	if err := se.flush(ctx); err != nil {
		// The caller's context may be what failed; clean up all the same.
		return fmt.Errorf("commit session: %w", errors.Join(err, se.abort(context.WithoutCancel(ctx))))
	}
	written := append(se.pages.takeWritten(), se.chunks.takeWritten()...)
	se.publish(written)
	defer se.release(fmt.Errorf("session is %w", ErrClosed))
	if seal == nil {
		return nil
	}
	err := seal(ctx)
	if err != nil && !errors.Is(err, ErrUncertain) {
		err = errors.Join(err, se.retract(context.WithoutCancel(ctx), written))
	}
	if err != nil {
		return fmt.Errorf("commit session: %w", err)
	}
	return nil
}

// flush closes the packs in memory and waits for all writes.
func (se *Session) flush(ctx context.Context) error {
	close(se.stop)
	se.workers.Wait()
	// The last packs of both kinds are written at a time.
	chunks := make(chan error, 1)
	go func() { chunks <- se.chunks.close(ctx) }()
	err := errors.Join(se.pages.close(ctx), <-chunks)
	if cause := se.failed(); cause != nil {
		return cause
	}
	return err
}

// publish makes the session's packs and entries visible. They are pinned first:
// a collection that begins before the document is written must not take them.
func (se *Session) publish(written []writtenPack) {
	se.pinMu.Lock()
	for _, w := range written {
		se.pins.add(w.pack.no)
	}
	se.pinMu.Unlock()
	pages := 0
	for _, w := range written {
		if w.pack.kind == kindPages {
			pages += len(w.entries)
		}
	}
	se.s.pages.reserve(pages)
	for _, w := range written {
		se.s.commitPack(w.pack, w.size, w.entries)
	}
}

// retract undoes publish, as far as nobody relies on it.
func (se *Session) retract(ctx context.Context, written []writtenPack) error {
	var errs []error
	for _, w := range written {
		if se.s.retract(w.pack, w.entries) {
			errs = append(errs, se.remove(ctx, w.pack))
		}
	}
	return errors.Join(errs...)
}

func (se *Session) remove(ctx context.Context, p *pack) error {
	if err := se.s.removePack(ctx, p); err != nil {
		return fmt.Errorf("delete pack %s: %w; the next collection does", p.id.name(), err)
	}
	return nil
}

// Abort deletes everything that the session wrote. It may be called at any
// time, also after Commit, when it does nothing.
func (se *Session) Abort(ctx context.Context) error {
	// Whoever blocks in Put or Commit returns first.
	se.fail(fmt.Errorf("session was aborted: %w", ErrClosed))
	se.end.Lock()
	defer se.end.Unlock()
	if se.ended {
		return nil
	}
	if err := se.abort(ctx); err != nil {
		return fmt.Errorf("abort session: %w", err)
	}
	return nil
}

func (se *Session) abort(ctx context.Context) error {
	se.fail(fmt.Errorf("session was aborted: %w", ErrClosed))
	select {
	case <-se.stop: // a commit that failed
	default:
		close(se.stop)
	}
	se.workers.Wait()
	// The writers end by themselves now that the session's context has ended.
	_ = se.pages.close(ctx)
	_ = se.chunks.close(ctx)
	var errs []error
	for _, p := range append(se.pages.takeAll(), se.chunks.takeAll()...) {
		se.s.mu.Lock()
		p.state = packDeleted
		se.s.mu.Unlock()
		errs = append(errs, se.remove(ctx, p))
	}
	se.release(nil)
	return errors.Join(errs...)
}

// release ends the session. Its pins outlive it until a running collection,
// which may not have seen its document, is over.
func (se *Session) release(cause error) {
	se.ended = true
	se.fail(cause)
	s := se.s
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.sessions, se)
	if s.gc != nil {
		se.pinMu.Lock()
		s.gc.pins.union(se.pins)
		se.pinMu.Unlock()
	}
}

func (se *Session) closedErr() error {
	if err := se.failed(); err != nil {
		return err
	}
	return ErrClosed
}

// A packer fills one pack after the other and writes full ones behind the
// session's back.
type packer struct {
	se   *Session
	kind kind

	mu     sync.Mutex
	cur    *builder
	closed bool

	limit  int         // of a pack's length, in bytes
	bufs   chan []byte // buffers in circulation: the bound on memory
	full   chan *builder
	writer sync.WaitGroup

	listMu  sync.Mutex
	all     []*pack // every pack that was begun
	written []writtenPack
}

type writtenPack struct {
	pack    *pack
	size    int64
	entries []entry
}

// buffersPerPacker is how many packs a session holds of a kind: one is filled while
// others are written, each by a goroutine of its own. So one is made ready while another waits for the disk.
const buffersPerPacker = 3

func newPacker(se *Session, k kind) *packer {
	p := &packer{
		se:    se,
		kind:  k,
		limit: se.s.packLimit(k),
		bufs:  make(chan []byte, buffersPerPacker),
		full:  make(chan *builder, buffersPerPacker),
	}
	for range buffersPerPacker {
		p.bufs <- nil // made when first needed
	}
	for range buffersPerPacker - 1 {
		p.writer.Go(p.write)
	}
	return p
}

// add puts stored bytes into the current pack.
func (p *packer) add(ctx context.Context, h Hash, stored []byte, plain int) (entry, uint32, error) {
	p.mu.Lock()
	b, err := p.room(ctx, len(stored))
	if err != nil {
		p.mu.Unlock()
		return entry{}, 0, err
	}
	e, place := b.reserve(h, len(stored), plain)
	p.mu.Unlock()
	b.fill(e, place, stored)
	return e, b.no, nil
}

// room returns a builder with room for n bytes. It blocks while all buffers
// wait to be written: that is the back-pressure. mu is held.
func (p *packer) room(ctx context.Context, n int) (*builder, error) {
	if p.closed {
		return nil, p.se.closedErr()
	}
	if err := p.se.failed(); err != nil {
		return nil, err
	}
	if p.cur != nil && p.cur.fits(n) {
		return p.cur, nil
	}
	p.rotate()
	var buf []byte
	select {
	case buf = <-p.bufs:
	case <-p.se.ctx.Done():
		return nil, p.se.failed()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if buf == nil {
		buf = p.formerRoom()
	}
	if buf == nil {
		buf = directRoom(p.limit) // in which the first entry of a pack always fits
	}
	pk, err := p.se.s.addPack(randomID(), p.kind, p.se.s.codec.method(p.kind))
	if err != nil {
		return nil, err
	}
	p.listMu.Lock()
	p.all = append(p.all, pk)
	p.listMu.Unlock()
	p.cur = newBuilder(pk.id, p.kind, pk.method, pk.seal, buf, p.limit)
	p.cur.no = pk.no
	return p.cur, nil
}

// packLimit is the most that a pack takes, in bytes. Chunks are few, so that a
// buffer as large as that of pages would stay mostly empty.
func (s *Store) packLimit(k kind) int {
	if k == kindChunks {
		return max(s.opts.PackSize/8, 2*ChunkSize)
	}
	return s.opts.PackSize
}

// rotate hands the current pack to the writer. mu is held.
func (p *packer) rotate() {
	if p.cur != nil {
		p.full <- p.cur // never blocks: it has room for all buffers
		p.cur = nil
	}
}

// write runs until close, even if the session failed: it then only waits for
// those who fill and throws the packs away.
func (p *packer) write() {
	for b := range p.full {
		pack, err := b.finish()
		if err == nil && p.se.failed() == nil {
			err = p.se.s.bucket.put(p.se.ctx, b.id.name(), pack)
			if err != nil {
				err = fmt.Errorf("write pack %s: %w", b.id.name(), err)
			}
		}
		if err != nil {
			p.se.fail(err)
		}
		if p.se.failed() != nil {
			continue
		}
		p.listMu.Lock()
		p.written = append(p.written, writtenPack{p.se.s.packOf(b.no), int64(len(pack)), b.entries})
		p.listMu.Unlock()
		p.bufs <- pack[:0]
	}
}

// close writes the last pack and waits. It may be called again.
func (p *packer) close(ctx context.Context) error {
	p.mu.Lock()
	if !p.closed {
		p.closed = true
		p.rotate()
		close(p.full)
	}
	p.mu.Unlock()
	stop := context.AfterFunc(ctx, func() { p.se.fail(ctx.Err()) })
	defer stop()
	p.writer.Wait()
	p.keepRooms()
	return p.se.failed()
}

// formerRoom returns a former session's buffer, or nil.
func (p *packer) formerRoom() []byte {
	if p.kind != kindPages {
		return nil
	}
	if buf, ok := p.se.s.rooms.Get().(*[]byte); ok {
		return *buf
	}
	return nil
}

// keepRooms leaves the buffers to the next session. Memory that is touched for the first time
// costs as much as a page's compression.
func (p *packer) keepRooms() {
	for p.kind == kindPages {
		select {
		case buf := <-p.bufs:
			if buf != nil {
				p.se.s.rooms.Put(&buf)
			}
		default:
			return
		}
	}
}

func (p *packer) takeWritten() []writtenPack {
	p.listMu.Lock()
	defer p.listMu.Unlock()
	return p.written
}

func (p *packer) takeAll() []*pack {
	p.listMu.Lock()
	defer p.listMu.Unlock()
	return p.all
}

// A pinSet is a set of pack numbers.
type pinSet []uint64

func (s *pinSet) add(no uint32) {
	for int(no/64) >= len(*s) {
		*s = append(*s, 0)
	}
	(*s)[no/64] |= 1 << (no % 64)
}

func (s pinSet) has(no uint32) bool {
	return int(no/64) < len(s) && s[no/64]&(1<<(no%64)) != 0
}

func (s *pinSet) union(t pinSet) {
	for len(*s) < len(t) {
		*s = append(*s, 0)
	}
	for i, w := range t {
		(*s)[i] |= w
	}
}
