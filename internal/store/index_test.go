package store

import (
	"encoding/binary"
	"testing"

	"pgregory.net/rapid"
)

// The index against a map. Hashes come from a small set and crowd at few
// homes, so that runs are long, wrap around, and are deleted from the middle.
func TestIndexIsAMap(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		x := new(index)
		model := make(map[Hash]location)
		marks := make(map[Hash]bool)
		hash := func() Hash {
			n := rapid.Uint64Range(0, 60).Draw(t, "hash")
			var h Hash
			h[0] = byte(n % 2) // shard
			binary.BigEndian.PutUint64(h[8:], -n/3<<40)
			h[1] = byte(n)
			return h
		}
		t.Repeat(map[string]func(*rapid.T){
			"add": func(t *rapid.T) {
				h, loc := hash(), makeLocation(rapid.Uint32Range(1, maxPacks).Draw(t, "pack"), 1<<27-1, maxStoredPage)
				_, there := model[h]
				if x.add(h, loc) == there {
					t.Fatalf("add says %v for %s", there, h)
				}
				if !there {
					model[h] = loc
				}
			},
			"set": func(t *rapid.T) {
				h := hash()
				if _, ok := model[h]; !ok {
					t.Skip("absent")
				}
				model[h] = makeLocation(7, 8, 9)
				x.set(h, model[h])
				delete(marks, h)
			},
			"reserve": func(t *rapid.T) { x.reserve(rapid.IntRange(0, 20000).Draw(t, "pages")) },
			"mark": func(t *rapid.T) {
				h := hash()
				_, there := model[h]
				if x.mark(h) != there {
					t.Fatalf("mark says %v for %s", !there, h)
				}
				if there {
					marks[h] = true
				}
			},
			"delete": func(t *rapid.T) {
				h := hash()
				x.delete(h, makeLocation(1, 2, 3)) // lies elsewhere: no effect
				x.delete(h, model[h])
				delete(model, h)
				delete(marks, h)
			},
			"": func(t *rapid.T) {
				for h, loc := range model {
					if got, ok := x.get(h); !ok || got != loc {
						t.Fatalf("%s lies at %#x, %v; want %#x", h, got, ok, loc)
					}
					if _, ok := x.getMarked(h); ok != marks[h] {
						t.Fatalf("%s: marked is %v", h, ok)
					}
				}
				n, marked := 0, 0
				x.each(func(l location) bool {
					n++
					marked += int(l & 1)
					return false
				})
				if pages, _ := x.size(); n != len(model) || pages != int64(n) || marked != len(marks) {
					t.Fatalf("%d pages, size says %d, %d marked; want %d, %d", n, pages, marked, len(model), len(marks))
				}
			},
		})
	})
}

func TestLocation(t *testing.T) {
	l := makeLocation(maxPacks, maxPackSize-1, maxStoredPage)
	if l.pack() != maxPacks || l.offset() != maxPackSize-1 || l.stored() != maxStoredPage || l&marked != 0 {
		t.Errorf("location %#x: pack %d, offset %d, stored %d", l, l.pack(), l.offset(), l.stored())
	}
	if pending.pack() != 0 || pending == 0 {
		t.Error("a pending page looks placed or absent")
	}
}
