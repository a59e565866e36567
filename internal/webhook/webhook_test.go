package webhook

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestPost(t *testing.T) {
	for _, c := range []struct {
		why     string
		answers []int // one an attempt; the last again and again
		tries   int
		ok      bool
	}{
		{"taken", []int{204}, 1, true},
		{"taken at last", []int{500, 503, 429, 200}, 4, true},
		{"never", []int{500}, 4, false},
		{"refused for good", []int{503, 404}, 2, false},
		{"a redirect that leads nowhere", []int{304}, 1, false},
	} {
		var bodies []string
		h := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			b, _ := io.ReadAll(r.Body)
			bodies = append(bodies, r.Method+" "+r.Header.Get("Content-Type")+" "+string(b))
			w.WriteHeader(c.answers[min(len(bodies), len(c.answers))-1])
		}))
		p := Poster{Pauses: make([]time.Duration, 3)}
		err := p.Post(t.Context(), h.URL+"/hook?token=secret", []byte(`{"kind":"x"}`))
		h.Close()
		if (err == nil) != c.ok || len(bodies) != c.tries {
			t.Errorf("%s: %v after %d attempts, want %d", c.why, err, len(bodies), c.tries)
		}
		if slices.ContainsFunc(bodies, func(b string) bool { return b != `POST application/json {"kind":"x"}` }) {
			t.Errorf("%s: %q", c.why, bodies)
		}
		if err != nil && strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: the error tells the secret: %v", c.why, err)
		}
	}
	// Nobody there.
	h := httptest.NewServer(http.NotFoundHandler())
	h.Close()
	p := Poster{Pauses: make([]time.Duration, 1)}
	if err := p.Post(t.Context(), h.URL+"?token=secret", nil); err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("nobody there: %v", err)
	}
	// Given up.
	ctx, cancel := context.WithCancel(t.Context())
	h = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		cancel()
		w.WriteHeader(http.StatusServiceUnavailable)
	}))
	defer h.Close()
	p = Poster{Pauses: []time.Duration{time.Hour}}
	if err := p.Post(ctx, h.URL, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("given up: %v", err)
	}
}

func TestCheck(t *testing.T) {
	for to, ok := range map[string]bool{"http://localhost:8080/x": true, "https://example.org": true, "": false, "example.org": false, "file:///etc/passwd": false, "http://": false, ":": false} {
		if err := Check(to); (err == nil) != ok {
			t.Errorf("%q: %v", to, err)
		}
	}
}
