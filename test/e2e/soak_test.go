package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"violin/internal/catalog"
	"violin/internal/frames"
	"violin/internal/metadata"
	"violin/internal/store"
)

// TestSoak takes many cuts of examples/ledger.yaml under load, reads every one of
// them, and goes back to a random one again and again after all nodes, or the
// server with them, were killed. It asserts what docs/cut-protocol.md promises:
//
//   - in every cut, read out of the memory of the nodes as it was sealed: no
//     receipt without a sending, and no frame in the channel state that was
//     received or never sent;
//   - in the run that goes on after cuts, and in that after a restore, once
//     nothing is under way: every transfer has come exactly once, but for
//     datagrams that the network lost, and the sum of all accounts is exact;
//   - no cut tells of lost frames if the WAN loses none, also after one that was
//     aborted, as some are on purpose.
//
// VIOLIN_CUTS is the number of cuts (100), half of them while the WAN loses
// 1 % of all frames and reorders; VIOLIN_SEED repeats a run's choices.
func TestSoak(t *testing.T) {
	if os.Getenv("VIOLIN_E2E") != "1" {
		t.Skip("runs real VMs and switches, as root: set VIOLIN_E2E=1")
	}
	cuts, seed := number(t, "VIOLIN_CUTS", 100), uint64(number(t, "VIOLIN_SEED", int(time.Now().UnixNano()&0xffffffff)))
	t.Logf("VIOLIN_CUTS=%d VIOLIN_SEED=%d", cuts, seed)
	t.Run("no loss", func(t *testing.T) { newSoak(t, rand.New(rand.NewPCG(seed, 1)), "").run(cuts - cuts/2) })
	t.Run("loss", func(t *testing.T) { newSoak(t, rand.New(rand.NewPCG(seed, 2)), "loss: 1%, reorder: 2%").run(cuts / 2) })
}

func number(t *testing.T, variable string, otherwise int) int {
	t.Helper()
	v := os.Getenv(variable)
	if v == "" {
		return otherwise
	}
	n, err := strconv.Atoi(v)
	if err != nil || n < 0 {
		t.Fatalf("%s=%q is not a number", variable, v)
	}
	return n
}

const (
	mostCuts = 8  // between two restores
	keep     = 24 // snapshots, between two restores
)

// soak is a slice under test.
type soak struct {
	t      *testing.T
	rng    *rand.Rand
	dirs   []string
	runDir string
	own    string // state directory
	nodes  []string
	loses  bool                    // the WAN does
	lossy  func(from, to int) bool // on the way between which nodes

	closing func() // of what a reading has opened; nil for nothing

	history []*taken
	began   time.Time
	stats   soakStats
}

// taken is a snapshot that was read, and what became of the run it was taken of.
type taken struct {
	id      string
	ledger  ledger
	channel []transfer
	later   ledger // at rest
}

type soakStats struct {
	cuts, restores, serverKills     int
	cutting, reading, restoring     time.Duration
	pauses, skews                   []time.Duration
	held, recorded, datagrams, lost int64
	nowhere                         int // transfers sent, and neither received nor in the channel state
	again, lostAnew                 int // of these, at restores: came in the run that went on over a lossy link; did not come after the restore
	aborts                          []string
	provoked                        int // aborts
}

func newSoak(t *testing.T, rng *rand.Rand, wan string) *soak {
	t.Helper()
	s := &soak{t: t, rng: rng, nodes: []string{"alice", "bob", "carol", "dave"}, loses: wan != "", lossy: nowhere}
	s.dirs, s.runDir = begin(t)
	s.own = filepath.Join(s.runDir, "state")
	topo, err := os.ReadFile(filepath.Join(root, "examples/ledger.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if s.loses {
		const line = "jitter: 5ms"
		if bytes.Count(topo, []byte(line)) != 1 {
			t.Fatalf("examples/ledger.yaml: %q is not there once", line)
		}
		topo = bytes.Replace(topo, []byte(line), []byte(line+", "+wan), 1)
		dave := slices.Index(s.nodes, "dave") // who is alone at the other end of the WAN
		s.lossy = func(from, to int) bool { return from == dave || to == dave }
	}
	file := filepath.Join(s.runDir, "ledger.yaml")
	if err := os.WriteFile(file, topo, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			s.saveLog()
		}
	})
	must(t, s.dirs, "up", file)
	return s
}

// saveLog keeps what tells why a run failed: what the guests themselves have dropped,
// and the server's log.
func (s *soak) saveLog() {
	for _, n := range s.nodes {
		if out, err := command(s.t, s.dirs, "exec", "ledger/"+n, "--", "grep", "-h", "Udp:\\|eth0", "/proc/net/snmp", "/proc/net/dev"); err == nil {
			s.t.Logf("%s:\n%s", n, out)
		}
	}
	b, err := os.ReadFile(filepath.Join(s.own, "server.log"))
	if err != nil {
		s.t.Log(err)
		return
	}
	if len(b) > 20_000 {
		b = b[len(b)-20_000:]
	}
	s.t.Logf("the end of the server's log:\n%s", b)
}

func (s *soak) run(cuts int) {
	s.began = time.Now()
	s.underWay()
	for done := 0; done < cuts; {
		n := min(1+s.rng.IntN(mostCuts), cuts-done)
		ids := s.cut(n)
		if done += n; done/100 > (done-n)/100 {
			s.t.Logf("%d of %d cuts in %s, %d restores", done, cuts, time.Since(s.began).Round(time.Second), s.stats.restores)
		}
		s.freeze()
		later := s.rest("the run that went on")
		s.thaw()
		withServer := s.rng.IntN(2) == 0
		s.kill(withServer)
		s.read(ids, later, withServer)
		back := s.history[s.rng.IntN(len(s.history))]
		s.restore(back)
		if s.t.Failed() {
			return
		}
	}
	s.report()
}

// underWay returns when each node sends to each.
func (s *soak) underWay() {
	s.t.Helper()
	for deadline := time.Now().Add(5 * time.Minute); ; time.Sleep(time.Second) {
		if l, err := s.dump(); err == nil {
			busy := 0
			for _, f := range l.flows() {
				if len(l[f.to].received[f]) > 10 {
					busy++
				}
			}
			if busy == len(l.flows()) {
				return
			}
		}
		if time.Now().After(deadline) {
			s.t.Fatal("the nodes do not send each other money")
		}
	}
}

// each runs the ledger command in every node.
func (s *soak) each(verb string) ([][]byte, error) {
	out, errs := make([][]byte, len(s.nodes)), make([]error, len(s.nodes))
	var wg sync.WaitGroup
	for i, n := range s.nodes {
		wg.Go(func() {
			cmd := exec.CommandContext(s.t.Context(), filepath.Join(root, "bin/violin"), append(slices.Clone(s.dirs), "exec", "ledger/"+n, "--", "ledger", verb)...)
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			if out[i], errs[i] = cmd.Output(); errs[i] != nil {
				errs[i] = fmt.Errorf("%s: ledger %s: %w: %s", n, verb, errs[i], stderr.Bytes())
			}
		})
	}
	wg.Wait()
	return out, errors.Join(errs...)
}

func (s *soak) freeze() { s.tell("freeze") }
func (s *soak) thaw()   { s.tell("thaw") }

func (s *soak) tell(verb string) {
	s.t.Helper()
	if _, err := s.each(verb); err != nil {
		s.t.Fatal(err)
	}
}

func (s *soak) dump() (ledger, error) {
	out, err := s.each("dump")
	if err != nil {
		return nil, err
	}
	var nodes []*node
	for _, b := range out {
		ps := pages{}
		for p := range slices.Chunk(b, ledgerPage) {
			ps.take(p)
		}
		n, err := ps.parse()
		if err != nil {
			return nil, err
		}
		nodes = append(nodes, n)
	}
	return newLedger(nodes)
}

// rest waits, the nodes being frozen, until nothing is under way any more, and
// checks that everything adds up.
func (s *soak) rest(what string) ledger {
	s.t.Helper()
	const quiet = 3 * time.Second
	var since time.Time
	left := -1
	for deadline := time.Now().Add(90 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		l, err := s.dump()
		if err != nil {
			s.t.Fatal(err)
		}
		outstanding := l.outstanding()
		if len(outstanding) != left {
			left, since = len(outstanding), time.Now()
		}
		streams := slices.ContainsFunc(outstanding, func(t transfer) bool { return t.transport == tcp })
		// What is lost stays lost; what is not comes while nobody looks away.
		if left == 0 || !streams && time.Since(since) > quiet || time.Now().After(deadline) {
			s.complain(what, l.rest(s.lossy))
			return l
		}
	}
}

func (s *soak) complain(what string, errs []error) {
	s.t.Helper()
	for i, err := range errs {
		if i == 20 {
			s.t.Errorf("%s: and %d more", what, len(errs)-i)
			return
		}
		s.t.Errorf("%s: %v", what, err)
	}
}

// cut takes snapshots back to back and returns their ids.
func (s *soak) cut(n int) []string {
	s.t.Helper()
	var ids []string
	for len(ids) < n {
		began := time.Now()
		args := []string{"snapshot", "ledger", "--mode", "background", "--output", "json"}
		provoked := s.rng.IntN(8) == 0
		if provoked { // the first frame that has to be held aborts it
			args = append(args, "--hold-bytes", "1")
		}
		out, err := command(s.t, s.dirs, args...)
		s.stats.cutting += time.Since(began)
		var exit *exec.ExitError
		if errors.As(err, &exit) && exit.ExitCode() == 4 {
			if provoked {
				s.stats.provoked++
				continue
			}
			// No promise is broken by an abort; but they must be few.
			s.stats.aborts = append(s.stats.aborts, time.Now().Format(time.TimeOnly))
			if len(s.stats.aborts) > 3+s.stats.cuts/20 {
				s.t.Fatalf("%d cuts were aborted, %d were not", len(s.stats.aborts), s.stats.cuts)
			}
			continue
		}
		if err != nil {
			s.t.FailNow()
		}
		var snap struct{ ID string }
		if err := json.Unmarshal(out, &snap); err != nil {
			s.t.Fatal(err)
		}
		ids = append(ids, snap.ID)
		s.stats.cuts++
	}
	return ids
}

// kill ends all nodes, or the server, and with it all that it started.
func (s *soak) kill(withServer bool) {
	s.t.Helper()
	var pids []string
	if withServer {
		var v struct{ Server struct{ PID string } }
		if err := json.Unmarshal(must(s.t, s.dirs, "version", "--output", "json"), &v); err != nil {
			s.t.Fatal(err)
		}
		pids = []string{v.Server.PID}
		s.stats.serverKills++
	} else {
		for _, n := range slice(s.t, s.dirs, "").Nodes {
			pids = append(pids, n.PID)
		}
	}
	for _, pid := range pids {
		kill(s.t, pid)
	}
	if withServer {
		gone(s.t, s.runDir)
	}
}

// lead opens the metadata of a server that is gone, until the caller's store is closed.
func (s *soak) lead() *metadata.Leadership {
	s.t.Helper()
	config := metadata.Config{Dir: filepath.Join(s.own, "etcd"), Logger: slog.New(slog.DiscardHandler)}
	etcd, err := metadata.Open(s.t.Context(), config)
	for deadline := time.Now().Add(30 * time.Second); err != nil && time.Now().Before(deadline); {
		time.Sleep(50 * time.Millisecond)
		etcd, err = metadata.Open(s.t.Context(), config)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	s.closing = func() {
		if err := etcd.Close(); err != nil {
			s.t.Error(err)
		}
	}
	led, _, err := etcd.Lead(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	return led
}

// read takes the snapshots out of the store, checks each, and forgets some of all
// if nobody else has the store.
func (s *soak) read(ids []string, later ledger, writable bool) {
	s.t.Helper()
	defer func(began time.Time) { s.stats.reading += time.Since(began) }(time.Now())
	ctx := s.t.Context()
	key, err := store.ReadKeyFile(filepath.Join(s.own, "store.key"))
	if err != nil {
		s.t.Fatal(err)
	}
	options := store.Options{ReadOnly: !writable, Logger: slog.New(slog.DiscardHandler), Key: key}
	var led *metadata.Leadership
	if writable {
		// As the next server; beside one that runs, the documents' copies are read.
		led = s.lead()
		options.Documents, options.Copied = led, catalog.Directories()
	}
	st, err := store.Open(ctx, filepath.Join(s.own, "store"), options)
	// A killed process gives its command line up before its locks.
	for deadline := time.Now().Add(30 * time.Second); errors.Is(err, store.ErrLocked) && time.Now().Before(deadline); {
		time.Sleep(50 * time.Millisecond)
		st, err = store.Open(ctx, filepath.Join(s.own, "store"), options)
	}
	if err == nil && led != nil {
		err = led.Bind(ctx, st.ID(), 0, func(context.Context) error { return errors.New("the servers have left no metadata") })
	}
	if err != nil {
		s.t.Fatal(err)
	}
	defer func() {
		if err := st.Close(); err != nil {
			s.t.Error(err)
		}
		if s.closing != nil {
			s.closing()
			s.closing = nil
		}
	}()
	cat := catalog.New(st)
	for _, id := range ids {
		snap, err := cat.Get(ctx, "ledger", id)
		for deadline := time.Now().Add(30 * time.Second); !writable && errors.Is(err, catalog.ErrNotFound) && time.Now().Before(deadline); {
			time.Sleep(50 * time.Millisecond) // copies are written behind
			snap, err = cat.Get(ctx, "ledger", id)
		}
		if err != nil {
			s.t.Fatal(err)
		}
		s.note(snap)
		c := &taken{id: id, later: later}
		if c.ledger, err = s.ledgerOf(ctx, st, snap); err != nil {
			s.t.Fatalf("snapshot %s: %v", id, err)
		}
		if c.channel, err = channelOf(ctx, st, snap); err != nil {
			s.t.Fatalf("snapshot %s: %v", id, err)
		}
		s.complain("cut "+id, c.ledger.admits(c.channel))
		c.channel = slices.DeleteFunc(c.channel, func(t transfer) bool { return t.transport == tcp })
		s.complain("the run that went on after cut "+id, later.continues(c.ledger, c.channel))
		s.stats.datagrams += int64(len(c.channel))
		for _, t := range c.ledger.outstanding() {
			if !slices.Contains(c.channel, t) {
				s.stats.nowhere++
			}
		}
		s.history = append(s.history, c)
	}
	if !writable {
		return
	}
	for len(s.history) > keep {
		i := s.rng.IntN(len(s.history))
		if err := cat.Delete(ctx, "ledger", s.history[i].id); err != nil {
			s.t.Fatal(err)
		}
		s.history = slices.Delete(s.history, i, i+1)
	}
	if _, err := st.GC(ctx, cat.Roots(ctx)); err != nil {
		s.t.Fatal(err)
	}
}

// note counts what the snapshot tells of its making.
func (s *soak) note(snap *catalog.Snapshot) {
	s.t.Helper()
	if snap.Totals.Dropped != 0 {
		s.t.Errorf("cut %s: %d frames were dropped by it", snap.ID, snap.Totals.Dropped)
	}
	if !s.loses && snap.Totals.Lost != 0 {
		s.t.Errorf("cut %s: %d frames lost by a network that loses none", snap.ID, snap.Totals.Lost)
	}
	for _, n := range snap.Nodes {
		s.stats.pauses = append(s.stats.pauses, n.Pause)
	}
	s.stats.skews = append(s.stats.skews, snap.Totals.Skew)
	s.stats.held += snap.Totals.Held
	s.stats.recorded += snap.Totals.Recorded
	s.stats.lost += snap.Totals.Lost
}

// ledgerOf finds the nodes' logs in their memory as it was sealed.
func (s *soak) ledgerOf(ctx context.Context, st *store.Store, snap *catalog.Snapshot) (ledger, error) {
	nodes := make([]*node, len(snap.Nodes))
	for i, sn := range snap.Nodes {
		ps := pages{}
		memory, err := st.OpenMemory(ctx, sn.Memory)
		if err != nil {
			return nil, err
		}
		buf := make([]byte, store.PageSize)
		for block, region := range memory.Regions() {
			for offset := uint64(0); offset < region.Length; offset += store.PageSize {
				zero, err := memory.Page(block, offset, buf)
				if err != nil {
					memory.Close()
					return nil, err
				}
				if !zero {
					ps.take(buf)
				}
			}
		}
		memory.Close()
		if nodes[i], err = ps.parse(); err != nil {
			return nil, fmt.Errorf("node %s: %w", sn.Name, err)
		}
	}
	return newLedger(nodes)
}

// channelOf are the transfers in the channel state.
func channelOf(ctx context.Context, st *store.Store, snap *catalog.Snapshot) ([]transfer, error) {
	b, err := st.GetBlob(ctx, snap.Channel.Ref)
	if err != nil {
		return nil, err
	}
	cs, err := frames.Read(bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	var ts []transfer
	for _, f := range cs.Frames {
		ts = append(ts, carried(f.Data)...)
	}
	return ts, nil
}

// restore goes back to a snapshot and checks what comes of it.
func (s *soak) restore(c *taken) {
	s.t.Helper()
	began := time.Now()
	must(s.t, s.dirs, "restore", "ledger@"+c.id)
	s.stats.restoring += time.Since(began)
	s.stats.restores++
	s.freeze()
	what := "restored to " + c.id
	l := s.rest(what)
	s.complain(what, l.continues(c.ledger, c.channel))
	// What was under way at the cut and came in the run that went on has to come in
	// this one. Only what had not left its sender can meet a worse fate on the WAN.
	for _, t := range c.ledger.outstanding() {
		if c.later.received(t) == 0 || slices.Contains(c.channel, t) {
			continue
		}
		switch came := l.received(t) != 0; {
		case s.lossy(t.from, t.to) && t.transport == udp:
			s.stats.again++
			if !came {
				s.stats.lostAnew++
			}
		case !came:
			s.t.Errorf("%s: %v: %d came in the run that went on, and not in this one", what, t.flow, t.seq)
		}
	}
	s.thaw()
}

func (s *soak) report() {
	s.t.Helper()
	st := &s.stats
	spread := func(ds []time.Duration) string {
		slices.Sort(ds)
		ms := func(d time.Duration) string { return fmt.Sprintf("%.1f", float64(d)/1e6) }
		return fmt.Sprintf("%s / %s / %s ms", ms(ds[0]), ms(ds[len(ds)/2]), ms(ds[len(ds)-1]))
	}
	var b strings.Builder
	row := func(what, format string, args ...any) {
		fmt.Fprintf(&b, "\n  %-28s "+format, append([]any{what}, args...)...)
	}
	row("cuts", "%d in %s, %.0f a minute back to back", st.cuts, time.Since(s.began).Round(time.Second), float64(st.cuts)/st.cutting.Minutes())
	row("restores", "%d, after the server was killed %d; %.1f s each", st.restores, st.serverKills, st.restoring.Seconds()/float64(st.restores))
	row("reading them all", "%s", st.reading.Round(100*time.Millisecond))
	row("aborts", "%d, and %d provoked", len(st.aborts), st.provoked)
	row("pause, min/median/max", "%s", spread(st.pauses))
	row("skew, min/median/max", "%s", spread(st.skews))
	row("frames held", "%d", st.held)
	row("frames recorded", "%d, %d of them datagrams of the ledger", st.recorded, st.datagrams)
	row("transfers nowhere on record", "%d: in a guest's memory, or lost", st.nowhere)
	row("sent again over a lossy WAN", "%d, %d of them lost", st.again, st.lostAnew)
	row("lost by the network", "%d frames", st.lost)
	s.t.Log(b.String())
	// The WAN loses one in a hundred.
	if st.lostAnew > 3+st.again/10 {
		s.t.Errorf("%d of %d datagrams that were in nobody's record at the cut did not come after a restore", st.lostAnew, st.again)
	}
}
