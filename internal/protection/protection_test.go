package protection

import (
	"strings"
	"testing"
	"time"

	"violin/internal/catalog"
)

var start = time.Date(2026, 8, 7, 10, 0, 0, 0, time.UTC)

func at(minutes int) time.Time { return start.Add(time.Duration(minutes) * time.Minute) }

func TestWithDefaults(t *testing.T) {
	got, err := WithDefaults(catalog.Protection{Every: time.Minute})
	if err != nil || got.Keep != DefaultKeep || got.MaxRollbacks != DefaultMaxRollbacks || got.Window != DefaultWindow || got.HostTimeout != DefaultHostTimeout {
		t.Errorf("%+v, %v", got, err)
	}
	for _, p := range []catalog.Protection{{}, {Every: time.Millisecond}, {Every: time.Minute, Keep: -1}, {Every: time.Minute, MaxRollbacks: -1}, {Every: time.Minute, Window: -1}, {Every: time.Minute, HostTimeout: time.Millisecond}} {
		if _, err := WithDefaults(p); err == nil {
			t.Errorf("%+v is accepted", p)
		}
	}
}

func TestDue(t *testing.T) {
	p := catalog.Protection{Every: 5 * time.Minute}
	for _, c := range []struct {
		last time.Time
		now  time.Time
		want time.Duration
	}{
		{time.Time{}, at(0), 0},
		{at(0), at(0), 5 * time.Minute},
		{at(0), at(3), 2 * time.Minute},
		{at(0), at(5), 0},
		{at(0), at(60), 0}, // and the eleven before it are not made up for: the next is due after
		{at(60), at(60), 5 * time.Minute},
	} {
		if got := Due(p, c.last, c.now); got != c.want {
			t.Errorf("last %v, now %v: %v, want %v", c.last, c.now, got, c.want)
		}
	}
}

func TestRollback(t *testing.T) {
	p := catalog.Protection{MaxRollbacks: 3, Window: time.Hour}
	for _, c := range []struct {
		minute int
		ok     bool
	}{
		{0, true}, {1, true}, {30, true}, {31, false}, {59, false},
		{60, true},  // the first is an hour ago
		{60, false}, // and only the first
		{61, true}, {200, true}, {200, true}, {200, true}, {200, false},
		{190, false}, // the clock was set back
	} {
		var ok bool
		if p, ok = Rollback(p, at(c.minute)); ok != c.ok {
			t.Errorf("minute %d: %v, want %v (%v)", c.minute, ok, c.ok, p.Rollbacks)
		}
	}
}

func TestPause(t *testing.T) {
	if Pause(0) != time.Second || Pause(3) != 8*time.Second || Pause(99) != time.Minute {
		t.Error(Pause(0), Pause(3), Pause(99))
	}
}

// history makes snapshots of "id<parent" words, a minute apart; c marks a checkpoint, t a tag.
func history(text string) (all []*catalog.Snapshot) {
	for i, f := range strings.Fields(text) {
		name, kind, _ := strings.Cut(f, ":")
		id, parent, _ := strings.Cut(name, "<")
		s := &catalog.Snapshot{ID: id, Parent: parent, Created: at(i), Checkpoint: strings.Contains(kind, "c")}
		if strings.Contains(kind, "t") {
			s.Tags = []string{"x"}
		}
		all = append(all, s)
	}
	return all
}

func TestExpired(t *testing.T) {
	for _, c := range []struct {
		history string
		keep    int
		head    string
		want    string
	}{
		{"", 2, "", ""},
		{"1:c 2:c 3:c 4:c", 2, "4", "1 2"},
		{"1:c 2:c 3:c 4:c", 9, "4", ""},
		{"1 2:c 3:ct 4:c 5:c", 1, "5", "2 4"}, // neither the user's nor a tagged one
		{"1:c 2:c 3:c 4:c", 1, "2", "1 3"},    // it was rolled back to 2, and has none of its own yet
		{"1:c 2:c 3 4 5 6", 2, "6", ""},       // snapshots of the user don't push checkpoints out
		{"1:c 2:t 3:c 4:ct 5:c", 2, "5", "1"}, // nor do tagged ones
	} {
		var got []string
		for _, s := range Expired(history(c.history), c.keep, c.head) {
			got = append(got, s.ID)
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%s, keep %d: %v, want %s", c.history, c.keep, got, c.want)
		}
	}
}

func TestTip(t *testing.T) {
	for _, c := range []struct {
		history, head string
		minute        int // at which head was noted
		want          string
	}{
		{"", "1", 0, "1"},
		{"1 2<1 3<2", "3", 2, "3"},
		{"1 2<1 3<2", "2", 1, "3"}, // 3 was sealed, and the server died
		{"1 2<1 3<2", "1", 0, "3"},
		{"1 2<1 3<2", "1", 5, "1"}, // it was restored to 1, later
		{"1 2<1 3<2 4<1", "1", 2, "4"},
		{"1<1", "1", -5, "1"},
	} {
		if got := Tip(history(c.history), c.head, at(c.minute)); got != c.want {
			t.Errorf("%s, at %s since %d: %s, want %s", c.history, c.head, c.minute, got, c.want)
		}
	}
}
