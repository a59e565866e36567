package server

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
	"violin/internal/access"
	"violin/internal/catalog"
	"violin/internal/metadata"
	"violin/internal/metadata/etcdtest"
	"violin/internal/trust"
)

func TestMain(m *testing.M) {
	etcdtest.Main()
	os.Exit(m.Run())
}

// office is two servers of one store, with addresses of their own.
type office struct {
	cluster *etcdtest.Cluster
	shared  string
	lease   time.Duration
	address map[string]string
}

func newOffice(t *testing.T, members int, lease time.Duration) *office {
	o := &office{cluster: etcdtest.Start(t, members, nil), lease: lease, shared: t.TempDir(), address: map[string]string{}}
	for _, name := range []string{"alpha", "beta"} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		o.address[name] = l.Addr().String()
		l.Close()
	}
	return o
}

func (o *office) config(t *testing.T, name string) Config {
	return Config{
		StateDir: t.TempDir(), Logger: slog.New(slog.DiscardHandler), Listen: o.address[name],
		Storage: Storage{URL: filepath.Join(o.shared, "store"), Passphrase: "the office's"},
		Etcd:    metadata.Config{Endpoints: o.cluster.Endpoints(), Name: name, Address: o.address[name], Lease: o.lease},
	}
}

func (o *office) stand(t *testing.T, name string) *Candidate {
	t.Helper()
	var c *Candidate
	etcdtest.Await(t, name+" stands", func() bool { // the cluster may be coming up
		var err error
		if c, err = Stand(t.Context(), o.config(t, name)); err != nil && !errors.Is(err, metadata.ErrUnavailable) {
			t.Fatal(err)
		}
		return err == nil
	})
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func (c *Candidate) led() *Server {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.server
}

func awaitLead(t *testing.T, c *Candidate) *Server {
	t.Helper()
	etcdtest.Await(t, c.cfg.Etcd.Name+" leads", func() bool { return c.led() != nil })
	return c.led()
}

// Two servers of one store: one leads and the other hands on to it, until it takes its
// place; with the snapshots, the authority, users and events that there were.
func TestStandby(t *testing.T) {
	o := newOffice(t, 1, time.Minute)
	alpha := o.stand(t, "alpha")
	first := awaitLead(t, alpha)
	beta := o.stand(t, "beta")
	if beta.led() != nil || !beta.Busy() {
		t.Fatal("two lead")
	}
	keep(t, first, "1", "one", noon, 1)
	first.events.Append(event("pair"))

	// Over the standby's port one speaks to the leader.
	token, err := first.authority.NewUserToken(trust.User{Name: "alice", Role: trust.Operator}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	logins := trust.OpenLogins(t.TempDir())
	at := func(config *tls.Config) *http.Client {
		config.NextProtos = []string{"h2"}
		return &http.Client{Transport: &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true}}
	}
	url := "https://" + o.address["beta"]
	login, err := logins.Login(t.Context(), o.address["beta"], token, func(ctx context.Context, request []byte) ([]byte, []byte, error) {
		r, err := violinv1connect.NewUserServiceClient(at(trust.LoginConfig(token)), url).Login(ctx, &violinv1.LoginRequest{Token: token.String(), Request: request})
		return r.GetCertificate(), r.GetAuthority(), err
	})
	if err != nil {
		t.Fatal(err)
	}
	snapshots := func() (int, error) {
		c := at(login.Config())
		defer c.CloseIdleConnections()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		r, err := violinv1connect.NewSliceServiceClient(c, url).ListSnapshots(ctx, &violinv1.ListSnapshotsRequest{})
		return len(r.GetSnapshots()), err
	}
	if n, err := snapshots(); err != nil || n != 1 {
		t.Fatalf("%d snapshots, %v", n, err)
	}
	// By its own socket it says who leads.
	local := httptest.NewServer(access.As(access.Caller{Role: trust.Operator}, beta))
	defer local.Close()
	_, err = violinv1connect.NewStoreServiceClient(local.Client(), local.URL).Stats(t.Context(), &violinv1.StatsRequest{})
	if connect.CodeOf(err) != connect.CodeFailedPrecondition || !strings.Contains(err.Error(), "alpha") || !strings.Contains(err.Error(), o.address["alpha"]) {
		t.Errorf("a standby's answer: %v", err)
	}

	// The leader goes.
	if err := alpha.Close(); err != nil {
		t.Fatal(err)
	}
	second := awaitLead(t, beta)
	if second.led.Term() <= first.led.Term() {
		t.Errorf("term %d after %d", second.led.Term(), first.led.Term())
	}
	if n, err := snapshots(); err != nil || n != 1 {
		t.Errorf("%d snapshots, %v", n, err)
	}
	if found, _ := second.events.After(0, "pair"); len(found) != 1 {
		t.Errorf("events %v", found)
	}
	keep(t, second, "2", "two", noon.Add(time.Minute), 2)

	// Who is put out stays so, whoever leads.
	if _, err := second.RemoveUser(t.Context(), &violinv1.RemoveUserRequest{Name: "alice"}); err != nil {
		t.Fatal(err)
	}
	alpha = o.stand(t, "alpha")
	if err := beta.Close(); err != nil {
		t.Fatal(err)
	}
	third := awaitLead(t, alpha)
	if got := strings.Join(snapshotsOf(t, third), " "); got != "1 one 2 two" {
		t.Errorf("%q", got)
	}
	url = "https://" + o.address["alpha"]
	if _, err := snapshots(); connect.CodeOf(err) != connect.CodeUnauthenticated {
		t.Errorf("who was put out is in again: %v", err)
	}
	// A server with an etcd of its own does not begin beside this one.
	if err := alpha.Close(); err != nil {
		t.Fatal(err)
	}
	config := o.config(t, "alpha")
	config.Etcd = metadata.Config{}
	if s, err := New(t.Context(), config); err == nil || s != nil || !strings.Contains(err.Error(), "--etcd "+o.cluster.Endpoints()[0]) {
		t.Errorf("another etcd of the same store: %v", err)
	}
}

// A leader that loses etcd steps down, and leads again when it is back.
func TestStepDown(t *testing.T) {
	o := newOffice(t, 3, metadata.DefaultLease)
	alpha := o.stand(t, "alpha")
	write := func(owner string) error {
		s := alpha.led()
		if s == nil {
			return errors.New("nobody leads")
		}
		return s.catalog.PutRecord(t.Context(), &catalog.Record{Slice: "pair", Owner: owner})
	}
	etcdtest.Await(t, "a record is written", func() bool { return write("alice") == nil })
	term := alpha.led().term
	o.cluster.Kill(0)
	o.cluster.Pause(1)
	if write("bob") == nil {
		t.Error("written without a quorum")
	}
	etcdtest.Await(t, "it leads no more", func() bool { return alpha.led() == nil })
	w := httptest.NewRecorder()
	alpha.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/", nil))
	if w.Code == http.StatusOK || !strings.Contains(w.Body.String(), "no server leads") {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	o.cluster.Resume(1)
	etcdtest.Await(t, "a record is written again", func() bool { return write("carol") == nil })
	second := alpha.led()
	if second.term <= term {
		t.Errorf("term %d after %d", second.term, term)
	}
	records, err := second.catalog.Records(t.Context(), func(_ string, err error) { t.Error(err) })
	if err != nil || records["pair"] == nil || records["pair"].Owner != "carol" {
		t.Errorf("%v, %v", records, err)
	}
}
