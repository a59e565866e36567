package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"golang.org/x/sys/unix"
)

// BaseURL is what a client made by [Client] is asked for. The host in it is not
// looked up: every request goes to the socket.
const BaseURL = "http://violin"

const (
	healthPath    = "/healthz"
	versionHeader = "Violin-Version"

	// probeTimeout bounds a probe: a server that starves for CPU is slow, one that
	// has not answered after this long hangs.
	probeTimeout = 10 * time.Second
)

// Client makes an HTTP client for the server of these directories. It speaks HTTP/2
// from the first byte, so that streams go both ways; it connects when first used.
func Client(d Dirs) *http.Client {
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	return &http.Client{Transport: &http.Transport{
		Protocols: &protocols,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var dialer net.Dialer
			return dialer.DialContext(ctx, "unix", d.Socket())
		},
	}}
}

// Probe asks whether a server answers and returns its version. If none does, the
// error is [ErrNotRunning]. A server that has answered does not leave for being idle
// until a whole idle period later, so a call that follows at once finds it.
func Probe(ctx context.Context, d Dirs) (version string, err error) {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	client := Client(d)
	defer client.CloseIdleConnections()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, BaseURL+healthPath, nil)
	if err != nil {
		return "", err
	}
	response, err := client.Do(request)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ECONNREFUSED):
		return "", fmt.Errorf("%w (nothing listens on %s)", ErrNotRunning, d.Socket())
	case err != nil:
		return "", fmt.Errorf("ask the server on %s: %w", d.Socket(), err)
	}
	defer response.Body.Close()
	if _, err := io.Copy(io.Discard, io.LimitReader(response.Body, 4096)); err != nil {
		return "", fmt.Errorf("ask the server on %s: %w", d.Socket(), err)
	}
	if response.StatusCode != http.StatusOK {
		return "", fmt.Errorf("%w (the one on %s is leaving: %s)", ErrNotRunning, d.Socket(), response.Status)
	}
	return response.Header.Get(versionHeader), nil
}
