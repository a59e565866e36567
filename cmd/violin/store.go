package main

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
)

func (a *app) storeCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "store",
		Short: "Look after the snapshot store",
		Long: `Look after the store that all snapshots lie in. Each page of memory is in it once,
however many nodes and snapshots have it, compressed and, by default, encrypted.`,
	}
	cmd.AddCommand(a.storeCheckCommand(), a.storeCollectCommand(), a.storeStatsCommand())
	return cmd
}

func (a *app) storeStatsCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "stats",
		Short: "Tell what the store holds",
		Long: `Tell what the store holds. MEMORY is what the nodes of all snapshots have, as if
nothing were shared, and PAGES what is left of it once zeros and repeats are out.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.storeStats(cmd.Context()) },
	}
}

func (a *app) storeStats(ctx context.Context) error {
	p := a.progress()
	defer p.done()
	c, err := start(ctx, a, p, violinv1connect.NewStoreServiceClient)
	if err != nil {
		return err
	}
	s, err := c.Stats(ctx, &violinv1.StatsRequest{})
	if err != nil {
		return err
	}
	p.done()
	return a.print(s, func(w io.Writer) {
		if s.GetLocation() == "" { // which experimenters are not told
			t := newTable("snapshots", fmt.Sprintf("%d of %d slices", s.GetSnapshots(), s.GetSlices()))
			t.row("memory", formatBytes(s.GetMemoryBytes()))
			t.write(w)
			return
		}
		t := newTable("store", printable(s.GetLocation()))
		t.row("id", s.GetId())
		t.row("encrypted", map[bool]string{true: "yes", false: "NO"}[s.GetEncrypted()])
		t.row("snapshots", fmt.Sprintf("%d of %d slices", s.GetSnapshots(), s.GetSlices()))
		t.row("memory", formatBytes(s.GetMemoryBytes()))
		t.row("pages", fmt.Sprintf("%d, %s", s.GetPages(), formatBytes(s.GetPageBytes())))
		t.row("chunks", formatCount(s.GetChunks()))
		t.row("packs", fmt.Sprintf("%d, %s", s.GetPacks(), formatBytes(s.GetPackBytes())))
		t.row("index", formatBytes(s.GetIndexBytes())+" of the server's memory")
		if s.GetUnreadPacks() > 0 {
			t.row("damaged", fmt.Sprintf("%d packs; see 'violin store check'", s.GetUnreadPacks()))
		}
		t.write(w)
	})
}

func (a *app) storeCheckCommand() *cobra.Command {
	var readData bool
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Look for damage in the store",
		Long: `Look for damage in the store: every pack's index, every page table, every snapshot's
document and all that they refer to. With --read-data also every page, which reads
the whole store.

Each damage is told with its pack, page and offset, and the snapshots and nodes that
need it. A damaged snapshot is not restored: forget it, and what is sound stays.

Exit status: 0 no damage, 1 damage was found (or the check failed), and the general ones.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.storeCheck(cmd.Context(), readData) },
	}
	cmd.Flags().BoolVar(&readData, "read-data", false, "read and verify every page")
	return cmd
}

func (a *app) storeCheck(ctx context.Context, readData bool) error {
	p := a.progress()
	defer p.done()
	c, err := start(ctx, a, p, violinv1connect.NewStoreServiceClient)
	if err != nil {
		return err
	}
	stream, err := c.Check(ctx, &violinv1.CheckRequest{ReadData: readData})
	if err != nil {
		return err
	}
	r, err := follow(stream, p, func(r *violinv1.CheckResponse) (*violinv1.Progress, *violinv1.CheckReport, bool) {
		return r.GetProgress(), r.GetReport(), r.GetReport() != nil
	})
	if err != nil {
		return err
	}
	err = a.print(r, func(w io.Writer) {
		fmt.Fprintf(w, "%d packs, %s, %d pages, %d chunks: ", r.GetPacks(), formatBytes(r.GetBytes()), r.GetPages(), r.GetChunks())
		switch n := len(r.GetDamage()); {
		case n > 0:
			fmt.Fprintf(w, "%s\n", plural(n, "problem", "problems"))
		case r.GetReadData():
			fmt.Fprintln(w, "no damage, all pages read")
		default:
			fmt.Fprintln(w, "no damage, pages not read (--read-data does)")
		}
		for _, d := range r.GetDamage() {
			fmt.Fprintf(w, "\n%s\n", printable(d.GetMessage()))
			if len(d.GetNeededBy()) == 0 {
				fmt.Fprintln(w, "  no snapshot needs it")
			}
			for _, by := range d.GetNeededBy() {
				fmt.Fprintf(w, "  needed by %s\n", printable(by))
			}
		}
	})
	if err != nil || len(r.GetDamage()) == 0 {
		return err
	}
	return &failure{code: exitFailure, err: fmt.Errorf("the store is damaged"),
		hint: "'violin forget' takes damaged snapshots away; what else is there can be restored."}
}

func plural(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

func (a *app) storeCollectCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "gc",
		Short: "Delete what no snapshot needs any more",
		Long: `Delete what no snapshot needs any more, after 'violin forget' or what a killed server
left behind. Slices may run, and snapshots be taken and restored, meanwhile. If a
snapshot cannot be read, nothing is deleted: 'violin store check' tells which.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.storeCollect(cmd.Context()) },
	}
}

func (a *app) storeCollect(ctx context.Context) error {
	p := a.progress()
	defer p.done()
	c, err := start(ctx, a, p, violinv1connect.NewStoreServiceClient)
	if err != nil {
		return err
	}
	p.step("collect", "", "")
	r, err := c.Collect(ctx, &violinv1.CollectRequest{})
	if err != nil {
		return err
	}
	p.done()
	return a.print(r, func(w io.Writer) {
		// Copies may take more than what they were made of, if that was little.
		freed := formatBytes(uint64(max(0, r.GetBytesFreed())))
		t := newTable("freed", freed)
		t.row("kept", formatBytes(r.GetBytesKept()))
		t.row("packs deleted", formatCount(r.GetPacksDeleted()))
		t.row("packs rewritten", formatCount(r.GetPacksRewritten()))
		t.row("packs in use", formatCount(r.GetPacksInUse()))
		t.row("took", optionalDuration(r.GetDuration()))
		t.write(w)
	})
}

func (a *app) forgetCommand() *cobra.Command {
	var request violinv1.ForgetRequest
	cmd := &cobra.Command{
		Use:   "forget SNAPSHOT... | --slice SLICE --keep-...",
		Short: "Delete snapshots",
		Long: `Delete the snapshots named, or those of a slice that no --keep rule keeps. The table
tells of each whether it is kept and why. Their pages stay in the store until
'violin store gc'. Of what is named, either all are found, or none is deleted.`,
		Example: `  violin forget mandelbrot@before-the-crash
  violin forget --slice mandelbrot --keep-last 3 --keep-daily 7 --keep-tag release --dry-run`,
		ValidArgsFunction: a.completion(snapshotNames),
		RunE: func(cmd *cobra.Command, args []string) error {
			request.Snapshots = args
			return a.forget(cmd.Context(), &request)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&request.Slice, "slice", "", "the `slice` whose snapshots the rules judge")
	flags.Uint32Var(&request.KeepLast, "keep-last", 0, "keep the youngest `n`")
	flags.Uint32Var(&request.KeepHourly, "keep-hourly", 0, "keep the youngest of each of the last `n` hours (UTC) that have one")
	flags.Uint32Var(&request.KeepDaily, "keep-daily", 0, "keep the youngest of each of the last `n` days (UTC) that have one")
	flags.StringSliceVar(&request.KeepTags, "keep-tag", nil, "keep what has this `tag`; may be given more than once")
	flags.BoolVarP(&request.DryRun, "dry-run", "n", false, "only tell what would be deleted")
	return cmd
}

func (a *app) forget(ctx context.Context, request *violinv1.ForgetRequest) error {
	rules := request.GetKeepLast() > 0 || request.GetKeepHourly() > 0 || request.GetKeepDaily() > 0 || len(request.GetKeepTags()) > 0
	usage := func(format string, args ...any) error {
		return &failure{code: exitUsage, err: fmt.Errorf(format, args...), hint: "See 'violin forget --help'."}
	}
	switch {
	case len(request.GetSnapshots()) > 0 && (request.GetSlice() != "" || rules):
		return usage("name snapshots, or give --slice and --keep rules, not both")
	case len(request.GetSnapshots()) > 0:
		for _, name := range request.GetSnapshots() {
			// Only what names one snapshot now and later is deleted.
			if err := checkSnapshotName(name); err != nil {
				return usage("%w", err)
			}
		}
	case request.GetSlice() == "":
		return usage("name the snapshots to forget, or a --slice")
	case !rules:
		return usage("--slice %s: say what to keep, such as --keep-last 5", request.GetSlice())
	}
	p := a.progress()
	defer p.done()
	c, err := start(ctx, a, p, violinv1connect.NewStoreServiceClient)
	if err != nil {
		return err
	}
	r, err := c.Forget(ctx, request)
	if err != nil {
		return err
	}
	p.done()
	return a.print(r, func(w io.Writer) {
		t := newTable("SNAPSHOT", "TAG", "CREATED", "VERDICT", "WHY")
		gone := 0
		for _, v := range r.GetVerdicts() {
			verdict := "kept"
			if !v.GetKept() {
				verdict = "forgotten"
				gone++
				if r.GetDryRun() {
					verdict = "would go"
				}
			}
			t.row(snapshotName(v.GetSnapshot()), tagsOf(v.GetSnapshot()), a.formatTime(v.GetSnapshot().GetCreated()), verdict, strings.Join(v.GetReasons(), ", "))
		}
		t.write(w)
		if gone > 0 && !r.GetDryRun() {
			a.note("'violin store gc' frees the space")
		}
	})
}
