package admission

import (
	"errors"
	"strings"
	"testing"
)

func TestCheck(t *testing.T) {
	const GiB = 1 << 30
	two := func(memory uint64, cpus int) []VM {
		return []VM{{"a", "m", memory - Overhead, cpus}, {"b", "m", memory - Overhead, cpus}}
	}
	for _, c := range []struct {
		why     string
		machine Machine
		vms     []VM
		want    []string // what the error says; none: it fits
	}{
		{"to the byte", Machine{Name: "m", Free: 8 * GiB, Promised: 1 * GiB, Reserve: 1 * GiB, CPUs: 2}, two(3*GiB, 1), nil},
		{"a byte short", Machine{Name: "m", Free: 8*GiB - 1, Promised: 1 * GiB, Reserve: 1 * GiB, CPUs: 2}, two(3*GiB, 1), []string{"need 6.0 GiB of memory on m"}},
		{"the shortfall", Machine{Name: "m", Free: 2 * GiB, CPUs: 2}, two(3*GiB, 1), []string{"there are 2.0 GiB: 4.0 GiB are missing"}},
		{"more is promised than there is", Machine{Name: "m", Free: 1 * GiB, Promised: 9 * GiB, CPUs: 2}, two(GiB/2, 1), []string{"there are 0 MiB: 1.0 GiB are missing"}},
		{"CPUs, shared", Machine{Name: "m", Free: 8 * GiB, CPUs: 2, Virtual: 28}, two(GiB, 2), nil},
		{"CPUs, shared too often", Machine{Name: "m", Free: 8 * GiB, CPUs: 2, Virtual: 29}, two(GiB, 2), []string{"need 4 CPUs on m, where 29 of at most 32", "1 are missing"}},
		{"more CPUs than processors", Machine{Name: "m", Free: 8 * GiB, CPUs: 2}, two(GiB, 3), []string{`node "a" has 3 CPUs`, `node "b" has 3 CPUs`, "2 processors"}},
		{"everything at once", Machine{Name: "m", CPUs: 1, Virtual: 15}, two(GiB, 2), []string{"memory", "processors", "need 4 CPUs"}},
		{"elsewhere", Machine{Name: "other"}, two(GiB, 2), nil},
		{"nothing", Machine{Name: "m"}, nil, nil},
	} {
		err := Check([]Machine{c.machine}, c.vms)
		if (err != nil) != (c.want != nil) || err != nil && !errors.Is(err, ErrShort) {
			t.Errorf("%s: %v", c.why, err)
		}
		for _, w := range c.want {
			if err != nil && !strings.Contains(err.Error(), w) {
				t.Errorf("%s: %v: does not say %q", c.why, err, w)
			}
		}
	}
}
