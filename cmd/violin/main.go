// Command violin takes live, consistent snapshots of whole virtual networks and
// restores them. `violin --help` tells its verbs; each has a file of its own here.
//
// The verbs speak the API (api/violin/v1) to the server of this machine, which
// those that need one start in the background. What a verb prints for programs
// (--output json) is the API's messages; tables are for people and may change.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	// The first Ctrl-C ends the call in an orderly way, the second ends the process.
	context.AfterFunc(ctx, stop)
	a := &app{stdio: stdio{in: os.Stdin, out: os.Stdout, err: os.Stderr}, location: time.Local}
	os.Exit(a.run(ctx, os.Args[1:]))
}
