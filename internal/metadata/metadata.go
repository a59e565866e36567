// Package metadata keeps a server's small documents in etcd, and has servers elect one
// leader through it: embedded in the server's process, or a cluster elsewhere, by the
// same client's methods.
//
// What there is in etcd, below a prefix:
//
//	leader                  who leads: JSON, see [Leader]; with the leader's lease
//	turn                    the number of the last write, 16 bytes at random
//	STORE/format            JSON: what this is, its version, and its origin
//	STORE/documents/NAME    a document: 0 and its bytes, or 1 and where they are (JSON)
//	STORE/parts/ID/NNNN     1 MiB each of one that is too large for a request
//
// STORE is the identifier of the page store that the documents belong to. Who
// leads has made the key leader, and is known by the revision that made it. Each write is
// one transaction on the condition that this key is of that revision, and that no write
// came since the leader's last one: so that of a leader that was deposed nothing is
// written, and of a request that was given up on and arrives late neither.
package metadata

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

var (
	// ErrDeposed is in the chain of what a server is refused that does not lead any more.
	ErrDeposed = errors.New("this server leads no more")
	// ErrUnavailable is in the chain when etcd does not answer.
	ErrUnavailable = errors.New("etcd does not answer")
	// ErrVersion is in the chain when what is in etcd is of a later version.
	ErrVersion = errors.New("of a later version of violin")
)

const (
	// DefaultPrefix begins the names of keys.
	DefaultPrefix = "/violin"
	// DefaultLease is how long a leader is one without having renewed it.
	DefaultLease = 10 * time.Second

	// slowBound is how long a read, or a write, may take in an etcd of this process: there
	// is nobody else to go to if its disk is slow. In a cluster it is the lease.
	slowBound = 30 * time.Second
	// attemptBound is how long one request to a cluster is waited for before it is sent
	// again.
	attemptBound = 3 * time.Second
	retryAfter   = 200 * time.Millisecond

	dialBound = 5 * time.Second
	// A connection that is silent is tried after pingAfter, and is lost after pingBound.
	pingAfter, pingBound = 2 * time.Second, 2 * time.Second
)

// Config says where etcd is. Either Dir or Endpoints is set.
type Config struct {
	// Dir is where an etcd in this process keeps its data. Nobody but this process gets
	// at it: it has no socket.
	Dir string
	// Endpoints are the URLs of a cluster's members, http or https.
	Endpoints []string
	// CA, Cert and Key are PEM files: whose certificates members have, and this server's
	// for them. All may be empty; Cert and Key go together.
	CA, Cert, Key string
	Prefix        string // of all keys; empty for [DefaultPrefix]
	// Name and Address are told to who asks for the leader.
	Name, Address string
	// Lease is how long a leader is one without having renewed that, in whole seconds;
	// 0 for [DefaultLease]. In this process, it is for as long as the process lives.
	Lease  time.Duration
	Logger *slog.Logger
}

// Check refuses a configuration that cannot work, without connecting to anything.
func (c *Config) Check() error {
	switch {
	case (c.Dir == "") == (len(c.Endpoints) == 0):
		return errors.New("etcd: either a directory or endpoints")
	case (c.Cert == "") != (c.Key == ""):
		return errors.New("etcd: a certificate goes with its key; give both or none")
	case c.Prefix != "" && (!strings.HasPrefix(c.Prefix, "/") || strings.HasSuffix(c.Prefix, "/")):
		return fmt.Errorf("etcd: prefix %q: it begins with a slash and ends without one, as %s", c.Prefix, DefaultPrefix)
	case c.Lease%time.Second != 0 || c.Lease < 0:
		return fmt.Errorf("etcd: a lease of %s; it takes whole seconds", c.Lease)
	}
	for _, e := range c.Endpoints {
		u, err := url.Parse(e)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Port() == "" || u.Path != "" {
			return fmt.Errorf("etcd: endpoint %q: it is a URL such as http://10.0.0.1:2379 or https://10.0.0.1:2379", e)
		}
		if u.Scheme == "http" && c.CA+c.Cert != "" {
			return fmt.Errorf("etcd: endpoint %q is without TLS, but files for TLS were given; use https", e)
		}
	}
	return nil
}

// Client is a connection to etcd. It is safe for concurrent use.
type Client struct {
	cfg  Config
	log  *slog.Logger
	etcd *clientv3.Client
	own  *embedded // nil for a cluster elsewhere
}

// Open starts the etcd in this process, or connects to one elsewhere, and returns when
// it has answered.
func Open(ctx context.Context, cfg Config) (*Client, error) {
	if cfg.Prefix == "" {
		cfg.Prefix = DefaultPrefix
	}
	if cfg.Lease == 0 {
		cfg.Lease = DefaultLease
	}
	if err := cfg.Check(); err != nil {
		return nil, err
	}
	c := &Client{cfg: cfg, log: cfg.Logger}
	if cfg.Dir != "" {
		own, err := startEmbedded(ctx, cfg)
		if err != nil {
			return nil, fmt.Errorf("start etcd in %s: %w", cfg.Dir, err)
		}
		c.own, c.etcd = own, own.client()
		return c, nil
	}
	config, err := cfg.tls()
	if err != nil {
		return nil, fmt.Errorf("etcd: %w", err)
	}
	c.etcd, err = clientv3.New(clientv3.Config{
		Endpoints: cfg.Endpoints, TLS: config, DialTimeout: dialBound, DialKeepAliveTime: pingAfter, DialKeepAliveTimeout: pingBound,
		Logger: zap.NewNop(), // every error is told by who gets it
	})
	if err != nil {
		return nil, fmt.Errorf("connect to etcd at %s: %w", c.where(), err)
	}
	return c, nil
}

func (c *Config) tls() (*tls.Config, error) {
	out := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.CA != "" {
		pem, err := os.ReadFile(c.CA)
		if err != nil {
			return nil, err
		}
		if out.RootCAs = x509.NewCertPool(); !out.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s: there is no certificate in it (PEM)", c.CA)
		}
	}
	if c.Cert != "" {
		if _, err := tls.LoadX509KeyPair(c.Cert, c.Key); err != nil {
			return nil, err
		}
		// Read again for each connection: they are renewed in place.
		out.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(c.Cert, c.Key)
			return &pair, err
		}
	}
	for _, e := range c.Endpoints {
		if strings.HasPrefix(e, "https:") {
			return out, nil
		}
	}
	return nil, nil
}

// Close ends the connection, and the etcd in this process.
func (c *Client) Close() error {
	err := c.etcd.Close()
	if c.own != nil {
		c.own.close()
	}
	if err != nil && !errors.Is(err, context.Canceled) {
		return fmt.Errorf("close etcd: %w", err)
	}
	return nil
}

// Embedded tells whether etcd is in this process.
func (c *Client) Embedded() bool { return c.own != nil }

// where names etcd in messages.
func (c *Client) where() string {
	if c.own != nil {
		return c.cfg.Dir
	}
	return strings.Join(c.cfg.Endpoints, ",")
}

// bound is how long a read may take, or a write with its repetitions.
func (c *Client) bound() time.Duration {
	if c.own != nil {
		return slowBound
	}
	return c.cfg.Lease
}

// attempt is how long one request is waited for.
func (c *Client) attempt() time.Duration {
	if c.own != nil {
		return slowBound
	}
	return attemptBound
}

func (c *Client) key(name string) string { return c.cfg.Prefix + "/" + name }

// explain says where a request failed, and what is to be done.
func (c *Client) explain(err error) error {
	if err == nil {
		return nil
	}
	if c.own != nil {
		if cause := c.own.failure(); cause != nil {
			return fmt.Errorf("%w: the one of this server, in %s, has stopped: %w; what is wrong there must be mended and the server started again", ErrUnavailable, c.cfg.Dir, cause)
		}
	}
	switch {
	case errors.Is(err, rpctypes.ErrNoSpace):
		return fmt.Errorf("etcd at %s is full: %w; compact and defragment it, disarm its alarm (etcdctl alarm disarm), or give it a larger quota", c.where(), err)
	case errors.Is(err, context.DeadlineExceeded), status.Code(err) == codes.DeadlineExceeded, status.Code(err) == codes.Unavailable, unanswered(err):
		return fmt.Errorf("%w: %s: %w; are most of its members up, and can they be reached from here?", ErrUnavailable, c.where(), err)
	}
	return fmt.Errorf("etcd at %s: %w", c.where(), err)
}

// unanswered tells whether etcd itself says that it can't answer, such as without a
// quorum.
func unanswered(err error) bool {
	var said rpctypes.EtcdError
	return errors.As(err, &said) && (said.Code() == codes.Unavailable || said.Code() == codes.DeadlineExceeded)
}

// definite tells whether a write that failed was certainly not done.
func definite(err error) bool {
	var said rpctypes.EtcdError
	if !errors.As(err, &said) {
		return false
	}
	switch said.Code() {
	case codes.InvalidArgument, codes.ResourceExhausted, codes.PermissionDenied, codes.Unauthenticated, codes.FailedPrecondition:
		return true
	}
	return false
}

// get reads what lies at a key, as everybody's last write has left it. Of a key that
// there is not, it is nil.
func (c *Client) get(ctx context.Context, key string, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	if c.own != nil && c.own.failure() != nil {
		return nil, c.explain(c.own.failure())
	}
	ctx, cancel := context.WithTimeout(ctx, c.bound())
	defer cancel()
	r, err := c.etcd.Get(ctx, key, opts...)
	if err != nil {
		return nil, c.explain(err)
	}
	return r, nil
}
