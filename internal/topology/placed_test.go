package topology

import (
	"bytes"
	"reflect"
	"strings"
	"testing"
)

// Only hosts and sites change, the topology that there was stays as it is, and what
// comes of it is one that can be written and read.
func TestPlaced(t *testing.T) {
	before, err := Parse("t.yaml", []byte(`version: 1
slice: s
sites:
  west: {hosts: [alpha, beta]}
  east: {hosts: [gamma]}
wan:
  - {between: [west, east], delay: 30ms}
networks:
  lan: {subnet: 10.1.0.0/24, gateway: nat}
nodes:
  n1: {host: alpha, image: i, memory: 64MiB, interfaces: [{network: lan, address: 10.1.0.2/24}]}
  n2: {host: gamma, image: i, memory: 64MiB, interfaces: [{network: lan, address: 10.1.0.3/24}]}
`))
	if err != nil {
		t.Fatal(err)
	}
	written := before.Marshal()
	after := before.Placed(map[string]string{"n1": "delta", "n2": "beta"}, map[string]string{"delta": "north", "beta": "nowhere"})
	if !bytes.Equal(before.Marshal(), written) {
		t.Error("the topology was changed in place")
	}
	again, err := Parse("again.yaml", after.Marshal())
	if err != nil {
		t.Fatalf("%v: %s", err, after.Marshal())
	}
	if !reflect.DeepEqual(again, after) {
		t.Errorf("%+v, and read again %+v", after, again)
	}
	for name, want := range map[string]string{"n1": "delta in north", "n2": "beta in west"} {
		if n := after.Node(name); n.Host+" in "+n.Site != want {
			t.Errorf("%s is on %s in %s, want %s", name, n.Host, n.Site, want)
		}
	}
	if h := after.GatewayHost("lan"); h != "delta" {
		t.Errorf("the way out is on %s, and its network's first node on delta", h)
	}
	if !bytes.Equal(after.GatewayMAC("lan"), before.GatewayMAC("lan")) {
		t.Error("the gateway has another address")
	}
	for i := range before.Nodes {
		n, m := before.Nodes[i], after.Nodes[i]
		if !bytes.Equal(before.GuestConfig(&n), after.GuestConfig(&m)) {
			t.Errorf("%s is told something else", n.Name)
		}
		if n.Host, n.Site = m.Host, m.Site; !reflect.DeepEqual(n, m) {
			t.Errorf("%+v, want %+v", m, n)
		}
	}
	// A node that may be anywhere in a site is written and read as such, until it has a host.
	open := mustParse(t, strings.Replace(string(before.Marshal()), `host: "alpha"`, "site: west", 1))
	if n := open.Node("n1"); n.Host != "" || n.Site != "west" || !reflect.DeepEqual(mustParse(t, string(open.Marshal())), open) {
		t.Errorf("in a site: %+v", n)
	}
	if n := open.Placed(map[string]string{"n1": "beta"}, nil).Node("n1"); n.Host != "beta" || n.Site != "west" {
		t.Errorf("in a site, placed: %+v", n)
	}
	if back := after.Placed(map[string]string{"n1": "alpha", "n2": "gamma"}, nil); back.Node("n1").Site != "west" || back.SiteOf("delta") != "north" {
		t.Errorf("placed back: %+v", back)
	}
}
