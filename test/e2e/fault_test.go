package e2e

import (
	"context"
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// What is interrupted leaves a slice that runs or none, and nothing half done.
func TestInterrupted(t *testing.T) {
	dirs, _ := begin(t)
	topology := filepath.Join(root, "examples/pair.yaml")
	interrupt := func(after time.Duration, args ...string) error {
		ctx, cancel := context.WithTimeout(t.Context(), after)
		defer cancel()
		_, err := violin(ctx, t, dirs, args...)
		return err
	}
	ps := func() (slices []struct{ Nodes []struct{ State string } }) {
		var list struct {
			Slices []struct{ Nodes []struct{ State string } }
		}
		if err := json.Unmarshal(must(t, dirs, "ps", "--output", "json"), &list); err != nil {
			t.Fatal(err)
		}
		return list.Slices
	}

	// again repeats what is refused while the server still tidies up.
	again := func(args ...string) []byte {
		t.Helper()
		for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) {
			if out, err := command(t, dirs, args...); err == nil {
				return out
			} else if time.Now().After(deadline) {
				t.Fatalf("violin %s: %v", strings.Join(args, " "), err)
			}
		}
	}

	for _, after := range []time.Duration{300 * time.Millisecond, 700 * time.Millisecond} {
		if interrupt(after, "up", topology) == nil {
			must(t, dirs, "down", "pair") // it was faster
		}
	}
	again("up", topology)
	for _, after := range []time.Duration{20 * time.Millisecond, 150 * time.Millisecond, 400 * time.Millisecond} {
		_ = interrupt(after, "snapshot", "pair")
		for _, n := range ps()[0].Nodes {
			if n.State != "NODE_STATE_RUNNING" {
				t.Errorf("snapshot was interrupted after %s, and a node is %s", after, n.State)
			}
		}
	}
	var snap struct{ ID string }
	if err := json.Unmarshal(again("snapshot", "pair", "--output", "json"), &snap); err != nil {
		t.Fatal(err)
	}
	_ = interrupt(500*time.Millisecond, "restore", "pair@"+snap.ID)
	again("restore", "pair@"+snap.ID)
	if n := len(ps()); n != 1 {
		t.Errorf("%d slices run after a restore", n)
	}
}

// With the server everything ends that it has started; its snapshots stay.
func TestServerKilled(t *testing.T) {
	dirs, runDir := begin(t)
	must(t, dirs, "up", filepath.Join(root, "examples/pair.yaml"))
	var snap struct{ ID string }
	if err := json.Unmarshal(must(t, dirs, "snapshot", "pair", "--output", "json"), &snap); err != nil {
		t.Fatal(err)
	}
	var version struct{ Server struct{ PID string } }
	out := must(t, dirs, "version", "--output", "json")
	if err := json.Unmarshal(out, &version); err != nil {
		t.Fatal(err)
	}
	kill(t, version.Server.PID)
	gone(t, runDir)
	must(t, dirs, "restore", "pair@"+snap.ID)
}
