package server

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
	"violin/internal/access"
	"violin/internal/remote"
	"violin/internal/trust"
)

var _ violinv1connect.UserServiceHandler = (*Server)(nil)

var roles = map[violinv1.Role]trust.Role{
	violinv1.Role_ROLE_OPERATOR: trust.Operator, violinv1.Role_ROLE_EXPERIMENTER: trust.Experimenter,
}

func userMessage(u trust.User) *violinv1.User {
	m := &violinv1.User{Name: u.Name}
	for role, r := range roles {
		if r == u.Role {
			m.Role = role
		}
	}
	return m
}

// Login implements the API.
func (s *Server) Login(_ context.Context, req *violinv1.LoginRequest) (*violinv1.LoginResponse, error) {
	if s.authority == nil {
		return nil, notListening()
	}
	user, der, err := s.authority.AdmitUser(req.GetToken(), req.GetRequest())
	if err != nil {
		s.log.Warn("a user did not log in", "err", err)
		return nil, connect.NewError(connect.CodePermissionDenied, err)
	}
	s.log.Info("a user has logged in", "user", user.Name, "role", string(user.Role))
	return &violinv1.LoginResponse{User: userMessage(user), Certificate: der, Authority: s.authority.Certificate()}, nil
}

// Renew implements the API.
func (s *Server) Renew(ctx context.Context, req *violinv1.RenewRequest) (*violinv1.RenewResponse, error) {
	cert := access.Certificate(ctx)
	if cert == nil {
		return nil, noCertificate()
	}
	der, err := s.authority.RenewUser(cert, req.GetRequest())
	if err != nil {
		return nil, connect.NewError(connect.CodePermissionDenied, err)
	}
	return &violinv1.RenewResponse{Certificate: der}, nil
}

func noCertificate() error {
	return connect.NewError(connect.CodeFailedPrecondition, errors.New("there is no certificate: the call came by the server's unix socket"))
}

// Logout implements the API.
func (s *Server) Logout(ctx context.Context, _ *violinv1.LogoutRequest) (*violinv1.LogoutResponse, error) {
	cert := access.Certificate(ctx)
	if cert == nil {
		return nil, noCertificate()
	}
	if err := s.authority.Revoke(cert); err != nil {
		return nil, apiError(err)
	}
	s.log.Info("a user has logged out", "user", access.From(ctx).Name)
	return &violinv1.LogoutResponse{}, nil
}

// WhoAmI implements the API.
func (s *Server) WhoAmI(ctx context.Context, _ *violinv1.WhoAmIRequest) (*violinv1.WhoAmIResponse, error) {
	c := access.From(ctx)
	resp := &violinv1.WhoAmIResponse{User: userMessage(trust.User{Name: c.Name, Role: c.Role})}
	if cert := access.Certificate(ctx); cert != nil {
		resp.Expires = timestamppb.New(cert.NotAfter)
	}
	return resp, nil
}

// ListUsers implements the API.
func (s *Server) ListUsers(context.Context, *violinv1.ListUsersRequest) (*violinv1.ListUsersResponse, error) {
	if s.authority == nil {
		return nil, notListening()
	}
	all, err := s.authority.Users()
	if err != nil {
		return nil, apiError(err)
	}
	owned := map[string][]string{}
	s.mu.Lock()
	for _, name := range slices.Sorted(maps.Keys(s.records)) {
		owner := s.records[name].Owner
		owned[owner] = append(owned[owner], name)
	}
	s.mu.Unlock()
	open := s.door.Connections()
	resp := &violinv1.ListUsersResponse{}
	for _, u := range all {
		resp.Users = append(resp.Users, &violinv1.UserInfo{
			User: userMessage(u.User), Certificates: uint32(u.Certificates), Expires: timestamp(u.Expires),
			Slices: owned[u.Name], Connections: uint32(open[u.Name]),
		})
	}
	return resp, nil
}

// user is one who has logged in.
func (s *Server) user(name string) (trust.UserInfo, error) {
	if s.authority == nil {
		return trust.UserInfo{}, notListening()
	}
	all, err := s.authority.Users()
	if err != nil {
		return trust.UserInfo{}, apiError(err)
	}
	i := slices.IndexFunc(all, func(u trust.UserInfo) bool { return u.Name == name })
	if i < 0 {
		return trust.UserInfo{}, connect.NewError(connect.CodeNotFound, fmt.Errorf("no user %q has logged in to this server", name))
	}
	return all[i], nil
}

// RemoveUser implements the API.
func (s *Server) RemoveUser(_ context.Context, req *violinv1.RemoveUserRequest) (*violinv1.RemoveUserResponse, error) {
	if _, err := s.user(req.GetName()); err != nil {
		return nil, err
	}
	if _, err := s.authority.RemoveUser(req.GetName()); err != nil {
		return nil, apiError(err)
	}
	s.door.Cut(req.GetName())
	s.log.Info("a user was removed", "user", req.GetName())
	return &violinv1.RemoveUserResponse{}, nil
}

// RemoveHost implements the API.
func (s *Server) RemoveHost(ctx context.Context, req *violinv1.RemoveHostRequest) (*violinv1.RemoveHostResponse, error) {
	if s.hub == nil {
		return nil, notListening()
	}
	if err := trust.CheckName(req.GetName()); err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	found, err := s.hub.Remove(req.GetName(), req.GetForce())
	var runs *remote.RunsThereError
	switch {
	case errors.As(err, &runs):
		return nil, connect.NewError(connect.CodeFailedPrecondition, err)
	case err != nil:
		return nil, apiError(err)
	case !found:
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("no host %q has joined this server", req.GetName()))
	}
	if err := s.cordon(ctx, req.GetName(), false); err != nil {
		s.log.Error("a host that was put out stays cordoned", "host", req.GetName(), "err", err)
	}
	return &violinv1.RemoveHostResponse{}, nil
}
