package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// startTimeout bounds the wait for a started server to answer. It covers the
	// wait for a server that is leaving (handoverTimeout) and opening the store.
	startTimeout = 90 * time.Second

	// logLimit is the size above which a log is set aside (as server.log.1, replacing
	// the one before) when a server is started.
	logLimit = 16 << 20

	logTailLines = 20
	logTailBytes = 4 << 10
)

// Ensure makes sure that a server answers: if none does, it starts argv (a program
// and its arguments that end up in [Serve], with [ReadyFile] as Ready) in a session
// of its own, with its output in the log, and waits until it answers. It returns the
// server's version, and whether it was started by this very call. When several
// processes call it at once, one server is started.
//
// If the server ends instead of answering, the error holds the end of its log. If
// ctx ends first, a server that was being started is told to stop.
func Ensure(ctx context.Context, dirs Dirs, argv []string) (version string, started bool, err error) {
	if version, err := answers(ctx, dirs); err == nil || !startable(ctx, err) {
		return version, false, err
	}
	if err := dirs.create(); err != nil {
		return "", false, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, startTimeout, fmt.Errorf("it did not answer within %v", startTimeout))
	defer cancel()
	held, err := lock(ctx, dirs.startLock(), func() error { return nil })
	if err != nil {
		return "", false, fmt.Errorf("start the server: %w", err)
	}
	defer held.Close()
	// Whoever held the lock may have started one.
	if version, err := answers(ctx, dirs); err == nil || !startable(ctx, err) {
		return version, false, err
	}
	if err := start(ctx, dirs, argv); err != nil {
		return "", false, fmt.Errorf("start the server: %w", err)
	}
	version, err = Probe(ctx, dirs)
	return version, err == nil, err
}

// answers is Probe without the noise of a context that ended.
func answers(ctx context.Context, dirs Dirs) (string, error) {
	version, err := Probe(ctx, dirs)
	if err != nil && ctx.Err() != nil {
		return "", context.Cause(ctx)
	}
	return version, err
}

// startable tells whether a failed probe leaves room for starting a server. One that
// may not be reached, or that this command has no time left to reach, does not. One
// that broke off the probe or hangs does: the lock decides whether it lives.
func startable(ctx context.Context, err error) bool {
	return ctx.Err() == nil && !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EPERM)
}

// start runs argv detached and waits until it says that it answers.
func start(ctx context.Context, dirs Dirs, argv []string) error {
	logFile, logStart, err := openLog(dirs.Log())
	if err != nil {
		return err
	}
	defer logFile.Close()
	ready, childReady, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	defer childReady.Close()

	// Not CommandContext: the server outlives this command.
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir = "/" // holds no mount of the user's busy
	cmd.Stdout, cmd.Stderr = logFile, logFile
	cmd.ExtraFiles = []*os.File{childReady} // becomes descriptor 3
	cmd.Env = append(os.Environ(), readyVariable+"=3")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // Ctrl-C at the command is not for the server
	if err := cmd.Start(); err != nil {
		return err
	}
	childReady.Close() // so that the end of the child is the end of the pipe

	said := make(chan string, 1)
	go func() {
		b, _ := io.ReadAll(io.LimitReader(ready, 64))
		said <- string(b)
	}()
	select {
	case text := <-said:
		if text == "ready\n" {
			// It is ours until this command ends, and init's then. Should it end sooner, it leaves no zombie.
			go func() { _ = cmd.Wait() }()
			return nil
		}
	case <-ctx.Done():
		err := context.Cause(ctx)
		_ = cmd.Process.Signal(syscall.SIGTERM)
		go func() { _ = cmd.Wait() }()
		return fmt.Errorf("%w%s", err, tail(logFile, logStart))
	}
	// Its end of the pipe was closed without a word: by its exit, or it is no server at all.
	_ = cmd.Process.Kill()
	err = cmd.Wait()
	if err == nil {
		err = errors.New("exit status 0")
	}
	return fmt.Errorf("it ended before it answered (%w)%s", err, tail(logFile, logStart))
}

// openLog opens the log for appending and tells where what is written now begins.
func openLog(path string) (f *os.File, start int64, err error) {
	if info, err := os.Stat(path); err == nil && info.Size() > logLimit {
		if err := os.Rename(path, path+".1"); err != nil {
			return nil, 0, fmt.Errorf("set the log aside: %w", err)
		}
	}
	f, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, 0, fmt.Errorf("open the server's log: %w", err)
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, 0, fmt.Errorf("open the server's log: %w", err)
	}
	return f, info.Size(), nil
}

// tail renders the last lines of a log written since start, for the end of an error message.
func tail(f *os.File, start int64) string {
	info, err := f.Stat()
	if err != nil {
		return ""
	}
	from := max(start, info.Size()-logTailBytes)
	b := make([]byte, max(0, info.Size()-from))
	n, err := f.ReadAt(b, from)
	if err != nil && !errors.Is(err, io.EOF) {
		return ""
	}
	b = b[:n]
	if from > start { // begins within a line
		if i := bytes.IndexByte(b, '\n'); i >= 0 {
			b = b[i+1:]
		}
	}
	text := strings.TrimRight(string(b), "\n")
	if text == "" {
		return fmt.Sprintf("; its log %s says nothing", f.Name())
	}
	lines := strings.Split(text, "\n")
	if len(lines) > logTailLines {
		lines = lines[len(lines)-logTailLines:]
	}
	return fmt.Sprintf("; the end of its log %s:\n    %s", f.Name(), strings.Join(lines, "\n    "))
}
