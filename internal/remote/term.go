package remote

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"strconv"
	"sync"

	"connectrpc.com/connect"

	"violin/internal/record"
)

// termHeader carries the server's term with each of its calls, in decimal.
const termHeader = "Violin-Term"

// asTerm is the interceptor of a server's client, which says of which term it is.
type asTerm uint64

func (t asTerm) say(h http.Header) { h.Set(termHeader, strconv.FormatUint(uint64(t), 10)) }

// WrapUnary implements [connect.Interceptor].
func (t asTerm) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		t.say(req.Header())
		return next(ctx, req)
	}
}

// WrapStreamingClient implements [connect.Interceptor].
func (t asTerm) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return func(ctx context.Context, spec connect.Spec) connect.StreamingClientConn {
		conn := next(ctx, spec)
		t.say(conn.RequestHeader())
		return conn
	}
}

// WrapStreamingHandler implements [connect.Interceptor].
func (asTerm) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return next
}

// fence is the interceptor of an agent, which obeys no server that another one has
// followed: no call of a term that is lower than one that was obeyed, by this agent or
// one before it. Streams are judged by each of their messages.
type fence struct {
	path      string // of the record
	authority string // whose servers they are
	host      string

	mu     sync.Mutex
	obeyed uint64
}

// termEntry is what is written down of the term that was obeyed.
type termEntry struct {
	Authority string // the terms of another one are no matter
	Term      uint64
}

func newFence(path, authority, host string) (*fence, error) {
	f := &fence{path: path, authority: authority, host: host}
	var e termEntry
	if err := record.Read(path, &e); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if e.Authority == authority {
		f.obeyed = e.Term
	}
	return f, nil
}

// admit tells whether a call may be obeyed. The highest term is written down before it is.
func (f *fence) admit(term uint64) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if term < f.obeyed {
		return connect.NewError(connect.CodeAborted, fmt.Errorf(
			"host %s: this server is of term %d, and one of term %d has followed it, which the host obeys (if that one's store was given up, remove %s and start the agent again)", f.host, term, f.obeyed, f.path))
	}
	if term > f.obeyed {
		if err := record.Write(f.path, termEntry{f.authority, term}); err != nil {
			return connect.NewError(connect.CodeUnavailable, fmt.Errorf("host %s: %w", f.host, err))
		}
		f.obeyed = term
	}
	return nil
}

func termOf(h http.Header) (uint64, error) {
	said := h.Get(termHeader)
	term, err := strconv.ParseUint(said, 10, 64)
	if err != nil {
		return 0, refuse("%s %q is no term", termHeader, said)
	}
	return term, nil
}

// WrapUnary implements [connect.Interceptor].
func (f *fence) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		term, err := termOf(req.Header())
		if err == nil {
			err = f.admit(term)
		}
		if err != nil {
			return nil, err
		}
		return next(ctx, req)
	}
}

// WrapStreamingClient implements [connect.Interceptor].
func (*fence) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

// WrapStreamingHandler implements [connect.Interceptor].
func (f *fence) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		term, err := termOf(conn.RequestHeader())
		if err != nil {
			return err
		}
		return next(ctx, &fencedStream{StreamingHandlerConn: conn, fence: f, term: term})
	}
}

// fencedStream is a stream of a server's messages.
type fencedStream struct {
	connect.StreamingHandlerConn
	fence *fence
	term  uint64
}

// Receive implements [connect.StreamingHandlerConn].
func (s *fencedStream) Receive(m any) error {
	if err := s.StreamingHandlerConn.Receive(m); err != nil {
		return err
	}
	return s.fence.admit(s.term)
}
