package gateway

import (
	"math/rand/v2"
	"sync"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// HoldBytes bounds what a gateway holds back: 16 MiB of frames. What comes beyond it is
// lost, as in any network that has no room.
const HoldBytes = 16 << 20

// A hold keeps frames to the outside, in their order, until it is known that no
// rollback takes back that they were sent.
type hold struct {
	mu      sync.Mutex // held while frames are released, so that they stay in order
	frames  [][]byte
	bytes   int
	first   uint64 // number of the first of frames
	born    uint64 // number of the first of all
	dropped uint64
}

// begin has the numbers begin anywhere: a mark that an earlier gateway on the device gave
// must release nothing of this one, which may come after what the mark covers.
func (h *hold) begin() {
	h.born = rand.Uint64() >> 1 // so that there is no end of them
	h.first = h.born
}

// put adds a frame. It is false if there is no room for it.
func (h *hold) put(f []byte) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.bytes+len(f) > HoldBytes {
		h.dropped++
		return false
	}
	h.frames = append(h.frames, f)
	h.bytes += len(f)
	return true
}

// mark is the number that the next frame gets.
func (h *hold) mark() uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.first + uint64(len(h.frames))
}

// release gives the frames before a mark of this hold to send.
func (h *hold) release(mark uint64, send func([]byte)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if mark < h.born || mark > h.first+uint64(len(h.frames)) {
		return // an earlier gateway's
	}
	for len(h.frames) > 0 && h.first < mark {
		send(h.frames[0])
		h.bytes -= len(h.frames[0])
		h.frames[0] = nil
		h.frames = h.frames[1:]
		h.first++
	}
}

// Held tells what the gateway holds back, and how many frames it had no room for.
func (g *Gateway) Held() (frames, bytes int, dropped uint64) {
	g.hold.mu.Lock()
	defer g.hold.mu.Unlock()
	return len(g.hold.frames), g.hold.bytes, g.hold.dropped
}

// Mark says where the frames end that came until now, for [Gateway.Release].
func (g *Gateway) Mark() uint64 { return g.hold.mark() }

// Release lets the held frames before a mark go to the outside, in order.
func (g *Gateway) Release(mark uint64) { g.hold.release(mark, g.inject) }

func (g *Gateway) inject(f []byte) {
	p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(f)})
	g.link.InjectInbound(0, p)
	p.DecRef()
}

// outbound tells whether a frame that is wanted goes further than to the gateway
// itself. A query to its DNS does.
func (g *Gateway) outbound(f []byte) bool {
	const ethernet = header.EthernetMinimumSize
	if f[12] != 0x08 || f[13] != 0x00 { // ARP
		return false
	}
	return header.IPv4(f[ethernet:]).TransportProtocol() != header.ICMPv4ProtocolNumber
}
