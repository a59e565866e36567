package main

import (
	"context"
	"errors"
	"log/slog"

	"github.com/spf13/cobra"

	"violin/internal/keeper"
)

// keepCommand is the process beside an agent that keeps what must not die with it.
func (a *app) keepCommand() *cobra.Command {
	var sw, dir string
	cmd := &cobra.Command{
		Use:    "keep --switch SOCKET --dir DIR",
		Short:  "Keep a cut's frames and streams beyond the death of an agent",
		Long:   "Keep a cut's frames and streams beyond the death of an agent, which starts this\nprocess by itself. It ends with the agent's switch.",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if sw == "" || dir == "" {
				return &failure{code: exitUsage, err: errors.New("--switch and --dir are needed")}
			}
			// No terminal's signal ends it, and no service manager's before the agent's.
			err := keeper.Run(context.WithoutCancel(cmd.Context()), keeper.Config{Switch: sw, Dir: dir, Logger: slog.New(slog.NewTextHandler(a.err, nil))})
			return &failure{code: exitFailure, err: err}
		},
	}
	cmd.Flags().StringVar(&sw, "switch", "", "the management `socket` of the switch's bridge")
	cmd.Flags().StringVar(&dir, "dir", "", "the `directory` for the keeper's own sockets")
	return cmd
}
