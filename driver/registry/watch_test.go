package registry

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// TestHistoryIsWhatWasCommitted: a watch from any revision gets exactly the later
// events under its prefix, in order, or ends at once if part of them is forgotten.
func TestHistoryIsWhatWasCommitted(t *testing.T) {
	const limit, buffer = 16, 64
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 0))
		h := newHub(limit, buffer)
		var all []Event
		revision := int64(100) // as after a restart: the history begins later
		for range 40 {
			revision++
			events := make([]Event, 1+r.IntN(limit+limit/2))
			for i := range events {
				events[i] = Event{KV{Key: fmt.Sprintf("%c/%d", 'a'+r.IntN(2), len(all)+i), Revision: revision}}
			}
			h.publish(events)
			all = append(all, events...)
			for from := revision - limit - 2; from <= revision+1; from++ {
				checkWatch(t, &h, all, from, revision)
			}
		}
	}
}

func checkWatch(t *testing.T, h *hub, all []Event, from, now int64) {
	t.Helper()
	var later []Event
	for _, e := range all {
		if e.Revision > from {
			later = append(later, e)
		}
	}
	for _, prefix := range []string{"", "a/"} {
		var want []Event
		for _, e := range later {
			if strings.HasPrefix(e.Key, prefix) {
				want = append(want, e)
			}
		}
		w := h.add(prefix, from, now)
		_, live := h.watchers[w]
		h.remove(w)
		var got []Event
		for e := range w.events {
			got = append(got, e)
		}
		known := from <= now && from >= 100 && len(later) <= h.limit
		if live != known {
			t.Fatalf("watch of %q from %d (now %d, %d events later): live is %v", prefix, from, now, len(later), live)
		}
		same := slices.EqualFunc(got, want, func(a, b Event) bool { return a.Key == b.Key && a.Revision == b.Revision })
		if live && !same || !live && len(got) > 0 {
			t.Fatalf("watch of %q from %d (now %d) got %v, want %v", prefix, from, now, got, want)
		}
	}
}

// TestPublishDoesNotCopyTheHistory: every commit of the daemon passes here.
func TestPublishDoesNotCopyTheHistory(t *testing.T) {
	h := newHub(historyEvents, watchBuffer)
	events := []Event{{KV{Key: "a", Revision: 1}}}
	for range historyEvents {
		h.publish(events)
	}
	if n := testing.AllocsPerRun(100, func() { h.publish(events) }); n != 0 {
		t.Errorf("a commit allocates %v times for the history", n)
	}
}
