package main

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"golang.org/x/term"

	violinv1 "violin/api/violin/v1"
)

// progress tells on stderr how far a long call is. On a terminal each step is one
// line, rewritten as it goes on, that stays with the time the step took; elsewhere
// (a log of CI) each event is a line.
type progress struct {
	w     io.Writer // nil: quiet
	live  bool
	width func() int // of the terminal, in columns
	now   func() time.Time

	mu    sync.Mutex
	name  string // of the step that runs; empty: none
	line  string // what the step said last
	began time.Time
	stop  chan struct{} // ends the refreshing of the live line
}

// refresh is how often the time on the live line is brought up to date.
const refresh = 200 * time.Millisecond

func (a *app) progress() *progress {
	p := &progress{now: time.Now}
	if a.quiet {
		return p
	}
	p.w = a.err
	if f, ok := terminal(a.err); ok {
		p.live = true
		p.width = func() int {
			if w, _, err := term.GetSize(int(f.Fd())); err == nil && w > 0 {
				return w
			}
			return 80
		}
	}
	return p
}

// event tells what the server says.
func (p *progress) event(e *violinv1.Progress) { p.step(e.GetStep(), e.GetNode(), e.GetDetail()) }

// step tells that a step goes on; node and detail may be empty.
func (p *progress) step(name, node, detail string) {
	if p.w == nil {
		return
	}
	line := detail
	if node != "" {
		line = strings.TrimSuffix(node+": "+detail, ": ")
	}
	name, line = printable(name), printable(line)
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.live {
		fmt.Fprintln(p.w, strings.TrimSuffix(name+": "+line, ": "))
		return
	}
	if name != p.name {
		p.endStep()
		p.name, p.began = name, p.now()
	}
	p.line = line
	p.draw()
	if p.stop == nil {
		p.stop = make(chan struct{})
		go p.keepDrawing(p.stop)
	}
}

// done ends the live line, before anything else is written.
func (p *progress) done() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.endStep()
	if p.stop != nil {
		close(p.stop)
		p.stop = nil
	}
}

func (p *progress) keepDrawing(stop <-chan struct{}) {
	ticker := time.NewTicker(refresh)
	defer ticker.Stop()
	for {
		select {
		case <-stop:
			return
		case <-ticker.C:
			p.mu.Lock()
			if p.name != "" {
				p.draw()
			}
			p.mu.Unlock()
		}
	}
}

// draw writes the live line over itself; p.mu is held.
func (p *progress) draw() {
	text := fmt.Sprintf("%-10s %9s  %s", p.name, formatDuration(p.now().Sub(p.began)), p.line)
	// A line that wraps could not be written over. One column is left for the cursor.
	if runes, limit := []rune(text), max(1, p.width()-1); len(runes) > limit {
		text = string(runes[:limit])
	}
	fmt.Fprintf(p.w, "\r%s\x1b[K", strings.TrimRight(text, " "))
}

// endStep leaves the live line as it is and begins a new one; p.mu is held.
func (p *progress) endStep() {
	if p.name != "" {
		p.draw()
		fmt.Fprintln(p.w)
	}
	p.name = ""
}
