package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"
	_ "gocloud.dev/blob/s3blob"
)

// The tests of a store in a bucket of S3 hold for each of two servers: one in memory, in every run of the unit
// tests, and a real one, the Versity gateway, with VIOLIN_E2E=1.
func TestS3(t *testing.T) {
	testS3(t, func(t *testing.T) *s3Server {
		backend := s3mem.New()
		if err := backend.CreateBucket("violin"); err != nil {
			t.Fatal(err)
		}
		return newS3(t, gofakes3.New(backend).Server())
	})
}

func TestS3Gateway(t *testing.T) {
	exe := buildGateway(t)
	testS3(t, func(t *testing.T) *s3Server { return newGateway(t, exe).s3Server })
	t.Run("writer killed", func(t *testing.T) { testKilledWriter(t, newGateway(t, exe).url, 3) })
	t.Run("server killed", func(t *testing.T) { testS3Killed(t, newGateway(t, exe)) })
}

func testS3(t *testing.T, start func(*testing.T) *s3Server) {
	t.Run("whole", func(t *testing.T) { testS3Whole(t, start(t)) })
	t.Run("made twice", func(t *testing.T) { testS3MadeTwice(t, start(t)) })
	t.Run("no bucket", func(t *testing.T) { testS3NoBucket(t, start(t)) })
	t.Run("long list", func(t *testing.T) { testS3LongList(t, start(t)) })
	t.Run("ranges", func(t *testing.T) { testS3Ranges(t, start(t)) })
	t.Run("documents", func(t *testing.T) { testS3Documents(t, start(t)) })
}

// s3Server is an S3 server on this machine, with one bucket.
type s3Server struct {
	url string
	// lose says how many answers to PUTs of documents are lost: the object is written, and the client is told of an error.
	lose atomic.Int32
}

// newS3 stands before a server, to lose answers.
func newS3(t *testing.T, server http.Handler) *s3Server {
	t.Helper()
	s := &s3Server{}
	h := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/snapshots/") && s.lose.Add(-1) >= 0 {
			server.ServeHTTP(httptest.NewRecorder(), r)
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		server.ServeHTTP(w, r)
	}))
	t.Cleanup(h.Close)
	t.Setenv("AWS_ACCESS_KEY_ID", "test")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "secret")
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	s.url = "s3://violin?region=us-east-1&use_path_style=true&endpoint=" + url.QueryEscape(h.URL)
	return s
}

// A gateway is a real S3 server, in a process that can be killed.
type gateway struct {
	*s3Server
	exe, dir, address string
	process           *exec.Cmd
}

// buildGateway skips the test unless it is end to end.
func buildGateway(t *testing.T) string {
	t.Helper()
	if os.Getenv("VIOLIN_E2E") != "1" {
		t.Skip("builds and runs a real S3 server: set VIOLIN_E2E=1")
	}
	exe := filepath.Join(t.TempDir(), "s3server")
	build := exec.Command("go", "build", "-o", exe, ".")
	build.Dir = "../../test/s3server"
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the S3 server: %v\n%s", err, out)
	}
	return exe
}

func newGateway(t *testing.T, exe string) *gateway {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := &gateway{exe: exe, dir: t.TempDir(), address: l.Addr().String()}
	if err := l.Close(); err != nil { // the gateway's from here on
		t.Fatal(err)
	}
	// Requests are signed for the host that they were sent to, so its name is kept.
	g.s3Server = newS3(t, &httputil.ReverseProxy{
		Rewrite:      func(r *httputil.ProxyRequest) { r.Out.URL.Scheme, r.Out.URL.Host = "http", g.address },
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
	})
	g.start(t)
	t.Cleanup(func() { g.kill(t) })
	return g
}

func (g *gateway) start(t *testing.T) {
	t.Helper()
	g.process = exec.Command(g.exe, g.dir, g.address)
	g.process.Stdout, g.process.Stderr = t.Output(), t.Output()
	if err := g.process.Start(); err != nil {
		t.Fatal(err)
	}
	for range 1000 {
		c, err := net.Dial("tcp", g.address)
		if err == nil {
			_ = c.Close()
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("the S3 server does not listen")
}

// kill ends it as a power cut would, without a word.
func (g *gateway) kill(t *testing.T) {
	t.Helper()
	_ = g.process.Process.Kill()
	_ = g.process.Wait()
}

// captureS3 stores 600 pages, and a document.
func captureS3(ctx context.Context, s *Store, from int, name string) (BlobRef, error) {
	se, err := s.Begin(ctx)
	if err != nil {
		return BlobRef{}, err
	}
	defer se.Abort(context.WithoutCancel(ctx)) // after a commit it does nothing
	w, err := se.NewPageWriter(ctx, []Region{{"pc.ram", 600 * PageSize}})
	if err != nil {
		return BlobRef{}, err
	}
	for i := range 600 {
		if err := w.Page(0, uint64(i)*PageSize, testPage(from+i)); err != nil {
			return BlobRef{}, err
		}
	}
	ref, err := w.Close()
	if err != nil {
		return BlobRef{}, err
	}
	return ref, se.Commit(ctx, func(ctx context.Context) error { return s.PutDocument(ctx, name, []byte(name)) })
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
func testS3Whole(t *testing.T, server *s3Server) {
	if info, err := Inspect(t.Context(), server.url); err != nil || info.Exists {
		t.Fatalf("before it is made: %+v, %v", info, err)
	}
	opts := Options{Key: NewKey(), PackSize: 1 << 20}
	s := openTest(t, server.url, opts)
	capture := func(from int, name string) BlobRef {
		t.Helper()
		ref, err := captureS3(t.Context(), s, from, name)
		if err != nil {
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
func testS3MadeTwice(t *testing.T, server *s3Server) {
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
func testS3NoBucket(t *testing.T, server *s3Server) {
	if _, err := Inspect(t.Context(), strings.Replace(server.url, "s3://violin", "s3://none", 1)); err == nil {
		t.Error("no error")
	}
}

// A listing comes in pages of 1000 names; all are there, each once, in order.
func testS3LongList(t *testing.T, server *s3Server) {
	s := openTest(t, server.url, Options{})
	const n = 1005
	for i := range n {
		if err := s.bucket.put(t.Context(), fmt.Sprintf("snapshots/a/%04d.json", i), []byte("{}")); err != nil {
			t.Fatal(err)
		}
	}
	i := 0
	for o, err := range s.bucket.list(t.Context(), "snapshots/") {
		if err != nil {
			t.Fatal(err)
		}
		if want := fmt.Sprintf("snapshots/a/%04d.json", i); o.name != want || o.size != 2 {
			t.Fatalf("number %d of the list is %s, of %d bytes; want %s", i, o.name, o.size, want)
		}
		i++
	}
	if i != n {
		t.Errorf("%d names in the list, want %d", i, n)
	}
}

// Pieces of an object, also ones that reach its end or go beyond.
func testS3Ranges(t *testing.T, server *s3Server) {
	s := openTest(t, server.url, Options{})
	data := bytes.Repeat([]byte("0123456789"), 30000)
	if err := s.bucket.put(t.Context(), "packs/object", data); err != nil {
		t.Fatal(err)
	}
	for _, r := range [][2]int{{0, 10}, {5, 1}, {299990, 10}, {299995, 100}, {4096, 270336}, {0, 400000}} {
		want := data[r[0]:min(r[0]+r[1], len(data))]
		got, err := s.bucket.readAt(t.Context(), "packs/object", int64(r[0]), int64(r[1]))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d bytes at %d: %d bytes, %v", r[1], r[0], len(got), err)
		}
		got, err = s.bucket.readInto(t.Context(), "packs/object", int64(r[0]), make([]byte, r[1]))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d bytes at %d into a buffer: %d bytes, %v", r[1], r[0], len(got), err)
		}
	}
	if _, err := s.bucket.readInto(t.Context(), "packs/none", 0, make([]byte, 1)); !errors.Is(err, ErrMissing) {
		t.Errorf("an object that is not there: %v", err)
	}
}

// A document is deleted, and its name is free again; one that is there is not replaced.
func testS3Documents(t *testing.T, server *s3Server) {
	s := openTest(t, server.url, Options{Key: NewKey()})
	const name = "snapshots/a/one.json"
	for _, content := range []string{"first", "second"} {
		if err := s.PutDocument(t.Context(), name, []byte(content)); err != nil {
			t.Fatal(err)
		}
		if err := s.PutDocument(t.Context(), name, []byte("other")); !errors.Is(err, ErrExists) {
			t.Errorf("a name twice: %v", err)
		}
		if got, err := s.GetDocument(t.Context(), name); err != nil || string(got) != content {
			t.Errorf("read %q, %v; want %q", got, err, content)
		}
		if err := s.DeleteDocument(t.Context(), name); err != nil {
			t.Fatal(err)
		}
		if _, err := s.GetDocument(t.Context(), name); !errors.Is(err, ErrMissing) {
			t.Errorf("a deleted document: %v", err)
		}
	}
}

// The server is killed while a snapshot is written, again and again. The snapshot fails or is sealed; what was
// sealed stays whole, and once the server is there again snapshots can be taken.
func testS3Killed(t *testing.T, g *gateway) {
	opts := Options{Key: NewKey(), PackSize: 1 << 20}
	s := openTest(t, g.url, opts)
	sealed := map[string]BlobRef{}
	for round := range 3 {
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			for n := 0; ; n++ {
				name := fmt.Sprintf("snapshots/a/%d-%d.json", round, n)
				ref, err := captureS3(t.Context(), s, round*10000+n*300, name)
				if err != nil {
					t.Logf("round %d: snapshot %d: %v", round, n, err)
					return
				}
				sealed[name] = ref
			}
		}()
		time.Sleep(time.Duration(50+170*round) * time.Millisecond) // anywhere in the rounds
		g.kill(t)
		<-ended
		g.start(t)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		s = openTest(t, g.url, opts)
		name := fmt.Sprintf("snapshots/a/%d-after.json", round)
		ref, err := captureS3(t.Context(), s, round, name)
		if err != nil {
			t.Fatalf("round %d: with the server there again: %v", round, err)
		}
		sealed[name] = ref
		var roots []Root
		for name, ref := range sealed {
			if _, err := s.GetDocument(t.Context(), name); err != nil {
				t.Errorf("round %d: %v", round, err)
			}
			roots = append(roots, Root{Name: name, Ref: ref, Memory: true})
		}
		mustGC(t, s, rootsOf(roots...))
		if r, err := s.Check(t.Context(), rootsOf(roots...), CheckOptions{ReadData: true}); err != nil || len(r.Problems) > 0 {
			t.Errorf("round %d: %+v, %v", round, r, err)
		}
	}
}
