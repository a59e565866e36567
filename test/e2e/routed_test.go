package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

const routed = `
version: 1
slice: routed
sites:
  west: {hosts: [w1, w2]}
  east: {hosts: [e1]}
wan:
  - {between: [west, east], delay: 20ms, jitter: 5ms}
networks:
  left:  {subnet: 10.1.0.0/24}
  right: {subnet: 10.2.0.0/24}
nodes:
  a: {host: w1, image: mpi, memory: 128MiB, interfaces: [{network: left, address: 10.1.0.1/24}, {network: left}]}
  r: {host: w2, image: mpi, memory: 128MiB, interfaces: [{network: left, address: 10.1.0.9/24}, {network: right, address: 10.2.0.9/24}]}
  b: {host: e1, image: mpi, memory: 128MiB, interfaces: [{network: right, address: 10.2.0.1/24}]}
`

// A node routes between two networks, over the WAN, for a node with two interfaces on
// one of them. Nobody sends an echo again: what a cut or a restore loses is missing
// from the numbers in the sender's log, and what it makes is there twice.
func TestRouted(t *testing.T) {
	dirs, runDir := begin(t)
	file := filepath.Join(runDir, "routed.yaml")
	if err := os.WriteFile(file, []byte(routed), 0o600); err != nil {
		t.Fatal(err)
	}
	must(t, dirs, "up", file)
	sh := func(node, line string) (string, error) {
		out, err := command(t, dirs, "exec", "routed/"+node, "--", "sh", "-c", line)
		return string(out), err
	}
	for node, line := range map[string]string{
		"a": "ip route add 10.2.0.0/24 via 10.1.0.9; ip address add fd01::1/64 dev eth0 nodad; ip -6 route add fd02::/64 via fd01::9",
		"b": "ip route add 10.1.0.0/24 via 10.2.0.9; ip address add fd02::1/64 dev eth0 nodad; ip -6 route add fd01::/64 via fd02::9",
		"r": "ip address add fd01::9/64 dev eth0 nodad; ip address add fd02::9/64 dev eth1 nodad; cd /proc/sys/net; " +
			"echo 1 > ipv4/ip_forward; echo 1 > ipv6/conf/all/forwarding; echo 0 > ipv4/icmp_echo_ignore_broadcasts",
	} {
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Second) { // until it has booted
			if _, err := sh(node, line); err == nil {
				break
			} else if time.Now().After(deadline) {
				t.Fatalf("%s: %v", node, err)
			}
		}
	}
	// Who sends what; the answers of the one address are counted.
	pings := []struct{ name, command, from string }{
		{"unicast", "ping -n -i 0.03 10.2.0.1", "10.2.0.1"},
		{"IPv6", "ping -n -6 -i 0.03 fd02::1", "fd02::1"},
		{"fragments", "ping -n -i 0.06 -s 4000 10.2.0.1", "10.2.0.1"},
		{"broadcast", "ping -n -b -i 0.05 10.1.0.255", "10.1.0.9"},
		{"multicast", "ping -n -6 -I eth1 -i 0.05 ff02::1", ""},
	}
	mac, err := sh("r", "ip -6 -br address show dev eth0 scope link")
	if err != nil {
		t.Fatal(err)
	}
	pings[4].from = regexp.MustCompile(`fe80:[0-9a-f:]+`).FindString(mac)
	for _, p := range pings {
		if _, err := sh("a", p.command+" > '/tmp/"+p.name+"' 2>&1 < /dev/null &"); err != nil {
			t.Fatal(err)
		}
	}
	// count returns each sender's last answered echo, all before it having been answered once.
	count := func(when string) map[string]int {
		t.Helper()
		last := map[string]int{}
		for _, p := range pings {
			log, err := sh("a", "cat '/tmp/"+p.name+"'")
			if err != nil {
				t.Fatal(err)
			}
			answers := map[int]int{}
			answer := regexp.MustCompile(`from ` + regexp.QuoteMeta(p.from) + `[%:][^=]*seq=(\d+) .*time=`)
			for line := range strings.Lines(log) {
				if m := answer.FindStringSubmatch(line); m != nil {
					n, _ := strconv.Atoi(m[1])
					answers[n]++
					last[p.name] = max(last[p.name], n)
				}
			}
			if last[p.name] < 20 {
				t.Errorf("%s, %s: nothing is answered: %.500s", when, p.name, log)
			}
			// iputils begins with 1. The last ones may come in another order.
			for n := 1; n < last[p.name]-10; n++ {
				if answers[n] != 1 {
					t.Errorf("%s, %s: echo %d of %d was answered %d times", when, p.name, n, last[p.name], answers[n])
				}
			}
		}
		return last
	}
	time.Sleep(3 * time.Second)
	began := count("before the cuts")
	var ids []string
	for range 3 {
		var snap struct{ ID, FramesDropped, FramesLostByNetwork string }
		if err := json.Unmarshal(must(t, dirs, "snapshot", "routed", "--output", "json"), &snap); err != nil {
			t.Fatal(err)
		}
		if snap.FramesDropped != "0" || snap.FramesLostByNetwork != "0" {
			t.Errorf("cut %s: %s frames dropped, %s lost", snap.ID, snap.FramesDropped, snap.FramesLostByNetwork)
		}
		ids = append(ids, snap.ID)
		verified(t, dirs, "routed@"+snap.ID)
		time.Sleep(time.Second)
	}
	went := count("after the cuts")
	for _, id := range ids[1:] {
		for _, n := range slice(t, dirs, "").Nodes {
			kill(t, n.PID)
		}
		must(t, dirs, "restore", "routed@"+id)
		at := count("at the restore")
		time.Sleep(3 * time.Second)
		after := count("after the restore")
		for _, p := range pings {
			if at[p.name] < began[p.name] || after[p.name] < at[p.name]+20 {
				t.Errorf("%s: last answered: %d at first, %d with the cuts, %d at the restore, %d later", p.name, began[p.name], went[p.name], at[p.name], after[p.name])
			}
		}
	}
}
