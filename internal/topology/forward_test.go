package topology

import (
	"net/netip"
	"testing"
)

func TestParseForward(t *testing.T) {
	at := netip.MustParseAddrPort
	for text, want := range map[string]Forward{
		"8080:80":               {Protocol: "tcp", Listen: at("127.0.0.1:8080"), Port: 80},
		"0:80/tcp":              {Protocol: "tcp", Listen: at("127.0.0.1:0"), Port: 80},
		"43211?:22":             {Protocol: "tcp", Listen: at("127.0.0.1:43211"), Yield: true, Port: 22},
		"0.0.0.0:5353:53/udp":   {Protocol: "udp", Listen: at("0.0.0.0:5353"), Port: 53},
		"192.0.2.1:65535:65535": {Protocol: "tcp", Listen: at("192.0.2.1:65535"), Port: 65535},
	} {
		got, err := ParseForward(text)
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v; want %+v", text, got, err, want)
		}
		if again, err := ParseForward(got.String()); err != nil || again != got {
			t.Errorf("%s is written as %s, which reads as %+v, %v", text, got, again, err)
		}
	}
}

func TestForwardsOverlap(t *testing.T) {
	forward := func(text string) Forward {
		t.Helper()
		f, err := ParseForward(text)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	for _, c := range []struct {
		a, b string
		want bool
	}{
		{"8080:80", "8080:81", true},
		{"8080:80", "8081:80", false},
		{"8080:80", "8080:80/udp", false},
		{"8080:80", "0.0.0.0:8080:80", true},
		{"8080:80", "127.0.0.2:8080:80", false},
		{"0:80", "0:80", false},
		{"8080?:80", "8080:80", false},
	} {
		a, b := forward(c.a), forward(c.b)
		if a.Overlaps(b) != c.want || b.Overlaps(a) != c.want {
			t.Errorf("%s and %s: %v, %v; want %v", c.a, c.b, a.Overlaps(b), b.Overlaps(a), c.want)
		}
	}
}

func TestEntrance(t *testing.T) {
	topo := mustParse(t, `
version: 1
slice: s
sites: {a: {hosts: [a1]}}
networks: {inner: {subnet: 10.0.0.0/24}, six: {subnet: "fd00::/64"}, lan: {subnet: 10.1.0.0/24, gateway: nat}}
nodes:
  x: {host: a1, image: i, memory: 64MiB, interfaces: [{network: inner, address: 10.0.0.1/24}, {network: lan}, {network: six, address: "fd00::1/64"}, {network: lan, address: 10.1.0.7/24}]}
  y: {host: a1, image: i, memory: 64MiB, interfaces: [{network: lan}]}
`)
	if w, a := topo.Entrance(topo.Node("x")); w == nil || w.Name != "lan" || a != netip.MustParseAddr("10.1.0.7") {
		t.Errorf("x is reached by %v at %v", w, a)
	}
	if w, a := topo.Entrance(topo.Node("y")); w != nil {
		t.Errorf("y, without an address, is reached by %v at %v", w, a)
	}
}
