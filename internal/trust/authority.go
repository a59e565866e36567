// Package trust is who may be what to a server over the network: its certificate
// authority, the tokens that machines join and users log in with, and the TLS settings
// of all ends. There is no secret of it on the wire but a token, once, to a server that
// has proved to be the one that the token was made by.
//
// A host's certificate has the host's name as its common name. A user's has the user's
// name there, and the URI violin:user:NAME:ROLE as a subject alternative name, which a
// host's has not. What the authority remembers of a host or user is in its [Vault]; see member.
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
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/big"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"time"
)

// ServerName is the name in every server's certificate: what a machine trusts is the
// authority, whatever address it found the server at.
const ServerName = "server.violin"

// Lifetimes of certificates. All but the authority's are renewed when a third of it is
// left; see [RenewalDue]. Whose certificate has expired joins, or logs in, anew.
const (
	authorityLife = 20 * 365 * 24 * time.Hour
	serverLife    = 365 * 24 * time.Hour
	machineLife   = 365 * 24 * time.Hour
	userLife      = 90 * 24 * time.Hour
	// skew is how far another machine's clock may be behind.
	skew = time.Hour
)

// The protocols of a connection (ALPN). Any other, or none, is HTTP: the API's.
const (
	JoinProtocol  = "violin-join/1"  // of a machine that has a token
	AgentProtocol = "violin-agent/1" // and of one that has a certificate
)

// RenewalDue is when a certificate is to be renewed.
func RenewalDue(cert *x509.Certificate) time.Time {
	return cert.NotAfter.Add(-cert.NotAfter.Sub(cert.NotBefore) / 3)
}

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
	vault Vault
	key   *ecdsa.PrivateKey
	cert  *x509.Certificate
	token []byte // the key of tokens' seals

	members sync.Mutex // held while what is remembered of a host or user is read or changed
}

// OpenAuthority reads the authority that is kept in a vault, or makes it.
func OpenAuthority(v Vault) (*Authority, error) {
	a, err := readAuthority(v)
	if errors.Is(err, fs.ErrNotExist) {
		if err = makeAuthority(v); err == nil {
			a, err = readAuthority(v)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("certificate authority: %w", err)
	}
	return a, nil
}

func readAuthority(v Vault) (*Authority, error) {
	certText, err := v.Read(certName)
	if err != nil {
		return nil, err
	}
	keyText, err := v.Read(keyName)
	if err != nil {
		return nil, err
	}
	pair, err := tls.X509KeyPair(certText, keyText)
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
	return &Authority{vault: v, key: key, cert: pair.Leaf, token: seal}, nil
}

// makeAuthority writes the key first: a certificate without it is not found.
func makeAuthority(v Vault) error {
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
	text, err := encodeKey(key)
	if err == nil {
		err = v.Write(keyName, text)
	}
	if err != nil {
		return err
	}
	return v.Write(certName, encodeCertificates(der))
}

// certificate is what all certificates have in common.
func certificate(name string, life time.Duration) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, err
	}
	now := time.Now()
	return &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name},
		NotBefore: now.Add(-skew), NotAfter: now.Add(life), KeyUsage: x509.KeyUsageDigitalSignature,
	}, nil
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
// one of this authority. An agent has one that is good; of others, [Authority.User] tells.
func (a *Authority) ServerConfig() (*tls.Config, error) {
	own := &ownCertificate{authority: a}
	if _, err := own.get(nil); err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AddCert(a.cert)
	return &tls.Config{
		MinVersion:     tls.VersionTLS13,
		GetCertificate: own.get,
		ClientAuth:     tls.VerifyClientCertIfGiven, ClientCAs: roots,
		NextProtos: []string{AgentProtocol, JoinProtocol, "h2", "http/1.1"},
		// A resumed session would not be asked for its certificate's validity again.
		SessionTicketsDisabled: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			if cs.NegotiatedProtocol != AgentProtocol {
				return nil
			}
			return a.CheckMachine(cs)
		},
	}, nil
}

// ownCertificate is the server's. It makes itself anew in time.
type ownCertificate struct {
	authority *Authority

	mu   sync.Mutex
	made *tls.Certificate
}

func (o *ownCertificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.made != nil && time.Now().Before(RenewalDue(o.made.Leaf)) {
		return o.made, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template, err := certificate(ServerName, serverLife)
	if err != nil {
		return nil, err
	}
	template.DNSNames = []string{ServerName}
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	der, err := x509.CreateCertificate(rand.Reader, template, o.authority.cert, key.Public(), o.authority.key)
	if err != nil {
		return nil, fmt.Errorf("make the server's certificate: %w", err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	o.made = &tls.Certificate{Certificate: [][]byte{der, o.authority.cert.Raw}, PrivateKey: key, Leaf: leaf}
	return o.made, nil
}

// Certificate is the authority's own, DER.
func (a *Authority) Certificate() []byte { return a.cert.Raw }

// Machine is the host that a verified connection is with; empty for one that is not an
// agent's.
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
	if t.Role != "" {
		return nil, fmt.Errorf("%w: it is for user %s; `violin login` takes it", ErrToken, t.Name)
	}
	a.members.Lock()
	defer a.members.Unlock()
	m, err := a.read(hosts, host)
	if err != nil {
		return nil, err
	}
	if err := a.checkToken(t, host, m, time.Now()); err != nil {
		return nil, err
	}
	// Who joins anew takes the place of whoever had the name.
	return a.issue(hosts, host, &member{}, "", request)
}

// RenewMachine makes a host's next certificate. cert is the one that it is connected with.
func (a *Authority) RenewMachine(cert *x509.Certificate, request []byte) ([]byte, error) {
	return a.renew(hosts, cert, request)
}

// renew makes the certificate that comes after cert. That the caller has cert was
// verified when it connected.
func (a *Authority) renew(k kind, cert *x509.Certificate, request []byte) ([]byte, error) {
	name := cert.Subject.CommonName
	a.members.Lock()
	defer a.members.Unlock()
	m, err := a.read(k, name)
	if err != nil {
		return nil, err
	}
	serial := cert.SerialNumber.Text(16)
	if !slices.ContainsFunc(m.Certificates, func(c issued) bool { return c.Serial == serial }) {
		return nil, fmt.Errorf("renew the certificate of %s %s: it was revoked, or has been renewed", k, name)
	}
	// One that was asked for before and never used did not reach who asked.
	m.Certificates = slices.DeleteFunc(m.Certificates, func(c issued) bool { return c.Replaces == serial })
	return a.issue(k, name, m, serial, request)
}

// issue makes a certificate and adds it to what is remembered of its owner, which
// [Authority.members] guards.
func (a *Authority) issue(k kind, name string, m *member, replaces string, request []byte) ([]byte, error) {
	csr, err := x509.ParseCertificateRequest(request)
	if err == nil {
		err = csr.CheckSignature()
	}
	if err != nil {
		return nil, fmt.Errorf("certificate request of %s %s: %w", k, name, err)
	}
	life := machineLife
	if k == users {
		life = userLife
	}
	template, err := certificate(name, life)
	if err != nil {
		return nil, err
	}
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	if k == users {
		template.URIs = append(template.URIs, userURI(name, m.Role))
	} else {
		template.DNSNames = []string{name}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, csr.PublicKey, a.key)
	if err != nil {
		return nil, fmt.Errorf("make the certificate of %s %s: %w", k, name, err)
	}
	m.Certificates = append(m.Certificates, issued{Serial: template.SerialNumber.Text(16), Expires: template.NotAfter.UTC().Truncate(time.Second), Replaces: replaces})
	m.Removed = time.Time{}
	if err := a.write(k, name, m); err != nil {
		return nil, err
	}
	return der, nil
}

// CheckMachine refuses an agent's connection that is not, or no longer, with a host
// that has joined.
func (a *Authority) CheckMachine(cs tls.ConnectionState) error {
	if len(cs.VerifiedChains) == 0 {
		return errors.New("it has no certificate: a host joins with a token first")
	}
	cert := cs.VerifiedChains[0][0]
	host := cert.Subject.CommonName
	if len(cert.URIs) > 0 {
		return fmt.Errorf("%s is a user, not a host", host)
	}
	if err := CheckName(host); err != nil {
		return err
	}
	a.members.Lock()
	defer a.members.Unlock()
	m, err := a.read(hosts, host)
	switch {
	case err != nil:
		return err
	case len(m.Certificates) == 0:
		return fmt.Errorf("host %s has not joined, or was put out again", host)
	}
	known, err := a.used(hosts, host, m, cert)
	if err == nil && !known {
		err = fmt.Errorf("host %s has joined anew, or renewed it, since it was given this certificate", host)
	}
	return err
}

// Machines are the names of the hosts that have joined, sorted.
func (a *Authority) Machines() ([]string, error) {
	a.members.Lock()
	defer a.members.Unlock()
	all, err := a.list(hosts)
	return slices.Sorted(maps.Keys(all)), err
}

// RemoveMachine makes a host's certificates, and the tokens that were made before and
// are good for it, worthless. It tells whether the host had joined.
func (a *Authority) RemoveMachine(host string) (bool, error) { return a.remove(hosts, host) }
