package certificate_test

import (
	"fmt"
	"go/parser"
	"go/token"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"violin/internal/certificate"
)

func TestASoundCutHolds(t *testing.T) {
	for _, loses := range []bool{false, true} {
		s := take(t, "", loses)
		r := certificate.Check(s)
		if !r.Holds() || len(r.Proves) == 0 || len(r.Cannot) == 0 {
			t.Fatalf("with a loss %v: %s", loses, strings.Join(r.Violations, "\n"))
		}
		c, err := certificate.Decode(s.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		// The cut that the others are mutants of has all kinds of frames.
		if a, b := c.Nodes[0], c.Nodes[1]; len(a.Recorded) != 1 || a.Gate.Copies != 1 || len(b.Recorded) != 2 || b.Gate.Held != 3 || b.Gate.Taken != 1 || b.Gate.Older != 2 {
			t.Errorf("recorded and held: a %+v, b %+v", a.Gate, b.Gate)
		}
		if got := strings.Contains(strings.Join(r.Notes, " "), "lost 1 frames"); got != loses {
			t.Errorf("with a loss %v: notes %q", loses, r.Notes)
		}
	}
}

func TestMutantsFail(t *testing.T) {
	for _, m := range []struct {
		mutant string
		loses  bool
		want   string
	}{
		{"flip before stop", false, "flip began before"},
		{"flip after resume", false, "began before"},
		{"capture before stop", false, "capture began before"},
		{"capture after resume", false, "resume began before capture had ended"},
		{"stop before settle", false, "stop began before settle had ended"},
		{"no close", false, "step close was not done"},
		{"no settle", false, "step settle was not done"},
		{"no flush", false, "step flush was not done"},
		{"no flip", false, "step flip was not done"},
		{"no barrier", false, "flip began before flush had ended"},
		{"never opened", false, "held frames were not given to it"},
		{"abort back", false, "step flip took it from epoch 255 to 255"},
		{"deliver newer", false, "frames from the future"},
		{"drop newer", false, "its gate was given 3 frames, and accounts for 2"},
		{"drop a held frame", false, "accounts for 2"},
		{"drop what was taken back", false, "accounts for 2"},
		{"forget a record", false, "1 frames were in flight to it at its cut"},
		{"forget a held record", false, "2 frames were in flight to it at its cut"},
		{"record twice", false, "and 2 are in the record"},
		{"record newer", false, "which is not older than the node's"},
		{"lose a frame of the file", false, "that it recorded are not in the channel state"},
		{"drop between switch and gate", false, "its switch handed 2 frames to its gates, and 0 came"},
		{"drop a copy", false, "1 were made for the record, and 0 came"},
		{"copies uncounted", false, ""},
		{"seal undrained", true, "2 frames were sent in epoch 255, 1 received and 0 declared lost"},
		{"one round", false, "1 rounds of counters"},
		{"count before the cut", false, "before its node a had cut"},
		{"no quiet", true, "after less than the silence"},
		{"hide a loss", true, "2 frames were sent in epoch 255, 1 received and 0 declared lost"},
		{"missing node", false, "node b of the slice is missing"},
	} {
		t.Run(m.mutant, func(t *testing.T) {
			r := certificate.Check(take(t, m.mutant, m.loses))
			if m.want == "" {
				// The mistake did no harm in this run, and the evidence shows that.
				if !r.Holds() {
					t.Errorf("does not hold: %q", r.Violations)
				}
				return
			}
			if r.Holds() || r.Proves != nil {
				t.Fatal("holds")
			}
			if !strings.Contains(strings.Join(r.Violations, "\n"), m.want) {
				t.Errorf("%q does not say %q", r.Violations, m.want)
			}
		})
	}
}

// free are the fields that may be changed by one who signs the certificate anew,
// within bounds, without it contradicting itself or the snapshot. They are what
// only a fingerprint kept elsewhere protects.
var free = regexp.MustCompile(`^(ParentCertificate|QuietNS|Nodes\[\d\]\.(Heard|Gate\.Late|Steps\[\d\]\.(Began|Ended))|` +
	`Hosts\[\d\]\.(Handed|Seen)|Rounds\[\d\]\.(Number|Asked|Ended|Answers\[\d\]\.Read))$`)

// TestEveryFieldCounts alters each field of a certificate that holds.
func TestEveryFieldCounts(t *testing.T) {
	s := take(t, "", true)
	c, err := certificate.Decode(s.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	altered := 0
	walk(reflect.ValueOf(c).Elem(), "", func(path string) {
		altered++
		b, err := certificate.Encode(c)
		if err != nil {
			t.Fatal(err)
		}
		tampered := *s
		tampered.Bytes = b
		if r := certificate.Check(&tampered); r.Holds() || !strings.Contains(r.Violations[0], "was altered") {
			t.Errorf("%s was altered, and it shows not: %q", path, r.Violations)
		}
		sign(t, &tampered, c)
		if certificate.Check(&tampered).Holds() && !free.MatchString(path) {
			t.Errorf("%s was altered and the certificate signed anew, and it holds", path)
		}
	})
	if altered < 150 {
		t.Errorf("%d fields were altered", altered)
	}
	if !certificate.Check(s).Holds() {
		t.Error("the certificate itself was altered")
	}
}

// walk alters each field of v, calls f, and puts it back.
func walk(v reflect.Value, path string, f func(path string)) {
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			walk(v.Field(i), strings.TrimPrefix(path+"."+v.Type().Field(i).Name, "."), f)
		}
	case reflect.Slice:
		for i := range v.Len() {
			walk(v.Index(i), fmt.Sprintf("%s[%d]", path, i), f)
		}
		if v.Len() > 0 { // without its last
			old := reflect.ValueOf(v.Interface())
			v.Set(old.Slice(0, old.Len()-1))
			f(path + " without its last")
			v.Set(old)
		}
	default:
		old := reflect.New(v.Type()).Elem()
		old.Set(v)
		switch v.Kind() {
		case reflect.String:
			v.SetString(v.String() + "x")
		case reflect.Array:
			v.Index(0).SetUint(v.Index(0).Uint() ^ 1)
		case reflect.Int, reflect.Int64:
			v.SetInt(v.Int() + 1)
		default:
			v.SetUint(v.Uint() ^ 1)
		}
		f(path)
		v.Set(old)
	}
}

// TestEverySubjectFieldCounts alters each thing that the certificate is compared with.
func TestEverySubjectFieldCounts(t *testing.T) {
	s := take(t, "", true)
	walk(reflect.ValueOf(s).Elem(), "", func(path string) {
		if certificate.Check(s).Holds() {
			t.Errorf("%s was altered, and the certificate holds", path)
		}
	})
}

func TestDecodeRefuses(t *testing.T) {
	good := string(take(t, "", false).Bytes)
	for what, b := range map[string]string{
		"nothing":         "",
		"another format":  strings.Replace(good, `"format":1`, `"format":2`, 1),
		"a space":         strings.Replace(good, `"format":1`, `"format": 1`, 1),
		"an unknown name": strings.Replace(good, `"format":1`, `"format":1,"more":1`, 1),
		"the end missing": good[:len(good)-1],
		"more at the end": good + "{}",
		"an empty list":   strings.Replace(good, `"channel":`, `"lost":[],"channel":`, 1),
		"a field twice":   strings.Replace(good, `"format":1`, `"format":1,"format":1`, 1),
		"upper-case hash": strings.Replace(good, `"topology":"`, `"topology":"A`, 1),
	} {
		if c, err := certificate.Decode([]byte(b)); err == nil || c != nil {
			t.Errorf("%s: %v, %v", what, c, err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"format":1}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := certificate.Decode(b)
		if err != nil {
			if c != nil {
				t.Error("an error and a certificate")
			}
			return
		}
		again, err := certificate.Encode(c)
		if err != nil || string(again) != string(b) {
			t.Errorf("%q becomes %q: %v", b, again, err)
		}
		s := &certificate.Subject{Bytes: b, Certificate: certificate.Sum(b), Topology: []byte(source)}
		if certificate.Check(s).Holds() {
			t.Error("holds of nothing")
		}
	})
}

// FuzzChannelState: bytes that are not the recorded frames never pass for them.
func FuzzChannelState(f *testing.F) {
	f.Add([]byte{0x0a, 0x0d, 0x0d, 0x0a})
	f.Fuzz(func(t *testing.T, b []byte) {
		s := take(t, "", false)
		s.ChannelState = b
		if certificate.Check(s).Holds() {
			t.Error("holds")
		}
	})
}

// TestSharesNothing keeps the checker apart from what it judges.
func TestSharesNothing(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	seen := map[string]bool{"violin/internal/certificate": false, "violin/internal/topology": false}
	for _, p := range strings.Fields(string(out)) {
		if _, ok := seen[p]; ok {
			seen[p] = true
		} else if strings.HasPrefix(p, "violin/") {
			t.Errorf("the checker rests on %s, which takes part in a cut", p)
		}
	}
	for p, ok := range seen {
		if !ok {
			t.Errorf("%s is not among what go list names: this test looks at nothing", p)
		}
	}
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range f.Imports {
			for _, io := range []string{`"os"`, `"net"`, `"time/`, `"math/rand`} {
				if strings.HasPrefix(i.Path.Value, io) {
					t.Errorf("%s imports %s: the checker is pure", file, i.Path.Value)
				}
			}
		}
	}
}
