package e2e

import (
	"encoding/json"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// report is what verify says.
type report struct {
	Certificate               string
	Holds                     bool
	Violations, Proves, Notes []string
}

func verify(t *testing.T, dirs []string, args ...string) (report, error) {
	t.Helper()
	var r report
	out, err := command(t, dirs, append([]string{"verify", "--output", "json"}, args...)...)
	if jerr := json.Unmarshal(out, &r); jerr != nil && err == nil {
		t.Fatal(jerr)
	}
	return r, err
}

// verified checks that a snapshot holds, and that tshark opens its channel state.
func verified(t *testing.T, dirs []string, snapshot string) {
	t.Helper()
	r, err := verify(t, dirs, snapshot, "--read-data")
	if err != nil || !r.Holds || len(r.Proves) == 0 {
		t.Fatalf("%s does not hold: %v, %q", snapshot, err, r.Violations)
	}
	t.Logf("%s: certificate %s, notes %q", snapshot, r.Certificate, r.Notes)
	if _, err := verify(t, dirs, snapshot, "--certificate", r.Certificate[:16]); err != nil {
		t.Errorf("%s does not have the certificate that it has", snapshot)
	}
	if _, err := verify(t, dirs, snapshot, "--certificate", strings.Repeat("0", 64)); err == nil {
		t.Errorf("%s has a certificate that nothing has", snapshot)
	}
	tshark, err := exec.LookPath("tshark")
	if err != nil {
		t.Log("tshark is not installed: the channel state is not opened")
		return
	}
	file := filepath.Join(t.TempDir(), "frames.pcapng")
	must(t, dirs, "frames", snapshot, "--file", file)
	if out, err := exec.Command(tshark, "-r", file, "-T", "fields", "-e", "frame.interface_name", "-e", "frame.comment").CombinedOutput(); err != nil {
		t.Errorf("tshark: %v: %s", err, out)
	} else {
		t.Logf("%s: %d frames in flight", snapshot, strings.Count(string(out), "{\"epoch\""))
	}
}

// tampered flips a byte of each pack of the store, one after the other, and
// expects that the snapshot does not hold then.
func tampered(t *testing.T, dirs []string, state, snapshot string) {
	t.Helper()
	_, id, _ := strings.Cut(snapshot, "@")
	if id == "latest" {
		r, err := command(t, dirs, "snapshots", "pair", "--output", "json")
		if err != nil {
			t.Fatal(err)
		}
		var list struct{ Snapshots []struct{ ID string } }
		if err := json.Unmarshal(r, &list); err != nil || len(list.Snapshots) == 0 {
			t.Fatalf("snapshots: %v", err)
		}
		id = list.Snapshots[len(list.Snapshots)-1].ID
	}
	files := 0
	err := filepath.WalkDir(filepath.Join(state, "store"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		if !strings.Contains(path, "/packs/") { // the document is in etcd
			return nil
		}
		files++
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		at := len(b) / 2
		b[at] ^= 1
		if err := os.WriteFile(path, b, 0o600); err != nil {
			return err
		}
		_, failed := verify(t, dirs, "pair@"+id, "--read-data")
		b[at] ^= 1
		if err := os.WriteFile(path, b, 0o600); err != nil {
			return err
		}
		if failed == nil {
			t.Logf("%s with a byte flipped: the snapshot needs none of it", path)
			files--
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if files < 2 {
		t.Errorf("%d files of the store were found that the snapshot needs, want packs of pages and of chunks", files)
	}
	if r, err := verify(t, dirs, "pair@"+id, "--read-data"); err != nil {
		t.Errorf("with every byte as it was: %v, %q", err, r.Violations)
	}
}
