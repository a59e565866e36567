package qga

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"violin/internal/qmp"
)

// agent is the other end of the wire, played by the test. Its answer to a
// command is what reply returns; synchronisations it answers by itself.
type agent struct {
	t       *testing.T
	conn    net.Conn
	ignored int // synchronisations that go unanswered first
	synced  int // that were answered
	reply   func(command string, args json.RawMessage) string
}

func (a *agent) serve() {
	r := bufio.NewReader(a.conn)
	for {
		line, err := r.ReadBytes('\n')
		if err != nil {
			return
		}
		if i := bytes.LastIndexByte(line, sentinel); i >= 0 {
			line = line[i+1:] // the parser was reset
		}
		var c struct {
			Execute   string
			Arguments json.RawMessage
		}
		if err := json.Unmarshal(line, &c); err != nil {
			a.t.Errorf("client wrote %q: %v", line, err)
			return
		}
		reply := ""
		if c.Execute == "guest-sync-delimited" {
			if a.ignored > 0 {
				a.ignored--
				continue
			}
			a.synced++
			var sync struct{ ID int64 }
			json.Unmarshal(c.Arguments, &sync)
			reply = fmt.Sprintf("\xff{\"return\": %d}", sync.ID)
		} else {
			reply = a.reply(c.Execute, c.Arguments)
		}
		if _, err := io.WriteString(a.conn, reply+"\n"); err != nil {
			return
		}
	}
}

// connect returns a client of an agent that has said noise already.
func connect(t *testing.T, a *agent, noise string) *Client {
	t.Helper()
	near, far := pair(t)
	a.t, a.conn = t, far
	if _, err := io.WriteString(far, noise); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		defer far.Close()
		a.serve()
	})
	c := New(near, "agent")
	c.poll = time.Microsecond
	t.Cleanup(func() {
		c.Close()
		wg.Wait()
	})
	return c
}

// pair returns both ends of a connection with buffers, as QEMU's has.
func pair(t *testing.T) (near, far net.Conn) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		conns[i], err = net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
	}
	return conns[0], conns[1]
}

func TestSynchronize(t *testing.T) {
	for name, noise := range map[string]string{
		"quiet":             "",
		"half a reply":      `{"return": {"exited": tr`,
		"replies to nobody": "{\"return\": {}}\n{\"return\": {}}\n",
		"old synchronisation": "\xff{\"return\": 17}\n" +
			"{\"error\": {\"class\": \"GenericError\", \"desc\": \"JSON parse error\"}}\n",
		"binary": "\xff\x00\xff\xff\n\xff{\"return\": \n",
	} {
		t.Run(name, func(t *testing.T) {
			a := &agent{reply: func(string, json.RawMessage) string { return `{"return": {}}` }}
			c := connect(t, a, noise)
			for range 2 {
				if err := c.Ping(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			c.Close()
		})
	}
}

// An agent that was not there yet forgets what it was asked; and one that never
// comes is waited for as long as the caller wants.
func TestBooting(t *testing.T) {
	a := &agent{ignored: 3, reply: func(string, json.RawMessage) string { return `{"return": {}}` }}
	c := connect(t, a, "")
	c.patience = time.Millisecond
	if err := c.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}

	c = connect(t, &agent{ignored: 1 << 30}, "")
	c.patience = time.Millisecond
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := c.Ping(ctx); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "qemu-ga") {
		t.Errorf("no agent: %v", err)
	}
}

// A command that is given up leaves its reply on the line, where the next one
// must not take it for its own.
func TestResynchronize(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("enough")
	a := &agent{}
	a.reply = func(command string, _ json.RawMessage) string {
		if command == "slow" {
			cancel(why)
			return `{"return": "slow"}`
		}
		return `{"return": "quick"}`
	}
	c := connect(t, a, "")
	if err := c.Execute(ctx, "quick", nil, nil); err != nil {
		t.Fatal(err)
	}
	// Whether the reply wins against the end of the context is open.
	if err := c.Execute(ctx, "slow", nil, nil); err != nil && !errors.Is(err, why) {
		t.Errorf("slow: %v", err)
	}
	var got string
	if err := c.Execute(t.Context(), "quick", nil, &got); err != nil || got != "quick" {
		t.Errorf("after it: %q, %v", got, err)
	}

	a = &agent{reply: func(command string, _ json.RawMessage) string {
		if command == "bad" {
			return "noise"
		}
		return `{"return": {}}`
	}}
	c = connect(t, a, "")
	if err := c.Execute(t.Context(), "bad", nil, nil); err == nil {
		t.Error("noise was taken for a reply")
	}
	if err := c.Ping(t.Context()); err != nil {
		t.Error(err)
	}
	c.Close()
	if err := c.Ping(t.Context()); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

func TestExec(t *testing.T) {
	polls := 0
	end := ""
	c := connect(t, &agent{reply: func(command string, args json.RawMessage) string {
		switch command {
		case "guest-exec":
			if want := `{"path":"cat","arg":["-n","x"],"input-data":"aGk=","capture-output":true}`; string(args) != want {
				t.Errorf("guest-exec %s, want %s", args, want)
			}
			return `{"return": {"pid": 42}}`
		case "guest-exec-status":
			if string(args) != `{"pid":42}` {
				t.Errorf("guest-exec-status %s", args)
			}
			if polls++; polls%3 != 0 {
				return `{"return": {"exited": false}}`
			}
			return end
		default:
			return `{"error": {"class": "CommandNotFound", "desc": "no"}}`
		}
	}}, "")
	for _, tc := range []struct {
		end  string
		want Result
	}{
		{`{"return": {"exited": true, "exitcode": 0, "out-data": "b3V0", "err-data": "ZXJy"}}`, Result{Stdout: []byte("out"), Stderr: []byte("err")}},
		{`{"return": {"exited": true, "exitcode": 3, "out-truncated": true}}`, Result{ExitCode: 3, Truncated: true}},
		{`{"return": {"exited": true, "signal": 9}}`, Result{ExitCode: 137}},
	} {
		end = tc.end
		got, err := c.Exec(t.Context(), "cat", []string{"-n", "x"}, []byte("hi"))
		if err != nil || fmt.Sprint(got) != fmt.Sprint(tc.want) {
			t.Errorf("%s: got %+v, %v", tc.end, got, err)
		}
	}

	var refused *qmp.Error
	if err := c.Execute(t.Context(), "guest-nothing", nil, nil); !errors.As(err, &refused) || refused.Command != "guest-nothing" {
		t.Errorf("unknown command: %v", err)
	}

	// Never ends.
	end = `{"return": {"exited": false}}`
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := c.Exec(ctx, "cat", []string{"-n", "x"}, []byte("hi")); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("endless: %v", err)
	}
}

// files plays an agent with one file, that reads and writes up to limit bytes at once.
type files struct {
	content []byte
	offset  int
	limit   int
	open    int
}

func (f *files) reply(command string, args json.RawMessage) string {
	var a struct {
		Mode  string
		Count int
		Data  []byte `json:"buf-b64"`
	}
	if err := json.Unmarshal(args, &a); err != nil {
		return err.Error()
	}
	switch command {
	case "guest-file-open":
		f.open++
		f.offset = 0
		if a.Mode == "wb" {
			f.content = nil
		}
		return `{"return": 1000}`
	case "guest-file-read":
		part := f.content[f.offset:]
		part = part[:min(len(part), a.Count, f.limit)]
		f.offset += len(part)
		return fmt.Sprintf(`{"return": {"count": %d, "buf-b64": %q, "eof": %v}}`, len(part), base64.StdEncoding.EncodeToString(part), f.offset == len(f.content))
	case "guest-file-write":
		part := a.Data[:min(len(a.Data), f.limit)]
		f.content = append(f.content, part...)
		return fmt.Sprintf(`{"return": {"count": %d, "eof": false}}`, len(part))
	case "guest-file-close":
		f.open--
		return `{"return": {}}`
	}
	return `{"error": {"class": "CommandNotFound", "desc": "no"}}`
}

func TestFiles(t *testing.T) {
	content := bytes.Repeat([]byte("0123456789abcde\n"), 2*chunk/16+3)
	f := &files{limit: chunk - 7}
	c := connect(t, &agent{reply: f.reply}, "")
	for _, want := range [][]byte{content, content[:2*chunk], nil} {
		if n, err := c.WriteFile(t.Context(), "/x", bytes.NewReader(want)); err != nil || n != int64(len(want)) || !bytes.Equal(f.content, want) {
			t.Errorf("wrote %d bytes of %d, %v", n, len(want), err)
		}
		var got bytes.Buffer
		if n, err := c.ReadFile(t.Context(), "/x", &got); err != nil || n != int64(len(want)) || !bytes.Equal(got.Bytes(), want) {
			t.Errorf("read %d bytes of %d, %v", n, len(want), err)
		}
	}

	ctx, cancel := context.WithCancel(t.Context())
	f.content = content
	if _, err := c.ReadFile(ctx, "/x", writerFunc(func([]byte) (int, error) { cancel(); return 0, nil })); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled read: %v", err)
	}
	f.limit = 0
	if _, err := c.ReadFile(t.Context(), "/x", io.Discard); !errors.Is(err, io.ErrNoProgress) {
		t.Errorf("endless read: %v", err)
	}
	if _, err := c.WriteFile(t.Context(), "/x", strings.NewReader("x")); !errors.Is(err, io.ErrShortWrite) {
		t.Errorf("endless write: %v", err)
	}
	c.Close()
	if f.open != 0 {
		t.Errorf("%d files are open still", f.open)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// Against the real agent, run on this machine instead of in a guest.
func TestAgent(t *testing.T) {
	if os.Getenv("VIOLIN_E2E") != "1" {
		t.Skip("runs a real guest agent: set VIOLIN_E2E=1")
	}
	program, err := exec.LookPath("qemu-ga")
	if err != nil {
		t.Skip("there is no qemu-ga (Debian: qemu-guest-agent): ", err)
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "qga.sock")
	var log bytes.Buffer
	cmd := exec.Command(program, "-m", "unix-listen", "-p", path, "-t", dir, "-f", filepath.Join(dir, "pid"))
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("qemu-ga: %s", log.String())
		}
	}()
	var c *Client
	for c == nil {
		// It makes its socket some time after it starts.
		if c, err = Dial(t.Context(), path); err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, syscall.ECONNREFUSED) {
			t.Fatal(err)
		}
	}
	defer c.Close()

	if err := c.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	r, err := c.Exec(t.Context(), "sh", []string{"-c", "cat; echo bad >&2; exit 3"}, []byte("in\x00\xff"))
	if err != nil || string(r.Stdout) != "in\x00\xff" || string(r.Stderr) != "bad\n" || r.ExitCode != 3 {
		t.Errorf("sh: %+v, %v", r, err)
	}
	if r, err = c.Exec(t.Context(), "sh", []string{"-c", "kill -9 $$"}, nil); err != nil || r.ExitCode != 137 {
		t.Errorf("killed: %+v, %v", r, err)
	}
	var refused *qmp.Error
	if _, err := c.Exec(t.Context(), "/nonexistent", nil, nil); !errors.As(err, &refused) {
		t.Errorf("no program: %v", err)
	}
	content := bytes.Repeat([]byte("0123456789abcde\n"), 100_000)
	file := filepath.Join(dir, "file")
	if _, err := c.WriteFile(t.Context(), file, bytes.NewReader(content)); err != nil {
		t.Error(err)
	}
	var got bytes.Buffer
	if _, err := c.ReadFile(t.Context(), file, &got); err != nil || !bytes.Equal(got.Bytes(), content) {
		t.Errorf("read %d bytes, %v", got.Len(), err)
	}
	if _, err := c.ReadFile(t.Context(), filepath.Join(dir, "none"), io.Discard); !errors.As(err, &refused) {
		t.Errorf("no file: %v", err)
	}

	// A command given up half-way.
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := c.Exec(ctx, "sleep", []string{"1"}, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("given up: %v", err)
	}
	if err := c.Ping(t.Context()); err != nil {
		t.Error(err)
	}
}
