package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
	"violin/internal/trust"
)

func (a *app) loginCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "login TOKEN@SERVER:PORT[,SERVER:PORT...]",
		Short: "Get access to a server on another machine",
		Long: `Get access to a server on another machine: for a token that an operator has made by
'violin token create --user NAME', the server gives a certificate. The token tells by
what the server is known, so it is given to no other. Other users of this machine may
see a command line: with '-' the argument is read from stdin.

From then on commands speak to that server, until 'violin logout' or a login to another.
--server, or VIOLIN_SERVER, says otherwise; 'local' is the server of this machine. Of
servers that stand by for each other all are named, with commas between, in the login and
in --server: the first that can be reached is spoken to.

The certificate and its key are kept below violin/servers in the user's configuration
directory ($XDG_CONFIG_HOME, or ~/.config). It is good for 90 days and renewed by being
used.`,
		Example: `  violin login violin2-...@office:7000
  violin ps
  violin --server lab:7000 ps`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return a.login(cmd.Context(), args[0]) },
	}
}

func (a *app) login(ctx context.Context, to string) error {
	if to == "-" {
		line, err := bufio.NewReader(io.LimitReader(a.in, 4096)).ReadString('\n')
		if err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("read the token: %w", err)
		}
		to = strings.TrimSpace(line)
	}
	token, address, err := parseJoin(to)
	switch {
	case err != nil:
		return &failure{code: exitUsage, err: fmt.Errorf("login: %w", err)}
	case token == nil:
		return &failure{code: exitUsage, err: errors.New("login takes TOKEN@SERVER:PORT, with a token that an operator of the server makes by 'violin token create --user NAME'")}
	}
	logins, err := a.logins()
	if err != nil {
		return err
	}
	client := httpsClient(trust.LoginConfig(token), address)
	defer client.CloseIdleConnections()
	users := violinv1connect.NewUserServiceClient(client, baseURL(address))
	login, err := logins.Login(ctx, address, token, func(ctx context.Context, request []byte) (cert, authority []byte, err error) {
		r, err := users.Login(ctx, &violinv1.LoginRequest{Token: token.String(), Request: request})
		if err != nil {
			return nil, nil, a.explainDial(address, err)
		}
		return r.GetCertificate(), r.GetAuthority(), nil
	})
	if err != nil {
		if errors.Is(err, trust.ErrToken) {
			return &failure{code: exitUsage, err: err}
		}
		return err
	}
	me := &violinv1.WhoAmIResponse{
		User: &violinv1.User{Name: login.User.Name, Role: roleOf(string(login.User.Role))}, Expires: timestamppb.New(login.Certificate().NotAfter),
	}
	return a.print(me, func(w io.Writer) {
		fmt.Fprintf(w, "logged in to %s as %s, %s, until %s\n", address, login.User.Name, login.User.Role, a.formatTime(me.GetExpires()))
	})
}

func roleOf(name string) violinv1.Role {
	return violinv1.Role(violinv1.Role_value["ROLE_"+strings.ToUpper(name)])
}

func roleName(r violinv1.Role) string {
	return strings.ToLower(strings.TrimPrefix(r.String(), "ROLE_"))
}

func (a *app) logoutCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "logout",
		Short: "Give access to a server up",
		Long: `Give access to a server up: the one that --server or VIOLIN_SERVER names, or else that of
the last login. The server takes the certificate no more, and it is removed here.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.tableOnly(cmd); err != nil {
				return err
			}
			return a.logout(cmd.Context())
		},
	}
}

func (a *app) logout(ctx context.Context) error {
	address, err := a.remote()
	if err != nil {
		return err
	}
	if address == "" {
		a.note("not logged in to any server")
		return nil
	}
	logins, err := a.logins()
	if err != nil {
		return err
	}
	login, err := logins.Open(address)
	if err != nil {
		return &failure{code: exitDenied, err: err}
	}
	a.quiet = true // about versions and renewal
	_, err = a.dialRemote(ctx)
	if err == nil {
		_, err = violinv1connect.NewUserServiceClient(a.connection, a.base).Logout(ctx, &violinv1.LogoutRequest{})
	}
	if ferr := logins.Forget(address); ferr != nil {
		return ferr
	}
	// Of one that is worthless already, nobody need be told.
	if known := connect.CodeOf(err) != connect.CodeUnauthenticated && !login.Expired(); err != nil && known {
		return &failure{code: exitUnreachable, err: fmt.Errorf("the certificate is removed here, but the server was not told, and would take a copy of it until it expires: %w", err)}
	}
	_, err = fmt.Fprintf(a.out, "logged out of %s\n", address)
	return err
}

func (a *app) whoamiCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "whoami",
		Short: "Tell which server commands speak to, and as whom",
		Long: `Tell which server commands speak to, and who one is to it. Who may use the unix socket of
this machine's server is an operator without a name.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.whoami(cmd.Context()) },
	}
}

func (a *app) whoami(ctx context.Context) error {
	address, err := a.remote()
	if err != nil {
		return err
	}
	me := &violinv1.WhoAmIResponse{User: &violinv1.User{Role: violinv1.Role_ROLE_OPERATOR}}
	where := "the server of this machine"
	if address != "" {
		where = address
		if _, err := a.dialRemote(ctx); err != nil {
			return err
		}
		if me, err = violinv1connect.NewUserServiceClient(a.connection, a.base).WhoAmI(ctx, &violinv1.WhoAmIRequest{}); err != nil {
			return err
		}
	}
	return a.print(me, func(w io.Writer) {
		fmt.Fprintf(w, "%s on %s", roleName(me.GetUser().GetRole()), where)
		if me.GetUser().GetName() != "" {
			fmt.Fprintf(w, ", as %s, until %s", me.GetUser().GetName(), a.formatTime(me.GetExpires()))
		}
		fmt.Fprintln(w)
	})
}
