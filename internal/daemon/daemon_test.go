package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// The test binary is also the server that Ensure starts: with one of these as its first argument.
const (
	asServer  = "as-server"  // run state idle: serves
	asFailure = "as-failure" // ends at once, with a word in its log
	asHanging = "as-hanging" // fifo: opens the fifo and never answers
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case asServer:
			os.Exit(serveForTest(os.Args[2], os.Args[3], os.Args[4]))
		case asFailure:
			fmt.Fprintln(os.Stderr, "open the store: no space left on device")
			os.Exit(3)
		case asHanging:
			if _, err := os.OpenFile(os.Args[2], os.O_WRONLY, 0); err != nil {
				os.Exit(1)
			}
			select {}
		}
	}
	os.Exit(m.Run())
}

func serveForTest(run, state, idle string) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	period, err := time.ParseDuration(idle)
	if err != nil {
		panic(err)
	}
	err = Serve(ctx, Config{
		Dirs: Dirs{Run: run, State: state}, IdleExit: period, Ready: ReadyFile(), Version: "test",
		Logger: slog.New(slog.NewTextHandler(os.Stderr, nil)),
		Start:  func(context.Context) (Service, error) { return newFakeService(), nil },
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// fakeService tells its pid and the protocol, and can be made to wait.
type fakeService struct {
	http.ServeMux
	waiting chan struct{} // closed when /wait is being served
	closed  chan struct{}
}

func newFakeService() *fakeService {
	s := &fakeService{waiting: make(chan struct{}), closed: make(chan struct{})}
	s.HandleFunc("/pid", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, os.Getpid()) })
	s.HandleFunc("/proto", func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.Proto) })
	s.HandleFunc("/wait", func(w http.ResponseWriter, r *http.Request) {
		close(s.waiting)
		<-r.Context().Done()
		w.WriteHeader(http.StatusTeapot)
	})
	return s
}

func (*fakeService) Busy() bool     { return false }
func (s *fakeService) Close() error { close(s.closed); return nil }

// testDirs is short: a unix socket's path has a limit.
func testDirs(t *testing.T) Dirs {
	t.Helper()
	root, err := os.MkdirTemp("", "violin")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(root); err != nil {
			t.Error(err)
		}
	})
	d, err := NewDirs(filepath.Join(root, "run"), filepath.Join(root, "state"))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func testArgv(t *testing.T, args ...string) []string {
	t.Helper()
	executable, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return append([]string{executable}, args...)
}

func get(t *testing.T, d Dirs, path string) string {
	t.Helper()
	client := Client(d)
	defer client.CloseIdleConnections()
	return getWith(t, client, path)
}

func getWith(t *testing.T, client *http.Client, path string) string {
	t.Helper()
	response, err := client.Get(BaseURL + path)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	b, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// waitGone waits until the server process has ended: its lock is free then.
func waitGone(t *testing.T, d Dirs) {
	t.Helper()
	f, err := lock(t.Context(), d.serverLock(), func() error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if _, err := os.Lstat(d.Socket()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the server left its socket: %v", err)
	}
}

func TestEnsureStartsOneServerForAll(t *testing.T) {
	d := testDirs(t)
	if _, err := Probe(t.Context(), d); !errors.Is(err, ErrNotRunning) {
		t.Fatalf("probe before: %v, want ErrNotRunning", err)
	}
	argv := testArgv(t, asServer, d.Run, d.State, "300ms")
	const callers = 6
	var mu sync.Mutex
	startedBy := 0
	var all sync.WaitGroup
	for range callers {
		all.Go(func() {
			version, started, err := Ensure(t.Context(), d, argv)
			if err != nil || version != "test" {
				t.Errorf("Ensure: version %q, %v", version, err)
			}
			mu.Lock()
			defer mu.Unlock()
			if started {
				startedBy++
			}
		})
	}
	all.Wait()
	if startedBy != 1 {
		t.Errorf("%d of %d calls started a server, want 1", startedBy, callers)
	}
	log, err := os.ReadFile(d.Log())
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(log), "msg=serving"); n != 1 {
		t.Errorf("%d servers served, want 1:\n%s", n, log)
	}
	// Nobody asks it anything: it leaves by itself.
	waitGone(t, d)
}

func TestEnsureAfterKill(t *testing.T) {
	d := testDirs(t)
	argv := testArgv(t, asServer, d.Run, d.State, "0s")
	var pids []int
	for range 2 {
		if _, started, err := Ensure(t.Context(), d, argv); err != nil || !started {
			t.Fatalf("Ensure: started %v, %v", started, err)
		}
		pid, err := strconv.Atoi(get(t, d, "/pid"))
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, pid)
		if len(pids) == 1 {
			// Its socket stays, with nobody behind it.
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			f, err := lock(t.Context(), d.serverLock(), func() error { return nil })
			if err != nil {
				t.Fatal(err)
			}
			f.Close()
			if _, err := Probe(t.Context(), d); !errors.Is(err, ErrNotRunning) {
				t.Fatalf("probe after the kill: %v, want ErrNotRunning", err)
			}
		}
	}
	if session, err := syscall.Getpgid(pids[1]); err != nil || session != pids[1] {
		t.Errorf("the server is in process group %d (%v), want one of its own", session, err)
	}
	if err := syscall.Kill(pids[1], syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	waitGone(t, d)
}

func TestEnsureTellsWhyTheServerEnded(t *testing.T) {
	d := testDirs(t)
	if err := d.create(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(d.Log(), []byte("said by an earlier server\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, started, err := Ensure(t.Context(), d, testArgv(t, asFailure))
	if err == nil || started {
		t.Fatalf("Ensure: started %v, %v", started, err)
	}
	for _, want := range []string{"exit status 3", "open the store: no space left on device", d.Log()} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error lacks %q:\n%v", want, err)
		}
	}
	if strings.Contains(err.Error(), "earlier server") {
		t.Errorf("error quotes an earlier server:\n%v", err)
	}
}

func TestEnsureNoSuchProgram(t *testing.T) {
	d := testDirs(t)
	if _, _, err := Ensure(t.Context(), d, []string{filepath.Join(d.Run, "none")}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Ensure: %v, want a missing file", err)
	}
}

func TestEnsureCancelledStopsWhatItStarted(t *testing.T) {
	d := testDirs(t)
	if err := d.create(); err != nil {
		t.Fatal(err)
	}
	fifo := filepath.Join(d.Run, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		_, _, err := Ensure(ctx, d, testArgv(t, asHanging, fifo))
		ended <- err
	}()
	alive, err := os.Open(fifo) // returns when the child has opened it too
	if err != nil {
		t.Fatal(err)
	}
	defer alive.Close()
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("Ensure: %v, want context.Canceled", err)
	}
	if _, err := io.ReadAll(alive); err != nil { // ends with the child
		t.Error(err)
	}
}

// serving runs Serve in this process until the test ends or stop is called.
func serving(t *testing.T, d Dirs, service Service) (stop func() error) {
	t.Helper()
	ready, theirs, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer ready.Close()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- Serve(ctx, Config{
			Dirs: d, Ready: theirs, Version: "in-process", Logger: slog.New(slog.DiscardHandler),
			Start: func(context.Context) (Service, error) { return service, nil },
		})
	}()
	if b, err := io.ReadAll(ready); err != nil || string(b) != "ready\n" {
		t.Fatalf("ready: %q, %v", b, err)
	}
	stop = sync.OnceValue(func() error {
		cancel()
		return <-ended
	})
	t.Cleanup(func() { _ = stop() })
	return stop
}

func TestServe(t *testing.T) {
	d := testDirs(t)
	service := newFakeService()
	stop := serving(t, d, service)

	if version, err := Probe(t.Context(), d); err != nil || version != "in-process" {
		t.Errorf("Probe: %q, %v", version, err)
	}
	info, err := os.Stat(d.Socket())
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o600 {
		t.Errorf("socket's mode is %v, want 0600", info.Mode().Perm())
	}
	if got := get(t, d, "/proto"); got != "HTTP/2.0" {
		t.Errorf("Client speaks %s, want HTTP/2.0", got)
	}
	plain := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var dialer net.Dialer
		return dialer.DialContext(ctx, "unix", d.Socket())
	}}}
	defer plain.CloseIdleConnections()
	if got := getWith(t, plain, "/proto"); got != "HTTP/1.1" {
		t.Errorf("a plain client speaks %s, want HTTP/1.1", got)
	}

	// A second server is refused, with the first still there.
	err = Serve(t.Context(), Config{Dirs: d, Logger: slog.New(slog.DiscardHandler), Start: func(context.Context) (Service, error) {
		t.Error("the second server started its service")
		return nil, errors.New("unreachable")
	}})
	if err == nil || !strings.Contains(err.Error(), "already serves") {
		t.Errorf("a second Serve: %v", err)
	}

	// A stop ends the context of a call that runs, waits for the call, then closes the service.
	status := make(chan int, 1)
	go func() {
		client := Client(d)
		defer client.CloseIdleConnections()
		response, err := client.Get(BaseURL + "/wait")
		if err != nil {
			t.Error(err)
			status <- 0
			return
		}
		response.Body.Close()
		status <- response.StatusCode
	}()
	<-service.waiting
	if err := stop(); err != nil {
		t.Errorf("Serve: %v", err)
	}
	if got := <-status; got != http.StatusTeapot {
		t.Errorf("the call that ran ended with %d, want its own answer", got)
	}
	select {
	case <-service.closed:
	default:
		t.Error("the service was not closed")
	}
	if _, err := Probe(t.Context(), d); !errors.Is(err, ErrNotRunning) {
		t.Errorf("probe afterwards: %v, want ErrNotRunning", err)
	}
}

func TestServeWaitsForAServerThatLeaves(t *testing.T) {
	d := testDirs(t)
	if err := d.create(); err != nil {
		t.Fatal(err)
	}
	leaving, err := lock(t.Context(), d.serverLock(), func() error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	listener, err := listen(d)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		// The next server asks whether this one still serves: it waits for the lock.
		if c, err := listener.Accept(); err != nil {
			t.Error(err)
		} else {
			c.Close()
		}
		listener.Close()
		leaving.Close()
	}()
	serving(t, d, newFakeService())
	if version, err := Probe(t.Context(), d); err != nil || version != "in-process" {
		t.Errorf("Probe: %q, %v", version, err)
	}
}

func TestLockNamesTheHolder(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	f, err := lock(t.Context(), path, func() error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := sign(f); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	_, err = lock(ctx, path, func() error { cancel(); return nil })
	if !errors.Is(err, errLocked) || !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), fmt.Sprintf("(pid %d)", os.Getpid())) {
		t.Errorf("lock: %v", err)
	}
}

func TestServeStartFails(t *testing.T) {
	d := testDirs(t)
	broken := errors.New("broken")
	err := Serve(t.Context(), Config{Dirs: d, Logger: slog.New(slog.DiscardHandler), Start: func(context.Context) (Service, error) {
		return nil, broken
	}})
	if !errors.Is(err, broken) {
		t.Errorf("Serve: %v", err)
	}
	waitGone(t, d)
}

func TestLeavingServerIsNotRunning(t *testing.T) {
	active := newActivity()
	active.leaving = true
	d := testDirs(t)
	if err := d.create(); err != nil {
		t.Fatal(err)
	}
	listener, err := listen(d)
	if err != nil {
		t.Fatal(err)
	}
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	s := &http.Server{Protocols: &protocols, Handler: handler(newFakeService(), active, Config{Logger: slog.New(slog.DiscardHandler)})}
	go func() { _ = s.Serve(listener) }()
	defer s.Close()
	if _, err := Probe(t.Context(), d); !errors.Is(err, ErrNotRunning) {
		t.Errorf("probe: %v, want ErrNotRunning", err)
	}
}

func TestWaitIdle(t *testing.T) {
	const period = 5 * time.Second
	idleAfter := func(t *testing.T, busy func() bool, requests func(*activity)) (elapsed time.Duration) {
		synctest.Test(t, func(t *testing.T) {
			began := time.Now()
			a := newActivity()
			go requests(a)
			if err := a.waitIdle(t.Context(), period, busy); err != nil {
				t.Error(err)
			}
			elapsed = time.Since(began)
			if a.begin() {
				t.Error("a request was let in after the decision to leave")
			}
		})
		return elapsed
	}
	never := func() bool { return false }
	for _, test := range []struct {
		name     string
		busy     func() bool
		requests func(*activity)
		want     time.Duration
	}{
		{"no request", never, func(*activity) {}, period},
		{"a request puts it off", never, func(a *activity) {
			time.Sleep(3 * time.Second)
			a.begin()
			time.Sleep(time.Second)
			a.end()
		}, 9 * time.Second},
		{"a long request holds it", never, func(a *activity) {
			a.begin()
			time.Sleep(time.Minute + time.Second)
			a.end()
		}, time.Minute + time.Second + period},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := idleAfter(t, test.busy, test.requests); got != test.want {
				t.Errorf("left after %v, want %v", got, test.want)
			}
		})
	}
	t.Run("a busy service holds it", func(t *testing.T) {
		asked := 0
		got := idleAfter(t, func() bool { asked++; return asked < 4 }, func(*activity) {})
		if got != 4*period {
			t.Errorf("left after %v, want %v", got, 4*period)
		}
	})
	t.Run("stopped", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := newActivity().waitIdle(ctx, time.Hour, never); !errors.Is(err, context.Canceled) {
			t.Errorf("waitIdle: %v", err)
		}
	})
}

func TestNewDirs(t *testing.T) {
	d, err := NewDirs("run", "/state")
	if err != nil {
		t.Fatal(err)
	}
	if !filepath.IsAbs(d.Run) || d.State != "/state" {
		t.Errorf("NewDirs: %+v", d)
	}
	if _, err := NewDirs("/"+strings.Repeat("x", 100), "/state"); err == nil || !strings.Contains(err.Error(), "107") {
		t.Errorf("a run directory that is too long: %v", err)
	}
}

func TestLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "server.log")
	if err := os.WriteFile(path, []byte("old\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, start, err := openLog(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := tail(f, start); !strings.Contains(got, "says nothing") {
		t.Errorf("tail of nothing: %q", got)
	}
	for i := range 1000 {
		fmt.Fprintf(f, "line %d\n", i)
	}
	got := tail(f, start)
	if lines := strings.Count(got, "\n"); lines != logTailLines || !strings.HasSuffix(got, "line 999") {
		t.Errorf("tail has %d lines:\n%s", lines, got)
	}
	if err := f.Truncate(logLimit + 1); err != nil {
		t.Fatal(err)
	}
	f.Close()
	f, start, err = openLog(path)
	if err != nil || start != 0 {
		t.Fatalf("a large log is continued at %d, %v", start, err)
	}
	f.Close()
	if _, err := os.Stat(path + ".1"); err != nil {
		t.Error(err)
	}
}

func TestReadyFile(t *testing.T) {
	for _, value := range []string{"", "x", "2", "-1"} {
		t.Setenv(readyVariable, value)
		if f := ReadyFile(); f != nil {
			t.Errorf("%s=%q: a file", readyVariable, value)
		}
		if _, ok := os.LookupEnv(readyVariable); ok {
			t.Errorf("%s=%q is still set", readyVariable, value)
		}
	}
}
