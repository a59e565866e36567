package record

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestRecord(t *testing.T) {
	path := filepath.Join(t.TempDir(), "r.json")
	var got struct{ A, B int }
	if err := Read(path, &got); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	for i := range 2 {
		if err := Write(path, struct{ A, B int }{i, 7}); err != nil {
			t.Fatal(err)
		}
	}
	// A writer that died left a part.
	if err := os.WriteFile(path+".new", []byte(`{"form`), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Read(path, &got); err != nil || got.A != 1 || got.B != 7 {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestRefuses(t *testing.T) {
	path := filepath.Join(t.TempDir(), "r.json")
	for content, want := range map[string]string{
		`{"format":2,"content":{}}`: "it has format 2",
		`{"format":1}`:              "no content",
		`{"format":`:                "unexpected end",
		`{"format":1,"content":[]}`: "cannot unmarshal",
	} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		var v struct{}
		if err := Read(path, &v); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v, want %q", content, err, want)
		}
	}
}
