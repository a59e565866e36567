package catalog

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strings"

	"violin/internal/store"
)

// replaceNote writes a document in the place of the one that there is, by one atomic
// write.
func (c *Catalog) replaceNote(ctx context.Context, name string, document any) error {
	doc, err := json.MarshalIndent(document, "", "  ")
	if err != nil {
		return err
	}
	return c.st.ReplaceDocument(ctx, name, append(doc, '\n'))
}

// notes reads the documents of a directory, one of each subject of a kind, and returns
// what is in them by the subject's name. One that cannot be read is told, and left out.
func notes[T any](ctx context.Context, c *Catalog, dir, kind string, damaged func(name string, err error), parse func(doc []byte, name string) (T, error)) (map[string]T, error) {
	out := map[string]T{}
	for at, err := range c.st.Documents(ctx, dir) {
		if err != nil {
			return nil, fmt.Errorf("list records of %ss: %w", kind, err)
		}
		name := strings.TrimSuffix(strings.TrimPrefix(at, dir+"/"), ".json")
		doc, err := c.st.GetDocument(ctx, at)
		var note T
		if err == nil {
			note, err = parse(doc, name)
		}
		if err != nil {
			damaged(name, fmt.Errorf("record of %s %q: %w", kind, name, err))
			continue
		}
		out[name] = note
	}
	return out, nil
}

// parseNote reads a document of a format and of a version up to newest into d; what is
// for the errors.
func parseNote(doc []byte, what, format string, newest int, d any) error {
	var head struct {
		Format  string
		Version int
	}
	if err := json.Unmarshal(doc, &head); err != nil {
		return fmt.Errorf("%w: %w", store.ErrDamaged, err)
	}
	switch {
	case head.Format != format:
		return fmt.Errorf("%w: format %q, want %q", store.ErrDamaged, head.Format, format)
	case head.Version < 1 || head.Version > newest:
		return fmt.Errorf("%s has format version %d, this violin reads version %d and older; use a later violin", what, head.Version, newest)
	}
	dec := json.NewDecoder(bytes.NewReader(doc))
	dec.DisallowUnknownFields()
	if err := dec.Decode(d); err != nil {
		return fmt.Errorf("%w: %w", store.ErrDamaged, err)
	}
	return nil
}
