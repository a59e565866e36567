package bench

import (
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"violin/internal/topology"
)

func TestParseCounters(t *testing.T) {
	c := parseCounters("Ip: Forwarding\nIp: 1\nTcp: RtoAlgorithm MaxConn RetransSegs\nTcp: 1 -1 42\nTcpExt: SyncookiesSent TCPTimeouts\nTcpExt: 0 7\n")
	if c["RetransSegs"] != 42 || c["TCPTimeouts"] != 7 || c["MaxConn"] != -1 || c["Forwarding"] != 0 {
		t.Errorf("%v", c)
	}
	for _, broken := range []string{"", "Tcp: RetransSegs", "Tcp: RetransSegs\nTcp:\n", "Tcp: RetransSegs\nTcp: x\n"} {
		if _, ok := parseCounters(broken)["RetransSegs"]; ok {
			t.Errorf("%q has a counter", broken)
		}
	}
}

func TestGoodput(t *testing.T) {
	text := `{"intervals": [`
	for i := range 100 { // of 100 ms: 1,000 bytes each in the first half, 500 in the second
		bytes := 1000
		if i >= 50 {
			bytes = 500
		}
		if i > 0 {
			text += ","
		}
		text += fmt.Sprintf(`{"sum": {"start": %g, "end": %g, "bytes": %d}}`, float64(i)/10, float64(i+1)/10, bytes)
	}
	var r report
	if err := json.Unmarshal([]byte(text+`], "end": {"sum_sent": {"retransmits": 3}, "sum": {"packets": 9, "lost_packets": 2}}}`), &r); err != nil {
		t.Fatal(err)
	}
	if r.End.Sent.Retransmits != 3 || r.End.Sum.Packets != 9 || r.End.Sum.Lost != 2 {
		t.Errorf("%+v", r.End)
	}
	for _, test := range []struct {
		from, to time.Duration
		want     float64
	}{{0, 5 * time.Second, 80e3}, {5 * time.Second, 10 * time.Second, 40e3}, {4 * time.Second, 6 * time.Second, 60e3}} {
		if got, err := r.goodput(test.from, test.to); err != nil || got < 0.98*test.want || got > 1.02*test.want {
			t.Errorf("%s to %s: %g, %v; want %g", test.from, test.to, got, err, test.want)
		}
	}
	if _, err := r.goodput(6*time.Second, 11*time.Second); err == nil {
		t.Error("a window that was not measured to its end has a goodput")
	}
}

func TestLiveTopology(t *testing.T) {
	if topo, err := topology.Parse("bench-cut.yaml", liveTopology); err != nil || topo.Slice != liveSlice || len(topo.Nodes) != 4 {
		t.Errorf("%v, %v", topo, err)
	}
}
