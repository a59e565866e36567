// Package access is who may call what of the API. A table has a row for each
// procedure, and one interceptor holds every call against it; what is in no row is
// refused. A [Door] takes users' TLS connections in.
//
// An experimenter sees and does what concerns slices of their own. A procedure that
// names a slice or a snapshot is refused by the interceptor if that is not theirs, with
// the very error for one that does not exist. A procedure that names none, as a list,
// is the handler's to limit, by [From].
package access

import (
	"context"

	"violin/internal/trust"
)

// Caller is who makes a call.
type Caller struct {
	Name string     // of a user; empty for whoever may use the unix socket
	Role trust.Role // empty for a stranger, who may log in and nothing else
}

// Operator tells whether the caller may do everything.
func (c Caller) Operator() bool { return c.Role == trust.Operator }

// Owns tells whether what has this owner is the caller's to see and to change.
func (c Caller) Owns(owner string) bool {
	return c.Operator() || c.Role == trust.Experimenter && owner == c.Name && owner != ""
}

type callerKey struct{}

// With is a context of a caller's.
func With(ctx context.Context, c Caller) context.Context {
	return context.WithValue(ctx, callerKey{}, c)
}

// From is who makes the call that a context is of: a stranger, if nobody is known.
func From(ctx context.Context) Caller {
	c, _ := ctx.Value(callerKey{}).(Caller)
	return c
}

// Owners knows whose slices are.
type Owners interface {
	// Owner is the user whose a slice's name is, and with it what runs by it and its
	// snapshots. It is empty if that is nobody, or the operators.
	Owner(slice string) string
}
