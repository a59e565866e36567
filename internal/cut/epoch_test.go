package cut

import "testing"

// RFC 1982, section 3.2: s1 < s2 if (i1 < i2 and i2 - i1 < 2^(SERIAL_BITS - 1))
// or (i1 > i2 and i1 - i2 > 2^(SERIAL_BITS - 1)).
func TestCompareIsRFC1982(t *testing.T) {
	less := func(i1, i2 int) bool { return i1 < i2 && i2-i1 < 128 || i1 > i2 && i1-i2 > 128 }
	for i := range 256 {
		for j := range 256 {
			want := 1 // also where the RFC defines nothing
			switch {
			case i == j:
				want = 0
			case less(i, j):
				want = -1
			}
			if got := Epoch(i).Compare(Epoch(j)); got != want {
				t.Errorf("%d compared with %d: %d, want %d", i, j, got, want)
			}
		}
	}
}

func TestNextIsNewer(t *testing.T) {
	for e := range 256 {
		if e := Epoch(e); e.Next().Compare(e) != 1 || e.Compare(e.Next()) != -1 {
			t.Errorf("%d and %d are out of order", e, e.Next())
		}
	}
}
