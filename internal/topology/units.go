package topology

import (
	"errors"
	"math"
	"strconv"
	"strings"
	"time"
)

// unit is a suffix and what it multiplies by.
type unit struct {
	suffix string
	factor uint64
}

// From the largest, so that the first that divides gives the shortest text.
var (
	sizeUnits = []unit{{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}}
	rateUnits = []unit{{"Gbit", 1e9}, {"Mbit", 1e6}, {"kbit", 1e3}, {"bit", 1}}
)

var errUnits = errors.New("not a whole number with a unit")

// parseUnits reads a whole number followed by a unit.
func parseUnits(s string, units []unit) (uint64, error) {
	for _, u := range units {
		digits, ok := strings.CutSuffix(s, u.suffix)
		if !ok {
			continue
		}
		n, err := parseNumber(digits)
		if err != nil {
			return 0, errUnits
		}
		if n > math.MaxInt64/u.factor {
			return 0, errors.New("too large")
		}
		return n * u.factor, nil
	}
	return 0, errUnits
}

func formatUnits(n uint64, units []unit) string {
	for _, u := range units {
		if n >= u.factor && n%u.factor == 0 {
			return strconv.FormatUint(n/u.factor, 10) + u.suffix
		}
	}
	return strconv.FormatUint(n, 10)
}

// parseNumber takes digits only, so no sign, underscore or other base.
func parseNumber(s string) (uint64, error) {
	if s == "" || strings.Trim(s, "0123456789") != "" {
		return 0, errors.New("not a whole number")
	}
	return strconv.ParseUint(s, 10, 63)
}

func parseDuration(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil {
		return 0, errors.New("not a duration")
	}
	if d < 0 || strings.HasPrefix(s, "-") {
		return 0, errors.New("negative")
	}
	return d, nil
}

func parsePercent(s string) (Percent, error) {
	digits, ok := strings.CutSuffix(s, "%")
	if !ok || digits == "" || strings.Trim(digits, "0123456789.") != "" {
		return 0, errors.New("not a percentage")
	}
	p, err := strconv.ParseFloat(digits, 64)
	if err != nil {
		return 0, errors.New("not a percentage")
	}
	if p > 100 {
		return 0, errors.New("more than 100%")
	}
	return Percent(p), nil
}

// String is the percentage as Parse reads it.
func (p Percent) String() string {
	return strconv.FormatFloat(float64(p), 'f', -1, 64) + "%"
}

// ParseSize reads a size in bytes as topologies write it, such as 1GiB.
func ParseSize(s string) (uint64, error) { return parseUnits(s, sizeUnits) }
