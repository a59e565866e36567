package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"violin/internal/child"
	"violin/internal/fabric"
	"violin/internal/hypervisor/qemu"
	"violin/internal/keeper"
	"violin/internal/priority"
)

// keeperBound bounds the wait for a keeper that was started to serve.
const keeperBound = 10 * time.Second

// keeping is the keeper process of this host, which is started when it is needed.
type keeping struct {
	command  []string
	dir      string
	sw       string // directory of the switch
	platform Platform
	log      *slog.Logger

	mu      sync.Mutex
	process *child.Process
	urgency *priority.Shared
	streams *keeper.Streams
}

func newKeeping(cfg Config, log *slog.Logger) *keeping {
	if cfg.Keeper == nil {
		return nil
	}
	return &keeping{command: cfg.Keeper, dir: filepath.Join(cfg.Dir, "keeper"), sw: filepath.Join(cfg.Dir, "ovs"), platform: cfg.Platform, log: log}
}

// session reaches the switch, through the keeper that there is or a new one.
func (k *keeping) session(ctx context.Context) (net.Conn, error) {
	if err := k.ensure(ctx); err != nil {
		return nil, err
	}
	return keeper.DialSession(ctx, k.dir)
}

// ensure starts the keeper if there is none.
func (k *keeping) ensure(ctx context.Context) (err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.process == nil {
		if k.process, err = child.Find(k.dir); err != nil {
			return err
		}
		if k.process != nil {
			if err := priority.Calm(k.process.PID()); err != nil {
				k.log.Debug("the keeper's priority is not as it should be", "err", err)
			}
			k.urgency = &priority.Shared{PID: k.process.PID(), Log: k.log}
		}
	}
	if k.process != nil {
		select {
		case <-k.process.Done():
			k.log.Warn("the keeper has ended; what it kept is lost", "err", k.process.Err())
			k.process = nil
		default:
			return nil
		}
	}
	return k.start(ctx)
}

// start starts a keeper and waits until it serves. mu is held.
func (k *keeping) start(ctx context.Context) error {
	if err := os.MkdirAll(k.dir, 0o700); err != nil {
		return fmt.Errorf("start the keeper: %w", err)
	}
	output, err := os.OpenFile(filepath.Join(k.dir, "keeper.log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("start the keeper: %w", err)
	}
	defer output.Close()
	cmd := exec.Command(k.command[0], append(k.command[1:len(k.command):len(k.command)], "--switch", fabric.ManagementSocket(k.sw), "--dir", k.dir)...)
	cmd.Stdout, cmd.Stderr = output, output
	child.Mark(cmd, k.dir)
	if err := k.platform.Start(cmd); err != nil {
		return fmt.Errorf("start the keeper: %w", err)
	}
	k.process = child.Started(cmd)
	k.urgency = &priority.Shared{PID: k.process.PID(), Log: k.log}
	if k.streams != nil {
		k.streams.Close()
		k.streams = nil
	}
	ctx, cancel := context.WithTimeout(ctx, keeperBound)
	defer cancel()
	for {
		// It listens for sessions last, and no agent but this one comes.
		c, err := keeper.DialSession(ctx, k.dir)
		if err == nil {
			return c.Close()
		}
		select {
		case <-k.process.Done():
			return fmt.Errorf("the keeper ended at once (%w); its log is %s", k.process.Err(), output.Name())
		case <-ctx.Done():
			return fmt.Errorf("wait for the keeper: %w", errors.Join(ctx.Err(), err))
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// raise makes the keeper urgent; see [priority.Shared].
func (k *keeping) raise() func() {
	if k == nil {
		return func() {}
	}
	k.mu.Lock()
	u := k.urgency
	k.mu.Unlock()
	return u.Raise()
}

// with calls f with a connection about streams, and once more with a new one.
func (k *keeping) with(f func(*keeper.Streams) error) (err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for range 2 {
		if k.streams == nil {
			if k.streams, err = keeper.DialStreams(context.Background(), k.dir); err != nil {
				k.streams = nil
				return err
			}
		}
		if err = f(k.streams); err == nil {
			return nil
		}
		k.streams.Close()
		k.streams = nil
	}
	return err
}

// Put implements [qemu.Keeper].
func (k *keeping) Put(name string, reader, writer *os.File) error {
	return k.with(func(s *keeper.Streams) error { return s.Put(name, reader, writer) })
}

// Release implements [qemu.Keeper].
func (k *keeping) Release(name string) error {
	return k.with(func(s *keeper.Streams) error { return s.Release(name) })
}

// Drop implements [qemu.Keeper].
func (k *keeping) Drop(name string) error {
	return k.with(func(s *keeper.Streams) error { return s.Drop(name) })
}

// keep has a VM's captures outlive this process.
func (a *Agent) keep(vm *qemu.VM) {
	if a.keeping != nil {
		vm.KeepStreams(a.keeping)
	}
}

// close ends the keeper.
func (k *keeping) close() error {
	if k == nil {
		return nil
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.streams != nil {
		k.streams.Close()
	}
	if k.process == nil {
		return nil
	}
	return k.process.Kill()
}
