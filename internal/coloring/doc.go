// Package coloring turns (slice, epochs) into the flow entries of a host's switch.
//
// It is pure: a [Switch] (which ports, networks and peers there are) and the
// colours that its nodes wear make a [FlowSet], which is the whole truth of
// what the switch should hold. [Diff] of two sets is the bundle that takes the
// switch from one to the other, whether the difference is one flipped node or a
// switch that came back empty, so there is one way to install, to flip, to
// repair and to remove.
//
// # The pipeline
//
//	table 0  classify   stamp: where a frame leaves its sender, it gets the sender's network and epoch
//	                    tunnel: a frame from another host brings both in the tunnel id
//	table 10 forward    destination address to receiving port or peer; broadcast and unknown to all of them
//	table 20 gate       once per receiving port: same epoch deliver, older deliver and record, newer hold
//	table 30 tunnel     once per peer: network and epoch into the tunnel id, out to the peer
//
// # Registers
//
//	reg0        NETWORK  number of the network, 1..32767
//	reg1        EPOCH    the sender's epoch, 0..255
//	reg2        PORT     the receiving port's OpenFlow number (input of table 20)
//	reg3        PEER     the peer's number (input of table 30)
//	reg4 bit 0  TUNNELED the frame came from another host (never goes out to a peer again)
//	reg5 bit 0  OUTSIDE  the frame came from a gateway to the outside; EPOCH means nothing
//
// The tunnel id (the VXLAN network identifier, 24 bits) is OUTSIDE<<23 | NETWORK<<8 | EPOCH,
// so inner frames and their MTU are untouched.
//
// docs/flow-tables.md shows the tables of a running host.
package coloring
