package remote

import (
	"net"
	"net/netip"
	"reflect"
	"testing"

	"violin/internal/agent"
	"violin/internal/gateway"
)

// A gateway's forwards get to its host and are told of from there, and the host says
// which of them are taken.
func TestForwards(t *testing.T) {
	w := newWorld(t)
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	to := netip.MustParseAddrPort("10.0.0.1:80")
	forwards := []gateway.Forward{
		{Protocol: "tcp", Listen: netip.MustParseAddrPort(l.Addr().String()), To: to},
		{Protocol: "udp", Listen: netip.MustParseAddrPort("0.0.0.0:0"), Yield: true, To: to},
	}
	spec := agent.GatewaySpec{
		Slice: "s", Network: 7, Address: netip.MustParsePrefix("10.0.0.254/24"), MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, MTU: 1500, Closed: true, Forwards: forwards,
	}
	if err := w.agent.AddGateway(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(w.host.exit, spec) {
		t.Errorf("the host has\n%+v, want\n%+v", w.host.exit, spec)
	}
	on, err := w.agent.Forwards(t.Context(), "s")
	if err != nil {
		t.Fatal(err)
	}
	var want []agent.Listening
	for _, f := range forwards {
		want = append(want, agent.Listening{Network: 7, Listening: gateway.Listening{Forward: f, At: f.Listen, Problem: "none"}})
	}
	if !reflect.DeepEqual(on, want) {
		t.Errorf("told\n%+v, want\n%+v", on, want)
	}
	problems, err := w.hub.Probe(t.Context(), "alpha", forwards)
	if err != nil || len(problems) != 2 || problems[0] == nil || problems[1] != nil {
		t.Errorf("probed: %v, %v", problems, err)
	}
	forwards[0].Listen = netip.AddrPort{}
	if _, err := w.hub.Probe(t.Context(), "alpha", forwards); err == nil {
		t.Error("a forward without a port was probed")
	}
}
