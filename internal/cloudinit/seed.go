// Package cloudinit tells cloud-init in a guest what its node is: it makes the volume that
// cloud-init's data source NoCloud looks for, by its label.
//
// The volume has four files. meta-data: an instance-id, the host name, public ssh keys.
// network-config, in version 2: the interfaces by their MAC addresses. user-data: the
// user's own, as it is. vendor-data: what else the topology says, as a boothook, which
// cloud-init runs at each boot: it takes nothing away from the user's, as a list in a
// cloud-config would.
//
// The same node makes the same bytes.
package cloudinit

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"

	"violin/internal/topology"
)

// Label is the volume's, by which cloud-init knows it.
const Label = "cidata"

// RunScript is where in the guest the command of the topology is, for cloud-init to run at
// each boot, and RunLog what it prints.
const (
	RunScript = "/var/lib/cloud/scripts/per-boot/violin-run"
	RunLog    = "/var/log/violin-run.log"
)

// Seed makes the volume for a node. The topology has the node's user data unless it says
// that a file has it, whose content userData is then.
func Seed(t *topology.Topology, n *topology.Node, userData []byte) ([]byte, error) {
	files := files(t, n, userData)
	v, err := volume(Label, files)
	if err != nil {
		return nil, fmt.Errorf("make what cloud-init of node %q reads: %w", n.Name, err)
	}
	return v, nil
}

func files(t *topology.Topology, n *topology.Node, userData []byte) []file {
	var keys []string
	if c := n.CloudInit; c != nil {
		keys = c.Keys
		if c.UserData != "" {
			userData = []byte(c.UserData)
		}
	}
	if len(userData) == 0 {
		userData = []byte("#cloud-config\n")
	}
	all := []file{
		{"user-data", userData}, {"vendor-data", vendorData(t, n)}, {"network-config", networkConfig(t, n)},
	}
	// What it is told is part of what it is: to a disk that was given to another node, or
	// told otherwise, this is a new instance.
	sum := sha256.New()
	for _, f := range append(all, file{"keys", []byte(strings.Join(keys, "\n"))}) {
		fmt.Fprintf(sum, "%s %d\n%s", f.name, len(f.data), f.data)
	}
	id := fmt.Sprintf("%s-%s-%s", t.Slice, n.Name, hex.EncodeToString(sum.Sum(nil)[:6]))
	return append([]file{{"meta-data", metaData(n, id, keys)}}, all...)
}

func metaData(n *topology.Node, id string, keys []string) []byte {
	var b strings.Builder
	fmt.Fprintf(&b, "instance-id: %s\nlocal-hostname: %s\n", quote(id), quote(n.Name))
	if len(keys) > 0 {
		b.WriteString("public-keys:\n")
	}
	for _, k := range keys {
		fmt.Fprintf(&b, "  - %s\n", quote(k))
	}
	return []byte(b.String())
}

// networkConfig gives each interface its name, eth0 and so on, and what the topology says
// of it. Nothing waits for one that is given no address.
func networkConfig(t *topology.Topology, n *topology.Node) []byte {
	var b strings.Builder
	b.WriteString("version: 2\nethernets:")
	if len(n.Interfaces) == 0 {
		b.WriteString(" {}\n")
		return []byte(b.String())
	}
	b.WriteString("\n")
	routed := false // a guest has one default route
	for i, ifc := range n.Interfaces {
		network := t.Network(ifc.Network)
		fmt.Fprintf(&b, "  eth%d:\n    match: {macaddress: %s}\n    set-name: eth%d\n    mtu: %d\n    dhcp4: false\n    dhcp6: false\n", i, quote(ifc.MAC.String()), i, network.MTU)
		if !ifc.Address.IsValid() {
			b.WriteString("    optional: true\n")
			continue
		}
		fmt.Fprintf(&b, "    addresses: [%s]\n", quote(ifc.Address.String()))
		if gw := network.Gateway; gw.IsValid() && !routed {
			routed = true
			fmt.Fprintf(&b, "    routes: [{to: \"0.0.0.0/0\", via: %s}]\n    nameservers: {addresses: [%s]}\n", quote(gw.Addr().String()), quote(gw.Addr().String()))
		}
	}
	return []byte(b.String())
}

// vendorData is a script that makes of the guest what the topology says of it, beside its
// interfaces. It may run at any boot, and again.
func vendorData(t *topology.Topology, n *topology.Node) []byte {
	var b strings.Builder
	b.WriteString("#cloud-boothook\n#!/bin/sh\n# What the slice's topology says of this node.\n")
	b.WriteString("sed -i '/^# violin begin/,/^# violin end/d' /etc/hosts\ncat >>/etc/hosts <<'.'\n# violin begin\n")
	for _, h := range t.Hosts(n) {
		fmt.Fprintf(&b, "%v %s\n", h.Address, h.Name)
	}
	b.WriteString("# violin end\n.\n")
	for _, s := range n.Shares {
		if s.Mount == "" {
			continue
		}
		fmt.Fprintf(&b, `for d in /sys/class/block/*; do
	[ "$(cat "$d/serial" 2>/dev/null)" = %[1]s ] || continue
	mkdir -p %[2]s
	mountpoint -q %[2]s || mount -t squashfs -o ro,nodev,nosuid "/dev/${d##*/}" %[2]s || echo "violin: %[3]s is not mounted" >/dev/console
done
`, shell(s.Name), shell(s.Mount), s.Name)
	}
	if n.Run == "" {
		fmt.Fprintf(&b, "rm -f %s\n", RunScript)
		return []byte(b.String())
	}
	fmt.Fprintf(&b, `mkdir -p %[1]s
cat >%[2]s <<'violin-end'
#!/bin/sh
export HOME=/root
cd /root || exit 1
(
	echo "violin: run "%[3]s >/dev/console
	sh -c %[3]s </dev/null >%[4]s 2>&1
	echo "violin: run ended with status $?" | tee -a %[4]s >/dev/console
) &
violin-end
chmod 755 %[2]s
`, RunScript[:strings.LastIndex(RunScript, "/")], RunScript, shell(n.Run), RunLog)
	return []byte(b.String())
}

// quote is a string in YAML's double quotes, which reads what JSON writes.
func quote(s string) string {
	b, err := json.Marshal(s)
	if err != nil {
		panic(err) // a string always marshals
	}
	return string(b)
}

// shell is a string as one word of a shell's.
func shell(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
