package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestFramesFile checks that a file of frames is there whole or not at all.
func TestFramesFile(t *testing.T) {
	f := newFixture(t, violinVersion())
	dir := t.TempDir()
	file := filepath.Join(dir, "frames.pcapng")
	if r := violin(t.Context(), f.dirs, strings.NewReader(""), "frames", "cut-off@latest", "--file", file); r.status == exitOK {
		t.Error("half a file is taken for one")
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	for range 2 { // the second replaces the first
		if r := violin(t.Context(), f.dirs, strings.NewReader(""), "frames", "mandelbrot@latest", "--file", file); r.status != exitOK || r.stdout != "" {
			t.Fatalf("status %d: %s%s", r.status, r.stdout, r.stderr)
		}
		if b, err := os.ReadFile(file); err != nil || string(b) != "the first piece, and the second\n" {
			t.Errorf("%q, %v", b, err)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}
