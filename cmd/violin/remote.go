package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"connectrpc.com/connect"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
	"violin/internal/trust"
)

// localServer is what --server says for the server of this machine.
const localServer = "local"

const (
	dialBound = 10 * time.Second
	// A call on which nothing comes for pingAfter has its connection tried, which is lost
	// if nothing comes for pingBound either.
	pingAfter, pingBound = 15 * time.Second, 15 * time.Second
)

// logins are what the user keeps of servers elsewhere.
func (a *app) logins() (trust.Logins, error) {
	dir, err := os.UserConfigDir()
	if err != nil {
		return trust.Logins{}, fmt.Errorf("find where logins are kept: %w", err)
	}
	return trust.OpenLogins(filepath.Join(dir, "violin", "servers")), nil
}

// remote is the address of the server elsewhere that is meant, or several with commas
// between of servers that stand by for each other; empty for that of this
// machine. What the command line says comes before the environment, and both before
// the last login. Who names a local server's directory means that.
func (a *app) remote() (string, error) {
	address := a.serverAddress
	if !a.given("server") && a.given("run-dir", "state-dir") {
		return "", nil
	}
	if address == "" {
		if os.Getenv("VIOLIN_RUN_DIR") != "" {
			return "", nil
		}
		logins, err := a.logins()
		if err != nil {
			return "", nil // without a home, there is no login either
		}
		return logins.Current()
	}
	if address == localServer {
		return "", nil
	}
	if err := checkAddresses(address); err != nil {
		return "", &failure{code: exitUsage, err: fmt.Errorf("--server: %w", err)}
	}
	return address, nil
}

// given tells whether one of these flags is on the command line.
func (a *app) given(flags ...string) bool {
	for _, name := range flags {
		if f := a.flags.Lookup(name); f != nil && f.Changed {
			return true
		}
	}
	return false
}

// checkAddresses is checkAddress for one or more, with commas between.
func checkAddresses(addresses string) error {
	for address := range strings.SplitSeq(addresses, ",") {
		if err := checkAddress(address); err != nil {
			return err
		}
	}
	return nil
}

func checkAddress(address string) error {
	host, port, err := net.SplitHostPort(address)
	if err != nil || host == "" || port == "" || strings.ContainsAny(address, "/@, ") {
		return fmt.Errorf("%q is no HOST:PORT", address)
	}
	return nil
}

// here refuses what can only be done on the server's own machine.
func (a *app) here(what, why string) error {
	address, err := a.remote()
	if err != nil || address == "" {
		return err
	}
	return &failure{code: exitUsage, err: fmt.Errorf("%s %s, and the server is %s", what, why, address),
		hint: "Run it on the server's machine, or say --server local if this machine is meant."}
}

// httpsClient connects to the first of servers, with commas between, that can be reached,
// whichever a URL names: one leads, and others hand on to it.
func httpsClient(config *tls.Config, servers string) *http.Client {
	var protocols http.Protocols
	protocols.SetHTTP2(true) // streams go both ways
	config.NextProtos = []string{"h2"}
	dial := func(ctx context.Context, network, _ string) (net.Conn, error) {
		d := tls.Dialer{NetDialer: &net.Dialer{}, Config: config}
		var errs []error
		for address := range strings.SplitSeq(servers, ",") {
			ctx, cancel := context.WithTimeout(ctx, dialBound)
			c, err := d.DialContext(ctx, network, address)
			cancel()
			if err == nil {
				return c, nil
			}
			errs = append(errs, err)
		}
		if len(errs) == 1 {
			return nil, errs[0]
		}
		return nil, errors.Join(errs...)
	}
	return &http.Client{Transport: &http.Transport{
		Protocols: &protocols, DialTLSContext: dial,
		HTTP2: &http.HTTP2Config{SendPingTimeout: pingAfter, PingTimeout: pingBound},
	}}
}

// baseURL is what the URLs of calls to servers begin with; see [httpsClient].
func baseURL(servers string) string {
	first, _, _ := strings.Cut(servers, ",")
	return "https://" + first
}

// dialRemote connects to the server elsewhere that is meant. Without one, the client is
// nil.
func (a *app) dialRemote(ctx context.Context) (violinv1connect.SliceServiceClient, error) {
	address, err := a.remote()
	if err != nil || address == "" {
		return nil, err
	}
	if a.connection != nil {
		return violinv1connect.NewSliceServiceClient(a.connection, a.base), nil
	}
	logins, err := a.logins()
	if err != nil {
		return nil, err
	}
	login, err := logins.Open(address)
	if err == nil && login.Expired() {
		err = fmt.Errorf("the certificate of user %s for %s expired at %s; an operator makes a token for another: `violin token create --user %s`",
			login.User.Name, address, login.Certificate().NotAfter.UTC().Format(time.RFC3339), login.User.Name)
	}
	if err != nil {
		return nil, &failure{code: exitDenied, err: err}
	}
	a.connection, a.base = httpsClient(login.Config(), address), baseURL(address)
	c := violinv1connect.NewSliceServiceClient(a.connection, a.base)
	theirs, err := c.Version(ctx, &violinv1.VersionRequest{})
	if err != nil {
		return nil, a.explainDial(address, err)
	}
	if ours := violinVersion(); theirs.GetVersion() != ours {
		a.note("the server %s is violin %s, this is %s", address, theirs.GetVersion(), ours)
	}
	a.renew(ctx, login)
	return c, nil
}

// explainDial says why a server was not reached.
func (a *app) explainDial(address string, err error) error {
	var coded *connect.Error
	if errors.As(err, &coded) {
		if connect.IsWireError(coded) {
			return err
		}
		err = errors.New(coded.Message())
	}
	var alert tls.AlertError
	var verify *tls.CertificateVerificationError
	switch {
	case errors.As(coded, &alert):
		return &failure{code: exitDenied, err: fmt.Errorf("server %s does not take the certificate that was given for it: %w", address, err),
			hint: "Is it the server that you logged in to? 'violin login' with a new token makes the login anew."}
	case errors.As(coded, &verify):
		return &failure{code: exitUnreachable, err: fmt.Errorf("what answers at %s is not the server that you logged in to: %w", address, err)}
	}
	return &failure{code: exitUnreachable, err: fmt.Errorf("reach server %s: %w", address, err),
		hint: "--server says which server is meant, and 'local' is that of this machine."}
}

// renew gets the user the next certificate, if it is time to. If that fails, this one
// will do for a while.
func (a *app) renew(ctx context.Context, login *trust.Login) {
	if time.Now().Before(trust.RenewalDue(login.Certificate())) {
		return
	}
	users := violinv1connect.NewUserServiceClient(a.connection, a.base)
	err := login.Renew(ctx, func(ctx context.Context, request []byte) ([]byte, error) {
		r, err := users.Renew(ctx, &violinv1.RenewRequest{Request: request})
		return r.GetCertificate(), err
	})
	if err != nil {
		a.note("the certificate for %s, which expires at %s, was not renewed: %v", login.Server, login.Certificate().NotAfter.UTC().Format(time.RFC3339), err)
	}
}
