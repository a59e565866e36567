package e2e

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"violin/internal/lab"
	"violin/internal/metadata/etcdtest"
)

func TestMain(m *testing.M) {
	etcdtest.Main()
	os.Exit(m.Run())
}

// on runs a violin on a host, as a user who has logged in from there.
func on(t *testing.T, h *lab.Host, home string, args ...string) ([]byte, error) {
	t.Helper()
	program, err := filepath.Abs(filepath.Join(root, "bin/violin"))
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	cmd := exec.Command(program, args...)
	cmd.Env = append(os.Environ(), "XDG_CONFIG_HOME="+home)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := h.Start(cmd); err != nil {
		t.Fatal(err)
	}
	err = cmd.Wait()
	return out.Bytes(), err
}

// Two servers of one store, by an etcd of three members. The one that leads is killed, and
// the other takes over what runs, with its snapshots; a member of etcd is killed, and all
// goes on; then there is no quorum, the leader steps down, and leads again when there is
// one. All the while the nodes are the same processes, and no transfer between them is
// lost or doubled.
func TestStandby(t *testing.T) {
	var cluster *etcdtest.Cluster
	var servers [2]*process
	var dirs [2][]string
	ports := []string{"7000", "7001"}
	serve := func(o *outlive, i int) {
		args := append([]string{"server", "--listen", ":" + ports[i], "--advertise", "127.0.0.1:" + ports[i], "--name", "server" + ports[i],
			"--etcd", strings.Join(cluster.Endpoints(), ","), "--store", filepath.Join(o.runDir, "shared", "store")}, dirs[i]...)
		servers[i] = spawnWith(t, o.office, []string{"VIOLIN_PASSPHRASE=the office's"}, args...)
		await(t, "a server serves", func() bool { return strings.Contains(servers[i].said(), "msg=serving") })
	}
	o, _ := newOutliveBy(t, func(o *outlive) {
		cluster = etcdtest.Start(t, 3, o.office.Start)
		second := filepath.Join(o.runDir, "second")
		if err := os.MkdirAll(filepath.Join(second, "state"), 0o700); err != nil {
			t.Fatal(err)
		}
		images, err := filepath.EvalSymlinks(filepath.Join(o.own, "images"))
		if err == nil {
			err = os.Symlink(images, filepath.Join(second, "state", "images"))
		}
		if err != nil {
			t.Fatal(err)
		}
		dirs = [2][]string{o.dirs, {"--run-dir", second, "--state-dir", filepath.Join(second, "state")}}
		for i := range servers {
			serve(o, i)
		}
	}, ports...)
	refused(t, 5, dirs[1], "ps") // it stands by, and says so

	token := strings.TrimSpace(string(must(t, o.dirs, "token", "create", "--user", "alice", "--role", "operator")))
	alpha, home := o.lab.Host("alpha"), filepath.Join(o.runDir, "alice")
	if out, err := on(t, alpha, home, "login", token+"@"+addresses(0, ports)); err != nil {
		t.Fatalf("login: %v: %s", err, out)
	}
	pids := o.running()
	first := o.snapshot()
	check := func(what string) {
		t.Helper()
		o.await(len(o.hosts))
		o.unharmed(what, pids)
		var list struct{ Snapshots []struct{ ID string } }
		if err := json.Unmarshal(must(t, o.dirs, "snapshots", "ledger", "--output", "json"), &list); err != nil || len(list.Snapshots) == 0 || list.Snapshots[0].ID != first {
			t.Errorf("%s: snapshots %v, %v; want %s first", what, list, err, first)
		}
		o.snapshot()
		if out, err := on(t, alpha, home, "ps"); err != nil || !bytes.Contains(out, []byte("carol")) {
			t.Errorf("%s: a user is told %v: %s", what, err, out)
		}
	}

	began := time.Now()
	_ = servers[0].cmd.Process.Kill()
	<-servers[0].done
	o.dirs = dirs[1]
	await(t, "the other leads", func() bool { return strings.Contains(servers[1].said(), `msg="this server leads"`) })
	t.Logf("the other leads after %s", time.Since(began).Round(time.Millisecond))
	check("the leader was killed")
	t.Logf("and has a new snapshot after %s", time.Since(began).Round(time.Millisecond))

	cluster.Kill(0)
	check("a member of etcd was killed")

	cluster.Kill(1)
	await(t, "the leader steps down", func() bool { return strings.Contains(servers[1].said(), "leads no more") })
	if n := len(o.vms()); n != len(o.nodes) {
		t.Errorf("without a leader %d of %d nodes run", n, len(o.nodes))
	}
	cluster.Run(t, 1)
	await(t, "it leads again", func() bool { return strings.Count(servers[1].said(), `msg="this server leads"`) == 2 })
	check("there was no quorum")

	// The first is back, and stands by for the one that was second.
	serve(o, 0)
	refused(t, 5, dirs[0], "ps")
	must(t, o.dirs, "down", "ledger")
}
