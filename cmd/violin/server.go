package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"violin/api/violin/v1/violinv1connect"
	"violin/internal/daemon"
	"violin/internal/server"
)

// requestLimit bounds one message from a client: the largest are topologies and exec's input.
const requestLimit = 16 << 20

func (a *app) serverCommand() *cobra.Command {
	var idleExit time.Duration
	var listen string
	var level slog.Level
	cmd := &cobra.Command{
		Use:   "server",
		Short: "Run the server in the foreground",
		Long: `Run the server of this machine in the foreground, with its log on stderr. This is
seldom needed: 'violin up' and others start it in the background. It ends with
SIGTERM or Ctrl-C, and every slice ends with it.

The API is HTTP (Connect, gRPC, JSON) on the unix socket server.sock in the run
directory, for its user only:
  curl --unix-socket /run/violin/server.sock http://violin/violin.v1.SliceService/ListSlices \
       -H 'Content-Type: application/json' -d '{}'`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.tableOnly(cmd); err != nil {
				return err
			}
			return a.serve(cmd.Context(), listen, idleExit, level)
		},
	}
	cmd.Flags().StringVar(&listen, "listen", "", "take the agents of other machines in at this `address:port`; see 'violin agent --help'")
	cmd.Flags().DurationVar(&idleExit, "idle-exit", 0, "end after this `time` with no slice and no call (0: never; a server started in the background has "+daemon.DefaultIdleExit.String()+")")
	cmd.Flags().TextVar(&level, "log-level", slog.LevelInfo, "log from this `level` on: debug, info, warn or error")
	return cmd
}

// service is what the daemon serves: the API in front of the server.
type service struct {
	http.Handler
	*server.Server
}

func (a *app) serve(ctx context.Context, listen string, idleExit time.Duration, level slog.Level) error {
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
	runtime.GOMAXPROCS(runtime.NumCPU() + spareProcessors)
	raisePriority(logger)
	err = daemon.Serve(ctx, daemon.Config{
		Dirs:     dirs,
		IdleExit: idleExit,
		Ready:    ready,
		Version:  violinVersion(),
		Logger:   logger,
		Start: func(ctx context.Context) (daemon.Service, error) {
			s, err := server.New(ctx, server.Config{StateDir: dirs.State, Storage: storage, RunDir: dirs.Run, Logger: logger, Version: violinVersion(), Listen: listen})
			if err != nil {
				return nil, err
			}
			return service{Handler: apiHandler(s, logger), Server: s}, nil
		},
	})
	if err != nil {
		// The server's own end is no interruption of a call, whatever ended it.
		return &failure{code: exitFailure, err: err}
	}
	return nil
}

// api is all of the API.
type api interface {
	violinv1connect.SliceServiceHandler
	violinv1connect.StoreServiceHandler
	violinv1connect.HistoryServiceHandler
	violinv1connect.LifecycleServiceHandler
	violinv1connect.ImageServiceHandler
	violinv1connect.ProtectionServiceHandler
	violinv1connect.HostServiceHandler
}

// apiHandler serves the API over HTTP.
func apiHandler(s api, logger *slog.Logger) http.Handler {
	mux := http.NewServeMux()
	options := []connect.HandlerOption{
		connect.WithReadMaxBytes(requestLimit),
		// The socket is local: compressing costs more than it saves, below the size of a large listing.
		connect.WithCompressMinBytes(1 << 20),
		// One call's mistake must not end everybody's VMs.
		connect.WithRecover(func(ctx context.Context, spec connect.Spec, _ http.Header, r any) error {
			logger.ErrorContext(ctx, "panic in a call", "procedure", spec.Procedure, "panic", r, "stack", string(debug.Stack()))
			return connect.NewError(connect.CodeInternal, fmt.Errorf("the server's own mistake in %s: %v", spec.Procedure, r))
		}),
	}
	mux.Handle(violinv1connect.NewSliceServiceHandler(s, options...))
	mux.Handle(violinv1connect.NewStoreServiceHandler(s, options...))
	mux.Handle(violinv1connect.NewHistoryServiceHandler(s, options...))
	mux.Handle(violinv1connect.NewLifecycleServiceHandler(s, options...))
	mux.Handle(violinv1connect.NewHostServiceHandler(s, options...))
	mux.Handle(violinv1connect.NewImageServiceHandler(s, options...))
	mux.Handle(violinv1connect.NewProtectionServiceHandler(s, options...))
	return mux
}

// serverNice is the niceness of the server, the switches and QEMU's own threads:
// before everything that computes (the vCPUs, above all), since a node stands
// still while they work on its cut.
const serverNice = -10

// spareProcessors is what the Go runtime is given beyond the machine's processors.
// A thread that takes a state in has a low priority; while the kernel lets it
// wait it still occupies one of the runtime's, and what a pause waits for must find
// another.
const spareProcessors = 16

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
