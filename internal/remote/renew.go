package remote

import (
	"context"
	"crypto/x509"
	"fmt"
	"sync"
	"time"

	"connectrpc.com/connect"

	violinv1 "violin/api/violin/v1"
	"violin/api/violin/v1/violinv1connect"
	"violin/internal/trust"
)

const (
	// renewRetry is how long after an attempt a certificate that was not renewed is tried
	// to be renewed again, and renewCheck how often it is looked at: a clock may be set.
	renewRetry, renewCheck = 10 * time.Minute, time.Hour
)

// renewal is what an agent renews its certificate by, over one connection.
type renewal struct {
	h *Hub

	mu   sync.Mutex
	cert *x509.Certificate // that it connected with, or was given since
}

// RenewHost implements the agents' protocol.
func (r *renewal) RenewHost(_ context.Context, req *violinv1.RenewHostRequest) (*violinv1.RenewHostResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	der, err := r.h.cfg.Authority.RenewMachine(r.cert, req.GetRequest())
	if err != nil {
		return nil, connect.NewError(connect.CodePermissionDenied, err)
	}
	if r.cert, err = x509.ParseCertificate(der); err != nil {
		return nil, err
	}
	r.h.log.Info("the certificate of a host is renewed", "host", r.cert.Subject.CommonName)
	return &violinv1.RenewHostResponse{Certificate: der}, nil
}

// renew sees to it, while there is a connection, that the host's certificate does not
// expire.
func (h *Host) renew(ctx context.Context, client violinv1connect.RenewalServiceClient) {
	for {
		wait, err := h.renewDue(ctx, client)
		if err != nil && ctx.Err() == nil {
			h.log.Warn("this host's certificate was not renewed; trying again", "in", wait, "err", err)
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
	}
}

// renewDue renews the certificate if it is time to, and tells when to look again.
func (h *Host) renewDue(ctx context.Context, client violinv1connect.RenewalServiceClient) (time.Duration, error) {
	cert, err := h.cfg.Identity.Certificate()
	if err != nil {
		return renewRetry, err
	}
	if due := trust.RenewalDue(cert).Sub(h.cfg.now()); due > 0 {
		return min(due, renewCheck), nil
	}
	ctx, cancel := context.WithTimeout(ctx, dialBound)
	defer cancel()
	err = h.cfg.Identity.Renew(ctx, func(ctx context.Context, request []byte) ([]byte, error) {
		r, err := client.RenewHost(ctx, &violinv1.RenewHostRequest{Request: request})
		if err != nil {
			return nil, said(err)
		}
		return r.GetCertificate(), nil
	})
	if err != nil {
		return renewRetry, fmt.Errorf("renew it: %w", err)
	}
	h.log.Info("this host's certificate is renewed", "host", h.cfg.Identity.Host)
	return renewCheck, nil
}

// Remove puts a host out: its connection is cut, and it is not taken in again without
// another token. One that a slice runs on is refused, unless by force.
func (h *Hub) Remove(name string, force bool) (found bool, err error) {
	j := h.host(name)
	j.mu.Lock()
	running := j.slices()
	j.mu.Unlock()
	if len(running) > 0 && !force {
		return true, &RunsThereError{Host: name, Slice: running[0]}
	}
	if found, err = h.cfg.Authority.RemoveMachine(name); err != nil || !found {
		return found, err
	}
	j.mu.Lock()
	l := j.link
	j.mu.Unlock()
	if l != nil {
		l.close()
	}
	h.log.Info("a host was put out", "host", name)
	return true, nil
}

// RunsThereError says that a slice runs on a host.
type RunsThereError struct{ Host, Slice string }

func (e *RunsThereError) Error() string {
	return fmt.Sprintf("host %s: slice %q runs there; take it down or suspend it first, or use --force, and the slice loses the host", e.Host, e.Slice)
}
