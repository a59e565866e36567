package lab

import (
	"math"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestPlanGivesAddresses(t *testing.T) {
	lay, err := plan(Config{Sites: []Site{
		{Name: "utah", Hosts: []string{"utah-1", "utah-2"}},
		{Name: "gpo", Hosts: []string{"gpo-1"}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	got := make(map[string][2]string)
	for _, site := range lay.hosts {
		for _, h := range site {
			got[h.name] = [2]string{h.addr.String(), h.mac.String()}
		}
	}
	want := map[string][2]string{
		"utah-1": {"172.31.1.1/16", "02:56:00:00:01:01"},
		"utah-2": {"172.31.1.2/16", "02:56:00:00:01:02"},
		"gpo-1":  {"172.31.2.1/16", "02:56:00:00:02:01"},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if lay.mtu != DefaultMTU {
		t.Errorf("mtu %d, want %d", lay.mtu, DefaultMTU)
	}
}

func TestPlanRefuses(t *testing.T) {
	two := []Site{{Name: "a", Hosts: []string{"a1"}}, {Name: "b", Hosts: []string{"b1"}}}
	link := func(a, b string, s Shape) []LinkConfig { return []LinkConfig{{A: a, B: b, Shape: s}} }
	for _, tt := range []struct {
		name string
		cfg  Config
		want string // one line for each mistake
	}{
		{"nothing", Config{}, "no site"},
		{"unnamed", Config{Sites: []Site{{Hosts: []string{""}}}}, "site 1 has no name\nhost 1 of site \"\" has no name"},
		{"site twice", Config{Sites: []Site{{Name: "a"}, {Name: "a"}}}, `site "a" is given twice`},
		{"host twice", Config{Sites: []Site{{Name: "a", Hosts: []string{"h"}}, {Name: "b", Hosts: []string{"h"}}}},
			`host "h" is given twice, in sites "a" and "b"`},
		{"too many sites", Config{Sites: make([]Site, 255)}, "255 sites"},
		{"too many hosts", Config{Sites: []Site{{Name: "a", Hosts: make([]string, 255)}}}, `site "a" has 255 hosts`},
		{"mtu", Config{Sites: two, MTU: 100}, "mtu 100"},
		{"underlay", Config{Sites: two, Underlay: netip.MustParsePrefix("10.0.0.0/24")}, "underlay 10.0.0.0/24"},
		{"underlay with host bits", Config{Sites: two, Underlay: netip.MustParsePrefix("10.0.1.0/16")}, "underlay 10.0.1.0/16"},
		{"underlay IPv6", Config{Sites: two, Underlay: netip.MustParsePrefix("fd00::/16")}, "underlay fd00::/16"},
		{"unknown sites", Config{Sites: two, Links: append(link("a", "x", Shape{}), link("y", "b", Shape{})...)},
			"there is no site \"x\"\nthere is no site \"y\""},
		{"self", Config{Sites: two, Links: link("a", "a", Shape{})}, `joins site "a" to itself`},
		{"link twice", Config{Sites: two, Links: append(link("a", "b", Shape{}), link("b", "a", Shape{})...)}, "given twice"},
		{"delay", Config{Sites: two, Links: link("a", "b", Shape{Delay: -1})}, "delay -1ns"},
		{"jitter", Config{Sites: two, Links: link("a", "b", Shape{Delay: 1, Jitter: 2})}, "jitter 2ns"},
		{"loss", Config{Sites: two, Links: link("a", "b", Shape{Loss: 1.5})}, "loss 1.5"},
		{"loss NaN", Config{Sites: two, Links: link("a", "b", Shape{Loss: math.NaN()})}, "loss NaN"},
		{"reorder", Config{Sites: two, Links: link("a", "b", Shape{Reorder: -0.1})}, "reorder -0.1"},
		{"rate", Config{Sites: two, Links: link("a", "b", Shape{Rate: -1})}, "rate -1"},
		{"queue", Config{Sites: two, Links: link("a", "b", Shape{QueueBytes: -1})}, "queue of -1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			lay, err := plan(tt.cfg)
			if err == nil || lay != nil {
				t.Fatalf("plan = %v, %v; want an error", lay, err)
			}
			lines := strings.Split(err.Error(), "\n")
			wants := strings.Split(tt.want, "\n")
			if len(lines) != len(wants) {
				t.Fatalf("error %q has %d lines, want %d", err, len(lines), len(wants))
			}
			for i, want := range wants {
				if !strings.Contains(lines[i], want) {
					t.Errorf("line %d: %q does not say %q", i, lines[i], want)
				}
			}
		})
	}
}

func TestRoutes(t *testing.T) {
	const ms = time.Millisecond
	type link struct {
		a, b  int
		delay time.Duration
	}
	for _, tt := range []struct {
		name  string
		sites int
		links []link
		want  [][]int
	}{
		{"alone", 1, nil, [][]int{{-1}}},
		{"islands", 3, []link{{0, 1, ms}}, [][]int{{-1, 0, -1}, {0, -1, -1}, {-1, -1, -1}}},
		{"line", 3, []link{{0, 1, ms}, {1, 2, ms}}, [][]int{{-1, 0, 0}, {0, -1, 1}, {1, 1, -1}}},
		{"triangle", 3, []link{{0, 1, ms}, {1, 2, ms}, {0, 2, 2 * ms}}, [][]int{{-1, 0, 2}, {0, -1, 1}, {2, 1, -1}}},
		{"quicker round about", 3, []link{{0, 1, ms}, {1, 2, ms}, {0, 2, 3 * ms}}, [][]int{{-1, 0, 0}, {0, -1, 1}, {1, 1, -1}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var ends [][2]int
			var cfgs []LinkConfig
			for _, l := range tt.links {
				ends = append(ends, [2]int{l.a, l.b})
				cfgs = append(cfgs, LinkConfig{Shape: Shape{Delay: l.delay}})
			}
			if d := cmp.Diff(tt.want, routes(tt.sites, ends, cfgs)); d != "" {
				t.Error(d)
			}
		})
	}
}
