package registry

import "strings"

// hub keeps the recent events and feeds the watchers. Its owner's lock guards
// it; nothing here blocks.
type hub struct {
	history  []Event // a ring once it has limit events
	oldest   int     // where history begins
	limit    int
	buffer   int
	first    int64 // the oldest revision that history covers wholly
	watchers map[*watcher]struct{}
}

type watcher struct {
	prefix string
	events chan Event
}

func newHub(limit, buffer int) hub {
	return hub{limit: limit, buffer: buffer, watchers: make(map[*watcher]struct{})}
}

// add starts a watcher with the events after revision from; now is the current
// revision. If they are gone or are more than it may lag, its channel is closed.
func (h *hub) add(prefix string, from, now int64) *watcher {
	w := &watcher{prefix: prefix, events: make(chan Event, h.buffer)}
	h.watchers[w] = struct{}{}
	switch {
	case from > now: // a revision that this store never gave out
		h.remove(w)
	case from < now && (len(h.history) == 0 || h.first > from+1):
		h.remove(w)
	default:
		for i := range h.history {
			if e := h.history[(h.oldest+i)%len(h.history)]; e.Revision > from {
				h.send(w, e)
			}
		}
	}
	return w
}

// publish records one commit's events and passes them on.
func (h *hub) publish(events []Event) {
	if len(h.history) == 0 {
		h.first = events[0].Revision
	}
	for _, e := range events {
		if len(h.history) < h.limit {
			h.history = append(h.history, e)
			continue
		}
		// Part of a commit is no use to a watcher that starts in front of it.
		h.first = h.history[h.oldest].Revision + 1
		h.history[h.oldest] = e
		h.oldest = (h.oldest + 1) % h.limit
	}
	for _, e := range events {
		for w := range h.watchers {
			h.send(w, e)
		}
	}
}

func (h *hub) send(w *watcher, e Event) {
	if _, live := h.watchers[w]; !live || !strings.HasPrefix(e.Key, w.prefix) {
		return
	}
	select {
	case w.events <- e:
	default:
		h.remove(w)
	}
}

func (h *hub) remove(w *watcher) {
	if _, live := h.watchers[w]; live {
		delete(h.watchers, w)
		close(w.events)
	}
}

func (h *hub) close() {
	for w := range h.watchers {
		h.remove(w)
	}
}
