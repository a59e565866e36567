// Package etcdtest runs clusters of etcd for tests, each member a process of its own: the
// test's own program, started anew. Its TestMain calls [Main] first.
package etcdtest

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
)

const memberVariable = "VIOLIN_TEST_ETCD_MEMBER"

// member is what a process that is one is told.
type member struct {
	Name, Dir, Client, Peer, Cluster string

	CA, Cert, Key string // files of a member that speaks TLS; its clients must have certificates, too
}

// Main makes this process a member of a cluster, if it was started as one, and does not
// return then.
func Main() {
	text, ok := os.LookupEnv(memberVariable)
	if !ok {
		return
	}
	if err := run(text); err != nil {
		fmt.Fprintln(os.Stderr, "etcd:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func run(text string) error {
	var m member
	if err := json.Unmarshal([]byte(text), &m); err != nil {
		return err
	}
	c := embed.NewConfig()
	c.Name, c.Dir, c.InitialCluster = m.Name, m.Dir, m.Cluster
	c.TickMs, c.ElectionMs = 200, 2000 // tests share their machine with others
	for _, u := range []struct {
		to   *[]url.URL
		text string
	}{{&c.ListenClientUrls, m.Client}, {&c.AdvertiseClientUrls, m.Client}, {&c.ListenPeerUrls, m.Peer}, {&c.AdvertisePeerUrls, m.Peer}} {
		parsed, err := url.Parse(u.text)
		if err != nil {
			return err
		}
		*u.to = []url.URL{*parsed}
	}
	if m.CA != "" {
		tls := transport.TLSInfo{CertFile: m.Cert, KeyFile: m.Key, TrustedCAFile: m.CA, ClientCertAuth: true}
		c.ClientTLSInfo, c.PeerTLSInfo = tls, tls
	}
	c.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	e, err := embed.StartEtcd(c)
	if err != nil {
		return err
	}
	return <-e.Err() // it ends by being killed
}

// Cluster is a cluster of etcd.
type Cluster struct {
	// CA, Cert and Key are files for clients of a cluster that speaks TLS.
	CA, Cert, Key string

	members   []member
	processes []*process // nil for one that does not run
	start     []func(*exec.Cmd) error
}

// process is a member that runs.
type process struct {
	cmd   *exec.Cmd
	ended chan struct{} // closed when it has
}

// Place is a machine, or what stands for one, that has a member of its own.
type Place struct {
	Address netip.Addr
	Start   func(*exec.Cmd) error
}

// Start starts a cluster of n members on the loopback device that start's processes
// have; nil for those of this machine. It ends with the test.
func Start(t *testing.T, n int, start func(*exec.Cmd) error) *Cluster {
	t.Helper()
	if start == nil {
		start = (*exec.Cmd).Start
	}
	c := &Cluster{}
	for range n {
		c.members = append(c.members, member{Client: "http://" + free(t).String(), Peer: "http://" + free(t).String()})
		c.start = append(c.start, start)
	}
	c.run(t, t.TempDir())
	return c
}

// StartAt starts a cluster with a member at each place, which speak TLS, at both ends with
// certificates. It ends with the test.
func StartAt(t *testing.T, places ...Place) *Cluster {
	t.Helper()
	dir := t.TempDir()
	a := NewAuthority(t, dir, "ca")
	c := &Cluster{CA: a.File}
	c.Cert, c.Key = a.Issue(t, "client")
	for i, p := range places {
		m := member{CA: a.File, Client: "https://" + netip.AddrPortFrom(p.Address, free(t).Port()).String(), Peer: "https://" + netip.AddrPortFrom(p.Address, free(t).Port()).String()}
		m.Cert, m.Key = a.Issue(t, fmt.Sprint("member", i), p.Address)
		c.members, c.start = append(c.members, m), append(c.start, p.Start)
	}
	c.run(t, dir)
	return c
}

// run starts all members, until the test ends.
func (c *Cluster) run(t *testing.T, dir string) {
	t.Helper()
	c.processes = make([]*process, len(c.members))
	var cluster []string
	for i := range c.members {
		m := &c.members[i]
		m.Name = fmt.Sprintf("m%d", i)
		m.Dir = filepath.Join(dir, m.Name)
		cluster = append(cluster, m.Name+"="+m.Peer)
	}
	for i := range c.members {
		c.members[i].Cluster = strings.Join(cluster, ",")
		c.Run(t, i)
	}
	t.Cleanup(func() {
		for i := range c.members {
			c.Kill(i)
		}
	})
}

// free is a loopback address and port that nobody listens at now.
func free(t *testing.T) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// Endpoints are the members' URLs.
func (c *Cluster) Endpoints() (all []string) {
	for _, m := range c.members {
		all = append(all, m.Client)
	}
	return all
}

// Run starts a member that does not run.
func (c *Cluster) Run(t *testing.T, i int) {
	t.Helper()
	text, err := json.Marshal(c.members[i])
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), memberVariable+"="+string(text))
	cmd.Stderr = os.Stderr
	// Whoever ends the test ends it, too. The bond is to the thread that starts it, which
	// has to stay for as long.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	p := &process{cmd: cmd, ended: make(chan struct{})}
	started := make(chan error)
	go func() {
		defer close(p.ended)
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := c.start[i](cmd)
		started <- err
		if err == nil {
			_ = cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	c.processes[i] = p
}

// Kill kills a member with SIGKILL.
func (c *Cluster) Kill(i int) {
	if p := c.processes[i]; p != nil {
		_ = p.cmd.Process.Kill()
		<-p.ended
		c.processes[i] = nil
	}
}

// Pause stops a member, as a machine that hangs, and Resume lets it go on.
func (c *Cluster) Pause(i int) { _ = c.processes[i].cmd.Process.Signal(syscall.SIGSTOP) }

// Resume undoes Pause.
func (c *Cluster) Resume(i int) { _ = c.processes[i].cmd.Process.Signal(syscall.SIGCONT) }

// Await waits until f is true, for a minute.
func Await(t *testing.T, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !f(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("in vain: %s", what)
		}
	}
}
