package qmp

import (
	"bytes"
	"errors"
	"io"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestDecode(t *testing.T) {
	id := uint64(7)
	for _, tc := range []struct {
		in   string
		want Message
		err  string // substring
	}{
		{in: `{"return": {}, "id": 7}`, want: Message{Return: []byte(`{}`), ID: &id}},
		{in: `{"return": {}}`, want: Message{Return: []byte(`{}`)}},
		{in: `{"return": null}`, want: Message{Return: []byte(`null`)}},
		{in: `{"return": {}, "id": "not ours"}`, want: Message{Return: []byte(`{}`)}},
		{in: `{"return": {}, "id": -1}`, want: Message{Return: []byte(`{}`)}},
		{in: `{"return": {}, "id": null}`, want: Message{Return: []byte(`{}`)}},
		{in: `{"id": 7, "error": {"class": "GenericError", "desc": "no"}}`, want: Message{Error: &Error{Class: "GenericError", Desc: "no"}, ID: &id}},
		{in: `{"event": "STOP", "timestamp": {"seconds": 0, "microseconds": 0}}`, want: Message{Event: &Event{Name: "STOP"}}},
		{in: `null`, err: "not a JSON object"},
		{in: `[]`, err: "not a JSON object"},
		{in: `{}`, err: "exactly one"},
		{in: `{"return": {}, "event": "STOP"}`, err: "exactly one"},
		{in: `{"return": {}} {"return": {}}`, err: "after top-level value"},
		{in: `{"return": `, err: "unexpected end"},
		{in: "{\"return\": \xff}", err: "invalid character"},
	} {
		m, err := NewDecoder(strings.NewReader(" \r\n"+tc.in+"\r\n"), 0).Decode()
		var syntax *SyntaxError
		switch {
		case tc.err == "" && err != nil:
			t.Errorf("%s: %v", tc.in, err)
		case tc.err != "" && (!errors.As(err, &syntax) || syntax.Offset != 3 || !strings.Contains(err.Error(), tc.err)):
			t.Errorf("%s: got %v, want a syntax error at 3 with %q", tc.in, err, tc.err)
		case !cmp.Equal(m, tc.want):
			t.Errorf("%s: %s", tc.in, cmp.Diff(tc.want, m))
		}
	}
}

func TestDecodeStream(t *testing.T) {
	// Longer than the buffer of the reader below, which gives a byte at a time.
	long := `{"return": "` + strings.Repeat("x", 10000) + `"}`
	d := NewDecoder(oneByte{strings.NewReader(long + "\nnoise\xff" + `{"return": 1}` + "\nbad\n" + long + "\n" + `{"ret`)}, len(long)+1)
	if m, err := d.Decode(); err != nil || len(m.Return) != 10002 {
		t.Fatalf("long line: %d bytes, %v", len(m.Return), err)
	}
	if err := d.Skip(0xff); err != nil {
		t.Fatal(err)
	}
	if m, err := d.Decode(); err != nil || string(m.Return) != "1" {
		t.Fatalf("after the skip: %+v, %v", m, err)
	}
	var syntax *SyntaxError
	if _, err := d.Decode(); !errors.As(err, &syntax) {
		t.Fatalf("bad line: %v", err)
	}
	if m, err := d.Decode(); err != nil || len(m.Return) != 10002 {
		t.Fatalf("line after a bad one: %d bytes, %v", len(m.Return), err)
	}
	if _, err := d.Decode(); err != io.ErrUnexpectedEOF {
		t.Fatalf("half a line: %v", err)
	}

	if _, err := NewDecoder(strings.NewReader(long+"\n"), len(long)).Decode(); err == nil || !strings.Contains(err.Error(), "longer than") {
		t.Errorf("too long a line: %v", err)
	}
	if _, err := NewDecoder(strings.NewReader(""), 0).Decode(); err != io.EOF {
		t.Errorf("empty stream: %v", err)
	}
}

type oneByte struct{ r io.Reader }

func (o oneByte) Read(p []byte) (int, error) { return o.r.Read(p[:1]) }

func FuzzDecode(f *testing.F) {
	for _, seed := range []string{
		greeting,
		`{"return": {}, "id": 1}` + "\n" + `{"event": "STOP", "timestamp": {"seconds": 1700000000, "microseconds": 1}, "data": {}}` + "\n",
		`{"id": 1, "error": {"class": "GenericError", "desc": "no"}}` + "\n\xff",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		d := NewDecoder(bytes.NewReader(b), 1024)
		for {
			m, err := d.Decode()
			if err == nil {
				continue
			}
			if !reflect.DeepEqual(m, Message{}) {
				t.Fatalf("error %v with message %+v", err, m)
			}
			var syntax *SyntaxError
			if !errors.As(err, &syntax) {
				return
			}
		}
	})
}
