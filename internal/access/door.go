package access

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"violin/internal/trust"
)

const (
	// drainBound is how long calls have to end when a door is closed. Their contexts
	// have ended then.
	drainBound = 5 * time.Second
	// idleBound is how long a connection may be silent between calls.
	idleBound = 2 * time.Minute
	// A connection with calls that is silent is tried after pingAfter, and is lost if
	// nothing comes for pingBound.
	pingAfter, pingBound = 30 * time.Second, 15 * time.Second
	// headerBound is how long a request's header may take, and headerLimit how many
	// bytes it may have.
	headerBound = 10 * time.Second
	headerLimit = 64 << 10
	// strangerLimit is how many bytes a request of a stranger may have.
	strangerLimit = 64 << 10
)

// Door serves users' TLS connections. Who a connection is with is looked at for each
// call, since it may change while the connection lasts.
type Door struct {
	authority *trust.Authority
	log       *slog.Logger
	server    *http.Server
	queue     *queue
	end       context.CancelFunc
	served    chan struct{}

	mu    sync.Mutex
	conns map[*tls.Conn]bool
}

// NewDoor serves h to whom an authority knows.
func NewDoor(authority *trust.Authority, h http.Handler, log *slog.Logger) *Door {
	d := &Door{authority: authority, log: log, queue: newQueue(), served: make(chan struct{}), conns: map[*tls.Conn]bool{}}
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	life, end := context.WithCancel(context.Background())
	d.end = end
	d.server = &http.Server{
		Handler: d.identify(h), Protocols: &protocols,
		BaseContext:       func(net.Listener) context.Context { return life },
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		ReadHeaderTimeout: headerBound, MaxHeaderBytes: headerLimit, IdleTimeout: idleBound,
		HTTP2:     &http.HTTP2Config{SendPingTimeout: pingAfter, PingTimeout: pingBound},
		ConnState: d.track,
	}
	go func() {
		defer close(d.served)
		if err := d.server.Serve(d.queue); err != nil && !errors.Is(err, http.ErrServerClosed) {
			log.Error("users are not served", "err", err)
		}
	}()
	return d
}

// Take serves a connection, whose handshake is done, to its end. It does not wait.
func (d *Door) Take(conn *tls.Conn) { d.queue.put(conn) }

type certificateKey struct{}

// Certificate is the one that a call of a user is made with; nil for the unix socket.
func Certificate(ctx context.Context) *x509.Certificate {
	c, _ := ctx.Value(certificateKey{}).(*x509.Certificate)
	return c
}

// identify finds out who makes a request.
func (d *Door) identify(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		user, cert, err := d.authority.User(*r.TLS)
		ctx := r.Context()
		switch {
		case errors.Is(err, trust.ErrStranger):
			ctx = because(ctx, err)
			r.Body = http.MaxBytesReader(w, r.Body, strangerLimit)
		case err != nil:
			d.log.Error("who a user is could not be found out", "from", r.RemoteAddr, "err", err)
			http.Error(w, "who you are could not be found out", http.StatusInternalServerError)
			return
		default:
			ctx = context.WithValue(With(ctx, Caller{user.Name, user.Role}), certificateKey{}, cert)
		}
		d.log.Debug("request", "user", user.Name, "role", string(user.Role), "from", r.RemoteAddr, "path", r.URL.Path)
		h.ServeHTTP(w, r.WithContext(ctx))
	})
}

func (d *Door) track(c net.Conn, state http.ConnState) {
	conn, ok := c.(*tls.Conn)
	if !ok {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	switch state {
	case http.StateNew:
		d.conns[conn] = true
	case http.StateClosed, http.StateHijacked:
		delete(d.conns, conn)
	}
}

// Connections are how many are open with each user.
func (d *Door) Connections() map[string]int {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := map[string]int{}
	for c := range d.conns {
		n[d.name(c)]++
	}
	return n
}

// name is whom a connection says that it is with; it may be none any more.
func (d *Door) name(c *tls.Conn) string {
	chains := c.ConnectionState().VerifiedChains
	if len(chains) == 0 {
		return ""
	}
	return chains[0][0].Subject.CommonName
}

// Cut ends the connections with a user, and so the calls on them.
func (d *Door) Cut(user string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for c := range d.conns {
		if d.name(c) == user {
			// Not the TLS connection: its close waits for a peer that does not read.
			_ = c.NetConn().Close()
		}
	}
}

// Close ends every connection. Calls that run see their contexts end.
func (d *Door) Close() {
	d.end()
	ctx, cancel := context.WithTimeout(context.Background(), drainBound)
	defer cancel()
	if err := d.server.Shutdown(ctx); err != nil {
		d.log.Warn("users' calls did not end in time and are cut off", "after", drainBound, "err", err)
		d.server.Close()
	}
	<-d.served
}

// queue is a listener of connections that others have accepted.
type queue struct {
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

func newQueue() *queue { return &queue{conns: make(chan net.Conn), done: make(chan struct{})} }

func (q *queue) put(c net.Conn) {
	select {
	case q.conns <- c:
	case <-q.done:
		c.Close()
	}
}

// Accept implements [net.Listener].
func (q *queue) Accept() (net.Conn, error) {
	select {
	case c := <-q.conns:
		return c, nil
	case <-q.done:
		return nil, net.ErrClosed
	}
}

// Close implements [net.Listener].
func (q *queue) Close() error {
	q.once.Do(func() { close(q.done) })
	return nil
}

// Addr implements [net.Listener].
func (q *queue) Addr() net.Addr { return &net.TCPAddr{} }
