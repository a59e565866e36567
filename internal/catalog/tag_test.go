package catalog_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"violin/internal/catalog"
	"violin/internal/store"
)

func TestTags(t *testing.T) {
	for _, opts := range []store.Options{{}, {Key: store.NewKey()}} {
		dir := t.TempDir()
		st, c := open(t, dir, opts)
		ctx := t.Context()
		for _, s := range []*catalog.Snapshot{snapshot("a", "1", "gold"), snapshot("a", "2", ""), snapshot("a", "3", ""), snapshot("b", "4", "gold")} {
			if err := take(t, st, c, s); err != nil {
				t.Fatal(err)
			}
		}
		// tags are those of slice a, as a new process would find them.
		tags := func() string {
			t.Helper()
			all, err := catalog.New(st).List(ctx, "a")
			if err != nil {
				t.Fatal(err)
			}
			var out []string
			for _, s := range all {
				if len(s.Tags) > 0 {
					out = append(out, s.ID+"="+strings.Join(s.Tags, ","))
				}
			}
			return strings.Join(out, " ")
		}
		for _, step := range []struct {
			why  string
			do   func() error
			want string
			err  error
		}{
			{"as sealed", func() error { return nil }, "1=gold", nil},
			{"a second one", func() error { return c.SetTag(ctx, "a", "1", "best", false) }, "1=best,gold", nil},
			{"once more changes nothing", func() error { return c.SetTag(ctx, "a", "1", "gold", false) }, "1=best,gold", nil},
			{"taken", func() error { return c.SetTag(ctx, "a", "2", "gold", false) }, "1=best,gold", store.ErrExists},
			{"moved, though it was sealed", func() error { return c.SetTag(ctx, "a", "2", "gold", true) }, "1=best 2=gold", nil},
			{"taken away", func() error { return c.DeleteTag(ctx, "a", "best") }, "2=gold", nil},
			{"not there", func() error { return c.DeleteTag(ctx, "a", "best") }, "2=gold", catalog.ErrNotFound},
			{"does not come back to whom it was sealed with", func() error { return c.DeleteTag(ctx, "a", "gold") }, "", nil},
			{"no such snapshot", func() error { return c.SetTag(ctx, "a", "9", "x", false) }, "", catalog.ErrNotFound},
			{"an ID", func() error { return c.SetTag(ctx, "a", "2", "3", false) }, "", store.ErrExists},
			{"sealed anew", func() error { return take(t, st, c, snapshot("a", "5", "gold")) }, "5=gold", nil},
			{"taken for a seal", func() error { return take(t, st, c, snapshot("a", "6", "gold")) }, "5=gold", store.ErrExists},
			{"the snapshot is forgotten", func() error { return c.Delete(ctx, "a", "5") }, "", nil},
			{"and the tag is free, and still not the first's", func() error { return c.SetTag(ctx, "a", "3", "gold", false) }, "3=gold", nil},
			{"all who had it are forgotten", func() error { return errors.Join(c.Delete(ctx, "a", "1"), c.Delete(ctx, "a", "3")) }, "", nil},
		} {
			if err := step.do(); !errors.Is(err, step.err) || (err == nil) != (step.err == nil) {
				t.Errorf("%s: %v", step.why, err)
			}
			if got := tags(); got != step.want {
				t.Errorf("%s: %q, want %q", step.why, got, step.want)
			}
		}
		if left, err := filepath.Glob(filepath.Join(dir, "tags", "a", "*")); err != nil || len(left) > 0 {
			t.Errorf("left behind: %q, %v", left, err)
		}
		if err := c.SetTag(ctx, "a", "2", "gold", false); err != nil {
			t.Fatal(err)
		}
		for _, ref := range []string{"a@gold", "b@gold"} {
			s, err := c.Resolve(ctx, ref)
			if want := map[string]string{"a@gold": "2", "b@gold": "4"}[ref]; err != nil || s.ID != want {
				t.Errorf("%s: %v, %v", ref, s, err)
			}
		}
	}
}

// A tag whose document is damaged is told by a check, and hides no snapshot.
func TestDamagedTag(t *testing.T) {
	dir := t.TempDir()
	st, c := open(t, dir, store.Options{})
	if err := take(t, st, c, snapshot("a", "1", "")); err != nil {
		t.Fatal(err)
	}
	if err := c.SetTag(t.Context(), "a", "1", "gold", false); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "tags", "a", "gold.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if s, err := c.Resolve(t.Context(), "a@1"); err != nil || len(s.Tags) != 0 {
		t.Errorf("%v, %v", s, err)
	}
	var told []string
	for _, err := range c.Audit(t.Context(), func(ref string, err error) { told = append(told, ref) }) {
		if err != nil {
			t.Error(err)
		}
	}
	if len(told) != 1 || told[0] != "a@gold" {
		t.Errorf("told: %q", told)
	}
	if err := c.SetTag(t.Context(), "a", "1", "gold", false); err != nil {
		t.Errorf("give it again: %v", err)
	}
}
