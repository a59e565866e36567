package main

import (
	"image/png"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestWritePNG(t *testing.T) {
	file := filepath.Join(t.TempDir(), "p.png")
	for _, bad := range []string{"", "P6\n2 2\n255\nabcd", "P5\n2 2\n255\nabc"} {
		if err := writePNG(file, []byte(bad)); err == nil {
			t.Errorf("%q was taken for a picture", bad)
		}
	}
	if err := writePNG(file, []byte("P5\n2 2\n255\nabcd")); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	img, err := png.Decode(f)
	if err != nil {
		t.Fatal(err)
	}
	if r, _, _, _ := img.At(1, 1).RGBA(); r>>8 != 'd' {
		t.Errorf("the last pixel is %d", r>>8)
	}
}

// What the table says did not hold makes the demo fail.
func TestJudge(t *testing.T) {
	good := snapshot{
		FramesDropped: "0", RawBytes: "1000", StoredBytes: "350", Skew: "0.002s",
		Nodes: []snapshotNode{{Name: "a", Pause: "0.025s"}, {Name: "b", Pause: "0.003s"}},
	}
	for _, test := range []struct {
		what   string
		change func(*snapshot)
		failed string
	}{
		{"all holds", func(*snapshot) {}, ""},
		{"a long pause", func(s *snapshot) { s.Nodes[1].Pause = "0.026s" }, "longest vCPU pause"},
		{"no pause was measured", func(s *snapshot) { s.Nodes[1].Pause = "" }, "longest vCPU pause"},
		{"no nodes", func(s *snapshot) { s.Nodes = nil }, "longest vCPU pause"},
		{"a frame dropped", func(s *snapshot) { s.FramesDropped = "1" }, "frames dropped"},
		{"too much stored", func(s *snapshot) { s.StoredBytes = "351" }, "stored of the raw state"},
		{"nothing measured", func(s *snapshot) { s.RawBytes = "" }, "stored of the raw state"},
	} {
		snap := good
		snap.Nodes = append([]snapshotNode{}, good.Nodes...)
		test.change(&snap)
		s := &story{}
		s.judge(snap)
		if got := strings.Join(s.failed, "; "); (test.failed == "") != (got == "") || !strings.Contains(got, test.failed) {
			t.Errorf("%s: failed %q, want %q", test.what, got, test.failed)
		}
	}
}

func TestReferenceArguments(t *testing.T) {
	topo, err := os.ReadFile("../" + topology)
	if err != nil {
		t.Fatal(err)
	}
	if _, line, ok := strings.Cut(string(topo), " mandelbrot "); !ok || !strings.Contains(line, "-w 640 -h 480") {
		t.Errorf("the topology's run line has not the arguments that the reference is computed with")
	}
}
