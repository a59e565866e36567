package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
	"violin/internal/remote"
	"violin/internal/topology"
	"violin/internal/trust"
)

// agentOptions are the agent's flags.
type agentOptions struct {
	join, name, device, address, site string
	level                             slog.Level
}

func (a *app) agentCommand() *cobra.Command {
	var o agentOptions
	cmd := &cobra.Command{
		Use:   "agent --join TOKEN@SERVER:PORT[,SERVER:PORT...] --underlay DEVICE --underlay-address ADDRESS/BITS",
		Short: "Run nodes on this machine for a server on another",
		Long: `Run nodes on this machine for a server on another, in the foreground, with a log on
stderr. A slice whose topology names hosts that have joined a server runs on them.

The agent dials the server, so it may be behind NAT. The first time it needs a token,
which 'violin token create' makes on the server. It gets a certificate for it, which is
kept below the state directory, and from then on SERVER:PORT will do. Where servers stand
by for each other, all of them are named: the agent goes to the next when one is gone.

The underlay device joins the hosts: a network card, or a VPN's device, with all hosts
in one Ethernet. While a slice runs, the switch has it, and its addresses are off it: it
must not be what this machine is reached by. Images that nodes boot from must be in the
state directory, the same as on the server.

What it runs outlives it: an agent that ends with SIGTERM, or is killed, leaves nodes and
networks running, and the next that is started with the same --run-dir takes them over,
also in the middle of a snapshot, which is then given up. With Ctrl-C the nodes end with
it. A service manager must not kill the agent's children: for systemd, KillMode=process.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.tableOnly(cmd); err != nil {
				return err
			}
			return a.agent(cmd.Context(), o)
		},
	}
	name, _ := os.Hostname()
	cmd.Flags().StringVar(&o.join, "join", os.Getenv("VIOLIN_JOIN"), "`server` to join, TOKEN@SERVER:PORT[,SERVER:PORT...] (env VIOLIN_JOIN, which others on this machine do not see)")
	cmd.Flags().StringVar(&o.name, "name", name, "`name` of this host in topologies")
	cmd.Flags().StringVar(&o.device, "underlay", "", "network `device` that joins the hosts")
	cmd.Flags().StringVar(&o.address, "underlay-address", "", "`address` of this host there, as 10.0.0.1/24")
	cmd.Flags().StringVar(&o.site, "site", "", "`name` of the site that this host is in, for slices whose topologies don't name the host; one of its own, if not given")
	cmd.Flags().TextVar(&o.level, "log-level", slog.LevelInfo, "log from this `level` on: debug, info, warn or error")
	return cmd
}

func (a *app) agent(ctx context.Context, o agentOptions) error {
	usage := func(err error) error { return &failure{code: exitUsage, err: err} }
	token, addresses, err := parseJoin(o.join)
	if err != nil {
		return usage(fmt.Errorf("--join: %w", err))
	}
	if o.device == "" {
		return usage(errors.New("--underlay is missing: the network device that joins the hosts"))
	}
	prefix, err := netip.ParsePrefix(o.address)
	if err != nil || !prefix.Addr().Is4() {
		return usage(fmt.Errorf("--underlay-address %q: it is an IPv4 address with the length of its network's prefix, as 10.0.0.1/24", o.address))
	}
	if o.site != "" && !topology.IsName(o.site) {
		return usage(fmt.Errorf("--site %q: no site can have this name; use a-z, 0-9 and '-'", o.site))
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
	spare()
	raisePriority(logger)
	program, err := os.Executable()
	if err != nil {
		return &failure{code: exitFailure, err: err}
	}
	passed, err := killAt(os.Getenv("VIOLIN_TEST_KILL_AT"))
	if err != nil {
		return usage(err)
	}
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, os.Interrupt)
	err = remote.ServeHost(ctx, remote.HostConfig{
		Keeper: []string{program, "keep"}, Passed: passed, Leave: func() bool { return len(interrupted) == 0 },
		Servers: strings.Split(addresses, ","), Token: token, Identity: identity, Dir: dirs.Run, Images: filepath.Join(dirs.State, "images"), Files: filepath.Join(dirs.State, "files"),
		Device: o.device, Address: prefix, Site: o.site, Version: violinVersion(), Logger: logger,
	})
	if err != nil {
		return &failure{code: exitFailure, err: err}
	}
	return nil
}

// killAt makes this process kill itself once it has done a step of a cut: for tests, by
// the environment's VIOLIN_TEST_KILL_AT=STEP or NODE/STEP.
func killAt(where string) (func(node, step string), error) {
	if where == "" {
		return nil, nil
	}
	node, step, of := strings.Cut(where, "/")
	if !of {
		node, step = "", where
	}
	if step == "" {
		return nil, fmt.Errorf("VIOLIN_TEST_KILL_AT=%q: it takes STEP or NODE/STEP", where)
	}
	return func(n, s string) {
		if s == step && (n == node || !of) {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {} // until it strikes
		}
	}, nil
}

// parseJoin takes TOKEN@SERVER:PORT,... apart; the addresses are separated by commas, as
// they came. The token is nil if there is none.
func parseJoin(s string) (token *trust.Token, addresses string, err error) {
	address, token := s, (*trust.Token)(nil)
	if i := strings.LastIndexByte(s, '@'); i >= 0 {
		var err error
		if token, err = trust.ParseToken(s[:i]); err != nil {
			return nil, "", err
		}
		address = s[i+1:]
	}
	if checkAddresses(address) != nil {
		return nil, "", fmt.Errorf("%q is no SERVER:PORT; it takes TOKEN@SERVER:PORT, or several addresses with commas between", address)
	}
	return token, address, nil
}

func (a *app) tokenCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "token", Short: "Let machines join the server, and users log in", Args: cobra.NoArgs}
	var ttl time.Duration
	var host, user, role string
	create := &cobra.Command{
		Use:   "create",
		Short: "Make a token that a machine joins or a user logs in with",
		Long: `Make a token that a machine joins or a user logs in with, and print it. It proves the
server to them as well as them to the server, and is good until it expires, also more
than once.

Without --user it is for a machine: who has it can join under any name, and take the
place of a host of that name, unless it is bound to one.

With --user it is for a person or a program, to log in from elsewhere. An operator may
do everything. An experimenter sees and does what concerns slices of their own: nothing
shows of others' but that a name is taken. Experimenters' nodes boot from images; what
concerns the server as a whole (hosts, tokens, users, images, the store's upkeep, import,
overcommitment) takes an operator.`,
		Example: `  violin token create --ttl 10m --host alpha
  violin agent --join TOKEN@SERVER:PORT --name alpha --underlay eth1 --underlay-address 10.0.0.1/24
  violin token create --ttl 24h --user alice --role experimenter
  violin login TOKEN@SERVER:PORT`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			request := &violinv1.CreateTokenRequest{Ttl: durationpb.New(ttl), Host: host, User: user}
			switch {
			case user == "" && cmd.Flags().Changed("role"):
				return &failure{code: exitUsage, err: errors.New("--role goes with --user")}
			case user != "" && host != "":
				return &failure{code: exitUsage, err: errors.New("--host and --user: a token is for a host or for a user")}
			case user != "":
				if err := trust.CheckRole(trust.Role(role)); err != nil {
					return &failure{code: exitUsage, err: fmt.Errorf("--role: %w", err)}
				}
				request.Role = roleOf(role)
			}
			c, err := find(cmd.Context(), a, violinv1connect.NewHostServiceClient)
			if err != nil {
				return err
			}
			r, err := c.CreateToken(cmd.Context(), request)
			if err != nil {
				return err
			}
			a.note("good until %s", a.formatTime(r.GetExpires()))
			return a.print(r, func(w io.Writer) { fmt.Fprintln(w, r.GetToken()) })
		},
	}
	create.Flags().DurationVar(&ttl, "ttl", time.Hour, "how long it is good for, as a `time` of up to 720h")
	create.Flags().StringVar(&host, "host", "", "the `name` that alone may join with it; any, if not given")
	create.Flags().StringVar(&user, "user", "", "the `name` of the user who logs in with it")
	create.Flags().StringVar(&role, "role", string(trust.Experimenter), "of the user: `role` experimenter or operator")
	_ = create.RegisterFlagCompletionFunc("role", cobra.FixedCompletions([]string{string(trust.Experimenter), string(trust.Operator)}, cobra.ShellCompDirectiveNoFileComp))
	cmd.AddCommand(create)
	return cmd
}

func (a *app) hostsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "hosts",
		Short: "List the machines that have joined",
		Long:  `List the machines that have joined this server, and whether their agents are connected.`,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := find(cmd.Context(), a, violinv1connect.NewHostServiceClient)
			if err != nil {
				return err
			}
			r, err := c.ListHosts(cmd.Context(), &violinv1.ListHostsRequest{})
			if err != nil {
				return err
			}
			return a.print(r, func(w io.Writer) {
				t := newTable("HOST", "SITE", "STATE", "SINCE", "FROM", "UNDERLAY", "SLICES", "VERSION")
				for _, h := range r.GetHosts() {
					state := "away"
					if h.GetConnected() {
						state = "connected"
					}
					if h.GetCordoned() {
						state += ", cordoned"
					}
					t.row(h.GetName(), h.GetSite(), state, a.formatTime(h.GetSince()), h.GetAddress(), h.GetUnderlay(), strings.Join(h.GetSlices(), " "), h.GetVersion())
				}
				t.write(w)
			})
		},
	}
	cmd.AddCommand(a.hostsRemoveCommand(), a.cordonCommand(true), a.cordonCommand(false))
	return cmd
}

func (a *app) hostsRemoveCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "rm HOST",
		Short: "Put a machine out",
		Long: `Put a machine out, at once: its connection is cut, and its certificate and tokens that
were made before are good for it no more. One that a slice runs on is refused (exit
status 5), unless --force is given: the slice loses the host then.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := find(cmd.Context(), a, violinv1connect.NewHostServiceClient)
			if err != nil {
				return err
			}
			r, err := c.RemoveHost(cmd.Context(), &violinv1.RemoveHostRequest{Name: args[0], Force: force})
			if err != nil {
				return err
			}
			return a.print(r, func(w io.Writer) { fmt.Fprintf(w, "%s put out\n", args[0]) })
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "although a slice runs there")
	return cmd
}
