package cut

import "fmt"

// Step is one step of a node's cut. A step is done when all it says is true,
// and the next begins only then.
type Step uint8

// The steps of a node's cut, in their order.
const (
	// StepClose: Gate.Close; then the switch hands every frame for the node to the
	// controller and delivers none. A barrier has been answered since, so that
	// frames the controller gave back earlier are delivered too.
	StepClose Step = 1 + iota
	// StepSettle: frames that had passed the gate are in the node's memory; none
	// waits in the queue towards it, nor in the hypervisor, which may throw away what
	// the node has not taken when it stops. The node still runs: a stopped one reads nothing.
	// Frames to a node that reads nothing while it runs go back: Gate.TakeBack.
	StepSettle
	// StepStop: the node's vCPUs are stopped.
	StepStop
	// StepFlush: frames that the node sent before it stopped have been stamped by
	// the switch, none waits in the queue from it.
	StepFlush
	// StepFlip: the switch stamps the node's frames with the new epoch and judges by
	// it (one atomic bundle, a barrier answered, no cached decision left);
	// Gate.Flip. The gate stays closed.
	StepFlip
	// StepCapture: the node's state is captured as of now, or fixed so that it will
	// be (copy-on-write).
	StepCapture
	// StepResume: the vCPUs run.
	StepResume
	// StepOpen: Gate.Open, and what it releases is delivered in order; then the
	// switch delivers by itself again (a barrier answered), and what it had handed
	// over while it was closed has been through the gate. The node has been cut.
	StepOpen
)

var stepNames = [...]string{
	StepClose: "close", StepSettle: "settle", StepStop: "stop", StepFlush: "flush",
	StepFlip: "flip", StepCapture: "capture", StepResume: "resume", StepOpen: "open",
}

func (s Step) String() string {
	if s == 0 || int(s) >= len(stepNames) {
		return fmt.Sprintf("step(%d)", uint8(s))
	}
	return stepNames[s]
}

// Steps returns the steps of a node's cut in order.
func Steps() []Step {
	return []Step{StepClose, StepSettle, StepStop, StepFlush, StepFlip, StepCapture, StepResume, StepOpen}
}

// AbortSteps returns what to do, in order, when the cut is aborted and begun is
// the last step of it that the node has begun, finished or not (0: none): the
// node joins the new epoch without a capture, and gets every frame that waits
// for it, in order. Steps are repeated, so they must bear it. The node may have
// been let run meanwhile, by whatever gave its capture up.
//
// Gate.StopRecording comes first, Gate.Flip has record false. The node stands still
// for StepFlip here, too. Not for the frames' sake, since without a snapshot there is
// nothing for one to be on the wrong side of, but for the counters': they are exact
// over a change of the switch's tables only if no frame passes during it, and the
// next cut is drained by them. A node that does not settle is flipped as it is.
func AbortSteps(begun Step) []Step {
	switch {
	case begun < StepSettle:
		return []Step{StepClose, StepSettle, StepStop, StepFlush, StepFlip, StepResume, StepOpen}
	case begun <= StepFlip:
		return []Step{StepSettle, StepStop, StepFlush, StepFlip, StepResume, StepOpen}
	case begun <= StepResume:
		return []Step{StepResume, StepOpen}
	default:
		return []Step{StepOpen}
	}
}
