package qemu

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// captured takes a whole capture.
func captured(t *testing.T, ctx context.Context, vm *VM, mode Mode) {
	t.Helper()
	c, err := vm.Arm(ctx, mode)
	if err != nil {
		t.Fatalf("%v: %v", mode, err)
	}
	read := make(chan struct{})
	go func() { defer close(read); io.Copy(io.Discard, c.Stream()) }() //nolint:errcheck // the capture tells
	for _, s := range steps {
		if err := s.run(ctx, t, c); err != nil {
			t.Fatalf("%v: %s: %v", mode, s.name, err)
		}
	}
	<-read
	wantStatus(t, ctx, vm, "running")
}

// hands keep streams, as a keeper of this process. They read one that was let go once
// the agent has died, and not beside it.
type hands struct {
	reader, writer *os.File
	released, died bool
}

func (h *hands) Put(_ string, reader, writer *os.File) error {
	var fds [2]int
	for i, f := range []*os.File{reader, writer} {
		c, err := f.SyscallConn()
		if err != nil {
			return err
		}
		var dup error
		if err := errors.Join(c.Control(func(fd uintptr) { fds[i], dup = unix.Dup(int(fd)) }), dup); err != nil {
			return err
		}
	}
	h.reader, h.writer = os.NewFile(uintptr(fds[0]), "reader"), os.NewFile(uintptr(fds[1]), "writer")
	return nil
}

func (h *hands) Release(string) error {
	h.writer.Close()
	h.released = true
	h.drain()
	return nil
}

// die says that the agent has died.
func (h *hands) die() {
	h.died = true
	h.drain()
}

func (h *hands) drain() {
	if h.released && h.died {
		go func() { io.Copy(io.Discard, h.reader) }() //nolint:errcheck // to its end
	}
}

func (h *hands) Drop(string) error { return nil }

// An agent dies in a capture, after each of its steps: the next finds the VM, gives the
// capture up, and takes one.
func TestFind(t *testing.T) {
	if os.Getenv("VIOLIN_E2E") != "1" {
		t.Skip("runs real QEMUs: set VIOLIN_E2E=1")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	log := slog.New(slog.DiscardHandler)
	for _, mode := range []Mode{Background, Precopy} {
		first := start(t, ctx, guest(t), false)
		if _, err := first.Resume(ctx); err != nil {
			t.Fatal(err)
		}
		vm := first
		for last := range steps[:4] {
			h := &hands{}
			vm.KeepStreams(h)
			c, err := vm.Arm(ctx, mode)
			if err != nil {
				t.Fatal(err)
			}
			if mode == Background {
				if err := c.Ready(ctx); err != nil {
					t.Fatal(err)
				}
			}
			read := make(chan struct{})
			go func() { defer close(read); io.CopyN(io.Discard, c.Stream(), 1<<20) }() //nolint:errcheck // it breaks off
			for _, s := range steps[:last+1] {
				if err := s.run(ctx, t, c); err != nil {
					t.Fatalf("%v: %s: %v", mode, s.name, err)
				}
			}
			// It dies: its files are closed, and what the keeper has stays.
			vm.qmp.Close()
			c.theirs.Close()
			c.ours.Close()
			h.die()

			found, err := Find(ctx, first.spec, nil, log)
			if err != nil {
				t.Fatal(err)
			}
			if found.PID() != first.PID() || found.Err() != nil {
				t.Fatalf("found process %d, %v; want %d", found.PID(), found.Err(), first.PID())
			}
			found.KeepStreams(h)
			if err := found.Orphan(mode).Abort(ctx); err != nil {
				t.Fatalf("%v: after %s: %v", mode, steps[last].name, err)
			}
			wantStatus(t, ctx, found, "running")
			found.KeepStreams(nil)
			captured(t, ctx, found, mode)
			vm = found
		}
		if err := vm.Close(); err != nil {
			t.Fatal(err)
		}
		if gone, err := Find(ctx, first.spec, nil, log); err != nil || gone.Err() == nil {
			t.Errorf("a VM that has ended: %v, %v", gone.Err(), err)
		}
	}
}

// What a keeper is for: with QEMU 7.2, a VM does not survive that the stream of a background
// snapshot breaks. Whoever finds it ends it rather than let it pass for one that runs.
func TestBrokenStream(t *testing.T) {
	if os.Getenv("VIOLIN_E2E") != "1" {
		t.Skip("runs real QEMUs: set VIOLIN_E2E=1")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	for last := range steps[:4] {
		vm := start(t, ctx, guest(t), false)
		if _, err := vm.Resume(ctx); err != nil {
			t.Fatal(err)
		}
		c, err := vm.Arm(ctx, Background)
		if err == nil {
			err = c.Ready(ctx)
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range steps[:last+1] {
			if err := s.run(ctx, t, c); err != nil {
				t.Fatalf("%s: %v", s.name, err)
			}
		}
		vm.qmp.Close()
		c.theirs.Close()
		c.ours.Close()
		found, err := Find(ctx, vm.spec, nil, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		found.KeepStreams(nobody{})
		// If its own thread has touched what is write-protected, it does not even say so.
		ended := func(err error) bool { return errors.Is(err, errBroken) || errors.Is(err, errDeaf) }
		if err := found.Orphan(Background).Abort(ctx); !ended(err) {
			t.Fatalf("broken after %s: %v", steps[last].name, err)
		}
		<-found.Done()
		if err := found.Err(); !ended(err) {
			t.Errorf("broken after %s: it ended for %v", steps[last].name, err)
		}
	}
}

// nobody is a keeper that knows of no stream.
type nobody struct{}

func (nobody) Put(string, *os.File, *os.File) error { return nil }
func (nobody) Release(string) error                 { return nil }
func (nobody) Drop(string) error                    { return nil }
