package coloring

import (
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"violin/internal/cut"
	"violin/internal/openflow"
)

// edit is a mistake in one kind of entries: f changes the entry, or returns false
// for none at all.
func edit(k Kind, f func(h *host, m *openflow.FlowMod) bool) func(*host, FlowSet) {
	return func(h *host, fs FlowSet) {
		for _, m := range fs.Sorted() {
			if UnpackCookie(m.Cookie).Kind != k {
				continue
			}
			delete(fs, key(m.Table, m.Priority, m.Match))
			m.Match = slices.Clone(m.Match)
			if f(h, &m) {
				fs.add(m)
			}
		}
	}
}

func forgotten(*host, *openflow.FlowMod) bool { return false }

func actions(m *openflow.FlowMod) []openflow.Action {
	return slices.Clone(m.Instructions[0].(openflow.ApplyActions).Actions)
}

// poses as another kind of entry, whose frames nobody misses at the controller.
func poses(k Kind, f func(*host, *openflow.FlowMod) bool) func(*host, *openflow.FlowMod) bool {
	return func(h *host, m *openflow.FlowMod) bool {
		c := UnpackCookie(m.Cookie)
		c.Kind = k
		m.Cookie = c.Pack()
		m.Flags &^= openflow.FlagSendFlowRemoved
		return f(h, m)
	}
}

// does gives an entry other actions, made of the port's number.
func does(f func(port uint32) []openflow.Action) func(*host, *openflow.FlowMod) bool {
	return func(_ *host, m *openflow.FlowMod) bool {
		m.Instructions = apply(f(uint32(UnpackCookie(m.Cookie).Port))...)
		return true
	}
}

// color is that of the node at the entry's port.
func (h *host) color(m *openflow.FlowMod) Color {
	return h.state.Nodes[h.ports[uint32(UnpackCookie(m.Cookie).Port)].node.key]
}

// atGateway tells whether the entry is of a gateway's port.
func (h *host) atGateway(m *openflow.FlowMod) bool {
	return h.ports[uint32(UnpackCookie(m.Cookie).Port)].node.outside()
}

// stampWith makes the stamp's epoch anything else.
func stampWith(f func(Color) cut.Epoch) func(*host, *openflow.FlowMod) bool {
	return func(h *host, m *openflow.FlowMod) bool {
		if h.ports[uint32(UnpackCookie(m.Cookie).Port)].node.outside() {
			return true
		}
		as := actions(m)
		as[1] = load(regEpoch, uint32(f(h.color(m))))
		m.Instructions = apply(as...)
		return true
	}
}

// without leaves a field out of the match.
func without(id openflow.FieldID) func(*host, *openflow.FlowMod) bool {
	return func(_ *host, m *openflow.FlowMod) bool {
		m.Match = slices.DeleteFunc(m.Match, func(f openflow.Field) bool { return f.ID() == id })
		return true
	}
}

func all(edits ...func(*host, FlowSet)) func(*host, FlowSet) {
	return func(h *host, fs FlowSet) {
		for _, e := range edits {
			e(h, fs)
		}
	}
}

var (
	output     = func(port uint32) []openflow.Action { return []openflow.Action{openflow.Output{Port: port}} }
	controller = openflow.Output{Port: openflow.PortController, MaxLen: openflow.ControllerNoBuffer}
	toGate     = func(uint32) []openflow.Action { return []openflow.Action{controller} }
	nothing    = func(uint32) []openflow.Action { return nil }
)

// TestMutants makes mistakes in the flow entries. Each must be found: one that is
// not shows that the world is blind, or that the tables have an entry too many.
func TestMutants(t *testing.T) {
	const (
		orphan  = "but not sent in"          // received, or recorded, and never sent
		missing = "is in no channel state"   // in flight, and not recorded
		stays   = "does not leave its host"  // not put into a tunnel
		twice   = "twice"                    // delivered, or sent
		astray  = "which it is not for"      // to a wrong port
		nobody  = "where it is for nobody"   // to a wrong host
		color   = "has tunnel id"            // wrongly coloured on its way
		counts  = "frames of network"        // Mattern's counters
		handed  = "handed over to the contr" // the session's own counters
		lost    = "are reported lost"        // the copies' counters
	)
	for _, m := range []struct {
		what   string
		want   string
		mutate func(*host, FlowSet)
	}{
		// The gate.
		{"a newer frame is delivered", orphan, edit(KindHold, poses(KindDeliver, does(output)))},
		{"a newer frame is delivered and held", twice, edit(KindHold, does(func(p uint32) []openflow.Action { return append(output(p), controller) }))},
		{"a newer frame is dropped, as VNsnap did", missing, edit(KindHold, poses(KindDeliver, does(nothing)))},
		{"hold and deliver are swapped", "", all(edit(KindHold, poses(KindDeliver, does(output))), edit(KindDeliver, poses(KindHold, does(toGate))))},
		{"an older frame is not recorded", missing, edit(KindRecord, does(output))},
		{"an older frame is recorded, not delivered", missing, edit(KindRecord, does(toGate))},
		{"an older frame is dropped", missing, edit(KindRecord, does(nothing))},
		{"a frame of the same epoch is copied too", "", edit(KindDeliver, func(_ *host, m *openflow.FlowMod) bool {
			return poses(KindRecord, does(func(p uint32) []openflow.Action { return append(output(p), controller) }))(nil, m)
		})},
		{"the copies are counted on where the deliveries were", lost, edit(KindRecord, func(_ *host, m *openflow.FlowMod) bool {
			m.Flags &^= openflow.FlagResetCounts
			return true
		})},
		{"a closed gate is not", "", edit(KindClosed, forgotten)},
		{"a closed gate has too low a priority", "", edit(KindClosed, func(_ *host, m *openflow.FlowMod) bool {
			m.Priority = prioExact - 1
			return true
		})},
		{"a closed gate delivers as well", "", edit(KindClosed, does(func(p uint32) []openflow.Action { return append(output(p), controller) }))},
		{"a closed gate drops", missing, edit(KindClosed, poses(KindSelf, does(nothing)))},
		{"a closed gate's count begins anew at the flip", handed, edit(KindClosed, func(h *host, m *openflow.FlowMod) bool {
			c := UnpackCookie(m.Cookie)
			c.Epoch = h.color(m).Epoch
			m.Cookie = c.Pack()
			m.Flags |= openflow.FlagResetCounts
			return true
		})},
		{"nobody is told what a closed gate has handed over", handed, edit(KindClosed, func(_ *host, m *openflow.FlowMod) bool {
			m.Flags = 0
			return true
		})},
		{"a frame returns to where it came from", astray, edit(KindSelf, forgotten)},
		{"the gate of one interface serves the other", "", edit(KindDeliver, func(h *host, m *openflow.FlowMod) bool {
			p := h.ports[uint32(UnpackCookie(m.Cookie).Port)]
			m.Instructions = apply(output(p.node.ifaces[0].port)...)
			return true
		})},

		// The outside.
		{"a frame from outside is judged by its epoch", "from outside is handed over", edit(KindOutside, func(h *host, m *openflow.FlowMod) bool {
			return h.atGateway(m)
		})},
		{"a frame from outside is recorded", "from outside is handed over", edit(KindOutside, func(h *host, m *openflow.FlowMod) bool {
			return h.atGateway(m) || poses(KindRecord, does(func(p uint32) []openflow.Action { return append(output(p), controller) }))(h, m)
		})},
		{"a frame from outside is like one of epoch 0", "", edit(KindStamp, func(h *host, m *openflow.FlowMod) bool {
			if h.atGateway(m) {
				m.Instructions = apply(slices.Delete(actions(m), 1, 2)...)
			}
			return true
		})},
		{"a frame to the outside is held", "to the outside is handed over", edit(KindOutside, func(h *host, m *openflow.FlowMod) bool {
			return !h.atGateway(m) || poses(KindHold, does(toGate))(h, m)
		})},
		{"a frame to the outside is judged by its epoch", "", edit(KindOutside, func(h *host, m *openflow.FlowMod) bool {
			if h.atGateway(m) {
				m.Match = append(slices.Clone(m.Match), openflow.Reg(regEpoch, uint32(h.w.first)))
			}
			return true
		})},
		{"a frame from outside goes into the tunnel coloured", color, edit(KindOutsideOut, forgotten)},
		{"a frame from outside is not known at the tunnel's end", "", edit(KindOutsideIn, forgotten)},
		{"what came from outside by a tunnel goes on by another", "", edit(KindOutsideIn, func(_ *host, m *openflow.FlowMod) bool {
			m.Instructions = apply(slices.Delete(actions(m), 2, 3)...)
			return true
		})},

		// The stamp.
		{"the stamp does not flip", "", edit(KindStamp, stampWith(func(c Color) cut.Epoch {
			if c.Recording {
				return c.Epoch - 1
			}
			return c.Epoch
		}))},
		{"the stamp flips when the gate closes", "", edit(KindStamp, stampWith(func(c Color) cut.Epoch {
			if c.Closed && !c.Recording {
				return c.Epoch + 1
			}
			return c.Epoch
		}))},
		{"the stamp of the second interface does not flip", "", edit(KindStamp, func(h *host, m *openflow.FlowMod) bool {
			if h.ports[uint32(UnpackCookie(m.Cookie).Port)].index == 0 {
				return true
			}
			return stampWith(func(c Color) cut.Epoch {
				if c.Recording {
					return c.Epoch - 1
				}
				return c.Epoch
			})(h, m)
		})},
		{"the stamp does not wrap", "", edit(KindStamp, stampWith(func(c Color) cut.Epoch { return max(c.Epoch, 200) }))},
		{"a stamp is of another network", "", edit(KindStamp, func(_ *host, m *openflow.FlowMod) bool {
			as := actions(m)
			as[0] = load(regNetwork, 1)
			m.Instructions = apply(as...)
			return true
		})},
		{"a node has no stamp", "", edit(KindStamp, forgotten)},

		// The tunnels.
		{"the tunnel id has no epoch", color, all(
			edit(KindSent, func(_ *host, m *openflow.FlowMod) bool {
				as := actions(m)
				as[0] = openflow.SetField{Field: openflow.TunnelID(TunnelID(UnpackCookie(m.Cookie).Network, 0))}
				m.Instructions = apply(as...)
				return true
			}))},
		{"a frame of the epoch before brings this one's", "", edit(KindReceived, func(h *host, m *openflow.FlowMod) bool {
			as := actions(m)
			as[1] = load(regEpoch, uint32(slices.Max(h.state.Counted[UnpackCookie(m.Cookie).Network])))
			m.Instructions = apply(as...)
			return true
		})},
		{"what comes by a tunnel is not marked so", "", edit(KindReceived, func(_ *host, m *openflow.FlowMod) bool {
			as := actions(m)
			m.Instructions = apply(slices.Delete(as, 2, 3)...)
			return true
		})},
		{"what goes into a tunnel is not counted", counts, edit(KindSent, forgotten)},
		{"what comes by a tunnel is not counted", "", edit(KindReceived, forgotten)},
		{"the new epoch is not counted", counts, func(h *host, fs FlowSet) {
			edit(KindSent, func(h *host, m *openflow.FlowMod) bool {
				return UnpackCookie(m.Cookie).Epoch == h.state.Counted[UnpackCookie(m.Cookie).Network][0]
			})(h, fs)
		}},
		{"frames are counted whatever their epoch", "", edit(KindSent, without(openflow.FieldReg(regEpoch)))},
		{"frames are counted whatever their network", "", edit(KindSent, without(openflow.FieldReg(regNetwork)))},
		{"what is not counted does not leave", "", all(edit(KindSent, forgotten), edit(KindTunnelOut, forgotten))},

		// Forwarding.
		{"a flood from a tunnel goes on to other hosts", twice, edit(KindFlood, func(h *host, m *openflow.FlowMod) bool {
			for _, p := range h.sw.Peers {
				m.Instructions = apply(append(actions(m), load(regPeer, uint32(p.ID)), openflow.Resubmit{Table: TableTunnel})...)
			}
			return true
		})},
		{"a flood does not leave the host", stays, edit(KindFlood, func(h *host, m *openflow.FlowMod) bool {
			as := actions(m)
			m.Instructions = apply(slices.DeleteFunc(as, func(a openflow.Action) bool { return a == openflow.Resubmit{Table: TableTunnel} })...)
			return true
		})},
		{"a flood goes to every host", nobody, edit(KindFlood, func(h *host, m *openflow.FlowMod) bool {
			if tunneled, _ := m.Match.Get(openflow.FieldReg(regTunneled)); tunneled.Uint64() == 1 {
				return true
			}
			as := slices.DeleteFunc(actions(m), func(a openflow.Action) bool { return a == openflow.Resubmit{Table: TableTunnel} })
			for _, p := range h.sw.Peers {
				as = append(as, load(regPeer, uint32(p.ID)), openflow.Resubmit{Table: TableTunnel})
			}
			m.Instructions = apply(as...)
			return true
		})},
		{"a flood forgets a port", "", edit(KindFlood, func(_ *host, m *openflow.FlowMod) bool {
			m.Instructions = apply(actions(m)[2:]...)
			return true
		})},
		{"an unknown address goes nowhere", "", edit(KindFlood, forgotten)},
		{"a known address is known on every network", "", edit(KindForward, without(openflow.FieldReg(regNetwork)))},
		{"a known address is not", "", edit(KindForward, forgotten)},
		{"a frame for another host stays", "", edit(KindForward, func(_ *host, m *openflow.FlowMod) bool {
			_, remote := m.Match.Get(openflow.FieldReg(regTunneled))
			if remote {
				m.Instructions = nil
			}
			return true
		})},
	} {
		t.Run(m.what, func(t *testing.T) {
			t.Parallel()
			happened := 0
			for seed := range uint64(40) {
				r := rules{cuts: 6, first: 252, sends: 20, reorder: seed%2 == 1, mutate: m.mutate}
				if i := int(seed); i < len(specs) {
					r.spec = specs[i]
				} else {
					r.spec = randomSpec(rand.New(rand.NewPCG(seed, 1)))
				}
				w := newWorld(r, seed)
				bad := w.run()
				happened += w.clock
				if bad == "" {
					continue
				}
				t.Logf("%s; found after %d things had happened", bad, happened)
				if !strings.Contains(string(bad), m.want) {
					t.Errorf("found something else than %q", m.want)
				}
				return
			}
			t.Errorf("not found, though %d things have happened", happened)
		})
	}
}
