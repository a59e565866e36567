package lab

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
)

// maxLearned bounds the addresses that the WAN remembers. Frames to any others
// are flooded to all sites.
const maxLearned = 4096

// frameHeadroom is how much longer than the MTU a frame may be: an Ethernet
// header and two VLAN tags.
const frameHeadroom = 14 + 2*4

// A wan joins the sites' bridges. It reads each site's frames from a TAP in its
// bridge, settles by destination address which site they are for, carries them
// over the links of the path there, and writes them to that site's TAP.
//
// However the sites are meshed, nothing loops: a frame is given its destination
// when it enters (a broadcast is copied, once for each site), and what the WAN
// writes to a bridge the bridge doesn't give back.
//
// The delays are our own also where the kernel has netem, so that a lab behaves
// alike on every machine, and a link can be cut and counted.
type wan struct {
	log     *slog.Logger
	created time.Time // the zero of every instant
	links   []*Link
	ends    [][2]int // see layout
	next    [][]int  // ditto
	running sync.WaitGroup

	mu      sync.Mutex
	taps    []*os.File // by site
	pipes   []*shaper  // 2i carries from A to B of link i, 2i+1 from B to A
	learned map[mac]int
	parted  map[[2]mac]bool // by who sends, and to whom
	alarm   *alarm
	closed  bool
}

type mac [6]byte

func (m mac) multicast() bool { return m[0]&1 != 0 }

func newWAN(cfg Config, lay *layout, log *slog.Logger) (*wan, error) {
	a, err := newAlarm()
	if err != nil {
		return nil, err
	}
	w := &wan{
		log: log, created: time.Now(), ends: lay.ends, next: lay.next, alarm: a,
		taps: make([]*os.File, len(cfg.Sites)), learned: make(map[mac]int), parted: make(map[[2]mac]bool),
	}
	for i, hosts := range lay.hosts {
		for _, h := range hosts {
			w.learned[mac(h.mac)] = i
		}
	}
	for i, c := range cfg.Links {
		ab := newShaper(c.Shape, cfg.Seed, uint64(2*i))
		ba := newShaper(c.Shape, cfg.Seed, uint64(2*i+1))
		w.pipes = append(w.pipes, ab, ba)
		w.links = append(w.links, &Link{A: c.A, B: c.B, wan: w, ab: ab, ba: ba})
	}
	return w, nil
}

// attach gives the wan a site's TAP, to be closed with it.
func (w *wan) attach(site int, tap *os.File) { w.taps[site] = tap }

// start lets frames pass, once all sites are attached.
func (w *wan) start(mtu int) {
	for site, tap := range w.taps {
		w.running.Go(func() { w.read(site, tap, mtu) })
	}
	w.running.Go(w.keepTime)
}

func (w *wan) close() {
	w.mu.Lock()
	w.closed = true
	for _, tap := range w.taps {
		if tap != nil {
			tap.Close()
		}
	}
	w.alarm.close()
	w.mu.Unlock()
	w.running.Wait()
}

// part drops what two addresses send each other (true), or does so no more.
func (w *wan) part(a, b mac, apart bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, way := range [][2]mac{{a, b}, {b, a}} {
		if apart {
			w.parted[way] = true
		} else {
			delete(w.parted, way)
		}
	}
}

func (w *wan) now() instant { return time.Since(w.created) }

func (w *wan) link(a, b string) *Link {
	for _, l := range w.links {
		if l.A == a && l.B == b || l.A == b && l.B == a {
			return l
		}
	}
	return nil
}

// read carries what leaves a site, until its TAP is closed.
func (w *wan) read(site int, tap *os.File, mtu int) {
	buf := make([]byte, mtu+frameHeadroom)
	for {
		n, err := tap.Read(buf)
		if err != nil {
			if !errors.Is(err, os.ErrClosed) {
				w.log.Error("site is off the WAN: its TAP can't be read", "site", site, "err", err)
			}
			return
		}
		if n < 14 {
			continue // not an Ethernet frame
		}
		w.enter(site, append([]byte(nil), buf[:n]...))
	}
}

// keepTime delivers frames when the alarm rings.
func (w *wan) keepTime() {
	for w.alarm.wait() == nil {
		w.mu.Lock()
		w.deliver()
		w.mu.Unlock()
	}
}

// enter puts a frame that left the site's bridge on its way.
func (w *wan) enter(site int, data []byte) {
	now := w.now()
	dst, src := mac(data[:6]), mac(data[6:12])

	w.mu.Lock()
	defer w.mu.Unlock()
	if w.parted[[2]mac{src, dst}] {
		return
	}
	// A switch on a host may have addresses of its own beside the host's.
	if _, known := w.learned[src]; (known || len(w.learned) < maxLearned) && !src.multicast() {
		w.learned[src] = site
	}
	if to, known := w.learned[dst]; known && !dst.multicast() {
		w.forward(now, site, frame{data, to})
	} else {
		for to := range w.taps {
			w.forward(now, site, frame{data, to}) // all share the bytes, none writes to them
		}
	}
	w.deliver()
}

// forward hands a frame to the next link of its path. The caller holds w.mu.
func (w *wan) forward(now instant, at int, f frame) {
	if at == f.to {
		return // the bridge flooded it; it has been there
	}
	if i := w.next[at][f.to]; i >= 0 {
		w.pipe(i, at).admit(now, f)
	}
}

// pipe is link i in the direction that leaves the site.
func (w *wan) pipe(i, from int) *shaper {
	if w.ends[i][0] == from {
		return w.pipes[2*i]
	}
	return w.pipes[2*i+1]
}

// deliver moves on all frames that are due, in the order of their arrival, and
// sets the alarm for the next. The caller holds w.mu.
func (w *wan) deliver() {
	if w.closed {
		return
	}
	for {
		first, due := -1, instant(0)
		for i, p := range w.pipes {
			if t, ok := p.next(); ok && (first < 0 || t < due) {
				first, due = i, t
			}
		}
		if first < 0 {
			return
		}
		if wait := due - w.now(); wait > 0 {
			if err := w.alarm.set(wait); err != nil {
				w.log.Error("WAN stands still", "err", err)
			}
			return
		}
		f, _, _ := w.pipes[first].release(due)
		// The far end: of A to B it is B.
		at := w.ends[first/2][1-first%2]
		if at != f.to {
			w.forward(due, at, f) // of the time it was due, so that lateness doesn't add up
			continue
		}
		if _, err := w.taps[at].Write(f.data); err != nil {
			w.log.Warn("WAN lost a frame: the site doesn't take it", "site", at, "err", err)
		}
	}
}

// Link is the WAN link between two sites. Its methods may be called from any
// goroutine, while frames are on their way.
type Link struct {
	A, B string // the sites

	wan    *wan
	ab, ba *shaper
}

// Shape returns what the link does to frames.
func (l *Link) Shape() Shape {
	l.wan.mu.Lock()
	defer l.wan.mu.Unlock()
	return l.ab.shape
}

// SetShape changes what the link does to frames that it gets from now on, in
// both directions. Those on their way arrive as before, and are not overtaken.
func (l *Link) SetShape(s Shape) error {
	return l.change(func(shape *Shape) { *shape = s })
}

// SetDelay changes the propagation delay; see [Shape] for it and the like.
func (l *Link) SetDelay(d time.Duration) error { return l.change(func(s *Shape) { s.Delay = d }) }

// SetJitter changes the variation of the delay.
func (l *Link) SetJitter(d time.Duration) error { return l.change(func(s *Shape) { s.Jitter = d }) }

// SetLoss changes the probability of a loss.
func (l *Link) SetLoss(p float64) error { return l.change(func(s *Shape) { s.Loss = p }) }

// SetReorder changes the probability of a detour.
func (l *Link) SetReorder(p float64) error { return l.change(func(s *Shape) { s.Reorder = p }) }

// SetRate changes the rate in bit/s; 0 means unlimited.
func (l *Link) SetRate(bits int64) error { return l.change(func(s *Shape) { s.Rate = bits }) }

func (l *Link) change(fn func(*Shape)) error {
	l.wan.mu.Lock()
	defer l.wan.mu.Unlock()
	s := l.ab.shape
	fn(&s)
	if err := s.validate(); err != nil {
		return fmt.Errorf("shape WAN link between %q and %q: %w", l.A, l.B, err)
	}
	l.ab.shape, l.ba.shape = s, s
	return nil
}

// Partition cuts the link in both directions (true), which loses the frames on
// their way, or mends it (false). Nothing is routed around a cut link.
func (l *Link) Partition(cut bool) {
	l.wan.mu.Lock()
	defer l.wan.mu.Unlock()
	l.ab.partition(cut)
	l.ba.partition(cut)
}

// LinkStats are the counters of both directions of a link.
type LinkStats struct {
	AtoB, BtoA Counters
}

// Stats returns the counters since the lab was built.
func (l *Link) Stats() LinkStats {
	l.wan.mu.Lock()
	defer l.wan.mu.Unlock()
	return LinkStats{AtoB: l.ab.stats, BtoA: l.ba.stats}
}
