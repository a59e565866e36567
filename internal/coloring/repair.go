package coloring

import (
	"fmt"

	"violin/internal/openflow"
)

// Repair returns the flow mods that bring a switch whose entries are have to want:
// as [Diff], for a switch of which nobody knows what it holds. Entries of another
// run of the controller are replaced or removed.
func Repair(have []openflow.FlowStats, want FlowSet) ([]openflow.FlowMod, error) {
	got := FlowSet{}
	for _, st := range have {
		got.add(st.FlowMod())
	}
	// An entry that has been over the wire may be written differently and mean the same.
	wired := FlowSet{}
	for _, f := range want {
		b, err := openflow.Marshal(0, &f)
		if err != nil {
			return nil, fmt.Errorf("coloring: repair: %w", err)
		}
		_, m, err := openflow.Unmarshal(b)
		if err != nil {
			return nil, fmt.Errorf("coloring: repair: %w", err)
		}
		wired.add(*m.(*openflow.FlowMod))
	}
	return Diff(got, wired), nil
}
