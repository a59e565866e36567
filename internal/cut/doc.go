// Package cut is the protocol that makes a snapshot of a slice consistent:
// Mattern's colouring algorithm, with the colours as numbers (epochs), run in
// the network on whole virtual machines.
//
// It is pure: no I/O, no clock, no goroutine, no randomness. Messages and the
// time go in, decisions and effects come out as data, and the same input gives
// the same output. It is the very code that runs, so what the tests explore
// exhaustively is what a slice is cut by.
//
//   - [Epoch] is a node's colour and a frame's: its sender's when it left.
//   - [Gate] stands before one node, where its switch hands frames to the
//     controller: it says what is delivered, recorded or held, and releases what
//     was held.
//   - [Steps] is the order in which one node is cut. Each step has a reason to be
//     where it is, and a mutant in the tests that moves it.
//   - [Coordinator] takes a whole slice from one epoch to the next: prepare, cut,
//     drain, seal, commit, or abort from any of them.
//
// docs/cut-protocol.md states what holds, why, and what happens at each fault.
package cut
