package catalog_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"violin/internal/catalog"
	"violin/internal/store"
)

func TestRecords(t *testing.T) {
	dir := t.TempDir()
	st, c := open(t, dir, store.Options{})
	ctx := t.Context()
	want := &catalog.Record{Slice: "a", Suspended: &catalog.Suspension{Snapshot: "1", At: start}}
	if err := c.PutRecord(ctx, want); err != nil {
		t.Fatal(err)
	}
	if err := c.PutRecord(ctx, &catalog.Record{Slice: "never"}); err != nil {
		t.Errorf("a record that says nothing: %v", err)
	}
	want.Suspended.Snapshot = "2" // written over what is there
	if err := c.PutRecord(ctx, want); err != nil {
		t.Fatal(err)
	}
	if err := c.PutRecord(ctx, &catalog.Record{Slice: "../a", Suspended: want.Suspended}); err == nil {
		t.Error("a record outside")
	}
	for name, text := range map[string]string{
		"b": "{", "c": `{"format":"violin-slice","version":9,"record":{"slice":"c"}}`, "d": `{"format":"violin-slice","version":1,"record":{"slice":"a"}}`,
	} {
		if err := os.WriteFile(filepath.Join(dir, "slices", name+".json"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	told := map[string]bool{}
	got, err := catalog.New(st).Records(ctx, func(slice string, err error) { told[slice] = true })
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]*catalog.Record{"a": want}, got); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	if diff := cmp.Diff(map[string]bool{"b": true, "c": true, "d": true}, told); diff != "" {
		t.Errorf("told: -want +got\n%s", diff)
	}
	want.Suspended = nil
	if err := c.PutRecord(ctx, want); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "slices", "a.json")); err == nil {
		t.Error("a record that says nothing is still there")
	}
}

func TestHosts(t *testing.T) {
	dir := t.TempDir()
	st, c := open(t, dir, store.Options{})
	ctx := t.Context()
	for _, h := range []*catalog.Host{{Name: "alpha", Cordoned: start}, {Name: "Beta.example", Cordoned: start}, {Name: "alpha", Cordoned: start.Add(1)}} {
		if err := c.PutHost(ctx, h); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.PutHost(ctx, &catalog.Host{Name: "../a", Cordoned: start}); err == nil {
		t.Error("a host outside")
	}
	for name, text := range map[string]string{
		"b": "{", "c": `{"format":"violin-host","version":9,"host":{"name":"c"}}`, "d": `{"format":"violin-host","version":1,"host":{"name":"a"}}`,
		"e": `{"format":"violin-slice","version":1,"host":{"name":"e"}}`, "f": `{"format":"violin-host","version":1}`,
	} {
		if err := os.WriteFile(filepath.Join(dir, "hosts", name+".json"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	told := map[string]bool{}
	got, err := catalog.New(st).Hosts(ctx, func(host string, _ error) { told[host] = true })
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]*catalog.Host{"alpha": {Name: "alpha", Cordoned: start.Add(1)}, "Beta.example": {Name: "Beta.example", Cordoned: start}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
	if diff := cmp.Diff(map[string]bool{"b": true, "c": true, "d": true, "e": true, "f": true}, told); diff != "" {
		t.Errorf("told: -want +got\n%s", diff)
	}
	for _, name := range []string{"alpha", "Beta.example"} {
		if err := c.PutHost(ctx, &catalog.Host{Name: name}); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(dir, "hosts", name+".json")); err == nil {
			t.Errorf("something is still kept of %s", name)
		}
	}
}
