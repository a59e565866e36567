package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"violin/internal/bench"
)

func (a *app) benchCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "Measure parts of Violin on this machine",
		Long:  "Measure parts of Violin on this machine.",
	}
	cmd.AddCommand(a.benchStoreCommand(), a.benchCutCommand(), benchDiscardCommand())
	return cmd
}

// benchDiscardCommand is what QEMU migrates to when it is measured by itself.
func benchDiscardCommand() *cobra.Command {
	return &cobra.Command{
		Use:    benchDiscard,
		Short:  "Read the standard input, and nothing else",
		Long:   "Read the standard input to its end and throw it away. 'violin bench store --qemu' starts\nit for what it is compared with.",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE:   func(*cobra.Command, []string) error { return bench.Discard(os.Stdin) },
	}
}

const benchDiscard = "discard"

func (a *app) benchStoreCommand() *cobra.Command {
	var cfg bench.StoreConfig
	var mebibytes uint64
	var against bench.QEMUConfig
	var beside bool
	cmd := &cobra.Command{
		Use:   "store",
		Short: "Measure the store alone",
		Long: `Measure the store alone, in a directory that is removed again, syncs included: a
guest's first snapshot, the same memory again, the memory with a part changed, one of
zeros, and a restore. The pages are this program's own text and data, made distinct.
  RATE    of the guest's memory, by the clock on the wall
  CPU     time of all cores for each page of 4 KiB
  STORED  what the store grew by; RATIO is STORED to MEMORY
With --qemu, afterwards, as root: nodes of 256 MiB and 2 GiB with half their pages not zero,
beside QEMU itself, in turn. A snapshot, to the disk, against QEMU's own background
migration to a socket whose reader, another process, throws all away; a restore against
-incoming "exec:cat FILE"; a lazy restore, also of 4 GiB, from QEMU's start until the guest
has run. The exit status is 1 if a bound does not hold: 500 MB/s of unique pages, 2 GB/s of
known ones; 1.3 times QEMU; a lazy restore in 1 s.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg.Memory = mebibytes << 20
			if mebibytes == 0 || mebibytes > 1<<20 || cfg.Changed < 0 || cfg.Changed > 100 {
				return &failure{code: exitUsage, err: fmt.Errorf("--memory is 1 to 1048576 MiB, --changed 0 to 100 percent")}
			}
			if !beside {
				return a.benchStore(cmd.Context(), cfg, nil)
			}
			if against.Runs < 1 || against.Runs > 100 {
				return &failure{code: exitUsage, err: fmt.Errorf("--runs %d: 1 to 100", against.Runs)}
			}
			program, err := os.Executable()
			if err != nil {
				return &failure{code: exitFailure, err: err}
			}
			against.Dir, against.Plain, against.Reader = cfg.Dir, cfg.Plain, []string{program, "bench", benchDiscard}
			against.Memory, against.Lazy = []uint64{256 << 20, 2 << 30}, []uint64{4 << 30}
			return a.benchStore(cmd.Context(), cfg, &against)
		},
	}
	cmd.Flags().StringVar(&cfg.Dir, "dir", os.TempDir(), "`directory` to measure in: best one on the store's disk")
	cmd.Flags().Uint64Var(&mebibytes, "memory", 512, "`MiB` of the guest that are not zero")
	cmd.Flags().IntVar(&cfg.Changed, "changed", 5, "`percent` of the pages that differ in the next snapshot")
	cmd.Flags().BoolVar(&cfg.Plain, "plain", false, "without encryption")
	cmd.Flags().BoolVar(&beside, "qemu", false, "compare with QEMU itself")
	cmd.Flags().IntVar(&against.Runs, "runs", 3, "of each comparison with QEMU")
	return cmd
}

// What `violin bench store --qemu` holds its figures against.
const (
	leastUnique   = 500e6 // bytes/s
	leastKnown    = 2e9
	mostTimesQEMU = 1.3
	mostLazy      = time.Second
)

func (a *app) benchStore(ctx context.Context, cfg bench.StoreConfig, against *bench.QEMUConfig) error {
	spare() // as in a server
	p := a.progress()
	defer p.done()
	result := struct {
		Machine    bench.Machine      `json:"machine"`
		Config     map[string]any     `json:"config"`
		Figures    []bench.Figure     `json:"figures"`
		Beside     []bench.Comparison `json:"beside_qemu,omitempty"`
		Violations []string           `json:"violations,omitempty"`
	}{Machine: bench.ThisMachine(), Config: map[string]any{"memory_bytes": cfg.Memory, "changed_percent": cfg.Changed, "encrypted": !cfg.Plain}}
	if err := bench.Store(ctx, cfg, func(f bench.Figure) {
		p.step("measured", "", f.What)
		result.Figures = append(result.Figures, f)
	}); err != nil {
		return err
	}
	if against != nil {
		for _, f := range result.Figures {
			if f.What == bench.UniquePages && f.Rate() < leastUnique || f.What == bench.KnownPages && f.Rate() < leastKnown {
				result.Violations = append(result.Violations, fmt.Sprintf("%s went in at %s/s", f.What, formatBytes(uint64(f.Rate()))))
			}
		}
		err := bench.AgainstQEMU(ctx, *against, func(c bench.Comparison) {
			p.step("measured", "", fmt.Sprintf("%s of %s", c.What, formatBytes(c.Memory)))
			result.Beside = append(result.Beside, c)
			if c.Ratio > mostTimesQEMU || c.Ratio == 0 && c.Ours.Wall > mostLazy {
				result.Violations = append(result.Violations, fmt.Sprintf("%s of %s took %s", c.What, formatBytes(c.Memory), formatDuration(c.Ours.Wall)))
			}
		})
		if err != nil {
			return err
		}
	}
	p.done()
	err := a.printFigures(result, func(w io.Writer) {
		writeFigures(w, result.Figures)
		if len(result.Beside) > 0 {
			fmt.Fprintln(w)
			writeComparisons(w, result.Beside)
		}
		fmt.Fprintf(w, "\n%s, %s, %s/%s\n", result.Machine, map[bool]string{true: "not encrypted", false: "encrypted"}[cfg.Plain], runtime.GOOS, runtime.GOARCH)
	})
	if err == nil && len(result.Violations) > 0 {
		err = &failure{code: exitFailure, err: errors.New("did not hold: " + strings.Join(result.Violations, "; "))}
	}
	return err
}

func writeComparisons(w io.Writer, all []bench.Comparison) {
	t := newTable("BESIDE QEMU", ">MEMORY", ">VIOLIN", ">QEMU", ">RATIO", ">CPU", ">QEMU'S CPU")
	for _, c := range all {
		qemu, ratio, cpu := "", "", ""
		if c.Ratio > 0 {
			qemu, ratio, cpu = formatDuration(c.QEMU.Wall), fmt.Sprintf("%.2f", c.Ratio), formatDuration(c.QEMU.CPU)
		}
		t.row(c.What, formatBytes(c.Memory), formatDuration(c.Ours.Wall), qemu, ratio, formatDuration(c.Ours.CPU), cpu)
	}
	t.write(w)
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
