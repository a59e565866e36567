package remote

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
	"violin/internal/agent"
	"violin/internal/gateway"
)

func encodeForward(f gateway.Forward) *violinv1.GatewayForward {
	return &violinv1.GatewayForward{Protocol: f.Protocol, Listen: f.Listen.String(), Yield: f.Yield, To: f.To.String()}
}

func encodeForwards(forwards []gateway.Forward) (all []*violinv1.GatewayForward) {
	for _, f := range forwards {
		all = append(all, encodeForward(f))
	}
	return all
}

func decodeForward(m *violinv1.GatewayForward) (f gateway.Forward, err error) {
	f.Protocol, f.Yield = m.GetProtocol(), m.GetYield()
	if f.Listen, err = netip.ParseAddrPort(m.GetListen()); err == nil {
		f.To, err = netip.ParseAddrPort(m.GetTo())
	}
	if err != nil {
		return f, fmt.Errorf("a forward: %w", err)
	}
	return f, nil
}

func decodeForwards(all []*violinv1.GatewayForward) (forwards []gateway.Forward, err error) {
	for _, m := range all {
		f, err := decodeForward(m)
		if err != nil {
			return nil, err
		}
		forwards = append(forwards, f)
	}
	return forwards, nil
}

// Forwards tells how the slice's forwards on the host are.
func (a *Agent) Forwards(ctx context.Context, _ string) (all []agent.Listening, err error) {
	err = a.call(ctx, func(ctx context.Context, c violinv1connect.AgentServiceClient) error {
		r, err := c.ListForwards(ctx, &violinv1.ListForwardsRequest{Run: a.run})
		if err != nil {
			return err
		}
		for _, m := range r.GetForwards() {
			var l agent.Listening
			if l.Network, err = number(m.GetNetwork()); err != nil {
				return err
			}
			if l.Forward, err = decodeForward(m.GetForward()); err != nil {
				return err
			}
			if m.GetAt() != "" {
				if l.At, err = netip.ParseAddrPort(m.GetAt()); err != nil {
					return err
				}
			}
			l.Problem = m.GetProblem()
			all = append(all, l)
		}
		return nil
	})
	return all, err
}

// ListForwards implements the agents' protocol.
func (h *Host) ListForwards(ctx context.Context, req *violinv1.ListForwardsRequest) (*violinv1.ListForwardsResponse, error) {
	r, err := h.running(req.GetRun())
	if err != nil {
		return nil, err
	}
	all, err := r.agent.Forwards(ctx, r.slice)
	if err != nil {
		return nil, err
	}
	resp := &violinv1.ListForwardsResponse{}
	for _, l := range all {
		m := &violinv1.ListeningForward{Network: uint32(l.Network), Forward: encodeForward(l.Forward), Problem: l.Problem}
		if l.At.IsValid() {
			m.At = l.At.String()
		}
		resp.Forwards = append(resp.Forwards, m)
	}
	return resp, nil
}

// Probe tells for each forward why it could not listen on a host now; nil if it could.
func (h *Hub) Probe(ctx context.Context, name string, forwards []gateway.Forward) ([]error, error) {
	client, err := h.host(name).now()
	if err != nil {
		return nil, err
	}
	r, err := client.ProbeForwards(ctx, &violinv1.ProbeForwardsRequest{Forwards: encodeForwards(forwards)})
	if err != nil {
		return nil, fmt.Errorf("host %s: %w", name, said(err))
	}
	if len(r.GetProblems()) != len(forwards) {
		return nil, fmt.Errorf("host %s: it was asked about %d ports and answers about %d", name, len(forwards), len(r.GetProblems()))
	}
	problems := make([]error, len(forwards))
	for i, p := range r.GetProblems() {
		if p != "" {
			problems[i] = errors.New(p)
		}
	}
	return problems, nil
}

// ProbeForwards implements the agents' protocol.
func (h *Host) ProbeForwards(_ context.Context, req *violinv1.ProbeForwardsRequest) (*violinv1.ProbeForwardsResponse, error) {
	forwards, err := decodeForwards(req.GetForwards())
	if err != nil {
		return nil, refuse("%w", err)
	}
	resp := &violinv1.ProbeForwardsResponse{}
	for _, p := range gateway.Probe(forwards) {
		text := ""
		if p != nil {
			text = p.Error()
		}
		resp.Problems = append(resp.Problems, text)
	}
	return resp, nil
}
