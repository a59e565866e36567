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
)

// Identity is a host's certificate and what it trusts.
type Identity struct {
	Host string
	dir  string
}

// OpenIdentity is what a host keeps, or will keep, in a directory.
func OpenIdentity(dir, host string) (*Identity, error) {
	if err := CheckName(host); err != nil {
		return nil, err
	}
	return &Identity{Host: host, dir: dir}, nil
}

// read reads the host's certificate. The error of none is [fs.ErrNotExist].
func (i *Identity) read() (*credential, error) {
	c, err := readCredential(i.path())
	if errors.Is(err, fs.ErrNotExist) {
		// As the first violins kept it.
		c, err = readCredential(filepath.Join(i.dir, "host.crt"), filepath.Join(i.dir, "host.key"))
	}
	if err != nil {
		return nil, fmt.Errorf("certificate of this host in %s: %w", i.dir, err)
	}
	return c, nil
}

func (i *Identity) path() string { return filepath.Join(i.dir, "host.pem") }

// Joined tells whether the host has a certificate, of the authority of the token if
// that is not nil.
func (i *Identity) Joined(t *Token) (bool, error) {
	c, err := i.read()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("%w; remove what is in it, and join anew", err)
	}
	return c.pair.Leaf.Subject.CommonName == i.Host && (t == nil || sha256.Sum256(c.authority.Raw) == t.Authority), nil
}

// Config is TLS as a host speaks it that has joined. A certificate that is renewed
// counts from the next connection on.
func (i *Identity) Config() (*tls.Config, error) {
	c, err := i.read()
	if err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion: tls.VersionTLS13, ServerName: ServerName, RootCAs: c.roots(), NextProtos: []string{AgentProtocol},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if renewed, err := i.read(); err == nil {
				return &renewed.pair, nil
			}
			return &c.pair, nil
		},
	}, nil
}

// Authority is the hash, SHA-256, of the certificate of the authority whose server the
// host has joined.
func (i *Identity) Authority() ([sha256.Size]byte, error) {
	c, err := i.read()
	if err != nil {
		return [sha256.Size]byte{}, err
	}
	return sha256.Sum256(c.authority.Raw), nil
}

// Certificate is the host's.
func (i *Identity) Certificate() (*x509.Certificate, error) {
	c, err := i.read()
	if err != nil {
		return nil, err
	}
	return c.pair.Leaf, nil
}

// JoinConfig is TLS as a host speaks it that has a token only: it trusts the server
// whose certificate is of the authority that the token names.
func JoinConfig(t *Token) *tls.Config {
	config := strangerConfig(t)
	config.NextProtos = []string{JoinProtocol}
	return config
}

// strangerConfig is TLS to the server that a token was made by.
func strangerConfig(t *Token) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, ServerName: ServerName,
		InsecureSkipVerify: true, // there are no roots yet; verified below
		VerifyConnection: func(cs tls.ConnectionState) error {
			_, err := authorityOf(t, cs)
			return err
		},
	}
}

// authorityOf verifies a server by a token, and returns its authority's certificate.
func authorityOf(t *Token, cs tls.ConnectionState) (*x509.Certificate, error) {
	for _, c := range cs.PeerCertificates {
		if sha256.Sum256(c.Raw) != t.Authority {
			continue
		}
		roots := x509.NewCertPool()
		roots.AddCert(c)
		_, err := cs.PeerCertificates[0].Verify(x509.VerifyOptions{
			DNSName: ServerName, Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		})
		return c, err
	}
	return nil, errors.New("it is not the server that the token was made by")
}

// Join gets the host its certificate over a connection that was made with
// [JoinConfig], and keeps it. enroll hands a certificate request to the server.
func (i *Identity) Join(ctx context.Context, t *Token, cs tls.ConnectionState, enroll func(ctx context.Context, request []byte) ([]byte, error)) error {
	authority, err := authorityOf(t, cs)
	if err != nil {
		return err
	}
	c, err := request(ctx, i.Host, func() *x509.Certificate { return authority }, enroll)
	if err != nil {
		return err
	}
	return i.keep(c)
}

// Renew gets the host its next certificate, and keeps it in the place of the one that
// it has.
func (i *Identity) Renew(ctx context.Context, renew func(ctx context.Context, request []byte) ([]byte, error)) error {
	old, err := i.read()
	if err != nil {
		return err
	}
	c, err := request(ctx, i.Host, old.issuer, renew)
	if err != nil {
		return err
	}
	return i.keep(c)
}

func (i *Identity) keep(c *credential) error {
	if err := os.MkdirAll(i.dir, 0o700); err != nil {
		return fmt.Errorf("keep this host's certificate: %w", err)
	}
	if err := c.write(i.path()); err != nil {
		return fmt.Errorf("keep this host's certificate: %w", err)
	}
	// What the first violins kept is of no more use.
	return errors.Join(remove(filepath.Join(i.dir, "host.crt")), remove(filepath.Join(i.dir, "host.key")))
}
