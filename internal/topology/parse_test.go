package topology

import (
	"errors"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

var update = flag.Bool("update", false, "write the golden files anew")

// golden compares got with a file of testdata.
func golden(t *testing.T, file string, got []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, got, 0o666); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), string(got)); d != "" {
		t.Errorf("%s (run with -update to accept):\n%s", file, d)
	}
}

func read(t testing.TB, file string) []byte {
	t.Helper()
	src, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return src
}

func mustParse(t testing.TB, src string) *Topology {
	t.Helper()
	topo, err := Parse("test.yaml", []byte(src))
	if err != nil {
		t.Fatal(err)
	}
	return topo
}

// Each file in testdata/mistakes has a .txt with what is told about it.
func TestMistakes(t *testing.T) {
	files, err := filepath.Glob("testdata/mistakes/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			topo, err := Parse(filepath.Base(file), read(t, file))
			var e *Error
			if !errors.As(err, &e) || topo != nil {
				t.Fatalf("topology %v, error %v; want no topology and an *Error", topo, err)
			}
			golden(t, strings.TrimSuffix(file, ".yaml")+".txt", []byte(err.Error()+"\n"))
		})
	}
}

func TestParse(t *testing.T) {
	got := mustParse(t, `
nodes:                         # before what they refer to
  router:
    host: b1
    kernel: boot/vmlinuz
    initrd: boot/initrd.img
    append: quiet
    memory: 2GiB
    cpus: 4
    interfaces:
      - {network: left, address: 10.0.0.1/24, mac: 02:00:00:00:00:01}
      - {network: right, address: "fd00::1/64"}
      - network: right
  leaf: &leaf
    host: a1
    image: mpi
    memory: 64MiB
    run: >-
      sleep
      1
    disks: [{name: data, size: 1024MiB}, {name: system, base: images/base.qcow2}, {name: more, size: 3MiB, base: raw}]
  1:
    <<: *leaf
    run: "echo 'a: b' #c"
  vm:
    host: b2
    image: old
    memory: 1GiB
    interfaces: [{network: left, address: 10.0.0.9/24, model: e1000}, {network: left, model: virtio}]
    forwards: [8080:80, "0.0.0.0:0:22/tcp", 5353?:53/udp]
    qemu: [-device, "usb-ehci,id=usb"]
  cloud: {host: b2, image: debian, firmware: uefi, boot: [data, root], memory: 1GiB, disks: [{name: root, size: 8GiB}, {name: data, size: 1GiB}],
    shares: [{name: tools, directory: ./tools, mount: /opt/tools}, {name: more, directory: /srv}], cloud_init: false}
  seeded:
    host: b2
    image: debian
    memory: 1GiB
    cloud_init:
      ssh_keys: [" ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f alice@x"]
      user_data: |
        #cloud-config
        packages: [nginx]
  filed: {host: b2, image: debian, memory: 1GiB, cloud_init: {user_data_file: web.yaml}}
  plain: {host: b2, image: debian, memory: 1GiB, cloud_init: true}
  disk: {host: b2, memory: 1GiB, disks: [{name: data, size: 1GiB}, {name: system, base: d.raw}]}
wan:
  - {between: [b, a], delay: 30ms, jitter: 1.5ms, loss: 0.07%, reorder: 1%, rate: 1500kbit}
  - between: [b, c]
sites:
  a: {hosts: [a1]}
  b: {hosts: [b1, b2]}
  c: {hosts: [c1]}
networks:
  left: {subnet: 10.0.0.0/24, mtu: 8950, gateway: nat, external: hold}
  right:
  shut: {subnet: 10.2.0.0/24, gateway: {nat: 10.2.0.9}, external: closed}
slice: s
version: 1
`)
	disks := []Disk{{Name: "data", Size: 1 << 30}, {Name: "system", Base: "images/base.qcow2"}, {Name: "more", Size: 3 << 20, Base: "raw"}}
	want := &Topology{
		Slice: "s",
		Sites: []Site{{"a", []string{"a1"}}, {"b", []string{"b1", "b2"}}, {"c", []string{"c1"}}},
		WAN: []Link{
			{Between: [2]string{"b", "a"}, Delay: 30 * time.Millisecond, Jitter: 1500 * time.Microsecond, Loss: 0.07, Reorder: 1, Rate: 1_500_000},
			{Between: [2]string{"b", "c"}},
		},
		Networks: []Network{
			{Name: "left", Subnet: netip.MustParsePrefix("10.0.0.0/24"), MTU: 8950, Gateway: netip.MustParsePrefix("10.0.0.2/24"), Hold: true},
			{Name: "right", MTU: 1500},
			{Name: "shut", Subnet: netip.MustParsePrefix("10.2.0.0/24"), MTU: 1500, Gateway: netip.MustParsePrefix("10.2.0.9/24"), Closed: true},
		},
		Nodes: []Node{
			{
				Name: "router", Host: "b1", Site: "b",
				Kernel: "boot/vmlinuz", Initrd: "boot/initrd.img", Append: "quiet",
				Memory: 2 << 30, CPUs: 4,
				Interfaces: []Interface{
					{Network: "left", Address: netip.MustParsePrefix("10.0.0.1/24"), MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}},
					{Network: "right", Address: netip.MustParsePrefix("fd00::1/64"), MAC: deriveMAC("s", "router", 1, 0)},
					{Network: "right", MAC: deriveMAC("s", "router", 2, 0)},
				},
			},
			{Name: "leaf", Disks: disks, Host: "a1", Site: "a", Image: "mpi", Memory: 64 << 20, CPUs: 1, Run: "sleep 1"},
			{Name: "1", Disks: disks, Host: "a1", Site: "a", Image: "mpi", Memory: 64 << 20, CPUs: 1, Run: "echo 'a: b' #c"},
			{
				Name: "vm", Host: "b2", Site: "b", Image: "old", Memory: 1 << 30, CPUs: 1,
				Interfaces: []Interface{
					{Network: "left", Address: netip.MustParsePrefix("10.0.0.9/24"), MAC: deriveMAC("s", "vm", 0, 0), Model: "e1000"},
					{Network: "left", MAC: deriveMAC("s", "vm", 1, 0)},
				},
				Forwards: []Forward{
					{Protocol: "tcp", Listen: netip.MustParseAddrPort("127.0.0.1:8080"), Port: 80},
					{Protocol: "tcp", Listen: netip.MustParseAddrPort("0.0.0.0:0"), Port: 22},
					{Protocol: "udp", Listen: netip.MustParseAddrPort("127.0.0.1:5353"), Yield: true, Port: 53},
				},
				QEMU: []string{"-device", "usb-ehci,id=usb"},
			},
			{
				Name: "cloud", Host: "b2", Site: "b", Image: "debian", Firmware: "uefi", Boot: []string{"data", "root"}, Memory: 1 << 30, CPUs: 1,
				Disks:  []Disk{{Name: "root", Size: 8 << 30}, {Name: "data", Size: 1 << 30}},
				Shares: []Share{{"tools", "./tools", "/opt/tools"}, {Name: "more", Directory: "/srv"}}, CloudInit: &CloudInit{Off: true},
			},
			{
				Name: "seeded", Host: "b2", Site: "b", Image: "debian", Memory: 1 << 30, CPUs: 1,
				CloudInit: &CloudInit{
					UserData: "#cloud-config\npackages: [nginx]\n",
					Keys:     []string{"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f alice@x"},
				},
			},
			{Name: "filed", Host: "b2", Site: "b", Image: "debian", Memory: 1 << 30, CPUs: 1, CloudInit: &CloudInit{UserDataFile: "web.yaml"}},
			{Name: "plain", Host: "b2", Site: "b", Image: "debian", Memory: 1 << 30, CPUs: 1, CloudInit: &CloudInit{}},
			{Name: "disk", Host: "b2", Site: "b", Memory: 1 << 30, CPUs: 1, Disks: []Disk{{Name: "data", Size: 1 << 30}, {Name: "system", Base: "d.raw"}}},
		},
	}
	if d := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Prefix{}, netip.AddrPort{})); d != "" {
		t.Error(d)
	}
	if got.Node("leaf") != &got.Nodes[1] || got.Node("none") != nil || got.Network("right") != &got.Networks[1] {
		t.Error("lookup by name")
	}
	if on := got.NodesOn("a1"); len(on) != 2 || on[1].Name != "1" {
		t.Errorf("nodes on a1: %v", on)
	}
	for name, want := range map[string]string{"disk": "system", "cloud": "", "leaf": ""} {
		if d := got.Node(name).BootDisk(); d != want {
			t.Errorf("node %s boots from disk %q, want %q", name, d, want)
		}
	}
	golden(t, "testdata/canonical.yaml", got.Marshal())
	golden(t, "testdata/guest.txt", got.GuestConfig(got.Node("router")))
	if c := string(got.GuestConfig(got.Node("cloud"))); !strings.HasSuffix(c, "share=tools,/opt/tools\n") {
		t.Errorf("a share in the guest's configuration: %q", c)
	}
}

func TestExamples(t *testing.T) {
	files, err := filepath.Glob("../../examples/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		topo, err := Parse(file, read(t, file))
		if err != nil {
			t.Error(err)
			continue
		}
		again := mustParse(t, string(topo.Marshal()))
		if !reflect.DeepEqual(topo, again) {
			t.Errorf("%s: not the same after Marshal: %s", file, topo.Marshal())
		}
	}
}

func TestDerivedMACs(t *testing.T) {
	// Golden: a restored slice on a newer violin must get the same addresses.
	if got := deriveMAC("mandelbrot", "rank0", 0, 0).String(); got != "52:54:00:71:63:f6" {
		t.Errorf("derived %s", got)
	}
	// The address that x would get is given to y; x gets another one.
	taken := deriveMAC("s", "x", 0, 0)
	topo := mustParse(t, fmt.Sprintf(`
version: 1
slice: s
sites: {a: {hosts: [a1]}}
networks: {lan: {}}
nodes:
  x: {host: a1, image: i, memory: 64MiB, interfaces: [{network: lan}]}
  y: {host: a1, image: i, memory: 64MiB, interfaces: [{network: lan, mac: "%v"}]}
`, taken))
	if got, want := topo.Nodes[0].Interfaces[0].MAC, deriveMAC("s", "x", 0, 1); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// Small files that ask for much.
func TestHostile(t *testing.T) {
	nest := func(n int) string {
		var b strings.Builder
		b.WriteString("a0: &a0 {k: v}\n")
		for i := range n {
			fmt.Fprintf(&b, "a%d: &a%d {<<: [*a%d, *a%d, *a%d, *a%d]}\n", i+1, i+1, i, i, i, i)
		}
		fmt.Fprintf(&b, "nodes: *a%d\n", n)
		return b.String()
	}
	many := "l: &l [" + strings.Repeat("{network: x},", 1000) + "]\nsites: {a: {hosts: [a1]}}\nnodes:\n"
	for i := range 1000 {
		many += fmt.Sprintf("  n%d: {interfaces: *l}\n", i)
	}
	for name, tc := range map[string]struct{ src, want string }{
		"flow":    {strings.Repeat("[", 100_000), "nested too deeply"},
		"blocks":  {strings.Repeat("- ", 100_000), "nested too deeply"},
		"keys":    {strings.Repeat("? ", 100_000), "nested too deeply"},
		"long":    {strings.Repeat("#", maxSource+1), "more than 1048576"},
		"merges":  {nest(12), "more than 65536"},
		"aliases": {many, "more than 65536"},
		"loop":    {"slice: &a *a\n", ""},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Parse("f", []byte(tc.src))
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %.200v, want %q", err, tc.want)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	for _, glob := range []string{"testdata/mistakes/*.yaml", "testdata/*.yaml", "../../examples/*.yaml"} {
		files, err := filepath.Glob(glob)
		if err != nil || len(files) == 0 {
			f.Fatal(files, err)
		}
		for _, file := range files {
			f.Add(read(f, file))
		}
	}
	f.Fuzz(func(t *testing.T, src []byte) {
		topo, err := Parse("f", src)
		if err != nil {
			var e *Error
			if topo != nil || !errors.As(err, &e) || len(e.Problems) == 0 {
				t.Fatalf("topology %v with error %v", topo, err)
			}
			for _, p := range e.Problems {
				if p.Line < 1 || p.Column < 1 || p.Message == "" || strings.Contains(p.String(), "\n") {
					t.Fatalf("bad problem %q", p)
				}
			}
			return
		}
		canonical := topo.Marshal()
		again, err := Parse("canonical", canonical)
		if err != nil {
			t.Fatalf("%v\n%s", err, canonical)
		}
		if !reflect.DeepEqual(topo, again) {
			t.Fatal(cmp.Diff(topo, again, cmpopts.EquateComparable(netip.Prefix{}, netip.AddrPort{})))
		}
		for i := range topo.Nodes {
			topo.GuestConfig(&topo.Nodes[i])
		}
	})
}

// What is found wrong only later is told where the file says it, or would.
func TestPlace(t *testing.T) {
	src := []byte("version: 1\nnodes:\n  a: &a\n    image: x\n    disks:\n      - {name: d, base: b}\n  b: *a\n")
	for field, want := range map[string]string{
		"nodes.a.image":         "f.yaml:4:12: gone",
		"nodes.a.disks[0].base": "f.yaml:6:25: gone",
		"nodes.a.disks[0].size": "f.yaml:6:9: gone",
		"nodes.a.disks[7]":      "f.yaml:5:5: gone",
		"nodes.c":               "f.yaml:2:1: gone",
		"nodes.b.image":         "f.yaml:4:12: gone",
	} {
		err := Place("f.yaml", src, field, errors.New("gone"))
		if err.Error() != want {
			t.Errorf("%s: %v, want %s", field, err, want)
		}
	}
}
