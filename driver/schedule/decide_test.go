package schedule

import (
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func at(t testing.TB, text string) time.Time {
	t.Helper()
	v, err := time.Parse("2006-01-02 15:04:05", text)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func mustParse(t testing.TB, rules ...string) *Schedule {
	t.Helper()
	s, err := Parse(rules, "UTC")
	if err != nil {
		t.Fatal(err)
	}
	return &s
}

func made(moments ...time.Time) (list []Snapshot) {
	for _, m := range moments {
		list = append(list, Snapshot{Name: nameOf(m), Metadata: map[string]string{MadeKey: m.UTC().Format(time.RFC3339)}})
	}
	return list
}

// TestDecide walks through a life with one rule.
func TestDecide(t *testing.T) {
	s := mustParse(t, "every 1h keep 2")
	h := func(hour, minute int) time.Time { return time.Date(2026, 5, 1, hour, minute, 0, 0, time.UTC) }
	for _, tt := range []struct {
		name      string
		now, done time.Time
		have      []Snapshot
		create    string
		del       string
		missed    string // first-last count
		wantDone  time.Time
		back      bool
	}{
		{"not due", h(10, 30), h(10, 0), nil, "", "", "", h(10, 0), false},
		{"on time", h(11, 0), h(10, 0), nil, "auto-20260501-110000", "", "", h(11, 0), false},
		{"on time, a little late", h(11, 4), h(10, 0), nil, "auto-20260501-110400", "", "", h(11, 0), false},
		{"new schedule", h(11, 0), h(10, 20), nil, "auto-20260501-110000", "", "", h(11, 0), false},
		{"late", h(11, 30), h(10, 0), nil, "auto-20260501-113000", "", "11-11 1", h(11, 0), false},
		{"down, back in time", h(14, 1), h(10, 0), nil, "auto-20260501-140100", "", "11-13 3", h(14, 0), false},
		{"down, back late", h(14, 59), h(10, 0), nil, "auto-20260501-145900", "", "11-14 4", h(14, 0), false},
		{"retention", h(12, 0), h(11, 0), made(h(9, 0), h(10, 0), h(11, 0)), "auto-20260501-120000", "auto-20260501-090000 auto-20260501-100000", "", h(12, 0), false},
		{"retention without a run", h(11, 30), h(11, 0), made(h(9, 0), h(10, 0), h(11, 0)), "", "auto-20260501-090000", "", h(11, 0), false},
		{"two in a slot: the first stays", h(11, 30), h(11, 0), made(h(10, 0), h(10, 10), h(11, 0)), "", "auto-20260501-101000", "", h(11, 0), false},
		{"name taken", h(11, 0), h(10, 0), []Snapshot{{Name: "auto-20260501-110000"}}, "auto-20260501-110000-2", "", "", h(11, 0), false},
		{"back by minutes", h(10, 55), h(11, 0), made(h(10, 0), h(11, 0)), "", "", "", h(11, 0), false},
		{"back by hours", h(8, 55), h(11, 0), made(h(10, 0), h(11, 0)), "", "", "", h(8, 55), true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := Decide(tt.now, s, tt.done, tt.have)
			missed := ""
			for _, m := range d.Missed {
				missed += strings.TrimSpace(m.First.Format("15") + "-" + m.Last.Format("15") + " " + string(rune('0'+m.Count)))
			}
			if d.Create != tt.create || strings.Join(d.Delete, " ") != tt.del || missed != tt.missed || !d.Done.Equal(tt.wantDone) || d.ClockWentBack != tt.back {
				t.Fatalf("%+v", d)
			}
			if !d.Next.After(tt.now) || d.Next.Sub(tt.now) > time.Hour {
				t.Fatalf("next %s", d.Next)
			}
		})
	}
}

// TestOneSnapshotServesAllRules: each rule keeps what suits it, and no more.
func TestOneSnapshotServesAllRules(t *testing.T) {
	s := mustParse(t, "every 1h keep 24", "daily keep 7", "weekly on mon keep 4", "monthly keep 12")
	done := at(t, "2024-01-01 00:00:00")
	var have []Snapshot
	for now := done; now.Before(at(t, "2026-05-20 10:30:00")); now = now.Add(time.Hour) {
		d := Decide(now, s, done, have)
		done = d.Done
		if len(d.Missed) > 0 || d.ClockWentBack {
			t.Fatalf("%+v", d)
		}
		have = carryOut(t, have, d)
	}
	var got []string
	for _, h := range have {
		got = append(got, strings.TrimPrefix(h.Name, "auto-"))
	}
	// 12 months, 4 Mondays, 7 days, 24 hours; some of them are the same.
	want := strings.Fields(`20250601-000000 20250701-000000 20250801-000000 20250901-000000 20251001-000000 20251101-000000
		20251201-000000 20260101-000000 20260201-000000 20260301-000000 20260401-000000 20260427-000000 20260501-000000
		20260504-000000 20260511-000000 20260514-000000 20260515-000000 20260516-000000 20260517-000000 20260518-000000 20260519-000000`)
	for now := at(t, "2026-05-19 11:00:00"); !now.After(at(t, "2026-05-20 10:00:00")); now = now.Add(time.Hour) {
		want = append(want, now.Format("20060102-150405"))
	}
	if !slices.Equal(got, want) {
		t.Fatalf("kept\n%v\nwant\n%v", got, want)
	}
}

func carryOut(t testing.TB, have []Snapshot, d Decision) []Snapshot {
	t.Helper()
	if d.Create != "" {
		have = append(have, Snapshot{Name: d.Create, Metadata: d.Metadata})
	}
	for _, name := range d.Delete {
		i := slices.IndexFunc(have, func(s Snapshot) bool { return s.Name == name })
		if i < 0 {
			t.Fatalf("deletes %s, which is not there", name)
		}
		have = slices.Delete(have, i, i+1)
	}
	return have
}

// TestWhatNeverGoes: others' snapshots, those with clones, and those from a time
// that has not come.
func TestWhatNeverGoes(t *testing.T) {
	s := mustParse(t, "every 1h keep 1")
	now := at(t, "2026-05-01 12:00:00")
	old := made(now.Add(-48*time.Hour), now.Add(-47*time.Hour), now.Add(-46*time.Hour), now.Add(1000*time.Hour), now.Add(2000*time.Hour))
	old[1].Clones = 3
	have := append(old, Snapshot{Name: "mine"}, Snapshot{Name: "auto-20200101-000000"},
		Snapshot{Name: "copied", Metadata: map[string]string{MadeKey: "2020-01-01T00:00:00Z"}},
		Snapshot{Name: "auto-20200101-000000-2", Metadata: map[string]string{MadeKey: "once"}})
	d := Decide(now, s, now.Add(-time.Hour), have)
	if !slices.Equal(d.Delete, []string{old[0].Name, old[2].Name}) || !slices.Equal(d.Held, []string{old[1].Name}) {
		t.Fatalf("%+v", d)
	}
	if d := Decide(now, &Schedule{}, now, have); d.Create != "" || len(d.Delete) != 0 || !d.Next.IsZero() {
		t.Fatalf("without rules: %+v", d)
	}
}

// TestLifeOfASchedule runs random schedules over random days: looks late, outages,
// failures between decision and record, changed rules, clones, a clock that
// jumps.
func TestLifeOfASchedule(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		loc := mustZone(t, rapid.SampledFrom(sampleZones).Draw(t, "zone"))
		draw := func() *Schedule {
			s := &Schedule{Zone: loc}
			for range rapid.IntRange(1, 3).Draw(t, "rules") {
				s.Rules = append(s.Rules, *drawRule(t))
			}
			return s
		}
		s := draw()
		now := time.Unix(rapid.Int64Range(1.77e9, 1.79e9).Draw(t, "start"), 0)
		done := now
		have := []Snapshot{{Name: "mine"}}
		for range rapid.IntRange(1, 40).Draw(t, "looks") {
			step := rapid.SampledFrom([]time.Duration{time.Minute, 29 * time.Minute, time.Hour, 5 * time.Hour, 30 * time.Hour, 40 * 24 * time.Hour, -10 * time.Minute, -100 * time.Hour}).Draw(t, "step")
			now = now.Add(step)
			d := Decide(now, s, done, have)
			check(t, s, now, done, have, d)
			if d.Create != "" && rapid.IntRange(0, 9).Draw(t, "dies") == 0 {
				continue // before anything was done: decided again
			}
			done = d.Done
			if d.Create != "" {
				have = append(have, Snapshot{Name: d.Create, Metadata: d.Metadata, Clones: rapid.IntRange(0, 5).Draw(t, "clones") / 5})
			}
			have = slices.DeleteFunc(have, func(h Snapshot) bool { return slices.Contains(d.Delete, h.Name) })
			if again := Decide(now, s, done, have); again.Create != "" || len(again.Missed) > 0 || len(again.Delete) > 0 {
				t.Fatalf("decided twice: %+v, then %+v", d, again)
			}
			if rapid.IntRange(0, 19).Draw(t, "change") == 0 {
				s = draw()
			}
		}
	})
}

// check holds one decision to the promises.
func check(t *rapid.T, s *Schedule, now, done time.Time, have []Snapshot, d Decision) {
	slots := 0 // that have to be dealt with, by one rule at least
	for i := range s.Rules {
		r := &s.Rules[i]
		n, missed := 0, 0
		for slot := r.Next(done, s.zone()); !slot.After(now); slot = r.Next(slot, s.zone()) {
			n++
			onTime := now.Sub(slot) <= Grace && r.Next(slot, s.zone()).After(now)
			if !onTime {
				missed++
			}
		}
		slots += n
		reported := 0
		for _, m := range d.Missed {
			if m.Rule == r.String() {
				reported = m.Count
			}
		}
		if reported != min(missed, maxCounted) {
			t.Fatalf("%s: %d missed, %d reported: %+v", r, missed, reported, d)
		}
	}
	if (d.Create != "") != (slots > 0) {
		t.Fatalf("%d slots since %s, at %s: %+v", slots, done, now, d)
	}
	if d.Done.After(now) && !d.Done.Equal(done) || d.Done.Before(done) && !d.ClockWentBack || !d.Next.After(now) {
		t.Fatalf("at %s, done %s: %+v", now, done, d)
	}
	kept := 0
	for _, h := range have {
		if slices.Contains(d.Delete, h.Name) {
			m, ok := h.Made()
			if !ok || h.Clones > 0 || m.After(now) {
				t.Fatalf("%+v is deleted at %s", h, now)
			}
		} else if m, ok := h.Made(); ok && h.Clones == 0 && !m.After(now) {
			kept++
		}
	}
	limit := 1 // the newest
	for i := range s.Rules {
		limit += s.Rules[i].keep
	}
	if kept > limit || slices.Contains(d.Delete, d.Create) {
		t.Fatalf("%d kept of at most %d: %+v", kept, limit, d)
	}
}
