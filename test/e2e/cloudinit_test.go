package e2e

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestCloudInit boots an image of a cloud's kind, which knows nothing of Violin, and lets
// cloud-init make of it what the topology says and what its user adds; and shows it and a
// guest of Violin's a directory. What both were told and shown is of the snapshot, whatever
// became of the directory since.
func TestCloudInit(t *testing.T) {
	dirs, runDir := begin(t)
	qcow2 := filepath.Join(runDir, "debian.qcow2")
	foreign(t, runDir, "cloud", qcow2, "disk")
	must(t, dirs, "image", "import", qcow2)
	if err := os.Mkdir(filepath.Join(runDir, "tools"), 0o755); err != nil {
		t.Fatal(err)
	}
	job := filepath.Join(runDir, "tools/job")
	if err := os.WriteFile(job, []byte("#!/bin/sh\necho as it was\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	const key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f alice@x"
	file := filepath.Join(runDir, "cloud.yaml")
	if err := os.WriteFile(file, []byte(`version: 1
slice: cloud
sites: {s: {hosts: [h1, h2]}}
networks: {lan: {subnet: 10.44.0.0/24, mtu: 1400}}
nodes:
  web:
    host: h1
    image: debian
    memory: 512MiB
    disks: [{name: root, size: 2GiB}]
    interfaces: [{network: lan, address: 10.44.0.1/24}]
    cloud_init:
      ssh_keys: [`+key+`]
      user_data: |
        #cloud-config
        write_files: [{path: /root/told, content: "told by its user\n"}]
        runcmd: [[sh, -c, "cat /root/told >/root/ran-by-user"]]
    shares: [{name: tools, directory: tools, mount: /opt/tools}]
    run: "/opt/tools/job >/root/ran; echo $? >>/root/ran"
  built:
    {host: h2, image: disk, memory: 160MiB, interfaces: [{network: lan, address: 10.44.0.2/24}], shares: [{name: tools, directory: tools, mount: /opt/tools}]}
`), 0o600); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	must(t, dirs, "up", file)
	const web, built = "cloud/web", "cloud/built"
	booted(t, dirs, built)
	for deadline := time.Now().Add(4 * time.Minute); ; time.Sleep(time.Second) {
		out, err := command(t, dirs, "exec", web, "--", "cat", "/run/cloud-init/result.json")
		if err == nil {
			var r struct{ V1 struct{ Datasource string } }
			if err := json.Unmarshal(out, &r); err != nil || !strings.Contains(r.V1.Datasource, "NoCloud") {
				t.Fatalf("cloud-init says %s (%v)", out, err)
			}
			t.Logf("after %v cloud-init says: %s", time.Since(began).Round(time.Second), out)
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("cloud-init did not end: %s", must(t, dirs, "console", web, "--log", "--tail", "50"))
		}
	}

	check := func(slice string) {
		t.Helper()
		for script, want := range map[string]string{
			"hostname":                    "web",
			"cat /sys/class/net/eth0/mtu": "1400",
			"ip -4 -o addr show dev eth0 | grep -o 'inet [0-9./]*'":             "inet 10.44.0.1/24",
			"getent hosts built | grep -o '^[0-9.]*'":                           "10.44.0.2",
			"ping -c 1 built >/dev/null && echo there":                          "there",
			"cat /root/told /root/ran-by-user":                                  "told by its user\ntold by its user",
			"[ $(df -k / | awk 'END { print $2 }') -gt 1600000 ] && echo grown": "grown",
			"cat /root/ran":                         "as it was\n0",
			"cat /home/debian/.ssh/authorized_keys": key,
		} {
			if got := sh(t, dirs, slice+"/web", script); got != want {
				t.Errorf("%s: %q, want %q", script, got, want)
			}
		}
		for _, n := range []string{"/web", "/built"} {
			if got := sh(t, dirs, slice+n, "echo 3 >/proc/sys/vm/drop_caches; ls /opt/tools; /opt/tools/job; touch /opt/tools/new 2>/dev/null || echo read-only"); got != "job\nas it was\nread-only" {
				t.Errorf("%s is shown %q", slice+n, got)
			}
		}
	}
	check("cloud")
	// The whole seed, past the page cache, and what cloud-init takes for this instance.
	const instance = `echo 3 >/proc/sys/vm/drop_caches; for d in /sys/block/vd*; do [ "$(cat $d/serial)" != cidata ] || { cat $d/ro; md5sum <"/dev/${d##*/}"; }; done; cat /var/lib/cloud/data/instance-id`
	before := sh(t, dirs, web, instance)
	if !strings.HasPrefix(before, "1\n") || !strings.Contains(before, "cloud-web-") {
		t.Errorf("its seed is read-only, and of which instance: %q", before)
	}

	// No snapshot refers to it yet: what the collection takes, the first snapshot has again.
	must(t, dirs, "store", "gc")
	var snap struct {
		Nodes []struct {
			Name  string
			Disks []struct{ Name, Use, StoredBytes string }
		}
	}
	if err := json.Unmarshal(must(t, dirs, "snapshot", "cloud", "--output", "json"), &snap); err != nil {
		t.Fatal(err)
	}
	uses := map[string]string{}
	for _, n := range snap.Nodes {
		for _, d := range n.Disks {
			uses[n.Name+"/"+d.Name] = d.Use
		}
	}
	if len(uses) != 5 || uses["web/cidata"] != "DISK_USE_SEED" || uses["built/tools"] != "DISK_USE_SHARE" || uses["web/root"] != "DISK_USE_UNSPECIFIED" {
		t.Errorf("the snapshot has the disks %v", uses)
	}
	// The directory goes, and what the guests have in their memory of it with them.
	if err := os.RemoveAll(filepath.Dir(job)); err != nil {
		t.Fatal(err)
	}
	must(t, dirs, "fork", "cloud@latest", "--as", "whatif")
	check("whatif")
	must(t, dirs, "down", "whatif")
	for _, n := range slice(t, dirs, "").Nodes {
		kill(t, n.PID)
	}
	must(t, dirs, "restore", "cloud@latest")
	check("cloud")
	if after := sh(t, dirs, web, instance); after != before {
		t.Errorf("after a restore its seed and instance are %q, before %q", after, before)
	}
	verified(t, dirs, "cloud@latest")
	must(t, dirs, "down", "cloud")
	out, err := exec.CommandContext(t.Context(), filepath.Join(root, "bin/violin"), append(dirs[:len(dirs):len(dirs)], "up", file)...).CombinedOutput()
	if err == nil || !strings.Contains(string(out), file+":18:") || !strings.Contains(string(out), "no such file") {
		t.Errorf("up without the directory: %v, %s", err, out)
	}
}
