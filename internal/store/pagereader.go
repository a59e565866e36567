package store

import (
	"context"
	"fmt"
	"sync"
)

// A PageReader reads a node's memory through its page table. It has the method
// set of a migration encoder's page source. Pages asked for in ascending order
// come from a read-ahead that fetches, decompresses and verifies on several
// cores; any other order works, one page at a time.
//
// Methods are for one goroutine at a time, except At.
type PageReader struct {
	s      *Store
	root   *tableRoot
	cancel context.CancelFunc
	ctx    context.Context

	queue   chan *readLeaf // in order; nil until the first page is asked for
	cur     *readLeaf
	rooms   chan []byte // leaves' memory that has been read from, to be used again
	workers sync.WaitGroup
	onStart func() // on each worker's goroutine; nil for nothing

	mu     sync.Mutex // guards tables
	tables map[tableKey]sparse
}

type tableKey struct{ region, leaf int }

// maxTables bounds the leaves of the page table that [PageReader.At] keeps: 4 MiB, for
// 512 MiB of memory.
const maxTables = 256

// A readLeaf is a leaf's worth of memory on its way to the reader.
type readLeaf struct {
	region, leaf int
	table        sparse
	data         []byte // PageSize for each page that is not zero, in order
	done         chan struct{}
	err          error
}

// OpenMemory opens a committed page table. Close releases what reads ahead.
// The context bounds all reading.
func (s *Store) OpenMemory(ctx context.Context, table BlobRef) (*PageReader, error) {
	raw, err := s.GetBlob(ctx, table)
	if err != nil {
		return nil, fmt.Errorf("open memory: %w", err)
	}
	root, err := parseRoot(raw)
	if err != nil {
		return nil, fmt.Errorf("open memory: %w", &Error{Op: "parse page table", Hash: table.Hash, Offset: -1, Err: err})
	}
	r := &PageReader{s: s, root: root}
	r.ctx, r.cancel = context.WithCancel(ctx)
	return r, nil
}

// Regions returns the memory's regions, in the order of the capture.
func (r *PageReader) Regions() []Region { return r.root.regions }

// Close stops reading ahead. It never fails.
func (r *PageReader) Close() error {
	r.cancel()
	r.workers.Wait()
	return nil
}

// Page puts the page at an offset, in bytes, of a region into buf and reports
// false, or reports true for a page of zeros and leaves buf as it is. Every
// byte is verified against the page's hash; a damaged page is an error that
// names it and its pack.
func (r *PageReader) Page(block int, offset uint64, buf []byte) (zero bool, err error) {
	leaf, page, err := r.locate(block, offset, buf)
	if err != nil {
		return false, err
	}
	if !r.root.leaves[block].has(leaf) {
		return true, nil
	}
	if err := r.page(block, leaf, page, buf, &zero); err != nil {
		return false, r.failed(block, offset, err)
	}
	return zero, nil
}

// At does the same for any order of pages, and for several goroutines at a time. It
// does not read ahead.
func (r *PageReader) At(block int, offset uint64, buf []byte) (zero bool, err error) {
	leaf, page, err := r.locate(block, offset, buf)
	if err != nil {
		return false, err
	}
	if !r.root.leaves[block].has(leaf) {
		return true, nil
	}
	if err := r.at(block, leaf, page, buf, &zero); err != nil {
		return false, r.failed(block, offset, err)
	}
	return zero, nil
}

// Unhurried makes the read-ahead's threads start as a session's workers do: see
// [Options.StartWorker]. It is called before the first page is read.
func (r *PageReader) Unhurried() { r.onStart = r.s.opts.StartWorker }

// locate checks a request and finds its place in the page table.
func (r *PageReader) locate(block int, offset uint64, buf []byte) (leaf, page int, err error) {
	if block < 0 || block >= len(r.root.regions) {
		return 0, 0, fmt.Errorf("read memory: region %d of %d", block, len(r.root.regions))
	}
	region := r.root.regions[block]
	if offset%PageSize != 0 || offset >= region.Length {
		return 0, 0, fmt.Errorf("read memory: offset %#x of region %q, want a multiple of %d below %#x", offset, region.ID, PageSize, region.Length)
	}
	if len(buf) < PageSize {
		return 0, 0, fmt.Errorf("read memory: buffer of %d bytes, want %d", len(buf), PageSize)
	}
	return int(offset / leafBytes), int(offset % leafBytes / PageSize), nil
}

func (r *PageReader) failed(block int, offset uint64, err error) error {
	return fmt.Errorf("read memory: region %q, offset %#x: %w", r.root.regions[block].ID, offset, err)
}

func (r *PageReader) at(block, leaf, page int, buf []byte, zero *bool) error {
	table, err := r.table(block, leaf)
	if err != nil {
		return err
	}
	if *zero = !table.has(page); *zero {
		return nil
	}
	_, err = r.s.Get(r.ctx, table.get(page), buf)
	return err
}

// table returns a leaf of the page table.
func (r *PageReader) table(block, leaf int) (sparse, error) {
	key := tableKey{block, leaf}
	r.mu.Lock()
	t, ok := r.tables[key]
	r.mu.Unlock()
	if ok {
		return t, nil
	}
	t, err := r.s.leaf(r.ctx, r.root.leaves[block].get(leaf))
	if err != nil {
		return sparse{}, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for k := range r.tables { // any one
		if len(r.tables) < maxTables {
			break
		}
		delete(r.tables, k)
	}
	if r.tables == nil {
		r.tables = map[tableKey]sparse{}
	}
	r.tables[key] = t
	return t, nil
}

func (r *PageReader) page(block, leaf, page int, buf []byte, zero *bool) error {
	if r.queue == nil {
		r.start()
	}
	l, err := r.seek(block, leaf)
	if err != nil {
		return err
	}
	if l == nil { // behind the read-ahead
		return r.at(block, leaf, page, buf, zero)
	}
	if *zero = !l.table.has(page); *zero {
		return nil
	}
	copy(buf[:PageSize], l.data[l.table.index(page)*PageSize:])
	return nil
}

// seek takes leaves from the read-ahead until the one that is wanted. It
// returns nil for one that went by.
func (r *PageReader) seek(block, leaf int) (*readLeaf, error) {
	for {
		if l := r.cur; l != nil {
			if l.region == block && l.leaf == leaf {
				return l, l.err
			}
			if l.region > block || l.region == block && l.leaf > leaf {
				return nil, nil
			}
		}
		select {
		case l, ok := <-r.queue:
			if !ok {
				return nil, r.ctx.Err()
			}
			select {
			case <-l.done:
				if old := r.cur; old != nil && old.data != nil {
					r.rooms <- old.data // never blocks: it has room for all
				}
				r.cur = l
			case <-r.ctx.Done():
				return nil, r.ctx.Err()
			}
		case <-r.ctx.Done():
			return nil, r.ctx.Err()
		}
	}
}

// start begins to read ahead. Up to two leaves a worker wait, of 2 MiB each.
func (r *PageReader) start() {
	n := r.s.opts.Workers
	r.queue = make(chan *readLeaf, 2*n)
	r.rooms = make(chan []byte, 2*n+3) // those in the queue, one beside it, the reader's and the one before
	jobs := make(chan *readLeaf)
	for range n {
		r.workers.Go(func() {
			if r.onStart != nil {
				r.onStart()
			}
			for l := range jobs {
				var room []byte
				select {
				case room = <-r.rooms:
				default: // made as large as needed
				}
				l.err = l.read(r.ctx, r.s, r.root, room[:0])
				close(l.done)
			}
		})
	}
	r.workers.Go(func() {
		defer close(r.queue)
		defer close(jobs)
		for region := range r.root.leaves {
			for leaf := range r.root.leaves[region].all() {
				l := &readLeaf{region: region, leaf: leaf, done: make(chan struct{})}
				select {
				case r.queue <- l: // its place in the order
				case <-r.ctx.Done():
					return
				}
				select {
				case jobs <- l:
				case <-r.ctx.Done():
					return
				}
			}
		}
	})
}

// read reads a leaf and its pages, into room if that is large enough.
func (l *readLeaf) read(ctx context.Context, s *Store, root *tableRoot, room []byte) error {
	table, err := s.leaf(ctx, root.leaves[l.region].get(l.leaf))
	if err != nil {
		return err
	}
	if n := len(table.hashes) * PageSize; cap(room) < n {
		room = make([]byte, 0, n)
	}
	data, err := s.getPages(ctx, table.hashes, room)
	if err != nil {
		return err
	}
	l.table, l.data = table, data
	return nil
}

// leaf reads one leaf of a page table.
func (s *Store) leaf(ctx context.Context, h Hash) (sparse, error) {
	raw, err := s.getChunk(ctx, h)
	if err != nil {
		return sparse{}, err
	}
	t, err := parseLeaf(raw)
	if err != nil {
		return sparse{}, &Error{Op: "parse page table", Hash: h, Offset: -1, Err: err}
	}
	return t, nil
}
