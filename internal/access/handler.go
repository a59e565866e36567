package access

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"runtime/debug"

	"connectrpc.com/connect"

	"violin/api/violin/v1/violinv1connect"
)

// requestLimit bounds one message from a client, in bytes: the largest are topologies and
// exec's input.
const requestLimit = 16 << 20

// API is all of it.
type API interface {
	violinv1connect.SliceServiceHandler
	violinv1connect.StoreServiceHandler
	violinv1connect.HistoryServiceHandler
	violinv1connect.LifecycleServiceHandler
	violinv1connect.ImageServiceHandler
	violinv1connect.ProtectionServiceHandler
	violinv1connect.HostServiceHandler
	violinv1connect.UserServiceHandler
}

// Handler serves the API over HTTP, to callers that the requests' contexts tell; see
// [As] and [Door].
func Handler(api API, owners Owners, log *slog.Logger) http.Handler {
	mux := http.NewServeMux()
	options := []connect.HandlerOption{
		connect.WithInterceptors(interceptor{owners}),
		connect.WithReadMaxBytes(requestLimit),
		// The socket is local: compressing costs more than it saves, below the size of a large listing.
		connect.WithCompressMinBytes(1 << 20),
		// One call's mistake must not end everybody's VMs.
		connect.WithRecover(func(ctx context.Context, spec connect.Spec, _ http.Header, r any) error {
			log.ErrorContext(ctx, "panic in a call", "procedure", spec.Procedure, "panic", r, "stack", string(debug.Stack()))
			return connect.NewError(connect.CodeInternal, fmt.Errorf("the server's own mistake in %s: %v", spec.Procedure, r))
		}),
	}
	mux.Handle(violinv1connect.NewSliceServiceHandler(api, options...))
	mux.Handle(violinv1connect.NewStoreServiceHandler(api, options...))
	mux.Handle(violinv1connect.NewHistoryServiceHandler(api, options...))
	mux.Handle(violinv1connect.NewLifecycleServiceHandler(api, options...))
	mux.Handle(violinv1connect.NewHostServiceHandler(api, options...))
	mux.Handle(violinv1connect.NewImageServiceHandler(api, options...))
	mux.Handle(violinv1connect.NewProtectionServiceHandler(api, options...))
	mux.Handle(violinv1connect.NewUserServiceHandler(api, options...))
	return mux
}

// As serves every request as a caller's: that of a socket which only one can reach.
func As(c Caller, h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.ServeHTTP(w, r.WithContext(With(r.Context(), c)))
	})
}
