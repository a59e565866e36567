package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	violinv1 "violin/api/violin/v1"
	"violin/internal/remote"
	"violin/internal/trust"
)

// agentOptions are the agent's flags.
type agentOptions struct {
	join, name, device, address string
	level                       slog.Level
}

func (a *app) agentCommand() *cobra.Command {
	var o agentOptions
	cmd := &cobra.Command{
		Use:   "agent --join TOKEN@SERVER:PORT --underlay DEVICE --underlay-address ADDRESS/BITS",
		Short: "Run nodes on this machine for a server on another",
		Long: `Run nodes on this machine for a server on another, in the foreground, with a log on
stderr. A slice whose topology names hosts that have joined a server runs on them.

The agent dials the server, so it may be behind NAT. The first time it needs a token,
which 'violin token create' makes on the server. It gets a certificate for it, which is
kept below the state directory, and from then on SERVER:PORT will do.

The underlay device joins the hosts: a network card, or a VPN's device, with all hosts
in one Ethernet. While a slice runs, the switch has it, and its addresses are off it: it
must not be what this machine is reached by. Images that nodes boot from must be in the
state directory, the same as on the server.

It ends with SIGTERM or Ctrl-C, and the nodes that it runs end with it.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.tableOnly(cmd); err != nil {
				return err
			}
			return a.agent(cmd.Context(), o)
		},
	}
	name, _ := os.Hostname()
	cmd.Flags().StringVar(&o.join, "join", os.Getenv("VIOLIN_JOIN"), "`server` to join, TOKEN@SERVER:PORT (env VIOLIN_JOIN, which others on this machine do not see)")
	cmd.Flags().StringVar(&o.name, "name", name, "`name` of this host in topologies")
	cmd.Flags().StringVar(&o.device, "underlay", "", "network `device` that joins the hosts")
	cmd.Flags().StringVar(&o.address, "underlay-address", "", "`address` of this host there, as 10.0.0.1/24")
	cmd.Flags().TextVar(&o.level, "log-level", slog.LevelInfo, "log from this `level` on: debug, info, warn or error")
	return cmd
}

func (a *app) agent(ctx context.Context, o agentOptions) error {
	usage := func(err error) error { return &failure{code: exitUsage, err: err} }
	token, address, err := parseJoin(o.join)
	if err != nil {
		return usage(err)
	}
	if o.device == "" {
		return usage(errors.New("--underlay is missing: the network device that joins the hosts"))
	}
	prefix, err := netip.ParsePrefix(o.address)
	if err != nil || !prefix.Addr().Is4() {
		return usage(fmt.Errorf("--underlay-address %q: it is an IPv4 address with the length of its network's prefix, as 10.0.0.1/24", o.address))
	}
	dirs, err := a.dirs()
	if err != nil {
		return err
	}
	identity, err := trust.OpenIdentity(filepath.Join(dirs.State, "host"), o.name)
	if err != nil {
		return usage(fmt.Errorf("--name: %w", err))
	}
	logger := slog.New(slog.NewTextHandler(a.err, &slog.HandlerOptions{Level: o.level}))
	runtime.GOMAXPROCS(runtime.NumCPU() + spareProcessors)
	raisePriority(logger)
	err = remote.ServeHost(ctx, remote.HostConfig{
		Server: address, Token: token, Identity: identity, Dir: dirs.Run, Images: filepath.Join(dirs.State, "images"),
		Device: o.device, Address: prefix, Version: violinVersion(), Logger: logger,
	})
	if err != nil {
		return &failure{code: exitFailure, err: err}
	}
	return nil
}

// parseJoin takes --join apart. The token is nil if there is none.
func parseJoin(s string) (*trust.Token, string, error) {
	address, token := s, (*trust.Token)(nil)
	if i := strings.LastIndexByte(s, '@'); i >= 0 {
		var err error
		if token, err = trust.ParseToken(s[:i]); err != nil {
			return nil, "", fmt.Errorf("--join: %w", err)
		}
		address = s[i+1:]
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil || host == "" || port == "" {
		return nil, "", fmt.Errorf("--join: %q is no SERVER:PORT; it takes TOKEN@SERVER:PORT, as 'violin token create' prints it", address)
	}
	return token, address, nil
}

func (a *app) tokenCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "token", Short: "Let machines join the server", Args: cobra.NoArgs}
	var ttl time.Duration
	var host string
	create := &cobra.Command{
		Use:   "create",
		Short: "Make a token that a machine joins with",
		Long: `Make a token that a machine joins with, and print it. It proves the server to the
machine as well as the machine to the server, and is good until it expires, also more
than once. Who has it can join under any name, and take the place of a host of that
name, unless it is bound to one.`,
		Example: `  violin token create --ttl 10m --host alpha
  violin agent --join TOKEN@SERVER:PORT --name alpha --underlay eth1 --underlay-address 10.0.0.1/24`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.findHosts(cmd.Context())
			if err != nil {
				return err
			}
			r, err := c.CreateToken(cmd.Context(), &violinv1.CreateTokenRequest{Ttl: durationpb.New(ttl), Host: host})
			if err != nil {
				return err
			}
			a.note("good until %s", a.formatTime(r.GetExpires()))
			return a.print(r, func(w io.Writer) { fmt.Fprintln(w, r.GetToken()) })
		},
	}
	create.Flags().DurationVar(&ttl, "ttl", time.Hour, "how long it is good for, as a `time` of up to 720h")
	create.Flags().StringVar(&host, "host", "", "the `name` that alone may join with it; any, if not given")
	cmd.AddCommand(create)
	return cmd
}

func (a *app) hostsCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "hosts",
		Short: "List the machines that have joined",
		Long:  `List the machines that have joined this server, and whether their agents are connected.`,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.findHosts(cmd.Context())
			if err != nil {
				return err
			}
			r, err := c.ListHosts(cmd.Context(), &violinv1.ListHostsRequest{})
			if err != nil {
				return err
			}
			return a.print(r, func(w io.Writer) {
				t := newTable("HOST", "STATE", "SINCE", "FROM", "UNDERLAY", "SLICE", "VERSION")
				for _, h := range r.GetHosts() {
					state := "away"
					if h.GetConnected() {
						state = "connected"
					}
					t.row(h.GetName(), state, a.formatTime(h.GetSince()), h.GetAddress(), h.GetUnderlay(), h.GetSlice(), h.GetVersion())
				}
				t.write(w)
			})
		},
	}
}
