package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	violinv1 "violin/api/violin/v1"
	"violin/internal/agent"
	"violin/internal/coloring"
	"violin/internal/coordinator"
	"violin/internal/fabric"
	"violin/internal/frames"
	stream "violin/internal/migration/qemu"
	"violin/internal/qga"
	"violin/internal/remote"
	"violin/internal/topology"
	"violin/internal/trust"
)

// hostAgent is a host's agent: in this process, or on a machine that has joined.
type hostAgent interface {
	coordinator.Host
	AddPeer(ctx context.Context, slice string, peer fabric.Peer) error
	SetRemotes(ctx context.Context, slice string, remotes []coloring.Remote) error
	AddGateway(ctx context.Context, spec agent.GatewaySpec) error
	AddNode(ctx context.Context, spec agent.NodeSpec, incoming bool) error
	LoadNode(ctx context.Context, slice, name string, skeleton *stream.Skeleton, pages stream.PageSource) error
	LoadNodeLazily(ctx context.Context, slice, name string, skeleton *stream.Skeleton, lazy agent.Lazy) error
	FollowNode(slice, name string) error
	AwaitMemory(ctx context.Context, slice, name string, waiting func()) error
	RunNode(ctx context.Context, slice, name string, channel []frames.Frame, receivers []frames.Receiver) (time.Time, error)
	ContinueNode(ctx context.Context, slice, name string) error
	SetClock(ctx context.Context, slice, name string) error
	Status(ctx context.Context, slice, name string) (agent.NodeStatus, error)
	Exec(ctx context.Context, slice, name string, command []string, stdin []byte) (qga.Result, error)
	Console(ctx context.Context, slice, name string) (net.Conn, error)
	ConsoleLog(ctx context.Context, slice, name string, w agent.LogWish) (io.ReadCloser, error)
	MarkOutput(ctx context.Context, slice string) ([]uint64, error)
	ReleaseOutput(ctx context.Context, slice string, marks []uint64) error
	Forwards(ctx context.Context, slice string) ([]agent.Listening, error)
	Gone(slice, name string) (<-chan struct{}, error)
	SwitchGone() <-chan struct{}
	io.Closer
}

var (
	_ hostAgent = (*agent.Agent)(nil)
	_ hostAgent = (*remote.Agent)(nil)
)

// placed tells whether a slice runs on hosts that have joined; else it runs in a lab.
func (s *Server) placed(topo *topology.Topology) (bool, error) {
	if s.hub == nil {
		return false, nil
	}
	joined, err := s.hub.Place(hostsOf(topo))
	if err != nil {
		return false, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("slice %q: %w", topo.Slice, err))
	}
	return joined, nil
}

// hostsOf are the hosts that a slice has nodes on, by name.
func hostsOf(topo *topology.Topology) []string {
	hosts := map[string]bool{}
	for _, n := range topo.Nodes {
		hosts[n.Host] = true
	}
	return slices.Sorted(maps.Keys(hosts))
}

// joinedMachine is what a host that has joined is called where there must be room.
func joinedMachine(host string) string { return "host " + host }

// CreateToken implements the API.
func (s *Server) CreateToken(_ context.Context, req *violinv1.CreateTokenRequest) (*violinv1.CreateTokenResponse, error) {
	if s.hub == nil {
		return nil, notListening()
	}
	var t *trust.Token
	var err error
	switch ttl := req.GetTtl().AsDuration(); {
	case req.GetUser() == "" && req.GetRole() == violinv1.Role_ROLE_UNSPECIFIED:
		t, err = s.authority.NewToken(req.GetHost(), ttl)
	case req.GetHost() != "":
		err = errors.New("a token is for a host or for a user, not for both")
	default:
		t, err = s.authority.NewUserToken(trust.User{Name: req.GetUser(), Role: roles[req.GetRole()]}, ttl)
	}
	if err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	return &violinv1.CreateTokenResponse{Token: t.String(), Expires: timestamppb.New(t.Expires)}, nil
}

func notListening() error {
	return connect.NewError(connect.CodeFailedPrecondition, errors.New("this server takes no hosts and no users in; end it, and start `violin server --listen ADDRESS:PORT`"))
}

// ListHosts implements the API.
func (s *Server) ListHosts(context.Context, *violinv1.ListHostsRequest) (*violinv1.ListHostsResponse, error) {
	if s.hub == nil {
		return nil, notListening()
	}
	hosts, err := s.hub.Hosts()
	if err != nil {
		return nil, apiError(err)
	}
	r := &violinv1.ListHostsResponse{}
	for _, h := range hosts {
		m := &violinv1.Host{Name: h.Name, Address: h.Address, Connected: h.Connected, Since: timestamp(h.Since), Slices: h.Slices, Version: h.Machine.Version}
		m.Cordoned, m.Site = !s.cordonedSince(h.Name).IsZero(), h.Machine.Site
		if h.Machine.Underlay.Addr.IsValid() {
			m.Underlay = h.Machine.Underlay.Addr.String()
		}
		r.Hosts = append(r.Hosts, m)
	}
	return r, nil
}
