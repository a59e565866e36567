package cut

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "write what the transcripts in testdata should say")

// TestTranscripts runs testdata/*.txt: a command, "----", and what comes of it.
// They are meant to be read. `go test -run Transcripts -update` rewrites the
// answers; read the difference.
func TestTranscripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no transcripts: %v", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			src, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			got := (&transcript{}).run(t, string(src))
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			} else if got != string(src) {
				t.Errorf("%s says\n%s\nbut it is\n%s", file, src, got)
			}
		})
	}
}

type transcript struct {
	now   time.Duration
	coord *Coordinator
	gate  *Gate[string]
}

func (tr *transcript) run(t *testing.T, src string) string {
	var out strings.Builder
	answer := false // skipping the old answer
	for line := range strings.Lines(src) {
		line = strings.TrimSuffix(line, "\n")
		switch {
		case answer && line != "":
		case line == "" || strings.HasPrefix(line, "#"):
			answer = false
			out.WriteString(line + "\n")
		default:
			if line == "----" {
				answer = true
				continue
			}
			out.WriteString(line + "\n----\n" + tr.do(t, strings.Fields(line)))
		}
	}
	return out.String()
}

func (tr *transcript) do(t *testing.T, f []string) string {
	t.Helper()
	arg := func(i int) string {
		if i < len(f) {
			return f[i]
		}
		return ""
	}
	rest := func(i int) string { return strings.Join(f[min(i, len(f)):], " ") }
	number := func(s string) int {
		n, err := strconv.Atoi(s)
		if err != nil {
			t.Fatalf("%v: %v", f, err)
		}
		return n
	}
	options := map[string]int{}
	for _, o := range f[1:] {
		if k, v, ok := strings.Cut(o, "="); ok && !strings.ContainsAny(k, ">:") {
			options[k] = number(v)
		}
	}

	switch f[0] {
	case "gate":
		tr.gate = NewGate[string](Epoch(options["epoch"]), Limits{Frames: options["frames"], Bytes: options["bytes"]})
		return ""
	case "arrive":
		v, err := tr.gate.Arrive(Frame[string]{
			Epoch: Epoch(options["epoch"]), Size: options["size"], Delivered: slices.Contains(f, "copy"), Ref: f[1],
		})
		if v == (Verdict{}) && slices.Contains(f, "copy") {
			return "nothing\n"
		}
		return verdict(v) + fail(err)
	case "close":
		tr.gate.Close()
		return ""
	case "flip":
		tr.gate.Flip(Epoch(options["to"]), slices.Contains(f, "record"))
		return ""
	case "open":
		var b strings.Builder
		for _, r := range tr.gate.Open() {
			b.WriteString(r.Frame.Ref + ": " + verdict(Verdict{Deliver: true, Record: r.Record}))
		}
		return b.String()
	case "stop-recording":
		tr.gate.StopRecording()
		return ""
	case "stats":
		return fmt.Sprintf("%+v, %d held now\n", tr.gate.Stats(), tr.gate.Held())

	case "resume": // the cut noted, at the slice's epoch
		n := Note{Cut: arg(1), To: Epoch(options["to"]), Ordered: slices.Contains(f, "ordered")}
		cfg := Config{Epoch: tr.coord.Epoch(), Hosts: tr.coord.hosts}
		var effects []Effect
		tr.coord, effects = Resume(tr.now, cfg, n, slices.Contains(f, "visible"))
		return tr.say(effects)
	case "note-failed":
		return tr.step(NoteFailed{Cut: arg(1), Reason: rest(2)})
	case "slice":
		cfg := Config{Epoch: Epoch(options["epoch"]), Hosts: map[string][]string{}}
		for _, o := range f[1:] {
			if h, nodes, ok := strings.Cut(o, ":"); ok {
				cfg.Hosts[h] = strings.Split(nodes, ",")
			}
		}
		tr.coord, tr.now = NewCoordinator(cfg), 0
		return tr.state()
	case "begin":
		return tr.step(Begin{Cut: arg(1)})
	case "prepared":
		return tr.step(Prepared{Cut: arg(1), Host: arg(2)})
	case "cut":
		return tr.step(NodeCut{Cut: arg(1), Node: arg(2)})
	case "stored":
		return tr.step(Stored{Cut: arg(1), Node: arg(2)})
	case "counters":
		ev := Counters{Cut: arg(1), Host: arg(2), Round: options["round"]}
		for _, o := range f[3:] {
			ends, counts, ok := strings.Cut(o, ":")
			from, to, ok2 := strings.Cut(ends, ">")
			if !ok || !ok2 {
				continue
			}
			c := ChannelCount{Channel: Channel{From: from, To: to, Network: "lan"}}
			if _, err := fmt.Sscanf(counts, "sent=%d,received=%d", &c.Sent, &c.Received); err != nil {
				c = ChannelCount{Channel: c.Channel}
				if _, err := fmt.Sscanf(counts, "sent=%d", &c.Sent); err != nil {
					if _, err := fmt.Sscanf(counts, "received=%d", &c.Received); err != nil {
						t.Fatalf("%v: %q", f, counts)
					}
				}
			}
			ev.Counts = append(ev.Counts, c)
		}
		return tr.step(ev)
	case "collected":
		return tr.step(Collected{Cut: arg(1), Host: arg(2)})
	case "sealed":
		return tr.step(Sealed{Cut: arg(1)})
	case "seal-failed":
		return tr.step(SealFailed{Cut: arg(1), Reason: rest(2)})
	case "committed":
		return tr.step(Committed{Cut: arg(1), Host: arg(2)})
	case "aborted":
		return tr.step(Aborted{Cut: arg(1), Host: arg(2)})
	case "host-failed":
		return tr.step(Failed{Cut: arg(1), Host: arg(2), Reason: rest(3)})
	case "node-failed":
		return tr.step(Failed{Cut: arg(1), Host: arg(2), Node: arg(3), Reason: rest(4)})
	case "down":
		return tr.step(HostDown{Host: arg(1), Reason: rest(2)})
	case "cancel":
		return tr.step(Cancel{Cut: arg(1), Reason: rest(2)})
	case "join":
		return tr.step(Join{Host: arg(1), Node: arg(2)})
	case "leave":
		return tr.step(Leave{Node: arg(1)})
	case "wait":
		d, err := time.ParseDuration(arg(1))
		if err != nil {
			t.Fatalf("%v: %v", f, err)
		}
		tr.now += d
		return tr.step(Tick{})
	}
	t.Fatalf("unknown command %q", f)
	return ""
}

func verdict(v Verdict) string {
	switch {
	case v.Deliver && v.Record:
		return "deliver and record\n"
	case v.Deliver:
		return "deliver\n"
	case v.Record:
		return "record\n"
	case v.Newer:
		return "hold, for the node's cut\n"
	default:
		return "hold\n"
	}
}

func fail(err error) string {
	if err == nil {
		return ""
	}
	return "error: " + err.Error() + "\n"
}

// step prints the effects of an event, then where the cut stands.
func (tr *transcript) step(ev Event) string {
	effects, err := tr.coord.Step(tr.now, ev)
	if err != nil {
		return fail(err)
	}
	return tr.say(effects)
}

func (tr *transcript) say(effects []Effect) string {
	var b strings.Builder
	for _, e := range effects {
		switch e := e.(type) {
		case Note:
			fmt.Fprintf(&b, "note %s, to epoch %d", e.Cut, e.To)
			if e.Ordered {
				b.WriteString(", ordered")
			}
			b.WriteByte('\n')
		case SendPrepare:
			fmt.Fprintf(&b, "to %s: prepare %s, from epoch %d to %d\n", e.Host, e.Cut, e.From, e.To)
		case SendCut:
			fmt.Fprintf(&b, "to %s: cut %s to epoch %d, nodes %v\n", e.Host, e.Cut, e.To, e.Nodes)
		case SendPoll:
			fmt.Fprintf(&b, "to %s: count %s's frames of epoch %d, round %d\n", e.Host, e.Cut, e.Epoch, e.Round)
		case SendCollect:
			fmt.Fprintf(&b, "to %s: stop recording %s, hand over the channel state\n", e.Host, e.Cut)
		case Seal:
			fmt.Fprintf(&b, "seal %s%s\n", e.Cut, losses(e.Lost))
		case SendCommit:
			fmt.Fprintf(&b, "to %s: commit %s\n", e.Host, e.Cut)
		case SendAbort:
			fmt.Fprintf(&b, "to %s: abort %s, to epoch %d\n", e.Host, e.Cut, e.To)
		case Done:
			fmt.Fprintf(&b, "%s is %s, all nodes in epoch %d%s", e.Cut, e.Outcome, e.Epoch, losses(e.Lost))
			if len(e.Left) > 0 {
				fmt.Fprintf(&b, ", without %v", e.Left)
			}
			if e.Reason != "" {
				fmt.Fprintf(&b, " (%s)", e.Reason)
			}
			b.WriteByte('\n')
		}
	}
	return b.String() + tr.state()
}

func losses(ls []ChannelLoss) string {
	var b strings.Builder
	for _, l := range ls {
		fmt.Fprintf(&b, ", %d lost from %s to %s on %s", l.Frames, l.From, l.To, l.Network)
	}
	return b.String()
}

func (tr *transcript) state() string {
	s := fmt.Sprintf("[%v] %s", tr.now, tr.coord.Phase())
	if w := tr.coord.Waiting(); len(w) > 0 {
		s += fmt.Sprintf(", waits for %v", w)
	}
	if d, ok := tr.coord.Deadline(); ok {
		s += fmt.Sprintf(", until %v", d)
	}
	return s + "\n"
}
