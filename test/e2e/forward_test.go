package e2e

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"violin/internal/lab"
)

// served has a service on the host that the gateway is not on.
const served = `version: 1
slice: svc
sites: {here: {hosts: [h1, h2]}}
networks:
  lan: {subnet: 10.40.0.0/24, gateway: nat}
nodes:
  near: {host: h1, image: mpi, memory: 96MiB, interfaces: [{network: lan, address: 10.40.0.1/24}]}
  web:
    host: h2
    image: mpi
    memory: 96MiB
    interfaces: [{network: lan, address: 10.40.0.2/24}]
    forwards: ["PORT:80", "0:53/udp"]
`

// serves starts services in a node: one numbers each line of a connection, the other
// answers datagrams, both with what is in /run/mark.
func serves(t *testing.T, dirs []string, node string) {
	t.Helper()
	booted(t, dirs, node)
	sh(t, dirs, node, `echo original >/run/mark
cat >/run/serve.pl <<'END'
use IO::Socket::INET;
sub mark { open my $f, "<", "/run/mark"; my $m = <$f>; chomp $m; return $m }
$SIG{CHLD} = "IGNORE";
if (!fork) {
	my $u = IO::Socket::INET->new(LocalPort => 53, Proto => "udp") or die $!;
	while (defined $u->recv(my $b, 1500)) { $u->send(mark() . " $b") }
	exit;
}
my $l = IO::Socket::INET->new(LocalPort => 80, Listen => 5, ReuseAddr => 1) or die $!;
while (my $c = $l->accept) {
	next if fork;
	$c->autoflush(1);
	my $n = 0;
	while (defined(my $x = <$c>)) { $n++; print $c "$n " . mark() . " $x" }
	exit;
}
END
(perl /run/serve.pl >/run/serve.log 2>&1 </dev/null &)
i=0
until grep -q ':0035 ' /proc/net/udp && grep -q ':0050 ' /proc/net/tcp; do
	sleep 0.2; i=$((i + 1)); [ $i -lt 200 ] || { cat /run/serve.log; exit 1; }
done`)
}

// talk is a connection to a service.
type talk struct {
	net.Conn
	r *bufio.Reader
}

// call connects to a service, and again until it is answered. dial may be nil.
func call(t *testing.T, at string, dial func(string, string) (net.Conn, error)) *talk {
	t.Helper()
	if dial == nil {
		dial = net.Dial
	}
	var last error
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
		c, err := dial("tcp4", at)
		if err != nil {
			last = err
			continue
		}
		k := &talk{c, bufio.NewReader(c)}
		if _, last = k.say("hello"); last == nil {
			t.Cleanup(func() { c.Close() })
			return k
		}
		c.Close()
	}
	t.Fatalf("nothing answers at %s: %v", at, last)
	return nil
}

func (k *talk) say(text string) (string, error) {
	if err := k.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		return "", err
	}
	if _, err := fmt.Fprintln(k, text); err != nil {
		return "", err
	}
	line, err := k.r.ReadString('\n')
	return strings.TrimSpace(line), err
}

// query asks by UDP, until it is answered.
func query(t *testing.T, at, text string, dial func(string, string) (net.Conn, error)) string {
	t.Helper()
	if dial == nil {
		dial = net.Dial
	}
	c, err := dial("udp4", at)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	buf := make([]byte, 1500)
	for range 60 {
		if _, err = c.Write([]byte(text)); err == nil {
			err = c.SetReadDeadline(time.Now().Add(time.Second))
		}
		if err == nil {
			var n int
			if n, err = c.Read(buf); err == nil {
				return string(buf[:n])
			}
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Fatalf("nothing answers datagrams at %s: %v", at, err)
	return ""
}

// freePort is a port that nobody listens at just now.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

// forwarded is where the forwards of a slice's nodes listen, such as "80/tcp".
func forwarded(t *testing.T, dirs []string, name string) map[string]string {
	t.Helper()
	var list struct {
		Slices []struct {
			Nodes []struct {
				Forwards []struct {
					Protocol, Listen, Problem string
					Port                      int
					Listening                 bool
				}
			}
		}
	}
	if err := json.Unmarshal(must(t, dirs, "ps", name, "--output", "json"), &list); err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	for _, n := range list.Slices[0].Nodes {
		for _, f := range n.Forwards {
			at := f.Listen
			if !f.Listening {
				at = "(" + at + ")" + f.Problem
			}
			all[fmt.Sprintf("%d/%s", f.Port, f.Protocol)] = at
		}
	}
	return all
}

// unheard tells whether a connection is refused.
func unheard(at string) bool {
	c, err := net.Dial("tcp4", at)
	if err == nil {
		c.Close()
	}
	return errors.Is(err, syscall.ECONNREFUSED)
}

// A node's ports are reached from the machine, across a snapshot, after a restore, and of
// a fork beside its original.
func TestForward(t *testing.T) {
	dirs, runDir := begin(t)
	write := func(name, text string) string {
		t.Helper()
		file := filepath.Join(runDir, name+".yaml")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	// says runs what has to be refused, and returns why it is.
	says := func(args ...string) string {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), filepath.Join(root, "bin/violin"), append(slices.Clone(dirs), args...)...).CombinedOutput()
		if err == nil {
			t.Errorf("violin %s: it was not refused", strings.Join(args, " "))
		}
		return string(out)
	}
	port := freePort(t)
	at := "127.0.0.1:" + port
	file := write("svc", strings.ReplaceAll(served, "PORT", port))
	squatter, err := net.Listen("tcp4", at)
	if err != nil {
		t.Fatal(err)
	}
	if why := says("up", file); !strings.Contains(why, "svc.yaml:13:16: ") || !strings.Contains(why, "taken") {
		t.Errorf("a port that is taken: %s", why)
	}
	squatter.Close()
	must(t, dirs, "up", file)
	other := strings.ReplaceAll(strings.Replace(served, "slice: svc", "slice: other", 1), `"PORT:80"`, `"0.0.0.0:`+port+`:80"`)
	if why := says("up", write("other", other)); !strings.Contains(why, "other.yaml:13:16: ") || !strings.Contains(why, `slice "svc" forwards it to node "web"`) {
		t.Errorf("a port that a slice has: %s", why)
	}
	serves(t, dirs, "svc/web")
	own := forwarded(t, dirs, "svc")
	if own["80/tcp"] != at || own["53/udp"] == "" {
		t.Fatalf("forwards: %v", own)
	}
	if got := query(t, own["53/udp"], "name", nil); got != "original name" {
		t.Errorf("a datagram is answered with %q", got)
	}

	// A connection from outside goes on through a snapshot, without a line too few.
	k := call(t, at, nil)
	stop, said := make(chan struct{}), make(chan error, 1)
	go func() {
		for n := 2; ; n++ {
			select {
			case <-stop:
				said <- nil
				return
			default:
			}
			if got, err := k.say("line"); err != nil || got != fmt.Sprintf("%d original line", n) {
				said <- fmt.Errorf("line %d is answered with %q, %v", n, got, err)
				return
			}
		}
	}()
	must(t, dirs, "snapshot", "svc", "--tag", "one")
	verified(t, dirs, "svc@one")
	close(stop)
	if err := <-said; err != nil {
		t.Error(err)
	}
	sh(t, dirs, "svc/web", "echo later >/run/mark")
	if got, err := k.say("after"); err != nil || !strings.HasSuffix(got, " later after") {
		t.Errorf("after the snapshot: %q, %v", got, err)
	}

	// A fork beside it, by ports of its own, which stay with it.
	chosen := freePort(t)
	if why := says("fork", "svc@one", "--as", "twin", "--forward", "web="+port+":80"); !strings.Contains(why, `slice "svc" forwards it`) {
		t.Errorf("a fork at the original's port: %s", why)
	}
	if out := string(must(t, dirs, "fork", "svc@one", "--as", "twin", "--forward", "web="+chosen+":80")); !strings.Contains(out, "127.0.0.1:"+chosen) {
		t.Errorf("the fork's output does not say where it listens: %s", out)
	}
	twin := forwarded(t, dirs, "twin")
	if twin["80/tcp"] != "127.0.0.1:"+chosen || twin["53/udp"] == own["53/udp"] || twin["53/udp"] == "" {
		t.Errorf("the fork's forwards: %v, the original's %v", twin, own)
	}
	// It falls back to where it began, with the edge that it has.
	kill(t, slice(t, dirs, "twin").Nodes[1].PID)
	must(t, dirs, "protect", "twin", "--every", "1h")
	await(t, "the fork is rolled back", func() bool { return strings.Contains(string(must(t, dirs, "events", "twin")), "rolled-back") })
	must(t, dirs, "unprotect", "twin")
	if again := forwarded(t, dirs, "twin"); again["80/tcp"] != twin["80/tcp"] || again["53/udp"] != twin["53/udp"] {
		t.Errorf("the fork's forwards are %v after it fell back, and were %v", again, twin)
	}
	sh(t, dirs, "twin/web", "echo twin >/run/mark")
	for listen, want := range map[string]string{at: "later", twin["80/tcp"]: "twin"} {
		if got, err := call(t, listen, nil).say("who"); err != nil || got != "2 "+want+" who" {
			t.Errorf("%s: %q, %v; want %s", listen, got, err, want)
		}
	}
	for listen, want := range map[string]string{own["53/udp"]: "later", twin["53/udp"]: "twin"} {
		if got := query(t, listen, "who", nil); got != want+" who" {
			t.Errorf("%s: %q, want %s", listen, got, want)
		}
	}
	must(t, dirs, "snapshot", "twin")
	must(t, dirs, "restore", "twin@latest")
	if again := forwarded(t, dirs, "twin"); again["80/tcp"] != twin["80/tcp"] || again["53/udp"] != twin["53/udp"] {
		t.Errorf("the fork's forwards are %v after a restore, and were %v", again, twin)
	}
	if got, err := call(t, twin["80/tcp"], nil).say("who"); err != nil || got != "2 twin who" {
		t.Errorf("the restored fork: %q, %v", got, err)
	}
	must(t, dirs, "down", "twin")
	if !unheard(twin["80/tcp"]) {
		t.Error("something listens for a fork that is down")
	}

	// After a restore there are new connections, at the same ports.
	must(t, dirs, "restore", "svc@one")
	if got, err := k.say("still there"); err == nil {
		t.Errorf("a connection from before a restore is answered with %q", got)
	}
	if now := forwarded(t, dirs, "svc"); now["80/tcp"] != at || now["53/udp"] != own["53/udp"] {
		t.Errorf("forwards are %v after a restore, and were %v", now, own)
	}
	if got, err := call(t, at, nil).say("who"); err != nil || got != "2 original who" {
		t.Errorf("after the restore: %q, %v", got, err)
	}

	// A slice that is suspended has no port, and comes back when it can have it.
	must(t, dirs, "suspend", "svc")
	if s := forwarded(t, dirs, "svc"); s["80/tcp"] != "("+at+")" {
		t.Errorf("forwards of a suspended slice: %v", s)
	}
	if squatter, err = net.Listen("tcp4", at); err != nil {
		t.Fatal(err)
	}
	if why := says("resume", "svc"); !strings.Contains(why, "taken") {
		t.Errorf("a resume without its port: %s", why)
	}
	squatter.Close()
	must(t, dirs, "resume", "svc")
	if got, err := call(t, at, nil).say("who"); err != nil || got != "2 original who" {
		t.Errorf("after the resume: %q, %v", got, err)
	}
	must(t, dirs, "replay", "svc@one", "--as", "autopsy")
	if f := forwarded(t, dirs, "autopsy"); len(f) > 0 {
		t.Errorf("a replay is forwarded to: %v", f)
	}
	must(t, dirs, "down", "--all")
	if !unheard(at) {
		t.Error("something listens for a slice that is down")
	}
}

// Of a slice on a host that has joined, the forwards are on that host, and outlive its agent.
func TestForwardJoined(t *testing.T) {
	dirs, dir := begin(t)
	l, err := lab.New(t.Context(), lab.Config{
		Sites: []lab.Site{{Name: "west", Hosts: []string{"alpha", "office"}}}, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	office, alpha := l.Host("office"), l.Host("alpha")
	cable(t, office, alpha, 0)
	server := spawn(t, office, append([]string{"server", "--listen", ":7000"}, dirs...)...)
	await(t, "the server serves", func() bool { return strings.Contains(server.said(), "msg=serving") })
	token := strings.TrimSpace(string(must(t, dirs, "token", "create", "--ttl", "5m")))
	own := filepath.Join(dir, "alpha")
	if err := os.MkdirAll(filepath.Join(own, "state"), 0o700); err != nil {
		t.Fatal(err)
	}
	images, err := filepath.EvalSymlinks(filepath.Join(dir, "state", "images"))
	if err == nil {
		err = os.Symlink(images, filepath.Join(own, "state", "images"))
	}
	if err != nil {
		t.Fatal(err)
	}
	join := func() *process {
		return spawn(t, alpha, "agent", "--join", token+"@10.99.0.1:7000", "--name", "alpha", "--underlay", alpha.UnderlayDevice,
			"--underlay-address", alpha.UnderlayAddr.String(), "--run-dir", own, "--state-dir", filepath.Join(own, "state"))
	}
	connected := func(want string) func() bool {
		return func() bool {
			return strings.Contains(string(must(t, dirs, "hosts", "--output", "json")), `"connected": `+want)
		}
	}
	agent := join()
	await(t, "the agent is connected", connected("true"))

	file := filepath.Join(dir, "svc.yaml")
	text := strings.NewReplacer("h1, h2", "alpha", "h1", "alpha", "h2", "alpha", "PORT", "8080").Replace(served)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	dial := func(network, address string) (c net.Conn, err error) {
		err = alpha.Do(func() error {
			c, err = net.Dial(network, address)
			return err
		})
		return c, err
	}
	var squatter net.Listener
	if err := alpha.Do(func() (err error) { squatter, err = net.Listen("tcp4", "127.0.0.1:8080"); return err }); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), filepath.Join(root, "bin/violin"), append(slices.Clone(dirs), "up", file)...).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "svc.yaml:13:16: ") || !strings.Contains(string(out), "host alpha") {
		t.Errorf("a port that is taken on the host: %v: %s", err, out)
	}
	squatter.Close()
	must(t, dirs, "up", file)
	serves(t, dirs, "svc/web")
	before := forwarded(t, dirs, "svc")
	if before["80/tcp"] != "127.0.0.1:8080" {
		t.Fatalf("forwards: %v", before)
	}
	k := call(t, "127.0.0.1:8080", dial)
	must(t, dirs, "snapshot", "svc", "--tag", "one")
	if got, err := k.say("after"); err != nil || got != "2 original after" {
		t.Errorf("after a snapshot: %q, %v", got, err)
	}
	if got := query(t, before["53/udp"], "name", dial); got != "original name" {
		t.Errorf("a datagram is answered with %q", got)
	}

	_ = agent.cmd.Process.Signal(syscall.SIGTERM) // it leaves what runs
	<-agent.done
	await(t, "the agent is gone", connected("false"))
	join()
	await(t, "the next agent is there", connected("true"))
	if after := forwarded(t, dirs, "svc"); after["80/tcp"] != before["80/tcp"] || after["53/udp"] != before["53/udp"] {
		t.Errorf("forwards are %v with the next agent, and were %v", after, before)
	}
	if got, err := call(t, "127.0.0.1:8080", dial).say("who"); err != nil || got != "2 original who" {
		t.Errorf("with the next agent: %q, %v", got, err)
	}
	// So does the next server.
	_ = server.cmd.Process.Signal(syscall.SIGTERM)
	<-server.done
	server = spawn(t, office, append([]string{"server", "--listen", ":7000"}, dirs...)...)
	await(t, "the next server has the host", func() bool {
		return strings.Contains(server.said(), "msg=serving") && connected("true")()
	})
	if after := forwarded(t, dirs, "svc"); after["80/tcp"] != before["80/tcp"] || after["53/udp"] != before["53/udp"] {
		t.Errorf("forwards are %v with the next server, and were %v", after, before)
	}
	if err := os.WriteFile(file, []byte(strings.Replace(text, "slice: svc", "slice: other", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err = exec.CommandContext(t.Context(), filepath.Join(root, "bin/violin"), append(slices.Clone(dirs), "up", file)...).CombinedOutput()
	if err == nil || !strings.Contains(string(out), `slice "svc" forwards it to node "web"`) {
		t.Errorf("a port that a slice has: %v: %s", err, out)
	}
	must(t, dirs, "fork", "svc@one", "--as", "twin")
	twin := forwarded(t, dirs, "twin")
	sh(t, dirs, "twin/web", "echo twin >/run/mark")
	if got, err := call(t, twin["80/tcp"], dial).say("who"); err != nil || got != "2 twin who" {
		t.Errorf("a fork on the host: %q, %v", got, err)
	}
	must(t, dirs, "down", "twin")
	must(t, dirs, "restore", "svc@one")
	if got, err := call(t, "127.0.0.1:8080", dial).say("who"); err != nil || got != "2 original who" {
		t.Errorf("after a restore: %q, %v", got, err)
	}
	clocks(t, dirs)
	replayed(t, dirs, dial)
	must(t, dirs, "down", "svc")
	if c, err := dial("tcp4", "127.0.0.1:8080"); err == nil {
		c.Close()
		t.Error("something listens for a slice that is down")
	}
	held(t, dirs, filepath.Join(dir, "held.yaml"), dial)
}

// year is that of a node's wall clock.
func year(t *testing.T, dirs []string, node string) string {
	t.Helper()
	return sh(t, dirs, node, "date +%Y")
}

// clocks brings the slice svc back under either policy.
func clocks(t *testing.T, dirs []string) {
	t.Helper()
	sh(t, dirs, "svc/web", "date -s 2001-02-03 >/dev/null")
	must(t, dirs, "snapshot", "svc", "--tag", "old")
	now := fmt.Sprint(time.Now().Year())
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"restore", "svc@old"}, "2001"},
		{[]string{"restore", "svc@old", "--clock", "catch-up"}, now},
	} {
		must(t, dirs, c.args...)
		if got := year(t, dirs, "svc/web"); got != c.want {
			t.Errorf("%s: it is %s, want %s", strings.Join(c.args, " "), got, c.want)
		}
	}
	sh(t, dirs, "svc/web", "date -s 2001-02-03 >/dev/null")
	must(t, dirs, "suspend", "svc")
	must(t, dirs, "resume", "svc")
	if got := year(t, dirs, "svc/web"); got != now {
		t.Errorf("a resumed slice has the year %s", got)
	}
}

// replayed has a replay of the slice svc beside it: it stands still, and then reaches
// nothing outside, which the original does.
func replayed(t *testing.T, dirs []string, dial func(string, string) (net.Conn, error)) {
	t.Helper()
	must(t, dirs, "replay", "svc@old", "--as", "autopsy", "--forward", "web=0:80")
	for _, n := range slice(t, dirs, "autopsy").Nodes {
		if n.State != "NODE_STATE_PAUSED" {
			t.Errorf("a replay: %s is %s", n.Name, n.State)
		}
	}
	must(t, dirs, "continue", "autopsy")
	const reach = "timeout 20 bash -c 'exec 3<>/dev/tcp/10.99.0.1/7000' 2>/dev/null && echo open || echo closed"
	for name, want := range map[string]string{"svc": "open", "autopsy": "closed"} {
		if got := sh(t, dirs, name+"/web", reach); got != want {
			t.Errorf("to %s the outside is %s, want %s", name, got, want)
		}
	}
	if got := year(t, dirs, "autopsy/web"); got != "2001" {
		t.Errorf("a replay has the year %s", got)
	}
	if got, err := call(t, forwarded(t, dirs, "autopsy")["80/tcp"], dial).say("who"); err != nil || got != "2 original who" {
		t.Errorf("a replay is looked into: %q, %v", got, err)
	}
	must(t, dirs, "down", "autopsy")
}

// held has a slice whose answers wait for snapshots.
func held(t *testing.T, dirs []string, file string, dial func(string, string) (net.Conn, error)) {
	t.Helper()
	const text = `version: 1
slice: held
sites: {here: {hosts: [alpha]}}
networks: {lan: {subnet: 10.41.0.0/24, gateway: nat, external: hold}}
nodes:
  web: {host: alpha, image: mpi, memory: 96MiB, interfaces: [{network: lan, address: 10.41.0.1/24}], forwards: ["8081:53/udp"]}
`
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	must(t, dirs, "up", file)
	serves(t, dirs, "held/web")
	c, err := dial("udp4", "127.0.0.1:8081")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	buf := make([]byte, 1500)
	// ask sends, and returns what has come within a time.
	ask := func(text string, wait time.Duration) string {
		t.Helper()
		if text != "" {
			if _, err := c.Write([]byte(text)); err != nil {
				t.Fatal(err)
			}
		}
		if err := c.SetReadDeadline(time.Now().Add(wait)); err != nil {
			t.Fatal(err)
		}
		n, _ := c.Read(buf)
		return string(buf[:n])
	}
	if got := ask("one", 3*time.Second); got != "" {
		t.Errorf("an answer that waits has come: %q", got)
	}
	must(t, dirs, "snapshot", "held", "--tag", "one")
	if got := ask("", 30*time.Second); got != "original one" {
		t.Errorf("the snapshot that covers it lets out %q", got)
	}
	if got := ask("two", 3*time.Second); got != "" {
		t.Errorf("an answer that waits has come: %q", got)
	}
	must(t, dirs, "restore", "held@one")
	must(t, dirs, "snapshot", "held")
	if got := ask("", time.Second); got != "" {
		t.Errorf("what a restore has taken back is heard: %q", got)
	}
	must(t, dirs, "down", "held")
}
