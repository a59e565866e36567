// Package remote is an agent in a process, and mostly on a machine, of its own. Of the
// server's end there are [Hub], which takes the agents' connections in, and [Agent],
// which is to the server what an [agent.Agent] of its own process is. Of the agent's end
// there is [Host], which dials the server and does what an [Agent] there is asked.
//
// An agent dials, so that it may be behind NAT. In its one TLS connection yamux makes
// streams, and HTTP/2 in one each way carries the calls of api/violin/v1/agent.proto.
package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"

	"connectrpc.com/connect"
	"github.com/hashicorp/yamux"
)

const (
	// keepAlive is how often a silent connection is tried, and writeBound how long a
	// try, or any write, may take before the connection counts as lost.
	keepAlive  = 4 * time.Second
	writeBound = 8 * time.Second
	// window is how much may be under way in a stream: 1 Gbit/s for 130 ms.
	window = 16 << 20
	// messageLimit bounds a message. The largest are a node's channel state, which is
	// bounded by what its gate holds, and batches of pages.
	messageLimit = 256 << 20
	// handshakeBound bounds what a stranger may keep a connection for.
	handshakeBound = 15 * time.Second
)

// link is one connection between a server and an agent, with calls both ways.
type link struct {
	session *yamux.Session
	client  *http.Client
	server  *http.Server
}

// newLink takes conn over. handler serves the other end's calls.
func newLink(conn net.Conn, dialled bool, handler http.Handler, log *slog.Logger) (*link, error) {
	config := yamux.DefaultConfig()
	config.KeepAliveInterval, config.ConnectionWriteTimeout = keepAlive, writeBound
	config.MaxStreamWindowSize = window
	config.LogOutput = io.Discard // what matters comes as errors of calls
	start := yamux.Server
	if dialled {
		start = yamux.Client
	}
	session, err := start(conn, config)
	if err != nil {
		conn.Close()
		return nil, err
	}
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true) // it is TLS below
	l := &link{
		session: session,
		client: &http.Client{Transport: &http.Transport{
			Protocols:   &protocols,
			DialContext: func(context.Context, string, string) (net.Conn, error) { return session.Open() },
		}},
		server: &http.Server{
			Handler: handler, Protocols: &protocols, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
			ReadHeaderTimeout: handshakeBound,
			HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: 1000, MaxReceiveBufferPerConnection: window, MaxReceiveBufferPerStream: window / 4},
		},
	}
	go func() {
		if err := l.server.Serve(session); err != nil && !errors.Is(err, http.ErrServerClosed) && !session.IsClosed() {
			log.Debug("connection served", "err", err)
		}
	}()
	return l, nil
}

// done is closed when the connection is gone.
func (l *link) done() <-chan struct{} { return l.session.CloseChan() }

// close ends the connection and every call on it.
func (l *link) close() {
	l.session.Close() // the peer is to see it first: calls may take their time
	l.server.Close()
	l.client.CloseIdleConnections()
}

func callOptions() []connect.ClientOption {
	return []connect.ClientOption{connect.WithGRPC(), connect.WithReadMaxBytes(messageLimit), connect.WithSendMaxBytes(messageLimit)}
}

func serveOptions(log *slog.Logger) []connect.HandlerOption {
	return []connect.HandlerOption{
		connect.WithReadMaxBytes(messageLimit),
		connect.WithSendMaxBytes(messageLimit),
		// Pages come compressed, and the rest is small.
		connect.WithCompressMinBytes(1 << 20),
		connect.WithRecover(func(ctx context.Context, spec connect.Spec, _ http.Header, r any) error {
			log.ErrorContext(ctx, "panic in a call", "procedure", spec.Procedure, "panic", r)
			return connect.NewError(connect.CodeInternal, fmt.Errorf("violin's own mistake in %s: %v", spec.Procedure, r))
		}),
	}
}

// said is what the other end said of a call that failed, without the code.
func said(err error) error {
	var coded *connect.Error
	if errors.As(err, &coded) && coded.Code() != connect.CodeUnavailable && coded.Code() != connect.CodeCanceled {
		return errors.New(coded.Message())
	}
	return err
}
