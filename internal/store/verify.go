package store

import (
	"context"
	"fmt"
	"iter"
)

// Verify reads everything that the roots need, and verifies it. Its error names
// the root, and the page or chunk and the pack of it that are damaged or missing.
func (s *Store) Verify(ctx context.Context, roots iter.Seq2[Root, error]) error {
	for r, err := range roots {
		if err == nil {
			err = s.verify(ctx, r)
		}
		if err != nil {
			return fmt.Errorf("verify %s: %w", r.Name, err)
		}
	}
	return nil
}

func (s *Store) verify(ctx context.Context, r Root) error {
	if !r.Memory {
		_, err := s.GetBlob(ctx, r.Ref)
		return err
	}
	m, err := s.OpenMemory(ctx, r.Ref)
	if err != nil {
		return err
	}
	defer m.Close()
	// In the order of the read-ahead, so that all cores work.
	var buf [PageSize]byte
	for block, leaves := range m.root.leaves {
		for leaf := range leaves.all() {
			// The read-ahead verifies a leaf as a whole.
			if _, err := m.Page(block, uint64(leaf)*leafBytes, buf[:]); err != nil {
				return err
			}
		}
	}
	return nil
}
