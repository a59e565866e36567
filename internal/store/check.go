package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"
)

// CheckOptions chooses how much a check reads.
type CheckOptions struct {
	// ReadData reads every pack whole and verifies every page and chunk.
	// Without it only footers, page tables and references are checked.
	ReadData bool
	// Progress is called after each pack, from several goroutines; nil for none.
	Progress func(done, total int)
}

// A Report is what a check found.
type Report struct {
	Packs    int   // packs looked at
	Pages    int64 // pages in their footers
	Chunks   int64 // chunks in their footers
	Bytes    int64 // of packs looked at
	Problems []Problem
}

// A Problem is one thing that is not as it was written. errors.As finds the
// *Error, which names pack and page.
type Problem struct {
	Err error
	// Roots are the names of the roots that need it, in order. A problem
	// without any harms no snapshot.
	Roots []string
}

func (p Problem) String() string {
	if len(p.Roots) == 0 {
		return p.Err.Error() + " (no snapshot needs it)"
	}
	s := p.Err.Error() + "; needed by"
	for i, r := range p.Roots {
		if i > 0 {
			s += ","
		}
		s += " " + r
	}
	return s
}

// Check verifies the store and everything that the roots need. Damage is in
// the report; an error means that the check itself could not be done.
func (s *Store) Check(ctx context.Context, roots iter.Seq2[Root, error], opts CheckOptions) (*Report, error) {
	c := &checker{s: s, opts: opts, damaged: make(map[Hash]int), report: &Report{}}
	if err := c.packs(ctx); err != nil {
		return nil, fmt.Errorf("check store: %w", err)
	}
	if err := c.roots(ctx, roots); err != nil {
		return nil, fmt.Errorf("check store: %w", err)
	}
	slices.SortFunc(c.report.Problems, func(a, b Problem) int { return cmp.Compare(a.Err.Error(), b.Err.Error()) })
	return c.report, nil
}

type checker struct {
	s    *Store
	opts CheckOptions

	mu      sync.Mutex
	report  *Report
	damaged map[Hash]int // problem of a page or chunk
}

// problem adds one and returns its number.
func (c *checker) problem(err *Error) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if i, ok := c.damaged[err.Hash]; ok && !err.Hash.IsZero() {
		return i
	}
	c.report.Problems = append(c.report.Problems, Problem{Err: err})
	i := len(c.report.Problems) - 1
	if !err.Hash.IsZero() {
		c.damaged[err.Hash] = i
	}
	return i
}

// packs checks every pack in the bucket, and that none is gone.
func (c *checker) packs(ctx context.Context) error {
	expected := make(map[string]*pack)
	c.s.mu.RLock()
	for _, p := range c.s.packs[1:] {
		if p.state == packCommitted {
			expected[p.id.name()] = p
		}
	}
	unread := slices.Clone(c.s.unread)
	c.s.mu.RUnlock()
	for _, err := range unread {
		c.problem(err)
	}
	sizes := make(map[string]int64)
	for o, err := range c.s.bucket.list(ctx, packPrefix) {
		if err != nil {
			return fmt.Errorf("list packs: %w", err)
		}
		sizes[o.name] = o.size
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(c.s.opts.Workers)
	done := 0
	for name, p := range expected {
		g.Go(func() error {
			if err := c.pack(gctx, p, object{name, sizes[name]}); err != nil {
				return err
			}
			if c.opts.Progress != nil {
				c.mu.Lock()
				done++
				n := done
				c.mu.Unlock()
				c.opts.Progress(n, len(expected))
			}
			return nil
		})
	}
	return g.Wait()
}

// pack checks one pack. Only what says nothing about the pack is an error.
func (c *checker) pack(ctx context.Context, p *pack, o object) error {
	found := func(err error) error {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if c.s.deleted(p) {
			return nil // by a collection, since it was listed
		}
		e, ok := err.(*Error)
		if !ok {
			e = &Error{Op: "read pack", Pack: o.name, Offset: -1, Err: err}
		}
		if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrMissing) {
			return err // the bucket does not answer: that is no finding
		}
		c.problem(e)
		return nil
	}
	if o.size == 0 {
		return found(ErrMissing)
	}
	if o.size != p.size {
		return found(fmt.Errorf("%w: %d bytes, want %d", ErrDamaged, o.size, p.size))
	}
	_, entries, err := c.s.readFooter(ctx, o)
	if err != nil {
		return found(err)
	}
	c.mu.Lock()
	c.report.Packs++
	c.report.Bytes += o.size
	if p.kind == kindPages {
		c.report.Pages += int64(len(entries))
	} else {
		c.report.Chunks += int64(len(entries))
	}
	c.mu.Unlock()
	if !c.opts.ReadData {
		return nil
	}
	data, err := c.s.bucket.readAt(ctx, o.name, 0, o.size)
	if err != nil {
		return found(err)
	}
	bad := 0
	var buf []byte
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return err
		}
		stored := data[e.offset : e.offset+e.stored]
		if buf == nil {
			buf = make([]byte, 0, ChunkSize)
		}
		if _, err := openEntry(buf, stored, e.hash, e.offset, e.plain, p.method, p.seal, c.s.codec); err != nil {
			bad++
			if err := found(&Error{Op: "check " + p.kind.String(), Pack: o.name, Hash: e.hash, Offset: int64(e.offset), Err: err}); err != nil {
				return err
			}
		}
	}
	if err := checkDigest(data); err != nil && bad == 0 {
		return found(&Error{Op: "check pack", Pack: o.name, Offset: -1, Err: err})
	}
	return nil
}

// roots checks that everything a root needs is there, and finds out which
// roots need what is damaged.
func (c *checker) roots(ctx context.Context, roots iter.Seq2[Root, error]) error {
	// What is wrong below a leaf that was seen before is wrong for every root
	// that has the leaf.
	below := make(map[Hash][]int)
	for r, err := range roots {
		if err != nil {
			return err
		}
		hit := make(map[int]bool)
		var leaf Hash
		note := func(i int) {
			hit[i] = true
			below[leaf] = append(below[leaf], i)
		}
		err = c.s.walk(ctx, r, visitor{
			chunk: func(h Hash) (bool, error) {
				leaf = h
				if i, ok := c.damaged[h]; ok {
					hit[i] = true
					return false, nil
				}
				if _, ok := c.s.chunkPlace(h); !ok {
					hit[c.problem(c.s.notFound("find chunk", h).(*Error))] = true
					return false, nil
				}
				if seen, ok := below[h]; ok {
					for _, i := range seen {
						hit[i] = true
					}
					return false, nil
				}
				below[h] = nil
				return true, nil
			},
			page: func(h Hash) error {
				if i, ok := c.damaged[h]; ok {
					note(i)
				} else if !c.s.Has(h) {
					note(c.problem(c.s.notFound("find page", h).(*Error)))
				}
				return nil
			},
		})
		if err != nil {
			var e *Error
			if ctx.Err() != nil || !errors.As(err, &e) || !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrMissing) {
				return fmt.Errorf("walk %s: %w", r.Name, err)
			}
			hit[c.problem(e)] = true
		}
		for i := range hit {
			p := &c.report.Problems[i]
			if !slices.Contains(p.Roots, r.Name) {
				p.Roots = append(p.Roots, r.Name)
			}
		}
	}
	for i := range c.report.Problems {
		slices.Sort(c.report.Problems[i].Roots)
	}
	return nil
}
