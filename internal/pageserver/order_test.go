package pageserver_test

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"violin/internal/pageserver"
)

func TestLearn(t *testing.T) {
	now := []pageserver.Run{{"b", 9, 1}, {"a", 5, 3}}
	before := []pageserver.Run{{"a", 4, 2}, {"a", 20, 1}, {"b", 8, 2}}
	want := []pageserver.Run{{"b", 9, 1}, {"a", 5, 3}, {"a", 4, 1}, {"a", 20, 1}, {"b", 8, 1}}
	if got := pageserver.Learn(now, before); !slices.Equal(got, want) {
		t.Errorf("learnt %v, want %v", got, want)
	}
	if got := pageserver.Learn(nil, nil); len(got) != 0 {
		t.Errorf("learnt %v of nothing", got)
	}
	long := pageserver.Learn(now, []pageserver.Run{{"c", 0, 1 << 50}})
	sum := uint64(0)
	for _, r := range long {
		sum += r.Pages
	}
	if sum != pageserver.MaxOrder || long[0] != now[0] {
		t.Errorf("an order of %d pages that begins with %v", sum, long[0])
	}
}

func TestOrderComesBack(t *testing.T) {
	want := []pageserver.Run{{"pc.ram", 17, 1}, {"/rom@etc/acpi tables\n", 0, 32}}
	var b bytes.Buffer
	if err := pageserver.WriteOrder(&b, want); err != nil {
		t.Fatal(err)
	}
	got, err := pageserver.ReadOrder(&b)
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v", got, err)
	}
}

func FuzzReadOrder(f *testing.F) {
	f.Add("\"pc.ram\" 17 1\n\"a\" 0 3\n")
	f.Add("pc.ram 1 1")
	f.Add("\"a\" 1 0")
	f.Fuzz(func(t *testing.T, text string) {
		order, err := pageserver.ReadOrder(strings.NewReader(text))
		if err != nil {
			if order != nil {
				t.Fatal("an error and an order")
			}
			return
		}
		var b bytes.Buffer
		if err := pageserver.WriteOrder(&b, order); err != nil {
			t.Fatal(err)
		}
		again, err := pageserver.ReadOrder(&b)
		if err != nil || !slices.Equal(order, again) {
			t.Fatalf("%v became %v: %v", order, again, err)
		}
	})
}
