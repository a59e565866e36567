package trust

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func authority(t *testing.T, dir string) *Authority {
	t.Helper()
	a, err := OpenAuthority(dir)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func token(t *testing.T, a *Authority, host string) *Token {
	t.Helper()
	k, err := a.NewToken(host, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// handshake connects a client to an authority's server, and returns what both ends
// know and why it failed.
func handshake(t *testing.T, a *Authority, client *tls.Config) (theirs, ours tls.ConnectionState, err error) {
	t.Helper()
	config, err := a.ServerConfig()
	if err != nil {
		t.Fatal(err)
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", config)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	served := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			served <- err
			return
		}
		defer c.Close()
		err = c.(*tls.Conn).Handshake()
		theirs = c.(*tls.Conn).ConnectionState()
		served <- err
	}()
	var c net.Conn
	if c, err = tls.Dial("tcp", l.Addr().String(), client); err == nil {
		defer c.Close()
		ours = c.(*tls.Conn).ConnectionState()
	}
	return theirs, ours, errors.Join(err, <-served)
}

// join makes a host join.
func join(t *testing.T, a *Authority, dir, host string, k *Token) (*Identity, error) {
	t.Helper()
	id, err := OpenIdentity(dir, host)
	if err != nil {
		t.Fatal(err)
	}
	theirs, ours, err := handshake(t, a, JoinConfig(k))
	if err != nil {
		return nil, err
	}
	if Machine(theirs) != "" {
		t.Errorf("a host without certificate passes for %q", Machine(theirs))
	}
	return id, id.Join(t.Context(), k, ours, func(_ context.Context, request []byte) ([]byte, error) {
		return a.Admit(k.String(), host, request)
	})
}

func TestJoin(t *testing.T) {
	dir, state := t.TempDir(), t.TempDir()
	a := authority(t, dir)
	id, err := join(t, a, state, "alpha", token(t, a, ""))
	if err != nil {
		t.Fatal(err)
	}
	a = authority(t, dir) // the server is started anew
	config, err := id.Config()
	if err != nil {
		t.Fatal(err)
	}
	theirs, _, err := handshake(t, a, config)
	if err != nil || Machine(theirs) != "alpha" {
		t.Errorf("%q, %v", Machine(theirs), err)
	}
	if ok, err := id.Joined(token(t, a, "")); !ok || err != nil {
		t.Error(ok, err)
	}
	if names, err := a.Machines(); err != nil || len(names) != 1 || names[0] != "alpha" {
		t.Error(names, err)
	}
	again, err := join(t, a, t.TempDir(), "alpha", token(t, a, ""))
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := handshake(t, a, config); err == nil || !strings.Contains(err.Error(), "joined anew") {
		t.Errorf("the certificate of before is still good: %v", err)
	}
	if config, err = again.Config(); err != nil {
		t.Fatal(err)
	}
	other := authority(t, t.TempDir())
	if ok, err := id.Joined(token(t, other, "")); ok || err != nil {
		t.Error("it passes for joined to another server", err)
	}
	if _, _, err := handshake(t, other, config); err == nil {
		t.Error("another authority's server and host trust each other")
	}
	if st, err := os.Stat(filepath.Join(state, "host.key")); err != nil || st.Mode().Perm() != 0o600 {
		t.Error("the host's key is not its owner's alone:", st, err)
	}
}

// A server that the token was not made by gets to see nothing of it.
func TestJoinsItsServerOnly(t *testing.T) {
	a, other := authority(t, t.TempDir()), authority(t, t.TempDir())
	if _, err := join(t, other, t.TempDir(), "alpha", token(t, a, "")); err == nil || !strings.Contains(err.Error(), "not the server") {
		t.Error(err)
	}
}

func TestNoCertificateNoAgent(t *testing.T) {
	a := authority(t, t.TempDir())
	config := JoinConfig(token(t, a, ""))
	config.NextProtos = []string{AgentProtocol}
	if theirs, _, err := handshake(t, a, config); err == nil || Machine(theirs) != "" {
		t.Error("a host without certificate is an agent")
	}
}

func TestTokens(t *testing.T) {
	a, other := authority(t, t.TempDir()), authority(t, t.TempDir())
	bound := token(t, a, "alpha")
	forged := *bound
	forged.Host = "beta"
	longer := *bound
	longer.Expires = bound.Expires.Add(time.Hour)
	for name, test := range map[string]struct {
		token *Token
		host  string
		after time.Duration
		good  bool
	}{
		"any":       {token(t, a, ""), "beta", 0, true},
		"bound":     {bound, "alpha", 0, true},
		"elsewhere": {bound, "beta", 0, false},
		"expired":   {bound, "alpha", time.Hour + time.Second, false},
		"forged":    {&forged, "beta", 0, false},
		"prolonged": {&longer, "alpha", 0, false},
		"other's":   {token(t, other, ""), "alpha", 0, false},
	} {
		t.Run(name, func(t *testing.T) {
			read, err := ParseToken(test.token.String())
			if err != nil {
				t.Fatal(err)
			}
			err = a.checkToken(read, test.host, time.Now().Add(test.after))
			if (err == nil) != test.good || err != nil && !errors.Is(err, ErrToken) {
				t.Error(err)
			}
		})
	}
	for _, ttl := range []time.Duration{0, -time.Hour, MaxTTL + 1} {
		if _, err := a.NewToken("", ttl); err == nil {
			t.Errorf("a token for %s", ttl)
		}
	}
}

func FuzzParseToken(f *testing.F) {
	a, err := OpenAuthority(f.TempDir())
	if err != nil {
		f.Fatal(err)
	}
	for _, host := range []string{"", "alpha", strings.Repeat("x", maxHost)} {
		k, err := a.NewToken(host, time.Hour)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(k.String())
	}
	f.Add(tokenPrefix)
	f.Fuzz(func(t *testing.T, s string) {
		k, err := ParseToken(s)
		if err != nil {
			if k != nil || !errors.Is(err, ErrToken) {
				t.Fatalf("%v and %v", k, err)
			}
			return
		}
		if k.String() != s {
			t.Fatalf("%q is read as %q", s, k)
		}
	})
}
