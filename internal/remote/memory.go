package remote

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/klauspost/compress/zstd"

	violinv1 "violin/api/violin/v1"
	"violin/internal/agent"
	stream "violin/internal/migration/qemu"
	"violin/internal/pageserver"
	"violin/internal/store"
)

const (
	// aheadBatches are under way of what a node did not ask for: with that, 8 MiB.
	aheadBatches = 8
	// cluster is how many pages side by side are fetched when a node asks for one: what
	// lies beside it is likely to be asked for next, and each question crosses the WAN.
	cluster = 16
	// sparePages bounds the pages that have come this way and were not taken yet.
	sparePages = 1024
	// readRetry is how long it takes until a question that was not answered is asked again.
	readRetry = 500 * time.Millisecond
)

// memory is the memory of one node, which is in the server's store: an [agent.Memory] on
// a host that has joined. What the node asks for it fetches at once, a few pages around it
// as well; what nobody asked for, in batches ahead of the reader. It waits for as long as
// the server is not there.
type memory struct {
	ctx   context.Context
	ask   func(context.Context, []*violinv1.PageRange) ([][]byte, error)
	base  []uint64 // of each block, the number of its first page if all blocks' are counted on
	pages uint64   // of all blocks
	first []uint64 // pages that go first, by number
	order map[uint64]int

	once   sync.Once
	queue  chan *pagesAhead
	cur    *pagesAhead
	ending context.CancelFunc

	mu      sync.Mutex
	changed *sync.Cond
	demands int                    // questions of the node's under way
	flying  int                    // batches under way
	had     []uint64               // a bit a page: that it has been fetched, or is being
	asked   map[uint64]*pagesAhead // clusters under way, by number of the first page
	spare   map[uint64][]byte      // nil for pages of zeros
}

// pagesAhead are pages under way.
type pagesAhead struct {
	numbers []uint64
	last    int // the place of the last page in the order of all
	done    chan struct{}
	pages   map[uint64][]byte // by number, once done is closed
	err     error
}

var (
	_ agent.Memory          = (*memory)(nil)
	_ pageserver.Forerunner = (*memory)(nil)
)

// newMemory begins nothing yet. ask is asked for ranges of at most batchPages pages; nil in
// what it returns is a page of zeros.
func newMemory(ctx context.Context, blocks []stream.RAMBlock, first []pageserver.Run, ask func(context.Context, []*violinv1.PageRange) ([][]byte, error)) *memory {
	m := &memory{ask: ask, order: map[uint64]int{}, asked: map[uint64]*pagesAhead{}, spare: map[uint64][]byte{}, queue: make(chan *pagesAhead, aheadBatches)}
	m.ctx, m.ending = context.WithCancel(ctx)
	m.changed = sync.NewCond(&m.mu)
	index := map[string]int{}
	for i, b := range blocks {
		m.base, index[b.ID] = append(m.base, m.pages), i
		m.pages += b.Pages()
	}
	m.had = make([]uint64, (m.pages+63)/64)
	for _, r := range first {
		i, ok := index[r.Block]
		for n := r.Page; ok && n < blocks[i].Pages() && n-r.Page < r.Pages; n++ {
			page := m.base[i] + n
			if _, twice := m.order[page]; !twice {
				m.order[page] = len(m.first)
				m.first = append(m.first, page)
			}
		}
	}
	return m
}

// Close implements [io.Closer].
func (m *memory) Close() error {
	m.ending()
	m.changed.Broadcast()
	return nil
}

func (m *memory) number(block int, offset uint64) uint64 {
	return m.base[block] + offset/store.PageSize
}

// ranges are pages as they are asked for: those side by side in one.
func (m *memory) ranges(numbers []uint64) (all []*violinv1.PageRange) {
	block := 0
	for _, n := range numbers {
		for block+1 < len(m.base) && n >= m.base[block+1] {
			block++
		}
		for n < m.base[block] { // pages that go first are in no order
			block--
		}
		page := n - m.base[block]
		if i := len(all) - 1; i >= 0 && all[i].Block == uint32(block) && all[i].Page+all[i].Pages == page {
			all[i].Pages++
			continue
		}
		all = append(all, &violinv1.PageRange{Block: uint32(block), Page: page, Pages: 1})
	}
	return all
}

// fetch has pages come.
func (m *memory) fetch(b *pagesAhead) {
	defer close(b.done)
	pages, err := m.ask(m.ctx, m.ranges(b.numbers))
	if err == nil && len(pages) != len(b.numbers) {
		err = fmt.Errorf("%d pages were asked for, and %d came", len(b.numbers), len(pages))
	}
	if b.err = err; err != nil {
		return
	}
	b.pages = make(map[uint64][]byte, len(pages))
	for i, n := range b.numbers {
		b.pages[n] = pages[i]
	}
}

// take notes that a page is fetched, or tells that it was. mu is held.
func (m *memory) take(n uint64) bool {
	if m.had[n/64]&(1<<(n%64)) != 0 {
		return false
	}
	m.had[n/64] |= 1 << (n % 64)
	return true
}

// found gives a page that has come as a neighbour. mu is held.
func (m *memory) found(n uint64, buf []byte) (ok, zero bool) {
	page, ok := m.spare[n]
	if !ok {
		return false, false
	}
	delete(m.spare, n)
	copy(buf, page)
	return true, page == nil
}

// At implements [pageserver.Source].
func (m *memory) At(block int, offset uint64, buf []byte) (bool, error) {
	n := m.number(block, offset)
	key := n - offset/store.PageSize%cluster
	end := m.pages
	if block+1 < len(m.base) {
		end = m.base[block+1]
	}
	m.mu.Lock()
	for {
		if ok, zero := m.found(n, buf); ok {
			m.mu.Unlock()
			return zero, nil
		}
		other := m.asked[key]
		if other == nil {
			break
		}
		m.mu.Unlock()
		<-other.done // it has this page, unless that has been fetched before
		m.mu.Lock()
		if m.asked[key] == other {
			delete(m.asked, key) // whoever asked is about to
			m.keep(other, other.numbers)
		}
	}
	b := &pagesAhead{done: make(chan struct{})}
	for i := key; i < min(key+cluster, end); i++ {
		if m.take(i) || i == n {
			b.numbers = append(b.numbers, i)
		}
	}
	m.asked[key] = b
	m.demands++
	m.mu.Unlock()
	m.fetch(b)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.demands--
	m.changed.Broadcast()
	if m.asked[key] == b {
		delete(m.asked, key)
		m.keep(b, b.numbers)
	}
	delete(m.spare, n)
	if b.err != nil {
		return false, b.err
	}
	copy(buf, b.pages[n])
	return b.pages[n] == nil, nil
}

// keep keeps pages that were fetched and not asked for. mu is held.
func (m *memory) keep(b *pagesAhead, numbers []uint64) {
	if b.err != nil {
		return
	}
	for _, n := range numbers {
		for other := range m.spare { // any one
			if len(m.spare) < sparePages {
				break
			}
			delete(m.spare, other)
			m.had[other/64] &^= 1 << (other % 64)
		}
		m.spare[n] = b.pages[n]
	}
}

// First implements [pageserver.Forerunner].
func (m *memory) First(block int, offset uint64, buf []byte) (bool, error) {
	return m.next(block, offset, m.order[m.number(block, offset)], buf)
}

// Page implements [pageserver.Source].
func (m *memory) Page(block int, offset uint64, buf []byte) (bool, error) {
	return m.next(block, offset, len(m.first)+int(m.number(block, offset)), buf)
}

// next gives a page that nobody asked for, from what is read ahead.
func (m *memory) next(block int, offset uint64, place int, buf []byte) (zero bool, err error) {
	n := m.number(block, offset)
	m.once.Do(func() { go m.readAhead() })
	m.mu.Lock()
	ok, zero := m.found(n, buf)
	m.mu.Unlock()
	if ok {
		return zero, nil
	}
	for m.cur == nil || place > m.cur.last {
		select {
		case b, more := <-m.queue:
			if !more {
				return m.At(block, offset, buf)
			}
			<-b.done
			if b.err != nil {
				return false, b.err
			}
			m.cur = b
		case <-m.ctx.Done():
			return false, m.ctx.Err()
		}
	}
	page, ok := m.cur.pages[n]
	if !ok { // it was asked for, and has not been sent yet
		return m.At(block, offset, buf)
	}
	copy(buf, page)
	return page == nil, nil
}

// readAhead fetches all pages that nobody has asked for, in their order.
func (m *memory) readAhead() {
	defer close(m.queue)
	b := &pagesAhead{done: make(chan struct{})}
	submit := func(early bool) bool {
		if len(b.numbers) == 0 {
			close(b.done)
		} else {
			m.mu.Lock()
			// What the node waits for comes before what it may need some time.
			for !early && m.demands > 0 && m.flying > 0 && m.ctx.Err() == nil {
				m.changed.Wait()
			}
			m.flying++
			m.mu.Unlock()
			go func(b *pagesAhead) {
				m.fetch(b)
				m.mu.Lock()
				defer m.mu.Unlock()
				m.flying--
				m.changed.Broadcast()
			}(b)
		}
		select {
		case m.queue <- b:
		case <-m.ctx.Done():
			return false
		}
		b = &pagesAhead{done: make(chan struct{})}
		return true
	}
	add := func(n uint64, place int, early bool) bool {
		m.mu.Lock()
		if m.take(n) {
			b.numbers = append(b.numbers, n)
		}
		m.mu.Unlock()
		b.last = place
		return len(b.numbers) < batchPages || submit(early)
	}
	for place, n := range m.first {
		if !add(n, place, true) {
			return
		}
	}
	if !submit(true) {
		return
	}
	for n := range m.pages {
		if !add(n, len(m.first)+int(n), false) {
			return
		}
	}
	submit(false)
}

// readPages asks the server for pages of a node's memory, until it answers.
func (h *Host) readPages(ctx context.Context, run, node string, ranges []*violinv1.PageRange) ([][]byte, error) {
	said := false
	for {
		h.mu.Lock()
		client := h.supply
		h.mu.Unlock()
		err := errors.New("the server has not been reached yet")
		if client != nil {
			var r *violinv1.ReadPagesResponse
			if r, err = client.ReadPages(ctx, &violinv1.ReadPagesRequest{Run: run, Node: node, Ranges: ranges}); err == nil {
				d := decompressors.Get().(*zstd.Decoder)
				defer decompressors.Put(d)
				return decodePages(r.GetContent(), d)
			}
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if code := connect.CodeOf(err); code == connect.CodeDataLoss || code == connect.CodeInvalidArgument {
			return nil, fmt.Errorf("read it from the server: %w", err)
		}
		if !said {
			h.log.Warn("memory that follows to a node waits for the server", "node", node, "err", err)
			said = true
		}
		select {
		case <-time.After(readRetry):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}
