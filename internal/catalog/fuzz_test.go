package catalog

import (
	"testing"
	"time"
)

func FuzzParse(f *testing.F) {
	doc, err := marshal(&Snapshot{ID: "1", Slice: "a", Created: time.Unix(0, 0).UTC(), Topology: []byte("x")})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(doc)
	f.Add([]byte(`{}`))
	f.Add([]byte(`{"format":"violin-snapshot","version":1,"snapshot":{}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := parse(b)
		if err != nil {
			if s != nil {
				t.Error("an error and a snapshot")
			}
			return
		}
		again, err := marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		if s, err := parse(again); err != nil || s == nil {
			t.Errorf("sealed anew it cannot be read: %v", err)
		}
	})
}

func FuzzParseRecord(f *testing.F) {
	f.Add([]byte(`{"format":"violin-slice","version":1,"record":{"slice":"a","suspended":{"snapshot":"1","at":"2026-08-07T10:15:30Z"}}}`))
	f.Add([]byte(`{"format":"violin-slice","version":1}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := parseRecord(b); (err == nil) != (r != nil) {
			t.Errorf("%v and %v", r, err)
		}
	})
}

func FuzzParseTag(f *testing.F) {
	f.Add([]byte(`{"format":"violin-tag","version":1,"snapshot":"260807-101530-k3f9"}`))
	f.Add([]byte(`{"format":"violin-tag","version":1,"snapshot":""}`))
	f.Add([]byte(`{"format":"violin-tag","version":2,"snapshot":"1"}`))
	f.Add([]byte(`{"format":"violin-tag","version":1,"snapshot":"../1"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		id, err := parseTag(b)
		if err != nil && id != "" {
			t.Error("an error and an ID")
		}
		if err == nil && id != "" && checkID(id) != nil {
			t.Errorf("ID %q", id)
		}
	})
}
