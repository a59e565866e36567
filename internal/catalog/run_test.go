package catalog_test

import (
	"reflect"
	"strings"
	"testing"
	"time"

	"violin/internal/catalog"
	"violin/internal/store"
)

func TestRun(t *testing.T) {
	st, c := open(t, t.TempDir(), store.Options{})
	r := &catalog.Run{
		Slice: "s", Term: 3, Topology: "version: 1\n", Created: time.Unix(7, 0).UTC(), First: 9, Hosts: map[string]catalog.RunHost{"alpha": {Run: "x", Peer: 2}},
		Boot: map[string][]catalog.BootFile{"n": {{Kind: "kernel", Size: 3}}}, Generation: map[string]string{"n": "g"}, Whole: true, Epoch: 255,
		Waiting: &catalog.Waiting{Snapshot: "s@x", Clock: catalog.Frozen}, Cut: &catalog.RunCut{ID: "260801-120000-0001", To: 0, Ordered: true, Began: time.Unix(8, 0).UTC()},
	}
	if err := c.PutRun(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	got, err := c.Runs(t.Context())
	if err != nil || len(got) != 1 || !reflect.DeepEqual(got["s"], r) {
		t.Errorf("%+v, %v", got["s"], err)
	}
	for what, change := range map[string]func(*catalog.Run){
		"no host":         func(r *catalog.Run) { r.Hosts = nil },
		"no run":          func(r *catalog.Run) { r.Hosts = map[string]catalog.RunHost{"alpha": {Peer: 1}} },
		"no number":       func(r *catalog.Run) { r.First = 0 },
		"no topology":     func(r *catalog.Run) { r.Topology = "" },
		"a bad name":      func(r *catalog.Run) { r.Slice = "../s" },
		"a cut of no id":  func(r *catalog.Run) { r.Cut = &catalog.RunCut{} },
		"a head of no id": func(r *catalog.Run) { r.Head = "x/y" },
	} {
		bad := *r
		change(&bad)
		if err := c.PutRun(t.Context(), &bad); err == nil {
			t.Errorf("%s is noted", what)
		}
	}
	if err := c.DeleteRun(t.Context(), "s"); err != nil {
		t.Fatal(err)
	}
	if got, err := c.Runs(t.Context()); err != nil || len(got) != 0 {
		t.Errorf("%v, %v", got, err)
	}

	// What cannot be read is not passed over.
	for doc, want := range map[string]string{
		`{"format":"violin-run","version":2,"run":{}}`:                     "use a later violin",
		`{"format":"violin-slice","version":1}`:                            `format "violin-slice"`,
		`{"format":"violin-run","version":1,"run":{"slice":"s","more":1}}`: `unknown field "more"`,
		`{"format":"violin-run","version":1}`:                              "no note in it",
		`{"format":"violin-run","version":1,"run":{"slice":"t","first":1,"topology":"x","hosts":{"a":{"run":"r","peer":1}}}}`: `it is of slice "t"`,
		`{`: "damaged",
	} {
		if err := st.ReplaceDocument(t.Context(), "runs/s.json", []byte(doc)); err != nil {
			t.Fatal(err)
		}
		if got, err := c.Runs(t.Context()); err == nil || got != nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "runs/s.json") {
			t.Errorf("%s: %v, %v", doc, got, err)
		}
	}
}

func TestTerm(t *testing.T) {
	st, c := open(t, t.TempDir(), store.Options{})
	if got, _, err := c.CopiedTerm(t.Context()); err != nil || got != 0 {
		t.Errorf("before there was a server: %d, %v", got, err)
	}
	for _, term := range []uint64{1, 1 << 60} {
		if err := c.PutTerm(t.Context(), term, nil); err != nil {
			t.Fatal(err)
		}
		if got, _, err := c.CopiedTerm(t.Context()); err != nil || got != term {
			t.Errorf("%d, %v; want %d", got, err, term)
		}
	}
	if err := st.ReplaceDocument(t.Context(), "terms/term.json", []byte(`{"format":"violin-term","version":9}`)); err != nil {
		t.Fatal(err)
	}
	if got, _, err := c.CopiedTerm(t.Context()); err == nil || got != 0 {
		t.Errorf("%d of a later version", got)
	}
}
