// Package keeper is a process beside a host's agent that keeps what must not die with
// it in a cut: the frames that the switch has handed over and no node has been given
// yet, and the far ends of the streams that QEMU writes nodes' states to.
//
// It stands between the agent and the switch and passes OpenFlow messages on, in both
// directions and in their order. A packet-in for the agent alone is kept, under a number
// that goes along as the buffer's in the packet-in, until a packet-out names that number.
// Keeping, giving out and forgetting happen here, so that a frame is given out once,
// wherever the agent dies: an agent that takes over is first given, in their order, the
// frames that are kept, and then what comes. Frames come also while there is none.
//
// Without a reader, QEMU's vCPUs would wait in their next write to memory that has not
// been saved. So a stream whose capture was let go is read to its end here when its
// agent dies: the snapshot is not to be, for its cut is aborted. One that was not let go
// waits, for the agent that takes over has to let the node settle first.
package keeper

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"violin/internal/coloring"
	"violin/internal/openflow"
)

// The sockets in a keeper's directory.
const (
	sessionSocket = "openflow.sock"
	streamSocket  = "streams.sock"
)

// maxKept bounds, in bytes, the frames that are kept while no agent is there (while one
// is, its gates' limits do), and separately what waits to be read by an agent. Beyond
// it nothing is read, and the switch drops what it hands over.
const maxKept = 256 << 20

// Config describes a keeper.
type Config struct {
	Switch string // the bridge's management socket
	Dir    string // of the keeper's own sockets
	Logger *slog.Logger
}

// Run keeps until the switch's end, or that of ctx.
func Run(ctx context.Context, cfg Config) error {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", cfg.Switch)
	if err != nil {
		return fmt.Errorf("keep frames: reach the switch: %w", err)
	}
	defer c.Close()
	k := &keeper{log: cfg.Logger, sw: c, next: rand.Uint32(), frames: map[uint32]frame{}, bundles: map[uint32]bool{}}
	k.room.L = &k.mu
	r := bufio.NewReaderSize(c, 256<<10)
	if err := greet(c, r); err != nil {
		return fmt.Errorf("keep frames: %w", err)
	}
	streams, err := listen(cfg.Dir, streamSocket, "unixpacket")
	if err != nil {
		return err
	}
	defer streams.Close()
	sessions, err := listen(cfg.Dir, sessionSocket, "unix")
	if err != nil {
		return err
	}
	defer sessions.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	custody := &custody{log: cfg.Logger, streams: map[string]*stream{}}
	go accept(streams, custody.serve)
	go accept(sessions, k.serve)
	return fmt.Errorf("keep frames: the session with the switch: %w", k.fromSwitch(r))
}

func listen(dir, name, network string) (*net.UnixListener, error) {
	path := filepath.Join(dir, name)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("keep frames: %w", err)
	}
	l, err := net.ListenUnix(network, &net.UnixAddr{Name: path, Net: network})
	if err != nil {
		return nil, fmt.Errorf("keep frames: %w", err)
	}
	return l, nil
}

func accept(l *net.UnixListener, serve func(*net.UnixConn)) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return // the process ends
		}
		go serve(c)
	}
}

// greet exchanges hellos, as a controller or as a switch.
func greet(c io.Writer, r *bufio.Reader) error {
	hello, err := openflow.Marshal(0, &openflow.Hello{Versions: []uint8{openflow.Version}})
	if err != nil {
		return err
	}
	if _, err := c.Write(hello); err != nil {
		return err
	}
	b, err := openflow.ReadRaw(r)
	if err == nil && !b.Is((*openflow.Hello)(nil)) {
		err = errors.New("the first message is no hello")
	}
	return err
}

// frame is a packet-in that is kept.
type frame struct {
	order uint64 // of its arrival
	raw   openflow.Raw
}

type keeper struct {
	log *slog.Logger

	mu      sync.Mutex
	room    sync.Cond // there may be room again to read from the switch
	sw      net.Conn  // written to under mu
	agent   *session  // the one that came last; nil for none
	next    uint32    // number of a frame; it begins where no keeper before this one is likely to have been
	count   uint64
	frames  map[uint32]frame
	bytes   int             // of frames
	bundles map[uint32]bool // that the agent has opened and not ended
	syncs   uint32          // barriers of our own so far
}

// session is one agent's.
type session struct {
	conn   *net.UnixConn
	sync   uint32 // the barrier behind what was sent for an agent before this one
	synced bool
	ready  chan struct{} // closed when it is synced, or over

	wake  sync.Cond // of what follows, under the keeper's mu
	queue net.Buffers
	bytes int // in queue, and being written
	over  bool
}

// end ends a session. The keeper's mu is held.
func (k *keeper) end(s *session) {
	if s == nil || s.over {
		return
	}
	s.over = true
	s.conn.Close()
	s.wake.Broadcast()
	if !s.synced {
		close(s.ready)
	}
	if k.agent == s {
		k.agent = nil
	}
	k.room.Broadcast()
}

func (s *session) put(b openflow.Raw) {
	s.queue = append(s.queue, b)
	s.bytes += len(b)
	s.wake.Broadcast()
}

// fromSwitch takes what the switch sends.
func (k *keeper) fromSwitch(r *bufio.Reader) error {
	for {
		b, err := openflow.ReadRaw(r)
		if err != nil {
			return err
		}
		if err := k.take(b); err != nil {
			return err
		}
	}
}

func (k *keeper) take(b openflow.Raw) error {
	if b.Is((*openflow.EchoRequest)(nil)) {
		k.mu.Lock()
		defer k.mu.Unlock()
		_, err := k.sw.Write(b.Echo())
		return err
	}
	number := k.number(b)
	k.mu.Lock()
	defer k.mu.Unlock()
	if number != nil {
		k.next++
		if k.next == 0 || k.next == ^uint32(0) { // none, and the standard's none
			k.next = 1
		}
		numbered, err := number(k.next)
		if err != nil {
			return err
		}
		b = numbered
		k.count++
		k.frames[k.next] = frame{k.count, b}
		k.bytes += len(b)
	}
	s := k.agent
	switch {
	case s == nil:
	case s.synced:
		s.put(b)
	case b.XID() == s.sync && b.Is((*openflow.BarrierReply)(nil)):
		for _, f := range slices.SortedFunc(maps.Values(k.frames), func(a, b frame) int { return cmp.Compare(a.order, b.order) }) {
			s.put(f.raw)
		}
		s.synced = true
		close(s.ready)
	}
	for k.agent == nil && k.bytes > maxKept || k.agent != nil && k.agent.bytes > maxKept {
		k.room.Wait()
	}
	return nil
}

// number returns what gives a packet-in its number, or nil for a message that is not
// kept: a copy of a frame that the switch has delivered is of use for the cut of the
// agent that is there, and for nothing else.
func (k *keeper) number(b openflow.Raw) func(uint32) (openflow.Raw, error) {
	if !b.Is((*openflow.PacketIn)(nil)) {
		return nil
	}
	xid, m, err := openflow.Unmarshal(b)
	if err != nil {
		return nil // for the agent to complain of
	}
	in, ok := m.(*openflow.PacketIn)
	if !ok {
		return nil
	}
	if p, err := coloring.ReadPacket(in); err != nil || p.Delivered() {
		return nil
	}
	return func(n uint32) (openflow.Raw, error) {
		in.Buffer = n
		return openflow.Marshal(xid, in)
	}
}

// serve serves one agent, in place of the one before.
func (k *keeper) serve(c *net.UnixConn) {
	r := bufio.NewReaderSize(c, 256<<10)
	s := &session{conn: c, ready: make(chan struct{})}
	s.wake.L = &k.mu
	if err := greet(c, r); err != nil {
		c.Close()
		return
	}
	k.mu.Lock()
	k.end(k.agent)
	k.agent = s
	err := k.begin(s)
	kept := len(k.frames)
	k.mu.Unlock()
	k.log.Info("an agent has come", "frames", kept)
	if err == nil {
		go k.toAgent(s)
		<-s.ready
		err = k.fromAgent(s, r)
	}
	k.mu.Lock()
	k.log.Info("the agent has gone", "frames", len(k.frames), "err", err)
	k.end(s)
	k.mu.Unlock()
}

// begin clears the way for an agent: bundles that one before has left half done are
// discarded, and what answers to it comes no further. mu is held.
func (k *keeper) begin(s *session) error {
	for id := range k.bundles {
		b, err := openflow.Marshal(0, &openflow.BundleControl{Bundle: id, Command: openflow.BundleDiscard, Flags: openflow.BundleAtomic | openflow.BundleOrdered})
		if err != nil {
			return err
		}
		if _, err := k.sw.Write(b); err != nil {
			return err
		}
	}
	clear(k.bundles)
	k.syncs++
	s.sync = ^k.syncs // no agent has sent so many
	b, err := openflow.Marshal(s.sync, &openflow.BarrierRequest{})
	if err != nil {
		return err
	}
	_, err = k.sw.Write(b)
	return err
}

// toAgent writes what waits for an agent.
func (k *keeper) toAgent(s *session) {
	for {
		k.mu.Lock()
		for len(s.queue) == 0 && !s.over {
			s.wake.Wait()
		}
		batch, over := s.queue, s.over
		s.queue = nil
		k.mu.Unlock()
		if over {
			return
		}
		n, err := batch.WriteTo(s.conn)
		k.mu.Lock()
		s.bytes -= int(n)
		if err != nil {
			k.end(s)
		}
		k.room.Broadcast()
		k.mu.Unlock()
	}
}

// fromAgent passes on what an agent sends.
func (k *keeper) fromAgent(s *session, r *bufio.Reader) error {
	for {
		b, err := openflow.ReadRaw(r)
		if err != nil {
			return err
		}
		if err := k.pass(s, b); err != nil {
			return err
		}
	}
}

func (k *keeper) pass(s *session, b openflow.Raw) error {
	var m openflow.Message
	if b.Is((*openflow.PacketOut)(nil)) || b.Is((*openflow.BundleControl)(nil)) {
		var err error
		if _, m, err = openflow.Unmarshal(b); err != nil {
			return err
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if s.over {
		return errors.New("another agent has come")
	}
	switch m := m.(type) {
	case *openflow.BundleControl:
		if m.Command == openflow.BundleOpen {
			k.bundles[m.Bundle] = true
		} else {
			delete(k.bundles, m.Bundle)
		}
	case *openflow.PacketOut:
		if m.Buffer == 0 {
			break
		}
		if f, ok := k.frames[m.Buffer]; ok {
			delete(k.frames, m.Buffer)
			k.bytes -= len(f.raw)
		}
		if len(m.Actions) == 0 {
			return nil // the frame was for nobody
		}
		m.Buffer = 0
		out, err := openflow.Marshal(b.XID(), m)
		if err != nil {
			return err
		}
		b = out
	}
	_, err := k.sw.Write(b)
	return err
}
