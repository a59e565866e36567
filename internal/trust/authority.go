// Package trust is who may be what between the machines of one server: the server's
// certificate authority, the tokens that machines join with, and the TLS settings of
// both ends. There is no secret of it on the wire but a token, once, to a server that
// has proved to be the one that the token was made by.
package trust

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"regexp"
	"time"
)

// ServerName is the name in every server's certificate: what a machine trusts is the
// authority, whatever address it found the server at.
const ServerName = "server.violin"

// Lifetimes of certificates. A server makes itself a new one each time it starts. A
// machine whose certificate has expired joins anew.
const (
	authorityLife = 20 * 365 * 24 * time.Hour
	serverLife    = 365 * 24 * time.Hour
	machineLife   = 365 * 24 * time.Hour
	// skew is how far another machine's clock may be behind.
	skew = time.Hour
)

// The protocols of a connection (ALPN): one is for whoever has a token, the other for
// whoever has a certificate.
const (
	JoinProtocol  = "violin-join/1"
	AgentProtocol = "violin-agent/1"
)

var machineName = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$`)

// CheckName refuses what cannot be a machine's name.
func CheckName(name string) error {
	if !machineName.MatchString(name) {
		return fmt.Errorf("%q is no name for a host: it takes 1 to 63 letters, digits, '-', '_' and '.', and no sign at its ends", name)
	}
	return nil
}

// Authority is a server's certificate authority.
type Authority struct {
	dir   string
	key   *ecdsa.PrivateKey
	cert  *x509.Certificate
	token []byte // the key of tokens' seals
}

// OpenAuthority reads the authority that is kept in a directory, or makes it.
func OpenAuthority(dir string) (*Authority, error) {
	a, err := readAuthority(dir)
	if errors.Is(err, fs.ErrNotExist) {
		if err = makeAuthority(dir); err == nil {
			a, err = readAuthority(dir)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("certificate authority in %s: %w", dir, err)
	}
	return a, nil
}

func readAuthority(dir string) (*Authority, error) {
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "ca.crt"), filepath.Join(dir, "ca.key"))
	if err != nil {
		return nil, err
	}
	key, ok := pair.PrivateKey.(*ecdsa.PrivateKey)
	if !ok || !pair.Leaf.IsCA {
		return nil, errors.New("ca.key and ca.crt are not those of an authority that violin has made")
	}
	scalar, err := key.Bytes()
	if err != nil {
		return nil, err
	}
	seal, err := hkdf.Key(sha256.New, scalar, nil, "violin join token", 32)
	if err != nil {
		return nil, err
	}
	return &Authority{dir: dir, key: key, cert: pair.Leaf, token: seal}, nil
}

// makeAuthority writes the key first: a certificate without it is not found.
func makeAuthority(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template, err := certificate("violin authority", authorityLife)
	if err != nil {
		return err
	}
	template.IsCA, template.BasicConstraintsValid, template.MaxPathLenZero = true, true, true
	template.KeyUsage = x509.KeyUsageCertSign
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	return writePair(filepath.Join(dir, "ca.crt"), filepath.Join(dir, "ca.key"), key, der)
}

// certificate is what all certificates have in common.
func certificate(name string, life time.Duration) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	now := time.Now()
	return &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: now.Add(-skew), NotAfter: now.Add(life), KeyUsage: x509.KeyUsageDigitalSignature,
	}, nil
}

// writePair writes a key, and then its certificates.
func writePair(certFile, keyFile string, key *ecdsa.PrivateKey, certs ...[]byte) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	if err := writeFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})); err != nil {
		return err
	}
	return writeFile(certFile, encodeCertificates(certs...))
}

func encodeCertificates(certs ...[]byte) []byte {
	var out []byte
	for _, der := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	return out
}

// writeFile makes a file appear whole, for its owner only.
func writeFile(path string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// ServerConfig is TLS as the server speaks it. A client that has a certificate has
// one of this authority.
func (a *Authority) ServerConfig() (*tls.Config, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template, err := certificate(ServerName, serverLife)
	if err != nil {
		return nil, err
	}
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		return nil, fmt.Errorf("make the server's certificate: %w", err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(a.cert)
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{{Certificate: [][]byte{der, a.cert.Raw}, PrivateKey: key}},
		ClientAuth:   tls.VerifyClientCertIfGiven, ClientCAs: roots,
		NextProtos: []string{AgentProtocol, JoinProtocol},
		// A resumed session would not be asked for its certificate's validity again.
		SessionTicketsDisabled: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			switch {
			case cs.NegotiatedProtocol == JoinProtocol:
				return nil
			case cs.NegotiatedProtocol != AgentProtocol:
				return errors.New("it speaks no protocol of violin's")
			case len(cs.VerifiedChains) == 0:
				return errors.New("it has no certificate: a host joins with a token first")
			}
			return a.checkMachine(cs.VerifiedChains[0][0])
		},
	}, nil
}

// Machine is the host that a verified connection is with; empty for one that has no
// certificate.
func Machine(cs tls.ConnectionState) string {
	if cs.NegotiatedProtocol != AgentProtocol || len(cs.VerifiedChains) == 0 {
		return ""
	}
	return cs.VerifiedChains[0][0].Subject.CommonName
}

// Admit makes a host's certificate, if the token is good for it. request is a PKCS #10
// request; of what it says only the key is heeded.
func (a *Authority) Admit(token, host string, request []byte) ([]byte, error) {
	t, err := ParseToken(token)
	if err != nil {
		return nil, err
	}
	if err := CheckName(host); err != nil {
		return nil, err
	}
	if err := a.checkToken(t, host, time.Now()); err != nil {
		return nil, err
	}
	csr, err := x509.ParseCertificateRequest(request)
	if err == nil {
		err = csr.CheckSignature()
	}
	if err != nil {
		return nil, fmt.Errorf("certificate request of host %s: %w", host, err)
	}
	template, err := certificate(host, machineLife)
	if err != nil {
		return nil, err
	}
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, csr.PublicKey, a.key)
	if err != nil {
		return nil, fmt.Errorf("make the certificate of host %s: %w", host, err)
	}
	if err := a.remember(host, template.SerialNumber); err != nil {
		return nil, err
	}
	return der, nil
}

// The hosts that have joined are files, named after them, that hold the serial number
// of the last certificate that each was given: an earlier one is no longer good.
func (a *Authority) machineFile(host string) string { return filepath.Join(a.dir, "hosts", host) }

func (a *Authority) remember(host string, serial *big.Int) error {
	path := a.machineFile(host)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("note that host %s has joined: %w", host, err)
	}
	if err := writeFile(path, []byte(serial.Text(16))); err != nil {
		return fmt.Errorf("note that host %s has joined: %w", host, err)
	}
	return nil
}

func (a *Authority) checkMachine(cert *x509.Certificate) error {
	host := cert.Subject.CommonName
	if err := CheckName(host); err != nil {
		return err
	}
	serial, err := os.ReadFile(a.machineFile(host))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("host %s has not joined, or was put out again", host)
	case err != nil:
		return fmt.Errorf("host %s: %w", host, err)
	case string(serial) != cert.SerialNumber.Text(16):
		return fmt.Errorf("host %s has joined anew since it was given this certificate", host)
	}
	return nil
}

// Machines are the names of the hosts that have joined, sorted.
func (a *Authority) Machines() ([]string, error) {
	files, err := os.ReadDir(filepath.Join(a.dir, "hosts"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list the hosts that have joined: %w", err)
	}
	var names []string
	for _, f := range files {
		if CheckName(f.Name()) == nil { // not one that is being written
			names = append(names, f.Name())
		}
	}
	return names, nil
}
