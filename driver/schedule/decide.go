package schedule

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Grace is how long after its slot a snapshot still counts as on time.
const Grace = 5 * time.Minute

// maxCounted bounds how many missed slots are counted of one rule.
const maxCounted = 10_000

// MadeKey is the key under which the metadata of a snapshot says that a schedule
// made it, with the moment, as RFC 3339 in UTC, as value.
const MadeKey = "scoria.schedule"

// Schedule is a set of rules and the time zone of their wall clock.
type Schedule struct {
	Rules []Rule
	Zone  *time.Location // nil: UTC
}

func (s *Schedule) zone() *time.Location {
	if s.Zone == nil {
		return time.UTC
	}
	return s.Zone
}

// Parse reads rules and the name of a time zone ("" is the host's).
func Parse(rules []string, zone string) (Schedule, error) {
	var s Schedule
	if zone == "" {
		zone = "Local"
	}
	loc, err := time.LoadLocation(zone)
	if err != nil {
		return s, fmt.Errorf("%w: time zone %q: must be a name such as Europe/Brussels, UTC, or empty for the host's: %w", ErrRule, zone, err)
	}
	s.Zone = loc
	if len(rules) > MaxRules {
		return s, fmt.Errorf("%w: %d rules: must be at most %d", ErrRule, len(rules), MaxRules)
	}
	for _, text := range rules {
		r, err := ParseRule(text)
		if err != nil {
			return s, err
		}
		s.Rules = append(s.Rules, r)
	}
	return s, nil
}

// Snapshot is what there is of a volume.
type Snapshot struct {
	Name     string
	Metadata map[string]string
	Clones   int // that read it
}

// Made returns when a schedule made the snapshot, and false if none did.
func (s *Snapshot) Made() (time.Time, bool) {
	at, err := time.Parse(time.RFC3339, s.Metadata[MadeKey])
	if err != nil || !strings.HasPrefix(s.Name, nameOf(at)) {
		return time.Time{}, false
	}
	return at, true
}

// nameOf is what a snapshot of a moment is called.
func nameOf(at time.Time) string { return at.UTC().Format("auto-20060102-150405") }

// Missed are slots of a rule that passed without a snapshot.
type Missed struct {
	Rule        string
	Count       int
	First, Last time.Time
}

// Decision is what is to be done now.
type Decision struct {
	// Create is the name of a snapshot to be made, with Metadata; empty: none.
	Create   string
	Metadata map[string]string
	// Delete names the snapshots that go, oldest first, once Create is there.
	Delete []string
	// Held names those that no rule keeps but clones do.
	Held []string
	// Missed is to be reported once Done is recorded.
	Missed []Missed
	// Done is to be recorded when Create is there: all slots up to it have been
	// dealt with. It differs from what Decide was given only if it has to be.
	Done time.Time
	// Next is when to ask again, at the latest.
	Next time.Time
	// ClockWentBack: slots are counted anew from now on.
	ClockWentBack bool
}

// Decide says what is to be done at now, given up to when slots have been dealt
// with and what there is. done is never zero: a new schedule begins at the moment
// it was made.
func Decide(now time.Time, s *Schedule, done time.Time, have []Snapshot) Decision {
	d := Decision{Done: done}
	if len(s.Rules) == 0 {
		return d
	}
	for i := range s.Rules {
		if next := s.Rules[i].Next(now, s.zone()); d.Next.IsZero() || next.Before(d.Next) {
			d.Next = next
		}
	}
	if done.After(now) {
		if !done.After(d.Next) {
			d.retain(now, s, have)
			return d // these slots were dealt with before the clock went back
		}
		d.ClockWentBack, d.Done = true, now
		d.retain(now, s, have)
		return d
	}
	due := false
	for i := range s.Rules {
		r := &s.Rules[i]
		last := r.Last(now, s.zone())
		if !last.After(done) {
			continue
		}
		due = true
		if last.After(d.Done) {
			d.Done = last
		}
		d.count(r, s.zone(), done, last, now)
	}
	if due {
		d.Create = freeName(nameOf(now), have)
		d.Metadata = map[string]string{MadeKey: now.UTC().Format(time.RFC3339)}
		have = append(slices.Clone(have), Snapshot{Name: d.Create, Metadata: d.Metadata})
	}
	d.retain(now, s, have)
	return d
}

// count adds the slots of r after done that are missed: all but the last one, if
// it is on time.
func (d *Decision) count(r *Rule, loc *time.Location, done, last, now time.Time) {
	m := Missed{Rule: r.String()}
	for slot := r.Next(done, loc); !slot.After(last) && m.Count < maxCounted; slot = r.Next(slot, loc) {
		if slot.Equal(last) && now.Sub(slot) <= Grace {
			break
		}
		if m.Count++; m.Count == 1 {
			m.First = slot
		}
		m.Last = slot
	}
	if m.Count > 0 {
		d.Missed = append(d.Missed, m)
	}
}

func freeName(name string, have []Snapshot) string {
	taken := func(name string) bool {
		return slices.ContainsFunc(have, func(s Snapshot) bool { return s.Name == name })
	}
	unique := name
	for i := 2; taken(unique); i++ {
		unique = fmt.Sprintf("%s-%d", name, i)
	}
	return unique
}

// retain fills in Delete and Held.
func (d *Decision) retain(now time.Time, s *Schedule, have []Snapshot) {
	type made struct {
		*Snapshot
		at time.Time
	}
	var list []made
	for i := range have {
		if at, ok := have[i].Made(); ok && !at.After(now) {
			list = append(list, made{&have[i], at})
		}
	}
	slices.SortStableFunc(list, func(a, b made) int { return a.at.Compare(b.at) })
	keep := make([]bool, len(list))
	if len(list) > 0 {
		keep[len(list)-1] = true
	}
	for i := range s.Rules {
		r := &s.Rules[i]
		slots := 0
		for j := len(list) - 1; j >= 0 && slots < r.keep; j-- {
			// The first after its slot: the one before it belongs to another.
			slot := r.Last(list[j].at, s.zone())
			if j == 0 || list[j-1].at.Before(slot) {
				keep[j] = true
				slots++
			}
		}
	}
	for j := range list {
		switch {
		case keep[j]:
		case list[j].Clones > 0:
			d.Held = append(d.Held, list[j].Name)
		default:
			d.Delete = append(d.Delete, list[j].Name)
		}
	}
}
