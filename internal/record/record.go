// Package record is what an agent writes down for the one that takes over from it: one
// JSON document a file, replaced as a whole. It survives the death of the process at any
// instant, which is all that it is for: with the machine, what it speaks of is gone too.
package record

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
)

// format is that of the files. An agent reads no other.
const format = 1

type document struct {
	Format  int             `json:"format"`
	Content json.RawMessage `json:"content"`
}

// Write replaces a record.
func Write(path string, v any) error {
	content, err := json.Marshal(v)
	if err == nil {
		content, err = json.Marshal(document{Format: format, Content: content})
	}
	if err == nil {
		err = os.WriteFile(path+".new", content, 0o600)
	}
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		return fmt.Errorf("write down %s: %w", path, err)
	}
	return nil
}

// Read reads a record into v. The error is [fs.ErrNotExist] if there is none.
func Read(path string, v any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("read what an agent wrote down: %w", err)
	}
	var d document
	if err = json.Unmarshal(b, &d); err == nil && d.Format != format {
		err = fmt.Errorf("it has format %d, and this version reads format %d", d.Format, format)
	}
	if err == nil && len(d.Content) == 0 {
		err = errors.New("it has no content")
	}
	if err == nil {
		err = json.Unmarshal(d.Content, v)
	}
	if err != nil {
		return fmt.Errorf("read what an agent wrote down: %s: %w", path, err)
	}
	return nil
}
