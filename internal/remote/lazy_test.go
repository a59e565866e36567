package remote

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	violinv1 "violin/api/violin/v1"
	"violin/internal/agent"
	"violin/internal/hypervisor/qemu"
	stream "violin/internal/migration/qemu"
	"violin/internal/pageserver"
	"violin/internal/store"
)

// vmMemory is what a VM's memory holds: of each block each third page is of zeros.
type vmMemory struct {
	mu     sync.Mutex
	reads  map[[2]uint64]int
	fail   map[[2]uint64]error
	closed bool
}

func (m *vmMemory) At(block int, offset uint64, buf []byte) (bool, error) {
	key := [2]uint64{uint64(block), offset / store.PageSize}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.reads == nil {
		m.reads = map[[2]uint64]int{}
	}
	m.reads[key]++
	if err := m.fail[key]; err != nil {
		return false, err
	}
	return pageAt(block, offset, buf), nil
}

func (m *vmMemory) Page(block int, offset uint64, buf []byte) (bool, error) {
	return m.At(block, offset, buf)
}

func (m *vmMemory) Close() error {
	m.closed = true
	return nil
}

func pageAt(block int, offset uint64, buf []byte) (zero bool) {
	n := offset / store.PageSize
	if n%3 == 2 {
		return true
	}
	for i := range buf {
		buf[i] = byte(int(n) + 7*block + i>>8)
	}
	return false
}

var lazyBlocks = []stream.RAMBlock{{ID: "pc.ram", Length: 3001 * store.PageSize}, {ID: "vga", Length: 17 * store.PageSize}, {ID: "rom", Length: 300 * store.PageSize}}

// readAll reads a node's memory as a page server does: some pages as they are asked for,
// those that go first, and the rest. It tells of the first that is not right.
func readAll(m agent.Memory, blocks []stream.RAMBlock, first []pageserver.Run, asked int) error {
	var sent sync.Map // as a page server's: none is sent twice
	check := func(read func(int, uint64, []byte) (bool, error), block int, page uint64) error {
		if _, twice := sent.LoadOrStore([2]uint64{uint64(block), page}, true); twice {
			return nil
		}
		buf, want := make([]byte, store.PageSize), make([]byte, store.PageSize)
		zero, err := read(block, page*store.PageSize, buf)
		if err != nil {
			return err
		}
		if wantZero := pageAt(block, page*store.PageSize, want); zero != wantZero || !zero && !bytes.Equal(buf, want) {
			return fmt.Errorf("page %d of block %d is not right", page, block)
		}
		return nil
	}
	errs := make(chan error, 5)
	for asker := range uint64(4) {
		go func() {
			r := rand.New(rand.NewPCG(asker, 1))
			for range asked {
				block := r.IntN(len(blocks))
				if err := check(m.At, block, r.Uint64N(blocks[block].Pages())); err != nil {
					errs <- err
					return
				}
			}
			errs <- nil
		}()
	}
	go func() {
		for _, run := range first {
			for i, b := range blocks {
				for n := run.Page; b.ID == run.Block && n < min(run.Page+run.Pages, b.Pages()); n++ {
					if err := check(m.(pageserver.Forerunner).First, i, n); err != nil {
						errs <- err
						return
					}
				}
			}
		}
		for i, b := range blocks {
			for n := range b.Pages() {
				if err := check(m.Page, i, n); err != nil {
					errs <- err
					return
				}
			}
		}
		errs <- nil
	}()
	var all error
	for range cap(errs) {
		all = errors.Join(all, <-errs)
	}
	return all
}

var lazyFirst = []pageserver.Run{{Block: "rom", Page: 290, Pages: 100}, {Block: "pc.ram", Page: 2000, Pages: 700}, {Block: "gone", Page: 1, Pages: 1}, {Block: "pc.ram", Page: 2100, Pages: 3}}

// lazyWorld has a node on the host that gets its memory while it runs.
type lazyWorld struct {
	*world
	memory *vmMemory
	ended  chan error
	asked  []pageserver.Run
}

func newLazyWorld(t *testing.T) *lazyWorld {
	return &lazyWorld{world: newWorld(t), memory: &vmMemory{}, ended: make(chan error, 4)}
}

func (w *lazyWorld) lazy() agent.Lazy {
	return agent.Lazy{
		Open:  func(context.Context) (agent.Memory, error) { return w.memory, nil },
		First: lazyFirst,
		Ended: func(touched []pageserver.Run, err error) {
			w.asked = touched
			w.ended <- err
		},
	}
}

func (w *lazyWorld) load(t *testing.T) error {
	t.Helper()
	return w.agent.LoadNodeLazily(t.Context(), "s", "n", decoded(t), w.lazy())
}

func within(t *testing.T, ended <-chan error) error {
	t.Helper()
	select {
	case err := <-ended:
		return err
	case <-time.After(time.Minute):
		t.Fatal("in vain: memory has followed")
		panic("unreachable")
	}
}

// Memory is right in every page, in whatever order and in whichever blocks it is asked for.
// If it is only read ahead, each page is fetched once.
func TestMemory(t *testing.T) {
	source := &vmMemory{}
	ask := func(_ context.Context, ranges []*violinv1.PageRange) (pages [][]byte, err error) {
		for _, r := range ranges {
			for i := range r.GetPages() {
				buf := make([]byte, store.PageSize)
				if zero, _ := source.At(int(r.GetBlock()), (r.GetPage()+i)*store.PageSize, buf); zero {
					buf = nil
				}
				pages = append(pages, buf)
			}
		}
		if len(pages) > batchPages {
			t.Errorf("%d pages were asked for at once", len(pages))
		}
		return pages, nil
	}
	for _, asked := range []int{200, 0} {
		source.reads = nil
		m := newMemory(t.Context(), lazyBlocks, lazyFirst, ask)
		if err := readAll(m, lazyBlocks, lazyFirst, asked); err != nil {
			t.Error(err)
		}
		for p, n := range source.reads {
			if n > 1 && asked == 0 {
				t.Errorf("page %v was read %d times", p, n)
			}
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}
}

// Memory that follows is right in every page, wherever it is asked for, and also if the
// connection is lost on the way. Then it can't be read any more, and what was touched is
// known to the server.
func TestLazy(t *testing.T) {
	w := newLazyWorld(t)
	if err := w.agent.AwaitMemory(t.Context(), "s", "n", nil); err != nil {
		t.Error(err) // none follows
	}
	if err := w.load(t); err != nil {
		t.Fatal(err)
	}
	l := <-w.host.lazy
	if l.Cluster != cluster || !reflect.DeepEqual(l.First, lazyFirst) {
		t.Errorf("%+v", l)
	}
	waits := make(chan error, 1)
	waiting := make(chan struct{})
	go func() {
		waits <- w.agent.AwaitMemory(t.Context(), "s", "n", func() { close(waiting) })
	}()
	<-waiting
	memory, err := l.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		time.Sleep(5 * time.Millisecond)
		w.cable.unplug(true)
		time.Sleep(100 * time.Millisecond)
		w.cable.unplug(false)
	}()
	if err := readAll(memory, decoded(t).Blocks, lazyFirst, 100); err != nil {
		t.Error(err)
	}
	if err := w.agent.FollowNode("s", "n"); err != nil {
		w.await(t, true)
		if err := w.agent.FollowNode("s", "n"); err != nil {
			t.Error(err)
		}
	}
	touched := []pageserver.Run{{Block: "vga", Page: 3, Pages: 2}}
	l.Ended(touched, nil)
	if err := within(t, w.ended); err != nil || !reflect.DeepEqual(w.asked, touched) || !w.memory.closed {
		t.Error(err, w.asked, w.memory.closed)
	}
	if err := within(t, waits); err != nil {
		t.Error(err)
	}
	if err := w.agent.AwaitMemory(t.Context(), "s", "n", func() { t.Error("there is nothing to wait for") }); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	late, err := l.Open(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := late.At(0, 0, make([]byte, store.PageSize)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("memory that has followed can still be read: %v", err)
	}
}

// What can't be had is told: that the host can't, that a page is damaged, that the node
// was taken down or lost, and that the run is gone.
func TestLazyFails(t *testing.T) {
	w := newLazyWorld(t)
	w.host.lazyErr = fmt.Errorf("%w: userfaultfd(2)", qemu.ErrNoPostcopy)
	if err := w.load(t); !errors.Is(err, qemu.ErrNoPostcopy) || !strings.Contains(err.Error(), "userfaultfd(2)") {
		t.Error(err)
	}
	if err := within(t, w.ended); !errors.Is(err, qemu.ErrNoPostcopy) {
		t.Error(err)
	}
	w.host.lazyErr = nil
	large := slices.IndexFunc(decoded(t).Blocks, func(b stream.RAMBlock) bool { return b.Pages() > cluster })
	w.memory.fail = map[[2]uint64]error{{uint64(large), 3}: errors.New("pack packs/7 is damaged")}
	if err := w.load(t); err != nil {
		t.Fatal(err)
	}
	l := <-w.host.lazy
	memory, err := l.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_, err = memory.At(large, store.PageSize, make([]byte, store.PageSize))
	if err == nil || !strings.Contains(err.Error(), "pack packs/7 is damaged") {
		t.Error(err)
	}
	l.Ended(nil, fmt.Errorf("give it its memory: %w", err))
	if err := within(t, w.ended); err == nil || !strings.Contains(err.Error(), "pack packs/7 is damaged") {
		t.Error(err)
	}
	if err := w.agent.AwaitMemory(t.Context(), "s", "n", nil); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Error(err)
	}
	if err := w.load(t); err != nil {
		t.Fatal(err)
	}
	(<-w.host.lazy).Ended(nil, qemu.ErrClosed)
	if err := within(t, w.ended); !errors.Is(err, qemu.ErrClosed) {
		t.Error(err)
	}
	if err := w.load(t); err != nil {
		t.Fatal(err)
	}
	l = <-w.host.lazy
	if err := w.agent.Close(); err != nil {
		t.Error(err)
	}
	if err := within(t, w.ended); !errors.Is(err, qemu.ErrClosed) {
		t.Error(err)
	}
	l.Ended(nil, qemu.ErrClosed)
}

// An agent that takes over goes on with memory that followed when the one before it died,
// and the server hears of its end.
func TestLazyTakeOver(t *testing.T) {
	w := newLazyWorld(t)
	if err := w.load(t); err != nil {
		t.Fatal(err)
	}
	<-w.host.lazy
	w.leave.Store(true)
	if err := w.end(); err != nil {
		t.Fatal(err)
	}
	w.await(t, false)
	w.host.interrupted, w.host.blocks = true, decoded(t).Blocks
	w.serve()
	l := <-w.host.lazy
	memory, err := l.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := readAll(memory, w.host.blocks, nil, 100); err != nil {
		t.Error(err)
	}
	l.Ended(lazyFirst, nil)
	if err := within(t, w.ended); err != nil || !reflect.DeepEqual(w.asked, lazyFirst) {
		t.Error(err, w.asked)
	}
	w.leave.Store(false)
}
