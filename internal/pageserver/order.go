package pageserver

import (
	"bufio"
	"fmt"
	"io"
	"slices"
	"strconv"
)

// A Run is pages of a RAM block that lie side by side.
type Run struct {
	Block       string // QEMU's name of it
	Page, Pages uint64 // the first, and how many
}

// MaxOrder is how many pages an order names at most: 128 MiB of memory.
const MaxOrder = 1 << 15

// touched gathers pages in the order of the calls.
type touched struct {
	runs  []Run
	pages uint64
}

func (t *touched) add(block string, n uint64) {
	if t.pages == MaxOrder {
		return
	}
	t.pages++
	if i := len(t.runs) - 1; i >= 0 && t.runs[i].Block == block && t.runs[i].Page+t.runs[i].Pages == n {
		t.runs[i].Pages++
		return
	}
	t.runs = append(t.runs, Run{block, n, 1})
}

func (t *touched) all() []Run { return slices.Clone(t.runs) }

// Learn makes the order for the next time: the pages that were asked for now, and then
// those of the order that was used. They were not asked for because they were sent in
// time, so they would be forgotten otherwise.
func Learn(now, before []Run) []Run {
	var t touched
	type key struct {
		block string
		page  uint64
	}
	seen := map[key]bool{}
	for _, r := range append(slices.Clone(now), before...) {
		for n := r.Page; n-r.Page < r.Pages && t.pages < MaxOrder; n++ {
			if k := (key{r.Block, n}); !seen[k] {
				seen[k] = true
				t.add(r.Block, n)
			}
		}
	}
	return t.runs
}

// WriteOrder writes an order as text: a line for each run, with the block's name in
// quotes, the first page's number and the number of pages.
func WriteOrder(w io.Writer, order []Run) error {
	b := bufio.NewWriter(w)
	for _, r := range order {
		fmt.Fprintf(b, "%s %d %d\n", strconv.Quote(r.Block), r.Page, r.Pages)
	}
	if err := b.Flush(); err != nil {
		return fmt.Errorf("write the order of pages: %w", err)
	}
	return nil
}

// ReadOrder is the inverse of [WriteOrder]. It reads MaxOrder runs at most.
func ReadOrder(r io.Reader) ([]Run, error) {
	var order []Run
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		var run Run
		n, err := fmt.Sscanf(lines.Text(), "%q %d %d\n", &run.Block, &run.Page, &run.Pages)
		if err == nil && (n != 3 || run.Pages == 0 || run.Pages > MaxOrder || len(order) == MaxOrder) {
			err = fmt.Errorf("%d pages", run.Pages)
		}
		if err != nil {
			return nil, fmt.Errorf("read the order of pages: line %d: %w", len(order)+1, err)
		}
		order = append(order, run)
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read the order of pages: %w", err)
	}
	return order, nil
}
