package bench

import (
	"context"
	"fmt"
	"log/slog"
	"strconv"
	"time"

	"violin/internal/agent"
	"violin/internal/coordinator"
	"violin/internal/cut"
)

// A Coordination is how long a cut of many hosts takes, without what the hosts do
// in it: the protocol and the coordinator alone.
type Coordination struct {
	Hosts int           `json:"hosts"`
	Took  time.Duration `json:"took_ns"` // of a cut, the median
}

// answerAfter is how long a simulated host takes for an order: about what a real one's
// answer takes to a coordinator in the same city.
const answerAfter = 2 * time.Millisecond

// Coordinate measures the real coordinator and the real protocol on simulated hosts with
// one node each, of which each exchanges frames with the next two.
func Coordinate(ctx context.Context, hosts, cuts int) (Coordination, error) {
	cfg := coordinator.Config{
		Slice: "bench", Hosts: map[string]coordinator.Host{}, Nodes: map[string][]string{}, Networks: map[uint16]string{1: "lan"},
		Logger: slog.New(slog.DiscardHandler),
	}
	name := func(i int) string { return "host" + strconv.Itoa(i%hosts) }
	for i := range hosts {
		h := &simulatedHost{name: name(i), nodes: []string{"node" + strconv.Itoa(i)}}
		for _, k := range []int{1, 2} {
			h.counts = append(h.counts,
				cut.ChannelCount{Channel: cut.Channel{From: name(i), To: name(i + k), Network: "lan"}, Sent: 100},
				cut.ChannelCount{Channel: cut.Channel{From: name(i + hosts - k%hosts), To: name(i), Network: "lan"}, Received: 100})
		}
		cfg.Hosts[h.name], cfg.Nodes[h.name] = h, h.nodes
	}
	c := coordinator.New(cfg)
	var took []time.Duration
	for i := range cuts {
		began := time.Now()
		err := c.Take(ctx, coordinator.Cut{
			ID:   fmt.Sprint("cut", i),
			Seal: func(context.Context, []agent.HostResult, []cut.ChannelLoss, coordinator.Drained) error { return nil },
		})
		if err != nil {
			return Coordination{}, fmt.Errorf("coordinate %d hosts: %w", hosts, err)
		}
		took = append(took, time.Since(began))
	}
	return Coordination{Hosts: hosts, Took: median(took)}, nil
}

// simulatedHost answers every order as an agent does, and does nothing.
type simulatedHost struct {
	name   string
	nodes  []string
	counts []cut.ChannelCount
}

func (h *simulatedHost) Handle(o agent.Order, report func(cut.Event)) {
	var answers []cut.Event
	switch e := o.Effect.(type) {
	case cut.SendPrepare:
		answers = append(answers, cut.Prepared{Cut: e.Cut, Host: h.name})
	case cut.SendCut:
		for _, n := range e.Nodes {
			answers = append(answers, cut.NodeCut{Cut: e.Cut, Node: n}, cut.Stored{Cut: e.Cut, Node: n})
		}
	case cut.SendPoll:
		answers = append(answers, cut.Counters{Cut: e.Cut, Host: h.name, Round: e.Round, Counts: h.counts})
	case cut.SendCollect:
		answers = append(answers, cut.Collected{Cut: e.Cut, Host: h.name})
	case cut.SendCommit:
		answers = append(answers, cut.Committed{Cut: e.Cut, Host: h.name})
	case cut.SendAbort:
		answers = append(answers, cut.Aborted{Cut: e.Cut, Host: h.name})
	}
	time.AfterFunc(answerAfter, func() {
		for _, ev := range answers {
			report(ev)
		}
	})
}

func (h *simulatedHost) Results(string, string) (agent.HostResult, error) {
	return agent.HostResult{Host: h.name}, nil
}

func (h *simulatedHost) Now(context.Context) (time.Time, error) { return time.Now(), nil }
