package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// single is a slice of one idle node.
const single = `version: 1
slice: NAME
sites: {here: {hosts: [h1]}}
networks: {lan: {subnet: 10.30.0.0/24}}
nodes: {n1: {host: h1, image: mpi, memory: 96MiB, interfaces: [{network: lan, address: 10.30.0.1/24}]}}
`

// refused runs a violin that must end with a status.
func refused(t *testing.T, status int, dirs []string, args ...string) {
	t.Helper()
	exit := (*exec.ExitError)(nil)
	if _, err := command(t, dirs, args...); err == nil || !asExit(err, &exit) || exit.ExitCode() != status {
		t.Errorf("violin %s: %v, want exit status %d", strings.Join(args, " "), err, status)
	}
}

// names are the slices that somebody sees.
func names(t *testing.T, who []string) string {
	t.Helper()
	var list struct {
		Slices []struct{ Name, Owner string }
	}
	if err := json.Unmarshal(must(t, who, "ps", "--output", "json"), &list); err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, s := range list.Slices {
		all = append(all, s.Name+" of "+s.Owner)
	}
	return strings.Join(all, ", ")
}

// Two experimenters and an operator use a server over TLS, each with slices of their own.
func TestUsers(t *testing.T) {
	dirs, dir := begin(t)
	t.Setenv("XDG_CONFIG_HOME", filepath.Join(dir, "config"))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).Port
	l.Close()
	server := launch(t, (*exec.Cmd).Start, append([]string{"server", "--listen", fmt.Sprintf(":%d", port)}, dirs...)...)
	await(t, "the server serves", func() bool { return strings.Contains(server.said(), "msg=serving") })

	// Each by another address of the server, under which the login is kept.
	login := func(name, role, host string) []string {
		token := strings.TrimSpace(string(must(t, dirs, "token", "create", "--ttl", "5m", "--user", name, "--role", role)))
		address := fmt.Sprintf("%s:%d", host, port)
		must(t, nil, "login", token+"@"+address)
		return []string{"--server", address}
	}
	alice, bob, op := login("alice", "experimenter", "127.0.0.1"), login("bob", "experimenter", "localhost"), login("op", "operator", "127.0.0.2")
	if got := string(must(t, nil, "whoami")); !strings.HasPrefix(got, "operator on 127.0.0.2:") { // the last login
		t.Error(got)
	}

	file := filepath.Join(dir, "topology.yaml")
	topology := func(text string) string {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	must(t, alice, "up", topology(strings.Replace(single, "NAME", "hers", 1)))
	must(t, bob, "up", topology(strings.Replace(single, "NAME", "his", 1)))
	refused(t, 5, alice, "up", file) // the name is bob's
	refused(t, 7, alice, "up", topology(strings.NewReplacer("NAME", "more", "image: mpi", "kernel: /boot/vmlinuz, rootfs: /etc/shadow").Replace(single)))
	for _, test := range []struct {
		who  []string
		want string
	}{{alice, "hers of alice"}, {bob, "his of bob"}, {op, "hers of alice, his of bob"}, {dirs, "hers of alice, his of bob"}} {
		if got := names(t, test.who); got != test.want {
			t.Errorf("%v: %q, want %q", test.who, got, test.want)
		}
	}

	// What is theirs, over TLS: exec, the console, a snapshot, its file, a restore.
	booted(t, alice, "hers/n1")
	sh(t, alice, "n1", "echo before > /run/mark")
	must(t, alice, "snapshot", "hers", "--tag", "first")
	sh(t, alice, "n1", "echo after > /run/mark")
	exported := filepath.Join(dir, "hers.violin")
	must(t, alice, "export", "hers@first", "--file", exported)
	verified(t, alice, "hers@first")
	must(t, alice, "restore", "hers@first")
	if got := sh(t, alice, "hers/n1", "cat /run/mark"); got != "before" {
		t.Errorf("restored to %q", got)
	}
	console := launch(t, func(cmd *exec.Cmd) error {
		// A line that is typed comes back, at the least: the terminal echoes it.
		in, err := cmd.StdinPipe()
		if err != nil {
			return err
		}
		cmd.Stdout = cmd.Stderr
		if err := cmd.Start(); err != nil {
			return err
		}
		_, err = in.Write([]byte("echo typed\r"))
		return err
	}, append(alice, "console", "hers/n1")...)
	await(t, "the console answers", func() bool { return strings.Contains(console.said(), "typed") })

	// What is not.
	for _, args := range [][]string{
		{"snapshot", "hers"}, {"restore", "hers@first"}, {"log", "hers"}, {"fork", "hers@first", "--as", "mine"}, {"export", "hers@first", "--file", exported},
		{"suspend", "hers"}, {"down", "hers"}, {"forget", "hers@first"}, {"tag", "hers@first", "mine"}, {"protect", "hers", "--every", "1m"}, {"events", "hers"},
	} {
		refused(t, 3, bob, args...)
	}
	refused(t, 125, bob, "exec", "hers/n1", "--", "true")
	for _, args := range [][]string{{"store", "gc"}, {"store", "check"}, {"import", exported}, {"hosts"}, {"users", "ls"}, {"users", "rm", "alice"}, {"token", "create"}, {"give", "hers", "bob"}, {"image", "rm", "mpi"}} {
		refused(t, 7, bob, args...)
	}
	if out := must(t, bob, "snapshots"); bytes.Contains(out, []byte("hers")) {
		t.Errorf("bob sees alice's snapshots: %s", out)
	}
	must(t, bob, "down", "--all")
	if got := names(t, op); got != "hers of alice" {
		t.Errorf("bob took down all of his, and there is %q", got)
	}

	// Alice is put out while she listens; her slice runs on, and becomes the operators'.
	events := launch(t, func(cmd *exec.Cmd) error { cmd.Stdout = cmd.Stderr; return cmd.Start() }, append(alice, "events", "-f")...)
	await(t, "events come", func() bool { return strings.Contains(events.said(), "restored") })
	must(t, op, "users", "rm", "alice")
	select {
	case err := <-events.done:
		if err == nil {
			t.Error("events end well for who was put out")
		}
	case <-time.After(time.Minute):
		t.Error("events go on for who was put out")
	}
	refused(t, 7, alice, "ps")
	if got := sh(t, op, "hers/n1", "cat /run/mark"); got != "before" {
		t.Errorf("the node remembers %q", got)
	}
	must(t, op, "give", "hers", "--operators")
	must(t, op, "store", "check")
	must(t, op, "logout")
	refused(t, 7, op, "ps")
	must(t, dirs, "down", "hers")
}
