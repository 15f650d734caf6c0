package disk

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"path"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"scoria/alba/asd"
	"scoria/alba/asd/asdtest"
	"scoria/alba/vfs"
)

// eventually waits until cond holds.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			buf := make([]byte, 1<<20)
			t.Fatalf("%s: not after 2 minutes\n%s", what, buf[:runtime.Stack(buf, true)])
		}
	}
}

func supervise(t testing.TB, fsys vfs.FS, opts Options) *Supervised {
	t.Helper()
	opts.ReopenAfter = time.Millisecond
	s, err := Supervise(fsys, "/asd", opts)
	must(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func stats(t testing.TB, c asd.Client) asd.Stats {
	t.Helper()
	st, err := c.Stats(background)
	must(t, err)
	return st
}

func TestSupervisedConformance(t *testing.T) {
	asdtest.Run(t, func(t *testing.T) asd.Client {
		s, err := Supervise(vfs.NewMem(), "/asd", testOptions)
		must(t, err)
		return s
	})
}

// syncFault fails syncs, and notes what they were of.
type syncFault struct {
	mu     sync.Mutex
	fail   func(op vfs.Op, name string) bool
	failed []string
}

func (f *syncFault) hook(op vfs.Op, name string) error {
	if op != vfs.OpSync && op != vfs.OpSyncDir {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.fail(op, name) {
		return nil
	}
	f.failed = append(f.failed, op.String()+" "+name)
	return errors.New("injected")
}

func (f *syncFault) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.failed)
}

// isOneOf returns the model that the ASD holds.
func isOneOf(t *testing.T, c asd.Client, when string, models ...*asdtest.Model) *asdtest.Model {
	t.Helper()
	var err error
	for _, m := range models {
		if err = asdtest.Compare(c, m); err == nil {
			return m
		}
	}
	t.Fatalf("%s: %v", when, err)
	return nil
}

// TestP1FailedDiskIsOpenedAnew: whatever sync fails, the disk refuses writes until it
// was opened anew, has then all that it had acknowledged and the Apply that met the
// failure whole or not at all, takes writes, and none of that is lost if the power
// fails later.
func TestP1FailedDiskIsOpenedAnew(t *testing.T) {
	kinds := map[string]int{}
	for nth := range 16 {
		rng := rand.New(rand.NewPCG(uint64(nth), 5))
		fsys := vfs.NewMem()
		s := supervise(t, fsys, crashOptions)
		acked := asdtest.NewModel("m")
		w := &asdtest.Workload{Rng: rand.New(rand.NewPCG(9, 9)), MaxSize: 20_000}
		left := nth
		fault := &syncFault{fail: func(vfs.Op, string) bool { left--; return left == -1 }}
		done := func(n int) (next *asdtest.Model) {
			for range n {
				asserts, updates := w.Apply(acked)
				next := acked.Clone()
				want := next.Apply(background, asserts, updates, guest)
				err := s.Apply(background, asserts, updates, guest)
				if errors.Is(err, asd.ErrFailed) || errors.Is(err, asd.ErrUnavailable) {
					return next
				}
				if !asdtest.SameRefusal(err, want) {
					t.Fatalf("%v, want %v", err, want)
				}
				acked = next
			}
			return nil
		}
		if done(3) != nil {
			t.Fatal("failed before a sync did")
		}
		fsys.SetHook(fault.hook)
		next := done(60)
		if next == nil { // it was opened anew between two of them
			if fault.count() == 0 {
				t.Fatalf("no sync %d", nth)
			}
			next = acked
		}
		eventually(t, "the disk is opened anew", func() bool { return stats(t, s).Reopened == 1 })
		fsys.SetHook(nil)
		kinds[kindOf(fault.failed[0])]++
		if st := stats(t, s); st.Failed != "" || !strings.Contains(st.LastFailure, "injected") || st.ID != s.ID() {
			t.Fatalf("stats %+v", st)
		}
		acked = isOneOf(t, s, "opened anew after "+fault.failed[0], acked, next)
		lost := fsys.CrashClone(rng)
		checkAfterCrash(t, lost, crashOptions, acked)
		if done(20) != nil {
			t.Fatal("failed again")
		}
		isOneOf(t, s, "written after that", acked)
		must(t, s.Close())
		checkAfterCrash(t, fsys.CrashClone(rng), crashOptions, acked)
	}
	for _, kind := range []string{"log", "value", "directory"} {
		if kinds[kind] == 0 {
			t.Errorf("no sync of a %s failed: %v", kind, kinds)
		}
	}
}

// kindOf says what a sync was of.
func kindOf(what string) string {
	switch {
	case strings.HasPrefix(what, "syncdir"):
		return "directory"
	case strings.HasSuffix(what, ".log"):
		return "log"
	case strings.Contains(what, "MANIFEST"):
		return "manifest"
	case strings.HasSuffix(what, ".sst"):
		return "table"
	}
	return "value"
}

// TestFailedTableIsFailedDisk: syncs that the key-value store does in the background
// count, also where it would write another table.
func TestFailedTableIsFailedDisk(t *testing.T) {
	for _, kind := range []string{"table", "manifest"} {
		t.Run(kind, func(t *testing.T) {
			fsys := vfs.NewMem()
			s := supervise(t, fsys, crashOptions)
			putText(t, s, "before", 500)
			once := true
			fault := &syncFault{fail: func(op vfs.Op, name string) bool {
				hit := once && kindOf(op.String()+" "+name) == kind
				once = once && !hit
				return hit
			}}
			fsys.SetHook(fault.hook)
			d := s.serving.Load().disk
			flushed := make(chan struct{})
			go func() { // which may get stuck
				defer close(flushed)
				_ = d.db.Flush()
			}()
			eventually(t, "the disk is opened anew", func() bool { return stats(t, s).Reopened == 1 })
			fsys.SetHook(nil)
			if kind == "manifest" != d.isStuck() {
				t.Errorf("stuck: %v", d.isStuck())
			}
			expectText(t, s, "before", 500)
			putText(t, s, "after", 500)
			// The files of the one that is stuck are closed, and its locks free.
			must(t, s.Close())
			again := open(t, fsys, "/asd", crashOptions)
			defer again.Close()
			expectText(t, again, "after", 500)
		})
	}
}

func putText(t testing.TB, c asd.Client, key string, size int) {
	t.Helper()
	must(t, c.Apply(background, nil, []asd.Update{asd.Put(key, asd.NewValue(textOf(key, size)))}, guest))
}

func expectText(t testing.TB, c asd.Client, key string, size int) {
	t.Helper()
	v, err := c.Get(background, key, guest)
	must(t, err)
	if string(v.Data) != string(textOf(key, size)) {
		t.Fatalf("%s: wrong bytes", key)
	}
}

func textOf(key string, size int) []byte {
	return []byte(strings.Repeat(key+" ", size/(len(key)+1)+1)[:size])
}

// TestSickDiskIsTriedAgain: while test writes fail the disk refuses writes, serves
// what it has, and says why; it is opened when they succeed, and not before.
func TestSickDiskIsTriedAgain(t *testing.T) {
	fsys := vfs.NewMem()
	s := supervise(t, fsys, crashOptions)
	putText(t, s, "small", 500)
	putText(t, s, "large", 20_000)
	fault := &syncFault{fail: func(vfs.Op, string) bool { return true }}
	fsys.SetHook(fault.hook)
	err := s.Apply(background, nil, []asd.Update{asd.Put("no", asd.NewValue(make([]byte, 20_000)))}, guest)
	wantErr(t, err, asd.ErrFailed)
	eventually(t, "three test writes have failed", func() bool { return fault.count() >= 4 })
	expectText(t, s, "small", 500)
	expectText(t, s, "large", 20_000)
	wantErr(t, s.Apply(background, nil, []asd.Update{asd.Delete("small")}, guest), asd.ErrFailed)
	st := stats(t, s)
	for _, word := range []string{"injected", "test write", "attempt"} {
		if !strings.Contains(st.Failed, word) {
			t.Errorf("statistics say %q, nothing of %q", st.Failed, word)
		}
	}
	if st.Reopened != 0 {
		t.Errorf("opened anew %d times", st.Reopened)
	}
	fsys.SetHook(nil)
	eventually(t, "the disk is opened anew", func() bool { return stats(t, s).Reopened == 1 })
	expectText(t, s, "small", 500)
	putText(t, s, "after", 500)
	_, err = s.Get(background, "no", guest)
	wantErr(t, err, asd.ErrNoKey)
	if _, err := fsys.Stat("/asd/probe"); !isNotExist(err) {
		t.Errorf("the test write's file: %v", err)
	}
}

// TestOpeningAnewFails: with the disk closed and not opened yet, calls say that it is
// unavailable, statistics say why, and the same disk is opened later, no other.
func TestOpeningAnewFails(t *testing.T) {
	fsys := vfs.NewMem()
	s := supervise(t, fsys, crashOptions)
	putText(t, s, "key", 500)
	must(t, fsys.Rename("/asd/identity", "/identity"))
	s.serving.Load().disk.fail(errors.New("injected"))
	eventually(t, "opening fails", func() bool { return strings.Contains(stats(t, s).Failed, "another ASD") })
	_, err := s.Get(background, "key", guest)
	wantErr(t, err, asd.ErrUnavailable)
	wantErr(t, s.Apply(background, nil, []asd.Update{asd.Delete("key")}, guest), asd.ErrUnavailable)
	if st := stats(t, s); st.ID != s.ID() || st.Keys != 1 {
		t.Errorf("stats %+v", st)
	}
	must(t, fsys.Rename("/identity", "/asd/identity"))
	eventually(t, "the disk is opened anew", func() bool { return stats(t, s).Reopened == 1 })
	expectText(t, s, "key", 500)
}

// TestCloseWhileFailed: Close ends the attempts.
func TestCloseWhileFailed(t *testing.T) {
	for _, gone := range []bool{false, true} {
		t.Run(fmt.Sprint("disk closed ", gone), func(t *testing.T) {
			fsys := vfs.NewMem()
			s := supervise(t, fsys, crashOptions)
			fault := &syncFault{fail: func(_ vfs.Op, name string) bool { return !gone }}
			fsys.SetHook(fault.hook)
			if gone {
				must(t, fsys.Rename("/asd/identity", "/identity"))
			}
			s.serving.Load().disk.fail(errors.New("injected"))
			eventually(t, "an attempt has failed", func() bool {
				return gone && s.serving.Load().disk == nil || fault.count() > 0
			})
			_ = s.Close()
			_, err := s.Get(background, "key", guest)
			wantErr(t, err, asd.ErrClosed)
			fsys.SetHook(nil)
			lock, err := fsys.Lock(path.Join("/asd", "lock"))
			must(t, err)
			must(t, lock.Close())
		})
	}
}

// TestStuckStoresAreBounded: a disk that passes test writes and fails right after has
// memory and goroutines stay behind each time; at some number it is left alone.
func TestStuckStoresAreBounded(t *testing.T) {
	fsys := vfs.NewMem()
	s := supervise(t, fsys, crashOptions)
	s.maxWait = time.Millisecond // read by nobody else until the disk has failed
	fault := &syncFault{fail: func(op vfs.Op, name string) bool { return kindOf(op.String()+" "+name) == "log" }}
	fsys.SetHook(fault.hook)
	_ = s.Apply(background, nil, []asd.Update{asd.Put("key", asd.NewValue(make([]byte, 500)))}, guest)
	eventually(t, "it is left alone", func() bool { return strings.Contains(stats(t, s).Failed, "replace the disk") })
	if n := fault.count(); n < maxStuck || n > 4*maxStuck {
		t.Errorf("%d syncs failed", n)
	}
	if d := s.serving.Load(); d.disk != nil {
		t.Error("a disk is open")
	}
}
