package trust

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// credential is what a host or a user has: a key, its certificate, and that of the
// authority. It is one file, so that there is never the one without the other: in PEM,
// the certificate, the authority's, the key.
type credential struct {
	pair      tls.Certificate // the authority's is not in it: the server has that
	authority *x509.Certificate
}

// request gets a credential by asking an authority for a certificate. authority is
// called once there is an answer.
func request(ctx context.Context, name string, authority func() *x509.Certificate, sign func(ctx context.Context, request []byte) ([]byte, error)) (*credential, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: name}}, key)
	if err != nil {
		return nil, err
	}
	der, err := sign(ctx, csr)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("the certificate that the server made: %w", err)
	}
	if !key.PublicKey.Equal(cert.PublicKey) || cert.Subject.CommonName != name || cert.CheckSignatureFrom(authority()) != nil {
		return nil, errors.New("the certificate that the server made is not the one that was asked for")
	}
	return &credential{tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: cert}, authority()}, nil
}

// readCredential reads what write wrote. An older one has its key in a file of its own.
func readCredential(file string, keyFile ...string) (*credential, error) {
	// A file with both is read once: it may be renewed meanwhile.
	certText, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	keyText := certText
	if len(keyFile) > 0 {
		if keyText, err = os.ReadFile(keyFile[0]); err != nil {
			return nil, err
		}
	}
	pair, err := tls.X509KeyPair(certText, keyText)
	if err != nil {
		return nil, err
	}
	if len(pair.Certificate) != 2 {
		return nil, errors.New("that of its authority is missing")
	}
	authority, err := x509.ParseCertificate(pair.Certificate[1])
	if err != nil {
		return nil, err
	}
	pair.Certificate = pair.Certificate[:1]
	return &credential{pair, authority}, nil
}

func (c *credential) write(file string) error {
	key, err := encodeKey(c.pair.PrivateKey)
	if err != nil {
		return err
	}
	return writeFile(file, append(encodeCertificates(c.pair.Certificate[0], c.authority.Raw), key...))
}

func (c *credential) issuer() *x509.Certificate { return c.authority }

func (c *credential) roots() *x509.CertPool {
	roots := x509.NewCertPool()
	roots.AddCert(c.authority)
	return roots
}

func encodeKey(key crypto.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

func encodeCertificates(certs ...[]byte) []byte {
	var out []byte
	for _, der := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	return out
}

// remove removes a file that may not be there.
func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
