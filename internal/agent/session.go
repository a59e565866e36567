package agent

import (
	"context"

	stream "violin/internal/migration/qemu"
	"violin/internal/store"
)

// Session is where a cut's states go: into a store here, or far away.
type Session interface {
	// NewPageWriter starts the capture of a node's memory; ctx bounds all of it.
	NewPageWriter(ctx context.Context, regions []store.Region) (PageWriter, error)
	// NewDiskWriter starts the capture of a disk that is as base, but for the pages given.
	NewDiskWriter(ctx context.Context, size uint64, base store.BlobRef) (DiskWriter, error)
	PutBlob(ctx context.Context, b []byte) (store.BlobRef, error)
}

// PageWriter takes one node's memory, page by page; what is given later replaces
// what was given before.
type PageWriter interface {
	stream.PageSink
	// Close returns once every page is in the session, with the page table's name.
	Close() (store.BlobRef, error)
	Stats() store.MemoryStats // complete once Close has returned
}

// DiskWriter takes what was written to one disk.
type DiskWriter interface {
	Page(offset uint64, data []byte) error
	Close() (store.BlobRef, error)
	Stats() store.MemoryStats // complete once Close has returned
}

// StoreSession is a session of a store that this process has opened.
type StoreSession struct{ *store.Session }

// InStore returns a store's session as a cut takes it.
func InStore(s *store.Session) StoreSession { return StoreSession{s} }

// NewPageWriter implements [Session].
func (s StoreSession) NewPageWriter(ctx context.Context, regions []store.Region) (PageWriter, error) {
	w, err := s.Session.NewPageWriter(ctx, regions)
	if err != nil {
		return nil, err // a nil *store.PageWriter would be no nil PageWriter
	}
	return w, nil
}

// NewDiskWriter implements [Session].
func (s StoreSession) NewDiskWriter(ctx context.Context, size uint64, base store.BlobRef) (DiskWriter, error) {
	w, err := s.Session.NewDiskWriter(ctx, size, base)
	if err != nil {
		return nil, err
	}
	return w, nil
}
