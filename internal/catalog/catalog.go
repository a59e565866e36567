// Package catalog keeps the snapshots of slices and their history: one sealed
// JSON document a snapshot, in the same bucket as the pages it refers to.
//
// The document is what makes a snapshot visible. It is written last, whole or
// not at all, by the commit of the session that stored the pages:
//
//	err := session.Commit(ctx, func(ctx context.Context) error {
//		return catalog.Put(ctx, snapshot)
//	})
//
// What can change stands beside it in documents of its own: tags that were given
// or taken away since, in tags/.
//
// What it owns: the documents' formats, names and references
// ("slice@id-or-tag"), and which blobs and page tables a snapshot needs, for
// the store's collector and its check. It knows nothing of how a cut is made.
package catalog

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"sync"

	"violin/internal/store"
)

const (
	// FormatVersion is the version of the documents that this package writes,
	// and the newest that it reads. Version 2 has forks, VM generation ids,
	// clocks and checkpoints.
	FormatVersion = 2

	formatName = "violin-snapshot"
	dir        = "snapshots"
)

var (
	// ErrNotFound is in the chain when a reference names no snapshot.
	ErrNotFound = errors.New("no such snapshot")
	// ErrAmbiguous is in the chain when a reference names several.
	ErrAmbiguous = errors.New("ambiguous")
)

// Sealed is the directory of the documents that never change.
const Sealed = dir

// Directories are those of all documents.
func Directories() []string { return []string{Sealed, tagDir, recordDir, runDir, termDir} }

// A Catalog reads and writes the snapshots in a store. It keeps nothing in
// memory and is safe for concurrent use.
type Catalog struct {
	st      *store.Store
	tagging sync.Mutex // held from looking whether a tag is free until it is written
}

// New returns the catalog of a store.
func New(st *store.Store) *Catalog { return &Catalog{st: st} }

// envelope is a document as written. The seal is BLAKE3-256 over the exact
// bytes of the snapshot, so that a document that was altered or torn is told
// from a sealed one, and so that two documents are the same if their seals are.
type envelope struct {
	Format   string          `json:"format"`
	Version  int             `json:"version"`
	Seal     store.Hash      `json:"seal"`
	Snapshot json.RawMessage `json:"snapshot"`
}

func docName(slice, id string) string { return dir + "/" + slice + "/" + id + ".json" }

// Put seals a snapshot: once it returns nil, the snapshot exists. A snapshot is
// never changed; an ID or tag that its slice has already is refused with
// store.ErrExists.
func (c *Catalog) Put(ctx context.Context, s *Snapshot) error {
	if err := c.put(ctx, s); err != nil {
		return fmt.Errorf("seal snapshot %s@%s: %w", s.Slice, s.ID, err)
	}
	return nil
}

func (c *Catalog) put(ctx context.Context, s *Snapshot) error {
	if err := s.check(); err != nil {
		return err
	}
	doc, err := marshal(s)
	if err != nil {
		return err
	}
	return c.putDocument(ctx, s, doc)
}

func (c *Catalog) putDocument(ctx context.Context, s *Snapshot, doc []byte) error {
	if s.Tag != "" {
		if err := c.reserveTag(ctx, s); err != nil {
			return err
		}
	}
	if err := c.st.PutDocument(ctx, docName(s.Slice, s.ID), doc); err != nil {
		return err
	}
	if s.Tag != "" {
		s.Tags = []string{s.Tag}
	}
	return nil
}

// Document returns a snapshot's document as it was sealed, byte for byte.
func (c *Catalog) Document(ctx context.Context, s *Snapshot) ([]byte, error) {
	return c.st.GetDocument(ctx, docName(s.Slice, s.ID))
}

// ParseDocument reads a document and verifies its seal. The snapshot's tags are
// what it was sealed with.
func ParseDocument(doc []byte) (*Snapshot, error) {
	s, err := parse(doc)
	if err != nil {
		return nil, fmt.Errorf("read snapshot's document: %w", err)
	}
	if s.Tag != "" {
		s.Tags = []string{s.Tag}
	}
	return s, nil
}

// PutDocument is Put for a document that another catalog's Document returned.
func (c *Catalog) PutDocument(ctx context.Context, doc []byte) error {
	s, err := ParseDocument(doc)
	if err != nil {
		return err
	}
	if err := c.putDocument(ctx, s, doc); err != nil {
		return fmt.Errorf("seal snapshot %s: %w", s.Ref(), err)
	}
	return nil
}

// marshal writes the envelope by hand: the encoder would lay the snapshot's
// bytes out anew, and they are sealed.
func marshal(s *Snapshot) ([]byte, error) {
	body, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return nil, err
	}
	return fmt.Appendf(nil, "{\"format\": %q, \"version\": %d, \"seal\": %q,\n\"snapshot\": %s}\n",
		formatName, FormatVersion, store.Sum(body), body), nil
}

// parse is the inverse of marshal.
func parse(doc []byte) (*Snapshot, error) {
	damaged := func(err error) (*Snapshot, error) { return nil, fmt.Errorf("%w: %w", store.ErrDamaged, err) }
	var e envelope
	if err := json.Unmarshal(doc, &e); err != nil {
		return damaged(err)
	}
	if e.Format != formatName {
		return damaged(fmt.Errorf("format %q, want %q", e.Format, formatName))
	}
	if e.Version < 1 || e.Version > FormatVersion {
		return nil, fmt.Errorf("snapshot has format version %d, this violin reads version %d and older; use a later violin", e.Version, FormatVersion)
	}
	if got := store.Sum(e.Snapshot); got != e.Seal {
		return damaged(fmt.Errorf("content has seal %s, but %s is written", got, e.Seal))
	}
	dec := json.NewDecoder(bytes.NewReader(e.Snapshot))
	dec.DisallowUnknownFields()
	var s Snapshot
	if err := dec.Decode(&s); err != nil {
		return damaged(err)
	}
	if err := s.check(); err != nil {
		return damaged(err)
	}
	return &s, nil
}

// Get returns a snapshot by slice and full ID.
func (c *Catalog) Get(ctx context.Context, slice, id string) (*Snapshot, error) {
	s, err := c.get(ctx, slice, id)
	if err != nil {
		return nil, err
	}
	if err := c.name(ctx, s); err != nil {
		return nil, fmt.Errorf("read snapshot %s@%s: %w", slice, id, err)
	}
	return s, nil
}

// get is Get without the tags.
func (c *Catalog) get(ctx context.Context, slice, id string) (*Snapshot, error) {
	fail := func(err error) (*Snapshot, error) {
		return nil, fmt.Errorf("read snapshot %s@%s: %w", slice, id, err)
	}
	if err := errors.Join(CheckName(slice), checkID(id)); err != nil {
		return fail(err)
	}
	doc, err := c.st.GetDocument(ctx, docName(slice, id))
	if errors.Is(err, store.ErrMissing) {
		return fail(ErrNotFound)
	}
	if err != nil {
		return fail(err)
	}
	s, err := parse(doc)
	if err != nil {
		return fail(err)
	}
	if s.Slice != slice || s.ID != id {
		return fail(fmt.Errorf("%w: the document is of %s@%s", store.ErrDamaged, s.Slice, s.ID))
	}
	return s, nil
}

// Exists reports whether a snapshot has a document, be it readable or not.
func (c *Catalog) Exists(ctx context.Context, slice, id string) (bool, error) {
	keys, err := c.keys(ctx, slice)
	return slices.Contains(keys, key{slice, id}), err
}

// Has tells whether a slice has snapshots.
func (c *Catalog) Has(ctx context.Context, slice string) (bool, error) {
	keys, err := c.keys(ctx, slice)
	if err != nil {
		return false, fmt.Errorf("look for snapshots of slice %q: %w", slice, err)
	}
	return len(keys) > 0, nil
}

// List returns the snapshots of a slice, or of all slices for "", by slice and
// oldest first. A document that cannot be read is an error that names it.
func (c *Catalog) List(ctx context.Context, slice string) ([]*Snapshot, error) {
	keys, err := c.keys(ctx, slice)
	if err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	var out []*Snapshot
	for _, k := range keys {
		s, err := c.get(ctx, k.slice, k.id)
		if errors.Is(err, ErrNotFound) {
			continue // deleted since it was listed
		}
		if err != nil {
			return nil, fmt.Errorf("list snapshots: %w", err)
		}
		out = append(out, s)
	}
	if err := c.name(ctx, out...); err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	return out, nil
}

// Slices returns the names of the slices that have snapshots.
func (c *Catalog) Slices(ctx context.Context) ([]string, error) {
	keys, err := c.keys(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("list slices: %w", err)
	}
	var out []string
	for _, k := range keys {
		if len(out) == 0 || out[len(out)-1] != k.slice {
			out = append(out, k.slice)
		}
	}
	return out, nil
}

type key struct{ slice, id string }

// keys lists the snapshots of a slice, or of all for "", without reading them,
// by slice and oldest first.
func (c *Catalog) keys(ctx context.Context, slice string) ([]key, error) {
	at := dir
	if slice != "" {
		if err := CheckName(slice); err != nil {
			return nil, err
		}
		at += "/" + slice
	}
	var out []key
	for name, err := range c.st.Documents(ctx, at) {
		if err != nil {
			return nil, err
		}
		slice, file, _ := strings.Cut(strings.TrimPrefix(name, dir+"/"), "/")
		id, ok := strings.CutSuffix(file, ".json")
		if ok && CheckName(slice) == nil && checkID(id) == nil {
			out = append(out, key{slice, id})
		}
	}
	slices.SortFunc(out, func(a, b key) int {
		return cmp.Or(cmp.Compare(a.slice, b.slice), cmp.Compare(a.id, b.id))
	})
	return out, nil
}

// Delete forgets a snapshot. Its pages stay until the store's next
// collection; its children keep the ID of their parent.
func (c *Catalog) Delete(ctx context.Context, slice, id string) error {
	if err := errors.Join(CheckName(slice), checkID(id)); err != nil {
		return fmt.Errorf("forget snapshot %s@%s: %w", slice, id, err)
	}
	if err := c.st.DeleteDocument(ctx, docName(slice, id)); err != nil {
		return fmt.Errorf("forget snapshot %s@%s: %w", slice, id, err)
	}
	c.dropTags(ctx, slice)
	return nil
}

// Resolve finds the snapshot that a reference names:
//
//	slice@ID         the ID, or as much of its beginning as makes it unique
//	slice@TAG        a tag
//	slice@latest     the youngest
//	slice            the same
//	ID               of any slice, if no slice is called so
//
// An ID goes before a tag, a tag before the beginning of an ID. Errors:
// ErrNotFound, ErrAmbiguous.
func (c *Catalog) Resolve(ctx context.Context, ref string) (*Snapshot, error) {
	s, err := c.resolve(ctx, ref)
	if err != nil {
		return nil, fmt.Errorf("find snapshot %q: %w", ref, err)
	}
	return s, nil
}

const latest = "latest"

func (c *Catalog) resolve(ctx context.Context, ref string) (*Snapshot, error) {
	slice, want, at := strings.Cut(ref, "@")
	if want == "" {
		if at {
			return nil, fmt.Errorf("nothing after the @; write %s@%s, a tag or an ID", slice, latest)
		}
		want = latest
	}
	if err := CheckName(slice); err != nil {
		return nil, err
	}
	keys, err := c.keys(ctx, slice)
	if err != nil {
		return nil, err
	}
	if len(keys) == 0 && !at {
		// Not a slice; perhaps an ID on its own.
		if keys, err = c.keys(ctx, ""); err != nil {
			return nil, err
		}
		if k, err := pick(keys, slice); err == nil {
			return c.Get(ctx, k.slice, k.id)
		} else if errors.Is(err, ErrAmbiguous) {
			return nil, err
		}
		return nil, fmt.Errorf("%w: no slice %q has snapshots and no ID begins so; `violin snapshots` lists what there is", ErrNotFound, slice)
	}
	if len(keys) == 0 {
		return nil, fmt.Errorf("%w: slice %q has none; `violin snapshots` lists what there is", ErrNotFound, slice)
	}
	if want == latest {
		return c.Get(ctx, slice, keys[len(keys)-1].id)
	}
	k, err := pick(keys, want)
	if err == nil && k.id == want {
		return c.Get(ctx, slice, k.id)
	}
	all, lerr := c.List(ctx, slice)
	if lerr != nil {
		return nil, lerr
	}
	for _, s := range all {
		if slices.Contains(s.Tags, want) {
			return s, nil
		}
	}
	if err != nil {
		return nil, err
	}
	return c.Get(ctx, slice, k.id)
}

// pick finds the only key whose ID begins so.
func pick(keys []key, prefix string) (key, error) {
	var found []key
	for _, k := range keys {
		if k.id == prefix {
			return k, nil
		}
		if strings.HasPrefix(k.id, prefix) {
			found = append(found, k)
		}
	}
	switch len(found) {
	case 0:
		return key{}, fmt.Errorf("%w: no tag and no ID is or begins with %q; `violin snapshots` lists what there is", ErrNotFound, prefix)
	case 1:
		return found[0], nil
	}
	const show = 4
	var names []string
	for _, k := range found[:min(len(found), show)] {
		names = append(names, k.slice+"@"+k.id)
	}
	more := ""
	if len(found) > show {
		more = fmt.Sprintf(" and %d more", len(found)-show)
	}
	return key{}, fmt.Errorf("%w: it may be %s%s; write more of the ID", ErrAmbiguous, strings.Join(names, ", "), more)
}

// Audit yields what the snapshots need that can be read, and tells of documents
// that cannot: a check goes on where a collection has to stop.
func (c *Catalog) Audit(ctx context.Context, damaged func(ref string, err error)) iter.Seq2[store.Root, error] {
	return func(yield func(store.Root, error) bool) {
		keys, err := c.keys(ctx, "")
		if err != nil {
			yield(store.Root{}, err)
			return
		}
		if err := c.auditTags(ctx, damaged); err != nil {
			yield(store.Root{}, err)
			return
		}
		for _, k := range keys {
			s, err := c.get(ctx, k.slice, k.id)
			switch {
			case errors.Is(err, ErrNotFound):
				continue // deleted since it was listed
			case errors.Is(err, store.ErrDamaged):
				damaged(k.slice+"@"+k.id, err)
				continue
			case err != nil:
				yield(store.Root{}, err)
				return
			}
			for r := range s.Roots() {
				if !yield(r, nil) {
					return
				}
			}
		}
	}
}

// Roots yields what the snapshots in the catalog need, for the store's GC and
// Check. It is an error if a document cannot be read: without it nobody knows
// what to keep.
func (c *Catalog) Roots(ctx context.Context) iter.Seq2[store.Root, error] {
	return func(yield func(store.Root, error) bool) {
		all, err := c.List(ctx, "")
		if err != nil {
			yield(store.Root{}, err)
			return
		}
		for _, s := range all {
			for r := range s.Roots() {
				if !yield(r, nil) {
					return
				}
			}
		}
	}
}
