package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strconv"
	"time"
)

const (
	// DefaultIdleExit is how long a server that a command started stays when it has nothing to do.
	DefaultIdleExit = 5 * time.Second

	// handoverTimeout bounds the wait for a server that is leaving. It has VMs and
	// switches to end, so it may take a while.
	handoverTimeout = 30 * time.Second

	// drainTimeout bounds the wait for calls that are being served when the server
	// is told to stop. Their contexts have ended then; a call that ignores it is cut off.
	drainTimeout = 10 * time.Second
)

// Service is what a server serves.
type Service interface {
	http.Handler
	// Busy tells whether something lives in the service that no request is about: a
	// busy server does not leave. What makes a service busy must come by a request,
	// and be visible here before that request ends.
	Busy() bool
	// Close ends what lives in the service. No request is served any more.
	Close() error
}

// Config is what [Serve] needs.
type Config struct {
	Dirs Dirs
	// Start makes the service. It is called once the server's lock is held, so the
	// service has the directories to itself, and before anybody can reach it.
	Start func(context.Context) (Service, error)
	// IdleExit is how long the server stays with no request and no busy service; 0: for ever.
	IdleExit time.Duration
	// Ready is told, and closed, once the server answers; see [ReadyFile]. May be nil.
	Ready   *os.File
	Version string // told to whoever probes
	Logger  *slog.Logger
}

// Serve is the server process: it takes the lock, starts the service, listens on the
// socket and serves until ctx ends or there is nothing left to do; both are a nil
// error. Requests that still run when ctx ends see their contexts end.
func Serve(ctx context.Context, config Config) (err error) {
	if err := config.Dirs.create(); err != nil {
		return err
	}
	held, err := takeServerLock(ctx, config.Dirs)
	if err != nil {
		return err
	}
	defer held.Close()

	service, err := config.Start(ctx)
	if err != nil {
		return fmt.Errorf("start the service: %w", err)
	}
	defer func() {
		if closeErr := service.Close(); closeErr != nil {
			err = errors.Join(err, fmt.Errorf("close the service: %w", closeErr))
		}
	}()

	listener, err := listen(config.Dirs)
	if err != nil {
		return err
	}
	defer listener.Close()

	requests, cancelRequests := context.WithCancel(ctx)
	defer cancelRequests()
	active := newActivity()
	var protocols http.Protocols
	protocols.SetHTTP1(true) // curl without options
	protocols.SetUnencryptedHTTP2(true)
	httpServer := &http.Server{
		Handler:     handler(service, active, config),
		Protocols:   &protocols,
		BaseContext: func(net.Listener) context.Context { return requests },
		ErrorLog:    slog.NewLogLogger(config.Logger.Handler(), slog.LevelWarn),
		// No read or write timeouts: consoles and progress streams last as long as they last.
		ReadHeaderTimeout: 10 * time.Second,
	}
	served := make(chan error, 1)
	go func() { served <- httpServer.Serve(listener) }()

	config.Logger.Info("serving", "socket", config.Dirs.Socket(), "version", config.Version, "pid", os.Getpid(), "idle_exit", config.IdleExit)
	if config.Ready != nil {
		_, err := config.Ready.WriteString("ready\n")
		if err = errors.Join(err, config.Ready.Close()); err != nil {
			// Whoever started us has gone; that is no reason not to serve others.
			config.Logger.Warn("tell that the server is ready", "err", err)
		}
	}

	idle := make(chan struct{})
	if config.IdleExit > 0 {
		go func() {
			if active.waitIdle(requests, config.IdleExit, service.Busy) == nil {
				close(idle)
			}
		}()
	}
	select {
	case err := <-served:
		return fmt.Errorf("serve on %s: %w", config.Dirs.Socket(), err)
	case <-idle:
		config.Logger.Info("leaving: nothing to do", "idle", config.IdleExit)
	case <-ctx.Done():
		config.Logger.Info("stopping", "cause", context.Cause(ctx))
	}

	// The socket goes first: from here on a command starts the next server, which waits for our lock.
	if err := os.Remove(config.Dirs.Socket()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		config.Logger.Warn("remove the socket", "err", err)
	}
	cancelRequests()
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
	defer cancel()
	if err := httpServer.Shutdown(drain); err != nil {
		config.Logger.Warn("calls did not end in time and are cut off", "after", drainTimeout, "err", err)
		httpServer.Close()
	}
	return nil
}

// takeServerLock waits for a server that is leaving, and refuses to wait for one that serves.
func takeServerLock(ctx context.Context, dirs Dirs) (*os.File, error) {
	ctx, cancel := context.WithTimeout(ctx, handoverTimeout)
	defer cancel()
	f, err := lock(ctx, dirs.serverLock(), func() error {
		if _, err := Probe(ctx, dirs); err == nil {
			return fmt.Errorf("a violin server already serves %s", dirs.Socket())
		}
		return nil
	})
	if errors.Is(err, errLocked) && errors.Is(err, context.DeadlineExceeded) {
		return nil, fmt.Errorf("another violin server neither answers nor leaves: %w; see its log %s, or end it and its VMs with kill -9", err, dirs.Log())
	}
	if err != nil {
		return nil, err
	}
	if err := sign(f); err != nil {
		f.Close()
		return nil, fmt.Errorf("write %s: %w", dirs.serverLock(), err)
	}
	return f, nil
}

// listen makes the socket appear at its path in one step, with its mode, and in the
// place of one that a killed server left.
func listen(dirs Dirs) (net.Listener, error) {
	// Bound under a name that nobody looks for, since bind(2) makes a socket with the
	// umask's mode; no longer than the real one, which is known to fit.
	fresh := dirs.Socket()[:len(dirs.Socket())-len("sock")] + "new"
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove the leftover socket: %w", err)
	}
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: fresh, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	listener.SetUnlinkOnClose(false) // its name is another by then
	if err := os.Chmod(fresh, 0o600); err != nil {
		listener.Close()
		return nil, fmt.Errorf("protect the socket: %w", err)
	}
	if err := os.Rename(fresh, dirs.Socket()); err != nil {
		listener.Close()
		return nil, fmt.Errorf("put the socket in its place: %w", err)
	}
	return listener, nil
}

// handler serves the service, counts its requests and answers probes.
func handler(service http.Handler, active *activity, config Config) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+healthPath, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set(versionHeader, config.Version)
		fmt.Fprintln(w, "ok")
	})
	mux.Handle("/", service)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !active.begin() {
			http.Error(w, "the server is leaving", http.StatusServiceUnavailable)
			return
		}
		defer active.end()
		began := time.Now()
		mux.ServeHTTP(w, r)
		config.Logger.Debug("request", "method", r.Method, "path", r.URL.Path, "took", time.Since(began))
	})
}

// readyVariable names the descriptor on which a started server says that it answers.
const readyVariable = "VIOLIN_READY_FD"

// ReadyFile returns the file on which the process that started this one with
// [Ensure] waits to hear that it answers, or nil if it was started otherwise. To be
// called once, early: it takes the variable that says so out of the environment, so
// that children do not take it for theirs.
func ReadyFile() *os.File {
	value, ok := os.LookupEnv(readyVariable)
	if !ok {
		return nil
	}
	os.Unsetenv(readyVariable)
	fd, err := strconv.Atoi(value)
	if err != nil || fd < 3 {
		return nil
	}
	return os.NewFile(uintptr(fd), "ready")
}
