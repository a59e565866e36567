package cut

// Epoch is a colour: a node's own, and that of every frame it sends. A cut
// moves each node from one epoch to the next.
//
// It is a serial number modulo 256 (RFC 1982 with SERIAL_BITS 8), since eight
// bits of a tunnel header carry it. Two epochs in use at one time are never
// more than a few cuts apart, so the order of any two that meet is defined.
type Epoch uint8

// Next returns the epoch that a cut of nodes in e moves them to: 255 is
// followed by 0.
func (e Epoch) Next() Epoch { return e + 1 }

// Compare returns -1 if e is older than f, 0 if they are equal, and +1 if e is
// newer. Of two epochs 128 apart, for which RFC 1982 defines no order, each is
// newer than the other: a gate then holds the frame, which is what can be undone.
func (e Epoch) Compare(f Epoch) int {
	switch d := int8(e - f); {
	case e == f:
		return 0
	case d > 0 || d == -128:
		return 1
	default:
		return -1
	}
}
