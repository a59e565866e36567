package store

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// The child that is killed: it stores and seals snapshots, and collects
// garbage, until the end.
const crashEnv = "VIOLIN_STORE_CRASH_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(crashEnv); dir != "" {
		if err := crashChild(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// crashChild says "sealed N" after each snapshot.
func crashChild(dir string) error {
	ctx := context.Background()
	s, err := Open(ctx, dir, Options{PackSize: 1 << 20, Logger: quiet})
	if err != nil {
		return err
	}
	for n := 0; ; n++ {
		se, err := s.Begin(ctx)
		if err != nil {
			return err
		}
		w, err := se.NewPageWriter(ctx, []Region{{"ram", 256 * PageSize}})
		if err != nil {
			return err
		}
		for i := range 256 {
			if err := w.Page(0, uint64(i)*PageSize, testPage(n*100+i)); err != nil {
				return err
			}
		}
		ref, err := w.Close()
		if err != nil {
			return err
		}
		name := fmt.Sprintf("snapshots/%06d-%d", n, os.Getpid())
		doc, err := json.Marshal(crashDoc{n, ref})
		if err != nil {
			return err
		}
		if err := se.Commit(ctx, func(ctx context.Context) error { return s.PutDocument(ctx, name, doc) }); err != nil {
			return err
		}
		if _, err := fmt.Println("sealed", name); err != nil {
			return err
		}
		if n%3 == 2 {
			old := fmt.Sprintf("snapshots/%06d-%d", n-2, os.Getpid())
			if _, err := fmt.Println("forget", old); err != nil {
				return err
			}
			if err := s.DeleteDocument(ctx, old); err != nil {
				return err
			}
			if _, err := s.GC(ctx, crashRoots(ctx, s)); err != nil {
				return err
			}
		}
	}
}

type crashDoc struct {
	N   int
	Ref BlobRef
}

func crashDocs(ctx context.Context, s *Store) (map[string]crashDoc, error) {
	docs := make(map[string]crashDoc)
	for name, err := range s.Documents(ctx, "snapshots") {
		if err != nil {
			return nil, err
		}
		raw, err := s.GetDocument(ctx, name)
		if err != nil {
			return nil, err
		}
		var d crashDoc
		if err := json.Unmarshal(raw, &d); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		docs[name] = d
	}
	return docs, nil
}

func crashRoots(ctx context.Context, s *Store) func(func(Root, error) bool) {
	return func(yield func(Root, error) bool) {
		docs, err := crashDocs(ctx, s)
		if err != nil {
			yield(Root{}, err)
			return
		}
		for name, d := range docs {
			if !yield(Root{Name: name, Ref: d.Ref, Memory: true}, nil) {
				return
			}
		}
	}
}

// A writer is killed (SIGKILL) at an arbitrary point again and again. All that
// it sealed and did not forget can be restored each time, nothing else is
// visible, and a collection removes what it left behind.
func TestKilledWriterLosesNothingSealed(t *testing.T) {
	testKilledWriter(t, filepath.Join(t.TempDir(), "store"), 4)
}

// testKilledWriter takes a directory, or a bucket's URL.
func testKilledWriter(t *testing.T, at string, rounds int) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	kept := make(map[string]bool)
	for round := range rounds {
		child := exec.Command(exe)
		child.Env = append(os.Environ(), crashEnv+"="+at)
		child.Stderr = os.Stderr
		out, err := child.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		mayBeGone := ""
		for n := 0; lines.Scan(); n++ {
			verb, name, _ := strings.Cut(lines.Text(), " ")
			if verb == "sealed" {
				kept[name] = true
			} else {
				mayBeGone = name
				delete(kept, name)
			}
			if n == 2+round { // the child is anywhere in its next rounds by now
				if err := child.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
		}
		var exit *exec.ExitError
		if err := child.Wait(); !errors.As(err, &exit) || exit.Exited() {
			t.Fatalf("the child was to be killed but ended with %v", err)
		}

		s := openTest(t, at, Options{})
		docs, err := crashDocs(t.Context(), s)
		if err != nil {
			t.Fatal(err)
		}
		for name := range kept {
			if _, ok := docs[name]; !ok && name != mayBeGone {
				t.Errorf("round %d: sealed snapshot %s is gone", round, name)
			}
		}
		for name, d := range docs {
			restore(t, s, Root{Name: name, Ref: d.Ref}, span(d.N*100, d.N*100+256)...)
			kept[name] = true // sealed in the instant of the kill, perhaps
		}
		roots := crashRoots(t.Context(), s)
		mustGC(t, s, roots)
		if r := mustCheck(t, s, roots); len(r.Problems) != 0 {
			t.Errorf("round %d: %v", round, r.Problems)
		}
		if s.bucket.dir == "" {
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			continue
		}
		err = filepath.WalkDir(at, func(name string, d os.DirEntry, err error) error {
			if strings.HasPrefix(filepath.Base(name), tempPrefix) {
				t.Errorf("round %d: half-written file %s is left", round, name)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
