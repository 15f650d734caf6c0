package disk

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"scoria/alba/asd"
	"scoria/alba/asd/asdtest"
	"scoria/alba/vfs"
)

var background = context.Background()

const guest = asd.PriorityGuest

// books says what a disk that is cut off now must and may hold.
type books struct {
	mu    sync.Mutex
	acked *asdtest.Model // everything acknowledged
	next  *asdtest.Model // with the Apply under way, if it would be done
}

// apply does a random Apply and keeps the books.
func (b *books) apply(t *testing.T, c asd.Client, w *asdtest.Workload) {
	asserts, updates := w.Apply(b.acked)
	next := b.acked.Clone()
	want := next.Apply(background, asserts, updates, guest)
	b.mu.Lock()
	b.next = next
	b.mu.Unlock()
	err := c.Apply(background, asserts, updates, guest)
	if !asdtest.SameRefusal(err, want) {
		t.Fatalf("apply: %v, want %v", err, want)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.acked, b.next = next, next
}

// valueFiles lists the value files of an ASD.
func valueFiles(t testing.TB, fsys vfs.FS, dir string) (names []string) {
	t.Helper()
	root := path.Join(dir, "values")
	dirs, err := fsys.List(root)
	if err != nil && !isNotExist(err) {
		t.Fatal(err)
	}
	for _, sub := range dirs {
		files, err := fsys.List(path.Join(root, sub))
		if err != nil && !isNotExist(err) {
			t.Fatal(err)
		}
		for _, f := range files {
			names = append(names, path.Join(root, sub, f))
		}
	}
	return names
}

// waitForFiles waits until there are this many value files.
func waitForFiles(t testing.TB, fsys vfs.FS, dir string, want int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d value files", want), func() bool { return len(valueFiles(t, fsys, dir)) == want })
}

// liveFiles counts the values that lie in files.
func liveFiles(m *asdtest.Model, inline int) (n int) {
	res, _ := m.Range(background, asd.RangeRequest{}, guest)
	for _, info := range res.Infos {
		if info.Size > int64(inline) {
			n++
		}
	}
	return n
}

// checkAfterCrash opens what a crash has left: it is one of the models, whole,
// without garbage, and usable.
func checkAfterCrash(t *testing.T, fsys vfs.FS, opts Options, models ...*asdtest.Model) {
	t.Helper()
	d, err := Open(fsys, "/asd", opts)
	if err != nil {
		t.Fatalf("open after the crash: %v", err)
	}
	defer func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}()
	var found *asdtest.Model
	for _, m := range models {
		if err = asdtest.Compare(d, m); err == nil {
			found = m
			break
		}
	}
	if found == nil {
		t.Fatalf("after the crash: %v", err)
	}
	waitForFiles(t, fsys, "/asd", liveFiles(found, d.opts.InlineBytes))
	res, err := asd.VerifyAll(background, d, asd.VerifyOptions{})
	if err != nil || len(res.Bad) > 0 {
		t.Fatalf("verify after the crash: %+v, %v", res.Bad, err)
	}
	v := asd.NewValue(make([]byte, 50_000))
	if err := d.Apply(background, nil, []asd.Update{asd.Put("after", v), asd.Delete("key-1")}, guest); err != nil {
		t.Fatal(err)
	}
	if got, err := d.Get(background, "after", guest); err != nil || got.Sum() != v.Sum() {
		t.Fatalf("put after the crash: %v", err)
	}
}

var crashOptions = Options{ReserveBytes: 1 << 20, CacheBytes: 1 << 20, InlineBytes: 1000, Slots: 4}

// cut is a moment at which the power failed.
type cut struct {
	fsys        *vfs.Mem
	acked, next *asdtest.Model
	when        string
}

// crashHook calls cut at about every nth call that changes the disk.
func crashHook(fsys *vfs.Mem, rng *rand.Rand, n int, cut func(op vfs.Op, name string)) {
	var mu sync.Mutex
	fsys.SetHook(func(op vfs.Op, name string) error {
		switch op {
		case vfs.OpCreate, vfs.OpRemove, vfs.OpRename, vfs.OpSyncDir, vfs.OpWrite, vfs.OpAllocate, vfs.OpSync, vfs.OpMkdir, vfs.OpTruncate:
			mu.Lock()
			defer mu.Unlock()
			if rng.IntN(n) == 0 {
				cut(op, name)
			}
		}
		return nil
	})
}

// TestP1PowerLossAtEveryStep: whatever call the power fails before, the next
// start has every acknowledged Apply, and the one under way whole or not at all.
func TestP1PowerLossAtEveryStep(t *testing.T) {
	steps := map[vfs.Op]int{}
	for seed := range uint64(6) {
		rng := rand.New(rand.NewPCG(seed, 1))
		fsys := vfs.NewMem()
		b := &books{acked: asdtest.NewModel("m"), next: asdtest.NewModel("m")}
		var cuts []cut
		var every atomic.Int64 // steps per cut
		every.Store(1)         // the first start and the first Applies: every step
		crashHook(fsys, rng, 1, func(op vfs.Op, name string) {
			b.mu.Lock()
			defer b.mu.Unlock()
			if n := int(every.Load()); n > 1 && rng.IntN(n) != 0 {
				return
			}
			cuts = append(cuts, cut{fsys.CrashClone(rng), b.acked, b.next, fmt.Sprintf("before %v %s", op, name)})
			steps[op]++
		})
		d := open(t, fsys, "/asd", crashOptions)
		w := &asdtest.Workload{Rng: rand.New(rand.NewPCG(seed, 2)), MaxSize: 20_000}
		for i := range 60 {
			if i == 10 {
				every.Store(4)
			}
			b.apply(t, d, w)
			if i%20 == 19 {
				must(t, d.db.Flush())
			}
			if i == 40 {
				must(t, d.Close())
				d = open(t, fsys, "/asd", crashOptions)
			}
		}
		must(t, d.Close())
		fsys.SetHook(nil)
		checkAfterCrash(t, fsys, crashOptions, b.acked)
		for i, c := range cuts {
			t.Run(fmt.Sprintf("%d/%d", seed, i), func(t *testing.T) {
				t.Log("power lost", c.when)
				checkAfterCrash(t, c.fsys, crashOptions, c.acked, c.next)
			})
		}
	}
	for _, op := range []vfs.Op{vfs.OpCreate, vfs.OpRemove, vfs.OpSyncDir, vfs.OpWrite, vfs.OpSync, vfs.OpRename} {
		if steps[op] == 0 {
			t.Errorf("no power loss before a %v: the test does not reach what it is for", op)
		}
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantErr(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error %v, want %v", err, want)
	}
}

// TestP1CrashWithManyWriters: groups of Applies share syncs; each of several
// writers puts two keys, one small and one large, always with one version.
func TestP1CrashWithManyWriters(t *testing.T) {
	const writers, rounds = 6, 15
	for seed := range uint64(4) {
		rng := rand.New(rand.NewPCG(seed, 3))
		fsys := vfs.NewMem()
		d := open(t, fsys, "/asd", crashOptions)
		var mu sync.Mutex
		var acked [writers]int
		var cuts []*vfs.Mem
		var books [][writers]int // at most one Apply per writer is under way besides
		check := func(fsys *vfs.Mem, atLeast [writers]int) {
			d := open(t, fsys, "/asd", crashOptions)
			defer d.Close()
			for i := range writers {
				small := version(t, d, fmt.Sprintf("%d-small", i))
				large := version(t, d, fmt.Sprintf("%d-large", i))
				if small != large || small < atLeast[i] || small > atLeast[i]+1 {
					t.Errorf("writer %d: versions %d and %d, acknowledged %d", i, small, large, atLeast[i])
				}
			}
		}
		crashHook(fsys, rng, 12, func(vfs.Op, string) {
			mu.Lock()
			defer mu.Unlock()
			cuts, books = append(cuts, fsys.CrashClone(rng)), append(books, acked)
		})
		var wg sync.WaitGroup
		for i := range writers {
			wg.Go(func() {
				for v := 1; v <= rounds && !t.Failed(); v++ {
					err := d.Apply(background, nil, []asd.Update{
						asd.Put(fmt.Sprintf("%d-small", i), versioned(v, 100)),
						asd.Put(fmt.Sprintf("%d-large", i), versioned(v, 5000)),
					}, asd.Priority(i%2))
					if err != nil {
						t.Error(err)
					}
					mu.Lock()
					acked[i] = v
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		fsys.SetHook(nil)
		for i := range cuts {
			check(cuts[i], books[i])
		}
		kill, err := fsys.KillClone() // SIGKILL: everything written stays
		must(t, err)
		check(kill, acked)
	}
}

func versioned(v, size int) asd.Value {
	return asd.NewValue([]byte(fmt.Sprintf("%d %s", v, strings.Repeat("x", size))))
}

func version(t *testing.T, c asd.Client, key string) (v int) {
	got, err := c.Get(background, key, guest)
	if errors.Is(err, asd.ErrNoKey) {
		return 0
	}
	if err != nil {
		t.Error(err)
	}
	fmt.Sscan(string(got.Data), &v)
	return v
}

// TestFailedSyncIsFinal: once a sync failed nothing is acknowledged, whatever
// later syncs say, and the next start has all that was.
func TestFailedSyncIsFinal(t *testing.T) {
	for fail := range 14 {
		rng := rand.New(rand.NewPCG(uint64(fail), 4))
		fsys := vfs.NewMem()
		d := open(t, fsys, "/asd", crashOptions)
		b := &books{acked: asdtest.NewModel("m"), next: asdtest.NewModel("m")}
		w := &asdtest.Workload{Rng: rand.New(rand.NewPCG(9, 9)), MaxSize: 20_000}
		for range 3 {
			b.apply(t, d, w)
		}
		var mu sync.Mutex
		left, what := fail, ""
		fsys.SetHook(func(op vfs.Op, name string) error {
			mu.Lock()
			defer mu.Unlock()
			if op == vfs.OpSync || op == vfs.OpSyncDir {
				if left--; left == -1 {
					what = op.String() + " " + name
					return errors.New("injected")
				}
			}
			return nil
		})
		failed := false
		for range 60 {
			asserts, updates := w.Apply(b.acked)
			next := b.acked.Clone()
			want := next.Apply(background, asserts, updates, guest)
			err := d.Apply(background, asserts, updates, guest)
			switch {
			case failed:
				wantErr(t, err, asd.ErrFailed)
			case errors.Is(err, asd.ErrFailed):
				failed = true
				b.next = next
			case !asdtest.SameRefusal(err, want):
				t.Fatalf("%v, want %v", err, want)
			default:
				b.acked, b.next = next, next
			}
		}
		if !failed {
			t.Fatalf("sync %d (%s) failed and no Apply did", fail, what)
		}
		if s, err := d.Stats(background); err != nil || !strings.Contains(s.Failed, "injected") {
			t.Fatalf("stats: %+v, %v", s, err)
		}
		_, err := d.Range(background, asd.RangeRequest{}, guest) // reads go on
		must(t, err)
		fsys.SetHook(nil)
		_ = d.Close()
		checkAfterCrash(t, fsys.CrashClone(rng), crashOptions, b.acked, b.next)
		killed, err := fsys.KillClone()
		must(t, err)
		checkAfterCrash(t, killed, crashOptions, b.acked, b.next)
	}
}
