package metadata

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"violin/internal/metadata/etcdtest"
	"violin/internal/store"
	"violin/internal/store/storetest"
)

func TestMain(m *testing.M) {
	etcdtest.Main()
	os.Exit(m.Run())
}

func candidate(t *testing.T, cluster *etcdtest.Cluster, name string) *Client {
	return open(t, Config{Endpoints: cluster.Endpoints(), Name: name, Address: name + ":7000"})
}

// elected is a candidate's leadership; the cluster may just have lost a member.
func elected(t *testing.T, c *Client) *Leadership {
	t.Helper()
	var l *Leadership
	etcdtest.Await(t, "somebody is elected", func() bool {
		var err error
		l, _, err = c.Lead(t.Context())
		return err == nil && l != nil
	})
	t.Cleanup(func() { _ = l.Resign(context.Background()) })
	etcdtest.Await(t, "the store is known", func() bool {
		return l.Bind(t.Context(), "store1", 0, func(context.Context) error { return nil }) == nil
	})
	return l
}

func TestClusterDocuments(t *testing.T) {
	cluster := etcdtest.Start(t, 1, nil)
	n := 0
	storetest.Documents(t, func(t *testing.T) store.Documents {
		n++
		return elected(t, open(t, Config{Endpoints: cluster.Endpoints(), Prefix: fmt.Sprintf("/test%d", n)}))
	})
	// Servers of one prefix share one store.
	c := candidate(t, cluster, "alpha")
	l := elected(t, c)
	if err := l.Resign(t.Context()); err != nil {
		t.Fatal(err)
	}
	l, _, err := c.Lead(t.Context())
	if err != nil || l == nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Resign(context.Background()) }()
	if err := l.Bind(t.Context(), "store2", 0, func(context.Context) error { return nil }); err == nil {
		t.Error("two stores' metadata below one prefix")
	}
}

// Of candidates one leads. When it resigns another does, at once, under a higher term;
// when it is gone, once its lease has ended.
func TestElection(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 1, nil)
	alpha, beta := candidate(t, cluster, "alpha"), candidate(t, cluster, "beta")
	first := elected(t, alpha)
	l, leader, err := beta.Lead(t.Context())
	if err != nil || l != nil || leader.Name != "alpha" || leader.Address != "alpha:7000" || leader.Revision != first.Revision() {
		t.Fatalf("%v, %+v, %v", l, leader, err)
	}
	vacant := make(chan error, 1)
	wait := func() {
		next, err := beta.Await(t.Context(), leader)
		if err == nil && next.Revision != 0 {
			err = fmt.Errorf("%+v leads", next)
		}
		vacant <- err
	}
	go wait()
	if err := first.Create(t.Context(), "a/b", nil); err != nil {
		t.Fatal(err)
	}
	time.Sleep(DefaultLease + time.Second) // it is renewed
	select {
	case err := <-vacant:
		t.Fatalf("nobody leads any more: %v", err)
	default:
	}
	if err := first.Resign(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-vacant; err != nil {
		t.Fatal(err)
	}
	second := elected(t, beta)
	if second.Term() <= first.Term() {
		t.Errorf("term %d after %d", second.Term(), first.Term())
	}
	if leader, err = alpha.Leader(t.Context()); err != nil || leader.Name != "beta" {
		t.Errorf("%+v, %v", leader, err)
	}
	// It goes without a word.
	second.keepNot(t)
	go wait()
	if err := <-vacant; err != nil {
		t.Fatal(err)
	}
	third := elected(t, alpha)
	if err := second.Create(t.Context(), "a/c", nil); !errors.Is(err, ErrDeposed) {
		t.Errorf("who was deposed writes: %v", err)
	}
	if err := third.Check(t.Context()); err != nil || third.Term() <= second.Term() {
		t.Errorf("term %d after %d, %v", third.Term(), second.Term(), err)
	}
}

// keepNot is as if the process had been stopped: nothing renews its lease, and it does
// not know.
func (l *Leadership) keepNot(t *testing.T) {
	lease := l.lease
	life, lose := l.life, l.lose
	lose() // which ends the renewing
	l.keeping.Wait()
	_ = life
	l.life, l.lose = context.WithCancel(context.Background())
	t.Cleanup(l.lose)
	l.lease = lease
}

// With three members one may be killed, at any instant: whatever was written stays, and
// what was not certain can be tried again. Without a quorum the leader gives up, before
// another can be elected, and there is one again when the quorum is back.
func TestMembersFail(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, 3, nil)
	c := open(t, Config{Endpoints: cluster.Endpoints(), Name: "alpha"})
	l := elected(t, c)
	written := 0
	write := func() error {
		err := l.Create(t.Context(), fmt.Sprintf("a/%d", written), fmt.Appendln(nil, written))
		if err == nil {
			written++
		}
		return err
	}
	for i := range 3 {
		stop := make(chan struct{})
		go func() {
			defer close(stop)
			time.Sleep(50 * time.Millisecond)
			cluster.Kill(i)
		}()
		for range 60 {
			// The error says whether it is there.
			if err := write(); err != nil && !errors.Is(err, store.ErrUncertain) {
				t.Fatalf("member %d killed: %v", i, err)
			}
		}
		<-stop
		cluster.Run(t, i)
		// Until it has caught up, no other is to be killed.
		etcdtest.Await(t, "the member is back", func() bool {
			one, err := clientv3.New(clientv3.Config{Endpoints: cluster.Endpoints()[i : i+1], Logger: zap.NewNop()})
			if err != nil {
				return false
			}
			defer one.Close()
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			_, err = one.Get(ctx, "x")
			return err == nil
		})
	}
	if l.life.Err() != nil {
		t.Fatal("the leadership was lost with a quorum")
	}
	if written < 150 {
		t.Errorf("%d of 180 written", written)
	}
	for i := range written {
		if got, err := l.Get(t.Context(), fmt.Sprintf("a/%d", i)); err != nil || string(got) != fmt.Sprintln(i) {
			t.Errorf("%d: %q, %v", i, got, err)
		}
	}

	cluster.Kill(0)
	cluster.Pause(1)
	<-l.Lost()
	if err := write(); !errors.Is(err, ErrDeposed) {
		t.Errorf("without a quorum: %v", err)
	}
	if _, _, err := c.Lead(t.Context()); !errors.Is(err, ErrUnavailable) {
		t.Errorf("elected without a quorum: %v", err)
	}
	cluster.Resume(1)
	term := l.Term()
	if l = elected(t, c); l.Term() <= term {
		t.Errorf("term %d after %d", l.Term(), term)
	}
	if err := write(); err != nil {
		t.Error(err)
	}
}
