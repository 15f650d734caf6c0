package schedule

import (
	"errors"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func mustRule(t testing.TB, text string) *Rule {
	t.Helper()
	r, err := ParseRule(text)
	if err != nil {
		t.Fatal(err)
	}
	return &r
}

func TestRules(t *testing.T) {
	for text, canonical := range map[string]string{
		"every 60m keep 24":                       "every 1h keep 24",
		"Every 90m  keep 1":                       "every 90m keep 1",
		"every 14d keep 3":                        "every 2w keep 3",
		"hourly keep 24":                          "hourly at :00 keep 24",
		"hourly at :45,:15,:15 keep 2":            "hourly at :15,:45 keep 2",
		"daily keep 7":                            "daily at 00:00 keep 7",
		"daily keep 7 at 14:30,2:30":              "daily at 02:30,14:30 keep 7",
		"weekly keep 4":                           "weekly on sun at 00:00 keep 4",
		"weekly at 23:59 on fri,MON keep 4":       "weekly on mon,fri at 23:59 keep 4",
		"monthly keep 12":                         "monthly on 1 at 00:00 keep 12",
		"monthly on 31,1 at 04:00 keep 100000":    "monthly on 1,31 at 04:00 keep 100000",
		"every 1w keep 5":                         "every 1w keep 5",
		"every 366d keep 1":                       "every 366d keep 1",
		"daily at 00:00,06:00,12:00,18:00 keep 9": "daily at 00:00,06:00,12:00,18:00 keep 9",
	} {
		if got := mustRule(t, text).String(); got != canonical {
			t.Errorf("%q reads as %q; want %q", text, got, canonical)
		}
	}
	for text, want := range map[string]string{
		"":                             "is empty",
		"sometimes keep 2":             `"sometimes" is no period`,
		"every keep 2":                 `interval "keep"`,
		"every":                        "interval is missing",
		"every 0h keep 2":              "interval",
		"every 30s keep 2":             "interval",
		"every 367d keep 2":            "interval",
		"every 99999999999h keep 2":    "interval",
		"every -1h keep 2":             "interval",
		"every 1h at 02:00 keep 2":     `"at" does not belong`,
		"daily":                        "how many to keep",
		"daily keep":                   `follows "keep"`,
		"daily keep 0":                 "from 1 to 100000",
		"daily keep 100001":            "from 1 to 100000",
		"daily keep 2 keep 3":          `"keep" does not belong`,
		"daily on mon keep 2":          `"on" does not belong`,
		"daily at 24:00 keep 2":        "hour",
		"daily at 12:60 keep 2":        "minute",
		"daily at 12 keep 2":           "HH:MM",
		"daily at :30 keep 2":          "HH:MM",
		"hourly at 12:30 keep 2":       ":MM",
		"weekly on someday keep 2":     "sun, mon",
		"monthly on 32 keep 2":         "day of the month",
		"monthly on mon keep 2":        "day of the month",
		"daily at 01:00,,02:00 keep 1": "HH:MM",
	} {
		_, err := ParseRule(text)
		if !errors.Is(err, ErrRule) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "must be like") {
			t.Errorf("%q: %v; want %q", text, err, want)
		}
	}
	if _, err := Parse(nil, "Mars/Olympus"); !errors.Is(err, ErrRule) {
		t.Errorf("zone: %v", err)
	}
	if _, err := Parse(strings.Split(strings.Repeat("daily keep 1;", 17), ";")[:17], "UTC"); !errors.Is(err, ErrRule) {
		t.Errorf("17 rules: %v", err)
	}
}

func zone(t testing.TB, name string) *time.Location {
	t.Helper()
	loc, err := time.LoadLocation(name)
	if err != nil {
		t.Fatal(err)
	}
	return loc
}

// TestClocksChange: what happens to times that a day skips, or has twice.
func TestClocksChange(t *testing.T) {
	for _, tt := range []struct {
		rule, zone, from string
		want             string // slots after from, in UTC
	}{
		// Brussels: 2026-03-29 02:00 → 03:00 (01:00 UTC), 2026-10-25 03:00 → 02:00 (01:00 UTC).
		{"daily at 02:30 keep 1", "Europe/Brussels", "2026-03-28T12:00:00Z", "2026-03-29T01:00:00Z 2026-03-30T00:30:00Z"},
		{"daily at 02:00,02:30,03:00 keep 1", "Europe/Brussels", "2026-03-28T12:00:00Z", "2026-03-29T01:00:00Z 2026-03-30T00:00:00Z"},
		{"daily at 02:30 keep 1", "Europe/Brussels", "2026-10-24T12:00:00Z", "2026-10-25T00:30:00Z 2026-10-26T01:30:00Z"},
		{"hourly at :30 keep 1", "Europe/Brussels", "2026-10-24T23:45:00Z", "2026-10-25T00:30:00Z 2026-10-25T01:30:00Z 2026-10-25T02:30:00Z"},
		{"hourly keep 1", "Europe/Brussels", "2026-03-29T00:30:00Z", "2026-03-29T01:00:00Z 2026-03-29T02:00:00Z"},
		{"every 6h keep 1", "Europe/Brussels", "2026-03-28T23:00:00Z", "2026-03-29T00:00:00Z 2026-03-29T06:00:00Z"},
		// Lord Howe: half an hour, 2026-10-04 02:00 → 02:30 (15:30 UTC the day before).
		{"daily at 02:15 keep 1", "Australia/Lord_Howe", "2026-10-03T12:00:00Z", "2026-10-03T15:30:00Z 2026-10-04T15:15:00Z"},
		// Summer time begins at midnight: 2026-09-06 00:00 → 01:00 (04:00 UTC) in Santiago.
		{"daily keep 1", "America/Santiago", "2026-09-05T12:00:00Z", "2026-09-06T04:00:00Z 2026-09-07T03:00:00Z"},
		{"monthly on 31 at 12:00 keep 1", "UTC", "2026-01-31T12:00:00Z", "2026-02-28T12:00:00Z 2026-03-31T12:00:00Z 2026-04-30T12:00:00Z"},
		{"monthly on 30,31 keep 1", "UTC", "2026-02-01T00:00:00Z", "2026-02-28T00:00:00Z 2026-03-30T00:00:00Z 2026-03-31T00:00:00Z"},
		{"weekly on sat,sun at 01:00 keep 1", "UTC", "2026-11-21T01:00:00Z", "2026-11-22T01:00:00Z 2026-11-28T01:00:00Z"},
		{"every 1w keep 1", "UTC", "1969-12-31T00:00:00Z", "1970-01-01T00:00:00Z 1970-01-08T00:00:00Z"},
	} {
		r := mustRule(t, tt.rule)
		at, err := time.Parse(time.RFC3339, tt.from)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for range len(strings.Fields(tt.want)) {
			at = r.Next(at, zone(t, tt.zone))
			got = append(got, at.UTC().Format(time.RFC3339))
		}
		if g := strings.Join(got, " "); g != tt.want {
			t.Errorf("%s in %s after %s:\n%s; want\n%s", tt.rule, tt.zone, tt.from, g, tt.want)
		}
	}
}

var sampleZones = []string{"UTC", "Europe/Brussels", "America/Santiago", "Australia/Lord_Howe", "Asia/Kathmandu", "Africa/Casablanca"}

func drawRule(t *rapid.T) *Rule {
	text := rapid.SampledFrom([]string{
		"every 7m keep 3", "every 1h keep 24", "every 25h keep 2", "hourly at :00,:30 keep 6", "daily at 02:30 keep 7", "daily at 00:00,02:00,02:15,23:59 keep 5",
		"weekly on sun,wed at 02:30 keep 4", "monthly on 1,31 at 00:30 keep 12",
	}).Draw(t, "rule")
	r, err := ParseRule(text)
	if err != nil {
		t.Fatal(err)
	}
	return &r
}

// TestNextAndLastAgree: t lies between two slots that are next to each other.
func TestNextAndLastAgree(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r, loc := drawRule(t), mustZone(t, rapid.SampledFrom(sampleZones).Draw(t, "zone"))
		at := time.Unix(rapid.Int64Range(1.7e9, 1.9e9).Draw(t, "at"), 0)
		if rapid.Bool().Draw(t, "on a slot") {
			at = r.Next(at, loc)
		}
		last, next := r.Last(at, loc), r.Next(at, loc)
		if last.After(at) || !next.After(at) {
			t.Fatalf("%s: %s is not between %s and %s", r, at, last, next)
		}
		if n := r.Next(last, loc); !n.Equal(next) {
			t.Fatalf("%s: after %s comes %s, not %s", r, last, n, next)
		}
		if l := r.Last(next.Add(-time.Second), loc); !l.Equal(last) {
			t.Fatalf("%s: before %s comes %s, not %s", r, next, l, last)
		}
		if l := r.Last(next, loc); !l.Equal(next) {
			t.Fatalf("%s: the last slot at %s is %s", r, next, l)
		}
	})
}

func FuzzParseRule(f *testing.F) {
	for _, s := range []string{"every 1h keep 24", "daily at 02:30,14:00 keep 7", "weekly on sun keep 4", "monthly on 1,31 at 00:00 keep 12", "hourly at :15 keep 2"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		r, err := ParseRule(text)
		if err != nil {
			return
		}
		again, err := ParseRule(r.String())
		if err != nil || again.String() != r.String() {
			t.Fatalf("%q reads as %q, that as %q, %v", text, r, again, err)
		}
		at := time.Date(2026, 3, 29, 0, 30, 0, 0, time.UTC)
		if next := r.Next(at, time.UTC); !next.After(at) {
			t.Fatalf("%s: next slot %s", r, next)
		}
	})
}

func mustZone(t *rapid.T, name string) *time.Location {
	loc, err := time.LoadLocation(name)
	if err != nil {
		t.Fatal(err)
	}
	return loc
}
