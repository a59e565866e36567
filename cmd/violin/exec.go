package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	violinv1 "violin/api/violin/v1"
)

// execInputLimit bounds what exec sends as standard input, which travels in one message.
const execInputLimit = 4 << 20

func (a *app) execCommand() *cobra.Command {
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "exec SLICE/NODE -- PROGRAM [ARGUMENT...]",
		Short: "Run a program in a node",
		Long: `Run a program in a node through its guest agent, and print what it printed once it has
ended. NODE alone will do if just one slice has a node of that name. There is no
shell in between: say 'sh -c ...' for one. Standard input is read to its end and
given to the program, unless it is a terminal; '</dev/null' gives it none.

The exit status is the program's. It is 125 if none was run.`,
		Example: "  violin exec mandelbrot/rank0 -- cat /var/log/run.log",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) < 2 {
				return errors.New("exec takes a node and a program: violin exec SLICE/NODE -- PROGRAM [ARGUMENT...]")
			}
			return nil
		},
		ValidArgsFunction: a.completion(nodeNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.exec(cmd.Context(), args[0], args[1:], timeout)
		},
	}
	cmd.Flags().DurationVar(&timeout, "timeout", 0, "give the program up after this `time` (0: after a minute)")
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error {
		return fmt.Errorf("%w (if it is meant for the program: put -- before the program)", err)
	})
	return cmd
}

func (a *app) exec(ctx context.Context, name string, command []string, timeout time.Duration) error {
	if timeout < 0 {
		return &failure{code: exitUsage, err: fmt.Errorf("--timeout %v: it cannot be negative", timeout)}
	}
	c, slice, node, err := a.findNode(ctx, name)
	if err != nil {
		return err
	}
	input, err := a.execInput()
	if err != nil {
		return err
	}
	request := &violinv1.ExecRequest{Slice: slice, Node: node, Command: command, Stdin: input}
	if timeout > 0 {
		request.Timeout = durationpb.New(timeout)
	}
	response, err := c.Exec(ctx, request)
	if err != nil {
		return err
	}
	if a.output == "json" {
		err = a.print(response, nil)
	} else {
		_, outErr := a.out.Write(response.GetStdout())
		_, errErr := a.err.Write(response.GetStderr())
		err = errors.Join(outErr, errErr)
	}
	if code := response.GetExitCode(); err == nil && code != 0 {
		if code < 0 || code > 255 { // no status of a process; in no case may it end as 0
			code = 255
		}
		return status(code)
	}
	return err
}

func (a *app) execInput() ([]byte, error) {
	if _, ok := terminal(a.in); ok || a.in == nil {
		return nil, nil
	}
	input, err := io.ReadAll(io.LimitReader(a.in, execInputLimit+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("read standard input for the program: %w", err)
	case len(input) > execInputLimit:
		return nil, &failure{code: exitUsage, err: fmt.Errorf("standard input is larger than the %s that exec passes on", formatBytes(execInputLimit)),
			hint: "Send it in pieces, or let the program fetch it over the node's network."}
	}
	return input, nil
}
