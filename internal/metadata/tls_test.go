package metadata

import (
	"context"
	"net/netip"
	"os/exec"
	"testing"
	"time"

	"violin/internal/metadata/etcdtest"
)

// Of a cluster that takes who has a certificate, and is known by one.
func TestTLS(t *testing.T) {
	cluster := etcdtest.StartAt(t, etcdtest.Place{Address: netip.MustParseAddr("127.0.0.1"), Start: (*exec.Cmd).Start})
	another := etcdtest.NewAuthority(t, t.TempDir(), "another")
	cert, key := another.Issue(t, "stranger")
	etcdtest.Await(t, "etcd answers", func() bool {
		_, err := open(t, Config{Endpoints: cluster.Endpoints(), Name: "alpha", CA: cluster.CA, Cert: cluster.Cert, Key: cluster.Key}).Leader(t.Context())
		return err == nil
	})

	for _, try := range []struct {
		ca, cert, key string
		ok            bool
	}{{cluster.CA, cluster.Cert, cluster.Key, true}, {another.File, cluster.Cert, cluster.Key, false}, {cluster.CA, cert, key, false}, {cluster.CA, "", "", false}, {"", cluster.Cert, cluster.Key, false}} {
		cfg := Config{Endpoints: cluster.Endpoints(), Name: "alpha", CA: try.ca, Cert: try.cert, Key: try.key}
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
	for _, cfg := range []Config{{CA: cluster.CA + ".none"}, {CA: cluster.Key}, {Cert: cluster.Cert, Key: key}} {
		cfg.Endpoints, cfg.Logger = cluster.Endpoints(), quiet()
		if c, err := Open(t.Context(), cfg); err == nil || c != nil {
			t.Errorf("%+v", cfg)
		}
	}
}
