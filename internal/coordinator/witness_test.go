package coordinator

import (
	"testing"

	"violin/internal/cut"
)

// TestWitnessKeepsTheRoundsThatCount: the last two, and before them the first of
// the unbroken row that read the same.
func TestWitnessKeepsTheRoundsThatCount(t *testing.T) {
	for _, test := range []struct {
		what string
		read []uint64 // what each round reads
		want []int    // numbers of the rounds that are kept
	}{
		{"drained at once", []uint64{7, 7}, []int{1, 2}},
		{"one more arrives", []uint64{6, 7, 7}, []int{2, 3}},
		{"a frame is lost", []uint64{6, 6, 6, 6, 6}, []int{1, 4, 5}},
		{"and another was slow", []uint64{5, 5, 5, 6, 6, 6, 6}, []int{4, 6, 7}},
		{"never twice the same", []uint64{1, 2, 3}, []int{2, 3}},
		{"one round", []uint64{1}, []int{1}},
	} {
		w := newWitness()
		for i, n := range test.read {
			for _, host := range []string{"a", "b"} {
				w.effect(cut.SendPoll{Cut: "c", Host: host, Round: i + 1})
			}
			ch := cut.Channel{From: "a", To: "b", Network: "lan"}
			w.event(cut.Counters{Cut: "c", Host: "a", Round: i, Counts: []cut.ChannelCount{{Channel: ch, Sent: 99}}}) // late, of the round before
			w.event(cut.Counters{Cut: "c", Host: "a", Round: i + 1, Counts: []cut.ChannelCount{{Channel: ch, Sent: 7}}})
			w.event(cut.Counters{Cut: "c", Host: "b", Round: i + 1, Counts: []cut.ChannelCount{ // in parts
				{Channel: ch, Received: n - 1}, {Channel: ch, Received: 1}, {Channel: cut.Channel{From: "b", To: "a", Network: "lan"}},
			}})
		}
		var got []int
		for _, r := range w.drained(0).Rounds {
			got = append(got, r.Number)
			if len(r.Counts) != 2 || r.Counts["a"][0].Sent != 7 {
				t.Errorf("%s: round %d holds %v", test.what, r.Number, r.Counts)
			}
		}
		if len(got) != len(test.want) {
			t.Errorf("%s: rounds %v, want %v", test.what, got, test.want)
			continue
		}
		for i := range got {
			if got[i] != test.want[i] {
				t.Errorf("%s: rounds %v, want %v", test.what, got, test.want)
				break
			}
		}
	}
}
