// Package certificate owns what is kept with a snapshot so that its cut can be
// judged again, later and by someone else: what each node did and when, what
// each pair of hosts sent and received, and what was recorded.
//
// [Check] re-derives from it that the cut was consistent. It is pure, and shares
// no code with what takes a cut: this package imports neither the protocol nor
// the coordinator nor the agents, has a reader of its own for the channel
// state, and its own idea of the order of a node's steps and of epochs. A mistake
// there is then not repeated here.
//
// docs/certificate.md is the format, field by field, and says what a certificate
// proves and what it cannot.
package certificate
