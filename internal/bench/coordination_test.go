package bench

import "testing"

func TestCoordinate(t *testing.T) {
	for _, hosts := range []int{1, 2, 30} {
		c, err := Coordinate(t.Context(), hosts, 3)
		if err != nil || c.Hosts != hosts || c.Took <= 0 {
			t.Errorf("%+v, %v", c, err)
		}
	}
}
