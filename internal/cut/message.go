package cut

import "time"

// Event is what happens to a [Coordinator]: a request, a host's answer, or time
// passing. One of the types below.
//
// Answers name the cut they belong to; those to another cut than the running one
// are ignored, as are repetitions, so that answers may come late or twice.
type Event interface{ event() }

// Begin asks for a cut. Refused with [ErrBusy] while one runs, with
// [ErrNoNodes] if the slice has none, and with [ErrCutID] if the name is empty
// or that of the cut before.
type Begin struct {
	Cut  string        // never used before
	Hold time.Duration // bounds [PhaseCut], and so how long frames are held; 0 for Timing.Cut
}

// Prepared says that a host can cut: it counts frames of the new epoch, of which
// there is none yet, beside those of the old one, and its nodes' captures are set up.
type Prepared struct{ Cut, Host string }

// NodeCut says that a node has done all of [Steps].
type NodeCut struct{ Cut, Node string }

// Stored says that a node's captured state is complete in the store, and verified.
type Stored struct{ Cut, Node string }

// Counters answers [SendPoll].
type Counters struct {
	Cut    string
	Host   string
	Round  int
	Counts []ChannelCount
}

// Channel is a directed way of frames: from one host to another on one network.
// From and To may be the same host: that is the way of the copies for the record
// from its switch to its gates, which the snapshot lacks if it is sealed before
// they arrive.
type Channel struct{ From, To, Network string }

// ChannelCount is one host's view of one channel, in frames of the epoch that
// the cut leaves ([SendPoll].Epoch), since that epoch began.
//
// The sending host reports Sent, the receiving host Received; what a host
// cannot see it leaves 0. A count may come in several parts, which are added,
// and need not come if it is 0.
// Sent must be up to date when the host answers; Received may lag behind.
type ChannelCount struct {
	Channel
	Sent     uint64
	Received uint64
}

// Collected says that a host has stopped recording and that all the channel
// state of its nodes is in the coordinator's hands or in the store.
type Collected struct{ Cut, Host string }

// Sealed says that the snapshot is visible.
type Sealed struct{ Cut string }

// SealFailed says that the snapshot is not visible and never will be.
type SealFailed struct{ Cut, Reason string }

// Committed says that a host has done with a sealed cut.
type Committed struct{ Cut, Host string }

// Aborted says that all nodes of a host are in [SendAbort].To and hold nothing.
type Aborted struct{ Cut, Host string }

// Failed says that a host cannot go on with the cut: a step failed, a gate
// exceeded its bound, the store refused. Node is empty if it is none of one node.
type Failed struct{ Cut, Host, Node, Reason string }

// HostDown says that a host and its nodes are gone. It is no longer of the slice.
type HostDown struct{ Host, Reason string }

// NoteFailed says, before anything else is, that what [Note] asks for was not written
// down, or may not have been. The effects after it were not carried out.
type NoteFailed struct{ Cut, Reason string }

// Cancel asks for an abort. A snapshot that is being sealed is past it.
type Cancel struct{ Cut, Reason string }

// Join adds a node, and its host if that is new. It must start in the
// coordinator's epoch. Refused with [ErrBusy] while a cut runs.
type Join struct{ Host, Node string }

// Leave removes a node, and its host with the last one. Refused with [ErrBusy]
// while a cut runs: stop nodes between cuts, or report the host down.
type Leave struct{ Node string }

// Tick says that time has passed; see [Coordinator.Deadline].
type Tick struct{}

func (Begin) event()      {}
func (Prepared) event()   {}
func (NodeCut) event()    {}
func (Stored) event()     {}
func (Counters) event()   {}
func (Collected) event()  {}
func (Sealed) event()     {}
func (SealFailed) event() {}
func (Committed) event()  {}
func (Aborted) event()    {}
func (Failed) event()     {}
func (HostDown) event()   {}
func (NoteFailed) event() {}
func (Cancel) event()     {}
func (Join) event()       {}
func (Leave) event()      {}
func (Tick) event()       {}

// Effect is what a [Coordinator] wants done. One of the types below. Effects on
// one host must reach it in the order in which they were given; those on
// different hosts, and Seal, may be carried out at once.
type Effect interface{ effect() }

// Note asks that what [Resume] takes be written down, in the place of what was, before
// any of the effects after it is carried out; if that fails they are not, and
// [NoteFailed] says so. Who is not the slice's coordinator any more must not be able to
// write it, nor to carry out Seal.
type Note struct {
	Cut     string
	To      Epoch // where the cut leads
	Ordered bool  // hosts may have been ordered to cut, so that an abort leads to To as well
}

// SendPrepare asks a host to get ready; answered by [Prepared] or [Failed].
type SendPrepare struct {
	Cut, Host string
	From, To  Epoch
}

// SendCut asks a host to run [Steps] on its nodes, at once and in parallel;
// answered by a [NodeCut] and later a [Stored] for each, or [Failed].
type SendCut struct {
	Cut, Host string
	Nodes     []string // sorted
	To        Epoch
}

// SendPoll asks a host for its counts of frames of the epoch; answered by [Counters].
type SendPoll struct {
	Cut, Host string
	Round     int
	Epoch     Epoch
}

// SendCollect asks a host to stop recording and to hand over the channel state;
// answered by [Collected] or [Failed].
type SendCollect struct{ Cut, Host string }

// Seal asks for the snapshot to be made visible, by one atomic write; answered
// by [Sealed] or [SealFailed]. There is no deadline: only who carries it out can
// tell whether a write that was not answered took place.
type Seal struct {
	Cut  string
	Lost []ChannelLoss // sorted
}

// SendCommit tells a host that the snapshot is sealed; answered by [Committed].
// Frames of the old epoch need not be counted any more. Repeated until answered.
type SendCommit struct{ Cut, Host string }

// SendAbort asks a host to give the cut up; answered by [Aborted]. Every node of
// the host goes to To by [AbortSteps]; captures and records are discarded.
// If To is the epoch the cut started from, no node anywhere has been cut and
// nothing but the preparation is to be undone. Repeated until it is answered.
type SendAbort struct {
	Cut, Host string
	To        Epoch
}

// Done ends a cut. With its epoch noted, what was noted of it may be forgotten.
type Done struct {
	Cut     string
	Outcome Outcome
	Reason  string        // why it was aborted
	Epoch   Epoch         // of every node now
	Lost    []ChannelLoss // sorted; what the network lost of the old epoch's frames
	Left    []string      // hosts that went down, or did not answer, in this cut; sorted. They are no longer of the slice.
}

// ChannelLoss is the number of frames of the old epoch that a channel was given
// and did not bring. It is since the epoch began: the counters cannot tell a
// frame that was lost long before the cut from one that was lost in it.
type ChannelLoss struct {
	Channel
	Frames uint64
}

func (Note) effect()        {}
func (SendPrepare) effect() {}
func (SendCut) effect()     {}
func (SendPoll) effect()    {}
func (SendCollect) effect() {}
func (Seal) effect()        {}
func (SendCommit) effect()  {}
func (SendAbort) effect()   {}
func (Done) effect()        {}

// Outcome is how a cut ended.
type Outcome uint8

// The outcomes of a cut.
const (
	OutcomeCommitted Outcome = 1 + iota // the snapshot is visible
	OutcomeAborted                      // there is no snapshot; the nodes run on
)

func (o Outcome) String() string {
	switch o {
	case OutcomeCommitted:
		return "committed"
	case OutcomeAborted:
		return "aborted"
	default:
		return "unknown outcome"
	}
}

// Timing sets how long a [Coordinator] waits. Zero fields take their defaults.
type Timing struct {
	Prepare time.Duration // for all hosts to be prepared; 30 s
	Cut     time.Duration // for all nodes to be cut; bounds how long frames are held; 10 s
	Store   time.Duration // from the last node's cut until its state is stored and the channels are drained; 10 min
	Ack     time.Duration // for hosts to answer a commit or abort; then they are left out; 30 s
	Retry   time.Duration // between repetitions of a commit or abort; 1 s
	// Return is Ack for a coordinator that resumes another one's cut, to which hosts have
	// to find the way first; 1 min.
	Return time.Duration

	// Poll is from the end of one round of counters to the start of the next; 20 ms.
	Poll time.Duration
	// Quiet is how long the counters must not move until frames that have not
	// arrived count as lost by the network, and how long after an abort the nodes
	// stay in one epoch at least; 1 s. It must exceed the longest time that a frame
	// can be under way from one node's switch to another node's gate: one that
	// comes later is delivered but missing from the snapshot, as if the network
	// had lost it.
	Quiet time.Duration
}
