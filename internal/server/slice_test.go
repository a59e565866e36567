package server

import (
	"context"
	"errors"
	"testing"
	"time"

	violinv1 "violin/api/violin/v1"
	"violin/internal/agent"
	"violin/internal/topology"
)

// sayingAgent says one thing of every node, or nothing while the question stands.
type sayingAgent struct {
	hostAgent
	status agent.NodeStatus
	err    error
	mute   bool
}

func (a sayingAgent) Status(ctx context.Context, _, _ string) (agent.NodeStatus, error) {
	if a.mute {
		<-ctx.Done()
	}
	return a.status, a.err
}

func TestNodeStates(t *testing.T) {
	late := errors.New("monitor: context deadline exceeded")
	for _, c := range []struct {
		name  string
		agent sayingAgent
		want  violinv1.NodeState
	}{
		{"running", sayingAgent{status: agent.NodeStatus{PID: 7, Status: "running"}}, violinv1.NodeState_NODE_STATE_RUNNING},
		{"paused", sayingAgent{status: agent.NodeStatus{PID: 7, Status: "paused"}}, violinv1.NodeState_NODE_STATE_PAUSED},
		{"ended", sayingAgent{status: agent.NodeStatus{Problem: "killed"}}, violinv1.NodeState_NODE_STATE_DEAD},
		{"its monitor is broken", sayingAgent{status: agent.NodeStatus{PID: 7, Problem: "closed"}}, violinv1.NodeState_NODE_STATE_DEAD},
		{"unknown to its agent", sayingAgent{err: errors.New("no such node")}, violinv1.NodeState_NODE_STATE_DEAD},
		{"busy", sayingAgent{status: agent.NodeStatus{PID: 7, Problem: late.Error()}, mute: true}, violinv1.NodeState_NODE_STATE_SILENT},
		{"on a busy host", sayingAgent{err: late, mute: true}, violinv1.NodeState_NODE_STATE_SILENT},
		{"late, and ended", sayingAgent{status: agent.NodeStatus{Problem: "killed"}, mute: true}, violinv1.NodeState_NODE_STATE_DEAD},
	} {
		t.Run(c.name, func(t *testing.T) {
			sl := &slice{topo: &topology.Topology{Slice: "pair"}, agents: map[string]hostAgent{"here": c.agent}}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			if c.agent.mute {
				ctx, cancel = context.WithTimeout(t.Context(), time.Millisecond)
			}
			defer cancel()
			var node violinv1.Node
			sl.setState(ctx, &topology.Node{Name: "left", Host: "here"}, &node)
			if node.State != c.want || node.Pid != int64(c.agent.status.PID) {
				t.Errorf("%v of %d (%s), want %v", node.State, node.Pid, node.Detail, c.want)
			}
		})
	}
}
