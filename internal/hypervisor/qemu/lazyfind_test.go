package qemu

import (
	"context"
	"io"
	"log/slog"
	"os"
	"testing"
	"time"

	"violin/internal/pageserver"
)

// Agents die while memory follows, before the vCPUs run and after. The next goes on with
// what the VM does not have; or the VM is ended, and says so.
func TestFindLazily(t *testing.T) {
	if os.Getenv("VIOLIN_E2E") != "1" {
		t.Skip("runs real QEMUs: set VIOLIN_E2E=1")
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	kernel := guest(t)
	skeleton, memory := bootedState(t, ctx, kernel)
	for _, runs := range []bool{false, true} {
		vm := start(t, ctx, kernel, true)
		first := vm
		// What dies does not end the VM, as this process would by its end of the connection.
		conns := make(chan io.ReadWriteCloser, 1)
		dying := func(serve func(io.ReadWriteCloser) error) func(io.ReadWriteCloser) error {
			return func(conn io.ReadWriteCloser) error {
				conns <- conn
				_ = serve(conn)
				select {} // it is dead
			}
		}
		server := pageserver.New(pageserver.Config{Skeleton: skeleton, Source: source{memory}})
		if err := vm.LoadLazily(ctx, dying(server.Serve), func(error) {}); err != nil {
			t.Fatal(err)
		}
		if runs {
			if _, err := vm.Resume(ctx); err != nil {
				t.Fatal(err)
			}
		}
		ended := make(chan error, 1)
		for death := range 3 {
			if death > 0 {
				time.Sleep(100 * time.Millisecond) // QEMU 7.2 may die of a connection that breaks before it goes on
			}
			if err := (<-conns).Close(); err != nil {
				t.Fatal(err)
			}
			vm.qmp.Close()
			finding, cancel := context.WithTimeout(ctx, 5*time.Second)
			var err error
			vm, err = Find(finding, first.spec, nil, slog.New(slog.DiscardHandler))
			cancel()
			if err != nil {
				t.Fatal(err)
			}
			serve, end := dying, func(error) {}
			server = pageserver.New(pageserver.Config{Skeleton: skeleton, Source: source{memory}})
			if death == 2 {
				serve = func(serve func(io.ReadWriteCloser) error) func(io.ReadWriteCloser) error { return serve }
				end = func(err error) { ended <- err }
			}
			going, cancel := context.WithTimeout(ctx, 5*time.Second)
			err = vm.GoOnLazily(going, serve(server.Resume), end)
			cancel()
			if err == nil {
				continue
			}
			// Where QEMU's own thread waits for a page, or a vCPU that holds its lock, it hears
			// nothing any more, and is ended. With no vCPU running there is no such.
			<-vm.Done()
			t.Logf("runs %t: lost: %v, %v", runs, err, vm.Err())
			if !runs || vm.Err() == nil {
				t.Errorf("runs %t: %v, %v", runs, err, vm.Err())
			}
			break
		}
		if vm.Err() != nil {
			continue
		}
		if !runs {
			if _, err := vm.Resume(ctx); err != nil {
				t.Fatal(err)
			}
		}
		server.Follow()
		select {
		case err := <-ended:
			if err != nil {
				t.Fatalf("runs %t: %v", runs, err)
			}
		case <-ctx.Done():
			t.Fatal("it does not get all its memory")
		}
		wantStatus(t, ctx, vm, "running")
		// One that has all of it has nothing to go on with.
		if err := vm.GoOnLazily(ctx, nil, func(err error) { ended <- err }); err != nil {
			t.Error(err)
		}
		if err := <-ended; err != nil {
			t.Error(err)
		}
		captured(t, ctx, vm, Background) // as one that was never interrupted
		if err := vm.Close(); err != nil {
			t.Error(err)
		}
	}
}
