// Package pageserver gives a VM its memory while it runs already. It plays the source
// of a post-copy migration: the devices first, then each page that the VM asks for, at
// once, and all the rest behind.
//
// It knows no hypervisor and no store: it is given a connection and a [Source].
package pageserver

import (
	"errors"
	"fmt"
	"io"
	"sync"

	"violin/internal/migration/qemu"
)

// A Source has a node's pages.
type Source interface {
	// Page is called for the pages that nobody asked for, in ascending order, by one
	// goroutine: a source may read ahead.
	qemu.PageSource
	// At does the same for any page, for several goroutines at a time.
	At(block int, offset uint64, buf []byte) (zero bool, err error)
}

// A Forerunner is a source that reads ahead in the order of [Config.First], too.
type Forerunner interface {
	// First is called for those pages, in their order, before Page is for the others.
	First(block int, offset uint64, buf []byte) (zero bool, err error)
}

// askers is how many pages that were asked for are read at a time. More than one,
// since a store may be far away.
const askers = 4

// Config describes one node's memory.
type Config struct {
	Skeleton *qemu.Skeleton
	Source   Source
	// First are the pages to send before all others that nobody asked for. It may
	// name pages twice, and pages that there are not.
	First []Run
	// Cluster is how many pages side by side are sent when the VM asks for one of them; 0
	// for that one. It begins at a multiple of its length.
	Cluster int
	// StartWorker is called on the goroutine that sends what nobody asked for, as it
	// starts, for the caller to lower its thread's priority. Nil for nothing.
	StartWorker func()
}

// A Server gives one VM its memory.
type Server struct {
	cfg  Config
	conn io.ReadWriteCloser // once Serve was called

	follow  chan struct{} // closed when the rest may be sent
	stopped chan struct{} // closed when serving ends, for good or ill
	begin   sync.Once

	r *qemu.ReturnReader

	out  sync.Mutex // guards what follows
	w    *qemu.PostcopyWriter
	sent []pageSet // by RAM block
	left uint64    // pages still to be sent

	mu      sync.Mutex // guards what follows; taken inside out, never around it
	asked   []pageSet
	queue   []page
	arrived *sync.Cond // the queue is not empty, or serving has ended
	touched touched
	ended   bool
	err     error
}

type page struct {
	block  int
	offset uint64
}

// New makes a server of one VM.
func New(cfg Config) *Server {
	s := &Server{cfg: cfg, follow: make(chan struct{}), stopped: make(chan struct{})}
	s.arrived = sync.NewCond(&s.mu)
	for _, b := range cfg.Skeleton.Blocks {
		s.sent = append(s.sent, newPageSet(b.Pages()))
		s.asked = append(s.asked, newPageSet(b.Pages()))
		s.left += b.Pages()
	}
	return s
}

// Follow lets the pages be sent that nobody has asked for. Until then the VM gets
// none but those.
func (s *Server) Follow() { s.begin.Do(func() { close(s.follow) }) }

// Serve serves the VM at the other end of the connection until it has all its memory,
// which is after [Server.Follow] only, and closes the connection. A page that cannot be
// read ends it with the source's error: the VM then never gets that page, so that
// whatever needs it stands still. Serve is called once.
func (s *Server) Serve(conn io.ReadWriteCloser) error {
	return s.serve(conn, func() error { return s.w.Start() })
}

// Resume is Serve for a VM that another server has served before, over a connection that
// broke: it gives it those pages that it does not have.
func (s *Server) Resume(conn io.ReadWriteCloser) error {
	return s.serve(conn, func() error {
		if err := s.w.Ask(); err != nil {
			return err
		}
		for block, b := range s.cfg.Skeleton.Blocks {
			if b.Length == 0 {
				continue
			}
			bits, err := s.r.Received(block)
			if err != nil {
				return err
			}
			for n := range b.Pages() {
				if bits[n/8]&(1<<(n%8)) != 0 && s.sent[block].add(n) {
					s.left--
				}
			}
		}
		if err := s.w.Resume(); err != nil {
			return err
		}
		return s.r.Resumed()
	})
}

func (s *Server) serve(conn io.ReadWriteCloser, begin func() error) error {
	s.conn, s.r = conn, qemu.NewReturnReader(conn, s.cfg.Skeleton.Blocks)
	w, err := qemu.NewPostcopyWriter(conn, s.cfg.Skeleton)
	if err == nil {
		s.w = w
		err = begin()
	}
	if err != nil {
		s.stop(err)
		return s.err
	}
	var work sync.WaitGroup
	work.Go(s.listen)
	for range askers {
		work.Go(s.answer)
	}
	work.Go(s.rest)
	work.Wait()
	return s.err
}

// stop ends serving; the first error is the one that counts.
func (s *Server) stop(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return
	}
	s.ended, s.err = true, err
	s.arrived.Broadcast()
	close(s.stopped)
	if cerr := s.conn.Close(); err == nil && cerr != nil {
		s.err = cerr
	}
}

// listen takes the VM's requests.
func (s *Server) listen() {
	for {
		q, err := s.r.Next()
		if err != nil {
			s.out.Lock()
			left := s.left
			s.out.Unlock()
			switch {
			case errors.Is(err, io.EOF) && left == 0:
				err = nil
			case errors.Is(err, io.EOF):
				err = fmt.Errorf("QEMU says that it has all pages, and was not sent %d of them", left)
			}
			s.stop(err)
			return
		}
		s.mu.Lock()
		for off := q.Offset; off < q.Offset+q.Length; off += qemu.PageSize {
			if !s.asked[q.Block].add(off / qemu.PageSize) {
				continue
			}
			s.touched.add(s.cfg.Skeleton.Blocks[q.Block].ID, off/qemu.PageSize)
			s.queue = append(s.queue, page{q.Block, off})
			s.arrived.Signal()
		}
		s.mu.Unlock()
	}
}

// answer answers requests.
func (s *Server) answer() {
	buf := make([]byte, qemu.PageSize)
	for {
		s.mu.Lock()
		for len(s.queue) == 0 && !s.ended {
			s.arrived.Wait()
		}
		if s.ended {
			s.mu.Unlock()
			return
		}
		p := s.queue[0]
		s.queue = s.queue[1:]
		s.mu.Unlock()
		if err := s.give(p, s.cfg.Source.At, buf, true); err != nil {
			s.stop(err)
			return
		}
		if err := s.giveBeside(p, buf); err != nil {
			s.stop(err)
			return
		}
	}
}

// giveBeside sends the pages beside one that was asked for.
func (s *Server) giveBeside(p page, buf []byte) error {
	n, size := p.offset/qemu.PageSize, uint64(s.cfg.Cluster)
	if size < 2 {
		return nil
	}
	begin := n / size * size
	for i := begin; i < min(begin+size, s.cfg.Skeleton.Blocks[p.block].Pages()); i++ {
		if err := s.give(page{p.block, i * qemu.PageSize}, s.cfg.Source.At, buf, false); err != nil {
			return err
		}
	}
	return nil
}

// rest sends what nobody has asked for, and the end.
func (s *Server) rest() {
	select {
	case <-s.follow:
	case <-s.stopped:
		return
	}
	if s.cfg.StartWorker != nil {
		s.cfg.StartWorker()
	}
	if err := s.sendRest(); err != nil {
		s.stop(err)
	}
}

func (s *Server) sendRest() error {
	buf := make([]byte, qemu.PageSize)
	first := s.cfg.Source.At
	if f, ok := s.cfg.Source.(Forerunner); ok {
		first = f.First
	}
	index := map[string]int{}
	for i, b := range s.cfg.Skeleton.Blocks {
		index[b.ID] = i
	}
	for _, r := range s.cfg.First {
		block, ok := index[r.Block]
		if !ok {
			continue
		}
		all := s.cfg.Skeleton.Blocks[block].Pages()
		for n := r.Page; n < all && n-r.Page < r.Pages; n++ {
			if err := s.give(page{block, n * qemu.PageSize}, first, buf, false); err != nil {
				return err
			}
		}
	}
	for block, b := range s.cfg.Skeleton.Blocks {
		for off := uint64(0); off < b.Length; off += qemu.PageSize {
			if err := s.give(page{block, off}, s.cfg.Source.Page, buf, false); err != nil {
				return err
			}
		}
	}
	s.out.Lock()
	defer s.out.Unlock()
	return s.w.End()
}

// give sends a page, unless it has been sent; now says that the VM waits for it.
func (s *Server) give(p page, read func(int, uint64, []byte) (bool, error), buf []byte, now bool) error {
	n := p.offset / qemu.PageSize
	s.out.Lock()
	has, err := s.sent[p.block].has(n), error(nil)
	if has && now {
		err = s.w.Flush() // it may be on its way in the buffer, and what fills that may take its time
	}
	s.out.Unlock()
	if has || err != nil {
		return err
	}
	zero, err := read(p.block, p.offset, buf)
	if err != nil {
		return fmt.Errorf("page at %#x of RAM block %q: %w", p.offset, s.cfg.Skeleton.Blocks[p.block].ID, err)
	}
	s.out.Lock()
	defer s.out.Unlock()
	if !s.sent[p.block].add(n) { // another was faster
		if now {
			return s.w.Flush()
		}
		return nil
	}
	s.left--
	data := buf
	if zero {
		data = nil
	}
	if err := s.w.Page(p.block, p.offset, data); err != nil || !now {
		return err
	}
	return s.w.Flush()
}

// Touched are the pages that the VM has asked for so far, in the order in which it
// first did.
func (s *Server) Touched() []Run {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.touched.all()
}

// A pageSet is a set of a RAM block's pages.
type pageSet []uint64

func newPageSet(pages uint64) pageSet { return make(pageSet, (pages+63)/64) }

func (s pageSet) has(n uint64) bool { return s[n/64]&(1<<(n%64)) != 0 }

// add tells whether the page is new.
func (s pageSet) add(n uint64) bool {
	if s.has(n) {
		return false
	}
	s[n/64] |= 1 << (n % 64)
	return true
}
