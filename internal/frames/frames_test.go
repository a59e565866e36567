package frames

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"violin/internal/cut"
)

// example is an ARP request and a UDP datagram on their way when epoch 255 ended.
func example() *ChannelState {
	arp := append([]byte{
		0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x52, 0x54, 0, 0, 0, 1, 0x08, 0x06,
		0, 1, 8, 0, 6, 4, 0, 1,
		0x52, 0x54, 0, 0, 0, 1, 10, 10, 0, 1,
		0, 0, 0, 0, 0, 0, 10, 10, 0, 2,
	}, make([]byte, 18)...)
	udp := []byte{
		0x52, 0x54, 0, 0, 0, 1, 0x52, 0x54, 0, 0, 0, 2, 0x08, 0x00,
		0x45, 0, 0, 31, 0, 0, 0x40, 0, 64, 17, 0x26, 0xb8, 10, 10, 0, 2, 10, 10, 0, 1,
		0x13, 0x88, 0x13, 0x89, 0, 11, 0, 0, 'a', 'b', 'c',
	}
	cutAt := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	return &ChannelState{
		Slice:    "pair",
		Snapshot: "s1",
		Receivers: []Receiver{
			{Node: "left", Interface: 0, Network: "lan", Epoch: 0, Cut: cutAt},
			{Node: "right", Interface: 1, Network: "lan", Epoch: 0, Cut: cutAt.Add(time.Millisecond)},
			{Node: "right", Interface: 2, Network: "other"},
		},
		Frames: []Frame{
			{Receiver: 1, Epoch: 255, At: 30 * time.Millisecond, Data: arp},
			{Receiver: 0, Epoch: 255, At: 29*time.Millisecond + 1, Data: udp},
			{Receiver: 2, Epoch: 254, At: 0, Data: []byte{1}},
			{Receiver: 2, Epoch: 254, At: time.Hour, Data: []byte{}},
		},
	}
}

func write(t testing.TB, cs *ChannelState) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := Write(&b, cs); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestRoundTrip(t *testing.T) {
	for name, cs := range map[string]*ChannelState{
		"example":   example(),
		"no frames": {Slice: "pair", Receivers: example().Receivers},
		"nothing":   {},
	} {
		got, err := Read(bytes.NewReader(write(t, cs)))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if d := cmp.Diff(cs, got); d != "" {
			t.Errorf("%s: %s", name, d)
		}
	}
}

func TestRoundTripRandom(t *testing.T) {
	receiver := rapid.Custom(func(t *rapid.T) Receiver {
		r := Receiver{
			Node:      rapid.String().Draw(t, "node"),
			Interface: rapid.Int().Draw(t, "interface"),
			Network:   rapid.String().Draw(t, "network"),
			Epoch:     cut.Epoch(rapid.Byte().Draw(t, "epoch")),
		}
		if ns := rapid.Int64Range(0, 1<<62).Draw(t, "cut"); ns > 0 {
			r.Cut = time.Unix(0, ns).UTC()
		}
		return r
	})
	rapid.Check(t, func(t *rapid.T) {
		cs := &ChannelState{
			Slice:     rapid.String().Draw(t, "slice"),
			Snapshot:  rapid.String().Draw(t, "snapshot"),
			Receivers: rapid.SliceOfN(receiver, 1, 4).Draw(t, "receivers"),
		}
		cs.Frames = rapid.SliceOfN(rapid.Custom(func(t *rapid.T) Frame {
			return Frame{
				Receiver: rapid.IntRange(0, len(cs.Receivers)-1).Draw(t, "receiver"),
				Epoch:    cut.Epoch(rapid.Byte().Draw(t, "epoch")),
				At:       time.Duration(rapid.Int64Range(0, 1<<61).Draw(t, "at")),
				Data:     append([]byte{}, rapid.SliceOfN(rapid.Byte(), 0, 100).Draw(t, "data")...),
			}
		}), 1, 5).Draw(t, "frames")
		var b bytes.Buffer
		if err := Write(&b, cs); err != nil {
			t.Fatal(err)
		}
		got, err := Read(&b)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(cs, got); d != "" {
			t.Fatal(d)
		}
	})
}

func TestWriteRefuses(t *testing.T) {
	for name, spoil := range map[string]func(*ChannelState){
		"receiver":  func(cs *ChannelState) { cs.Frames[0].Receiver = 3 },
		"negative":  func(cs *ChannelState) { cs.Frames[0].At = -1 },
		"UTF-8":     func(cs *ChannelState) { cs.Slice = "\xff" },
		"node name": func(cs *ChannelState) { cs.Receivers[0].Node = "\xff" },
		"too long":  func(cs *ChannelState) { cs.Receivers[0].Node = strings.Repeat("x", maxComment) },
		"old cut":   func(cs *ChannelState) { cs.Receivers[0].Cut = time.Unix(-1, 0) },
		"far cut":   func(cs *ChannelState) { cs.Receivers[0].Cut = time.Unix(1<<40, 0) },
	} {
		cs := example()
		spoil(cs)
		if err := Write(io.Discard, cs); err == nil {
			t.Errorf("%s: written", name)
		}
	}
}

func TestReadRefuses(t *testing.T) {
	good := write(t, example())
	replace := func(from, to string) []byte {
		if len(from) != len(to) || !bytes.Contains(good, []byte(from)) {
			t.Fatalf("%q for %q", to, from)
		}
		return bytes.Replace(good, []byte(from), []byte(to), 1)
	}
	var zipped bytes.Buffer
	z := gzip.NewWriter(&zipped)
	z.Write(good)
	z.Close()
	for _, tc := range []struct {
		name, want string
		file       []byte
	}{
		{"empty", "unexpected EOF", nil},
		{"gzip", "not a pcapng", zipped.Bytes()},
		{"pcap", "not a pcapng", []byte("\xd4\xc3\xb2\xa1\x02\x00\x04\x00")},
		{"format", "format 2", replace(`"format":1`, `"format":2`)},
		{"section comment", "section header, before byte", replace(`{"format"`, `["format"`)},
		{"interface comment", "interface description 0, before byte", replace(`{"node"`, `["node"`)},
		{"frame comment", "packet 0, before byte", replace(`{"epoch":255}`, `["epoch":255}`)},
		{"epoch", "packet 0, before byte", replace(`{"epoch":255}`, `{"epoch":256}`)},
		{"no epoch", "no epoch", replace(`{"epoch":255}`, `{"apoch":255}`)},
		{"cut after arrival", "before its receiver's cut", replace(`2026-01-02T03:04:05.001`, `2026-01-02T03:04:09.001`)},
		{"frames", "4 frames, where the file says that it holds 5", replace(`"frames":4`, `"frames":5`)},
		{"two files", "second section", append(append([]byte{}, good...), good...)},
	} {
		cs, err := Read(bytes.NewReader(tc.file))
		var e *Error
		if cs != nil || !errors.As(err, &e) || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: got %v, %v; want %q", tc.name, cs, err, tc.want)
		}
	}
	for n := range good {
		if cs, err := Read(bytes.NewReader(good[:n])); cs != nil || err == nil {
			t.Fatalf("the first %d bytes of %d were taken for a file", n, len(good))
		}
	}
}

func FuzzRead(f *testing.F) {
	f.Add(write(f, example()))
	f.Add(write(f, &ChannelState{}))
	f.Fuzz(func(t *testing.T, b []byte) {
		cs, err := Read(bytes.NewReader(b))
		if err != nil {
			var e *Error
			if cs != nil || !errors.As(err, &e) || e.Offset < 0 || e.Offset > int64(len(b)) {
				t.Fatalf("channel state %v with error %v", cs, err)
			}
			return
		}
		var again bytes.Buffer
		if err := Write(&again, cs); err != nil {
			t.Fatal(err)
		}
		same, err := Read(&again)
		if err != nil || !reflect.DeepEqual(cs, same) {
			t.Fatalf("%v\n%s", err, cmp.Diff(cs, same))
		}
	})
}

// Wireshark's own reader shows what was written.
func TestWireshark(t *testing.T) {
	if os.Getenv("VIOLIN_E2E") != "1" {
		t.Skip("runs tshark: set VIOLIN_E2E=1")
	}
	tshark, err := exec.LookPath("tshark")
	if err != nil {
		t.Skip("there is no tshark (Debian: tshark): ", err)
	}
	file := filepath.Join(t.TempDir(), "channel.pcapng")
	if err := os.WriteFile(file, write(t, example()), 0o666); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(tshark, "-r", file, "-c", "2", "-o", "frame.generate_epoch_time:TRUE", "-T", "fields", "-E", "separator=|",
		"-e", "frame.interface_name", "-e", "frame.time_epoch", "-e", "frame.comment", "-e", "_ws.col.Protocol", "-e", "data.text", "-e", "udp.payload")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, stderr.String())
	}
	want := `right:1|1767323045.031000006|{"epoch":255}|ARP||
left:0|1767323045.029000007|{"epoch":255}|UDP||616263
`
	if d := cmp.Diff(want, string(out)); d != "" {
		t.Errorf("%s\n%s", d, stderr.String())
	}
}
