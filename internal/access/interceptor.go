package access

import (
	"context"
	"errors"
	"fmt"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
)

// interceptor holds calls against the table.
type interceptor struct{ owners Owners }

var _ connect.Interceptor = interceptor{}

// WrapUnary implements [connect.Interceptor].
func (i interceptor) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		if err := i.begin(ctx, req.Spec().Procedure); err != nil {
			return nil, err
		}
		if err := i.check(ctx, req.Spec().Procedure, req.Any()); err != nil {
			return nil, err
		}
		return next(ctx, req)
	}
}

// WrapStreamingHandler implements [connect.Interceptor].
func (i interceptor) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		if err := i.begin(ctx, conn.Spec().Procedure); err != nil {
			return err
		}
		return next(ctx, &checkedConn{StreamingHandlerConn: conn, ctx: ctx, interceptor: i})
	}
}

// WrapStreamingClient implements [connect.Interceptor].
func (i interceptor) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

// checkedConn holds a stream's first message against the table: the rest is data.
type checkedConn struct {
	connect.StreamingHandlerConn
	ctx         context.Context
	interceptor interceptor
	checked     bool
}

// Receive implements [connect.StreamingHandlerConn].
func (c *checkedConn) Receive(m any) error {
	if err := c.StreamingHandlerConn.Receive(m); err != nil || c.checked {
		return err
	}
	c.checked = true
	return c.interceptor.check(c.ctx, c.Spec().Procedure, m)
}

// begin refuses callers whose role does not suffice, before anything of the request is
// looked at.
func (i interceptor) begin(ctx context.Context, procedure string) error {
	r, ok := table[procedure]
	if !ok {
		return connect.NewError(connect.CodePermissionDenied, fmt.Errorf("%s is served to nobody", procedure))
	}
	c := From(ctx)
	if r.who.allows(c.Role) {
		return nil
	}
	if c.Role == "" {
		return connect.NewError(connect.CodeUnauthenticated, stranger(ctx))
	}
	return connect.NewError(connect.CodePermissionDenied, fmt.Errorf("it takes an operator; user %s is an %s", c.Name, c.Role))
}

// check refuses what a caller may not ask for.
func (i interceptor) check(ctx context.Context, procedure string, message any) error {
	r, c := table[procedure], From(ctx)
	m, ok := message.(proto.Message)
	if !ok {
		return connect.NewError(connect.CodeInternal, fmt.Errorf("a %T is no message", message))
	}
	if c.Operator() || r.who == strangers {
		return nil
	}
	if r.operator != nil {
		if what := r.operator(m); what != "" {
			return connect.NewError(connect.CodePermissionDenied, fmt.Errorf("%s takes an operator; user %s is an %s", what, c.Name, c.Role))
		}
	}
	if r.names == nil {
		return nil
	}
	for _, name := range r.names(m) {
		if !c.Owns(i.owners.Owner(name)) {
			return connect.NewError(connect.CodeNotFound, notYours(name))
		}
	}
	return nil
}

// notYours is the same for what is another's and for what does not exist.
func notYours(name string) error {
	if name == "" {
		return errors.New("a slice, or a snapshot as SLICE@ID, is to be named")
	}
	return fmt.Errorf("no slice %q of yours is here", name)
}

type strangerKey struct{}

// because is a context of a stranger's, and why that is so.
func because(ctx context.Context, err error) context.Context {
	return context.WithValue(ctx, strangerKey{}, err)
}

func stranger(ctx context.Context) error {
	if err, ok := ctx.Value(strangerKey{}).(error); ok {
		return err
	}
	return errors.New("the caller is not known")
}
