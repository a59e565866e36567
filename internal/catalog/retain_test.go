package catalog_test

import (
	"strings"
	"testing"
	"time"

	"violin/internal/catalog"
)

func TestPolicy(t *testing.T) {
	// Oldest first: the IDs say day and time of day.
	var all []*catalog.Snapshot
	for _, s := range []string{"1d-0900", "1d-0930 gold", "1d-1015", "3d-2300", "3d-2359", "4d-0000", "4d-0030 silver", "4d-0100"} {
		id, tag, _ := strings.Cut(s, " ")
		at, err := time.Parse("2 1504", strings.Replace(id, "d-", " ", 1))
		if err != nil {
			t.Fatal(err)
		}
		all = append([]*catalog.Snapshot{{ID: id, Tags: strings.Fields(tag), Created: at.AddDate(2026, 7, 0)}}, all...)
	}
	ids := func(s []*catalog.Snapshot) string {
		var out []string
		for _, s := range s {
			out = append(out, s.ID)
		}
		return strings.Join(out, " ")
	}
	for _, c := range []struct {
		policy catalog.Policy
		keep   string
	}{
		{catalog.Policy{Last: 1}, "4d-0100"},
		{catalog.Policy{Last: 100}, "1d-0900 1d-0930 1d-1015 3d-2300 3d-2359 4d-0000 4d-0030 4d-0100"},
		{catalog.Policy{Hourly: 3}, "3d-2359 4d-0030 4d-0100"},
		{catalog.Policy{Daily: 2}, "3d-2359 4d-0100"},
		{catalog.Policy{Daily: 9}, "1d-1015 3d-2359 4d-0100"},
		{catalog.Policy{Tags: []string{"gold", ""}}, "1d-0930"},
		{catalog.Policy{Tagged: true}, "1d-0930 4d-0030"},
		{catalog.Policy{Tagged: true, Last: 1, Daily: 2}, "1d-0930 3d-2359 4d-0030 4d-0100"},
	} {
		keep, forget, err := c.policy.Split(all)
		if err != nil {
			t.Errorf("%+v: %v", c.policy, err)
			continue
		}
		if ids(keep) != c.keep || len(keep)+len(forget) != len(all) {
			t.Errorf("%+v keeps %s and forgets %s; want to keep %s", c.policy, ids(keep), ids(forget), c.keep)
		}
	}
	for _, p := range []catalog.Policy{{}, {Last: -1}, {Last: 1, Hourly: -1}} {
		if keep, forget, err := p.Split(all); err == nil || keep != nil || forget != nil {
			t.Errorf("%+v is accepted", p)
		}
	}
	if _, forget, err := (catalog.Policy{Last: 1}).Split(nil); err != nil || forget != nil {
		t.Errorf("no snapshots: %v, %v", forget, err)
	}
}
