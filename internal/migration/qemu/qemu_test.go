package qemu_test

import (
	"bufio"
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"violin/internal/migration/qemu"
)

// guestCode is testdata/guest.s assembled, from offset 0 of the firmware.
const guestCode = "" +
	"fa31c08ed88ed0bc007c6631db664389d883e03fc1e0080500208ec06683fb40" +
	"76132666a100006683c0406639d87405b021e82d002666891e000085db75ce66" +
	"89d9be080066c1c10488c8240f04303c3976020427e80a004e75eab00ae80200" +
	"ebab88c4bafd03eca82074fb88e0baf803eec3"

// guestStart is the code at the processor's first address, 0xfff0.
const guestStart = "ea000000f0"

// step is how much the guest counts between two lines of its output.
const step = 1 << 16

func guestFirmware(t *testing.T) string {
	t.Helper()
	rom := make([]byte, 1<<16)
	for off, code := range map[int]string{0: guestCode, 0xfff0: guestStart} {
		b, err := hex.DecodeString(code)
		if err != nil {
			t.Fatal(err)
		}
		copy(rom[off:], b)
	}
	name := filepath.Join(t.TempDir(), "guest.bin")
	if err := os.WriteFile(name, rom, 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// guestTimeout only bounds a test that fails.
const guestTimeout = 30 * time.Second

// A vm is a QEMU that runs testdata/guest.s.
type vm struct {
	t      *testing.T
	qmp    net.Conn
	dec    *json.Decoder
	serial *bufio.Reader
}

// program is the QEMU that is tested.
func program() string {
	if path := os.Getenv("VIOLIN_QEMU"); path != "" {
		return path
	}
	return "qemu-system-x86_64"
}

// startVM starts a QEMU that is killed at the end of the test. With incoming
// it waits for a stream on that file.
func startVM(t *testing.T, incoming *os.File, args ...string) *vm {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 4*guestTimeout)
	t.Cleanup(cancel)
	qmp, serial := listen(t), listen(t)
	args = append([]string{
		"-nodefaults", "-display", "none", "-accel", "tcg,thread=multi",
		"-chardev", "socket,id=qmp,path=" + qmp.Addr().String(), "-mon", "chardev=qmp,mode=control",
		"-chardev", "socket,id=serial,path=" + serial.Addr().String(), "-device", "isa-serial,chardev=serial",
	}, args...)
	cmd := exec.CommandContext(ctx, program(), args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if incoming != nil {
		cmd.Args = append(cmd.Args, "-incoming", "fd:3")
		cmd.ExtraFiles = []*os.File{incoming}
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		err := cmd.Wait()
		if t.Failed() {
			t.Logf("%s\n%s%v", strings.Join(cmd.Args, " "), stderr.String(), err)
		}
	})
	v := &vm{t: t, qmp: accept(t, qmp), serial: bufio.NewReader(accept(t, serial))}
	v.dec = json.NewDecoder(v.qmp)
	v.wait("greeting", func(m map[string]any) bool { return m["QMP"] != nil })
	v.execute("qmp_capabilities", nil)
	return v
}

func listen(t *testing.T) *net.UnixListener {
	t.Helper()
	dir, err := os.MkdirTemp("", "violin") // t.TempDir is too long for a socket's name
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: filepath.Join(dir, "s")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func accept(t *testing.T, l *net.UnixListener) net.Conn {
	t.Helper()
	deadline := time.Now().Add(guestTimeout)
	_ = l.SetDeadline(deadline)
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(2 * guestTimeout))
	return c
}

// wait reads QMP messages until one is as wanted.
func (v *vm) wait(what string, want func(map[string]any) bool) {
	v.t.Helper()
	for {
		var m map[string]any
		if err := v.dec.Decode(&m); err != nil {
			v.t.Fatalf("wait for %s: %v", what, err)
		}
		if m["error"] != nil {
			v.t.Fatalf("%s: %v", what, m["error"])
		}
		if want(m) {
			return
		}
	}
}

func (v *vm) execute(command string, args any) (reply map[string]any) {
	v.t.Helper()
	msg := map[string]any{"execute": command, "id": command}
	if args != nil {
		msg["arguments"] = args
	}
	if err := json.NewEncoder(v.qmp).Encode(msg); err != nil {
		v.t.Fatal(err)
	}
	v.wait(command, func(m map[string]any) bool {
		reply, _ = m["return"].(map[string]any)
		return m["id"] == command
	})
	return reply
}

func (v *vm) setCapabilities(names ...string) {
	v.t.Helper()
	var caps []map[string]any
	for _, n := range names {
		caps = append(caps, map[string]any{"capability": n, "state": true})
	}
	v.execute("migrate-set-capabilities", map[string]any{"capabilities": caps})
}

// waitMigration waits for a state of the migration; "failed" ends the test.
func (v *vm) waitMigration(status string) {
	v.t.Helper()
	v.wait("migration "+status, func(m map[string]any) bool {
		data, _ := m["data"].(map[string]any)
		if m["event"] == "MIGRATION" && data["status"] == "failed" {
			v.t.Fatal("the migration failed")
		}
		return m["event"] == "MIGRATION" && data["status"] == status
	})
}

// line reads a line that the guest prints.
func (v *vm) line() string {
	v.t.Helper()
	s, err := v.serial.ReadString('\n')
	if err != nil {
		v.t.Fatalf("read the guest's output: %v", err)
	}
	if strings.Contains(s, "!") {
		v.t.Fatalf("the guest found its memory torn: %q", s)
	}
	return strings.TrimSuffix(s, "\n")
}

// snapshot takes the state of a running guest by a migration that stays
// here, after which the guest runs on.
func (v *vm) snapshot(mode string) (*qemu.Skeleton, *memory, qemu.Stats) {
	v.t.Helper()
	l := listen(v.t)
	type result struct {
		sk    *qemu.Skeleton
		stats qemu.Stats
		err   error
	}
	done := make(chan result, 1)
	mem := &memory{}
	go func() {
		c, err := l.Accept()
		if err != nil {
			done <- result{err: err}
			return
		}
		defer c.Close()
		d := qemu.NewDecoder(c)
		sk, err := d.Decode(mem.open)
		done <- result{sk, d.Stats(), err}
	}()
	migrate := map[string]any{"uri": "unix:" + l.Addr().String()}
	switch mode {
	case "background", "stopped":
		if mode == "stopped" {
			v.execute("stop", nil)
		}
		v.setCapabilities("background-snapshot", "events")
		v.execute("migrate", migrate)
		v.waitMigration("completed")
		// A VM that was stopped runs again by itself up to QEMU 8.2.
		if s := v.execute("query-status", nil); mode == "stopped" && s["status"] == "paused" {
			v.execute("cont", nil)
		}
	case "precopy":
		v.setCapabilities("pause-before-switchover", "events")
		v.execute("migrate", migrate)
		v.waitMigration("pre-switchover")
		v.execute("migrate-continue", map[string]any{"state": "pre-switchover"})
	default:
		v.t.Fatalf("mode %q", mode)
	}
	r := <-done
	if r.err != nil {
		v.t.Fatal(r.err)
	}
	if mode == "precopy" {
		// Only the end of the stream says that QEMU is done: after the event
		// "completed", cont may still be refused.
		v.execute("cont", nil)
	}
	return r.sk, mem, r.stats
}

// socketpair is a connected pair: one end for us, one for a child.
func socketpair(t *testing.T) (net.Conn, *os.File) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "ours"), os.NewFile(uintptr(fds[1]), "theirs")
	c, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); theirs.Close() })
	return c, theirs
}

// checkGoesOn checks that a restored guest prints what comes after the state
// that its memory was in, without a gap and without a repetition.
func (v *vm) checkGoesOn(ram []byte) {
	v.t.Helper()
	// Two lines may have been on their way: one in the guest's hands, and the
	// end of the one before in the serial port's.
	count := lastCount(ram) / step * step
	var text strings.Builder
	for c := count - step; c < count+9*step; c += step {
		fmt.Fprintf(&text, "%08x\n", c)
	}
	var got strings.Builder
	for range 6 {
		got.WriteString(v.line() + "\n")
	}
	if at := strings.Index(text.String(), got.String()); at < 0 || at > 2*9 {
		v.t.Fatalf("restored at count %#x, the guest printed %q", lastCount(ram), got.String())
	}
}

// TestQEMU snapshots and restores real guests, in all modes, on several
// machines, twice in a row, and checks that the restored guest goes on
// exactly where it was. "stopped" is a guest that is stopped before a
// background snapshot, as a cut does.
func TestQEMU(t *testing.T) {
	if os.Getenv("VIOLIN_E2E") == "" {
		t.Skip("needs qemu-system-x86_64 and userfaultfd; set VIOLIN_E2E=1 to run it")
	}
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	pci := []string{
		"-netdev", "hubport,id=net,hubid=0", "-device", "virtio-net-pci,netdev=net,romfile=",
		"-drive", "file=" + disk + ",format=raw,if=none,id=disk,readonly=on", "-device", "virtio-blk-pci,drive=disk",
		"-device", "virtio-serial-pci", "-chardev", "null,id=agent", "-device", "virtserialport,chardev=agent,name=agent",
		"-device", "virtio-rng-pci",
	}
	for _, tt := range []struct {
		name, ram string
		args      []string
	}{
		{"microvm", "microvm.ram", []string{"-machine", "microvm", "-m", "1"}},
		{"pc", "pc.ram", append([]string{"-machine", "pc", "-m", "64", "-smp", "2"}, pci...)},
		{"q35", "pc.ram", append([]string{"-machine", "q35", "-m", "64", "-vga", "std"}, pci...)},
	} {
		for _, mode := range []string{"background", "stopped", "precopy"} {
			t.Run(tt.name+"/"+mode, func(t *testing.T) {
				args := append(tt.args, "-bios", guestFirmware(t))
				v := startVM(t, nil, args...)
				v.line()
				v.line()
				for range 2 {
					sk, mem, stats := v.snapshot(mode)
					ram := mem.block(t, tt.ram)
					checkGuest(t, ram)
					for range 3 {
						v.line() // the source runs on
					}
					kept, err := sk.MarshalBinary()
					if err != nil {
						t.Fatal(err)
					}
					t.Logf("count %#x, skeleton of %d bytes with %d devices, %+v", lastCount(ram), len(kept), len(sk.Devices), stats)
					var restored qemu.Skeleton
					if err := restored.UnmarshalBinary(kept); err != nil {
						t.Fatal(err)
					}
					ours, theirs := socketpair(t)
					v = startVM(t, theirs, args...)
					theirs.Close()
					v.setCapabilities("events")
					if err := qemu.Encode(ours, &restored, mem.source()); err != nil {
						t.Fatal(err)
					}
					ours.Close()
					v.waitMigration("completed")
					if mode == "stopped" {
						if s := v.execute("query-status", nil); s["status"] != "paused" {
							t.Fatalf("restored from a stopped guest: %v", s)
						}
						v.execute("cont", nil)
					}
					v.checkGoesOn(ram)
				}
			})
		}
	}
}
