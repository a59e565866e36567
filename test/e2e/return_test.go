package e2e

import (
	"cmp"
	"encoding/json"
	"os"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Where a server is killed in a cut, and what has to come of it: once the snapshot is
// visible it stays. With an agent, host alpha's is killed at a step of its own as well.
// Some are enough in general; VIOLIN_KILLS is a regular expression of those that are
// wanted besides.
var serverKills = []struct {
	at     string
	sealed bool
	agent  string
	args   []string
	always bool
}{
	{at: "begin"}, {at: "note", always: true}, {at: "prepare"}, {at: "ordering"}, {at: "ordered"}, {at: "cut", always: true}, {at: "store"},
	{at: "drain"}, {at: "collect"}, {at: "seal"}, {at: "packed"},
	{at: "sealed", sealed: true, always: true}, {at: "commit", sealed: true}, {at: "end", sealed: true}, {at: "ended", sealed: true},
	{at: "prepare", args: precopy}, {at: "ordered", args: precopy}, {at: "cut", args: precopy}, {at: "sealed", args: precopy, sealed: true},
	{at: "prepare", agent: "prepare"}, {at: "abort", agent: "alice/stop"}, {at: "abort", agent: "alice/resume"}, {at: "sealed", agent: "commit", sealed: true},
}

// A server is killed, or told to end, and another comes back: what joined hosts run goes
// on, as the same processes, nothing that is between them is lost or doubled, and a cut
// that was under way is committed or aborted.
func TestServerReturns(t *testing.T) {
	o, _ := newOutlive(t)
	pids := o.running()
	for _, how := range []os.Signal{os.Kill, syscall.SIGTERM} {
		began := time.Now()
		_ = o.server.cmd.Process.Signal(how)
		<-o.server.done
		if len(o.vms()) != len(o.nodes) {
			t.Fatalf("%v: of %d nodes these run without the server: %q", how, len(o.nodes), o.vms())
		}
		o.serve()
		o.await(len(o.hosts))
		t.Logf("%v: all hosts are back after %s", how, time.Since(began).Round(time.Millisecond))
	}
	o.unharmed("after the server's end", pids)

	wanted := regexp.MustCompile(cmp.Or(os.Getenv("VIOLIN_KILLS"), "^$"))
	for _, k := range serverKills {
		what := strings.Join(append([]string{k.at, k.agent}, k.args...), " ")
		if !k.always && !wanted.MatchString(what) || t.Failed() {
			continue
		}
		o.killServer(what, k.at, k.agent, k.args, k.sealed, pids)
	}
}

// killServer takes a snapshot, and kills the server at a step of it.
func (o *outlive) killServer(what, at, agent string, args []string, sealed bool, pids map[string]string) {
	o.t.Helper()
	t := o.t
	began := time.Now()
	before := o.snapshots()
	_ = o.server.cmd.Process.Signal(os.Kill)
	<-o.server.done
	o.serve("VIOLIN_TEST_KILL_AT=" + at)
	if agent != "" {
		o.await(len(o.hosts))
		o.kill("alpha", os.Kill)
		o.start(0, "VIOLIN_TEST_KILL_AT="+agent)
	}
	o.await(len(o.hosts))
	if out, err := violin(t.Context(), t, o.dirs, append([]string{"snapshot", "ledger"}, args...)...); err == nil && at != "ended" {
		t.Fatalf("%s: the server was not killed: %s", what, out)
	}
	select {
	case <-o.server.done:
	case <-time.After(time.Minute):
		t.Fatalf("%s: the server was not killed", what)
	}
	down := time.Now()
	if agent != "" {
		select {
		case <-o.agents["alpha"].done:
		case <-time.After(2 * time.Second): // it was not ordered so far
			_ = o.agents["alpha"].cmd.Process.Kill()
			<-o.agents["alpha"].done
		}
		o.start(0)
	}
	o.serve()
	o.await(len(o.hosts))
	await(t, "the cut has ended", func() bool { return !slice(t, o.dirs, "ledger").Cutting })
	ended := time.Since(down)
	switch now := o.snapshots(); {
	case sealed && len(now) != len(before)+1:
		t.Errorf("%s: snapshots %v, and before %v: want one more", what, now, before)
	case !sealed && !slices.Equal(now, before):
		t.Errorf("%s: snapshots %v, and before %v", what, now, before)
	}
	o.unharmed("the server was killed at "+what, pids)
	o.oneEpoch(what)
	for _, id := range o.snapshots()[len(before):] {
		verified(t, o.dirs, "ledger@"+id)
	}
	o.snapshot()
	// What the cut had stored in vain is collected, and nothing that is needed.
	var freed struct{ PacksDeleted string }
	must(t, o.dirs, "store", "gc")
	if err := json.Unmarshal(must(t, o.dirs, "store", "gc", "--output", "json"), &freed); err != nil || strings.Trim(freed.PacksDeleted, "0") != "" {
		t.Errorf("%s: collected twice: %+v, %v", what, freed, err)
	}
	must(t, o.dirs, "store", "check", "--read-data")
	t.Logf("killed at %s: ended after %s, %s in all", what, ended.Round(time.Millisecond), time.Since(began).Round(time.Millisecond))
}

// oneEpoch checks that all nodes are in the same epoch.
func (o *outlive) oneEpoch(what string) {
	o.t.Helper()
	epochs := map[int]bool{}
	for _, n := range slice(o.t, o.dirs, "ledger").Nodes {
		epochs[n.Epoch] = true
	}
	if len(epochs) != 1 {
		o.t.Errorf("%s: nodes are in epochs %v", what, epochs)
	}
}

// snapshots are the ids there are, oldest first.
func (o *outlive) snapshots() (ids []string) {
	o.t.Helper()
	var list struct{ Snapshots []struct{ ID string } }
	if err := json.Unmarshal(must(o.t, o.dirs, "snapshots", "ledger", "--output", "json"), &list); err != nil {
		o.t.Fatal(err)
	}
	for _, s := range list.Snapshots {
		ids = append(ids, s.ID)
	}
	slices.Sort(ids)
	return ids
}
