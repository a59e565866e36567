package cloudinit

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"violin/internal/topology"
)

var update = flag.Bool("update", false, "rewrite testdata")

const key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f alice@x"

func parse(t *testing.T, more string) *topology.Topology {
	t.Helper()
	topo, err := topology.Parse("test", []byte(`version: 1
slice: cloud
sites: {s: {hosts: [h1]}}
networks: {lan: {subnet: 10.9.0.0/24, gateway: nat}, other: {mtu: 8950}}
nodes:
  web:
    host: h1
    image: debian
    memory: 512MiB
    interfaces: [{network: other, mac: "02:00:00:00:00:01"}, {network: lan, address: 10.9.0.7/24, mac: "02:00:00:00:00:02"}]
`+more+`
  db: {host: h1, image: debian, memory: 512MiB, interfaces: [{network: lan, address: 10.9.0.8/24}]}
  lone: {host: h1, image: debian, memory: 512MiB}
`))
	if err != nil {
		t.Fatal(err)
	}
	return topo
}

const told = `    cloud_init: {ssh_keys: [` + key + `]}
    shares: [{name: tools, directory: /srv, mount: "/opt/it's"}, {name: raw, directory: /srv}]
    run: "echo 'ran' >/root/ran"`

func TestFiles(t *testing.T) {
	topo := parse(t, told)
	var b strings.Builder
	for _, n := range []string{"web", "lone"} {
		for _, f := range files(topo, topo.Node(n), []byte("#!/bin/sh\ntrue\n")) {
			fmt.Fprintf(&b, "--- %s: %s\n%s", n, f.name, f.data)
			if f.name == "meta-data" || f.name == "network-config" {
				var v map[string]any
				if err := yaml.Unmarshal(f.data, &v); err != nil {
					t.Errorf("%s: %v", f.name, err)
				}
			}
			if f.name == "vendor-data" {
				if out, err := exec.Command("sh", "-n", "-c", string(f.data)).CombinedOutput(); err != nil {
					t.Errorf("%s: %v: %s", f.name, err, out)
				}
			}
		}
	}
	golden := "testdata/files.txt"
	if *update {
		if err := os.WriteFile(golden, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil || string(want) != b.String() {
		t.Errorf("%v, got\n%s", err, b.String())
	}
}

// The same node is told the same bytes, and one that is told anything else is another
// instance.
func TestInstance(t *testing.T) {
	seed := func(more string, data string) []byte {
		topo := parse(t, more)
		b, err := Seed(topo, topo.Node("web"), []byte(data))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	id := func(more, data string) string {
		topo := parse(t, more)
		return string(files(topo, topo.Node("web"), []byte(data))[0].data)
	}
	if !bytes.Equal(seed(told, "#!/bin/sh"), seed(told, "#!/bin/sh")) {
		t.Error("the same node is told different bytes")
	}
	seen := map[string]string{}
	for _, c := range []struct{ more, data string }{{told, ""}, {told, "#!/bin/sh"}, {"", ""}, {"    run: x", ""}, {"    cloud_init: {ssh_keys: [" + key + "]}", ""}} {
		if other, dup := seen[id(c.more, c.data)]; dup {
			t.Errorf("%q and %q are one instance", c, other)
		}
		seen[id(c.more, c.data)] = c.more + c.data
	}
	if id("    cloud_init: {user_data: \"#!/bin/sh\"}", "") != id("", "#!/bin/sh") {
		t.Error("user data of the topology and of a file is not the same")
	}
}

// The volume is one that the tools of others read.
func TestVolume(t *testing.T) {
	topo := parse(t, told)
	data := bytes.Repeat([]byte("0123456789abcde\n"), topology.MaxUserData/16)
	v, err := Seed(topo, topo.Node("web"), data)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "seed")
	if err := os.WriteFile(path, v, 0o600); err != nil {
		t.Fatal(err)
	}
	tool := func(name string, args ...string) string {
		t.Helper()
		if _, err := exec.LookPath(name); err != nil {
			t.Skipf("%v: make deps", err)
		}
		out, err := exec.Command(name, args...).CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v: %s", name, err, out)
		}
		return string(out)
	}
	if out := tool("blkid", "-p", "-o", "export", path); !strings.Contains(out, "LABEL=cidata\n") || !strings.Contains(out, "TYPE=vfat\n") {
		t.Errorf("blkid: %s", out)
	}
	tool("fsck.fat", "-n", path)
	for _, f := range files(topo, topo.Node("web"), data) {
		if got := tool("mtype", "-i", path, "::/"+f.name); got != string(f.data) {
			t.Errorf("%s has %d bytes, want %d", f.name, len(got), len(f.data))
		}
	}
	if _, err := volume(Label, []file{{"large", make([]byte, volumeSize)}}); err == nil {
		t.Error("a file that is too large for the volume is in it")
	}
	if _, err := volume(Label, make([]file, rootEntries)); err == nil {
		t.Error("more files than there is room for are in the volume")
	}
}
