package store_test

import (
	"testing"

	"violin/internal/store"
	"violin/internal/store/storetest"
)

func TestBucketDocuments(t *testing.T) {
	storetest.Documents(t, func(t *testing.T) store.Documents { return store.DirectoryDocuments(t, t.TempDir()) })
}
