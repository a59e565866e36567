package fabric

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"violin/internal/child"
)

// schema is where Debian's package has Open vSwitch's database schema.
const schema = "/usr/share/openvswitch/vswitch.ovsschema"

// socketBuffer is what each of the switch's packet and OpenFlow sockets may hold,
// in bytes.
const socketBuffer = 16 << 20

// Launcher starts a child in the host's network namespace.
type Launcher interface{ Start(cmd *exec.Cmd) error }

// daemons are the two processes of an Open vSwitch, with a directory of their own.
type daemons struct {
	dir      string
	launcher Launcher
	ovsdb    *child.Process
	vswitchd *child.Process
}

// The daemons' programs.
const (
	ovsdbServer = "ovsdb-server"
	ovsVswitchd = "ovs-vswitchd"
)

func startDaemons(ctx context.Context, cfg Config) (_ *daemons, err error) {
	d := &daemons{dir: cfg.Dir, launcher: cfg.Launcher}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.stop())
		}
	}()
	db := filepath.Join(d.dir, "conf.db")
	for _, f := range []string{db, filepath.Join(d.dir, ".conf.db.~lock~"), d.socket(), d.control()} {
		if err := os.Remove(f); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	if out, err := exec.CommandContext(ctx, "ovsdb-tool", "create", db, schema).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("ovsdb-tool create %s (is openvswitch-switch installed?): %w: %s", db, err, out)
	}
	if d.ovsdb, err = d.start(ovsdbServer, db, "--remote=punix:"+d.socket(), "--unixctl="+filepath.Join(d.dir, "ovsdb.ctl")); err != nil {
		return nil, err
	}
	if err := await(ctx, d.ovsdb, d.socket()); err != nil {
		return nil, err
	}
	if d.vswitchd, err = d.start(ovsVswitchd, "unix:"+d.socket(), "--unixctl="+d.control()); err != nil {
		return nil, err
	}
	return d, await(ctx, d.vswitchd, d.control())
}

// findDaemons finds those that an agent before this one has started.
func findDaemons(cfg Config) (*daemons, error) {
	d := &daemons{dir: cfg.Dir, launcher: cfg.Launcher}
	for program, p := range map[string]**child.Process{ovsdbServer: &d.ovsdb, ovsVswitchd: &d.vswitchd} {
		var err error
		if *p, err = child.Find(filepath.Join(d.dir, program)); err != nil {
			return d, err
		}
		if *p == nil {
			return d, fmt.Errorf("%s has ended while no agent was there; its log in %s may say why", program, d.dir)
		}
	}
	return d, nil
}

func (d *daemons) socket() string  { return filepath.Join(d.dir, "db.sock") }
func (d *daemons) control() string { return filepath.Join(d.dir, "vswitchd.ctl") }

func (d *daemons) start(name string, args ...string) (*child.Process, error) {
	args = append(args, "--log-file="+filepath.Join(d.dir, name+".log"), "-vconsole:off", "-vsyslog:off")
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "OVS_RUNDIR="+d.dir, "OVS_DBDIR="+d.dir, "OVS_LOGDIR="+d.dir)
	child.Mark(cmd, filepath.Join(d.dir, name))
	if err := d.launcher.Start(cmd); err != nil {
		return nil, fmt.Errorf("start %s (is openvswitch-switch installed?): %w", name, err)
	}
	return child.Started(cmd), nil
}

// await returns once the daemon listens on its socket. That the socket is there is not
// enough: it is made before anybody listens.
func await(ctx context.Context, p *child.Process, socket string) error {
	for {
		if c, err := net.Dial("unix", socket); err == nil {
			return c.Close()
		}
		select {
		case <-p.Done():
			return fmt.Errorf("the daemon that was to make %s ended at once (%v); see its log beside it", socket, p.Err())
		case <-ctx.Done():
			return fmt.Errorf("wait for %s to be made: %w", socket, ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func (d *daemons) stop() error {
	var errs []error
	for _, p := range []*child.Process{d.vswitchd, d.ovsdb} {
		if p != nil {
			errs = append(errs, p.Kill())
		}
	}
	return errors.Join(errs...)
}

func (d *daemons) pid() int { return d.vswitchd.PID() }

// raiseBuffers gives the packet sockets by which the switch in user space reads
// its devices room for a burst. They are made with the machine's default, some 90
// full frames, which are lost whenever the switch does not run for a moment; the
// default is not ours to change, but an open socket's option can be set. The same
// goes for the OpenFlow session: of what does not fit its socket the switch keeps
// 512 packet-ins, and drops held frames beyond.
// It is called again after each port and session that is added.
func (d *daemons) raiseBuffers() error {
	pid := d.pid()
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return fmt.Errorf("raise the switch's socket buffers: %w", err)
	}
	defer unix.Close(pidfd)
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("raise the switch's socket buffers: %w", err)
	}
	for _, e := range entries {
		link, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil || !strings.HasPrefix(link, "socket:") {
			continue
		}
		n, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		fd, err := unix.PidfdGetfd(pidfd, n, 0)
		if err != nil {
			continue // closed meanwhile
		}
		switch domain, derr := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN); {
		case derr != nil:
		case domain == unix.AF_PACKET:
			err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, socketBuffer)
		case domain == unix.AF_UNIX: // what waits in a unix socket counts against its sender
			err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, socketBuffer)
		}
		unix.Close(fd)
		if err != nil {
			return fmt.Errorf("raise the switch's socket buffers: %w", err)
		}
	}
	return nil
}
