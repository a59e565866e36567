package qga

import (
	"context"
	"errors"
	"fmt"
	"time"

	"violin/internal/qmp"
)

// clockSlack is what the guest's clock may be off after it was set: the way of the
// commands, on a loaded machine.
const clockSlack = 5 * time.Second

// SetClock steps the guest's wall clock, and with it its RTC, to what now tells when
// the agent is there to hear it. The monotonic clocks are not touched: no timer
// fires for it. It is late by as long as the command takes to arrive.
func (c *Client) SetClock(ctx context.Context, now func() time.Time) error {
	if err := c.Ping(ctx); err != nil {
		return fmt.Errorf("set the guest's clock: %w", err)
	}
	err := c.Execute(ctx, "guest-set-time", map[string]int64{"time": now().UnixNano()}, nil)
	var refused *qmp.Error
	if errors.As(err, &refused) {
		// The agent sets the clock first and then the RTC, by the guest's hwclock. If the
		// RTC alone was not set, the guest has the right time nevertheless.
		var t int64
		if gerr := c.Execute(ctx, "guest-get-time", nil, &t); gerr == nil && now().Sub(time.Unix(0, t)).Abs() < clockSlack {
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("set the guest's clock: %w", err)
	}
	return nil
}
