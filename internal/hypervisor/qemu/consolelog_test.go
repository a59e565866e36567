package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"syscall"
	"testing"
)

// logVM is a VM of which there is a console's log.
func logVM(t *testing.T) *VM {
	return &VM{spec: Spec{Name: "s/n", Dir: t.TempDir()}, log: slog.New(slog.DiscardHandler), done: make(chan struct{})}
}

func (vm *VM) print(t *testing.T, text string) {
	t.Helper()
	f, err := os.OpenFile(vm.consoleLog(), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString(text); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, vm *VM, tail *uint32) string {
	t.Helper()
	r, err := vm.ReadConsoleLog(t.Context(), tail, false)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestConsoleLog(t *testing.T) {
	vm := logVM(t)
	if _, err := vm.ReadConsoleLog(t.Context(), nil, false); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a log that is not there: %v", err)
	}
	if err := vm.beginConsoleLog(false); err != nil {
		t.Fatal(err)
	}
	vm.print(t, "a\nb\n")
	if err := vm.beginConsoleLog(true); err != nil { // a restore goes on with it
		t.Fatal(err)
	}
	vm.print(t, "c\nlast")
	all := read(t, vm, nil)
	if !strings.HasPrefix(all, "[violin: started ") || !strings.Contains(all, "\na\nb\n[violin: restored ") || !strings.HasSuffix(all, "\nc\nlast") {
		t.Errorf("%q", all)
	}
	for n, want := range map[uint32]string{0: "", 1: "last", 2: "c\nlast", 99: all} {
		if got := read(t, vm, &n); got != want {
			t.Errorf("the last %d lines: %q, want %q", n, got, want)
		}
	}
	if err := vm.beginConsoleLog(false); err != nil {
		t.Fatal(err)
	}
	if got := read(t, vm, nil); strings.Contains(got, "last") {
		t.Errorf("a VM that boots goes on with %q", got)
	}
}

// A log keeps what was printed last, takes no more space than its bound, and who follows
// it misses nothing of what comes while it is shortened.
func TestConsoleLogBound(t *testing.T) {
	vm := logVM(t)
	if err := vm.beginConsoleLog(false); err != nil {
		t.Fatal(err)
	}
	one := uint32(1)
	follower, err := vm.ReadConsoleLog(t.Context(), &one, true)
	if err != nil {
		t.Fatal(err)
	}
	defer follower.Close()
	followed := make(chan string)
	go func() {
		b, err := io.ReadAll(follower)
		if err != nil {
			t.Error(err)
		}
		followed <- string(b)
	}()
	line := strings.Repeat("x", 90)
	lines := 0
	for range 100 {
		var text strings.Builder
		for range 1000 {
			lines++
			fmt.Fprintf(&text, "%08d %s\n", lines, line)
		}
		vm.print(t, text.String())
		if err := shortenLog(vm.consoleLog()); err != nil {
			t.Fatal(err)
		}
	}
	var st syscall.Stat_t
	if err := syscall.Stat(vm.consoleLog(), &st); err != nil {
		t.Fatal(err)
	}
	if st.Blocks*512 > logMost+64<<10 || st.Size < 9<<20 {
		t.Errorf("the log of %d bytes takes %d", st.Size, st.Blocks*512)
	}
	got := read(t, vm, nil)
	if len(got) < logKept-8192 || len(got) > logMost || !strings.HasSuffix(got, fmt.Sprintf("%08d %s\n", lines, line)) || len(got)%100 != 0 {
		t.Errorf("%d bytes are kept, from %.20q to %.20q", len(got), got, got[len(got)-100:])
	}
	close(vm.done)
	all := <-followed
	if !strings.HasSuffix(all, got[len(got)-1000:]) {
		t.Errorf("the follower ends with %q", all[max(0, len(all)-100):])
	}
}

func TestConsoleLogEnds(t *testing.T) {
	vm := logVM(t)
	if err := vm.beginConsoleLog(false); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	r, err := vm.ReadConsoleLog(ctx, nil, true)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cancel()
	if _, err := io.ReadAll(r); !errors.Is(err, context.Canceled) {
		t.Errorf("follow a log until the context ends: %v", err)
	}
}
