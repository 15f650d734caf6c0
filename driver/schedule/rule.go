package schedule

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Bounds of what a rule may say.
const (
	MinEvery = time.Minute
	MaxEvery = 366 * 24 * time.Hour
	MaxKeep  = 100_000
	MaxRules = 16
)

// ErrRule refuses a rule; the message says what would be right.
var ErrRule = errors.New("bad schedule rule")

type period uint8

const (
	every period = iota
	hourly
	daily
	weekly
	monthly
)

var periods = map[string]period{"every": every, "hourly": hourly, "daily": daily, "weekly": weekly, "monthly": monthly}

var weekdays = []string{"sun", "mon", "tue", "wed", "thu", "fri", "sat"}

// Rule is one line of a schedule.
type Rule struct {
	period   period
	interval time.Duration // of every
	minutes  []int         // of the day, or of the hour; sorted
	days     []int         // of the week (0 is Sunday) or of the month; sorted
	keep     int
}

// Keep is how many slots the rule keeps a snapshot of.
func (r *Rule) Keep() int { return r.keep }

const usage = `must be like "every 1h keep 24", "hourly at :15 keep 24", "daily at 02:30 keep 7", "weekly on sun at 02:30 keep 4" or "monthly on 1 at 02:30 keep 12"`

// ParseRule reads a rule as the package doc writes it. The error wraps ErrRule.
func ParseRule(text string) (Rule, error) {
	r, err := parse(strings.Fields(strings.ToLower(text)))
	if err != nil {
		return r, fmt.Errorf("%w %q: %w: %s", ErrRule, text, err, usage)
	}
	return r, nil
}

func parse(words []string) (r Rule, err error) {
	if len(words) == 0 {
		return r, errors.New("is empty")
	}
	var ok bool
	if r.period, ok = periods[words[0]]; !ok {
		return r, fmt.Errorf("%q is no period", words[0])
	}
	words = words[1:]
	if r.period == every {
		if len(words) == 0 {
			return r, errors.New("the interval is missing")
		}
		if r.interval, err = parseInterval(words[0]); err != nil {
			return r, err
		}
		words = words[1:]
	}
	for ; len(words) >= 2; words = words[2:] {
		switch word, value := words[0], words[1]; {
		case word == "keep" && r.keep == 0:
			if r.keep, err = parseNumber("number to keep", value, 1, MaxKeep); err != nil {
				return r, err
			}
		case word == "at" && r.period != every && r.minutes == nil:
			if r.minutes, err = parseList(value, r.parseTime); err != nil {
				return r, err
			}
		case word == "on" && (r.period == weekly || r.period == monthly) && r.days == nil:
			if r.days, err = parseList(value, r.parseDay); err != nil {
				return r, err
			}
		default:
			return r, fmt.Errorf("%q does not belong there", word)
		}
	}
	switch {
	case len(words) > 0:
		return r, fmt.Errorf("nothing follows %q", words[0])
	case r.keep == 0:
		return r, errors.New("how many to keep is missing")
	}
	if r.minutes == nil && r.period != every {
		r.minutes = []int{0}
	}
	if r.days == nil && r.period == monthly {
		r.days = []int{1}
	}
	if r.days == nil && r.period == weekly {
		r.days = []int{0}
	}
	return r, nil
}

// parseInterval reads 15m, 2h, 1d or 1w, in whole minutes.
func parseInterval(text string) (time.Duration, error) {
	unit, number := time.Duration(0), ""
	if text != "" {
		number = text[:len(text)-1]
		unit = map[byte]time.Duration{'m': time.Minute, 'h': time.Hour, 'd': 24 * time.Hour, 'w': 7 * 24 * time.Hour}[text[len(text)-1]]
	}
	n, err := strconv.ParseUint(number, 10, 31)
	if err != nil || unit == 0 || n == 0 || n > uint64(MaxEvery/unit) {
		return 0, fmt.Errorf("interval %q is not from 1m to 366d, with m, h, d or w", text)
	}
	return time.Duration(n) * unit, nil
}

func parseNumber(what, text string, low, high int) (int, error) {
	n, err := strconv.Atoi(text)
	if err != nil || n < low || n > high {
		return 0, fmt.Errorf("%s %q is not from %d to %d", what, text, low, high)
	}
	return n, nil
}

// parseList reads values with commas between them, sorts them and drops doubles.
func parseList(text string, one func(string) (int, error)) ([]int, error) {
	const longest = 64
	var list []int
	for part := range strings.SplitSeq(text, ",") {
		v, err := one(part)
		if err != nil {
			return nil, err
		}
		if list = append(list, v); len(list) > longest {
			return nil, fmt.Errorf("more than %d times", longest)
		}
	}
	slices.Sort(list)
	return slices.Compact(list), nil
}

// parseTime reads HH:MM, or :MM for an hourly rule, as minutes.
func (r *Rule) parseTime(text string) (int, error) {
	hour, minute, found := strings.Cut(text, ":")
	if !found || len(minute) != 2 || r.period == hourly && hour != "" || r.period != hourly && hour == "" {
		return 0, fmt.Errorf("time %q is not HH:MM (:MM for an hourly rule)", text)
	}
	m, err := parseNumber("minute", minute, 0, 59)
	if err != nil || r.period == hourly {
		return m, err
	}
	h, err := parseNumber("hour", hour, 0, 23)
	return h*60 + m, err
}

func (r *Rule) parseDay(text string) (int, error) {
	if r.period == monthly {
		return parseNumber("day of the month", text, 1, 31)
	}
	for i, name := range weekdays {
		if text == name {
			return i, nil
		}
	}
	return 0, fmt.Errorf("day %q is not one of %s", text, strings.Join(weekdays, ", "))
}

// String writes the rule so that ParseRule reads the same.
func (r Rule) String() string {
	var b strings.Builder
	for name, p := range periods {
		if p == r.period {
			b.WriteString(name)
		}
	}
	if r.period == every {
		b.WriteString(" " + intervalText(r.interval))
	}
	for i, d := range r.days {
		sep := ","
		if i == 0 {
			sep = " on "
		}
		if r.period == weekly {
			b.WriteString(sep + weekdays[d])
		} else {
			b.WriteString(sep + strconv.Itoa(d))
		}
	}
	for i, m := range r.minutes {
		sep := ","
		if i == 0 {
			sep = " at "
		}
		if r.period == hourly {
			fmt.Fprintf(&b, "%s:%02d", sep, m)
		} else {
			fmt.Fprintf(&b, "%s%02d:%02d", sep, m/60, m%60)
		}
	}
	fmt.Fprintf(&b, " keep %d", r.keep)
	return b.String()
}

func intervalText(d time.Duration) string {
	for _, u := range []struct {
		unit time.Duration
		name string
	}{{7 * 24 * time.Hour, "w"}, {24 * time.Hour, "d"}, {time.Hour, "h"}} {
		if d%u.unit == 0 {
			return strconv.Itoa(int(d/u.unit)) + u.name
		}
	}
	return strconv.Itoa(int(d/time.Minute)) + "m"
}
