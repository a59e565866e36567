package e2e

import (
	"os"
	"syscall"
	"testing"
	"time"
)

// A server is killed, or told to end, and another comes back: what joined hosts run goes
// on, as the same processes, and nothing that is between them is lost or doubled.
func TestServerReturns(t *testing.T) {
	o, _ := newOutlive(t)
	pids := o.running()
	for _, how := range []os.Signal{os.Kill, syscall.SIGTERM} {
		began := time.Now()
		_ = o.server.cmd.Process.Signal(how)
		<-o.server.done
		if len(o.vms()) != len(o.nodes) {
			t.Fatalf("%v: of %d nodes these run without the server: %q", how, len(o.nodes), o.vms())
		}
		o.serve()
		o.await(len(o.hosts))
		t.Logf("%v: all hosts are back after %s", how, time.Since(began).Round(time.Millisecond))
		o.unharmed("after the server's end", pids)
		o.snapshot()
	}
}
