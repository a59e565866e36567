package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"violin/internal/access"
	"violin/internal/daemon"
	"violin/internal/metadata"
	"violin/internal/server"
	"violin/internal/trust"
)

func (a *app) serverCommand() *cobra.Command {
	var idleExit time.Duration
	var listen string
	var level slog.Level
	var etcd metadata.Config
	cmd := &cobra.Command{
		Use:   "server",
		Short: "Run the server in the foreground",
		Long: `Run the server of this machine in the foreground, with its log on stderr. This is
seldom needed: 'violin up' and others start it in the background. It ends with
SIGTERM or Ctrl-C, and every slice ends with it, but for those on hosts that have joined:
with SIGTERM they run on, and the next server goes on with them. So it does after a
server that was killed.

The API is HTTP (Connect, gRPC, JSON) on the unix socket server.sock in the run
directory, for its user only:
  curl --unix-socket /run/violin/server.sock http://violin/violin.v1.SliceService/ListSlices \
       -H 'Content-Type: application/json' -d '{}'

With --listen, the agents of other machines are taken in, and users: the same API over
TLS, to those who have logged in. See 'violin agent --help' and 'violin login --help'.

With --etcd, metadata are in that cluster instead of in an etcd of the server's own, and
any number of servers stand by for the one that leads. They share the store (--store),
its key, and the images. A server that stands by hands agents and users on to the leader,
and takes its place when it is gone. See docs/metadata.md.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.tableOnly(cmd); err != nil {
				return err
			}
			if err := checkEtcd(cmd, &etcd, listen); err != nil {
				return &failure{code: exitUsage, err: err}
			}
			return a.serve(cmd.Context(), etcd, listen, idleExit, level)
		},
	}
	cmd.Flags().StringVar(&listen, "listen", "", "take agents of other machines, and users, in at this `address:port`")
	name, _ := os.Hostname()
	cmd.Flags().StringSliceVar(&etcd.Endpoints, "etcd", nil, "`URLs` of an etcd cluster's members, such as https://10.0.0.1:2379, with commas between")
	cmd.Flags().StringVar(&etcd.CA, "etcd-ca", "", "PEM `file` of whose certificates etcd's members have")
	cmd.Flags().StringVar(&etcd.Cert, "etcd-cert", "", "PEM `file` of this server's certificate for etcd")
	cmd.Flags().StringVar(&etcd.Key, "etcd-key", "", "PEM `file` of its key")
	cmd.Flags().StringVar(&etcd.Prefix, "etcd-prefix", metadata.DefaultPrefix, "what the `keys` in etcd begin with")
	cmd.Flags().StringVar(&etcd.Name, "name", name, "of this server, as a `name` among those that stand by for each other")
	cmd.Flags().StringVar(&etcd.Address, "advertise", "", "the `host:port` at which the other servers reach what --listen takes in")
	cmd.Flags().DurationVar(&idleExit, "idle-exit", 0, "end after this `time` with no slice and no call (0: never; a server started in the background has "+daemon.DefaultIdleExit.String()+")")
	cmd.Flags().TextVar(&level, "log-level", slog.LevelInfo, "log from this `level` on: debug, info, warn or error")
	return cmd
}

// checkEtcd refuses what does not go together.
func checkEtcd(cmd *cobra.Command, etcd *metadata.Config, listen string) error {
	if len(etcd.Endpoints) == 0 {
		for _, flag := range []string{"etcd-ca", "etcd-cert", "etcd-key", "etcd-prefix", "name", "advertise"} {
			if cmd.Flags().Changed(flag) {
				return fmt.Errorf("--%s goes with --etcd", flag)
			}
		}
		return nil
	}
	if (listen == "") != (etcd.Address == "") {
		return errors.New("--advertise HOST:PORT says where other servers reach what --listen takes in: give both or none")
	}
	if etcd.Address != "" {
		if err := checkAddress(etcd.Address); err != nil {
			return fmt.Errorf("--advertise: %w", err)
		}
	}
	return etcd.Check()
}

// service is what the daemon serves: the API in front of the server.
type service struct {
	http.Handler
	*server.Candidate
}

// ServeHTTP implements [http.Handler].
func (s service) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.Handler.ServeHTTP(w, r) }

func (a *app) serve(ctx context.Context, etcd metadata.Config, listen string, idleExit time.Duration, level slog.Level) error {
	ready := daemon.ReadyFile()
	if idleExit < 0 {
		return &failure{code: exitUsage, err: fmt.Errorf("--idle-exit %v: it cannot be negative", idleExit)}
	}
	dirs, err := a.dirs()
	if err != nil {
		return err
	}
	storage, err := a.storage.read()
	if err != nil {
		return err
	}
	logger := slog.New(slog.NewTextHandler(a.err, &slog.HandlerOptions{Level: level}))
	spare()
	raisePriority(logger)
	killed, err := killAt(os.Getenv("VIOLIN_TEST_KILL_AT"))
	if err != nil {
		return &failure{code: exitUsage, err: err}
	}
	var passed func(step string)
	if killed != nil {
		passed = func(step string) { killed("", step) }
	}
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, os.Interrupt)
	err = daemon.Serve(ctx, daemon.Config{
		Dirs:     dirs,
		IdleExit: idleExit,
		Ready:    ready,
		Version:  violinVersion(),
		Logger:   logger,
		Start: func(ctx context.Context) (daemon.Service, error) {
			s, err := server.Stand(ctx, server.Config{Etcd: etcd, StateDir: dirs.State, Storage: storage, RunDir: dirs.Run, Logger: logger, Version: violinVersion(), Listen: listen,
				Leave: func() bool { return len(interrupted) == 0 }, Passed: passed})
			if err != nil {
				return nil, err
			}
			// The socket is for its user only, who could do all of it without a server, too.
			return service{access.As(access.Caller{Role: trust.Operator}, s), s}, nil
		},
	})
	if err != nil {
		// The server's own end is no interruption of a call, whatever ended it.
		return &failure{code: exitFailure, err: err}
	}
	return nil
}

// serverNice is the niceness of the server, the switches and QEMU's own threads:
// before everything that computes (the vCPUs, above all), since a node stands
// still while they work on its cut.
const serverNice = -10

// spareProcessors is what the Go runtime is given beyond the machine's processors.
// A thread that takes a state in has a low priority; while the kernel lets it
// wait it still occupies one of the runtime's, and what a pause waits for must find
// another. So does one that writes to the disk, for a while.
const spareProcessors = 16

// spare gives the Go runtime its spare processors.
func spare() { runtime.GOMAXPROCS(runtime.NumCPU() + spareProcessors) }

// raisePriority does so for all threads there are; new ones inherit it. A kernel that
// groups the processes of a session for scheduling heeds niceness only within the
// session, so that of the session itself is raised too, if it is the server's own.
// Without the privilege, pauses are longer, and nothing else.
func raisePriority(log *slog.Logger) {
	if session, err := unix.Getsid(0); err == nil && session == os.Getpid() {
		if err := os.WriteFile("/proc/self/autogroup", []byte(strconv.Itoa(serverNice)), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
			log.Debug("the session's priority was not raised", "err", err)
		}
	}
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		log.Debug("the server's priority was not raised", "err", err)
		return
	}
	for _, t := range tasks {
		id, err := strconv.Atoi(t.Name())
		if err != nil {
			continue
		}
		if err := unix.Setpriority(unix.PRIO_PROCESS, id, serverNice); err != nil {
			log.Debug("the server's priority was not raised", "err", err)
			return
		}
	}
}
