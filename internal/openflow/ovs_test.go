package openflow

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The tests of this file run against a real Open vSwitch with the userspace
// datapath, in a network namespace of their own, with taps for ports.

// vswitch is a private Open vSwitch with the bridge br0 and the taps t1, t2, t3.
type vswitch struct {
	t    *testing.T
	dir  string
	taps [4]*os.File // 1..3
	do   func(func())
	main *exec.Cmd // ovs-vswitchd
}

func startVswitch(t *testing.T) *vswitch {
	if os.Getenv("VIOLIN_E2E") != "1" {
		t.Skip("needs root and Open vSwitch: set VIOLIN_E2E=1 to run it")
	}
	dir, err := os.MkdirTemp("", "violin-ovs") // t.TempDir is too long for a unix socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s := &vswitch{t: t, dir: dir, do: namespace(t)}
	s.run("ip", "link", "set", "lo", "up")
	s.run("ovsdb-tool", "create", s.path("conf.db"), "/usr/share/openvswitch/vswitch.ovsschema")
	s.start("ovsdb-server", s.path("conf.db"), "--remote=punix:"+s.path("db.sock"), "--unixctl="+s.path("db.ctl"))
	s.main = s.start("ovs-vswitchd", "unix:"+s.path("db.sock"), "--unixctl="+s.path("vs.ctl"), "--log-file="+s.path("vs.log"))
	s.vsctl("add-br", "br0", "--", "set", "bridge", "br0", "datapath_type=netdev", "fail_mode=secure",
		"protocols=OpenFlow15", "other_config:controller-queue-size=512", "other_config:hwaddr=02:00:00:00:00:aa")
	for i := 1; i <= 3; i++ {
		s.addTap(i)
	}
	return s
}

// namespace makes a network namespace, and returns a function that runs another
// in it. Child processes started there die with the test.
func namespace(t *testing.T) func(func()) {
	work := make(chan func())
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine, and its children with it
		ready <- unix.Unshare(unix.CLONE_NEWNET)
		for f := range work {
			f()
		}
	}()
	if err := <-ready; err != nil {
		t.Fatalf("make a network namespace: %v", err)
	}
	t.Cleanup(func() { close(work) })
	return func(f func()) {
		done := make(chan struct{})
		work <- func() { defer close(done); f() }
		<-done
	}
}

func (s *vswitch) path(name string) string { return filepath.Join(s.dir, name) }

func (s *vswitch) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "OVS_RUNDIR="+s.dir, "OVS_LOGDIR="+s.dir, "OVS_DBDIR="+s.dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

func (s *vswitch) start(name string, args ...string) *exec.Cmd {
	s.t.Helper()
	cmd := s.command(name, args...)
	var err error
	s.do(func() { err = cmd.Start() })
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	return cmd
}

func (s *vswitch) run(name string, args ...string) string {
	s.t.Helper()
	cmd := s.command(name, args...)
	var out []byte
	var err error
	s.do(func() { out, err = cmd.CombinedOutput() })
	if err != nil {
		s.t.Fatalf("%s: %v\n%s", strings.Join(cmd.Args, " "), err, out)
	}
	return string(out)
}

func (s *vswitch) vsctl(args ...string) string {
	s.t.Helper()
	return s.run("ovs-vsctl", append([]string{"--timeout=20", "--retry", "--db=unix:" + s.path("db.sock")}, args...)...)
}

func (s *vswitch) ofctl(args ...string) string {
	s.t.Helper()
	return s.run("ovs-ofctl", append([]string{"-O", "OpenFlow15"}, args...)...)
}

// addTap makes the tap t<i> the port of number i.
func (s *vswitch) addTap(i int) {
	s.t.Helper()
	name := fmt.Sprintf("t%d", i)
	var err error
	s.do(func() {
		var fd int
		if fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err != nil {
			return
		}
		var req *unix.Ifreq
		if req, err = unix.NewIfreq(name); err != nil {
			return
		}
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
		s.taps[i] = os.NewFile(uintptr(fd), name)
	})
	if err != nil {
		s.t.Fatalf("make tap %s: %v", name, err)
	}
	s.t.Cleanup(func() { s.taps[i].Close() })
	s.run("ip", "link", "set", name, "mtu", "9000", "up")
	s.vsctl("add-port", "br0", name, "--", "set", "interface", name, fmt.Sprintf("ofport_request=%d", i), "mtu_request=9000")
}

// send sends a frame as the machine behind the tap.
func (s *vswitch) send(tap int, frame []byte) {
	s.t.Helper()
	if _, err := s.taps[tap].Write(frame); err != nil {
		s.t.Fatal(err)
	}
}

// settle makes the datapath forget what it made of the flow tables: entries
// that have just been changed are otherwise still followed for some milliseconds.
func (s *vswitch) settle() {
	s.t.Helper()
	s.run("ovs-appctl", "--timeout=10", "-t", s.path("vs.ctl"), "revalidator/purge")
}

// wantFrame waits for the frame at the tap. The kernel's own (IPv6 discovery) are passed over.
func (s *vswitch) wantFrame(tap int, want []byte) {
	s.t.Helper()
	if got := s.nextFrame(tap); !bytes.Equal(got, want) {
		s.t.Errorf("tap %d got\n%s, want\n%s", tap, hex.Dump(got), hex.Dump(want))
	}
}

// nextFrame returns the next frame of the test's EtherType.
func (s *vswitch) nextFrame(tap int) []byte {
	s.t.Helper()
	b := make([]byte, 1<<16)
	if err := s.taps[tap].SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		s.t.Fatal(err)
	}
	for {
		n, err := s.taps[tap].Read(b)
		if err != nil {
			s.t.Fatalf("no frame at tap %d: %v", tap, err)
		}
		if n >= 14 && b[12] == 0x88 && b[13] == 0xb5 {
			return b[:n]
		}
	}
}

// frame makes a frame of n bytes to the address 02:00:00:00:00:<dst>.
func frame(dst byte, n int, payload string) []byte {
	b := make([]byte, n)
	copy(b, []byte{2, 0, 0, 0, 0, dst, 2, 0, 0, 0, 0, 1, 0x88, 0xb5})
	copy(b[14:], payload)
	return b
}

// session is a connection with the switch, served.
type session struct {
	*Conn
	features *FeaturesReply
	async    chan Message
	served   chan error

	mu   sync.Mutex
	gate chan struct{}
}

// hold makes the handler wait until the channel is closed.
func (x *session) hold(until chan struct{}) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.gate = until
}

func (x *session) handle(m Message) {
	x.mu.Lock()
	gate := x.gate
	x.mu.Unlock()
	if gate != nil {
		<-gate
	}
	x.async <- m
}

// connect has the switch connect to us.
func (s *vswitch) connect(ctx context.Context, t *testing.T) *session {
	t.Helper()
	path := s.path("br0.controller")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s.vsctl("set-controller", "br0", "unix:"+path)
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return serve(ctx, t, c)
}

func serve(ctx context.Context, t *testing.T, c net.Conn) *session {
	t.Helper()
	x := &session{async: make(chan Message, 1<<16), served: make(chan error, 1)}
	x.Conn = NewConn(c, Options{Handler: x.handle})
	var err error
	if x.features, err = x.Handshake(ctx); err != nil {
		t.Fatal(err)
	}
	go func() { x.served <- x.Serve(ctx) }()
	t.Cleanup(func() { x.Close() })
	return x
}

// packetIn waits for the next packet-in of the test's EtherType.
func (x *session) packetIn(t *testing.T) *PacketIn {
	t.Helper()
	for {
		in := next[*PacketIn](t, x)
		if len(in.Data) >= 14 && in.Data[12] == 0x88 && in.Data[13] == 0xb5 {
			return in
		}
	}
}

// next waits for an asynchronous message of the type; others are dropped.
func next[M Message](t *testing.T, x *session) M {
	t.Helper()
	timeout := time.After(10 * time.Second)
	for {
		select {
		case m := <-x.async:
			if m, ok := m.(M); ok {
				return m
			}
		case err := <-x.served:
			t.Fatalf("connection ended: %v", err)
		case <-timeout:
			var zero M
			t.Fatalf("no %T came", zero)
		}
	}
}

func apply(actions ...Action) []Instruction {
	return []Instruction{ApplyActions{Actions: actions}}
}

func load(n int, v uint32) Action { return SetField{Field: Reg(n, v)} }

var toController = Output{Port: PortController, MaxLen: ControllerNoBuffer}

func TestOpenVSwitch(t *testing.T) {
	s := startVswitch(t)
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	x := s.connect(ctx, t)
	if x.features.DatapathID != 0x0200000000aa || x.features.Tables != 254 || x.features.Capabilities&CapFlowStats == 0 {
		t.Errorf("features: %+v", *x.features)
	}
	if err := x.EnableAsync(ctx); err != nil {
		t.Fatal(err)
	}

	// Every subtest begins with empty tables and no message left over.
	run := func(name string, f func(t *testing.T)) {
		t.Run(name, func(t *testing.T) {
			s.t = t
			// Before the entries go: what the datapath has not told of them by then
			// would be credited to those that come.
			s.settle()
			if err := x.Bundle(ctx, []FlowMod{{Command: FlowDelete, Table: TableAll}}); err != nil {
				t.Fatal(err)
			}
			if err := x.Barrier(ctx); err != nil {
				t.Fatal(err)
			}
			for len(x.async) > 0 {
				<-x.async
			}
			f(t)
		})
		s.t = t
	}

	run("description", func(t *testing.T) {
		desc, err := x.Desc(ctx)
		if err != nil || desc.Hardware != "Open vSwitch" {
			t.Errorf("got %+v, %v", desc, err)
		}
		ports, err := x.PortDescs(ctx)
		if err != nil {
			t.Fatal(err)
		}
		names := map[string]uint32{}
		for _, p := range ports {
			names[p.Name] = p.Port
		}
		if names["t1"] != 1 || names["t3"] != 3 || names["br0"] != PortLocal {
			t.Errorf("ports: %v", names)
		}
		stats, err := x.PortStats(ctx)
		if err != nil || len(stats) != 4 {
			t.Errorf("got %+v, %v", stats, err)
		}
		if err := x.Echo(ctx); err != nil {
			t.Error(err)
		}
		role, err := x.Role(ctx, RoleMaster, 7)
		if err != nil || role.Role != RoleMaster || role.Generation != 7 {
			t.Errorf("got %+v, %v", role, err)
		}
	})

	run("flows read back", func(t *testing.T) {
		want := everyFlow()
		if err := x.Bundle(ctx, want); err != nil {
			t.Fatal(err)
		}
		got, err := x.FlowStats(ctx, FlowStatsRequest{Table: TableAll})
		if err != nil {
			t.Fatal(err)
		}
		if len(got) != len(want) {
			t.Errorf("%d entries, want %d", len(got), len(want))
		}
		for _, f := range got {
			i := slices.IndexFunc(want, func(w FlowMod) bool { return w.Cookie == f.Cookie })
			if g := f.FlowMod(); i < 0 || g.String() != sortedMatch(want[i], g).String() {
				t.Errorf("read back\n%s, want\n%s", g, want[max(i, 0)])
			}
		}
		sum, err := x.AggregateStats(ctx, FlowStatsRequest{Table: TableAll})
		if err != nil || int(sum.Flows) != len(want) {
			t.Errorf("got %+v, %v", sum, err)
		}
		one, err := x.FlowStats(ctx, FlowStatsRequest{Table: TableAll, Cookie: want[0].Cookie, CookieMask: ^uint64(0)})
		if err != nil || len(one) != 1 {
			t.Errorf("by cookie: %v, %v", one, err)
		}
	})

	run("flows as ovs-ofctl writes them", func(t *testing.T) {
		var lines []string
		for _, f := range everyFlow() {
			lines = append(lines, f.String())
		}
		text := strings.Join(lines, "\n")
		if err := os.WriteFile(s.path("flows"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		s.ofctl("--bundle", "add-flows", "unix:"+s.path("br0.mgmt"), s.path("flows"))
		got, err := x.FlowStats(ctx, FlowStatsRequest{Table: TableAll})
		if err != nil {
			t.Fatal(err)
		}
		dump := s.ofctl("--no-stats", "--no-names", "dump-flows", "unix:"+s.path("br0.mgmt"))
		for _, f := range everyFlow() {
			i := slices.IndexFunc(got, func(g FlowStats) bool { return g.Cookie == f.Cookie })
			if i < 0 {
				t.Errorf("ovs-ofctl did not install\n%s", f)
				continue
			}
			if g := got[i].FlowMod(); g.String() != sortedMatch(f, g).String() {
				t.Errorf("ovs-ofctl installed\n%s as\n%s", f, g)
			}
		}
		t.Logf("ovs-ofctl dump-flows:\n%sours:\n%s", dump, text)
	})

	run("bundle is all or nothing", func(t *testing.T) {
		good := FlowMod{Table: 1, Priority: 5, Match: Match{Reg(1, 1)}, Instructions: apply(Output{Port: 1})}
		overlap := FlowMod{Table: 1, Priority: 5, Flags: FlagCheckOverlap, Match: Match{Reg(2, 1)}}
		for _, test := range []struct {
			name, code string
			bad        FlowMod
		}{
			{"refused when added", "OFPBAC_BAD_OUT_PORT", FlowMod{Table: 1, Instructions: apply(Output{Port: 0xfffffff0})}},
			{"refused when committed", "OFPFMFC_OVERLAP", overlap},
			{"prerequisite", "OFPBMC_BAD_PREREQ", FlowMod{Match: Match{UDPDst(53)}}},
			{"backwards", "OFPBIC_BAD_TABLE_ID", FlowMod{Table: 4, Instructions: []Instruction{GotoTable{Table: 3}}}},
			{"copy too far", "OFPBAC_BAD_SET_LEN", FlowMod{
				Instructions: apply(CopyField{Src: FieldReg(0), Dst: FieldReg(1), DstOffset: 20, Bits: 16}),
			}},
			{"hidden table", "OFPBRC_EPERM", FlowMod{Table: 254}},
		} {
			err := x.Bundle(ctx, []FlowMod{good, test.bad, good})
			var refused *ErrorMessage
			if !errors.As(err, &refused) || refused.Name() != test.code {
				t.Errorf("%s: got %v, want %s", test.name, err, test.code)
			}
			if want := "flow mod 2 of 3 (" + test.bad.String() + ")"; err != nil && !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %q does not tell %q", test.name, err, want)
			}
			if flows, err := x.FlowStats(ctx, FlowStatsRequest{Table: TableAll}); err != nil || len(flows) != 0 {
				t.Errorf("%s: left behind %v, %v", test.name, flows, err)
			}
			t.Log(err)
		}
		// A staged bundle takes effect at its commit, a discarded one never.
		b, err := x.StageBundle(ctx, []FlowMod{good})
		if err != nil {
			t.Fatal(err)
		}
		d, err := x.StageBundle(ctx, []FlowMod{{Table: 2}})
		if err != nil {
			t.Fatal(err)
		}
		d.Discard()
		if flows, err := x.FlowStats(ctx, FlowStatsRequest{Table: TableAll}); err != nil || len(flows) != 0 {
			t.Errorf("before the commit: %v, %v", flows, err)
		}
		if err := b.Commit(ctx); err != nil {
			t.Error(err)
		}
		if flows, err := x.FlowStats(ctx, FlowStatsRequest{Table: TableAll}); err != nil || len(flows) != 1 {
			t.Errorf("after the commit: %v, %v", flows, err)
		}
		if n := len(x.pending); n != 0 {
			t.Errorf("%d messages are still waited for", n)
		}
	})

	run("big bundle", func(t *testing.T) {
		var mods []FlowMod
		for i := range uint32(3000) {
			mods = append(mods, FlowMod{Table: uint8(i % 3), Match: Match{Reg(0, i)}, Instructions: apply(load(1, i), Output{Port: 1})})
		}
		if err := x.Bundle(ctx, mods); err != nil {
			t.Fatal(err)
		}
		flows, err := x.FlowStats(ctx, FlowStatsRequest{Table: TableAll})
		if err != nil || len(flows) != len(mods) {
			t.Errorf("%d entries, %v", len(flows), err)
		}
	})

	run("refused message without bundle", func(t *testing.T) {
		if err := x.Send(&FlowMod{Match: Match{UDPDst(53)}}); err != nil {
			t.Fatal(err)
		}
		if e := next[*ErrorMessage](t, x); e.Name() != "OFPBMC_BAD_PREREQ" || !strings.Contains(e.Error(), "flow-mod") {
			t.Errorf("got %v", e)
		}
	})

	run("packet-in", func(t *testing.T) {
		if err := x.Bundle(ctx, []FlowMod{
			{Match: Match{InPort(1)}, Instructions: apply(
				load(0, 7), load(1, 200), load(15, 0xdeadbeef),
				SetField{Field: TunnelID(0)},
				CopyField{Src: FieldReg(0), Dst: FieldTunnelID, DstOffset: 8, Bits: 16},
				CopyField{Src: FieldReg(1), Dst: FieldTunnelID, Bits: 8},
				Resubmit{Table: 20},
			)},
			{Table: 20, Cookie: 0x123456789abcdef0, Match: Match{Reg(0, 7), TunnelIDMasked(0x700, 0xff00)}, Instructions: apply(
				CopyField{Src: FieldTunnelID, SrcOffset: 8, Dst: FieldReg(3), Bits: 16}, toController,
			)},
			{Match: Match{InPort(2)}, Cookie: 2, Instructions: apply(Controller{UserData: []byte("violin"), ControllerID: 0})},
			{Match: Match{InPort(3)}, Cookie: 3, Instructions: apply(Controller{MaxLen: 20})},
		}); err != nil {
			t.Fatal(err)
		}
		s.settle()
		for _, n := range []int{60, 1514, 1515, 9014} {
			f := frame(9, n, fmt.Sprint("frame of ", n))
			s.send(1, f)
			in := x.packetIn(t)
			if !bytes.Equal(in.Data, f) || in.Length != n {
				t.Errorf("%d bytes: got %d of %d bytes, or others", n, len(in.Data), in.Length)
			}
			if in.InPort() != 1 || in.Table != 20 || in.Cookie != 0x123456789abcdef0 || in.Reason != ReasonAction {
				t.Errorf("in port %d, table %d, cookie %#x, reason %d", in.InPort(), in.Table, in.Cookie, in.Reason)
			}
			if in.Reg(0) != 7 || in.Reg(1) != 200 || in.Reg(3) != 7 || in.Reg(15) != 0xdeadbeef || in.Reg(2) != 0 || in.TunnelID() != 7<<8|200 {
				t.Errorf("match %s", in.Match)
			}
			t.Log(in.Match)
		}
		f := frame(9, 100, "user data")
		s.send(2, f)
		if in := x.packetIn(t); !bytes.Equal(in.Data, f) || string(in.UserData) != "violin" || in.Cookie != 2 {
			t.Errorf("got %+v", in)
		}
		// Nothing buffers the rest, so the switch sends the whole frame whatever the action's length.
		s.send(3, f)
		if in := x.packetIn(t); !bytes.Equal(in.Data, f) || in.Length != 100 || in.Cookie != 3 {
			t.Errorf("got %+v", in)
		}
	})

	run("flood by resubmits", func(t *testing.T) {
		if err := x.Bundle(ctx, []FlowMod{
			{Match: Match{InPort(1)}, Instructions: apply(load(1, 5), Resubmit{Table: 10})},
			{Table: 10, Match: Match{EthDstMasked(mac(1), mac(1))}, Instructions: apply(
				load(2, 1), Resubmit{Table: 20}, load(2, 2), Resubmit{Table: 20}, load(2, 3), Resubmit{Table: 20},
				Clone{Actions: []Action{load(1, 99), load(2, 4), Resubmit{Table: 20}}}, load(2, 5), Resubmit{Table: 20},
			)},
			{Table: 20, Priority: 9, Match: Match{InPort(1), Reg(2, 1)}}, // never back
			{Table: 20, Match: Match{Reg(2, 2), Reg(1, 5)}, Instructions: apply(Output{Port: 2})},
			{Table: 20, Match: Match{Reg(2, 3), Reg(1, 5)}, Cookie: 3, Instructions: apply(Output{Port: 3}, toController)},
			{Table: 20, Match: Match{Reg(2, 4)}, Cookie: 4, Instructions: apply(toController)},
			{Table: 20, Match: Match{Reg(2, 5)}, Cookie: 5, Instructions: apply(toController)},
		}); err != nil {
			t.Fatal(err)
		}
		s.settle()
		f := frame(9, 200, "flood")
		f[0] |= 1
		s.send(1, f)
		s.wantFrame(2, f)
		s.wantFrame(3, f)
		for _, want := range []struct{ cookie, epoch uint64 }{{3, 5}, {4, 99}, {5, 5}} {
			if in := x.packetIn(t); in.Cookie != want.cookie || in.Reg(1) != uint32(want.epoch) || !bytes.Equal(in.Data, f) {
				t.Errorf("cookie %d, match %s; want cookie %d, reg1 %d", in.Cookie, in.Match, want.cookie, want.epoch)
			}
		}
		flows, err := x.FlowStats(ctx, FlowStatsRequest{Table: 20, Match: Match{InPort(1), Reg(2, 1)}})
		if err != nil || len(flows) != 1 {
			t.Fatalf("%v, %v", flows, err)
		}
	})

	run("packet-out", func(t *testing.T) {
		for _, n := range []int{60, 1514, 9014} {
			f := frame(2, n, "out")
			if err := x.Send(&PacketOut{Actions: []Action{Output{Port: 2}}, Data: f}); err != nil {
				t.Fatal(err)
			}
			s.wantFrame(2, f)
		}
		// Into the middle of the pipeline, with registers.
		if err := x.Bundle(ctx, []FlowMod{
			{Table: 20, Match: Match{InPort(3), Reg(2, 1), Reg(1, 8)}, Instructions: apply(Output{Port: 1})},
		}); err != nil {
			t.Fatal(err)
		}
		f := frame(1, 300, "resubmitted")
		if err := x.Send(&PacketOut{
			InPort: 3, Match: Match{Reg(1, 8)}, Data: f,
			Actions: []Action{load(2, 1), Resubmit{Table: 20}},
		}); err != nil {
			t.Fatal(err)
		}
		s.wantFrame(1, f)
		// In order, many.
		const many = 2000
		for i := range many {
			if err := x.Send(&PacketOut{Actions: []Action{Output{Port: 3}}, Data: frame(3, 100, fmt.Sprintf("%06d", i))}); err != nil {
				t.Fatal(err)
			}
			if i%200 == 199 { // a tap's queue holds a thousand frames
				for j := i - 199; j <= i; j++ {
					s.wantFrame(3, frame(3, 100, fmt.Sprintf("%06d", j)))
				}
			}
		}
		if err := x.Send(&PacketOut{Actions: []Action{Output{Port: 0xfffffff0}}, Data: f}); err != nil {
			t.Fatal(err)
		}
		if e := next[*ErrorMessage](t, x); e.Name() != "OFPBAC_BAD_OUT_PORT" || !strings.Contains(e.Error(), "packet-out") {
			t.Errorf("got %v", e)
		}
	})

	run("no packet-in is lost in a burst", func(t *testing.T) {
		if err := x.Bundle(ctx, []FlowMod{{Match: Match{InPort(1)}, Instructions: apply(toController)}}); err != nil {
			t.Fatal(err)
		}
		s.settle()
		const batch = 50 // what fits the socket by which the switch reads a tap
		for i := range 100 {
			for j := range batch {
				s.send(1, frame(9, 1400, fmt.Sprintf("%06d", i*batch+j)))
			}
			for j := range batch {
				if in := x.packetIn(t); string(in.Data[14:20]) != fmt.Sprintf("%06d", i*batch+j) {
					t.Fatalf("frame %s came instead of %06d", in.Data[14:20], i*batch+j)
				}
			}
		}
		// All at once, by way of packet-outs, while the handler is busy: within
		// the 512 that the switch queues.
		const many = 400
		release := make(chan struct{})
		x.hold(release)
		for i := range many {
			f := frame(9, 1400, fmt.Sprintf("%06d", i))
			if err := x.Send(&PacketOut{InPort: 1, Actions: []Action{Resubmit{Table: 0}}, Data: f}); err != nil {
				t.Fatal(err)
			}
		}
		close(release)
		for i := range many {
			if in := x.packetIn(t); string(in.Data[14:20]) != fmt.Sprintf("%06d", i) {
				t.Fatalf("frame %s came instead of %06d", in.Data[14:20], i)
			}
		}
	})

	run("counters", func(t *testing.T) {
		flow := FlowMod{Cookie: 1, Match: Match{InPort(1)}, Instructions: apply(Output{Port: 2})}
		if err := x.Bundle(ctx, []FlowMod{flow}); err != nil {
			t.Fatal(err)
		}
		s.settle()
		for range 10 {
			f := frame(2, 500, "count")
			s.send(1, f)
			s.wantFrame(2, f)
		}
		packets := func(want uint64) {
			t.Helper()
			deadline := time.Now().Add(10 * time.Second)
			for {
				got, err := x.FlowStats(ctx, FlowStatsRequest{})
				if err != nil || len(got) != 1 {
					t.Fatalf("%v, %v", got, err)
				}
				if got[0].Packets == want && got[0].Bytes == want*500 && got[0].Duration > 0 {
					return
				}
				if time.Now().After(deadline) {
					t.Fatalf("%s: want %d packets", got[0], want)
				}
			}
		}
		packets(10)
		flow.Cookie = 2
		if err := x.Bundle(ctx, []FlowMod{flow}); err != nil {
			t.Fatal(err)
		}
		packets(10) // a replacement counts on ...
		flow.Flags = FlagResetCounts
		if err := x.Bundle(ctx, []FlowMod{flow}); err != nil {
			t.Fatal(err)
		}
		packets(0) // ... unless it is told not to
	})

	run("ports and flows come and go", func(t *testing.T) {
		s.vsctl("add-port", "br0", "p9", "--", "set", "interface", "p9", "type=internal", "ofport_request=9")
		if m := next[*PortStatus](t, x); m.Reason != PortAdded || m.Desc.Port != 9 || m.Desc.Name != "p9" {
			t.Errorf("got %+v", m)
		}
		s.vsctl("del-port", "p9")
		for {
			m := next[*PortStatus](t, x)
			if m.Reason == PortModified {
				continue
			}
			if m.Reason != PortDeleted || m.Desc.Port != 9 {
				t.Errorf("got %+v", m)
			}
			break
		}
		flow := FlowMod{Cookie: 77, Flags: FlagSendFlowRemoved, Match: Match{Reg(3, 1), InPort(1)}}
		if err := x.Bundle(ctx, []FlowMod{flow}); err != nil {
			t.Fatal(err)
		}
		if err := x.Bundle(ctx, []FlowMod{{Command: FlowDelete, Cookie: 77, CookieMask: ^uint64(0), Table: TableAll}}); err != nil {
			t.Fatal(err)
		}
		if m := next[*FlowRemoved](t, x); m.Cookie != 77 || m.Reason != RemovedDelete || len(m.Match) != 2 {
			t.Errorf("got %+v", m)
		}
	})

	run("management socket", func(t *testing.T) {
		c, err := net.Dial("unix", s.path("br0.mgmt"))
		if err != nil {
			t.Fatal(err)
		}
		y := serve(ctx, t, c)
		if err := y.EnableAsync(ctx); err != nil {
			t.Fatal(err)
		}
		if err := y.Bundle(ctx, []FlowMod{{Match: Match{InPort(1)}, Instructions: apply(Controller{UserData: []byte{1}})}}); err != nil {
			t.Fatal(err)
		}
		s.settle()
		f := frame(9, 1000, "both")
		s.send(1, f)
		for _, z := range []*session{x, y} {
			if in := z.packetIn(t); !bytes.Equal(in.Data, f) || string(in.UserData) != "\x01" {
				t.Errorf("got %+v", in)
			}
		}
	})

	run("another version", func(t *testing.T) {
		s.vsctl("add-br", "br1", "--", "set", "bridge", "br1", "datapath_type=netdev", "protocols=OpenFlow10,OpenFlow13")
		c, err := net.Dial("unix", s.path("br1.mgmt"))
		if err != nil {
			t.Fatal(err)
		}
		_, err = NewConn(c, Options{}).Handshake(ctx)
		if err == nil || !strings.Contains(err.Error(), "it speaks OpenFlow 1.0, OpenFlow 1.3, but OpenFlow 1.5 is needed") {
			t.Errorf("got %v", err)
		}
		t.Log(err)
	})

	run("the switch dies", func(t *testing.T) {
		if err := s.main.Process.Signal(syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		errs := make(chan error, 3)
		var started sync.WaitGroup
		started.Add(3)
		go func() { started.Done(); errs <- x.Barrier(ctx) }()
		go func() { started.Done(); errs <- x.Bundle(ctx, []FlowMod{{Match: Match{InPort(1)}}}) }()
		go func() { started.Done(); _, err := x.FlowStats(ctx, FlowStatsRequest{}); errs <- err }()
		started.Wait()
		if err := s.main.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if err := <-errs; err == nil || !strings.Contains(err.Error(), "connection with the switch") {
				t.Errorf("got %v", err)
			}
		}
		err := <-x.served
		if err == nil {
			t.Error("served without an error")
		}
		t.Log(err)
		if err := x.Send(&EchoRequest{}); err == nil {
			t.Error("sent on a closed connection")
		}
	})
}

func mac(last byte) net.HardwareAddr {
	if last == 1 {
		return net.HardwareAddr{1, 0, 0, 0, 0, 0}
	}
	return net.HardwareAddr{2, 0, 0, 0, 0, last}
}

// everyFlow uses every field, action and instruction. The cookies tell the flows apart.
func everyFlow() []FlowMod {
	v4, v6 := netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("fd00::/64")
	flows := []FlowMod{
		{Match: Match{InPort(1)}, Instructions: apply(load(0, 1), load(1, 255), Resubmit{Table: 10})},
		{Match: Match{InPort(PortLocal)}, Priority: 65535},
		{Table: 10, Priority: 200, Match: Match{Reg(0, 1), EthDst(mac(2))}, Instructions: apply(load(2, 2), Resubmit{Table: 20})},
		{Table: 10, Priority: 100, Match: Match{Reg(0, 1), Reg(4, 0)}, Instructions: apply(Resubmit{InPort: 3}, Resubmit{Table: TableAll, InPort: PortLocal})},
		{Table: 10, Match: Match{RegMasked(5, 3, 3), RegMasked(15, 0x80000000, 0x80000000), Reg(6, 6), Reg(7, 7)}},
		{Table: 20, Priority: 300, Match: Match{Reg(2, 1)}, Instructions: apply(toController)},
		{Table: 20, Match: Match{EthSrc(mac(3)), EthDstMasked(mac(1), mac(1))}, Instructions: apply(Output{Port: 1}, toController, Output{Port: PortInPort})},
		{Table: 20, Match: Match{EthSrcMasked(mac(3), mac(7)), EthType(0x88b5)}, Instructions: apply(Controller{UserData: []byte{1, 2, 0xff}, MaxLen: 128, ControllerID: 5, Reason: ReasonInvalidTTL})},
		{Table: 30, Match: Match{TunnelID(0x1234)}, Instructions: apply(
			CopyField{Src: FieldTunnelID, SrcOffset: 8, Dst: FieldReg(0), Bits: 16},
			CopyField{Src: FieldTunnelID, Dst: FieldReg(1), DstOffset: 31, Bits: 1},
			CopyField{Src: FieldReg(9), Dst: FieldReg(10), Bits: 32},
		)},
		{Table: 30, Match: Match{TunnelIDMasked(0x100, 0xffff00), TunnelSrc(netip.MustParseAddr("172.31.0.1")), TunnelDst(netip.MustParseAddr("172.31.0.2"))}, Instructions: apply(
			SetField{Field: TunnelID(7)}, SetField{Field: TunnelIDMasked(0x500, 0xff00)}, SetField{Field: RegMasked(3, 1, 1)},
			SetField{Field: EthDst(mac(9))}, Output{Port: 3},
		)},
		{Table: 31, Match: Match{VLANVID(5), VLANPCP(3)}, Instructions: apply(PopVLAN{})},
		{Table: 31, Match: Match{VLANPresent()}, Instructions: apply(PopVLAN{}, PushVLAN{EthType: 0x88a8}, SetField{Field: VLANVID(7)}, Output{Port: PortFlood}, Output{Port: PortAll})},
		{Table: 31, Match: Match{VLANAbsent()}, Instructions: apply(Output{Port: PortNormal})},
		{Table: 32, Match: Match{EthType(0x0800), IPSrc(v4), IPDst(netip.MustParsePrefix("10.1.2.3/32")), IPProto(6), TCPSrc(80)}, Instructions: apply(SetField{Field: TCPDst(8080)})},
		{Table: 32, Match: Match{EthType(0x86dd), IPSrc(v6), IPProto(17), UDPDst(53)}, Instructions: apply(SetField{Field: UDPSrc(9)})},
		{Table: 32, Match: Match{EthType(0x0806), ARPOp(1), ARPTPA(v4), ARPSPA(v4)}},
		{Table: 33, Match: Match{Metadata(5)}, Instructions: []Instruction{
			ApplyActions{[]Action{load(1, 1)}}, ClearActions{}, WriteActions{[]Action{Output{Port: 2}}},
			WriteMetadata{Value: 0x100, Mask: 0xff00}, GotoTable{Table: 34},
		}},
		{Table: 34, Match: Match{MetadataMasked(0x100, 0xff00)}, IdleTimeout: 100, HardTimeout: 200, Importance: 9,
			Flags: FlagSendFlowRemoved, Instructions: []Instruction{WriteMetadata{Value: 1, Mask: ^uint64(0)}}},
		{Table: 35, Match: Match{field32(FieldPacketMark, 3)}, Instructions: apply(
			Clone{Actions: []Action{load(0, 3), Clone{Actions: []Action{Output{Port: 1}}}, Output{Port: 2}}},
			OutputReg{Src: FieldReg(2), Bits: 16}, OutputReg{Src: FieldReg(2), Offset: 16, Bits: 16},
			SetField{Field: field32(FieldPacketMark, 0x10)},
		)},
		{Table: 36, Match: Match{InPort(2), Reg(0, 0), Reg(1, 0), Reg(14, 1)}},
	}
	for i := range flows {
		flows[i].Cookie = 0xabc000 + uint64(i)
		flows[i].OutPort, flows[i].OutGroup = PortAny, GroupAny
	}
	return flows
}

// sortedMatch returns the flow mod with the fields of its match in the order
// that they have in like, and the zero instructions that mean a drop as there.
func sortedMatch(m, like FlowMod) FlowMod {
	m.Match = slices.Clone(m.Match)
	slices.SortStableFunc(m.Match, func(a, b Field) int {
		return slices.Index(like.Match, a) - slices.Index(like.Match, b)
	})
	return m
}
