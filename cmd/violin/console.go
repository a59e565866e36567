package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	violinv1 "violin/api/violin/v1"
)

// leaveKey is Ctrl-], as in telnet, 'virsh console' and 'xl console'.
const leaveKey = 0x1d

func (a *app) consoleCommand() *cobra.Command {
	var log, follow bool
	var tail int32
	cmd := &cobra.Command{
		Use:   "console SLICE/NODE",
		Short: "Join the serial console of a node, or read its log",
		Long: `Join the serial console of a node. NODE alone will do if just one slice has a node of
that name. On a terminal every key goes to the node, Ctrl-C too; Ctrl-] leaves.
Otherwise standard input is sent to the node, and what the node prints is copied
to stdout until the node or Ctrl-C ends it: '</dev/null' just listens.

--log prints what the node has printed since it was started, of which the last MiB at
least is kept; also that of a node that has died. A restore goes on with the same log,
and says so in it.`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completion(nodeNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := a.tableOnly(cmd); err != nil {
				return err
			}
			if !log {
				for _, flag := range []string{"follow", "tail"} {
					if cmd.Flags().Changed(flag) {
						return &failure{code: exitUsage, err: fmt.Errorf("--%s is of the log: say --log as well", flag)}
					}
				}
				return a.console(cmd.Context(), args[0])
			}
			request := &violinv1.ConsoleLogRequest{Follow: follow}
			if cmd.Flags().Changed("tail") {
				if tail < 0 {
					return &failure{code: exitUsage, err: fmt.Errorf("--tail %d: it is a number of lines", tail)}
				}
				n := uint32(tail)
				request.Tail = &n
			}
			return a.consoleLog(cmd.Context(), args[0], request)
		},
	}
	cmd.Flags().BoolVar(&log, "log", false, "print the console's log instead")
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "with --log, go on with what the node prints, until it ends")
	cmd.Flags().Int32Var(&tail, "tail", 0, "with --log, begin with its last so many lines")
	return cmd
}

func (a *app) consoleLog(ctx context.Context, name string, request *violinv1.ConsoleLogRequest) error {
	c, slice, node, err := a.findNode(ctx, name)
	if err != nil {
		return err
	}
	request.Slice, request.Node = slice, node
	stream, err := c.ConsoleLog(ctx, request)
	if err != nil {
		return err
	}
	defer stream.Close()
	for stream.Receive() {
		if _, err := a.out.Write(stream.Msg().GetData()); err != nil {
			return err
		}
	}
	return stream.Err()
}

func (a *app) console(ctx context.Context, name string) error {
	c, slice, node, err := a.findNode(ctx, name)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.Console(ctx)
	if err != nil {
		return err
	}
	if err := stream.Send(&violinv1.ConsoleRequest{Slice: slice, Node: node}); err != nil && !errors.Is(err, io.EOF) {
		return err // after EOF, Receive tells why
	}

	var keys io.Reader = a.in
	var left <-chan struct{}
	if tty, ok := terminal(a.in); ok {
		before, err := term.MakeRaw(int(tty.Fd()))
		if err != nil {
			return fmt.Errorf("set up the terminal: %w", err)
		}
		defer func() { _ = term.Restore(int(tty.Fd()), before) }()
		a.note("console of %s/%s; Ctrl-] leaves\r", slice, node)
		k := newKeyboard(tty)
		keys, left = k, k.left
	}
	// A read of the keyboard cannot be interrupted, so nobody waits for this goroutine.
	go send(ctx, keys, left, stream)
	received := make(chan error, 1)
	go func() { received <- receive(a.out, stream) }()
	select {
	case <-left:
		fmt.Fprint(a.out, "\r\n")
		return nil // which ends ctx
	case err = <-received:
	}
	if left != nil {
		fmt.Fprint(a.out, "\r\n")
	}
	if err == nil {
		a.note("the console of %s/%s was closed\r", slice, node)
	}
	return err
}

// send sends what is typed, until the end of input or of the stream. Who has left is done
// with the terminal, which ends ctx, before the server hears of an end and may answer.
func send(ctx context.Context, keys io.Reader, left <-chan struct{}, stream *connect.BidiStreamForClientSimple[violinv1.ConsoleRequest, violinv1.ConsoleResponse]) {
	buf := make([]byte, 4096)
	for {
		n, err := keys.Read(buf)
		if n > 0 && stream.Send(&violinv1.ConsoleRequest{Data: buf[:n]}) != nil {
			return // receive tells why
		}
		if err == nil {
			continue
		}
		select {
		case <-left:
			<-ctx.Done()
		default:
		}
		_ = stream.CloseRequest()
		return
	}
}

// receive copies what the node prints, until the stream ends.
func receive(w io.Writer, stream *connect.BidiStreamForClientSimple[violinv1.ConsoleRequest, violinv1.ConsoleResponse]) error {
	for {
		response, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if _, err := w.Write(response.GetData()); err != nil {
			return err
		}
	}
}

// keyboard passes on what is typed up to the key that leaves.
type keyboard struct {
	in   io.Reader
	left chan struct{} // closed when the key was hit
}

func newKeyboard(in io.Reader) *keyboard { return &keyboard{in: in, left: make(chan struct{})} }

func (k *keyboard) Read(p []byte) (int, error) {
	n, err := k.in.Read(p)
	if i := bytes.IndexByte(p[:n], leaveKey); i >= 0 {
		close(k.left)
		return i, io.EOF
	}
	return n, err
}
