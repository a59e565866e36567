package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	violinv1 "violin/api/violin/v1"
)

func (a *app) verifyCommand() *cobra.Command {
	request := &violinv1.VerifyRequest{}
	cmd := &cobra.Command{
		Use:   "verify SLICE@SNAPSHOT",
		Short: "Check that a snapshot's cut was consistent, by its certificate",
		Long: `Check that a snapshot's cut was consistent, by its certificate: what every node did
in the cut and when, what every pair of hosts sent and received, and what was
recorded. The checker shares no code with what took the snapshot. It says what
the certificate proves, and what no certificate can. A slice need not run for this.

'violin snapshot' prints the certificate's fingerprint. Whoever can write to the
store can write another snapshot with a certificate of its own: with --certificate
and a fingerprint that was noted elsewhere, that shows.

Exit status: 0 if the snapshot holds; 1 if it does not, or it or the store is
damaged; 5 if it has no certificate. Others as in 'violin --help'.`,
		Example:           "  violin verify mandelbrot@latest\n  violin verify mandelbrot@latest --read-data --certificate 3f9a6c01d2b4e857",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completion(snapshotNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			request.Snapshot = args[0]
			return a.verify(cmd.Context(), request)
		},
	}
	cmd.Flags().BoolVar(&request.ReadData, "read-data", false, "read every page and piece of the store, too")
	cmd.Flags().StringVar(&request.Certificate, "certificate", "", "the `fingerprint` that the certificate must have, or the first 16 digits of it or more")
	return cmd
}

// checkSnapshotName refuses what can name no snapshot, before a server is started.
func checkSnapshotName(snapshot string) error {
	if slice, id, ok := strings.Cut(snapshot, "@"); !ok || slice == "" || id == "" {
		return &failure{code: exitUsage, err: fmt.Errorf("snapshot %q: a snapshot is named SLICE@ID, SLICE@TAG or SLICE@latest", snapshot),
			hint: "'violin snapshots' lists them."}
	}
	return nil
}

func (a *app) verify(ctx context.Context, request *violinv1.VerifyRequest) error {
	if err := checkSnapshotName(request.GetSnapshot()); err != nil {
		return err
	}
	p := a.progress()
	defer p.done()
	c, err := a.startServer(ctx, p)
	if err != nil {
		return err
	}
	report, err := c.Verify(ctx, request)
	if err != nil {
		return err
	}
	p.done()
	if err := a.print(report, func(w io.Writer) { writeReport(w, report) }); err != nil {
		return err
	}
	if !report.GetHolds() {
		return &failure{code: exitFailure, err: errors.New("snapshot " + report.GetSnapshot() + " does not hold")}
	}
	return nil
}

func writeReport(w io.Writer, r *violinv1.VerifyResponse) {
	verdict := "holds"
	if !r.GetHolds() {
		verdict = "DOES NOT HOLD"
	}
	facts := newTable("snapshot", printable(r.GetSnapshot()))
	facts.row("certificate", r.GetCertificate())
	facts.row("verdict", verdict)
	facts.write(w)
	for _, part := range []struct {
		title string
		lines []string
	}{
		{"What is wrong:", r.GetViolations()},
		{"What is proved, if hosts and switches told the truth:", r.GetProves()},
		{"To be noted:", r.GetNotes()},
		{"What no certificate proves:", r.GetCannot()},
	} {
		if len(part.lines) == 0 {
			continue
		}
		fmt.Fprintf(w, "\n%s\n", part.title)
		for _, line := range part.lines {
			fmt.Fprintf(w, "  - %s\n", printable(line))
		}
	}
}
