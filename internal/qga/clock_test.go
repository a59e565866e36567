package qga

import (
	"encoding/json"
	"errors"
	"fmt"
	"testing"
	"time"

	"violin/internal/qmp"
)

func TestSetClock(t *testing.T) {
	now := time.Unix(1_790_000_000, 123_456_789)
	const refusal = `{"error": {"class": "GenericError", "desc": "hwclock failed to set hardware clock to system time"}}`
	for _, test := range []struct {
		why   string
		guest time.Time // what it says afterwards
		set   string    // its answer
		fails bool
	}{
		{"set", now, `{"return": {}}`, false},
		{"set, but for the RTC", now.Add(-200 * time.Millisecond), refusal, false},
		{"not set", now.Add(-time.Hour), refusal, true},
	} {
		var got string
		c := connect(t, &agent{reply: func(command string, args json.RawMessage) string {
			switch command {
			case "guest-ping":
				return `{"return": {}}`
			case "guest-set-time":
				got = string(args)
				return test.set
			case "guest-get-time":
				return fmt.Sprintf(`{"return": %d}`, test.guest.UnixNano())
			}
			return `{"error": {"class": "CommandNotFound", "desc": "no"}}`
		}}, "")
		err := c.SetClock(t.Context(), func() time.Time { return now })
		var refused *qmp.Error
		if (err != nil) != test.fails || test.fails && !errors.As(err, &refused) {
			t.Errorf("%s: %v", test.why, err)
		}
		if want := `{"time":1790000000123456789}`; got != want {
			t.Errorf("%s: asked for %s, want %s", test.why, got, want)
		}
	}
}
