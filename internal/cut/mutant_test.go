package cut

import (
	"strings"
	"testing"
)

// flaw is a mistake in the protocol, or in keeping one of the promises that it
// rests on. The explorer must find each: one that it does not find shows that
// the explorer is blind, or that the protocol has a rule too many.
type flaw uint8

const (
	// The gate.
	flawDeliverNewer flaw = 1 + iota
	flawDropNewer
	flawForgetArrived
	flawForgetHeld
	flawDropHeld
	flawBelieveSwitch
	flawReverseRelease
	flawDropTaken
	flawTakeLast

	// A node's steps.
	flawFlipBeforeStop
	flawFlipAfterResume
	flawCaptureBeforeStop
	flawCaptureAfterResume
	flawStopBeforeSettle
	flawNoClose
	flawNoSettle
	flawNoFlush
	flawNoBarrier
	flawNoFence
	flawSwitchClosesFirst
	flawSwitchOpensFirst

	// The slice.
	flawAbortBack
	flawSealUndrained
	flawCopiesUncounted
	flawOneRound
	flawNoQuiet
	flawLatePrepare
	flawStaleCommit

	// A coordinator that follows another.
	flawNoteLate
	flawResumeBack
	flawResumeForward
	flawResumeAbort
	flawFollowAtOnce
	flawNoTerm

	// No flaws: see TestNoMatter.
	sameFlipAfterCapture
	sameCaptureBeforeFlush
)

func TestMutants(t *testing.T) {
	var (
		calm     = rules{hostOf: []int{0, 1}, frames: 2, cuts: 1}
		unread   = rules{hostOf: []int{0, 1}, frames: 2, cuts: 1, unread: true}
		cancel   = rules{hostOf: []int{0, 1}, frames: 2, cuts: 1, cancels: 1}
		twice    = rules{hostOf: []int{0, 1}, frames: 1, cuts: 2}
		again    = rules{hostOf: []int{0, 1}, frames: 1, cuts: 2, cancels: 1}
		repeated = rules{hostOf: []int{0, 1}, frames: 1, cuts: 2, timeouts: 1}
		crash    = rules{hostOf: []int{0, 1}, frames: 1, cuts: 1, crashes: 1}
		between  = rules{hostOf: []int{0, 1}, frames: 1, cuts: 2, cancels: 1, crashes: 1, between: true}
	)
	const (
		orphan   = "but not sent in"          // received, or recorded, and never sent
		missing  = "is in no channel state"   // in flight, and not recorded
		gone     = "never arrived"            // lost by the protocol
		overtook = "is overtaken"             // out of order
		order    = "gives up frame"           // the gate released out of order
		epochs   = "is in epoch"              // nodes in two epochs
		counts   = "are reported lost"        // the count of lost frames is wrong
		failed   = "though nothing was wrong" // no snapshot
		still    = "is still in a cut"        // and nobody ends it
	)
	for _, m := range []struct {
		flaw  flaw
		what  string
		rules rules
		want  string
	}{
		{flawDeliverNewer, "newer frames are delivered, older ones held", calm, orphan},
		{flawDropNewer, "newer frames are dropped, as VNsnap did", calm, gone},
		{flawForgetArrived, "an older frame that arrives after the cut is not recorded", calm, missing},
		{flawForgetHeld, "an older frame that was held at the cut is not recorded", calm, missing},
		{flawDropHeld, "an abort forgets a held frame", cancel, gone},
		{flawBelieveSwitch, "a frame is judged by why the switch sent it, not by what the node is", calm, missing},
		{flawReverseRelease, "held frames are released last first", calm, order},
		{flawDropTaken, "what the node does not read is thrown away", unread, missing},
		{flawTakeLast, "what the node does not read is given to it after what came later", unread, order},

		{flawFlipBeforeStop, "the epoch flips while the node still runs", calm, missing},
		{flawFlipAfterResume, "the epoch flips when the node runs again", calm, orphan},
		{flawCaptureBeforeStop, "the state is captured while the node still runs", calm, orphan},
		{flawCaptureAfterResume, "the state is captured when the node runs again", calm, ""},
		{flawStopBeforeSettle, "the node is stopped and cannot read what had passed its gate", calm, failed},
		{flawNoClose, "the gate is not closed", calm, ""},
		{flawNoSettle, "nobody waits for the node to read what had passed its gate", calm, missing},
		{flawNoFlush, "nobody waits for the switch to stamp what the node had sent", calm, missing},
		{flawNoBarrier, "the switch is changed before it has done what it was told earlier", calm, ""},
		{flawNoFence, "a node counts as cut while frames are on their way to its gate", calm, missing},
		{flawSwitchClosesFirst, "the switch closes before the gate", calm, missing},
		{flawSwitchOpensFirst, "the switch opens before the gate", calm, overtook},

		{flawAbortBack, "an abort takes nodes back into the old epoch", cancel, epochs},
		{flawSealUndrained, "nobody waits for the channels to drain", calm, missing},
		{flawCopiesUncounted, "nobody counts the copies for the record", calm, missing},
		{flawOneRound, "the second round of counters repeats the first", calm, ""},
		{flawNoQuiet, "a cut follows on an abort at once", again, missing},
		{flawLatePrepare, "a host says that it counts before it does", twice, counts},
		{flawStaleCommit, "a host obeys a late repetition of an earlier cut's order", repeated, ""},

		{flawNoteLate, "what a coordinator knows is noted after its orders, not before", crash, still},
		{flawResumeBack, "who follows takes a cut that was ordered for one that was not", crash, ""},
		{flawResumeForward, "and the other way round", crash, epochs},
		{flawResumeAbort, "who follows aborts a cut whose snapshot is visible", crash, "its snapshot visible: true"},
		{flawFollowAtOnce, "who follows on an abort begins a cut at once", between, missing},
		{flawNoTerm, "hosts obey a coordinator that was followed", crash, still},
	} {
		t.Run(m.what, func(t *testing.T) {
			if m.flaw == flawStaleCommit && !long() {
				t.Skip("takes several seconds: set VIOLIN_LONG=1")
			}
			m.rules.flaw = m.flaw
			var bad *counterexample
			states := 0
			for frames := 1; bad == nil && frames <= m.rules.frames; frames++ {
				r := m.rules
				r.frames = frames
				var e *explorer
				e, bad = explore(&r)
				states += len(e.seen)
			}
			if bad == nil {
				t.Fatalf("not found in %d states", states)
			}
			t.Logf("%s, found after %d states in %d steps", bad.what, states, len(bad.path))
			if !strings.Contains(string(bad.what), m.want) {
				t.Errorf("found something else than %q: %v", m.want, bad)
			}
		})
	}
}

// TestNoMatter has the changes that are none: while a node is stopped behind a
// closed gate nothing changes it, so that hypervisors may capture and flip in
// the order that suits them.
func TestNoMatter(t *testing.T) {
	for _, f := range []flaw{sameFlipAfterCapture, sameCaptureBeforeFlush} {
		if _, bad := explore(&rules{hostOf: []int{0, 1}, frames: 1, cuts: 1, reorder: true, losses: 1, flaw: f}); bad != nil {
			t.Errorf("%d: %v", f, bad)
		}
	}
}
