package metamorphic

import (
	"regexp"
	"slices"
	"time"
)

// shrinkLimits bound what shrinking costs.
type shrinkLimits struct {
	attempts int           // of parts of the trace
	each     int           // times that a part is run before it counts as one that works
	total    time.Duration // no attempt begins later
}

// shrunk is the smallest part of a trace that was found to fail.
type shrunk struct {
	trace    *trace
	err      error // of its last failure; nil: the trace never failed again
	attempts int
}

// details are what differs between two failures of the same kind: the operation that found
// it, names, numbers, and what was being done when the daemon died.
var details = regexp.MustCompile(`^operation [^:]*: |^at the end: [a-z]+[^:]*: |\b[a-z]/v[0-9]+(@[a-z0-9-]+)?|\[[^]]*\]|[0-9]+`)

// alike reports whether two failures look like the same one.
func alike(a, b error) bool {
	text := func(err error) string {
		s := details.ReplaceAllString(err.Error(), "")
		return s[:min(len(s), 60)]
	}
	return text(a) == text(b)
}

// shrink leaves operations out of a trace as long as it fails alike (delta debugging):
// half of them, quarters, and so on, down to single ones. run runs a trace. A failure
// that depends on the moment may not come back at once, so each part is run several
// times.
func shrink(t *trace, failure error, l shrinkLimits, run func(*trace) error) shrunk {
	s := shrunk{trace: t}
	began := time.Now()
	left := func() bool { return s.attempts < l.attempts && time.Since(began) < l.total }
	fails := func(ops []op) bool {
		c := &trace{settings: t.settings, ops: ops}
		s.attempts++
		for range l.each {
			if err := run(c); err != nil && alike(err, failure) {
				s.trace, s.err = c, err
				return true
			}
		}
		return false
	}
	if !left() || !fails(t.ops) {
		return s
	}
	for size := (len(t.ops) + 1) / 2; left(); {
		removed := false
		// From the end on: what comes after the failure goes at once, and what comes
		// before it mostly can go before what it needs.
		for end := len(s.trace.ops); end > 0 && left(); end -= size {
			from := max(0, end-size)
			if rest := slices.Concat(s.trace.ops[:from], s.trace.ops[end:]); fails(rest) {
				removed = true
			}
		}
		if size == 1 && !removed {
			break
		}
		if !removed || size > len(s.trace.ops) {
			size = max(1, min(size, len(s.trace.ops))/2)
		}
	}
	return s
}
