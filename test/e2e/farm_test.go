package e2e

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"violin/internal/lab"
)

// farm is three machines at two sites, and an office with the server that they join.
type farm struct {
	t      *testing.T
	dirs   []string
	dir    string
	lab    *lab.Lab
	office *lab.Host
	server *process
	names  []string // of the machines
	token  string
	agents map[string]*process // by name
}

// newFarm makes a farm whose agents are to be started.
func newFarm(t *testing.T, dirs []string, dir string) *farm {
	t.Helper()
	f := &farm{t: t, dirs: dirs, dir: dir, names: []string{"alpha", "beta", "gamma"}, agents: map[string]*process{}}
	var err error
	f.lab, err = lab.New(t.Context(), lab.Config{
		Sites:  []lab.Site{{Name: "west", Hosts: []string{"alpha", "beta", "office"}}, {Name: "east", Hosts: []string{"gamma"}}},
		Links:  []lab.LinkConfig{{A: "west", B: "east", Shape: lab.Shape{Delay: 10 * time.Millisecond}}},
		Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.lab.Close() })
	f.office = f.lab.Host("office")
	images, err := filepath.EvalSymlinks(filepath.Join(dir, "state", "images"))
	if err != nil {
		t.Fatal(err)
	}
	for i, name := range f.names {
		cable(t, f.office, f.lab.Host(name), i)
		state := filepath.Join(dir, name, "state")
		if err := os.MkdirAll(state, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(images, filepath.Join(state, "images")); err != nil {
			t.Fatal(err)
		}
	}
	f.server = spawn(t, f.office, append([]string{"server", "--listen", ":7000"}, dirs...)...)
	await(t, "the server serves", func() bool { return strings.Contains(f.server.said(), "msg=serving") })
	f.token = strings.TrimSpace(string(must(t, dirs, "token", "create", "--ttl", "1h")))
	return f
}

// start starts a machine's agent.
func (f *farm) start(name string) *process {
	f.t.Helper()
	h, own := f.lab.Host(name), filepath.Join(f.dir, name)
	i := 0
	for f.names[i] != name {
		i++
	}
	f.agents[name] = spawn(f.t, h, "agent", "--join", fmt.Sprintf("%s@10.99.%d.1:7000", f.token, i), "--name", name,
		"--underlay", h.UnderlayDevice, "--underlay-address", h.UnderlayAddr.String(), "--run-dir", own, "--state-dir", filepath.Join(own, "state"))
	return f.agents[name]
}

// await waits until so many agents are connected.
func (f *farm) await(want int) {
	f.t.Helper()
	await(f.t, fmt.Sprintf("%d agents are connected", want), func() bool { return connected(f.t, f.dirs) == want })
}

// connected is how many agents are.
func connected(t *testing.T, dirs []string) (n int) {
	t.Helper()
	var list struct{ Hosts []struct{ Connected bool } }
	if err := json.Unmarshal(must(t, dirs, "hosts", "--output", "json"), &list); err != nil {
		t.Fatal(err)
	}
	for _, h := range list.Hosts {
		if h.Connected {
			n++
		}
	}
	return n
}
