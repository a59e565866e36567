package main

import (
	"bytes"
	"runtime/debug"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
)

func TestFormat(t *testing.T) {
	for _, test := range []struct{ got, want string }{
		{formatBytes(0), "0 B"},
		{formatBytes(1023), "1023 B"},
		{formatBytes(1024), "1.0 KiB"},
		{formatBytes(1<<20 - 1), "1.0 MiB"},
		{formatBytes(92<<20 + 100<<10), "92.1 MiB"},
		{formatBytes(1<<64 - 1), "16.0 EiB"},
		{formatMemory(256 << 20), "256 MiB"},
		{formatMemory(1536 << 20), "1.5 GiB"},
		{formatDuration(0), "0.0 ms"},
		{formatDuration(3149 * time.Microsecond), "3.1 ms"},
		{formatDuration(999940 * time.Microsecond), "999.9 ms"},
		{formatDuration(time.Second - time.Microsecond), "1.00 s"},
		{formatDuration(59994 * time.Millisecond), "59.99 s"},
		{formatDuration(time.Minute - time.Millisecond), "1 min 00 s"},
		{formatDuration(125 * time.Second), "2 min 05 s"},
		{formatDuration(-time.Millisecond), "-1.0 ms"},
		{formatOffset(durationpb.New(time.Millisecond)), "+1.0 ms"},
		{formatOffset(durationpb.New(-time.Millisecond)), "-1.0 ms"},
		{formatOffset(nil), ""},
		{formatRatio(1, 3), "33.3 %"},
		{formatRatio(1, 0), ""},
		{frames(1, "held"), "1 frame held"},
		{frames(0, "held"), "0 frames held"},
	} {
		if test.got != test.want {
			t.Errorf("got %q, want %q", test.got, test.want)
		}
	}
}

func TestProgressOnATerminal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b bytes.Buffer
		p := &progress{w: &b, live: true, width: func() int { return 40 }, now: time.Now}
		p.step("boot", "rank0", "")
		time.Sleep(300 * time.Millisecond) // the line is refreshed once
		p.step("boot", "rank1", "a line that is far too long for it")
		p.step("cut", "", "")
		p.done()
		p.done()
		const erase = "\x1b[K"
		want := "\rboot          0.0 ms  rank0" + erase +
			"\rboot        200.0 ms  rank0" + erase +
			"\rboot        300.0 ms  rank1: a line tha" + erase +
			"\rboot        300.0 ms  rank1: a line tha" + erase + "\n" +
			"\rcut           0.0 ms" + erase +
			"\rcut           0.0 ms" + erase + "\n"
		if got := b.String(); got != want {
			t.Errorf("got  %q\nwant %q", got, want)
		}
	})
}

func TestSourceVersion(t *testing.T) {
	revision := debug.BuildSetting{Key: "vcs.revision", Value: "0123456789abcdef0123"}
	for _, test := range []struct {
		main     string
		settings []debug.BuildSetting
		want     string
	}{
		{"v0.1.0", nil, "v0.1.0"},
		{"(devel)", nil, "devel"},
		{"", []debug.BuildSetting{revision}, "devel-0123456789ab"},
		{"(devel)", []debug.BuildSetting{revision, {Key: "vcs.modified", Value: "true"}}, "devel-0123456789ab+dirty"},
	} {
		info := &debug.BuildInfo{Settings: test.settings}
		info.Main.Version = test.main
		if got := sourceVersion(info); got != test.want {
			t.Errorf("sourceVersion(%q, %v) = %q, want %q", test.main, test.settings, got, test.want)
		}
	}
}
