// S3server is a real S3 server for tests: the Versity gateway over a directory. It is a module of its
// own, so that what the gateway needs is no part of Violin's.
//
//	s3server DIR ADDRESS
//
// serves the buckets in DIR/buckets, of which "violin" is made, until it is killed. The keys are
// AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/versity/versitygw/backend/meta"
	"github.com/versity/versitygw/backend/posix"
	"github.com/versity/versitygw/embedgw"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: s3server DIR ADDRESS")
		os.Exit(2)
	}
	if err := serve(context.Background(), os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "s3server:", err)
		os.Exit(1)
	}
}

func serve(ctx context.Context, dir, address string) error {
	// Attributes lie beside the objects, as not every file system has extended ones.
	buckets, attributes := filepath.Join(dir, "buckets"), filepath.Join(dir, "attributes")
	for _, d := range []string{filepath.Join(buckets, "violin"), attributes} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return err
		}
	}
	store, err := meta.NewSideCar(attributes)
	if err != nil {
		return err
	}
	backend, err := posix.New(buckets, store, posix.PosixOpts{SideCarDir: attributes})
	if err != nil {
		return err
	}
	return embedgw.RunVersityGW(ctx, backend, &embedgw.Config{
		RootUserAccess: os.Getenv("AWS_ACCESS_KEY_ID"),
		RootUserSecret: os.Getenv("AWS_SECRET_ACCESS_KEY"),
		Ports:          []string{address},
		MaxConnections: 1024,
		MaxRequests:    1024,

		MultipartMaxParts: 10000,
		KeepAlive:         true,
		Quiet:             true,
	})
}
