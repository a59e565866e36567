package remote

import (
	"crypto/x509"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// A host renews its certificate by itself when it is time to, connects with the new one
// and is known by it alone from then on.
func TestRenewal(t *testing.T) {
	var due atomic.Bool
	w := newWorldAt(t, func() time.Time {
		if due.Swap(false) {
			return time.Now().Add(300 * 24 * time.Hour) // of the certificate's 365
		}
		return time.Now()
	})
	certificate := func() *x509.Certificate {
		t.Helper()
		cert, err := w.identity.Certificate()
		if err != nil {
			t.Fatal(err)
		}
		return cert
	}
	reconnect := func() {
		w.cable.unplug(true)
		w.await(t, false)
		w.cable.unplug(false)
		w.await(t, true)
	}
	first := certificate()
	due.Store(true)
	reconnect()
	for deadline := time.Now().Add(time.Minute); certificate().Equal(first); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("in vain: the certificate is renewed")
		}
	}
	reconnect()
	if _, err := w.hub.cfg.Authority.RenewMachine(first, nil); err == nil || !strings.Contains(err.Error(), "has been renewed") {
		t.Errorf("the first certificate is still good: %v", err)
	}
	if _, err := w.hub.cfg.Authority.RenewMachine(certificate(), nil); err == nil || !strings.Contains(err.Error(), "request") {
		t.Errorf("the new one is not good: %v", err)
	}
}

// A host that is put out is cut off and not taken in again; while a slice runs on it, by
// force only.
func TestRemove(t *testing.T) {
	w := newWorld(t)
	var runs *RunsThereError
	if found, err := w.hub.Remove("alpha", false); !found || !errors.As(err, &runs) || runs.Slice != "s" {
		t.Fatal(found, err)
	}
	w.await(t, true)
	j := w.hub.host("alpha")
	j.mu.Lock()
	l := j.link
	j.mu.Unlock()
	if found, err := w.hub.Remove("alpha", true); !found || err != nil {
		t.Fatal(found, err)
	}
	<-l.done()
	if hosts, err := w.hub.Hosts(); err != nil || len(hosts) != 0 {
		t.Error(hosts, err)
	}
	if found, err := w.hub.Remove("alpha", true); found || err != nil {
		t.Error("put out twice", found, err)
	}
	// It dials again, and is refused.
	if !j.back(t.Context(), func() time.Duration { return 2 * lastRetry / 10 }) {
		return
	}
	t.Error("it was taken in again")
}
