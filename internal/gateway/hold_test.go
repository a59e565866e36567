package gateway_test

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"violin/internal/gateway"
)

// outside keeps what arrives there.
func outside(t *testing.T) (address string, heard chan string) {
	t.Helper()
	c, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	heard = make(chan string, 100)
	go func() {
		buf := make([]byte, 2048)
		for {
			n, _, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			heard <- string(buf[:n])
		}
	}()
	t.Cleanup(func() { c.Close() })
	return c.LocalAddr().String(), heard
}

// What guests send to the outside waits until it is released, in order; what is for
// the gateway itself does not.
func TestHold(t *testing.T) {
	near, far := cable(t)
	address, heard := outside(t)
	g := start(t, near, gateway.Config{Hold: true, Dial: instead(address)})
	c := newGuest(t, far).dialUDP(t, netip.AddrPortFrom(elsewhere, 9))
	sent := 0
	// say sends, and waits until the gateway has it. That took an exchange of ARP, which
	// was answered.
	say := func(text string) {
		t.Helper()
		if _, err := c.Write([]byte(text)); err != nil {
			t.Fatal(err)
		}
		sent++
		for n := 0; n < sent; n, _, _ = g.Held() {
			time.Sleep(time.Millisecond)
		}
	}
	expect := func(want ...string) {
		t.Helper()
		for _, w := range want {
			if got := <-heard; got != w {
				t.Fatalf("the outside heard %q, want %q", got, w)
			}
		}
	}
	say("one")
	say("two")
	before := g.Mark()
	say("three")
	if n, bytes, dropped := g.Held(); n != 3 || bytes == 0 || dropped != 0 {
		t.Errorf("%d frames held, %d bytes, %d dropped", n, bytes, dropped)
	}
	g.Release(before)
	expect("one", "two")
	sent = 1
	g.Release(before) // once more releases nothing
	say("four")
	g.Release(g.Mark())
	expect("three", "four") // and nothing was heard between two and three
	if n, bytes, _ := g.Held(); n != 0 || bytes != 0 {
		t.Errorf("%d frames held, %d bytes, after all are released", n, bytes)
	}
}
