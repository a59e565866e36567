package metadata

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
)

// issuer is a certificate with its key, in files NAME.crt and NAME.key.
type issuer struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func issue(t *testing.T, dir, name string, by *issuer) *issuer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if by == nil {
		template.IsCA, template.BasicConstraintsValid, template.KeyUsage = true, true, x509.KeyUsageCertSign
		by = &issuer{template, key}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, by.cert, key.Public(), by.key)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for file, block := range map[string]*pem.Block{".crt": {Type: "CERTIFICATE", Bytes: der}, ".key": {Type: "PRIVATE KEY", Bytes: secret}} {
		if err := os.WriteFile(filepath.Join(dir, name+file), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &issuer{cert, key}
}

// Of a cluster that takes who has a certificate, and is known by one.
func TestTLS(t *testing.T) {
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	ca := issue(t, dir, "ca", nil)
	issue(t, dir, "member", ca)
	issue(t, dir, "server", ca)
	issue(t, dir, "stranger", issue(t, dir, "another", nil))

	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	at := url.URL{Scheme: "https", Host: l.Addr().String()}
	l.Close()
	c := embed.NewConfig()
	c.Dir = filepath.Join(dir, "data")
	c.ListenClientUrls, c.AdvertiseClientUrls, c.ListenPeerUrls = []url.URL{at}, []url.URL{at}, nil
	c.ClientTLSInfo = transport.TLSInfo{CertFile: file("member.crt"), KeyFile: file("member.key"), TrustedCAFile: file("ca.crt"), ClientCertAuth: true}
	c.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	e, err := embed.StartEtcd(c)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	<-e.Server.ReadyNotify()

	for _, try := range []struct {
		ca, who string
		ok      bool
	}{{"ca", "server", true}, {"another", "server", false}, {"ca", "stranger", false}, {"ca", "", false}, {"", "server", false}} {
		cfg := Config{Endpoints: []string{at.String()}, Name: "alpha"}
		if try.ca != "" {
			cfg.CA = file(try.ca + ".crt")
		}
		if try.who != "" {
			cfg.Cert, cfg.Key = file(try.who+".crt"), file(try.who+".key")
		}
		client := open(t, cfg)
		ctx := t.Context()
		if !try.ok { // it tries again and again
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, time.Second)
			defer cancel()
		}
		_, err := client.Leader(ctx)
		if (err == nil) != try.ok {
			t.Errorf("%+v: %v", try, err)
		}
	}
	for _, cfg := range []Config{{CA: file("none")}, {CA: file("ca.key")}, {Cert: file("server.crt"), Key: file("member.key")}} {
		cfg.Endpoints, cfg.Logger = []string{at.String()}, quiet()
		if c, err := Open(t.Context(), cfg); err == nil || c != nil {
			t.Errorf("%+v", cfg)
		}
	}
}
