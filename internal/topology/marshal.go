package topology

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
)

// Marshal writes the canonical form: YAML that Parse reads back as the same
// topology, with all that was derived or by default written out. It is the same
// for topologies that are the same.
func (t *Topology) Marshal() []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "version: %d\nslice: %s\n", Version, text(t.Slice))
	b.WriteString("sites:\n")
	for _, s := range t.Sites {
		hosts := make([]string, len(s.Hosts))
		for i, h := range s.Hosts {
			hosts[i] = text(h)
		}
		fmt.Fprintf(&b, "  %s: {hosts: [%s]}\n", text(s.Name), strings.Join(hosts, ", "))
	}
	if len(t.WAN) > 0 {
		b.WriteString("wan:\n")
	}
	for _, l := range t.WAN {
		fmt.Fprintf(&b, "  - {between: [%s, %s], delay: %v, jitter: %v, loss: %v, reorder: %v", text(l.Between[0]), text(l.Between[1]), l.Delay, l.Jitter, l.Loss, l.Reorder)
		if l.Rate > 0 {
			fmt.Fprintf(&b, ", rate: %s", formatUnits(uint64(l.Rate), rateUnits))
		}
		b.WriteString("}\n")
	}
	if len(t.Networks) > 0 {
		b.WriteString("networks:\n")
	}
	for _, n := range t.Networks {
		fmt.Fprintf(&b, "  %s: {", text(n.Name))
		if n.Subnet.IsValid() {
			fmt.Fprintf(&b, "subnet: %s, ", text(n.Subnet.String()))
		}
		fmt.Fprintf(&b, "mtu: %d", n.MTU)
		if n.Gateway.IsValid() {
			fmt.Fprintf(&b, ", gateway: {nat: %s}", text(n.Gateway.Addr().String()))
		}
		if n.Hold {
			b.WriteString(", external: hold")
		}
		if n.Closed {
			b.WriteString(", external: closed")
		}
		b.WriteString("}\n")
	}
	b.WriteString("nodes:\n")
	for _, n := range t.Nodes {
		if n.Host != "" {
			fmt.Fprintf(&b, "  %s:\n    host: %s\n", text(n.Name), text(n.Host))
		} else {
			fmt.Fprintf(&b, "  %s:\n    site: %s\n", text(n.Name), text(n.Site))
		}
		for _, f := range []struct{ name, value string }{
			{"image", n.Image}, {"kernel", n.Kernel}, {"initrd", n.Initrd}, {"rootfs", n.RootFS}, {"append", n.Append}, {"firmware", n.Firmware},
		} {
			if f.value != "" {
				fmt.Fprintf(&b, "    %s: %s\n", f.name, text(f.value))
			}
		}
		if len(n.Boot) > 0 {
			fmt.Fprintf(&b, "    boot: %s\n", list(n.Boot))
		}
		fmt.Fprintf(&b, "    memory: %s\n    cpus: %d\n", formatUnits(n.Memory, sizeUnits), n.CPUs)
		if len(n.Disks) > 0 {
			b.WriteString("    disks:\n")
		}
		for _, d := range n.Disks {
			fmt.Fprintf(&b, "      - {name: %s", text(d.Name))
			if d.Size > 0 {
				fmt.Fprintf(&b, ", size: %s", formatUnits(d.Size, sizeUnits))
			}
			if d.Base != "" {
				fmt.Fprintf(&b, ", base: %s", text(d.Base))
			}
			b.WriteString("}\n")
		}
		if len(n.Shares) > 0 {
			b.WriteString("    shares:\n")
		}
		for _, s := range n.Shares {
			fmt.Fprintf(&b, "      - {name: %s, directory: %s", text(s.Name), text(s.Directory))
			if s.Mount != "" {
				fmt.Fprintf(&b, ", mount: %s", text(s.Mount))
			}
			b.WriteString("}\n")
		}
		if n.CloudInit != nil {
			n.CloudInit.marshal(&b)
		}
		if len(n.Interfaces) > 0 {
			b.WriteString("    interfaces:\n")
		}
		for _, i := range n.Interfaces {
			fmt.Fprintf(&b, "      - {network: %s, ", text(i.Network))
			if i.Address.IsValid() {
				fmt.Fprintf(&b, "address: %s, ", text(i.Address.String()))
			}
			fmt.Fprintf(&b, "mac: %s", text(i.MAC.String()))
			if i.Model != "" {
				fmt.Fprintf(&b, ", model: %s", text(i.Model))
			}
			b.WriteString("}\n")
		}
		if len(n.Forwards) > 0 {
			all := make([]string, len(n.Forwards))
			for i, f := range n.Forwards {
				all[i] = f.String()
			}
			fmt.Fprintf(&b, "    forwards: %s\n", list(all))
		}
		if n.Run != "" {
			fmt.Fprintf(&b, "    run: %s\n", text(n.Run))
		}
		if len(n.QEMU) > 0 {
			fmt.Fprintf(&b, "    qemu: %s\n", list(n.QEMU))
		}
	}
	return b.Bytes()
}

func (c *CloudInit) marshal(b *bytes.Buffer) {
	if c.Off || c.UserData == "" && c.UserDataFile == "" && len(c.Keys) == 0 {
		fmt.Fprintf(b, "    cloud_init: %t\n", !c.Off)
		return
	}
	b.WriteString("    cloud_init:\n")
	for _, f := range []struct{ name, value string }{{"user_data", c.UserData}, {"user_data_file", c.UserDataFile}} {
		if f.value != "" {
			fmt.Fprintf(b, "      %s: %s\n", f.name, text(f.value))
		}
	}
	if len(c.Keys) > 0 {
		fmt.Fprintf(b, "      ssh_keys: %s\n", list(c.Keys))
	}
}

// list is strings as a YAML list.
func list(texts []string) string {
	all := make([]string, len(texts))
	for i, s := range texts {
		all[i] = text(s)
	}
	return "[" + strings.Join(all, ", ") + "]"
}

// text is a string as YAML: in quotes always, for the rules of when they can be
// left out are long. What JSON quotes, YAML reads.
func text(s string) string {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(s); err != nil {
		panic(err) // a string always marshals
	}
	return strings.TrimSuffix(b.String(), "\n")
}
