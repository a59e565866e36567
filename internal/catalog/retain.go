package catalog

import (
	"errors"
	"fmt"
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

// A Verdict is what a policy says of a snapshot.
type Verdict struct {
	Snapshot *Snapshot
	// Reasons are the rules that keep it, such as "last 3"; none means that it goes.
	Reasons []string
}

// Kept reports whether the snapshot stays.
func (v Verdict) Kept() bool { return len(v.Reasons) > 0 }

// Judge says of each snapshot of one slice, oldest first, why the policy keeps
// it, if it does. A policy without a rule is refused: it would forget
// everything.
func (p Policy) Judge(all []*Snapshot) ([]Verdict, error) {
	if p.Last < 0 || p.Hourly < 0 || p.Daily < 0 {
		return nil, errors.New("forget: a number of snapshots to keep is negative")
	}
	if p.Last == 0 && p.Hourly == 0 && p.Daily == 0 && len(p.Tags) == 0 && !p.Tagged {
		return nil, errors.New("forget: nothing says what to keep; give at least one rule, such as the last 5")
	}
	sorted := slices.Clone(all)
	slices.SortStableFunc(sorted, func(a, b *Snapshot) int { return a.Created.Compare(b.Created) })
	verdicts := make([]Verdict, len(sorted))
	keep := func(i int, format string, args ...any) {
		verdicts[i].Reasons = append(verdicts[i].Reasons, fmt.Sprintf(format, args...))
	}
	for i, s := range sorted {
		verdicts[i].Snapshot = s
		if i >= len(sorted)-p.Last {
			keep(i, "last %d", p.Last)
		}
		for _, tag := range s.Tags {
			if p.Tagged || slices.Contains(p.Tags, tag) {
				keep(i, "tag %s", tag)
			}
		}
	}
	youngest := func(n int, rule string, period time.Duration) {
		var last time.Time
		for i, s := range slices.Backward(sorted) {
			if n == 0 {
				return
			}
			if at := s.Created.UTC().Truncate(period); !at.Equal(last) || last.IsZero() {
				keep(i, "%s %s", rule, at.Format("2006-01-02 15:04"))
				last = at
				n--
			}
		}
	}
	youngest(p.Hourly, "hour of", time.Hour)
	youngest(p.Daily, "day of", 24*time.Hour)
	return verdicts, nil
}

// Split returns which snapshots of one slice the policy keeps and which it
// forgets, both oldest first.
func (p Policy) Split(all []*Snapshot) (keep, forget []*Snapshot, err error) {
	verdicts, err := p.Judge(all)
	for _, v := range verdicts {
		if v.Kept() {
			keep = append(keep, v.Snapshot)
		} else {
			forget = append(forget, v.Snapshot)
		}
	}
	return keep, forget, err
}
