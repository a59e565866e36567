package bench

import (
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
)

// The slice that the live figures are of, and what flows in it: TCP from n0 to n2
// and UDP from n1 to n3, over the WAN.
const (
	liveSlice = "bench-cut"
	tcpRate   = "8M"
	udpRate   = "1M"
	flow      = 16 * time.Second        // how long both flow
	lead      = 7 * time.Second         // before the cut: slow start, then the window before it
	guard     = 500 * time.Millisecond  // how far apart iperf3's clock and ours may be: the window across the cut begins so much before it
	window    = 5 * time.Second         // compared, before and across the cut
	ahead     = 1500 * time.Millisecond // how long before the cut its instant is agreed
)

//go:embed bench-cut.yaml
var liveTopology []byte

// A Cut is one live cut of a slice whose nodes send, and what it did to the flows.
type Cut struct {
	Newer    string        `json:"newer"` // the policy: hold or drop
	Pause    time.Duration `json:"pause_ns"`
	Skew     time.Duration `json:"skew_ns"`
	Held     uint64        `json:"frames_held"`
	Recorded uint64        `json:"frames_recorded"`
	Dropped  uint64        `json:"frames_dropped"`

	Before      float64 `json:"tcp_before_bits"` // goodput in the window before the cut, bit/s
	Across      float64 `json:"tcp_across_bits"` // in that which begins with it
	Retransmits int     `json:"tcp_retransmits"` // in all of the flow
	Timeouts    int     `json:"tcp_timeouts"`    // retransmission timeouts from 1.5 s before the cut to the window's end
	UDPSent     int     `json:"udp_sent"`
	UDPLost     int     `json:"udp_lost"` // of all of the flow
}

// Ratio is the goodput across the cut to that before it.
func (c Cut) Ratio() float64 {
	if c.Before == 0 {
		return 0
	}
	return c.Across / c.Before
}

// A Restore is one restore of a slice whose nodes were sending.
type Restore struct {
	Newer       string        `json:"newer"` // the policy of the snapshot
	Took        time.Duration `json:"took_ns"`
	Skew        time.Duration `json:"skew_ns"` // of the instants at which the nodes ran again
	Injected    uint64        `json:"frames_injected"`
	Retransmits int           `json:"tcp_retransmits"` // of the node that sends by TCP, in the window after it
	Timeouts    int           `json:"tcp_timeouts"`
}

// Live measures cuts of a slice of its own, with the policies in turn, and then
// restores the last snapshot of each. The slice is taken down in every case.
func Live(ctx context.Context, c violinv1connect.SliceServiceClient, runs int, told func(string)) (cuts []Cut, restores []Restore, err error) {
	l := &live{client: c, told: told}
	defer func() {
		down, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		if _, derr := c.Down(down, &violinv1.DownRequest{Slice: liveSlice}); derr != nil && connect.CodeOf(derr) != connect.CodeNotFound {
			err = errors.Join(err, fmt.Errorf("take the slice down: %w", derr))
		}
	}()
	if err := l.up(ctx); err != nil {
		return nil, nil, err
	}
	policies := []violinv1.NewerPolicy{violinv1.NewerPolicy_NEWER_POLICY_DROP, violinv1.NewerPolicy_NEWER_POLICY_HOLD}
	type taken struct {
		id     string
		before map[string]int
	}
	last := map[violinv1.NewerPolicy]taken{}
	for range runs {
		for _, newer := range policies {
			cut, id, err := l.cut(ctx, newer)
			if err != nil {
				return cuts, nil, fmt.Errorf("cut with the policy %s: %w", newer, err)
			}
			cuts = append(cuts, cut)
			last[newer] = taken{id, l.before}
		}
	}
	for _, newer := range policies {
		r, err := l.restore(ctx, last[newer].id, last[newer].before)
		if err != nil {
			return cuts, restores, fmt.Errorf("restore a cut with the policy %s: %w", policy(newer), err)
		}
		r.Newer = policy(newer)
		restores = append(restores, r)
	}
	return cuts, restores, nil
}

type live struct {
	client violinv1connect.SliceServiceClient
	told   func(string)
	before map[string]int // n0's TCP counters just before the last cut
}

func (l *live) up(ctx context.Context) error {
	l.told("a slice of four nodes")
	stream, err := l.client.Up(ctx, &violinv1.UpRequest{File: "bench-cut.yaml", Topology: liveTopology})
	if err != nil {
		return err
	}
	if _, err := result(stream, (*violinv1.UpResponse).GetSlice); err != nil {
		return err
	}
	for _, n := range []string{"n0", "n1", "n2", "n3"} {
		for { // until it has booted
			if _, err = l.exec(ctx, n, "true"); err == nil {
				break
			}
			select {
			case <-time.After(500 * time.Millisecond):
			case <-ctx.Done():
				return fmt.Errorf("wait for node %s: %w", n, err)
			}
		}
	}
	for _, n := range []string{"n2", "n3"} {
		if _, err := l.exec(ctx, n, "iperf3 -s -D"); err != nil {
			return err
		}
	}
	return nil
}

// exec runs a shell's line in a node.
func (l *live) exec(ctx context.Context, node, line string) (string, error) {
	r, err := l.client.Exec(ctx, &violinv1.ExecRequest{
		Slice: liveSlice, Node: node, Command: []string{"sh", "-c", line}, Timeout: durationpb.New(20 * time.Second),
	})
	if err != nil {
		return "", err
	}
	if r.GetExitCode() != 0 {
		return "", fmt.Errorf("node %s: %s: exit status %d: %s%s", node, line, r.GetExitCode(), r.GetStdout(), r.GetStderr())
	}
	return string(r.GetStdout()), nil
}

// cut starts both flows, cuts the slice in the middle of them, and reads what came of it.
func (l *live) cut(ctx context.Context, newer violinv1.NewerPolicy) (Cut, string, error) {
	seconds := strconv.Itoa(int(flow.Seconds()))
	began := time.Now()
	for node, line := range map[string]string{
		"n0": "rm -f /tmp/flow.json; iperf3 -c 10.90.0.3 -b " + tcpRate + " -t " + seconds + " -i 0.1 -J --logfile /tmp/flow.json >/dev/null 2>&1 </dev/null &",
		"n1": "rm -f /tmp/flow.json; iperf3 -c 10.90.0.4 -u -l 1000 -b " + udpRate + " -t " + seconds + " -J --logfile /tmp/flow.json >/dev/null 2>&1 </dev/null &",
	} {
		if _, err := l.exec(ctx, node, line); err != nil {
			return Cut{}, "", err
		}
		if node == "n0" {
			began = time.Now()
		}
	}
	l.told("flows, and a cut with --newer " + policy(newer))
	if err := until(ctx, began.Add(lead)); err != nil {
		return Cut{}, "", err
	}
	var err error
	if l.before, err = l.tcp(ctx, "n0"); err != nil {
		return Cut{}, "", err
	}
	snap, err := l.snapshot(ctx, newer)
	if err != nil {
		return Cut{}, "", err
	}
	at := snap.GetCreated().AsTime()
	for i, n := range snap.GetNodes() {
		if t := n.GetCutAt().AsTime(); i == 0 || t.Before(at) {
			at = t
		}
	}
	if err := until(ctx, at.Add(window)); err != nil {
		return Cut{}, "", err
	}
	late, err := l.tcp(ctx, "n0")
	if err != nil {
		return Cut{}, "", err
	}
	c := Cut{
		Newer: policy(newer), Skew: snap.GetSkew().AsDuration(), Held: snap.GetFramesHeld(), Recorded: snap.GetFramesRecorded(), Dropped: snap.GetFramesDropped(),
		Timeouts: late["TCPTimeouts"] - l.before["TCPTimeouts"],
	}
	for _, n := range snap.GetNodes() {
		c.Pause = max(c.Pause, n.GetPause().AsDuration())
	}
	tcp, err := l.flow(ctx, "n0", began)
	if err != nil {
		return Cut{}, "", err
	}
	udp, err := l.flow(ctx, "n1", began)
	if err != nil {
		return Cut{}, "", err
	}
	middle := at.Sub(began) - guard
	if c.Before, err = tcp.goodput(middle-window, middle); err != nil {
		return Cut{}, "", fmt.Errorf("before the cut: %w", err)
	}
	if c.Across, err = tcp.goodput(middle, middle+window); err != nil {
		return Cut{}, "", fmt.Errorf("across the cut: %w", err)
	}
	c.Retransmits, c.UDPSent, c.UDPLost = tcp.End.Sent.Retransmits, udp.End.Sum.Packets, udp.End.Sum.Lost
	return c, snap.GetId(), nil
}

func (l *live) snapshot(ctx context.Context, newer violinv1.NewerPolicy) (*violinv1.Snapshot, error) {
	stream, err := l.client.Snapshot(ctx, &violinv1.SnapshotRequest{
		Slice: liveSlice, Newer: newer, At: timestamppb.New(time.Now().Add(ahead)),
	})
	if err != nil {
		return nil, err
	}
	return result(stream, (*violinv1.SnapshotResponse).GetSnapshot)
}

// result receives a stream to its end and returns what the last message holds.
func result[Response, Result any](stream *connect.ServerStreamForClient[Response], get func(*Response) *Result) (*Result, error) {
	var last *Result
	for stream.Receive() {
		if r := get(stream.Msg()); r != nil {
			last = r
		}
	}
	if err := errors.Join(stream.Err(), stream.Close()); err != nil {
		return nil, err
	}
	if last == nil {
		return nil, errors.New("the server ended the call without a result")
	}
	return last, nil
}

func (l *live) restore(ctx context.Context, id string, before map[string]int) (Restore, error) {
	l.told("a restore")
	stream, err := l.client.Restore(ctx, &violinv1.RestoreRequest{Snapshot: liveSlice + "@" + id})
	if err != nil {
		return Restore{}, err
	}
	done, err := result(stream, (*violinv1.RestoreResponse).GetRestored)
	if err != nil {
		return Restore{}, err
	}
	if err := until(ctx, time.Now().Add(window)); err != nil {
		return Restore{}, err
	}
	after, err := l.tcp(ctx, "n0")
	if err != nil {
		return Restore{}, err
	}
	return Restore{
		Took: done.GetDuration().AsDuration(), Skew: done.GetSkew().AsDuration(), Injected: done.GetFramesInjected(),
		Retransmits: after["RetransSegs"] - before["RetransSegs"], Timeouts: after["TCPTimeouts"] - before["TCPTimeouts"],
	}, nil
}

// tcp reads a node's TCP counters, by the kernel's names for them (proc(5)).
func (l *live) tcp(ctx context.Context, node string) (map[string]int, error) {
	out, err := l.exec(ctx, node, "cat /proc/net/snmp /proc/net/netstat")
	if err != nil {
		return nil, err
	}
	counters := parseCounters(out)
	for _, name := range []string{"RetransSegs", "TCPTimeouts"} {
		if _, ok := counters[name]; !ok {
			return nil, fmt.Errorf("node %s: its kernel counts no %s", node, name)
		}
	}
	return counters, nil
}

// parseCounters reads pairs of lines: names, and their values.
func parseCounters(text string) map[string]int {
	counters := map[string]int{}
	var names []string
	for line := range strings.SplitSeq(text, "\n") {
		group, rest, ok := strings.Cut(line, ":")
		if !ok || group != "Tcp" && group != "TcpExt" {
			continue
		}
		fields := strings.Fields(rest)
		if len(names) == 0 {
			names = fields
			continue
		}
		for i, f := range fields[:min(len(fields), len(names))] {
			if n, err := strconv.Atoi(f); err == nil {
				counters[names[i]] = n
			}
		}
		names = nil
	}
	return counters
}

// report is what is used of iperf3's JSON.
type report struct {
	Error     string `json:"error"`
	Intervals []struct {
		Sum struct {
			Start, End float64 // seconds
			Bytes      float64
		}
	}
	End struct {
		Sent struct{ Retransmits int } `json:"sum_sent"`
		Sum  struct {
			Packets int
			Lost    int `json:"lost_packets"`
		}
	}
}

// goodput is the mean rate between two instants of a flow, in bit/s. All of the time
// between them must have been measured, but for a part of an interval at each end.
func (r *report) goodput(from, to time.Duration) (float64, error) {
	var bytes, seconds float64
	for _, i := range r.Intervals {
		if i.Sum.Start >= from.Seconds() && i.Sum.End <= to.Seconds() {
			bytes += i.Sum.Bytes
			seconds += i.Sum.End - i.Sum.Start
		}
	}
	if want := (to - from).Seconds(); seconds == 0 || seconds < want-0.3 {
		return 0, fmt.Errorf("the flow was measured for %.1f s of the %.1f s from %s on", seconds, want, from.Round(time.Millisecond))
	}
	return bytes * 8 / seconds, nil
}

// flow waits for the end of a node's flow and reads iperf3's report of it.
func (l *live) flow(ctx context.Context, node string, began time.Time) (*report, error) {
	if err := until(ctx, began.Add(flow)); err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(20 * time.Second); ; {
		out, err := l.exec(ctx, node, "cat /tmp/flow.json 2>/dev/null || true")
		if err != nil {
			return nil, err
		}
		var r report
		if err = json.Unmarshal([]byte(out), &r); err == nil {
			if r.Error != "" {
				return nil, fmt.Errorf("node %s: iperf3: %s", node, r.Error)
			}
			return &r, nil
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("node %s: iperf3 has not ended: its report is %q: %w", node, out[:min(len(out), 100)], err)
		}
		if err := until(ctx, time.Now().Add(500*time.Millisecond)); err != nil {
			return nil, err
		}
	}
}

func until(ctx context.Context, at time.Time) error {
	select {
	case <-time.After(time.Until(at)):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func policy(p violinv1.NewerPolicy) string {
	return strings.ToLower(strings.TrimPrefix(p.String(), "NEWER_POLICY_"))
}
