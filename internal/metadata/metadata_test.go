package metadata

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"violin/internal/store"
	"violin/internal/store/storetest"
)

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func open(t *testing.T, cfg Config) *Client {
	t.Helper()
	cfg.Logger = quiet()
	c, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func lead(t *testing.T, c *Client) *Leadership {
	t.Helper()
	l, other, err := c.Lead(t.Context())
	if err != nil || l == nil {
		t.Fatalf("not elected: %+v, %v", other, err)
	}
	t.Cleanup(func() { _ = l.Resign(context.Background()) })
	return l
}

func bind(t *testing.T, l *Leadership) *Leadership {
	t.Helper()
	if err := l.Bind(t.Context(), "store1", 0, func(context.Context) error { return nil }); err != nil {
		t.Fatal(err)
	}
	return l
}

func TestDocuments(t *testing.T) {
	c := open(t, Config{Dir: t.TempDir()})
	n := 0
	storetest.Documents(t, func(t *testing.T) store.Documents {
		n++
		l := lead(t, c)
		if err := l.Bind(t.Context(), string(rune('a'+n)), 0, func(context.Context) error { return nil }); err != nil {
			t.Fatal(err)
		}
		return l
	})
}

// What is written is there after a restart, and a new leader has a higher term; also
// with an etcd that begins anew.
func TestRestart(t *testing.T) {
	dir := t.TempDir()
	var term uint64
	for i := range 3 {
		c, err := Open(t.Context(), Config{Dir: dir, Logger: quiet(), Name: "alpha"})
		if err != nil {
			t.Fatal(err)
		}
		l, me, err := c.Lead(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if me.Name != "alpha" || me.Revision != l.Revision() {
			t.Errorf("%+v", me)
		}
		bind(t, l)
		if l.Term() <= term {
			t.Errorf("term %d after %d", l.Term(), term)
		}
		term = l.Term()
		switch err := l.Create(t.Context(), "a/b", []byte("one")); {
		case i == 0 && err != nil, i > 0 && !errors.Is(err, store.ErrExists):
			t.Errorf("start %d: %v", i, err)
		}
		if i == 1 {
			if err := l.Resign(t.Context()); err != nil {
				t.Error(err)
			}
		} // else it goes as if it was killed: its key stays
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	}
	c := open(t, Config{Dir: t.TempDir()})
	l := bind(t, lead(t, c))
	if l.Term() <= term {
		t.Errorf("term %d of a new etcd after %d", l.Term(), term)
	}
	// One that was put back from a copy has forgotten terms that others know.
	for _, known := range []uint64{l.Term() - 1, l.Term(), l.Term() + 1<<40} {
		l = lead(t, c)
		if err := l.Bind(t.Context(), "store1", known, nil); err != nil || l.Term() <= known {
			t.Errorf("term %d after %d, %v", l.Term(), known, err)
		}
	}
}

func TestOneProcess(t *testing.T) {
	dir := t.TempDir()
	open(t, Config{Dir: dir})
	if c, err := Open(t.Context(), Config{Dir: dir, Logger: quiet()}); err == nil || c != nil {
		t.Error("two etcds in one directory")
	}
}

// A leader that was deposed writes nothing any more, and knows.
func TestFencing(t *testing.T) {
	c := open(t, Config{Dir: t.TempDir()})
	old := bind(t, lead(t, c))
	if err := old.Create(t.Context(), "a/b", []byte("old")); err != nil {
		t.Fatal(err)
	}
	young := bind(t, lead(t, c)) // in an own etcd whoever asks is elected
	if young.Term() <= old.Term() {
		t.Errorf("term %d after %d", young.Term(), old.Term())
	}
	select {
	case <-old.Lost():
		t.Error("it can't know yet")
	default:
	}
	for what, err := range map[string]error{
		"create":  old.Create(t.Context(), "a/c", []byte("old")),
		"replace": old.Replace(t.Context(), "a/b", []byte("older")),
		"large":   old.Replace(t.Context(), "a/b", make([]byte, 3<<20)),
		"delete":  old.Delete(t.Context(), "a/b"),
		"check":   old.Check(t.Context()),
	} {
		if !errors.Is(err, ErrDeposed) || errors.Is(err, store.ErrUncertain) {
			t.Errorf("%s: %v", what, err)
		}
	}
	<-old.Lost()
	if got, err := young.Get(t.Context(), "a/b"); err != nil || string(got) != "old" {
		t.Errorf("%q, %v", got, err)
	}
	if err := young.Check(t.Context()); err != nil {
		t.Error(err)
	}
	if err := young.Replace(t.Context(), "a/b", []byte("young")); err != nil {
		t.Error(err)
	}
	_ = old.Resign(t.Context()) // of what it has not
	if err := young.Check(t.Context()); err != nil {
		t.Errorf("deposed by who led before: %v", err)
	}
}

// A write of which no answer came, and which was done, is not done twice nor refused.
func TestTurns(t *testing.T) {
	c := open(t, Config{Dir: t.TempDir()})
	l := bind(t, lead(t, c))
	if err := l.Create(t.Context(), "a/b", []byte("one")); err != nil {
		t.Fatal(err)
	}
	// One that was given up on is done after all: the next finds another turn.
	stale := l.turn
	if _, err := c.etcd.Txn(t.Context()).If(l.guard(), clientv3.Compare(clientv3.ModRevision(c.key(turnKey)), "=", stale)).
		Then(clientv3.OpPut(l.document("a/b"), "\x00late"), clientv3.OpPut(c.key(turnKey), "late")).Commit(); err != nil {
		t.Fatal(err)
	}
	if err := l.Replace(t.Context(), "a/b", []byte("two")); err != nil {
		t.Fatal(err)
	}
	if got, err := l.Get(t.Context(), "a/b"); err != nil || string(got) != "two" {
		t.Errorf("%q, %v", got, err)
	}
	// The other way round it is refused.
	r, err := c.etcd.Txn(t.Context()).If(l.guard(), clientv3.Compare(clientv3.ModRevision(c.key(turnKey)), "=", stale)).
		Then(clientv3.OpPut(l.document("a/b"), "\x00late")).Commit()
	if err != nil || r.Succeeded {
		t.Errorf("a late write is done: %v", err)
	}
}

func TestFormat(t *testing.T) {
	c := open(t, Config{Dir: t.TempDir()})
	l := lead(t, c)
	taken := 0
	take := func(ctx context.Context) error {
		taken++
		if taken == 1 {
			_ = l.Create(ctx, "a/b", []byte("one"))
			return errors.New("half of it")
		}
		return nil
	}
	if err := l.Bind(t.Context(), "store1", 0, take); err == nil {
		t.Error("half of what is elsewhere will do")
	}
	for range 2 {
		if err := l.Bind(t.Context(), "store1", 0, take); err != nil || taken != 2 {
			t.Errorf("%d times taken, %v", taken, err)
		}
	}
	if err := c.CheckFormat(t.Context(), "store1"); err != nil {
		t.Error(err)
	}
	for text, version := range map[string]bool{`{"format":"violin-metadata","version":2,"origin":1}`: true, "{": false, `{"format":"other","version":1}`: false} {
		if _, err := c.etcd.Put(t.Context(), c.key("store1/format"), text); err != nil {
			t.Fatal(err)
		}
		if err := l.Bind(t.Context(), "store1", 0, take); err == nil || errors.Is(err, ErrVersion) != version {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// Parts of documents that never came to be are removed.
func TestSweep(t *testing.T) {
	c := open(t, Config{Dir: t.TempDir()})
	l := bind(t, lead(t, c))
	data := make([]byte, 3<<20)
	if err := l.Create(t.Context(), "a/b", data); err != nil {
		t.Fatal(err)
	}
	if err := l.Create(t.Context(), "a/b", data); !errors.Is(err, store.ErrExists) {
		t.Fatal(err)
	}
	count := func() (n int) {
		for _, err := range l.keys(t.Context(), l.base+partDir) {
			if err != nil {
				t.Fatal(err)
			}
			n++
		}
		return n
	}
	if count() != 6 {
		t.Errorf("%d parts", count())
	}
	l = bind(t, lead(t, c))
	if got, err := l.Get(t.Context(), "a/b"); count() != 3 || err != nil || len(got) != len(data) {
		t.Errorf("%d parts after the sweep, and %v", count(), err)
	}
	if err := l.Replace(t.Context(), "a/b", nil); err != nil || count() != 0 {
		t.Errorf("%d parts of nothing, %v", count(), err)
	}
}

// An etcd that can't go on does not take its process along, and says why.
func TestEmbeddedStops(t *testing.T) {
	c := open(t, Config{Dir: t.TempDir()})
	l := bind(t, lead(t, c))
	c.own.etcd.Server.Logger() // as it does itself, in a goroutine of its own
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.own.etcd.GetLogger().Fatal("failed to save Raft hard state and entries")
	}()
	<-done
	began := time.Now()
	for what, err := range map[string]error{
		"write": l.Replace(t.Context(), "a/b", nil),
		"read":  func() error { _, err := l.Get(t.Context(), "a/b"); return err }(),
	} {
		if !errors.Is(err, ErrUnavailable) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if time.Since(began) > slowBound {
		t.Error("it is waited for in vain")
	}
	c.own.mu.Lock()
	c.own.failed = nil // for the end of the test: it did not stop really
	c.own.mu.Unlock()
}

func TestCheckConfig(t *testing.T) {
	for _, cfg := range []Config{
		{}, {Dir: "a", Endpoints: []string{"http://a:1"}}, {Endpoints: []string{"a:1"}}, {Endpoints: []string{"http://a"}},
		{Endpoints: []string{"http://a:1"}, Cert: "a"}, {Endpoints: []string{"http://a:1"}, CA: "a"},
		{Dir: "a", Prefix: "a"}, {Dir: "a", Prefix: "/a/"}, {Dir: "a", Lease: time.Millisecond},
	} {
		if cfg.Check() == nil {
			t.Errorf("%+v", cfg)
		}
	}
	ok := Config{Endpoints: []string{"https://a:1", "https://b:1"}, CA: "ca", Cert: "c", Key: "k", Prefix: "/a/b"}
	if err := ok.Check(); err != nil {
		t.Error(err)
	}
}
