package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A console's log may hold logMost bytes before all but the last logKept of them are
// given back to the file system. They are punched out of the file, which QEMU goes on
// appending to: nothing is lost on the way, and an offset means the same ever after.
const (
	logMost  = 2 << 20
	logKept  = 1 << 20
	logEvery = 5 * time.Second        // how often it is looked at
	logPoll  = 200 * time.Millisecond // how often who follows it looks
)

// consoleLog is where what the serial console prints is kept.
func (vm *VM) consoleLog() string { return vm.path("console.log") }

// beginConsoleLog says in the console's log that the VM starts. That of a VM that takes a
// state in goes on from what an earlier one has printed.
func (vm *VM) beginConsoleLog(incoming bool) error {
	flags, what := os.O_WRONLY|os.O_CREATE|os.O_APPEND, "restored"
	if !incoming {
		flags, what = flags|os.O_TRUNC, "started"
	}
	f, err := os.OpenFile(vm.consoleLog(), flags, 0o600)
	if err != nil {
		return fmt.Errorf("open the console's log: %w", err)
	}
	if _, err = fmt.Fprintf(f, "[violin: %s %s]\r\n", what, time.Now().UTC().Format(time.RFC3339)); err != nil {
		err = fmt.Errorf("write to the console's log: %w", err)
	}
	return errors.Join(err, f.Close())
}

// tendConsoleLog keeps the console's log within its bound while the VM is there.
func (vm *VM) tendConsoleLog() {
	tick := time.NewTicker(logEvery)
	defer tick.Stop()
	for {
		select {
		case <-vm.done:
			return
		case <-tick.C:
		}
		if err := shortenLog(vm.consoleLog()); err != nil {
			vm.log.Warn("the log of the console grows on", "file", vm.consoleLog(), "err", err)
			return
		}
	}
}

// shortenLog gives the beginning of a log that holds too much back to the file system.
func shortenLog(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	begin, end, err := held(f)
	if err != nil || end-begin <= logMost {
		return err
	}
	if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, (end-logKept)&^4095); err != nil {
		return fmt.Errorf("punch a hole into %s: %w", path, err)
	}
	return nil
}

// held is where the content of a log begins, and where it ends.
func held(f *os.File) (begin, end int64, err error) {
	st, err := f.Stat()
	if err != nil {
		return 0, 0, err
	}
	begin, err = content(f, 0)
	if errors.Is(err, io.EOF) {
		return st.Size(), st.Size(), nil
	}
	return begin, max(begin, st.Size()), err
}

// content is the first offset, from one on, at which a log has content: [io.EOF] if there
// is none.
func content(f *os.File, from int64) (int64, error) {
	at, err := unix.Seek(int(f.Fd()), from, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return from, io.EOF
	case errors.Is(err, unix.EINVAL): // a file system that knows no holes
		return from, nil
	case err != nil:
		return from, fmt.Errorf("find the content of %s: %w", f.Name(), err)
	}
	return at, nil
}

// ReadConsoleLog reads what the serial console has printed, as far as it is kept: with
// tail, the last so many lines; with follow, also what comes, until the VM ends. Reads
// end with the context.
func (vm *VM) ReadConsoleLog(ctx context.Context, tail *uint32, follow bool) (io.ReadCloser, error) {
	f, err := os.Open(vm.consoleLog())
	if err != nil {
		return nil, err
	}
	r := &logReader{ctx: ctx, f: f, follow: follow, done: vm.done}
	if err := r.start(tail); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return r, nil
}

type logReader struct {
	ctx    context.Context
	f      *os.File
	at     int64
	end    int64 // without follow, what comes later is not read
	follow bool
	done   <-chan struct{} // closed when nothing more comes
}

// start finds where to begin: at the beginning of a line.
func (r *logReader) start(tail *uint32) error {
	begin, end, err := held(r.f)
	if err != nil {
		return err
	}
	r.at, r.end = begin, end
	text := make([]byte, end-begin)
	n, err := r.f.ReadAt(text, begin)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	text = text[:n]
	if begin > 0 { // the line that it begins in is not whole
		if i := bytes.IndexByte(text, '\n'); i >= 0 {
			r.at, text = begin+int64(i)+1, text[i+1:]
		}
	}
	if tail != nil {
		r.at += int64(lastLines(text, *tail))
	}
	return nil
}

// lastLines is where the last n lines of a text begin. What follows the last line's end
// is a line as well.
func lastLines(text []byte, n uint32) int {
	if n == 0 {
		return len(text)
	}
	at := len(text)
	if at > 0 && text[at-1] == '\n' {
		at--
	}
	for ; n > 0; n-- {
		if at = bytes.LastIndexByte(text[:max(at, 0)], '\n'); at < 0 {
			return 0
		}
	}
	return at + 1
}

// Read implements [io.Reader].
func (r *logReader) Read(p []byte) (int, error) {
	for {
		ended := false
		select {
		case <-r.done:
			ended = true // before the file is read: so that nothing is missed
		default:
		}
		at, err := content(r.f, r.at)
		if err == nil {
			r.at = at
			part := p
			if !r.follow {
				part = p[:max(0, min(int64(len(p)), r.end-r.at))]
			}
			var n int
			n, err = r.f.ReadAt(part, r.at)
			if r.at += int64(n); n > 0 {
				return n, nil
			}
		}
		switch {
		case err != nil && !errors.Is(err, io.EOF):
			return 0, err
		case !r.follow || ended:
			return 0, io.EOF
		}
		select {
		case <-time.After(logPoll):
		case <-r.done:
		case <-r.ctx.Done():
			return 0, r.ctx.Err()
		}
	}
}

// Close implements [io.Closer].
func (r *logReader) Close() error { return r.f.Close() }
