package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netns"
)

const outside = `
version: 1
slice: outside
sites: {here: {hosts: [h1, h2]}}
networks:
  lan: {subnet: 10.30.0.0/24, gateway: nat}
  held: {subnet: 10.31.0.0/24, gateway: {nat: 10.31.0.254}, external: hold}
nodes:
  near: {host: h1, image: mpi, memory: 128MiB, interfaces: [{network: lan, address: 10.30.0.1/24}, {network: held, address: 10.31.0.1/24}]}
  far:  {host: h2, image: mpi, memory: 128MiB, interfaces: [{network: lan, address: 10.30.0.2/24}]}
`

// namespace runs f in a network namespace.
func namespace(t *testing.T, name string, f func() error) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread goes with the goroutine
		ns, err := netns.GetFromName(name)
		if err == nil {
			defer ns.Close()
			if err = netns.Set(ns); err == nil {
				err = f()
			}
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// Guests on both hosts reach a server outside, whose machine is joined by a cable
// to that of violin; a connection outlives a live snapshot; after a restore there
// are new ones.
func TestOutside(t *testing.T) {
	if os.Getenv("VIOLIN_E2E") != "1" {
		t.Skip("runs real VMs and switches, as root: set VIOLIN_E2E=1")
	}
	inside, world := fmt.Sprintf("violin-in-%d", os.Getpid()), fmt.Sprintf("violin-out-%d", os.Getpid())
	ip := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v: %s", strings.Join(args, " "), err, out)
		}
	}
	for _, ns := range []string{inside, world} {
		ip("netns", "add", ns)
		t.Cleanup(func() { ip("netns", "del", ns) })
		ip("-n", ns, "link", "set", "lo", "up")
	}
	ip("-n", inside, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", world)
	for ns, address := range map[string]string{inside: "192.0.2.2/24", world: "192.0.2.1/24"} {
		ip("-n", ns, "address", "add", address, "dev", "cable")
		ip("-n", ns, "link", "set", "cable", "up")
	}
	ip("-n", world, "address", "add", "192.0.2.3/24", "dev", "cable")
	listener := func(ns string) (l net.Listener) {
		namespace(t, ns, func() (err error) {
			l, err = net.Listen("tcp4", ":80")
			return err
		})
		return l
	}
	serve := func(l net.Listener) {
		s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/stream" {
				fmt.Fprint(w, "from outside") //nolint:errcheck // the guest sees
				return
			}
			for n := 0; r.Context().Err() == nil; n++ {
				fmt.Fprintln(w, n)       //nolint:errcheck // the guest sees
				w.(http.Flusher).Flush() // so that there are frames all the time
				time.Sleep(2 * time.Millisecond)
			}
		})}
		go s.Serve(l) //nolint:errcheck // it ends when it is closed
		t.Cleanup(func() { s.Close() })
	}
	heard := make(chan string, 100)
	namespace(t, world, func() error {
		c, err := net.ListenPacket("udp4", ":9")
		if err != nil {
			return err
		}
		t.Cleanup(func() { c.Close() })
		go func() {
			buf := make([]byte, 100)
			for {
				n, _, err := c.ReadFrom(buf)
				if err != nil {
					return
				}
				heard <- strings.TrimSpace(string(buf[:n]))
			}
		}()
		return nil
	})
	serve(listener(world))
	serve(listener(inside)) // which no guest may reach

	dirs, runDir := begin(t)
	file := filepath.Join(runDir, "outside.yaml")
	if err := os.WriteFile(file, []byte(outside), 0o600); err != nil {
		t.Fatal(err)
	}
	// The server is a child of the command that needs it, so it is in there too.
	up := exec.CommandContext(t.Context(), "nsenter", append(append([]string{"--net=/run/netns/" + inside, filepath.Join(root, "bin/violin")}, dirs...), "up", file)...)
	if out, err := up.CombinedOutput(); err != nil {
		t.Fatalf("up: %v: %s", err, out)
	}
	sh := func(node, line string) (string, error) {
		out, err := command(t, dirs, "exec", "outside/"+node, "--", "sh", "-c", line)
		return strings.TrimSpace(string(out)), err
	}
	reach := func(when string) {
		t.Helper()
		for _, node := range []string{"near", "far"} {
			if got, err := sh(node, "timeout 30 busybox wget -q -O- http://192.0.2.1/"); err != nil || got != "from outside" {
				t.Errorf("%s: %s gets %q, %v", when, node, got, err)
			}
		}
	}
	reach("after boot")
	for _, own := range []string{"192.0.2.2", "10.30.0.3"} { // of the machine, of the gateway
		if got, err := sh("far", "timeout 30 busybox wget -q -O- http://"+own+"/ || echo refused"); err != nil || got != "refused" {
			t.Errorf("what listens on this machine: a guest gets %q of %s, %v", got, own, err)
		}
	}
	if got, err := sh("far", "cat /etc/resolv.conf; ping -c 1 -W 20 10.30.0.3 >/dev/null && echo answers"); err != nil || got != "nameserver 10.30.0.3\nanswers" {
		t.Errorf("resolver and ping: %q, %v", got, err)
	}

	if _, err := sh("far", "busybox wget -q -O /var/lib/violin/stream http://192.0.2.1/stream >/dev/null 2>&1 </dev/null &"); err != nil {
		t.Fatal(err)
	}
	line := func() int {
		t.Helper()
		got, err := sh("far", "tail -n 2 /var/lib/violin/stream | head -n 1")
		if err != nil {
			t.Fatal(err)
		}
		n, _ := strconv.Atoi(got) // none yet
		return n
	}
	grows := func(than int) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); line() <= than; time.Sleep(100 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("the stream stands still at line %d", than)
			}
		}
	}
	grows(100)

	// What goes out by the other network is heard when a snapshot covers it, and what a
	// restore takes back, never.
	send := func(text, to string) {
		t.Helper()
		if _, err := sh("near", fmt.Sprintf("bash -c 'echo %s >/dev/udp/%s/9'", text, to)); err != nil {
			t.Fatal(err)
		}
	}
	hears := func(want string) {
		t.Helper()
		select {
		case got := <-heard:
			if got != want {
				t.Fatalf("the outside hears %q, want %q", got, want)
			}
		case <-time.After(time.Minute):
			t.Fatalf("the outside does not hear %q", want)
		}
	}
	if _, err := sh("near", "ip route add 192.0.2.3/32 via 10.31.0.254"); err != nil {
		t.Fatal(err)
	}
	send("held", "192.0.2.3")
	send("passed", "192.0.2.1")
	hears("passed")
	var snap struct{ ID, FramesDropped string }
	if err := json.Unmarshal(must(t, dirs, "snapshot", "outside", "--output", "json"), &snap); err != nil {
		t.Fatal(err)
	}
	if snap.FramesDropped != "0" {
		t.Errorf("%s frames dropped", snap.FramesDropped)
	}
	grows(line() + 100) // numbers go on only on the same connection
	hears("held")
	send("undone", "192.0.2.3")
	must(t, dirs, "restore", "outside@"+snap.ID)
	reach("after the restore")
	send("after", "192.0.2.3")
	must(t, dirs, "snapshot", "outside")
	hears("after")
}
