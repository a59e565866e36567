package e2e

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"maps"
	"slices"
	"strings"
	"testing"
)

// The log of examples/ledger/ledger.c: its pages, and what has to hold between
// the logs of all nodes and the frames in flight.

const (
	ledgerPage    = 4096
	ledgerHeader  = 64
	ledgerMagic   = "violin ledger 1\n"
	ledgerInitial = 1_000_000
	ledgerNodes   = 8 // at most
	ledgerPort    = 7001
)

const (
	kindHead = iota
	kindSent
	kindReceived
)

const (
	udp = iota
	tcp
)

var transports = [2]string{"udp", "tcp"}

// flow is one direction between two nodes, by one transport.
type flow struct{ transport, from, to int }

func (f flow) String() string { return fmt.Sprintf("%s %d->%d", transports[f.transport], f.from, f.to) }

// transfer is one transfer of a flow.
type transfer struct {
	flow
	seq    int
	amount int
}

// node is one node's log: amounts by flow; entry i is transfer i+1, and 0 means none.
type node struct {
	name                                   string
	number, nodes                          int
	balance                                int64
	duplicates, disorder, corrupt, brokens uint64
	counts                                 map[flow][2]uint32 // sent, received: as the program counted them
	sent, received                         map[flow][]uint16
}

// pages are the pages of one node's log, the newest of each.
type pages map[uint32][]byte

// take looks whether a page of memory is one of the log.
func (ps pages) take(p []byte) {
	if len(p) != ledgerPage || string(p[:len(ledgerMagic)]) != ledgerMagic {
		return
	}
	generation := func(b []byte) uint64 { return binary.LittleEndian.Uint64(b[16:]) }
	index := binary.LittleEndian.Uint32(p[28:])
	if old, ok := ps[index]; !ok || generation(p) > generation(old) {
		ps[index] = slices.Clone(p)
	}
}

func (ps pages) parse() (*node, error) {
	head, ok := ps[0]
	if !ok {
		return nil, errors.New("the log has no head")
	}
	le := binary.LittleEndian
	n := &node{
		name: string(bytes.TrimRight(head[40:64], "\x00")), number: int(le.Uint32(head[24:])),
		balance: int64(le.Uint64(head[64:])), nodes: int(le.Uint32(head[72:])),
		duplicates: le.Uint64(head[80:]), disorder: le.Uint64(head[88:]), corrupt: le.Uint64(head[96:]), brokens: le.Uint64(head[104:]),
		counts: map[flow][2]uint32{}, sent: map[flow][]uint16{}, received: map[flow][]uint16{},
	}
	if n.nodes < 2 || n.nodes > ledgerNodes || n.number >= n.nodes {
		return nil, fmt.Errorf("the log is of node %d of %d", n.number, n.nodes)
	}
	for transport := range transports {
		for peer := range n.nodes {
			at := 112 + 4*(transport*ledgerNodes+peer)
			sent, received := flow{transport, n.number, peer}, flow{transport, peer, n.number}
			n.counts[sent] = [2]uint32{le.Uint32(head[at:]), n.counts[sent][1]}
			n.counts[received] = [2]uint32{n.counts[received][0], le.Uint32(head[at+4*len(transports)*ledgerNodes:])}
		}
	}
	for _, index := range slices.Sorted(maps.Keys(ps)) {
		p := ps[index]
		if le.Uint32(p[24:]) != uint32(n.number) {
			return nil, fmt.Errorf("page %d is of node %d, the head of node %d", index, le.Uint32(p[24:]), n.number)
		}
		kind, transport, peer, first := p[32], int(p[33]), int(p[34]), le.Uint32(p[36:])
		var log map[flow][]uint16
		f := flow{transport, n.number, peer}
		switch kind {
		case kindHead:
			continue
		case kindSent:
			log = n.sent
		case kindReceived:
			log, f = n.received, flow{transport, peer, n.number}
		}
		if log == nil || transport >= len(transports) || peer >= n.nodes {
			return nil, fmt.Errorf("page %d: kind %d, transport %d, peer %d", index, kind, transport, peer)
		}
		for len(log[f]) < int(first)-1 { // a page that was never touched: nothing of it was received
			log[f] = append(log[f], 0)
		}
		for at := ledgerHeader; at < ledgerPage; at += 2 {
			log[f] = append(log[f], le.Uint16(p[at:]))
		}
	}
	for _, log := range []map[flow][]uint16{n.sent, n.received} {
		for f, amounts := range log {
			for len(amounts) > 0 && amounts[len(amounts)-1] == 0 {
				amounts = amounts[:len(amounts)-1]
			}
			log[f] = amounts
		}
	}
	return n, nil
}

// ledger is the logs of all nodes, by number: as of one cut, or at rest.
type ledger []*node

func newLedger(nodes []*node) (ledger, error) {
	l := make(ledger, len(nodes))
	for _, n := range nodes {
		if n.nodes != len(nodes) || n.number >= len(l) || l[n.number] != nil {
			return nil, fmt.Errorf("node %d of %d, and there are %d", n.number, n.nodes, len(nodes))
		}
		l[n.number] = n
	}
	return l, nil
}

func at(amounts []uint16, seq int) int {
	if seq < 1 || seq > len(amounts) {
		return 0
	}
	return int(amounts[seq-1])
}

func (l ledger) sent(t transfer) int     { return at(l[t.from].sent[t.flow], t.seq) }
func (l ledger) received(t transfer) int { return at(l[t.to].received[t.flow], t.seq) }

func (l ledger) flows() []flow {
	var fs []flow
	for transport := range transports {
		for from := range l {
			for to := range l {
				if from != to {
					fs = append(fs, flow{transport, from, to})
				}
			}
		}
	}
	return fs
}

// outstanding lists what was sent and not received.
func (l ledger) outstanding() []transfer {
	var ts []transfer
	for _, f := range l.flows() {
		for i, amount := range l[f.from].sent[f] {
			if t := (transfer{f, i + 1, int(amount)}); l.received(t) == 0 {
				ts = append(ts, t)
			}
		}
	}
	return ts
}

// admits tells what in the logs cannot be of one cut, with these transfers in the
// channel state: promises 1 and 2 of docs/cut-protocol.md, as far as logs tell.
func (l ledger) admits(channel []transfer) []error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	for _, f := range l.flows() {
		sent := l[f.from].sent[f]
		if i := slices.Index(sent, 0); i >= 0 {
			bad("%v: the log of what was sent has no %d, but %d", f, i+1, len(sent))
		}
		gap := false
		for i, amount := range l[f.to].received[f] {
			if amount == 0 {
				gap = true
				continue
			}
			if t := (transfer{f, i + 1, int(amount)}); l.sent(t) != t.amount {
				bad("%v: %d over %d was received, and %d of %d sent", f, t.seq, t.amount, l.sent(t), len(sent))
			}
			if f.transport == tcp && gap {
				bad("%v: %d was received before what was sent before it", f, i+1)
				gap = false
			}
		}
	}
	seen := map[transfer]bool{}
	for _, t := range channel {
		if t.from >= len(l) || t.to >= len(l) || t.from == t.to {
			bad("%v: a transfer between nodes that are not there is in the channel state", t.flow)
			continue
		}
		if l.sent(t) != t.amount {
			bad("%v: %d over %d is in the channel state, and was never sent", t.flow, t.seq, t.amount)
		}
		if t.transport == tcp {
			continue // may be sent again, and may have been received before
		}
		if l.received(t) != 0 {
			bad("%v: %d is in the channel state, and received", t.flow, t.seq)
		}
		if seen[t] {
			bad("%v: %d is in the channel state twice", t.flow, t.seq)
		}
		seen[t] = true
	}
	return errs
}

// rest tells what does not add up once nothing is under way any more. lossy tells
// on which pairs of nodes the network may lose a datagram.
func (l ledger) rest(lossy func(from, to int) bool) []error {
	errs := l.admits(nil)
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	for _, n := range l {
		if n.duplicates+n.disorder+n.corrupt+n.brokens > 0 {
			bad("%s: %d duplicates, %d out of order, %d corrupt, %d connections broken", n.name, n.duplicates, n.disorder, n.corrupt, n.brokens)
		}
		balance := int64(ledgerInitial)
		for f, amounts := range n.sent {
			balance -= sum(amounts)
			if int(n.counts[f][0]) != len(amounts) {
				bad("%v: %d sent by count, %d by log", f, n.counts[f][0], len(amounts))
			}
		}
		for f, amounts := range n.received {
			balance += sum(amounts)
			if count := len(amounts) - zeros(amounts); int(n.counts[f][1]) != count {
				bad("%v: %d received by count, %d by log", f, n.counts[f][1], count)
			}
		}
		if balance != n.balance {
			bad("%s: the account has %d, the log makes it %d", n.name, n.balance, balance)
		}
	}
	var total, lost int64
	for _, n := range l {
		total += n.balance
	}
	for _, t := range l.outstanding() {
		lost += int64(t.amount)
		if t.transport == tcp || !lossy(t.from, t.to) {
			bad("%v: %d over %d was lost", t.flow, t.seq, t.amount)
		}
	}
	if total+lost != int64(len(l))*ledgerInitial {
		bad("%d in accounts and %d lost are not %d", total, lost, len(l)*ledgerInitial)
	}
	return errs
}

// continues tells what of a cut the ledger of a run that went on from it lacks:
// every entry, and the receipt of every datagram in the channel state.
func (l ledger) continues(from ledger, channel []transfer) []error {
	var errs []error
	for i, n := range from {
		for _, logs := range [][2]map[flow][]uint16{{n.sent, l[i].sent}, {n.received, l[i].received}} {
			for f, amounts := range logs[0] {
				for j, amount := range amounts {
					if amount != 0 && at(logs[1][f], j+1) != int(amount) {
						errs = append(errs, fmt.Errorf("%v: %d over %d is in %s's log at the cut, and %d later", f, j+1, amount, n.name, at(logs[1][f], j+1)))
					}
				}
			}
		}
	}
	for _, t := range channel {
		if l.received(t) != t.amount {
			errs = append(errs, fmt.Errorf("%v: %d over %d was in the channel state, and %d received later", t.flow, t.seq, t.amount, l.received(t)))
		}
	}
	return errs
}

func sum(amounts []uint16) (total int64) {
	for _, a := range amounts {
		total += int64(a)
	}
	return total
}

func zeros(amounts []uint16) (n int) {
	for _, a := range amounts {
		if a == 0 {
			n++
		}
	}
	return n
}

const recordSize = 20

// parseRecord reads a transfer as it travels.
func parseRecord(b []byte) (transfer, bool) {
	if len(b) < recordSize || string(b[:4]) != "VLGR" {
		return transfer{}, false
	}
	h := fnv.New32a()
	h.Write(b[:16])
	if h.Sum32() != binary.BigEndian.Uint32(b[16:]) || int(b[6]) >= len(transports) {
		return transfer{}, false
	}
	return transfer{
		flow: flow{int(b[6]), int(b[4]), int(b[5])},
		seq:  int(binary.BigEndian.Uint32(b[8:])), amount: int(binary.BigEndian.Uint32(b[12:])),
	}, true
}

// carried are the transfers in an Ethernet frame.
func carried(frame []byte) []transfer {
	if len(frame) < 14+20 || binary.BigEndian.Uint16(frame[12:]) != 0x0800 {
		return nil
	}
	ip := frame[14:]
	if n := int(binary.BigEndian.Uint16(ip[2:])); n <= len(ip) {
		ip = ip[:n] // without the padding of a short frame
	}
	header := int(ip[0]&15) * 4
	if len(ip) < header+20 {
		return nil
	}
	var ts []transfer
	switch payload := ip[header:]; ip[9] {
	case 17:
		if t, ok := parseRecord(payload[8:]); ok && binary.BigEndian.Uint16(payload[2:]) == ledgerPort {
			ts = append(ts, t)
		}
	case 6:
		// A segment may begin within a record.
		for b := payload; len(b) > 0; {
			t, ok := parseRecord(b)
			if !ok {
				b = b[1:]
				continue
			}
			ts, b = append(ts, t), b[recordSize:]
		}
	}
	return ts
}

// small is a ledger of three nodes at rest, in which each has sent each other
// four transfers by either transport.
func small() ledger {
	var l ledger
	for i := range 3 {
		l = append(l, &node{name: fmt.Sprint("n", i), number: i, nodes: 3, counts: map[flow][2]uint32{}, sent: map[flow][]uint16{}, received: map[flow][]uint16{}})
	}
	for _, f := range l.flows() {
		for seq := 1; seq <= 4; seq++ {
			amount := uint16(100*f.from + 10*f.to + f.transport + seq)
			l[f.from].sent[f] = append(l[f.from].sent[f], amount)
			l[f.to].received[f] = append(l[f.to].received[f], amount)
		}
		l[f.from].counts[f], l[f.to].counts[f] = [2]uint32{4, 0}, [2]uint32{0, 4}
	}
	l.settleUp()
	return l
}

func (l ledger) settleUp() {
	for _, n := range l {
		n.balance = ledgerInitial
		for _, amounts := range n.sent {
			n.balance -= sum(amounts)
		}
		for _, amounts := range n.received {
			n.balance += sum(amounts)
		}
	}
}

func nowhere(int, int) bool { return false }

// Each of the things that a cut can do wrong must be found.
func TestLedgerFindsMistakes(t *testing.T) {
	u, s := flow{udp, 0, 1}, flow{tcp, 2, 1}
	last := transfer{u, 4, 14}
	cases := []struct {
		name string
		find func(l ledger) []error
		want string // in the first error; none must be found if empty
	}{
		{"nothing", func(l ledger) []error { return append(l.rest(nowhere), l.continues(small(), nil)...) }, ""},
		{"received, and never sent", func(l ledger) []error {
			l[0].sent[u] = l[0].sent[u][:3]
			return l.admits(nil)
		}, "udp 0->1: 4 over 14 was received, and 0 of 3 sent"},
		{"sent again after the cut, over another amount", func(l ledger) []error {
			l[0].sent[u][3]++
			return l.admits(nil)
		}, "udp 0->1: 4 over 14 was received, and 15 of 4 sent"},
		{"in the channel state", func(l ledger) []error {
			l[1].received[u] = l[1].received[u][:3]
			return l.admits([]transfer{last})
		}, ""},
		{"in the channel state, and never sent", func(l ledger) []error {
			return l.admits([]transfer{{u, 5, 15}})
		}, "udp 0->1: 5 over 15 is in the channel state, and was never sent"},
		{"in the channel state, and received", func(l ledger) []error {
			return l.admits([]transfer{last})
		}, "udp 0->1: 4 is in the channel state, and received"},
		{"in the channel state twice", func(l ledger) []error {
			l[1].received[u] = l[1].received[u][:3]
			return l.admits([]transfer{last, last})
		}, "udp 0->1: 4 is in the channel state twice"},
		{"in the channel state, and not given back", func(l ledger) []error {
			l[1].received[u] = l[1].received[u][:3]
			return l.continues(small(), []transfer{last})
		}, "udp 0->1: 4 over 14 is in n1's log at the cut, and 0 later"},
		{"given back to a node that forgot it", func(l ledger) []error {
			before := small()
			before[1].received[u] = before[1].received[u][:3]
			l[1].received[u] = l[1].received[u][:3]
			return l.continues(before, []transfer{last})
		}, "udp 0->1: 4 over 14 was in the channel state, and 0 received later"},
		{"a datagram lost", func(l ledger) []error {
			l[1].received[u][1] = 0
			l[1].counts[u] = [2]uint32{0, 3}
			l.settleUp()
			return l.rest(nowhere)
		}, "udp 0->1: 2 over 12 was lost"},
		{"a datagram lost where that may be", func(l ledger) []error {
			l[1].received[u][1] = 0
			l[1].counts[u] = [2]uint32{0, 3}
			l.settleUp()
			return l.rest(func(from, to int) bool { return from == 0 && to == 1 })
		}, ""},
		{"a hole in a TCP stream", func(l ledger) []error {
			l[1].received[s][1] = 0
			l[1].counts[s] = [2]uint32{0, 3}
			l.settleUp()
			return l.rest(func(int, int) bool { return true })
		}, "tcp 2->1: 3 was received before what was sent before it"},
		{"the end of a TCP stream lost", func(l ledger) []error {
			l[1].received[s] = l[1].received[s][:3]
			l[1].counts[s] = [2]uint32{0, 3}
			l.settleUp()
			return l.rest(func(int, int) bool { return true })
		}, "tcp 2->1: 4 over 215 was lost"},
		{"a duplicate", func(l ledger) []error {
			l[1].duplicates++
			return l.rest(nowhere)
		}, "n1: 1 duplicates"},
		{"money made", func(l ledger) []error {
			l[1].balance++
			return l.rest(nowhere)
		}, "n1: the account has"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			errs := c.find(small())
			switch {
			case c.want == "" && len(errs) > 0:
				t.Errorf("found %v in a ledger without a mistake", errs)
			case c.want != "" && len(errs) == 0:
				t.Errorf("nothing found; want %q", c.want)
			case c.want != "" && !strings.HasPrefix(errs[0].Error(), c.want):
				t.Errorf("found %v; want %q", errs, c.want)
			}
		})
	}
}
