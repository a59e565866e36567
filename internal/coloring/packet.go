package coloring

import (
	"fmt"

	"violin/internal/cut"
	"violin/internal/openflow"
)

// Packet is what a packet-in of the gate table says of its frame.
type Packet struct {
	Kind     Kind      // of the entry that sent it: KindClosed, KindHold or KindRecord
	Port     uint32    // OpenFlow number of the receiving port
	Network  uint16    // the frame's network
	Epoch    cut.Epoch // the frame's epoch: its sender's when it left
	Tunneled bool      // it came from another host
	Outside  bool      // it came from outside the slice: it has no epoch
	Buffer   uint32    // as in [openflow.PacketIn]
}

// Delivered tells whether the switch has delivered the frame already and the
// packet-in is a copy for the record.
func (p Packet) Delivered() bool { return p.Kind == KindRecord }

// ReadPacket reads the colours off a packet-in.
func ReadPacket(in *openflow.PacketIn) (Packet, error) {
	c := UnpackCookie(in.Cookie)
	switch c.Kind {
	case KindClosed, KindHold, KindRecord:
	default:
		return Packet{}, fmt.Errorf("coloring: packet-in from table %d by cookie %#x, which no gate entry has", in.Table, in.Cookie)
	}
	return Packet{
		Kind:     c.Kind,
		Port:     uint32(c.Port),
		Network:  c.Network,
		Epoch:    cut.Epoch(in.Reg(regEpoch)),
		Tunneled: in.Reg(regTunneled)&1 == 1,
		Outside:  in.Reg(regOutside)&1 == 1,
		Buffer:   in.Buffer,
	}, nil
}

// Channel is one directed pair of hosts on one network, seen from one of its ends.
type Channel struct {
	Peer    uint16
	Network uint16
	Epoch   cut.Epoch
}

// Counters are Mattern's message counters of one host's channels, in frames.
type Counters struct {
	Sent     map[Channel]uint64 // put into the tunnel to the peer
	Received map[Channel]uint64 // taken from the tunnel from the peer
}

// ReadCounters reads the counters off the switch's flow statistics.
func ReadCounters(stats []openflow.FlowStats) Counters {
	c := Counters{Sent: map[Channel]uint64{}, Received: map[Channel]uint64{}}
	for _, s := range stats {
		k := UnpackCookie(s.Cookie)
		ch := Channel{Peer: k.Port, Network: k.Network, Epoch: k.Epoch}
		switch k.Kind {
		case KindSent:
			c.Sent[ch] += s.Packets
		case KindReceived:
			c.Received[ch] += s.Packets
		}
	}
	return c
}
