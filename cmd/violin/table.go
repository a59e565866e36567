package main

import (
	"fmt"
	"io"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// table lays rows out in columns. A heading that begins with '>' makes its column right-aligned.
type table struct {
	headings []string
	rows     [][]string
}

func newTable(headings ...string) *table { return &table{headings: headings} }

// row adds a row; an empty cell shows as '-'.
func (t *table) row(cells ...string) {
	for i, cell := range cells {
		cells[i] = printable(cell)
		if cell == "" {
			cells[i] = "-"
		}
	}
	t.rows = append(t.rows, cells)
}

func (t *table) write(w io.Writer) {
	widths := make([]int, len(t.headings))
	right := make([]bool, len(t.headings))
	headings := make([]string, len(t.headings))
	for i, h := range t.headings {
		headings[i], right[i] = strings.CutPrefix(h, ">")
	}
	lines := append([][]string{headings}, t.rows...)
	for _, line := range lines {
		for i, cell := range line {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	for _, line := range lines {
		var b strings.Builder
		for i, cell := range line {
			if i > 0 {
				b.WriteString("  ")
			}
			pad := strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell))
			if right[i] {
				b.WriteString(pad + cell)
			} else {
				b.WriteString(cell + pad)
			}
		}
		fmt.Fprintln(w, strings.TrimRight(b.String(), " "))
	}
}

// printable keeps what a guest or a hypervisor said from moving the cursor.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, s)
}

// formatBytes renders an amount of bytes with one decimal.
func formatBytes(n uint64) string {
	if n < 1<<10 {
		return fmt.Sprintf("%d B", n)
	}
	value, unit := float64(n)/(1<<10), 0
	const units = "KMGTPE"
	// 1023.95 would be rendered as 1024.0
	for value >= 1023.95 && unit < len(units)-1 {
		value /= 1 << 10
		unit++
	}
	return fmt.Sprintf("%.1f %ciB", value, units[unit])
}

// formatMemory renders a size that people gave in round units.
func formatMemory(n uint64) string { return strings.Replace(formatBytes(n), ".0 ", " ", 1) }

// formatDuration renders milliseconds below a second, seconds below a minute, and minutes.
func formatDuration(d time.Duration) string {
	switch {
	case d < 0:
		return "-" + formatDuration(-d)
	case d < time.Second-50*time.Microsecond:
		return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
	case d < time.Minute-5*time.Millisecond:
		return fmt.Sprintf("%.2f s", d.Seconds())
	default:
		d = d.Round(time.Second)
		return fmt.Sprintf("%d min %02d s", int(d.Minutes()), int(d.Seconds())%60)
	}
}

// optionalDuration is formatDuration of a duration that may not be known.
func optionalDuration(d *durationpb.Duration) string {
	if d == nil {
		return ""
	}
	return formatDuration(d.AsDuration())
}

// formatOffset renders a duration after a reference instant, with its sign.
func formatOffset(d *durationpb.Duration) string {
	if s := optionalDuration(d); s == "" || strings.HasPrefix(s, "-") {
		return s
	} else {
		return "+" + s
	}
}

// formatRatio renders part/whole in percent.
func formatRatio(part, whole uint64) string {
	if whole == 0 {
		return ""
	}
	return fmt.Sprintf("%.1f %%", 100*float64(part)/float64(whole))
}

func formatCount(n uint64) string { return fmt.Sprintf("%d", n) }

func (a *app) formatTime(t *timestamppb.Timestamp) string {
	if t == nil {
		return ""
	}
	return t.AsTime().In(a.location).Format(time.DateTime)
}
