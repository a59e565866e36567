package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime"

	"github.com/spf13/cobra"

	"violin/internal/bench"
)

func (a *app) benchCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "Measure parts of Violin on this machine",
		Long:  "Measure parts of Violin on this machine.",
	}
	cmd.AddCommand(a.benchStoreCommand(), a.benchCutCommand())
	return cmd
}

func (a *app) benchStoreCommand() *cobra.Command {
	var cfg bench.StoreConfig
	var mebibytes uint64
	cmd := &cobra.Command{
		Use:   "store",
		Short: "Measure the store alone",
		Long: `Measure the store alone, in a directory that is removed again, syncs included: a
guest's first snapshot, the same memory again, the memory with a part changed, one of
zeros, and a restore. The pages are this program's own text and data, made distinct.
  RATE    of the guest's memory, by the clock on the wall
  CPU     time of all cores for each page of 4 KiB
  STORED  what the store grew by; RATIO is STORED to MEMORY`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg.Memory = mebibytes << 20
			if mebibytes == 0 || mebibytes > 1<<20 || cfg.Changed < 0 || cfg.Changed > 100 {
				return &failure{code: exitUsage, err: fmt.Errorf("--memory is 1 to 1048576 MiB, --changed 0 to 100 percent")}
			}
			return a.benchStore(cmd.Context(), cfg)
		},
	}
	cmd.Flags().StringVar(&cfg.Dir, "dir", os.TempDir(), "`directory` to measure in: best one on the store's disk")
	cmd.Flags().Uint64Var(&mebibytes, "memory", 512, "`MiB` of the guest that are not zero")
	cmd.Flags().IntVar(&cfg.Changed, "changed", 5, "`percent` of the pages that differ in the next snapshot")
	cmd.Flags().BoolVar(&cfg.Plain, "plain", false, "without encryption")
	return cmd
}

func (a *app) benchStore(ctx context.Context, cfg bench.StoreConfig) error {
	p := a.progress()
	defer p.done()
	result := struct {
		Machine bench.Machine  `json:"machine"`
		Config  map[string]any `json:"config"`
		Figures []bench.Figure `json:"figures"`
	}{bench.ThisMachine(), map[string]any{"memory_bytes": cfg.Memory, "changed_percent": cfg.Changed, "encrypted": !cfg.Plain}, nil}
	if err := bench.Store(ctx, cfg, func(f bench.Figure) {
		p.step("measured", "", f.What)
		result.Figures = append(result.Figures, f)
	}); err != nil {
		return err
	}
	p.done()
	return a.printFigures(result, func(w io.Writer) {
		writeFigures(w, result.Figures)
		fmt.Fprintf(w, "\n%s, %s, %s/%s\n", result.Machine, map[bool]string{true: "not encrypted", false: "encrypted"}[cfg.Plain], runtime.GOOS, runtime.GOARCH)
	})
}

// printFigures is print for figures, which are no message of the API.
func (a *app) printFigures(figures any, table func(io.Writer)) error {
	var b bytes.Buffer
	if a.output == "json" {
		encoder := json.NewEncoder(&b)
		encoder.SetIndent("", "  ")
		if err := encoder.Encode(figures); err != nil {
			return err
		}
	} else {
		table(&b)
	}
	_, err := a.out.Write(b.Bytes())
	return err
}

func writeFigures(w io.Writer, figures []bench.Figure) {
	t := newTable("WHAT", ">MEMORY", ">TOOK", ">RATE", ">CPU", ">STORED", ">RATIO")
	for _, f := range figures {
		t.row(f.What, formatBytes(uint64(f.Bytes)), formatDuration(f.Wall), formatBytes(uint64(f.Rate()))+"/s",
			fmt.Sprintf("%.1f µs", float64(f.CPU.Microseconds())/float64(f.Bytes/4096)),
			formatBytes(uint64(f.StoredBytes)), formatRatio(uint64(f.StoredBytes), uint64(f.Bytes)))
	}
	t.write(w)
}
