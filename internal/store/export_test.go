package store

import (
	"testing"
)

// DirectoryDocuments are those of a bucket that is a directory.
func DirectoryDocuments(t *testing.T, dir string) Documents {
	b, err := openBucket(t.Context(), dir, true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.close() })
	return bucketDocuments{b}
}
