package storetest

import (
	"bytes"
	"errors"
	"fmt"
	"sync"
	"testing"

	"scoria/driver"
)

func testFence(t *testing.T, s driver.Store) {
	ctx := t.Context()
	must(t, s.Put(ctx, namespace, "a", 1, object([]byte("a"))))
	must(t, s.Fence(ctx, namespace, 5))
	must(t, s.Fence(ctx, namespace, 5))
	wantErr(t, s.Fence(ctx, namespace, 4), driver.ErrStaleEpoch)
	wantErr(t, s.Put(ctx, namespace, "b", 4, object([]byte("b"))), driver.ErrStaleEpoch)
	wantErr(t, s.Put(ctx, namespace, "b", 0, object([]byte("b"))), driver.ErrStaleEpoch)
	expectNone(t, s, "b")
	wantErr(t, s.Delete(ctx, namespace, "a", 4), driver.ErrStaleEpoch)
	wantErr(t, s.Delete(ctx, namespace, "none", 4), driver.ErrStaleEpoch)
	expect(t, s, "a", []byte("a"))
	must(t, s.Put(ctx, namespace, "b", 5, object([]byte("b"))))
	// A larger epoch that nobody fenced with is accepted and not remembered.
	must(t, s.Put(ctx, namespace, "c", 9, object([]byte("c"))))
	must(t, s.Put(ctx, namespace, "d", 5, object([]byte("d"))))
	must(t, s.Delete(ctx, namespace, "a", 5))
	expectNone(t, s, "a")
	must(t, s.Fence(ctx, namespace, 1<<63))
	wantErr(t, s.Delete(ctx, namespace, "b", 1<<63-1), driver.ErrStaleEpoch)
	// Other namespaces are not concerned.
	must(t, s.CreateNamespace(ctx, "other"))
	must(t, s.Put(ctx, "other", "a", 1, object([]byte("a"))))
}

// testP4PausedPut holds a stale owner's put up in its middle while the next
// owner takes the volume over, then lets it go on.
func testP4PausedPut(t *testing.T, s driver.Store) {
	ctx := t.Context()
	must(t, s.Fence(ctx, namespace, 1))
	b := pattern(1, 3<<20)
	paused, resume := make(chan struct{}), make(chan struct{})
	var once sync.Once
	obj := object(b)
	obj.Data = sourceReader{bytes.NewReader(b), func(off int64) {
		if off > 0 {
			once.Do(func() { close(paused); <-resume })
		}
	}}
	result := make(chan error, 1)
	go func() { result <- s.Put(ctx, namespace, "o", 1, obj) }()
	select {
	case <-paused:
	case err := <-result:
		t.Fatalf("the store reads 3 MiB in one piece and so can't be paused: %v", err)
	}
	must(t, s.Fence(ctx, namespace, 2))
	close(resume)
	wantErr(t, await(result, "paused put"), driver.ErrStaleEpoch)
	expectNone(t, s, "o")
	must(t, s.Put(ctx, namespace, "o", 2, object(b)))
	expect(t, s, "o", b)
}

// testP4ConcurrentFence: once Fence returned no put of a smaller epoch succeeds
// that had not yet succeeded by then.
func testP4ConcurrentFence(t *testing.T, s driver.Store) {
	ctx := t.Context()
	const writers, epochs = 4, 20
	var wg sync.WaitGroup
	for g := range writers {
		wg.Go(func() {
			epoch := uint64(1)
			for i := 0; epoch <= epochs; i++ {
				err := s.Put(ctx, namespace, fmt.Sprintf("o-%d-%d", g, i), epoch, object(pattern(uint64(i), 100)))
				if errors.Is(err, driver.ErrStaleEpoch) {
					epoch++
				} else if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for epoch := uint64(1); epoch <= epochs+1; epoch++ {
		must(t, s.Fence(ctx, namespace, epoch))
		before, err := s.List(ctx, namespace, "")
		must(t, err)
		if err := s.Put(ctx, namespace, fmt.Sprint("stale-", epoch), epoch-1, object(nil)); !errors.Is(err, driver.ErrStaleEpoch) {
			t.Fatalf("epoch %d after Fence %d: %v", epoch-1, epoch, err)
		}
		after, err := s.List(ctx, namespace, "")
		must(t, err)
		if len(after) < len(before) {
			t.Fatal("objects vanished")
		}
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	await(done, "fenced writers")
}
