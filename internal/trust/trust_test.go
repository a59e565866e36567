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
	a, err := OpenAuthority(Directory(dir))
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
	if st, err := os.Stat(filepath.Join(state, "host.pem")); err != nil || st.Mode().Perm() != 0o600 {
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
	forged.Name = "beta"
	longer := *bound
	longer.Expires = bound.Expires.Add(time.Hour)
	raised := *userToken(t, a, User{"alpha", Experimenter})
	raised.Role = Operator
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
		"raised":    {&raised, "alpha", 0, false},
		"other's":   {token(t, other, ""), "alpha", 0, false},
	} {
		t.Run(name, func(t *testing.T) {
			read, err := ParseToken(test.token.String())
			if err != nil {
				t.Fatal(err)
			}
			err = a.checkToken(read, test.host, &member{}, time.Now().Add(test.after))
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
	for _, u := range []User{{"", Operator}, {"alice", ""}, {"alice", "root"}, {"al/ice", Operator}} {
		if _, err := a.NewUserToken(u, time.Hour); err == nil {
			t.Errorf("a token for %v", u)
		}
	}
}

func FuzzParseToken(f *testing.F) {
	a, err := OpenAuthority(Directory(f.TempDir()))
	if err != nil {
		f.Fatal(err)
	}
	for _, host := range []string{"", "alpha", strings.Repeat("x", maxName)} {
		k, err := a.NewToken(host, time.Hour)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(k.String())
	}
	k, err := a.NewUserToken(User{"alice", Experimenter}, time.Hour)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(k.String())
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

// A host that is put out is not taken in with what it has, nor with tokens that were
// made before.
func TestRemoveMachine(t *testing.T) {
	a := authority(t, t.TempDir())
	before := token(t, a, "")
	id, err := join(t, a, t.TempDir(), "alpha", before)
	if err != nil {
		t.Fatal(err)
	}
	config, err := id.Config()
	if err != nil {
		t.Fatal(err)
	}
	if found, err := a.RemoveMachine("alpha"); !found || err != nil {
		t.Fatal(found, err)
	}
	if _, _, err := handshake(t, a, config); err == nil {
		t.Error("its certificate is still good")
	}
	if names, err := a.Machines(); err != nil || len(names) != 0 {
		t.Error(names, err)
	}
	if found, err := a.RemoveMachine("alpha"); found || err != nil {
		t.Error(found, err)
	}
	if _, err := join(t, a, t.TempDir(), "alpha", before); !errors.Is(err, ErrToken) {
		t.Errorf("it joins with a token of before: %v", err)
	}
	if _, err := join(t, a, t.TempDir(), "beta", before); err != nil {
		t.Errorf("another does not: %v", err)
	}
	if _, err := join(t, a, t.TempDir(), "alpha", token(t, a, "")); err != nil {
		t.Errorf("with a new token: %v", err)
	}
}

// A host's certificate is renewed, and the one before is good until the new one is
// used: whatever got lost on the way.
func TestRenewMachine(t *testing.T) {
	dir := t.TempDir()
	a, state := authority(t, dir), t.TempDir()
	id, err := join(t, a, state, "alpha", token(t, a, ""))
	if err != nil {
		t.Fatal(err)
	}
	config, err := id.Config()
	if err != nil {
		t.Fatal(err)
	}
	old, err := id.read()
	if err != nil {
		t.Fatal(err)
	}
	with := func(c *credential) *tls.Config {
		fixed := config.Clone()
		fixed.GetClientCertificate = nil
		fixed.Certificates = []tls.Certificate{c.pair}
		return fixed
	}
	renew := func(_ context.Context, request []byte) ([]byte, error) { return a.RenewMachine(old.pair.Leaf, request) }
	lost := errors.New("the answer is lost")
	if err := id.Renew(t.Context(), func(ctx context.Context, request []byte) ([]byte, error) {
		_, err := renew(ctx, request)
		return nil, errors.Join(err, lost)
	}); !errors.Is(err, lost) {
		t.Fatal(err)
	}
	if _, _, err := handshake(t, a, config); err != nil {
		t.Fatalf("after a renewal whose answer was lost: %v", err)
	}
	if err := id.Renew(t.Context(), renew); err != nil {
		t.Fatal(err)
	}
	if _, _, err := handshake(t, a, with(old)); err != nil {
		t.Errorf("the old one, before the new one is used: %v", err)
	}
	if theirs, _, err := handshake(t, a, config); err != nil || theirs.VerifiedChains[0][0].Equal(old.pair.Leaf) {
		t.Errorf("the new one is not used, or not taken: %v", err)
	}
	a = authority(t, dir) // the server is started anew
	if _, _, err := handshake(t, a, with(old)); err == nil {
		t.Error("the old one is good when the new one has been used")
	}
	if _, _, err := handshake(t, a, config); err != nil {
		t.Error(err)
	}
	if err := id.Renew(t.Context(), renew); err == nil {
		t.Error("a certificate that is worthless is renewed")
	}
}

// What violins before this kept: on the server a serial number, on the host two files.
func TestFirstViolins(t *testing.T) {
	dir, state := t.TempDir(), t.TempDir()
	a := authority(t, dir)
	id, err := join(t, a, state, "alpha", token(t, a, ""))
	if err != nil {
		t.Fatal(err)
	}
	c, err := id.read()
	if err != nil {
		t.Fatal(err)
	}
	key, err := encodeKey(c.pair.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	for path, b := range map[string][]byte{
		filepath.Join(dir, "hosts", "alpha"): []byte(c.pair.Leaf.SerialNumber.Text(16)),
		filepath.Join(state, "host.key"):     key,
		filepath.Join(state, "host.crt"):     encodeCertificates(c.pair.Certificate[0], c.authority.Raw),
	} {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(id.path()); err != nil {
		t.Fatal(err)
	}
	config, err := id.Config()
	if err != nil {
		t.Fatal(err)
	}
	if theirs, _, err := handshake(t, a, config); err != nil || Machine(theirs) != "alpha" {
		t.Error(Machine(theirs), err)
	}
	if err := id.Renew(t.Context(), func(_ context.Context, request []byte) ([]byte, error) { return a.RenewMachine(c.pair.Leaf, request) }); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(state, "host.crt")); err == nil {
		t.Error("two certificates")
	}
	if theirs, _, err := handshake(t, a, config); err != nil || Machine(theirs) != "alpha" {
		t.Error(Machine(theirs), err)
	}
}

func userToken(t *testing.T, a *Authority, u User) *Token {
	t.Helper()
	k, err := a.NewUserToken(u, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// login logs a user in.
func login(t *testing.T, a *Authority, logins Logins, k *Token) (*Login, error) {
	t.Helper()
	theirs, _, err := handshake(t, a, LoginConfig(k))
	if err != nil {
		return nil, err
	}
	if _, _, err := a.User(theirs); !errors.Is(err, ErrStranger) {
		t.Errorf("who has no certificate is no stranger: %v", err)
	}
	return logins.Login(t.Context(), "office:7000", k, func(_ context.Context, request []byte) ([]byte, []byte, error) {
		_, der, err := a.AdmitUser(k.String(), request)
		return der, a.Certificate(), err
	})
}

// known is who a login is to a server, in a new connection.
func known(t *testing.T, a *Authority, l *Login) (User, error) {
	t.Helper()
	theirs, _, err := handshake(t, a, l.Config())
	if err != nil {
		return User{}, err
	}
	u, _, err := a.User(theirs)
	return u, err
}

func TestUsers(t *testing.T) {
	a := authority(t, t.TempDir())
	alice := User{"alice", Experimenter}
	before := userToken(t, a, alice)
	logins := OpenLogins(filepath.Join(t.TempDir(), "servers"))
	if server, err := logins.Current(); server != "" || err != nil {
		t.Error(server, err)
	}
	if _, err := logins.Open("office:7000"); !errors.Is(err, ErrStranger) {
		t.Error(err)
	}
	l, err := login(t, a, logins, before)
	if err != nil {
		t.Fatal(err)
	}
	if u, err := known(t, a, l); u != alice || err != nil {
		t.Error(u, err)
	}
	if l, err = logins.Open("office:7000"); err != nil || l.User != alice {
		t.Fatal(l, err)
	}
	if server, err := logins.Current(); server != "office:7000" || err != nil {
		t.Error(server, err)
	}
	for _, name := range []string{CertificateFile, AuthorityFile} {
		if st, err := os.Stat(filepath.Join(logins.Dir("office:7000"), name)); err != nil || st.Mode().Perm() != 0o600 {
			t.Error(name, "is not its owner's alone:", st, err)
		}
	}
	if all, err := a.Users(); err != nil || len(all) != 1 || all[0].User != alice || all[0].Certificates != 1 {
		t.Error(all, err)
	}

	// Another login, beside it; and renewed.
	elsewhere, err := login(t, a, OpenLogins(t.TempDir()), before)
	if err != nil {
		t.Fatal(err)
	}
	old := *l
	if err := l.Renew(t.Context(), func(_ context.Context, request []byte) ([]byte, error) { return a.RenewUser(l.Certificate(), request) }); err != nil {
		t.Fatal(err)
	}
	for _, who := range []*Login{&old, l, elsewhere} {
		if u, err := known(t, a, who); u != alice || err != nil {
			t.Error(u, err)
		}
	}
	if _, err := known(t, a, &old); !errors.Is(err, ErrStranger) {
		t.Errorf("the certificate of before the renewal is still good: %v", err)
	}

	// Logged out here, and not elsewhere.
	theirs, _, err := handshake(t, a, l.Config())
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(a.Revoke(l.Certificate()), logins.Forget("office:7000")); err != nil {
		t.Fatal(err)
	}
	if _, _, err := a.User(theirs); !errors.Is(err, ErrStranger) {
		t.Errorf("a connection lasts longer than its certificate: %v", err)
	}
	if server, err := logins.Current(); server != "" || err != nil {
		t.Error(server, err)
	}
	if u, err := known(t, a, elsewhere); u != alice || err != nil {
		t.Error(u, err)
	}

	// Put out.
	if found, err := a.RemoveUser("alice"); !found || err != nil {
		t.Fatal(found, err)
	}
	if _, err := known(t, a, elsewhere); !errors.Is(err, ErrStranger) {
		t.Errorf("who was put out is still known: %v", err)
	}
	if _, err := login(t, a, logins, before); !errors.Is(err, ErrToken) {
		t.Errorf("who was put out logs in with a token of before: %v", err)
	}
	if _, err := login(t, a, logins, userToken(t, a, User{"alice", Operator})); err != nil {
		t.Error(err)
	}
}

// What is good for one is not good for another.
func TestNotTheSame(t *testing.T) {
	a, other := authority(t, t.TempDir()), authority(t, t.TempDir())
	logins := OpenLogins(t.TempDir())
	if _, err := login(t, a, logins, token(t, a, "alice")); !errors.Is(err, ErrToken) {
		t.Errorf("a host's token makes a user: %v", err)
	}
	alpha := userToken(t, a, User{"alpha", Operator})
	if _, err := join(t, a, t.TempDir(), "alpha", alpha); !errors.Is(err, ErrToken) {
		t.Errorf("a user's token makes a host: %v", err)
	}
	l, err := login(t, a, logins, alpha)
	if err != nil {
		t.Fatal(err)
	}
	id, err := join(t, a, t.TempDir(), "alpha", token(t, a, ""))
	if err != nil {
		t.Fatal(err)
	}
	agent := l.Config()
	agent.NextProtos = []string{AgentProtocol}
	if _, _, err := handshake(t, a, agent); err == nil {
		t.Error("a user passes for the host of that name")
	}
	config, err := id.Config()
	if err != nil {
		t.Fatal(err)
	}
	config.NextProtos = nil
	theirs, _, err := handshake(t, a, config)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := a.User(theirs); !errors.Is(err, ErrStranger) {
		t.Errorf("a host passes for the user of that name: %v", err)
	}
	if _, err := known(t, other, l); err == nil {
		t.Error("another authority's user is known")
	}
	if _, err := login(t, other, logins, userToken(t, a, User{"bob", Operator})); err == nil || !strings.Contains(err.Error(), "not the server") {
		t.Errorf("a token goes to another's server: %v", err)
	}
	if _, err := login(t, a, logins, userToken(t, a, User{"alpha", Experimenter})); !errors.Is(err, ErrToken) {
		t.Errorf("an operator becomes an experimenter, and could become an operator again: %v", err)
	}
}
