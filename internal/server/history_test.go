package server

import (
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	violinv1 "violin/api/violin/v1"
)

func TestTagAndLog(t *testing.T) {
	s := newServer(t, t.TempDir(), Storage{})
	ctx := t.Context()
	now := time.Now()
	keep(t, s, "1", "gold", now, 1)
	keep(t, s, "2", "", now.Add(time.Second), 2)
	for _, c := range []struct {
		request *violinv1.TagRequest
		code    connect.Code // 0: it is done
		tags    string
	}{
		{&violinv1.TagRequest{Snapshot: "pair@latest", Tag: "good"}, 0, "good"},
		{&violinv1.TagRequest{Snapshot: "pair@2", Tag: "gold"}, connect.CodeAlreadyExists, ""},
		{&violinv1.TagRequest{Snapshot: "pair@2", Tag: "gold", Move: true}, 0, "gold,good"},
		{&violinv1.TagRequest{Snapshot: "pair@good", Delete: true}, 0, "gold"},
		{&violinv1.TagRequest{Snapshot: "pair@good", Delete: true}, connect.CodeNotFound, ""},
		{&violinv1.TagRequest{Snapshot: "pair@2", Delete: true}, connect.CodeNotFound, ""}, // an ID is no tag
		{&violinv1.TagRequest{Snapshot: "pair@latest", Delete: true}, connect.CodeInvalidArgument, ""},
		{&violinv1.TagRequest{Snapshot: "pair@1", Tag: "Bad Tag"}, connect.CodeInvalidArgument, ""},
		{&violinv1.TagRequest{Snapshot: "pair@1"}, connect.CodeInvalidArgument, ""},
		{&violinv1.TagRequest{Snapshot: "pair@9", Tag: "x"}, connect.CodeNotFound, ""},
	} {
		r, err := s.Tag(ctx, c.request)
		if c.code != 0 {
			if connect.CodeOf(err) != c.code {
				t.Errorf("%v: %v, want %v", c.request, err, c.code)
			}
			continue
		}
		if err != nil || strings.Join(r.GetSnapshot().GetTags(), ",") != c.tags || r.GetSnapshot().GetTag() != "gold" && r.GetSnapshot().GetTag() != "good" {
			t.Errorf("%v: %v, %v", c.request, r, err)
		}
	}
	log, err := s.Log(ctx, &violinv1.LogRequest{Slice: "pair"})
	if err != nil || len(log.GetSnapshots()) != 2 || log.GetRunning() || log.GetHead() != "" {
		t.Errorf("log: %v, %v", log, err)
	}
	if _, err := s.Log(ctx, &violinv1.LogRequest{Slice: "other"}); connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("log of nothing: %v", err)
	}
}
