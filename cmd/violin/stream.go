package main

import (
	"errors"
	"fmt"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	violinv1 "violin/api/violin/v1"
)

// follow receives a stream of progress to its end and returns its result, which the
// last message holds.
func follow[Response any, Result proto.Message](
	stream *connect.ServerStreamForClient[Response], p *progress,
	split func(*Response) (*violinv1.Progress, Result, bool),
) (result Result, err error) {
	defer p.done()
	have := false
	for stream.Receive() {
		event, r, ok := split(stream.Msg())
		if event != nil {
			p.event(event)
		}
		if ok {
			result, have = r, true
		}
	}
	if err := errors.Join(stream.Err(), stream.Close()); err != nil {
		return result, err
	}
	if !have {
		return result, fmt.Errorf("the server ended the call with neither a result nor an error; it may be of another version: compare with 'violin version'")
	}
	return result, nil
}
