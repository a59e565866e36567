package pageserver_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"

	"violin/internal/migration/qemu"
	"violin/internal/pageserver"
)

// blockPages is how many pages the guest's only RAM block has.
const blockPages = 40

// skeleton is of a guest with one RAM block "ram0" and one device.
func skeleton(t *testing.T) *qemu.Skeleton {
	t.Helper()
	be := binary.BigEndian
	b := append([]byte("QEVM\x00\x00\x00\x03\x07\x00\x00\x00\x04none"), "\x01\x00\x00\x00\x02\x03ram\x00\x00\x00\x00\x00\x00\x00\x04"...)
	b = be.AppendUint64(b, blockPages*qemu.PageSize|4)
	b = append(b, "\x04ram0"...)
	b = be.AppendUint64(b, blockPages*qemu.PageSize)
	b = be.AppendUint64(b, 0x10)
	b = append(b, "\x7e\x00\x00\x00\x02"...)
	b = append(b, "\x04\x00\x00\x00\x00\x05timer\x00\x00\x00\x00\x00\x00\x00\x02~state~\x7e\x00\x00\x00\x00\x00\x06"...)
	description := `{"page_size": 4096, "devices": [{"name": "timer", "instance_id": 0}]}`
	b = be.AppendUint32(b, uint32(len(description)))
	b = append(b, description...)
	var sk qemu.Skeleton
	if err := sk.UnmarshalBinary(b); err != nil {
		t.Fatal(err)
	}
	return &sk
}

func content(n uint64) []byte {
	if n%3 == 0 {
		return nil // zeros
	}
	return bytes.Repeat([]byte{byte(n)}, qemu.PageSize)
}

var errDamaged = errors.New("damaged, in pack 4711")

// memory is a source. bad is a page that cannot be read; -1 if all can.
type memory struct{ bad int }

func (m memory) Page(_ int, offset uint64, buf []byte) (bool, error) {
	n := offset / qemu.PageSize
	if int(n) == m.bad {
		copy(buf, "garbage")
		return false, errDamaged
	}
	p := content(n)
	copy(buf, p)
	return p == nil, nil
}

func (m memory) At(block int, offset uint64, buf []byte) (bool, error) {
	return m.Page(block, offset, buf)
}

// peer is QEMU's end of the wire.
type peer struct {
	t    *testing.T
	conn net.Conn

	mu    sync.Mutex
	got   []uint64 // pages, in order
	ended bool     // it was told that these are all
	done  chan struct{}
	first chan struct{} // a value for each page
}

// start serves a peer.
func start(t *testing.T, cfg pageserver.Config) (*peer, *pageserver.Server, <-chan error) {
	t.Helper()
	cfg.Skeleton = skeleton(t)
	ours, theirs := net.Pipe()
	t.Cleanup(func() { ours.Close(); theirs.Close() })
	s := pageserver.New(cfg)
	served := make(chan error, 1)
	go func() { served <- s.Serve(ours) }()
	p := &peer{t: t, conn: theirs, done: make(chan struct{}), first: make(chan struct{}, blockPages)}
	go p.read()
	return p, s, served
}

func (p *peer) ask(pages ...uint64) {
	p.t.Helper()
	for _, n := range pages {
		b := []byte{0, 3, 0, 17}
		b = binary.BigEndian.AppendUint64(b, n*qemu.PageSize)
		b = binary.BigEndian.AppendUint32(b, qemu.PageSize)
		b = append(b, "\x04ram0"...)
		if _, err := p.conn.Write(b); err != nil {
			p.t.Error(err)
		}
	}
}

func (p *peer) goodbye() error {
	_, err := p.conn.Write([]byte{0, 1, 0, 4, 0, 0, 0, 0})
	return err
}

// read takes the stream in as QEMU does, which wants each page exactly once.
func (p *peer) read() {
	defer close(p.done)
	if err := p.stream(); err != nil && !errors.Is(err, io.EOF) {
		p.t.Errorf("the stream: %v", err)
	}
}

func (p *peer) stream() error {
	take := func(n int) []byte {
		b := make([]byte, n)
		if _, err := io.ReadFull(p.conn, b); err != nil {
			panic(io.EOF)
		}
		return b
	}
	defer func() {
		if r := recover(); r != nil && r != io.EOF {
			panic(r)
		}
	}()
	be := binary.BigEndian
	// Up to the page records the bytes are the codec's own affair, whose last command
	// before them is the package's: its length leads over them.
	for head := take(21); ; head = append(head, take(1)...) {
		if bytes.HasSuffix(head, []byte{8, 0, 7, 0, 4}) {
			take(int(be.Uint32(take(4))))
			break
		}
	}
	seen := map[uint64]bool{}
	for {
		switch typ := take(1)[0]; typ {
		case 0:
			p.mu.Lock()
			p.ended = true
			p.mu.Unlock()
			return nil
		case 2, 3:
			take(4)
		default:
			return fmt.Errorf("section type %#x", typ)
		}
		for {
			rec := be.Uint64(take(8))
			if rec == 0x10 {
				take(5)
				break
			}
			if rec&0x20 == 0 {
				take(int(take(1)[0]))
			}
			n := rec / qemu.PageSize
			var data []byte
			if rec&8 != 0 {
				data = take(qemu.PageSize)
			} else {
				take(1)
			}
			if seen[n] || !bytes.Equal(data, content(n)) {
				return fmt.Errorf("page %d: again %v, %.8x", n, seen[n], data)
			}
			seen[n] = true
			p.mu.Lock()
			p.got = append(p.got, n)
			p.mu.Unlock()
			p.first <- struct{}{}
		}
	}
}

func (p *peer) pages() []uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.got)
}

// Before the rest may follow, the peer gets what it asks for and nothing else; then it
// gets the learnt order first and everything once.
func TestServe(t *testing.T) {
	p, s, served := start(t, pageserver.Config{Source: memory{-1}, First: []pageserver.Run{
		{Block: "ram0", Page: 30, Pages: 2}, {Block: "elsewhere", Page: 1, Pages: 1}, {Block: "ram0", Page: 38, Pages: 1 << 40}, {Block: "ram0", Page: 1 << 60, Pages: 9},
	}})
	for _, n := range []uint64{17, 3, 18, 17} { // the last is asked for twice
		p.ask(n)
	}
	for range 3 {
		<-p.first
	}
	if got := p.pages(); !slices.Equal(slices.Sorted(slices.Values(got)), []uint64{3, 17, 18}) {
		t.Errorf("asked for 17, 3 and 18, got %v", got)
	}
	s.Follow()
	s.Follow()
	<-p.done
	got := p.pages()
	if len(got) != blockPages || !slices.Equal(got[3:8], []uint64{30, 31, 38, 39, 0}) || !p.ended {
		t.Errorf("got %d pages: %v", len(got), got)
	}
	if err := p.goodbye(); err != nil {
		t.Fatal(err)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
	want := []pageserver.Run{{Block: "ram0", Page: 17, Pages: 1}, {Block: "ram0", Page: 3, Pages: 1}, {Block: "ram0", Page: 18, Pages: 1}}
	if got := s.Touched(); !slices.Equal(got, want) {
		t.Errorf("touched: %v", got)
	}
}

// Requests and the rest go at the same time; each page is sent once.
func TestServeBoth(t *testing.T) {
	p, s, served := start(t, pageserver.Config{Source: memory{-1}})
	s.Follow()
	asking := make(chan struct{})
	go func() {
		defer close(asking)
		for n := blockPages - 1; n >= 0; n-- {
			p.ask(uint64(n))
		}
	}()
	<-p.done
	<-asking
	if got := p.pages(); len(got) != blockPages || !p.ended {
		t.Errorf("got %d pages, ended %v", len(got), p.ended)
	}
	if err := p.goodbye(); err != nil {
		t.Fatal(err)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// stuck is a source whose page 5 takes its time for who reads ahead.
type stuck struct {
	memory
	reached, release chan struct{}
}

func (m stuck) Page(block int, offset uint64, buf []byte) (bool, error) {
	if offset == 5*qemu.PageSize {
		close(m.reached)
		<-m.release
	}
	return m.memory.Page(block, offset, buf)
}

func (m stuck) At(block int, offset uint64, buf []byte) (bool, error) {
	return m.memory.Page(block, offset, buf)
}

// A page that was sent with the rest, and is in a buffer, does not wait for the store
// once it is asked for.
func TestServeBuffered(t *testing.T) {
	m := stuck{memory{-1}, make(chan struct{}), make(chan struct{})}
	p, s, served := start(t, pageserver.Config{Source: m})
	s.Follow()
	<-m.reached
	p.ask(4)
	for !slices.Contains(p.pages(), 4) {
		<-p.first
	}
	close(m.release)
	<-p.done
	if err := p.goodbye(); err != nil {
		t.Fatal(err)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// A page that cannot be read never gets there, whoever wants it, and nothing is said
// to be complete.
func TestServeDamage(t *testing.T) {
	for name, want := range map[string]func(*peer, *pageserver.Server){
		"asked for": func(p *peer, _ *pageserver.Server) { p.ask(7) },
		"following": func(_ *peer, s *pageserver.Server) { s.Follow() },
	} {
		t.Run(name, func(t *testing.T) {
			p, s, served := start(t, pageserver.Config{Source: memory{7}})
			want(p, s)
			err := <-served
			if !errors.Is(err, errDamaged) || !strings.Contains(err.Error(), `page at 0x7000 of RAM block "ram0"`) {
				t.Errorf("served: %v", err)
			}
			<-p.done
			if slices.Contains(p.pages(), 7) || p.ended {
				t.Errorf("got %v, ended %v", p.pages(), p.ended)
			}
		})
	}
}

// A peer that goes away, or has had enough too early, is an error.
func TestServeLost(t *testing.T) {
	p, _, served := start(t, pageserver.Config{Source: memory{-1}})
	p.ask(1)
	<-p.first
	p.conn.Close()
	if err := <-served; !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("QEMU went away: %v", err)
	}
	p, _, served = start(t, pageserver.Config{Source: memory{-1}})
	p.ask(1)
	<-p.first
	if err := p.goodbye(); err != nil {
		t.Fatal(err)
	}
	if err := <-served; err == nil || !strings.Contains(err.Error(), "was not sent 39 of them") {
		t.Errorf("QEMU said goodbye: %v", err)
	}
}

// A server that goes on where another was cut off asks what the VM has, and gives it the
// rest: each page once, and those that it waits for first.
func TestResume(t *testing.T) {
	ours, theirs := net.Pipe()
	t.Cleanup(func() { ours.Close(); theirs.Close() })
	s := pageserver.New(pageserver.Config{Skeleton: skeleton(t), Source: memory{bad: -1}})
	served := make(chan error, 1)
	go func() { served <- s.Resume(ours) }()
	read := func(n int) []byte {
		t.Helper()
		b := make([]byte, n)
		if _, err := io.ReadFull(theirs, b); err != nil {
			t.Fatal(err)
		}
		return b
	}
	if got, want := read(10), []byte("\x08\x00\x0a\x00\x05\x04ram0"); !bytes.Equal(got, want) {
		t.Fatalf("asked %x, want %x", got, want)
	}
	// It has all but pages 3 and 20.
	answer := []byte("\x00\x05\x00\x05\x04ram0\x00\x00\x00\x00\x00\x00\x00\x08\xf7\xff\xef\xff\xff\x00\x00\x00\x01\x23\x45\x67\x89\xab\xcd\xef")
	if _, err := theirs.Write(answer); err != nil {
		t.Fatal(err)
	}
	if got, want := read(5), []byte("\x08\x00\x09\x00\x00"); !bytes.Equal(got, want) {
		t.Fatalf("told %x, want %x", got, want)
	}
	if _, err := theirs.Write([]byte("\x00\x06\x00\x04\x00\x00\x00\x01")); err != nil {
		t.Fatal(err)
	}
	(&peer{t: t, conn: theirs}).ask(20)
	if got := read(1 + 4 + 8 + 5 + qemu.PageSize); !bytes.Equal(got[18:], content(20)) {
		t.Errorf("page 20 is %x...", got[:32])
	}
	s.Follow()
	if got := read(9); got[0] != 0 || got[6] != 0x30 || got[8] != 0 { // page 3, of zeros
		t.Errorf("page 3 is %x", got)
	}
	go io.Copy(io.Discard, theirs) //nolint:errcheck // that these are all
	if err := (&peer{conn: theirs}).goodbye(); err != nil {
		t.Fatal(err)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// A VM that does not answer as one ends it.
func TestResumeRefused(t *testing.T) {
	for what, answer := range map[string]string{
		"another block":  "\x00\x05\x00\x05\x04ram1",
		"too few pages":  "\x00\x05\x00\x05\x04ram0\x00\x00\x00\x00\x00\x00\x00\x00",
		"another end":    "\x00\x05\x00\x05\x04ram0\x00\x00\x00\x00\x00\x00\x00\x08\xff\xff\xff\xff\xff\x00\x00\x00\x01\x23\x45\x67\x89\xab\xcd\xee",
		"something else": "\x00\x06\x00\x04\x00\x00\x00\x01",
	} {
		ours, theirs := net.Pipe()
		s := pageserver.New(pageserver.Config{Skeleton: skeleton(t), Source: memory{bad: -1}})
		served := make(chan error, 1)
		go func() { served <- s.Resume(ours) }()
		go io.Copy(io.Discard, theirs)      //nolint:errcheck // until it is closed
		_, _ = theirs.Write([]byte(answer)) // it may be refused before its end
		if err := <-served; err == nil {
			t.Errorf("%s was taken", what)
		}
		theirs.Close()
	}
}
