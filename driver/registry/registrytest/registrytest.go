// Package registrytest is the conformance suite of registry.Store. Every
// implementation runs it from its own tests.
package registrytest

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"scoria/driver/registry"
)

// patience bounds every wait; a test that runs into it has hung.
const patience = 20 * time.Second

// Run runs the suite. open returns a fresh, empty store for each call; the suite
// closes it.
func Run(t *testing.T, open func(t *testing.T) registry.Store) {
	tests := []struct {
		name string
		fn   func(t *testing.T, s registry.Store)
	}{
		{"GetOfNothing", testGetOfNothing},
		{"PutGetDelete", testPutGetDelete},
		{"ListIsOrderedAndPrefixed", testList},
		{"CompareAndSwap", testCompareAndSwap},
		{"CommitIsAllOrNothing", testAllOrNothing},
		{"ValuesAreCopies", testValuesAreCopies},
		{"RefusesBadWrites", testRefusesBadWrites},
		{"WatchSeesCommitsInOrder", testWatch},
		{"WatchFromARevision", testWatchFrom},
		{"WatchFromTheFuture", testWatchFuture},
		{"WatchEndsWithItsContext", testWatchEnds},
		{"SlowWatcherIsClosed", testSlowWatcher},
		{"OneOfManyWins", testOneOfManyWins},
		{"CanceledContext", testCanceled},
		{"Closed", testClosed},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := open(t)
			defer s.Close()
			tt.fn(t, s)
		})
	}
}

func put(key, value string) registry.Write { return registry.Write{Key: key, Value: []byte(value)} }

func del(key string) registry.Write { return registry.Write{Key: key} }

func commit(t *testing.T, s registry.Store, compares []registry.Compare, writes ...registry.Write) int64 {
	t.Helper()
	rev, err := s.Commit(t.Context(), compares, writes)
	if err != nil {
		t.Fatalf("Commit: %v", err)
	}
	return rev
}

func get(t *testing.T, s registry.Store, key string) (registry.KV, bool) {
	t.Helper()
	kv, ok, err := s.Get(t.Context(), key)
	if err != nil {
		t.Fatalf("Get %s: %v", key, err)
	}
	return kv, ok
}

// next returns the next event, or ok false if the channel was closed.
func next(t *testing.T, ch <-chan registry.Event) (e registry.Event, ok bool) {
	t.Helper()
	select {
	case e, ok = <-ch:
		return e, ok
	case <-time.After(patience):
		buf := make([]byte, 1<<20)
		t.Fatalf("no event within %v\n%s", patience, buf[:runtime.Stack(buf, true)])
		return registry.Event{}, false
	}
}

func testGetOfNothing(t *testing.T, s registry.Store) {
	if _, ok := get(t, s, "a"); ok {
		t.Fatal("an empty store has a key")
	}
	kvs, err := s.List(t.Context(), "")
	if err != nil || len(kvs) != 0 {
		t.Fatalf("List of an empty store: %v, %v", kvs, err)
	}
}

func testPutGetDelete(t *testing.T, s registry.Store) {
	r1 := commit(t, s, nil, put("a", "1"))
	r2 := commit(t, s, nil, put("b", ""))
	r3 := commit(t, s, nil, put("a", "2"))
	if r1 < 1 || r2 <= r1 || r3 <= r2 {
		t.Fatalf("revisions %d, %d, %d do not grow", r1, r2, r3)
	}
	kv, ok := get(t, s, "a")
	if !ok || kv.Key != "a" || string(kv.Value) != "2" || kv.Revision != r3 {
		t.Fatalf("a is %+v, %v; want value 2 at revision %d", kv, ok, r3)
	}
	kv, ok = get(t, s, "b")
	if !ok || kv.Value == nil || len(kv.Value) != 0 || kv.Revision != r2 {
		t.Fatalf("b is %+v, %v; want an empty value at revision %d", kv, ok, r2)
	}
	commit(t, s, nil, del("a"), del("never-there"))
	if _, ok := get(t, s, "a"); ok {
		t.Fatal("a is there after its delete")
	}
}

func testList(t *testing.T, s registry.Store) {
	commit(t, s, nil, put("v/b", "2"), put("v/a", "1"), put("v", "0"), put("w/a", "3"), put("v0", "4"))
	kvs, err := s.List(t.Context(), "v/")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, kv := range kvs {
		got = append(got, kv.Key+"="+string(kv.Value))
	}
	if strings.Join(got, " ") != "v/a=1 v/b=2" {
		t.Fatalf("List(v/) is %v", got)
	}
	all, err := s.List(t.Context(), "")
	if err != nil || len(all) != 5 {
		t.Fatalf("List of everything: %d keys, %v; want 5", len(all), err)
	}
}

func testCompareAndSwap(t *testing.T, s registry.Store) {
	r1 := commit(t, s, []registry.Compare{{Key: "a"}}, put("a", "1"))
	if _, err := s.Commit(t.Context(), []registry.Compare{{Key: "a"}}, []registry.Write{put("a", "x")}); !errors.Is(err, registry.ErrConflict) {
		t.Fatalf("create of an existing key: %v; want ErrConflict", err)
	}
	r2 := commit(t, s, []registry.Compare{{Key: "a", Revision: r1}}, put("a", "2"))
	if _, err := s.Commit(t.Context(), []registry.Compare{{Key: "a", Revision: r1}}, []registry.Write{del("a")}); !errors.Is(err, registry.ErrConflict) {
		t.Fatalf("compare with an old revision: %v; want ErrConflict", err)
	}
	commit(t, s, []registry.Compare{{Key: "a", Revision: r2}}, del("a"))
	// A deleted key is a key that does not exist, and its revisions do not come back.
	r4 := commit(t, s, []registry.Compare{{Key: "a"}}, put("a", "3"))
	if r4 <= r2 {
		t.Fatalf("revision %d was reused (before: %d)", r4, r2)
	}
	if _, err := s.Commit(t.Context(), []registry.Compare{{Key: "nothing", Revision: r4}}, []registry.Write{put("a", "x")}); !errors.Is(err, registry.ErrConflict) {
		t.Fatalf("compare of a missing key: %v; want ErrConflict", err)
	}
}

func testAllOrNothing(t *testing.T, s registry.Store) {
	r := commit(t, s, nil, put("a", "1"), put("b", "1"))
	_, err := s.Commit(t.Context(),
		[]registry.Compare{{Key: "a", Revision: r}, {Key: "b", Revision: r + 5}},
		[]registry.Write{put("a", "2"), del("b"), put("c", "2")})
	if !errors.Is(err, registry.ErrConflict) {
		t.Fatalf("Commit: %v; want ErrConflict", err)
	}
	if kv, _ := get(t, s, "a"); string(kv.Value) != "1" || kv.Revision != r {
		t.Fatalf("a changed to %+v", kv)
	}
	if _, ok := get(t, s, "c"); ok {
		t.Fatal("c was written")
	}
	r2 := commit(t, s, []registry.Compare{{Key: "a", Revision: r}}, put("a", "3"), del("b"), put("c", "3"))
	a, _ := get(t, s, "a")
	c, _ := get(t, s, "c")
	if a.Revision != r2 || c.Revision != r2 {
		t.Fatalf("one commit has revisions %d and %d; want %d", a.Revision, c.Revision, r2)
	}
}

func testValuesAreCopies(t *testing.T, s registry.Store) {
	value := []byte("before")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ch, err := s.Watch(ctx, "", 0)
	if err != nil {
		t.Fatal(err)
	}
	commit(t, s, nil, registry.Write{Key: "a", Value: value})
	copy(value, "after!")
	kv, _ := get(t, s, "a")
	copy(kv.Value, "xxxxxx")
	if kv, _ = get(t, s, "a"); string(kv.Value) != "before" {
		t.Fatalf("the stored value changed to %q", kv.Value)
	}
	if e, ok := next(t, ch); !ok || string(e.Value) != "before" {
		t.Fatalf("the event's value is %q", e.Value)
	}
}

func testRefusesBadWrites(t *testing.T, s registry.Store) {
	bad := map[string][]registry.Write{
		"empty key":     {put("", "1")},
		"control":       {put("a\x00b", "1")},
		"written twice": {put("a", "1"), put("a", "2")},
	}
	for name, writes := range bad {
		if _, err := s.Commit(t.Context(), nil, writes); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if kvs, err := s.List(t.Context(), ""); err != nil || len(kvs) != 0 {
		t.Fatalf("refused writes left %v, %v", kvs, err)
	}
}

func testWatch(t *testing.T, s registry.Store) {
	commit(t, s, nil, put("v/old", "0"))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ch, err := s.Watch(ctx, "v/", 0)
	if err != nil {
		t.Fatal(err)
	}
	r1 := commit(t, s, nil, put("v/a", "1"))
	commit(t, s, nil, put("w/a", "not ours"))
	r2 := commit(t, s, nil, del("v/a"))
	e, ok := next(t, ch)
	if !ok || e.Key != "v/a" || string(e.Value) != "1" || e.Revision != r1 {
		t.Fatalf("first event %+v, %v", e, ok)
	}
	e, ok = next(t, ch)
	if !ok || e.Key != "v/a" || e.Value != nil || e.Revision != r2 {
		t.Fatalf("second event %+v, %v; want the delete", e, ok)
	}
}

func testWatchFrom(t *testing.T, s registry.Store) {
	r1 := commit(t, s, nil, put("a", "1"))
	commit(t, s, nil, put("a", "2"))
	commit(t, s, nil, put("a", "3"))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ch, err := s.Watch(ctx, "", r1)
	if err != nil {
		t.Fatal(err)
	}
	commit(t, s, nil, put("a", "4"))
	for _, want := range []string{"2", "3", "4"} {
		if e, ok := next(t, ch); !ok || string(e.Value) != want {
			t.Fatalf("event %+v, %v; want %s", e, ok, want)
		}
	}
}

func testWatchFuture(t *testing.T, s registry.Store) {
	r := commit(t, s, nil, put("a", "1"))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ch, err := s.Watch(ctx, "", r+1000)
	if err != nil {
		return // saying so at once is as good
	}
	if e, ok := next(t, ch); ok {
		t.Fatalf("event %+v of a revision that does not exist", e)
	}
}

func testWatchEnds(t *testing.T, s registry.Store) {
	ctx, cancel := context.WithCancel(t.Context())
	ch, err := s.Watch(ctx, "", 0)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if e, ok := next(t, ch); ok {
		t.Fatalf("event %+v after the end", e)
	}
	commit(t, s, nil, put("a", "1")) // must not send on the closed channel
}

func testSlowWatcher(t *testing.T, s registry.Store) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ch, err := s.Watch(ctx, "", 0)
	if err != nil {
		t.Fatal(err)
	}
	// Many events in few commits: nobody reads meanwhile.
	const events = 20000
	for i := 0; i < events; i += 500 {
		writes := make([]registry.Write, 500)
		for j := range writes {
			writes[j] = put(fmt.Sprintf("k%05d", i+j), "v")
		}
		commit(t, s, nil, writes...)
	}
	seen := 0
	for {
		e, ok := next(t, ch)
		if !ok {
			break
		}
		if want := fmt.Sprintf("k%05d", seen); e.Key != want {
			t.Fatalf("event %d is %s; want %s: events may be cut off, not skipped", seen, e.Key, want)
		}
		if seen++; seen == events {
			return // a store with that much room may keep up
		}
	}
}

func testOneOfManyWins(t *testing.T, s registry.Store) {
	const clients, rounds = 8, 10
	rev := commit(t, s, nil, put("owner", "nobody"))
	for round := range rounds {
		var wg sync.WaitGroup
		won := make(chan int64, clients)
		for c := range clients {
			wg.Go(func() {
				r, err := s.Commit(t.Context(), []registry.Compare{{Key: "owner", Revision: rev}},
					[]registry.Write{put("owner", fmt.Sprint(c))})
				switch {
				case err == nil:
					won <- r
				case !errors.Is(err, registry.ErrConflict):
					t.Errorf("Commit: %v", err)
				}
			})
		}
		wg.Wait()
		close(won)
		if len(won) != 1 {
			t.Fatalf("round %d has %d winners", round, len(won))
		}
		rev = <-won
	}
}

func testCanceled(t *testing.T, s registry.Store) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Commit(ctx, nil, []registry.Write{put("a", "1")}); !errors.Is(err, context.Canceled) {
		t.Fatalf("Commit with an ended context: %v", err)
	}
	if _, ok := get(t, s, "a"); ok {
		t.Fatal("it committed")
	}
}

func testClosed(t *testing.T, s registry.Store) {
	ch, err := s.Watch(t.Context(), "", 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, ok := next(t, ch); ok {
		t.Fatal("an event after Close")
	}
	if _, err := s.Commit(t.Context(), nil, []registry.Write{put("a", "1")}); err == nil {
		t.Fatal("Commit after Close succeeded")
	}
	if _, _, err := s.Get(t.Context(), "a"); err == nil {
		t.Fatal("Get after Close succeeded")
	}
	if err := s.Close(); err != nil {
		t.Fatalf("second Close: %v", err)
	}
}
