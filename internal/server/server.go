// Package server is the API's handler: the one place that knows every slice.
package server

import (
	"context"
	"log/slog"

	"violin/api/violin/v1/violinv1connect"
)

// Config says where a server keeps things and how it presents itself.
type Config struct {
	StateDir string // store/ and images/ are below it
	RunDir   string // sockets of what runs
	Logger   *slog.Logger
	Version  string // told by the Version call
}

// Server implements the API. It holds the slices that run.
type Server struct {
	violinv1connect.UnimplementedSliceServiceHandler

	config Config
}

var _ violinv1connect.SliceServiceHandler = (*Server)(nil)

// New makes a server with no slice. ctx bounds the making only.
func New(ctx context.Context, config Config) (*Server, error) {
	return &Server{config: config}, ctx.Err()
}

// Busy tells whether a slice runs: a busy server does not exit for being idle.
func (s *Server) Busy() bool { return false }

// Close stops every slice and releases what the server holds.
func (s *Server) Close() error { return nil }
