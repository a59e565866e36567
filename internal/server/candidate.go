package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	"violin/internal/metadata"
	"violin/internal/store"
)

const (
	// electRetry is how long a candidate waits before it tries again what has failed.
	electRetry = 2 * time.Second
	// callBound is how long calls have to end when their server steps down. Their contexts
	// have ended then.
	callBound = 5 * time.Second
)

// Candidate is a server that leads, or stands by for one that does: then it hands
// connections of agents and users on to that one, and when that one is gone, goes on in
// its place. With an etcd of its own process it leads, always.
type Candidate struct {
	cfg  Config
	log  *slog.Logger
	etcd *metadata.Client

	life    context.Context
	end     context.CancelFunc
	running sync.WaitGroup

	mu     sync.Mutex
	server *Server // nil while it stands by
	leader metadata.Leader
	calls  *calls // of server
}

// calls are the requests that a server has under way.
type calls struct {
	life  context.Context // ends when it steps down
	end   context.CancelFunc
	under sync.WaitGroup
}

// Stand makes a server that leads, if nobody else does, and otherwise one that stands by.
// ctx bounds the making only.
func Stand(ctx context.Context, config Config) (*Candidate, error) {
	etcd, err := config.openEtcd(ctx)
	if err != nil {
		return nil, err
	}
	c := &Candidate{cfg: config, log: config.Logger, etcd: etcd}
	c.life, c.end = context.WithCancel(context.WithoutCancel(ctx))
	led, err := c.elect(ctx)
	if err == nil && led != nil {
		err = c.lead(ctx, led)
	}
	if err != nil {
		return nil, errors.Join(err, etcd.Close())
	}
	c.running.Go(func() { c.run(led) })
	return c, nil
}

// elect tries to be elected. Otherwise the leadership is nil, and it is noted who leads.
func (c *Candidate) elect(ctx context.Context) (*metadata.Leadership, error) {
	// Who can't read what there is must not lead.
	info, err := store.Inspect(ctx, c.cfg.location())
	if err == nil && info.Exists {
		err = c.etcd.CheckFormat(ctx, info.ID)
	}
	if err != nil {
		return nil, err
	}
	led, leader, err := c.etcd.Lead(ctx)
	if err == nil {
		c.mu.Lock()
		c.leader = leader
		c.mu.Unlock()
	}
	return led, err
}

// lead makes the server of who was elected. If that fails, another may be.
func (c *Candidate) lead(ctx context.Context, led *metadata.Leadership) error {
	s, err := take(ctx, c.cfg, led)
	if err != nil {
		return errors.Join(err, led.Resign(context.WithoutCancel(ctx)))
	}
	k := &calls{}
	k.life, k.end = context.WithCancel(context.Background())
	c.mu.Lock()
	c.server, c.calls = s, k
	c.mu.Unlock()
	if !c.etcd.Embedded() {
		c.log.Info("this server leads", "name", c.cfg.Etcd.Name, "term", led.Term())
	}
	return nil
}

// run leads and stands by in turn.
func (c *Candidate) run(led *metadata.Leadership) {
	for {
		if led != nil {
			select {
			case <-led.Lost():
				c.log.Error("this server leads no more: what runs on joined hosts runs on, and is the next leader's; what ran on this machine ends")
			case <-c.life.Done():
			}
			c.stop(led)
		}
		if c.life.Err() != nil {
			return
		}
		if led = c.standBy(); led == nil {
			return
		}
	}
}

// stop ends the server that there is, and what it holds. If it leads no more it orders
// nothing from then on.
func (c *Candidate) stop(led *metadata.Leadership) {
	c.mu.Lock()
	s, k := c.server, c.calls
	c.server, c.calls, c.leader = nil, nil, metadata.Leader{}
	c.mu.Unlock()
	deposed := false
	select {
	case <-led.Lost():
		deposed = true
		s.leaveAll()
	default:
	}
	k.end()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		k.under.Wait()
	}()
	select {
	case <-ended:
	case <-time.After(callBound):
		c.log.Warn("calls did not end when this server stopped leading")
	}
	err := s.Close()
	if !deposed {
		err = errors.Join(err, led.Resign(context.Background()))
	} else {
		_ = led.Resign(context.Background()) // it only waits
	}
	if err != nil {
		c.log.Error("the server that led was not closed cleanly", "err", err)
	}
}

// standBy waits until this server was elected, and leads. Meanwhile it hands connections
// on. The leadership is nil if the server is to end.
func (c *Candidate) standBy() *metadata.Leadership {
	var door *relay
	defer func() {
		if door != nil {
			door.close()
		}
	}()
	for told := ""; c.life.Err() == nil; {
		led, err := c.elect(c.life)
		if err == nil && led != nil {
			if door != nil {
				door.close() // its port is the server's now
				door = nil
			}
			if err = c.lead(c.life, led); err == nil {
				return led
			}
		}
		var leader metadata.Leader
		if err == nil {
			c.mu.Lock()
			leader = c.leader
			c.mu.Unlock()
			if leader.Name != told {
				c.log.Info("standing by", "leader", leader.Name, "address", leader.Address, "since", leader.Since)
			}
			told = leader.Name
			if door == nil && c.cfg.Listen != "" {
				if door, err = newRelay(c.life, c.cfg.Listen, c.log); err != nil {
					c.log.Error("who comes to this server is not handed on to the leader", "err", err)
				}
			}
			if door != nil {
				door.to(leader.Address)
			}
			_, err = c.etcd.Await(c.life, leader)
			if door != nil {
				door.to("") // until it is known who is next
			}
		}
		if err != nil && c.life.Err() == nil {
			c.log.Error("not elected; trying again", "in", electRetry, "err", err)
			select {
			case <-time.After(electRetry):
			case <-c.life.Done():
			}
		}
	}
	return nil
}

// ServeHTTP implements [http.Handler]: the API of a server that leads. Of one that stands
// by, each call's answer is who does.
func (c *Candidate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	s, k, leader := c.server, c.calls, c.leader
	if s != nil {
		k.under.Add(1)
	}
	c.mu.Unlock()
	if s == nil {
		refuseStandby(w, r, leader)
		return
	}
	defer k.under.Done()
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(k.life, cancel)()
	s.Handler().ServeHTTP(w, r.WithContext(ctx))
}

func refuseStandby(w http.ResponseWriter, r *http.Request, leader metadata.Leader) {
	err := errors.New("this server stands by, and no server leads now; try again in some seconds")
	if leader.Revision != 0 {
		err = fmt.Errorf("this server stands by, and server %s leads", leader.Name)
		if leader.Address != "" {
			err = fmt.Errorf("%w: `violin --server %s` speaks to that, after `violin login`", err, leader.Address)
		}
	}
	wire := connect.NewErrorWriter()
	if !wire.IsSupported(r) {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	_ = wire.Write(w, r, connect.NewError(connect.CodeFailedPrecondition, err))
}

// Busy tells whether a slice runs, or a user is connected, or the server stands by.
func (c *Candidate) Busy() bool {
	c.mu.Lock()
	s := c.server
	c.mu.Unlock()
	return s == nil || s.Busy()
}

// Close ends the server; if it leads, another is elected at once.
func (c *Candidate) Close() error {
	c.end()
	c.running.Wait()
	return c.etcd.Close()
}

// leaveAll makes a server that leads no more do no harm: no order leaves it, and what runs
// on joined hosts is left to the next.
func (s *Server) leaveAll() {
	if s.hub != nil {
		_ = s.hub.Close() // of which Close tells
	}
	s.leaveRuns()
}

// home refuses a store whose metadata were in an etcd elsewhere when a server led last, to
// a server with one of its own: it would begin beside them.
func (c *Config) home(last []string) error {
	if len(last) == 0 || len(c.Etcd.Endpoints) > 0 {
		return nil
	}
	return fmt.Errorf("the metadata of store %s are in etcd at %s: start the server with --etcd %s; if that etcd is lost for good, and no server uses it, remove terms/term.json from the store, and its copies are taken in",
		c.location(), strings.Join(last, ","), strings.Join(slices.Clone(last), ","))
}
