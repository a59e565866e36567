package catalog

import (
	"errors"
	"slices"
	"time"
)

// A Policy says which snapshots of a slice to keep. A snapshot is kept if any
// of the rules keeps it.
type Policy struct {
	// Last keeps the youngest so many.
	Last int
	// Hourly and Daily keep the youngest of each of the last so many hours
	// and days (in UTC) that have one. Hours without a snapshot don't count.
	Hourly, Daily int
	// Tags keeps those that have one of these tags.
	Tags []string
	// Tagged keeps all that have a tag.
	Tagged bool
}

// Split returns which snapshots of one slice the policy keeps and which it
// forgets, both oldest first. A policy without a rule is refused: it would
// forget everything.
func (p Policy) Split(all []*Snapshot) (keep, forget []*Snapshot, err error) {
	if p.Last < 0 || p.Hourly < 0 || p.Daily < 0 {
		return nil, nil, errors.New("forget: a number of snapshots to keep is negative")
	}
	if p.Last == 0 && p.Hourly == 0 && p.Daily == 0 && len(p.Tags) == 0 && !p.Tagged {
		return nil, nil, errors.New("forget: nothing says what to keep; give at least one rule, such as the last 5")
	}
	sorted := slices.Clone(all)
	slices.SortStableFunc(sorted, func(a, b *Snapshot) int { return a.Created.Compare(b.Created) })

	kept := make(map[*Snapshot]bool)
	youngest := func(n int, period func(time.Time) time.Time) {
		var last time.Time
		for _, s := range slices.Backward(sorted) {
			if n == 0 {
				return
			}
			if at := period(s.Created.UTC()); !at.Equal(last) || last.IsZero() {
				kept[s], last = true, at
				n--
			}
		}
	}
	for i, s := range slices.Backward(sorted) {
		if i >= len(sorted)-p.Last || p.Tagged && s.Tag != "" || slices.Contains(p.Tags, s.Tag) && s.Tag != "" {
			kept[s] = true
		}
	}
	youngest(p.Hourly, func(t time.Time) time.Time { return t.Truncate(time.Hour) })
	youngest(p.Daily, func(t time.Time) time.Time { return t.Truncate(24 * time.Hour) })
	for _, s := range sorted {
		if kept[s] {
			keep = append(keep, s)
		} else {
			forget = append(forget, s)
		}
	}
	return keep, forget, nil
}
