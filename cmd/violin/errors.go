package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"violin/internal/daemon"
)

// Exit statuses, as told in the root command's help.
const (
	exitOK          = 0
	exitFailure     = 1
	exitUsage       = 2
	exitNotFound    = 3
	exitAborted     = 4
	exitState       = 5
	exitUnreachable = 6
	exitDenied      = 7
	exitNotExecuted = 125 // as other tools that run programs elsewhere have it
	exitInterrupted = 130 // 128 + SIGINT
)

// failure is an error whose exit status is known where it arises.
type failure struct {
	code int
	err  error
	hint string // what the user can do, or empty
}

func (f *failure) Error() string { return f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

// status is the end of a program run by exec: an exit status and nothing to say about it.
type status int

func (s status) Error() string { return fmt.Sprintf("exit status %d", int(s)) }

func unreachable(err error) error { return &failure{code: exitUnreachable, err: err} }

// finish tells an error to the user and turns it into the exit status.
func (a *app) finish(ctx context.Context, verb *cobra.Command, err error) int {
	if err == nil {
		return exitOK
	}
	var s status
	if errors.As(err, &s) {
		return int(s)
	}
	f := a.explain(ctx, verb, err)
	fmt.Fprintf(a.err, "violin: %s\n", strings.TrimRight(f.err.Error(), "\n"))
	if f.hint != "" {
		fmt.Fprintf(a.err, "%s\n", f.hint)
	}
	if verb.Name() == "exec" && f.code != exitInterrupted {
		// Any other status could be the program's.
		return exitNotExecuted
	}
	return f.code
}

// explain finds the exit status of an error, and what the user can do about it.
func (a *app) explain(ctx context.Context, verb *cobra.Command, err error) *failure {
	if !a.started {
		return &failure{code: exitUsage, err: err, hint: fmt.Sprintf("See '%s --help'.", verb.CommandPath())}
	}
	if ctx.Err() != nil && (errors.Is(err, context.Canceled) || connect.CodeOf(err) == connect.CodeCanceled) {
		return &failure{code: exitInterrupted, err: interrupted(verb)}
	}
	var f *failure
	if errors.As(err, &f) {
		return f
	}
	var c *connect.Error
	if !errors.As(err, &c) {
		return &failure{code: exitFailure, err: err}
	}
	log := "The server's log may tell more: " + daemon.Dirs{State: a.stateDir}.Log()
	if address, err := a.remote(); err == nil && address != "" {
		log = "The log of server " + address + " may tell more."
	}
	// A code that the server did not send was made up by the client library, because the connection broke.
	if !connect.IsWireError(c) {
		return &failure{code: exitUnreachable, err: fmt.Errorf("the server went away during the call: %s", c.Message()), hint: log}
	}
	message := errors.New(c.Message())
	switch c.Code() {
	case connect.CodeInvalidArgument, connect.CodeOutOfRange:
		return &failure{code: exitUsage, err: message}
	case connect.CodeNotFound:
		hint := "'violin ps' lists what runs."
		if verb.HasParent() {
			switch verb.Parent().Name() {
			case "image":
				hint = "'violin image ls' lists the images."
			case "users":
				hint = "'violin users ls' lists the users."
			case "hosts":
				hint = "'violin hosts' lists the hosts."
			}
		}
		if slices.Contains([]string{"restore", "snapshots", "verify", "frames", "forget", "export", "log", "tag", "fork", "replay"}, verb.Name()) {
			hint = "'violin snapshots' lists the snapshots."
		}
		return &failure{code: exitNotFound, err: message, hint: hint}
	case connect.CodeAborted:
		return &failure{code: exitAborted, err: message, hint: "The nodes run on, and there is no new snapshot. It can be tried again at once."}
	case connect.CodeFailedPrecondition:
		hint := "'violin ps' tells the state of things."
		if verb.HasParent() && verb.Parent().Name() == "image" {
			hint = "'violin image ls' tells what needs an image."
		}
		return &failure{code: exitState, err: message, hint: hint}
	case connect.CodeResourceExhausted:
		return &failure{code: exitState, err: message, hint: "'violin suspend' frees what other slices take; --overcommit starts it all the same."}
	case connect.CodePermissionDenied, connect.CodeUnauthenticated:
		return &failure{code: exitDenied, err: message, hint: "'violin whoami' tells who you are to which server."}
	case connect.CodeAlreadyExists:
		return &failure{code: exitState, err: message}
	case connect.CodeUnimplemented:
		return &failure{code: exitFailure, err: fmt.Errorf("the server that runs cannot do this: %w", message), hint: "It may be of another version: compare with 'violin version'."}
	case connect.CodeCanceled, connect.CodeUnavailable:
		// Not by us: our context lives.
		return &failure{code: exitUnreachable, err: fmt.Errorf("the server stopped during the call: %w", message), hint: log}
	case connect.CodeInternal, connect.CodeUnknown, connect.CodeDataLoss:
		return &failure{code: exitFailure, err: message, hint: log}
	default:
		return &failure{code: exitFailure, err: message}
	}
}

// interrupted says what an interruption leaves behind.
func interrupted(verb *cobra.Command) error {
	switch verb.Name() {
	case "up", "restore", "resume", "fork", "replay":
		return errors.New("interrupted: the server stops what it had started of the slice")
	case "snapshot", "suspend":
		return errors.New("interrupted: the server aborts the cut, and the nodes run on")
	}
	return errors.New("interrupted")
}
