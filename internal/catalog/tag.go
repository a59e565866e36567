package catalog

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"violin/internal/store"
)

// A sealed document never changes, so a tag that is given, moved or taken away
// later has a document of its own, tags/SLICE/TAG.json. If there is one it says
// which snapshot the tag names, whatever snapshots were sealed with it; without
// one, the snapshot that was sealed with it has it. A document that names a
// snapshot which is not there, or none, leaves the tag free.
const (
	tagDir    = "tags"
	tagFormat = "violin-tag"
)

type tagDocument struct {
	Format   string `json:"format"`
	Version  int    `json:"version"`
	Snapshot string `json:"snapshot"` // ID; empty: the tag was taken away
}

func tagName(slice, tag string) string { return tagDir + "/" + slice + "/" + tag + ".json" }

func parseTag(doc []byte) (id string, err error) {
	damaged := func(err error) (string, error) { return "", fmt.Errorf("%w: %w", store.ErrDamaged, err) }
	var t tagDocument
	dec := json.NewDecoder(bytes.NewReader(doc))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&t); err != nil {
		return damaged(err)
	}
	switch {
	case t.Format != tagFormat:
		return damaged(fmt.Errorf("format %q, want %q", t.Format, tagFormat))
	case t.Version != 1:
		return "", fmt.Errorf("tag has format version %d, this violin reads version 1; use a later violin", t.Version)
	case t.Snapshot != "":
		if err := checkID(t.Snapshot); err != nil {
			return damaged(err)
		}
	}
	return t.Snapshot, nil
}

func (c *Catalog) writeTag(ctx context.Context, slice, tag, id string) error {
	doc, err := json.Marshal(tagDocument{Format: tagFormat, Version: 1, Snapshot: id})
	if err != nil {
		return err
	}
	return c.st.ReplaceDocument(ctx, tagName(slice, tag), append(doc, '\n'))
}

// tagDocuments reads what tags/ says of a slice: the ID, or "", by tag. A damaged
// document names nothing: no snapshot shall be out of reach for it.
func (c *Catalog) tagDocuments(ctx context.Context, slice string) (map[string]string, error) {
	out := map[string]string{}
	for name, err := range c.st.Documents(ctx, tagDir+"/"+slice) {
		if err != nil {
			return nil, err
		}
		tag, ok := strings.CutSuffix(strings.TrimPrefix(name, tagDir+"/"+slice+"/"), ".json")
		if !ok || CheckTag(tag) != nil {
			continue
		}
		id, err := c.readTag(ctx, name)
		if errors.Is(err, store.ErrMissing) {
			continue // deleted since it was listed
		}
		if err != nil && !errors.Is(err, store.ErrDamaged) {
			return nil, fmt.Errorf("tag %q of slice %q: %w", tag, slice, err)
		}
		out[tag] = id
	}
	return out, nil
}

func (c *Catalog) readTag(ctx context.Context, name string) (id string, err error) {
	doc, err := c.st.GetDocument(ctx, name)
	if err != nil {
		return "", err
	}
	return parseTag(doc)
}

// auditTags tells of tags whose documents are damaged.
func (c *Catalog) auditTags(ctx context.Context, damaged func(ref string, err error)) error {
	for name, err := range c.st.Documents(ctx, tagDir) {
		if err != nil {
			return err
		}
		if _, err := c.readTag(ctx, name); errors.Is(err, store.ErrDamaged) {
			damaged(strings.TrimSuffix(strings.Replace(strings.TrimPrefix(name, tagDir+"/"), "/", "@", 1), ".json"), err)
		}
	}
	return nil
}

// name fills in the snapshots' tags.
func (c *Catalog) name(ctx context.Context, all ...*Snapshot) error {
	bySlice := map[string]map[string]string{}
	for _, s := range all {
		if _, ok := bySlice[s.Slice]; ok {
			continue
		}
		docs, err := c.tagDocuments(ctx, s.Slice)
		if err != nil {
			return err
		}
		bySlice[s.Slice] = docs
	}
	for _, s := range all {
		docs := bySlice[s.Slice]
		s.Tags = nil
		if _, overruled := docs[s.Tag]; s.Tag != "" && !overruled {
			s.Tags = append(s.Tags, s.Tag)
		}
		for tag, id := range docs {
			if id == s.ID {
				s.Tags = append(s.Tags, tag)
			}
		}
		slices.Sort(s.Tags)
	}
	return nil
}

// reserveTag sees to it that a snapshot about to be sealed gets the tag that it is
// sealed with. Until it is, a tag that is reserved names nothing.
func (c *Catalog) reserveTag(ctx context.Context, s *Snapshot) error {
	all, err := c.List(ctx, s.Slice)
	if err != nil {
		return err
	}
	for _, o := range all {
		if slices.Contains(o.Tags, s.Tag) {
			return fmt.Errorf("tag %q: %w: snapshot %s has it; choose another tag", s.Tag, store.ErrExists, o.ID)
		}
	}
	docs, err := c.tagDocuments(ctx, s.Slice)
	if err != nil {
		return err
	}
	_, overruled := docs[s.Tag]
	for _, o := range all {
		overruled = overruled || o.Tag == s.Tag
	}
	if !overruled {
		return nil
	}
	return c.writeTag(ctx, s.Slice, s.Tag, s.ID)
}

// SetTag gives a snapshot a tag, by one atomic write. A tag that another snapshot of
// the slice has is refused with store.ErrExists, unless it is to be moved.
func (c *Catalog) SetTag(ctx context.Context, slice, id, tag string, move bool) error {
	if err := c.setTag(ctx, slice, id, tag, move); err != nil {
		return fmt.Errorf("tag snapshot %s@%s: %w", slice, id, err)
	}
	return nil
}

func (c *Catalog) setTag(ctx context.Context, slice, id, tag string, move bool) error {
	if err := CheckTag(tag); err != nil {
		return err
	}
	c.tagging.Lock()
	defer c.tagging.Unlock()
	all, err := c.List(ctx, slice)
	if err != nil {
		return err
	}
	found := false
	for _, s := range all {
		found = found || s.ID == id
		switch {
		case s.ID == tag:
			return fmt.Errorf("tag %q: %w: it is a snapshot's ID, which goes before a tag; choose another tag", tag, store.ErrExists)
		case !slices.Contains(s.Tags, tag):
		case s.ID == id:
			return nil
		case !move:
			return fmt.Errorf("tag %q: %w: snapshot %s has it", tag, store.ErrExists, s.ID)
		}
	}
	if !found {
		return ErrNotFound
	}
	return c.writeTag(ctx, slice, tag, id)
}

// DeleteTag takes a tag away, by one atomic write; the snapshot stays. Errors:
// ErrNotFound if nothing has it.
func (c *Catalog) DeleteTag(ctx context.Context, slice, tag string) error {
	if err := c.deleteTag(ctx, slice, tag); err != nil {
		return fmt.Errorf("delete tag %q of slice %q: %w", tag, slice, err)
	}
	return nil
}

func (c *Catalog) deleteTag(ctx context.Context, slice, tag string) error {
	if err := errors.Join(CheckName(slice), CheckTag(tag)); err != nil {
		return err
	}
	c.tagging.Lock()
	defer c.tagging.Unlock()
	all, err := c.List(ctx, slice)
	if err != nil {
		return err
	}
	has, sealed := false, false
	for _, s := range all {
		has = has || slices.Contains(s.Tags, tag)
		sealed = sealed || s.Tag == tag
	}
	switch {
	case !has:
		return fmt.Errorf("%w has this tag", ErrNotFound)
	case sealed:
		return c.writeTag(ctx, slice, tag, "")
	}
	return c.st.DeleteDocument(ctx, tagName(slice, tag))
}

// dropTags deletes the documents of tags that name no snapshot any more and that
// none was sealed with. What is left behind by a failure names nothing, and hurts
// nobody.
func (c *Catalog) dropTags(ctx context.Context, slice string) {
	c.tagging.Lock()
	defer c.tagging.Unlock()
	docs, err := c.tagDocuments(ctx, slice)
	if err != nil || len(docs) == 0 {
		return
	}
	all, err := c.List(ctx, slice)
	if err != nil {
		return
	}
	needed := map[string]bool{}
	for _, s := range all {
		needed[s.Tag] = true
		for _, tag := range s.Tags {
			needed[tag] = true
		}
	}
	for tag := range docs {
		if !needed[tag] {
			_ = c.st.DeleteDocument(ctx, tagName(slice, tag))
		}
	}
}
