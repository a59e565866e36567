package coloring

import (
	"fmt"

	"violin/internal/cut"
)

// Kind says what a flow entry is there for.
type Kind uint8

// The kinds of flow entries.
const (
	KindStamp      Kind = 1 + iota // classify: a local node's frames get their colour
	KindTunnelIn                   // classify: a peer's frames bring their colour
	KindReceived                   // classify: the same, counted: received from the peer
	KindForward                    // forward: a known address
	KindFlood                      // forward: broadcast, multicast, unknown
	KindSelf                       // gate: back to where it came from, dropped
	KindClosed                     // gate: closed, to the controller
	KindDeliver                    // gate: same epoch, delivered
	KindOlder                      // gate: older, delivered
	KindRecord                     // gate: older, delivered and copied to the controller
	KindHold                       // gate: newer, to the controller
	KindTunnelOut                  // tunnel: to a peer
	KindSent                       // tunnel: the same, counted: sent to the peer
	KindOutside                    // gate: from or to a gateway to the outside, delivered
	KindOutsideIn                  // classify: from a gateway on a peer
	KindOutsideOut                 // tunnel: from the gateway here to a peer
)

var kindNames = map[Kind]string{
	KindStamp: "stamp", KindTunnelIn: "tunnel-in", KindReceived: "received", KindForward: "forward",
	KindFlood: "flood", KindSelf: "self", KindClosed: "closed", KindDeliver: "deliver", KindOlder: "older",
	KindRecord: "record", KindHold: "hold", KindTunnelOut: "tunnel-out", KindSent: "sent",
	KindOutside: "outside", KindOutsideIn: "outside-in", KindOutsideOut: "outside-out",
}

func (k Kind) String() string {
	if s, ok := kindNames[k]; ok {
		return s
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// Cookie says which run of the controller installed an entry, and what for, so
// that stale entries can be told from ours and a counter be read by what it counts.
//
//	bits 63..48  Run      of the controller
//	bits 47..40  Kind
//	bits 39..32  Epoch    for the entries of one epoch, else 0
//	bits 31..16  Port     OpenFlow port number, or the peer's number for tunnel entries
//	bits 15..0   Network
type Cookie struct {
	Run     uint16
	Kind    Kind
	Epoch   cut.Epoch
	Port    uint16
	Network uint16
}

// Pack returns the cookie as it stands in a flow entry.
func (c Cookie) Pack() uint64 {
	return uint64(c.Run)<<48 | uint64(c.Kind)<<40 | uint64(c.Epoch)<<32 | uint64(c.Port)<<16 | uint64(c.Network)
}

// UnpackCookie reads a flow entry's cookie.
func UnpackCookie(v uint64) Cookie {
	return Cookie{
		Run: uint16(v >> 48), Kind: Kind(v >> 40), Epoch: cut.Epoch(v >> 32), Port: uint16(v >> 16), Network: uint16(v),
	}
}

func (c Cookie) String() string {
	return fmt.Sprintf("%s epoch %d port %d network %d (run %#x)", c.Kind, c.Epoch, c.Port, c.Network, c.Run)
}
