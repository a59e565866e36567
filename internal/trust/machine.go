package trust

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
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

func (i *Identity) path(name string) string { return filepath.Join(i.dir, name) }

// Joined tells whether the host has a certificate, of the authority of the token if
// that is not nil.
func (i *Identity) Joined(t *Token) (bool, error) {
	pair, err := tls.LoadX509KeyPair(i.path("host.crt"), i.path("host.key"))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("certificate of this host in %s: %w", i.dir, err)
	case len(pair.Certificate) != 2:
		return false, fmt.Errorf("certificate of this host in %s: that of its authority is missing; remove host.crt and join anew", i.dir)
	}
	return pair.Leaf.Subject.CommonName == i.Host && (t == nil || sha256.Sum256(pair.Certificate[1]) == t.Authority), nil
}

// Config is TLS as a host speaks it that has joined.
func (i *Identity) Config() (*tls.Config, error) {
	pair, err := tls.LoadX509KeyPair(i.path("host.crt"), i.path("host.key"))
	if err != nil {
		return nil, fmt.Errorf("certificate of this host in %s: %w", i.dir, err)
	}
	if len(pair.Certificate) != 2 {
		return nil, fmt.Errorf("certificate of this host in %s: that of its authority is missing", i.dir)
	}
	authority, err := x509.ParseCertificate(pair.Certificate[1])
	if err != nil {
		return nil, fmt.Errorf("certificate of this host in %s: %w", i.dir, err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(authority)
	pair.Certificate = pair.Certificate[:1]
	return &tls.Config{
		MinVersion: tls.VersionTLS13, ServerName: ServerName, RootCAs: roots,
		Certificates: []tls.Certificate{pair}, NextProtos: []string{AgentProtocol},
	}, nil
}

// JoinConfig is TLS as a host speaks it that has a token only: it trusts the server
// whose certificate is of the authority that the token names.
func JoinConfig(t *Token) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, ServerName: ServerName, NextProtos: []string{JoinProtocol},
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
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	request, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: i.Host}}, key)
	if err != nil {
		return err
	}
	der, err := enroll(ctx, request)
	if err != nil {
		return err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return fmt.Errorf("the certificate that the server made: %w", err)
	}
	if !key.PublicKey.Equal(cert.PublicKey) || cert.Subject.CommonName != i.Host || cert.CheckSignatureFrom(authority) != nil {
		return errors.New("the certificate that the server made is not the one that was asked for")
	}
	if err := os.MkdirAll(i.dir, 0o700); err != nil {
		return fmt.Errorf("keep this host's certificate: %w", err)
	}
	if err := writePair(i.path("host.crt"), i.path("host.key"), key, der, authority.Raw); err != nil {
		return fmt.Errorf("keep this host's certificate: %w", err)
	}
	return nil
}
