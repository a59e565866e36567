// Package frames owns the file that keeps a snapshot's channel state: the
// frames that were in flight when the slice was cut, which a restore injects
// again.
//
// The file is pcapng with Ethernet frames, so that Wireshark opens it. What
// pcapng has no field for is in its comments, as JSON:
//
//	section header        shb_userappl  violin
//	                      opt_comment   {"format":1,"slice":"mandelbrot","snapshot":"...","frames":2}
//	interface description, one a receiving interface
//	                      if_name       rank1:0
//	                      if_description  network lan, cut into epoch 5
//	                      if_tsresol    9 (nanoseconds)
//	                      opt_comment   {"node":"rank1","interface":0,"network":"lan","epoch":5,"cut":"2026-01-02T03:04:05.000000006Z"}
//	enhanced packet, one a frame, in the order of their arrival
//	                      timestamp     the receiver's cut plus the time from it to the arrival
//	                      opt_comment   {"epoch":4}: the sender's epoch when it sent the frame
//
// The cut is one instant per node, by the clock of its host. Times of two nodes
// compare only as well as those clocks do; nothing rests on that.
//
// A file that says of itself that it holds another number of frames than it
// does was cut short, and is refused, as is one of a later format.
package frames
