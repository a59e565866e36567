package store

import (
	"context"
	"iter"
)

// Content gives everything that the roots need to visit, verified: each page and
// each chunk once, a page table before what it refers to. The data is visit's
// until it returns.
func (s *Store) Content(ctx context.Context, roots iter.Seq2[Root, error], visit func(page bool, h Hash, data []byte) error) error {
	pages := make(map[Hash]struct{})
	buf := make([]byte, 0, PageSize)
	return s.walkAll(ctx, roots, func(h Hash) error {
		data, err := s.getChunk(ctx, h)
		if err != nil {
			return err
		}
		return visit(false, h, data)
	}, func(h Hash) error {
		if _, seen := pages[h]; seen {
			return nil
		}
		pages[h] = struct{}{}
		data, err := s.getPage(ctx, h, buf[:0])
		if err != nil {
			return err
		}
		return visit(true, h, data)
	})
}

// Complete reports whether the store has everything that the roots need: an
// error names the first thing that it does not. Pages are not read.
func (s *Store) Complete(ctx context.Context, roots iter.Seq2[Root, error]) error {
	return s.walkAll(ctx, roots, func(h Hash) error {
		if _, ok := s.chunkPlace(h); !ok {
			return s.notFound("find chunk", h)
		}
		return nil
	}, func(h Hash) error {
		if !s.Has(h) {
			return s.notFound("find page", h)
		}
		return nil
	})
}

// walkAll walks all roots and visits each chunk once; a page, once for each chunk
// that names it.
func (s *Store) walkAll(ctx context.Context, roots iter.Seq2[Root, error], chunk, page func(Hash) error) error {
	seen := make(map[Hash]struct{})
	for r, err := range roots {
		if err != nil {
			return err
		}
		err := s.walk(ctx, r, visitor{
			chunk: func(h Hash) (bool, error) {
				if _, ok := seen[h]; ok {
					return false, nil // its pages were visited, too
				}
				seen[h] = struct{}{}
				return true, chunk(h)
			},
			page: page,
		})
		if err != nil {
			return err
		}
	}
	return nil
}
