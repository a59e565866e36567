package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

func TestKeyboard(t *testing.T) {
	for _, test := range []struct {
		typed, want string
		left        bool
	}{
		{"ls\r", "ls\r", false},
		{"l\x1dmore", "l", true},
		{"\x1d", "", true},
	} {
		k := newKeyboard(strings.NewReader(test.typed))
		got, err := io.ReadAll(k)
		if err != nil || string(got) != test.want {
			t.Errorf("typed %q: passed on %q, %v", test.typed, got, err)
		}
		select {
		case <-k.left:
			if !test.left {
				t.Errorf("typed %q: left", test.typed)
			}
		default:
			if test.left {
				t.Errorf("typed %q: not left", test.typed)
			}
		}
	}
}

// openTerminal makes a pseudo-terminal (pts(4)): what is written to the keyboard is typed at the terminal.
func openTerminal(t *testing.T) (keyboard, tty *os.File) {
	t.Helper()
	keyboard, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission) {
		t.Skipf("no pseudo-terminals here: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { keyboard.Close() })
	if err := unix.IoctlSetPointerInt(int(keyboard.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(keyboard.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tty.Close() })
	return keyboard, tty
}

func TestConsoleOnATerminal(t *testing.T) {
	f := newFixture(t, violinVersion())
	keyboard, tty := openTerminal(t)
	before, err := term.GetState(int(tty.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	screen, out := io.Pipe()
	status := make(chan int, 1)
	go func() {
		a := &app{stdio: stdio{in: tty, out: out, err: io.Discard}, location: time.UTC}
		status <- a.run(t.Context(), []string{"--run-dir", f.dirs.Run, "--state-dir", f.dirs.State, "console", "pair/rank0"})
		out.Close()
	}()
	lines := bufio.NewReader(screen)
	expect := func(want string) {
		t.Helper()
		got := make([]byte, len(want))
		if _, err := io.ReadFull(lines, got); err != nil || string(got) != want {
			t.Fatalf("the console shows %q, %v; want %q", got, err, want)
		}
	}
	typed := func(keys string) {
		t.Helper()
		if _, err := keyboard.WriteString(keys); err != nil {
			t.Fatal(err)
		}
	}
	expect("login: ")
	typed("x")
	expect("X") // without a newline: the terminal is raw
	typed("\x03")
	expect("\x03") // Ctrl-C is the node's
	typed("\x1d")
	expect("\r\n")
	if s := <-status; s != exitOK {
		t.Errorf("status %d", s)
	}
	after, err := term.GetState(int(tty.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	if *before != *after {
		t.Error("the terminal was not put back")
	}
}
