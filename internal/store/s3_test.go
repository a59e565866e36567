package store

import (
	"context"
	"errors"
	"iter"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"
	_ "gocloud.dev/blob/s3blob"
)

// s3Server is an S3 server on this machine, with one bucket.
type s3Server struct {
	url string
	// lose says how many answers to PUTs of documents are lost: the object is written, and the client is told of an error.
	lose atomic.Int32
}

func newS3(t *testing.T) *s3Server {
	t.Helper()
	backend := s3mem.New()
	if err := backend.CreateBucket("violin"); err != nil {
		t.Fatal(err)
	}
	s := &s3Server{}
	handler := gofakes3.New(backend).Server()
	h := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/snapshots/") && s.lose.Add(-1) >= 0 {
			handler.ServeHTTP(httptest.NewRecorder(), r)
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		handler.ServeHTTP(w, r)
	}))
	t.Cleanup(h.Close)
	t.Setenv("AWS_ACCESS_KEY_ID", "test")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "test")
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	s.url = "s3://violin?region=us-east-1&use_path_style=true&endpoint=" + url.QueryEscape(h.URL)
	return s
}

func rootsOf(refs ...Root) iter.Seq2[Root, error] {
	return func(yield func(Root, error) bool) {
		for _, r := range refs {
			if !yield(r, nil) {
				return
			}
		}
	}
}

// A store in a bucket, through all that a server does with it.
func TestS3(t *testing.T) {
	server := newS3(t)
	if info, err := Inspect(t.Context(), server.url); err != nil || info.Exists {
		t.Fatalf("before it is made: %+v, %v", info, err)
	}
	opts := Options{Key: NewKey(), PackSize: 1 << 20}
	s := openTest(t, server.url, opts)
	capture := func(from int, name string) BlobRef {
		se := begin(t, s)
		w, err := se.NewPageWriter(t.Context(), []Region{{"pc.ram", 600 * PageSize}})
		if err != nil {
			t.Fatal(err)
		}
		for i := range 600 {
			if err := w.Page(0, uint64(i)*PageSize, testPage(from+i)); err != nil {
				t.Fatal(err)
			}
		}
		ref, err := w.Close()
		if err != nil {
			t.Fatal(err)
		}
		if err := se.Commit(t.Context(), func(ctx context.Context) error { return s.PutDocument(ctx, name, []byte(name)) }); err != nil {
			t.Fatal(err)
		}
		return ref
	}
	capture(0, "snapshots/a/one.json")
	kept := capture(300, "snapshots/a/two.json")

	// A document's answer is lost, and the client library tries again.
	server.lose.Store(1)
	third := capture(5000, "snapshots/a/three.json")
	if server.lose.Load() >= 0 {
		t.Fatal("no answer was lost")
	}
	if err := s.PutDocument(t.Context(), "snapshots/a/two.json", []byte("another")); !errors.Is(err, ErrExists) {
		t.Errorf("a name twice: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	if info, err := Inspect(t.Context(), server.url); err != nil || info.Key != "file" {
		t.Errorf("%+v, %v", info, err)
	}
	if _, err := Open(t.Context(), server.url, Options{Logger: quiet}); !errors.Is(err, ErrKey) {
		t.Errorf("without a key: %v", err)
	}
	s = openTest(t, server.url, opts)
	roots := []Root{{Name: "two", Ref: kept, Memory: true}, {Name: "three", Ref: third, Memory: true}}
	st, err := s.GC(t.Context(), rootsOf(roots...))
	if err != nil || st.BytesFreed <= 0 {
		t.Errorf("collected %+v, %v", st, err)
	}
	s = openTest(t, server.url, opts)
	if r, err := s.Check(t.Context(), rootsOf(roots...), CheckOptions{ReadData: true}); err != nil || len(r.Problems) > 0 {
		t.Errorf("%+v, %v", r, err)
	}
	if err := s.Verify(t.Context(), rootsOf(roots...)); err != nil {
		t.Error(err)
	}
	var names []string
	for name, err := range s.Documents(t.Context(), "snapshots") {
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, name)
	}
	if len(names) != 3 {
		t.Errorf("documents %v", names)
	}
}

// Two servers make a store at once: one wins, and the other does not write under its key.
func TestS3MadeTwice(t *testing.T) {
	server := newS3(t)
	openTest(t, server.url, Options{Key: NewKey()})
	b, err := openBucket(t.Context(), server.url, false)
	if err != nil {
		t.Fatal(err)
	}
	defer b.close()
	s := &Store{bucket: b, opts: Options{Key: NewKey()}}
	if err := s.bucket.putNew(t.Context(), describeName, []byte("{}")); !errors.Is(err, ErrExists) {
		t.Errorf("made over the other: %v", err)
	}
}

// A bucket that is not there is an error, not an empty store.
func TestS3NoBucket(t *testing.T) {
	server := newS3(t)
	if _, err := Inspect(t.Context(), strings.Replace(server.url, "s3://violin", "s3://none", 1)); err == nil {
		t.Error("no error")
	}
}
