package qmp

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
)

// Against a real QEMU, which needs no guest for this.
func TestQEMU(t *testing.T) {
	if os.Getenv("VIOLIN_E2E") != "1" {
		t.Skip("runs a real QEMU: set VIOLIN_E2E=1")
	}
	path := filepath.Join(t.TempDir(), "qmp.sock")
	l, err := listenFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	cmd := exec.Command("qemu-system-x86_64", "-machine", "pc", "-m", "1", "-accel", "tcg", "-nodefaults", "-display", "none", "-S",
		"-chardev", "socket,id=qmp,fd=3,server=on,wait=off", "-mon", "chardev=qmp,mode=control")
	cmd.ExtraFiles = []*os.File{l}
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	l.Close()
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("qemu: %s", log.String())
		}
	}()

	c, err := Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	t.Logf("QEMU %v", c.Version())

	var schema json.RawMessage
	if err := c.Execute(t.Context(), "query-qmp-schema", nil, &schema); err != nil || len(schema) < 100_000 {
		t.Errorf("query-qmp-schema: %d bytes, %v", len(schema), err)
	}
	var refused *Error
	if err := c.Execute(t.Context(), "violin", nil, nil); !errors.As(err, &refused) || refused.Class != "CommandNotFound" {
		t.Errorf("unknown command: %v", err)
	}

	// The whole memory of the paused VM leaves through a descriptor we pass.
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := c.ExecuteWithFD(t.Context(), "getfd", map[string]string{"fdname": "out"}, nil, w); err != nil {
		t.Fatal(err)
	}
	w.Close()
	events := c.Subscribe(64)
	defer events.Close()
	if err := c.Execute(t.Context(), "migrate-set-capabilities", map[string]any{
		"capabilities": []map[string]any{{"capability": "events", "state": true}},
	}, nil); err != nil {
		t.Fatal(err)
	}
	if err := c.Execute(t.Context(), "migrate", map[string]string{"uri": "fd:out"}, nil); err != nil {
		t.Fatal(err)
	}
	var stream bytes.Buffer
	if n, err := stream.ReadFrom(r); err != nil || !bytes.HasPrefix(stream.Bytes(), []byte("QEVM")) {
		t.Errorf("migration stream: %d bytes, %v", n, err)
	}
	for {
		e, err := events.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if e.Timestamp.IsZero() {
			t.Errorf("event %s has no time", e.Name)
		}
		var data struct{ Status string }
		if e.Name == "MIGRATION" && json.Unmarshal(e.Data, &data) == nil && data.Status == "completed" {
			break
		}
	}

	if err := c.Execute(t.Context(), "quit", nil, nil); err != nil {
		t.Errorf("quit: %v", err)
	}
	<-c.Done()
	if !errors.Is(c.Err(), ErrDisconnected) {
		t.Errorf("after quit: %v", c.Err())
	}
}

// listenFile returns a listening unix socket as a file, to be inherited.
func listenFile(path string) (*os.File, error) {
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), path)
	if err := syscall.Bind(fd, &syscall.SockaddrUnix{Name: path}); err != nil {
		f.Close()
		return nil, err
	}
	if err := syscall.Listen(fd, 1); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
