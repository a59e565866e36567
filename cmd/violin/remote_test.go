package main

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestRemote checks which server is meant.
func TestRemote(t *testing.T) {
	for _, test := range []struct {
		why                 string
		server, run, logged string // environment, and the last login
		args                []string
		want                string
		fails               bool
	}{
		{why: "nothing is said"},
		{why: "the last login", logged: "office:7000", want: "office:7000"},
		{why: "the environment before the last login", server: "lab:7000", logged: "office:7000", want: "lab:7000"},
		{why: "the command line before both", server: "lab:7000", logged: "office:7000", args: []string{"--server", "[::1]:7000"}, want: "[::1]:7000"},
		{why: "this machine's, by its name", logged: "office:7000", args: []string{"--server", "local"}},
		{why: "ditto, from the environment", server: "local", logged: "office:7000"},
		{why: "this machine's, by its socket", server: "lab:7000", logged: "office:7000", args: []string{"--run-dir", "/run/x"}},
		{why: "ditto, from the environment", run: "/run/x", logged: "office:7000"},
		{why: "both on the command line", args: []string{"--run-dir", "/run/x", "--server", "lab:7000"}, want: "lab:7000"},
		{why: "no port", args: []string{"--server", "lab"}, fails: true},
		{why: "no address", args: []string{"--server", "../x:7"}, fails: true},
	} {
		t.Run(test.why, func(t *testing.T) {
			config := t.TempDir()
			t.Setenv("XDG_CONFIG_HOME", config)
			t.Setenv("VIOLIN_SERVER", test.server)
			t.Setenv("VIOLIN_RUN_DIR", test.run)
			if test.logged != "" {
				dir := filepath.Join(config, "violin", "servers")
				if err := os.MkdirAll(dir, 0o700); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(dir, "current"), []byte(test.logged+"\n"), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			a := &app{location: time.UTC}
			if err := a.root().ParseFlags(test.args); err != nil {
				t.Fatal(err)
			}
			got, err := a.remote()
			if got != test.want || (err != nil) != test.fails {
				t.Errorf("%q, %v, want %q", got, err, test.want)
			}
		})
	}
}
