package trust

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Logins are a user's: what is kept, in a directory, of the servers that the user has
// logged in to. Each has a directory of its own, named after its address, with
// [CertificateFile] and [AuthorityFile]; the file "current" has the address of the last
// login's.
type Logins struct{ dir string }

// Names of files of a login, both PEM.
const (
	CertificateFile = "user.pem" // certificate and key
	AuthorityFile   = "ca.pem"   // what servers' certificates are verified by
)

// OpenLogins is what is kept, or will be, in a directory.
func OpenLogins(dir string) Logins { return Logins{dir} }

// Dir is the directory of a server's login. There is no colon in its name, which curl
// would take for the beginning of a passphrase.
func (l Logins) Dir(server string) string {
	return filepath.Join(l.dir, strings.ReplaceAll(server, ":", "_"))
}

func (l Logins) current() string { return filepath.Join(l.dir, "current") }

// Current is the server of the last login that is there; empty for none.
func (l Logins) Current() (string, error) {
	b, err := os.ReadFile(l.current())
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("which server the last login was to: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// Login is what a user needs to speak to a server.
type Login struct {
	Server string // HOST:PORT
	User   User
	logins Logins
	own    *credential
}

// Open reads a login. The error of a server that the user has not logged in to wraps
// [ErrStranger].
func (l Logins) Open(server string) (*Login, error) {
	own, err := readCredential(filepath.Join(l.Dir(server), CertificateFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w to %s: `violin login TOKEN@%s` does that, with a token that an operator makes by `violin token create --user NAME`", ErrStranger, server, server)
	}
	var user User
	if err == nil {
		user, err = userOf(own.pair.Leaf)
	}
	if err != nil {
		return nil, fmt.Errorf("login to %s in %s: %w; `violin login` makes it anew", server, l.Dir(server), err)
	}
	return &Login{server, user, l, own}, nil
}

// LoginConfig is TLS as a user speaks it who has a token only, for HTTP.
func LoginConfig(t *Token) *tls.Config { return strangerConfig(t) }

// Login gets the user of a token a certificate, over a connection that was made with
// [LoginConfig], and keeps it. enroll hands a certificate request to the server, and
// returns what certificate it made, and its authority's.
func (l Logins) Login(ctx context.Context, server string, t *Token, enroll func(ctx context.Context, request []byte) (cert, authority []byte, err error)) (*Login, error) {
	if t.Role == "" {
		return nil, fmt.Errorf("%w: it is for a host; `violin agent --join` takes it", ErrToken)
	}
	var authority *x509.Certificate
	c, err := request(ctx, t.Name, func() *x509.Certificate { return authority }, func(ctx context.Context, request []byte) ([]byte, error) {
		der, ca, err := enroll(ctx, request)
		if err != nil {
			return nil, err
		}
		// The connection was to the server of this very authority.
		if sha256.Sum256(ca) != t.Authority {
			return nil, errors.New("the server's authority is not the token's")
		}
		authority, err = x509.ParseCertificate(ca)
		return der, err
	})
	if err != nil {
		return nil, err
	}
	if user, err := userOf(c.pair.Leaf); err != nil || user != (User{t.Name, t.Role}) {
		return nil, errors.New("the certificate that the server made is not the one that was asked for")
	}
	dir := l.Dir(server)
	err = os.MkdirAll(dir, 0o700)
	if err == nil {
		err = writeFile(filepath.Join(dir, AuthorityFile), encodeCertificates(authority.Raw))
	}
	if err == nil {
		err = c.write(filepath.Join(dir, CertificateFile))
	}
	if err == nil {
		err = writeFile(l.current(), []byte(server+"\n"))
	}
	if err != nil {
		return nil, fmt.Errorf("keep the login: %w", err)
	}
	return &Login{server, User{t.Name, t.Role}, l, c}, nil
}

// Config is TLS as the user speaks it, for HTTP.
func (l *Login) Config() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, ServerName: ServerName, RootCAs: l.own.roots(),
		Certificates: []tls.Certificate{l.own.pair},
	}
}

// Certificate is the user's.
func (l *Login) Certificate() *x509.Certificate { return l.own.pair.Leaf }

// Expired tells whether the certificate has expired: then only a token helps.
func (l *Login) Expired() bool { return time.Now().After(l.own.pair.Leaf.NotAfter) }

// Renew gets the user's next certificate for the server, and keeps it in the place of
// the one that there is.
func (l *Login) Renew(ctx context.Context, renew func(ctx context.Context, request []byte) ([]byte, error)) error {
	c, err := request(ctx, l.User.Name, l.own.issuer, renew)
	if err != nil {
		return err
	}
	if err := c.write(filepath.Join(l.logins.Dir(l.Server), CertificateFile)); err != nil {
		return fmt.Errorf("keep the certificate: %w", err)
	}
	l.own = c
	return nil
}

// Forget removes what is kept of the login.
func (l Logins) Forget(server string) error {
	dir := l.Dir(server)
	errs := []error{remove(filepath.Join(dir, CertificateFile)), remove(filepath.Join(dir, AuthorityFile)), remove(dir)}
	if current, err := l.Current(); err == nil && current == server {
		errs = append(errs, remove(l.current()))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("forget the login to %s: %w", server, err)
	}
	return nil
}
