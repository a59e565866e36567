package metadata

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"violin/internal/store"
)

const (
	leaderKey = "leader"
	turnKey   = "turn"
)

// Leader is who leads.
type Leader struct {
	Name    string    `json:"name"`
	Address string    `json:"address,omitempty"` // HOST:PORT for agents and users
	Since   time.Time `json:"since"`
	// Revision is that which made it leader; 0 for nobody.
	Revision int64 `json:"-"`
}

func (c *Client) parseLeader(kv *mvccpb.KeyValue) (Leader, error) {
	var l Leader
	if err := json.Unmarshal(kv.Value, &l); err != nil {
		return l, fmt.Errorf("etcd at %s: %s is no leader of violin servers: %w; choose another prefix", c.where(), kv.Key, err)
	}
	l.Revision = kv.CreateRevision
	return l, nil
}

// Leader tells who leads; the revision is 0 if nobody does.
func (c *Client) Leader(ctx context.Context) (Leader, error) {
	r, err := c.get(ctx, c.key(leaderKey))
	if err != nil || len(r.Kvs) == 0 {
		return Leader{}, err
	}
	return c.parseLeader(r.Kvs[0])
}

// Await waits until another leads than the one given, or nobody, and tells which.
func (c *Client) Await(ctx context.Context, than Leader) (Leader, error) {
	for {
		r, err := c.get(ctx, c.key(leaderKey))
		if err != nil {
			return Leader{}, err
		}
		if len(r.Kvs) == 0 {
			return Leader{}, nil
		}
		if r.Kvs[0].CreateRevision != than.Revision {
			return c.parseLeader(r.Kvs[0])
		}
		if err := c.change(ctx, r.Header.Revision+1); err != nil {
			return Leader{}, err
		}
	}
}

// change waits until the leader's key is written or goes, from a revision on.
func (c *Client) change(ctx context.Context, from int64) error {
	// Of a member that has lost its cluster nothing would ever come.
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	for w := range c.etcd.Watch(ctx, c.key(leaderKey), clientv3.WithRev(from)) {
		if err := w.Err(); errors.Is(err, rpctypes.ErrCompacted) {
			return nil
		} else if err != nil {
			return c.explain(err)
		}
		if len(w.Events) > 0 {
			return nil
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return fmt.Errorf("%w: %s: the watch of the leader ended", ErrUnavailable, c.where())
}

// Leadership is that of this process, from when it was elected until it is lost or
// resigned. Its methods are safe for concurrent use.
type Leadership struct {
	client   *Client
	revision int64 // of the leader's key
	lease    clientv3.LeaseID
	origin   int64  // see [Leadership.Bind]
	base     string // what documents' keys begin with; empty before Bind
	keeping  sync.WaitGroup

	lose func()
	life context.Context // ends when it is lost

	writing sync.Mutex // held from a write's beginning until it is done, or was given up
	turn    int64      // revision of the last write
}

// Lead makes this process the leader, if there is none. Otherwise it tells who is, and
// the leadership is nil. In an etcd of this process nobody else can be.
func (c *Client) Lead(ctx context.Context) (*Leadership, Leader, error) {
	me := Leader{Name: c.cfg.Name, Address: c.cfg.Address, Since: time.Now().UTC().Truncate(time.Millisecond)}
	value, err := json.Marshal(me)
	if err != nil {
		return nil, Leader{}, err
	}
	bound, cancel := context.WithTimeout(ctx, c.bound())
	defer cancel()
	l := &Leadership{client: c}
	began := time.Now()
	var lease []clientv3.OpOption
	if c.own == nil {
		granted, err := c.etcd.Grant(bound, int64(c.cfg.Lease/time.Second))
		if err != nil {
			return nil, Leader{}, c.explain(err)
		}
		l.lease = granted.ID
		lease = append(lease, clientv3.WithLease(l.lease))
	} else if _, err := c.etcd.Delete(bound, c.key(leaderKey)); err != nil {
		// Whoever made it is dead: the directory's lock is ours.
		return nil, Leader{}, c.explain(err)
	}
	turn := rand.Text()
	r, err := c.etcd.Txn(bound).
		If(clientv3.Compare(clientv3.CreateRevision(c.key(leaderKey)), "=", 0)).
		Then(clientv3.OpPut(c.key(leaderKey), string(value), lease...), clientv3.OpPut(c.key(turnKey), turn)).
		Else(clientv3.OpGet(c.key(leaderKey))).Commit()
	if err != nil {
		c.revoke(ctx, l.lease) // it may have been made all the same
		return nil, Leader{}, c.explain(err)
	}
	if !r.Succeeded {
		c.revoke(ctx, l.lease)
		kvs := r.Responses[0].GetResponseRange().Kvs
		if len(kvs) == 0 {
			return nil, Leader{}, fmt.Errorf("etcd at %s: a leader that is none", c.where())
		}
		other, err := c.parseLeader(kvs[0])
		return nil, other, err
	}
	l.revision, l.turn, me.Revision = r.Header.Revision, r.Header.Revision, r.Header.Revision
	l.life, l.lose = context.WithCancel(context.Background())
	if l.lease != 0 {
		l.keeping.Go(func() { l.keep(began) })
	}
	return l, me, nil
}

func (c *Client) revoke(ctx context.Context, lease clientv3.LeaseID) {
	if lease == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), attemptBound)
	defer cancel()
	if _, err := c.etcd.Revoke(ctx, lease); err != nil {
		c.log.Warn("a lease was not given back; it ends by itself", "lease", c.cfg.Lease, "err", c.explain(err))
	}
}

// keep renews the lease, and gives the leadership up before etcd does: what counts is
// when a renewal was asked for that was granted. A fifth of the lease is what clocks may
// go wrong by, and what is needed to stop.
func (l *Leadership) keep(granted time.Time) {
	defer l.lose()
	c := l.client
	ttl := c.cfg.Lease
	bound := ttl - ttl/5
	next := time.NewTimer(ttl / 3)
	defer next.Stop()
	for {
		select {
		case <-next.C:
		case <-l.life.Done():
			return
		}
		// Machines that sleep have a monotonic clock that does, too.
		left := min(time.Until(granted.Add(bound)), bound-time.Now().Round(0).Sub(granted.Round(0)))
		if left <= 0 {
			c.log.Error("etcd did not renew this server's leadership in time", "etcd", c.where(), "since", granted, "lease", ttl)
			return
		}
		began := time.Now()
		// The member that is asked may wait for one that has just died.
		ctx, cancel := context.WithTimeout(l.life, min(left, ttl/5))
		_, err := c.etcd.KeepAliveOnce(ctx, l.lease)
		cancel()
		switch {
		case errors.Is(err, rpctypes.ErrLeaseNotFound):
			c.log.Error("etcd has ended this server's leadership", "etcd", c.where(), "since", granted, "lease", ttl)
			return
		case err != nil:
			c.log.Warn("etcd did not renew this server's leadership; trying again", "err", c.explain(err), "left", left)
			next.Reset(min(retryAfter, left))
		default:
			granted = began
			next.Reset(ttl / 3)
		}
	}
}

// Lost is closed when this process does not lead any more.
func (l *Leadership) Lost() <-chan struct{} { return l.life.Done() }

// Revision is that which made it leader.
func (l *Leadership) Revision() int64 { return l.revision }

// Resign ends the leadership, so that another begins at once.
func (l *Leadership) Resign(ctx context.Context) error {
	led := l.life.Err() == nil
	l.lose()
	l.keeping.Wait()
	if !led {
		return nil
	}
	c := l.client
	ctx, cancel := context.WithTimeout(ctx, attemptBound)
	defer cancel()
	_, err := c.etcd.Txn(ctx).If(l.guard()).Then(clientv3.OpDelete(c.key(leaderKey))).Commit()
	if err != nil {
		return fmt.Errorf("resign: %w", c.explain(err))
	}
	c.revoke(ctx, l.lease)
	return nil
}

// guard is the condition of all that a leader does.
func (l *Leadership) guard() clientv3.Cmp {
	return clientv3.Compare(clientv3.CreateRevision(l.client.key(leaderKey)), "=", l.revision)
}

// Check asks etcd whether this process leads; the error of one that does not wraps
// [ErrDeposed].
func (l *Leadership) Check(ctx context.Context) error {
	if l.life.Err() != nil {
		return ErrDeposed
	}
	r, err := l.client.get(ctx, l.client.key(leaderKey), clientv3.WithKeysOnly())
	if err != nil {
		return err
	}
	if len(r.Kvs) == 0 || r.Kvs[0].CreateRevision != l.revision {
		l.lose()
		return ErrDeposed
	}
	return nil
}

// write carries operations out in one transaction, if also the conditions hold; if
// they don't, it returns false. A request of which no answer comes is repeated, and done
// once: the turn that it leaves behind tells whether it was. An error that wraps
// [store.ErrUncertain] leaves open whether it was done, or will be until the next write.
func (l *Leadership) write(ctx context.Context, conditions []clientv3.Cmp, ops ...clientv3.Op) (bool, error) {
	c := l.client
	l.writing.Lock()
	defer l.writing.Unlock()
	ctx, cancel := context.WithTimeout(ctx, c.bound())
	defer cancel()
	defer context.AfterFunc(l.life, cancel)()
	turn := []byte(rand.Text())
	ops = append(ops, clientv3.OpPut(c.key(turnKey), string(turn)))
	var uncertain error
	for {
		if l.life.Err() != nil {
			return false, errors.Join(ErrDeposed, uncertain)
		}
		if c.own != nil && c.own.failure() != nil {
			return false, errors.Join(c.explain(c.own.failure()), uncertain)
		}
		attempt, cancel := context.WithTimeout(ctx, c.attempt())
		all := append([]clientv3.Cmp{l.guard(), clientv3.Compare(clientv3.ModRevision(c.key(turnKey)), "=", l.turn)}, conditions...)
		r, err := c.etcd.Txn(attempt).If(all...).Then(ops...).
			Else(clientv3.OpGet(c.key(leaderKey), clientv3.WithKeysOnly()), clientv3.OpGet(c.key(turnKey))).Commit()
		cancel()
		switch {
		case err != nil && definite(err):
			return false, errors.Join(c.explain(err), uncertain)
		case err != nil:
			uncertain = fmt.Errorf("%w: %w", store.ErrUncertain, c.explain(err))
			select {
			case <-ctx.Done():
				if l.life.Err() != nil {
					return false, errors.Join(ErrDeposed, uncertain)
				}
				return false, uncertain
			case <-time.After(retryAfter):
			}
			continue
		case r.Succeeded:
			l.turn = r.Header.Revision
			return true, nil
		}
		leader, last := r.Responses[0].GetResponseRange().Kvs, r.Responses[1].GetResponseRange().Kvs
		if len(leader) == 0 || leader[0].CreateRevision != l.revision {
			l.lose()
			return false, errors.Join(ErrDeposed, uncertain)
		}
		switch {
		case len(last) == 0:
			return false, fmt.Errorf("etcd at %s: %s is gone, which only violin writes", c.where(), c.key(turnKey))
		case last[0].ModRevision == l.turn:
			return false, nil // it is one of the conditions
		}
		done := bytes.Equal(last[0].Value, turn)
		l.turn = last[0].ModRevision
		if done {
			return true, nil
		}
		// A write that was given up on has come after all, before this one.
	}
}
