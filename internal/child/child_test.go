package child

import (
	"os/exec"
	"strconv"
	"strings"
	"testing"
)

// orphan starts a process whose parent, a shell, has ended, and returns its number.
func orphan(t *testing.T, name string) int {
	t.Helper()
	cmd := exec.Command("sh", "-c", "sleep 600 >/dev/null 2>&1 & echo $!")
	Mark(cmd, name)
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if p, err := Find(name); err == nil && p != nil {
			_ = p.Kill()
		}
	})
	return pid
}

func TestFindsWhatOthersStarted(t *testing.T) {
	dir := t.TempDir()
	one, other := orphan(t, dir+"/run/one"), orphan(t, dir+"/run2/one")
	p, err := Find(dir + "/run/one")
	if err != nil || p == nil || p.PID() != one {
		t.Fatalf("%+v, %v; want process %d", p, err, one)
	}
	below, err := Below(dir + "/run")
	if err != nil || len(below) != 1 || below[0].PID() != one {
		t.Errorf("%v, %v: want process %d, and not %d", below, err, one, other)
	}
	select {
	case <-p.Done():
		t.Error("it is said to have ended")
	default:
	}
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	<-below[0].Done()
	if err := p.Kill(); err != nil {
		t.Errorf("a second time: %v", err)
	}
	if p, err := Find(dir + "/run/one"); err != nil || p != nil {
		t.Errorf("one that has ended is found: %+v, %v", p, err)
	}
}

func TestStarted(t *testing.T) {
	cmd := exec.Command("sh", "-c", "exit 3")
	Mark(cmd, t.TempDir())
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := Started(cmd).Err(); err == nil || !strings.Contains(err.Error(), "exit status 3") {
		t.Error(err)
	}
}

// What a marked process starts and marks has the new name alone.
func TestMarkReplaces(t *testing.T) {
	cmd := exec.Command("true")
	Mark(cmd, "/a")
	Mark(cmd, "/b")
	n := 0
	for _, v := range cmd.Env {
		if strings.HasPrefix(v, Variable+"=") {
			n++
		}
	}
	if n != 1 || cmd.Env[len(cmd.Env)-1] != Variable+"=/b" {
		t.Errorf("%d names, the last %s", n, cmd.Env[len(cmd.Env)-1])
	}
}
