package driver_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"scoria/driver"
	"scoria/driver/block"
)

// muteStore is one whose reads fail or hang while it is told to.
type muteStore struct {
	driver.Store
	mu    sync.Mutex
	fails bool
	hangs chan struct{} // not nil: until it is closed
	asked int           // reads that did not get an answer
}

func (m *muteStore) ask(ctx context.Context) error {
	m.mu.Lock()
	fails, hangs := m.fails, m.hangs
	if fails || hangs != nil {
		m.asked++
	}
	m.mu.Unlock()
	if hangs != nil {
		select {
		case <-hangs:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if fails {
		return errMoody
	}
	return nil
}

func (m *muteStore) ReadAt(ctx context.Context, ns, name string, p []byte, off int64) error {
	if err := m.ask(ctx); err != nil {
		return err
	}
	return m.Store.ReadAt(ctx, ns, name, p, off)
}

func (m *muteStore) Size(ctx context.Context, ns, name string) (int64, error) {
	if err := m.ask(ctx); err != nil {
		return 0, err
	}
	return m.Store.Size(ctx, ns, name)
}

// set makes reads fail, hang, or, with "", go on.
func (m *muteStore) set(how string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.fails, m.asked = how == "fails", 0
	if m.hangs != nil {
		close(m.hangs)
		m.hangs = nil
	}
	if how == "hangs" {
		m.hangs = make(chan struct{})
	}
}

func (m *muteStore) waiting(n int) func() bool {
	return func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return m.asked >= n
	}
}

// muteRig is a volume with data in the store only, 512 clusters, and a map that
// has not been read yet; with pages what it has to be read from is only there, too.
func muteRig(t *testing.T, k storeKind, rng *rand.Rand, pages bool) (*rig, *muteStore) {
	r := newRig(t, k, rng, 1024, 8)
	m := &muteStore{}
	r.wrap = func(s driver.Store) driver.Store {
		m.Store = s
		return m
	}
	r.create()
	r.must(r.write(0, 512, 0))
	r.must(r.flush())
	r.close()
	r.cache = 0
	r.reopen()
	eventually(t, "all SCOs to be only in the store", func() bool {
		st := r.vol.Stats()
		return st.UploadBacklog == 0 && st.Space.Local == 0 && len(r.stored("root-")) == 1 && len(r.stored("pages-")) > 0
	})
	r.close()
	if pages {
		dir := "data/volumes/" + r.cfg.ID.String() + "/map"
		names, err := r.fs.List(dir)
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, name := range names {
			if strings.HasPrefix(name, "pages-") {
				r.must(r.fs.Remove(dir + "/" + name))
				n++
			}
		}
		if n == 0 {
			t.Fatalf("no page object in %v", names)
		}
	}
	r.reopen()
	return r, m
}

// eachMood calls fn for what a store can do instead of answering, and for what is
// only there. Over the objects nothing is different but the store behind it.
func eachMood(t *testing.T, k storeKind, fn func(t *testing.T, how string, pages bool)) {
	for _, how := range []string{"fails", "hangs"} {
		for _, pages := range []bool{true, false}[:k.fewer(2, 1)] {
			t.Run(fmt.Sprintf("%s/pages=%v", how, pages), func(t *testing.T) { fn(t, how, pages) })
		}
	}
}

// outcome submits a request and returns what it ends with.
func outcome(vol block.Device, r *block.Request) <-chan error {
	ended := make(chan error, 1)
	r.Complete = func(r *block.Request) { ended <- r.Err }
	vol.Submit([]*block.Request{r})
	if r.Ended {
		ended <- r.Err
	}
	return ended
}

func result(t *testing.T, what string, ended <-chan error) error {
	t.Helper()
	select {
	case err := <-ended:
		return err
	case <-time.After(waitLimit):
		t.Fatalf("%s does not end", what)
		return nil
	}
}

func notYet(t *testing.T, what string, ended <-chan error) {
	t.Helper()
	select {
	case err := <-ended:
		t.Fatalf("%s ended with %v", what, err)
	default:
	}
}

// requests of each kind that need the store: whole and part of a cluster, and a
// discard that leaves a part.
func storeRequests() map[string]*block.Request {
	return map[string]*block.Request{
		"read":          {Op: block.OpRead, Offset: 8 * cluster, Length: cluster, Segments: [][]byte{make([]byte, cluster)}, Owner: "a"},
		"partial write": {Op: block.OpWrite, Offset: 100*cluster + 512, Length: 512, Segments: [][]byte{make([]byte, 512)}, Owner: "a"},
		"discard":       {Op: block.OpDiscard, Offset: 200*cluster + 512, Length: 4 * cluster, Owner: "a"},
	}
}

// TestP8StoreDoesNotAnswer: requests that need what only the store has wait while
// it fails or hangs, visibly, and go on by themselves when it answers.
func TestP8StoreDoesNotAnswer(t *testing.T) { overStores(t, testP8StoreDoesNotAnswer) }

func testP8StoreDoesNotAnswer(t *testing.T, k storeKind) {
	eachMood(t, k, func(t *testing.T, how string, pages bool) {
		r, m := muteRig(t, k, rand.New(rand.NewPCG(1, 1)), pages)
		m.set(how)
		ended := map[string]<-chan error{}
		for name, q := range storeRequests() {
			ended[name] = outcome(r.vol, q)
		}
		eventually(t, "the wait to show", func() bool { return r.has("store-unreadable") })
		if how == "fails" {
			eventually(t, "the store to be asked again", m.waiting(5))
		}
		for name, e := range ended {
			notYet(t, name, e)
		}
		// What does not need the store goes on meanwhile.
		r.must(r.write(600, 8, 0))
		r.must(r.read(600, 8))
		m.set("")
		for name, e := range ended {
			if err := result(t, name, e); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
		eventually(t, "the condition to end", func() bool { return !r.has("store-unreadable") })
		r.must(r.read(0, 100))
		r.must(r.read(300, 212))
		r.check()
		r.close()
	})
}

// TestP8WaitForStoreEnds: a request that waits for the store ends when its owner
// gives up, nobody else's does; the rest ends when the volume is closed, which a
// store that hangs does not hold up.
func TestP8WaitForStoreEnds(t *testing.T) { overStores(t, testP8WaitForStoreEnds) }

func testP8WaitForStoreEnds(t *testing.T, k storeKind) {
	eachMood(t, k, func(t *testing.T, how string, pages bool) {
		r, m := muteRig(t, k, rand.New(rand.NewPCG(1, 2)), pages)
		m.set(how)
		mine := map[string]<-chan error{}
		for name, q := range storeRequests() {
			mine[name] = outcome(r.vol, q)
		}
		other := outcome(r.vol, &block.Request{
			Op: block.OpRead, Offset: 8 * cluster, Length: cluster, Segments: [][]byte{make([]byte, cluster)}, Owner: "b"})
		eventually(t, "requests at the store", m.waiting(1))
		for name, e := range mine {
			// As front ends do: again and again until all have ended.
			eventually(t, name+" to be canceled", func() bool {
				r.vol.Cancel("a")
				return len(e) > 0
			})
			if err := <-e; !errors.Is(err, block.ErrCanceled) {
				t.Fatalf("%s: %v", name, err)
			}
		}
		notYet(t, "another owner's read", other)
		closed := make(chan error, 1)
		go func() { closed <- r.vol.Close(context.Background()) }()
		if err := result(t, "close", closed); err != nil {
			t.Fatal(err)
		}
		if err := result(t, "the other read", other); !errors.Is(err, block.ErrClosed) {
			t.Fatal(err)
		}
		m.set("")
		r.mustOpen()
		r.verify("P3", func(*effect) bool { return true })
		r.close()
	})
}

// TestP8HangingStoreDoesNotHoldUpTheEnd: neither an opening nor what reads the root of
// a snapshot keeps the daemon from stopping.
func TestP8HangingStoreDoesNotHoldUpTheEnd(t *testing.T) {
	overStores(t, testP8HangingStoreDoesNotHoldUpTheEnd)
}

func testP8HangingStoreDoesNotHoldUpTheEnd(t *testing.T, k storeKind) {
	r, m := muteRig(t, k, rand.New(rand.NewPCG(1, 4)), false)
	s, err := r.vol.CreateSnapshot(context.Background(), uuid.UUID{1}, "s", nil)
	if err != nil {
		t.Fatal(err)
	}
	dir := "data/volumes/" + r.cfg.ID.String() + "/map"
	eventually(t, "the snapshot's root to be only in the store", func() bool {
		names, err := r.fs.List(dir)
		return err == nil && len(r.stored("snap-")) == 1 && !slices.ContainsFunc(names, func(n string) bool { return strings.HasPrefix(n, "snap-") })
	})
	m.set("hangs")
	defer m.set("")
	viewing, closed := make(chan error, 1), make(chan error, 1)
	go func() {
		_, err := r.vol.OpenSnapshot(context.Background(), s.ID)
		viewing <- err
	}()
	eventually(t, "the root to be asked for", m.waiting(1))
	go func() { closed <- r.vol.Close(context.Background()) }()
	if err := result(t, "close", closed); err != nil {
		t.Fatal(err)
	}
	if result(t, "opening the snapshot", viewing) == nil {
		t.Fatal("a snapshot was opened without its root")
	}
	names, err := r.fs.List(dir)
	r.must(err)
	for _, n := range names {
		if strings.HasPrefix(n, "root-") {
			r.must(r.fs.Remove(dir + "/" + n))
		}
	}
	m.set("hangs") // asked anew
	r.cfg.Snapshots = []driver.Snapshot{s}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	opened := make(chan error, 1)
	go func() {
		_, err := r.eng.OpenVolume(ctx, r.cfg)
		opened <- err
	}()
	eventually(t, "the root to be asked for", m.waiting(1))
	cancel()
	if result(t, "the opening", opened) == nil {
		t.Fatal("opened without a root")
	}
}

// TestP5LostObjectIsNotWaitedFor: what the store does not have is an error at once.
func TestP5LostObjectIsNotWaitedFor(t *testing.T) { overStores(t, testP5LostObjectIsNotWaitedFor) }

func testP5LostObjectIsNotWaitedFor(t *testing.T, k storeKind) {
	r, _ := muteRig(t, k, rand.New(rand.NewPCG(1, 3)), false)
	ctx := context.Background()
	ns := r.cfg.ID.String()
	names, err := r.cfg.Store.List(ctx, ns, "sco-")
	if err != nil || len(names) == 0 {
		t.Fatal(names, err)
	}
	for _, n := range names {
		if err := r.cfg.Store.Delete(ctx, ns, n, r.cfg.Epoch); err != nil {
			t.Fatal(err)
		}
	}
	for name, q := range storeRequests() {
		if err := result(t, name, outcome(r.vol, q)); !errors.Is(err, driver.ErrNoObject) {
			t.Fatalf("%s: %v", name, err)
		}
	}
}
