// Package webhook tells others over HTTP what happened: a POST of a JSON document,
// tried again for a while if nobody takes it.
package webhook

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"
)

// A Poster posts. The zero value is ready.
type Poster struct {
	Client *http.Client // nil: one that waits 10 s for an answer
	// Pauses are the times between attempts; there is one attempt more than pauses.
	// nil: 1 s, 5 s, 30 s and 2 min.
	Pauses []time.Duration
}

var (
	defaultClient = &http.Client{Timeout: 10 * time.Second}
	defaultPauses = []time.Duration{time.Second, 5 * time.Second, 30 * time.Second, 2 * time.Minute}
)

// Check refuses what cannot be posted to.
func Check(to string) error {
	u, err := url.Parse(to)
	if err != nil {
		return fmt.Errorf("webhook: %w", err)
	}
	if u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return fmt.Errorf("webhook %q: want a URL such as https://example.org/hook", to)
	}
	return nil
}

// Post posts a JSON document until it is accepted (2xx), refused for good (any other
// answer below 500 but 408 and 429), or the attempts are used up.
func (p *Poster) Post(ctx context.Context, to string, body []byte) error {
	pauses := p.Pauses
	if pauses == nil {
		pauses = defaultPauses
	}
	for attempt := 0; ; attempt++ {
		again, err := p.post(ctx, to, body)
		if err == nil {
			return nil
		}
		if !again || attempt == len(pauses) {
			return fmt.Errorf("webhook: post to %s, %d times: %w", redacted(to), attempt+1, err)
		}
		select {
		case <-time.After(pauses[attempt]):
		case <-ctx.Done():
			return fmt.Errorf("webhook: post to %s: %w", redacted(to), errors.Join(err, ctx.Err()))
		}
	}
}

func (p *Poster) post(ctx context.Context, to string, body []byte) (again bool, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, to, bytes.NewReader(body))
	if err != nil {
		return false, err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("User-Agent", "violin")
	client := p.Client
	if client == nil {
		client = defaultClient
	}
	resp, err := client.Do(req)
	if err != nil {
		var u *url.Error
		if errors.As(err, &u) {
			err = u.Err // without the URL, which may hold a secret
		}
		return true, err
	}
	defer resp.Body.Close()
	_, _ = io.CopyN(io.Discard, resp.Body, 64<<10) // so that the connection can be used again
	switch c := resp.StatusCode; {
	case c >= 200 && c < 300:
		return false, nil
	case c >= 500, c == http.StatusRequestTimeout, c == http.StatusTooManyRequests:
		return true, fmt.Errorf("it answered %s", resp.Status)
	default:
		return false, fmt.Errorf("it answered %s", resp.Status)
	}
}

// redacted is a URL for a log: where to, without what may be a secret.
func redacted(to string) string {
	u, err := url.Parse(to)
	if err != nil {
		return "a URL that is none"
	}
	return u.Scheme + "://" + u.Host
}
