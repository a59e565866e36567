package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	violinv1 "violin/api/violin/v1"
	"violin/internal/daemon"
)

func (a *app) downCommand() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "down SLICE | --all",
		Short: "Stop a slice; its snapshots stay",
		Long: `Stop a slice and remove everything it put on its hosts. Its snapshots stay, and
'violin restore' brings it back from one. With --all, every slice is stopped; that
none runs is no error then, and suspended ones stay suspended. To stop a suspended slice
is to give its suspension up: the snapshot that it would go on from stays, too.`,
		Args: func(_ *cobra.Command, args []string) error {
			switch {
			case all && len(args) > 0:
				return errors.New("a slice and --all: name the slice, or say --all")
			case !all && len(args) != 1:
				return fmt.Errorf("down takes one slice, or --all; %d given", len(args))
			}
			return nil
		},
		ValidArgsFunction: a.completion(sliceNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.down(cmd.Context(), &violinv1.DownRequest{Slice: strings.Join(args, ""), All: all})
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "stop every slice")
	return cmd
}

func (a *app) down(ctx context.Context, request *violinv1.DownRequest) error {
	response := &violinv1.DownResponse{}
	if request.GetAll() {
		c, err := a.findServer(ctx)
		switch {
		case errors.Is(err, daemon.ErrNotRunning):
		case err != nil:
			return err
		default:
			if response, err = c.Down(ctx, request); err != nil {
				return err
			}
		}
	} else {
		c, err := a.findSliceServer(ctx, request.GetSlice())
		if err != nil {
			return err
		}
		if response, err = c.Down(ctx, request); err != nil {
			return err
		}
	}
	if len(response.GetSlices()) == 0 {
		a.note("no slice runs")
	}
	return a.print(response, func(w io.Writer) {
		for _, s := range response.GetSlices() {
			fmt.Fprintf(w, "%s stopped\n", s)
		}
	})
}
