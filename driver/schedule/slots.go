package schedule

import (
	"slices"
	"time"
)

// Next is the rule's first slot after t, in zone loc.
func (r *Rule) Next(t time.Time, loc *time.Location) time.Time {
	if r.period == every {
		return epochSlot(t, r.interval).Add(r.interval)
	}
	for i, day := 0, dayOf(t, loc, -1); ; i, day = i+1, day.next() {
		if s, ok := first(r.slotsOf(day, loc), func(s time.Time) bool { return s.After(t) }); ok {
			return s
		}
		if i > horizonDays {
			panic("schedule: no slot within a year: " + r.String())
		}
	}
}

// Last is the rule's last slot at or before t, in zone loc.
func (r *Rule) Last(t time.Time, loc *time.Location) time.Time {
	if r.period == every {
		return epochSlot(t, r.interval)
	}
	for i, day := 0, dayOf(t, loc, 1); ; i, day = i+1, day.previous() {
		slots := r.slotsOf(day, loc)
		slices.Reverse(slots)
		if s, ok := first(slots, func(s time.Time) bool { return !s.After(t) }); ok {
			return s
		}
		if i > horizonDays {
			panic("schedule: no slot within a year: " + r.String())
		}
	}
}

// horizonDays is longer than any rule but every goes without a slot.
const horizonDays = 366

func first(list []time.Time, ok func(time.Time) bool) (time.Time, bool) {
	if i := slices.IndexFunc(list, ok); i >= 0 {
		return list[i], true
	}
	return time.Time{}, false
}

// epochSlot is the last multiple of d since 1970 at or before t.
func epochSlot(t time.Time, d time.Duration) time.Time {
	seconds, step := t.Unix(), int64(d/time.Second)
	n := seconds / step
	if seconds%step < 0 {
		n--
	}
	return time.Unix(n*step, 0).UTC()
}

// date is a day of the calendar.
type date struct {
	year  int
	month time.Month
	day   int
}

// dayOf is the day of t in loc, some days later.
func dayOf(t time.Time, loc *time.Location, later int) date {
	t = t.In(loc)
	return date{t.Year(), t.Month(), t.Day()}.plus(later)
}

func (d date) plus(days int) date {
	t := time.Date(d.year, d.month, d.day+days, 12, 0, 0, 0, time.UTC)
	return date{t.Year(), t.Month(), t.Day()}
}

func (d date) next() date     { return d.plus(1) }
func (d date) previous() date { return d.plus(-1) }

func (d date) weekday() int {
	return int(time.Date(d.year, d.month, d.day, 12, 0, 0, 0, time.UTC).Weekday())
}

// slotsOf lists the rule's slots on a day, in order.
func (r *Rule) slotsOf(d date, loc *time.Location) (slots []time.Time) {
	switch r.period {
	case weekly:
		if !slices.Contains(r.days, d.weekday()) {
			return nil
		}
	case monthly:
		last := date{d.year, d.month + 1, 0}.plus(0).day
		if !slices.ContainsFunc(r.days, func(day int) bool { return min(day, last) == d.day }) {
			return nil
		}
	case hourly:
		return r.hourlySlots(d, loc)
	}
	for _, m := range r.minutes {
		slots = append(slots, wallTime(d, m, loc))
	}
	return slices.CompactFunc(slots, time.Time.Equal) // several may fall into one gap
}

// hourlySlots are at the rule's minutes of each hour that the day really has: 23
// or 25 of them where the clocks change.
func (r *Rule) hourlySlots(d date, loc *time.Location) (slots []time.Time) {
	end := wallTime(d.next(), 0, loc)
	for t := wallTime(d, 0, loc); t.Before(end); {
		hour := t.Add(-time.Duration(t.Minute())*time.Minute - time.Duration(t.Second())*time.Second)
		for _, m := range r.minutes {
			if s := hour.Add(time.Duration(m) * time.Minute); !s.Before(t) && s.Before(end) {
				slots = append(slots, s)
			}
		}
		t = hour.Add(time.Hour)
	}
	slices.SortFunc(slots, time.Time.Compare)
	return slices.CompactFunc(slots, time.Time.Equal)
}

// wallTime is the moment at which the clocks in loc show a time on a day: the
// first, if they do so twice; the one at which they are put forward, if they skip
// it.
func wallTime(d date, minutes int, loc *time.Location) time.Time {
	t := time.Date(d.year, d.month, d.day, minutes/60, minutes%60, 0, 0, loc)
	shown := t.Day() == d.day && t.Hour()*60+t.Minute() == minutes
	start, end := t.ZoneBounds()
	if !shown {
		// t is off by the length of the gap, to one side or the other.
		wanted := time.Date(d.year, d.month, d.day, minutes/60, minutes%60, 0, 0, time.UTC)
		got := time.Date(t.Year(), t.Month(), t.Day(), t.Hour(), t.Minute(), 0, 0, time.UTC)
		if got.After(wanted) {
			return start
		}
		return end
	}
	if start.IsZero() {
		return t
	}
	_, now := t.Zone()
	_, before := start.Add(-time.Second).Zone()
	if earlier := t.Add(time.Duration(now-before) * time.Second); earlier.Before(start) && sameWall(earlier, t) {
		return earlier
	}
	return t
}

func sameWall(a, b time.Time) bool {
	return a.Year() == b.Year() && a.YearDay() == b.YearDay() && a.Hour() == b.Hour() && a.Minute() == b.Minute()
}
