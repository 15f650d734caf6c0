package disk

import (
	"context"
	"errors"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"scoria/alba/asd"
	"scoria/alba/vfs"
)

func TestTwoInstances(t *testing.T) {
	for name, dir := range map[string]func() (vfs.FS, string){
		"mem": func() (vfs.FS, string) { return vfs.NewMem(), "/asd" },
		"os":  func() (vfs.FS, string) { return vfs.OS(), t.TempDir() },
	} {
		t.Run(name, func(t *testing.T) {
			fsys, dir := dir()
			d := open(t, fsys, dir, testOptions)
			_, err := Open(fsys, dir, testOptions)
			wantErr(t, err, vfs.ErrLocked)
			must(t, d.Close())
			must(t, open(t, fsys, dir, testOptions).Close())
		})
	}
}

// TestIdentity: an ASD keeps its id, and what is not the disk that it should be
// is not written to.
func TestIdentity(t *testing.T) {
	fsys := vfs.NewMem()
	opts := testOptions
	opts.ID = "2f0c8a52-95fd-4a29-8db4-5f4e7b3b3f3c"
	_, err := Open(fsys, "/asd", opts) // not mounted
	wantErr(t, err, asd.ErrWrongASD)
	d := open(t, fsys, "/asd", testOptions)
	id := d.ID()
	must(t, d.Apply(background, nil, []asd.Update{asd.Put("key", asd.NewValue(nil))}, guest))
	must(t, d.Close())
	_, err = Open(fsys, "/asd", opts)
	wantErr(t, err, asd.ErrWrongASD)
	opts.ID = id
	d = open(t, fsys, "/asd", opts)
	if d.ID() != id {
		t.Fatalf("id %s became %s", id, d.ID())
	}
	must(t, d.Close())

	other := open(t, fsys, "/other", testOptions)
	must(t, other.Close())
	must(t, fsys.Rename("/asd/identity", "/identity"))
	if _, err := Open(fsys, "/asd", testOptions); err == nil {
		t.Fatal("data without an identity was taken for a new ASD")
	}
	must(t, fsys.Rename("/other/identity", "/asd/identity"))
	_, err = Open(fsys, "/asd", testOptions)
	wantErr(t, err, asd.ErrWrongASD)
	must(t, fsys.Rename("/identity", "/asd/identity"))
	must(t, fsys.RemoveAll("/asd/kv"))
	if _, err := Open(fsys, "/asd", testOptions); err == nil {
		t.Fatal("an ASD without its key-value store was opened")
	}
}

// TestGateOrder: guests go before repair, and repair is not starved.
func TestGateOrder(t *testing.T) {
	g := newGate(1)
	must(t, g.acquire(background, guest))
	order := make(chan asd.Priority, 100)
	var done sync.WaitGroup
	start := func(pri asd.Priority, n int) {
		t.Helper()
		g.mu.Lock()
		before := g.guest.live + g.repair.live
		g.mu.Unlock()
		done.Add(n)
		for range n {
			go func() {
				if err := g.acquire(background, pri); err != nil {
					t.Error(err)
				}
				order <- pri
				g.release(pri)
				done.Done()
			}()
		}
		deadline := time.Now().Add(2 * time.Minute)
		for {
			g.mu.Lock()
			waiting := g.guest.live + g.repair.live
			g.mu.Unlock()
			if waiting == before+n {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%d wait, want %d", waiting, before+n)
			}
			time.Sleep(time.Millisecond)
		}
	}
	start(asd.PriorityRepair, 3)
	start(guest, 2*repairShare+2)
	if q, r := g.waiting(1); q != 2*repairShare+3 || r != 3 {
		t.Fatalf("%d and %d wait or run", q, r)
	}
	ctx, cancel := context.WithCancel(background)
	cancel()
	if err := g.acquire(ctx, guest); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	g.release(guest)
	var got []asd.Priority
	for range 2*repairShare + 5 {
		select {
		case pri := <-order:
			got = append(got, pri)
		case <-time.After(2 * time.Minute):
			t.Fatal("starved")
		}
	}
	for i, pri := range got {
		repair := i == repairShare || i == 2*repairShare+1 || i == 2*repairShare+4
		if repair != (pri == asd.PriorityRepair) {
			t.Fatalf("order %v", got)
		}
	}
	done.Wait()
	if g.free != 1 || g.repairs != 0 {
		t.Fatalf("%d free, %d repairs", g.free, g.repairs)
	}
}

// TestRepairLeavesRoom: repair alone does not take all slots.
func TestRepairLeavesRoom(t *testing.T) {
	g := newGate(4)
	for range 3 {
		must(t, g.acquire(background, asd.PriorityRepair))
	}
	ctx, cancel := context.WithTimeout(background, 50*time.Millisecond)
	defer cancel()
	wantErr(t, g.acquire(ctx, asd.PriorityRepair), context.DeadlineExceeded)
	must(t, g.acquire(background, guest))
}

// TestCanceledWhileQueued: an Apply that its caller gives up while it waits has no
// effect, and leaves no file.
func TestCanceledWhileQueued(t *testing.T) {
	fsys := vfs.NewMem()
	d := open(t, fsys, "/asd", testOptions)
	defer d.Close()
	var once sync.Once
	reached, goOn := make(chan struct{}), make(chan struct{})
	fsys.SetHook(func(op vfs.Op, name string) error {
		if op == vfs.OpSyncDir && name == d.valueDir(d.nextID.Load()) {
			once.Do(func() {
				close(reached)
				<-goOn
			})
		}
		return nil
	})
	first := make(chan error)
	go func() {
		first <- d.Apply(background, nil, []asd.Update{asd.Put("a", asd.NewValue(make([]byte, 50_000)))}, guest)
	}()
	select {
	case <-reached: // the committer is at work
	case <-time.After(2 * time.Minute):
		t.Fatal("the committer syncs no directory")
	}
	ctx, cancel := context.WithCancel(background)
	second := make(chan error)
	go func() {
		second <- d.Apply(ctx, nil, []asd.Update{asd.Put("b", asd.NewValue(make([]byte, 50_000)))}, guest)
	}()
	deadline := time.Now().Add(2 * time.Minute)
	for len(d.queue) == 0 {
		if time.Now().After(deadline) {
			t.Fatal("not queued")
		}
		time.Sleep(time.Millisecond)
	}
	cancel()
	if err := <-second; !errors.Is(err, context.Canceled) || errors.Is(err, asd.ErrUnknownOutcome) {
		t.Fatal(err)
	}
	close(goOn)
	must(t, <-first)
	_, err := d.Get(background, "b", guest)
	wantErr(t, err, asd.ErrNoKey)
	waitForFiles(t, fsys, "/asd", 1)
}

// TestOpenOnAFailingDisk: a disk that takes no writes while Pebble carries its log over
// fails the opening with the reason, for as long as it does so, and keeps nobody
// waiting; then it opens with what it had acknowledged.
func TestOpenOnAFailingDisk(t *testing.T) {
	fsys := vfs.NewMem()
	d := open(t, fsys, "/asd", testOptions)
	must(t, d.Apply(background, nil, []asd.Update{asd.Put("key", asd.NewValue([]byte("kept")))}, guest))
	left, err := fsys.KillClone() // its log is to be carried over
	must(t, err)
	_ = d.Close()
	var full atomic.Bool
	full.Store(true)
	left.SetHook(func(op vfs.Op, name string) error {
		if (op == vfs.OpCreate || op == vfs.OpWrite) && strings.HasSuffix(name, ".sst") && full.Load() {
			return syscall.ENOSPC
		}
		return nil
	})
	deadline := time.Now().Add(2 * time.Minute)
	try := func() (*Disk, error) {
		t.Helper()
		type result struct {
			d   *Disk
			err error
		}
		opened := make(chan result, 1)
		go func() { d, err := Open(left, "/asd", testOptions); opened <- result{d, err} }()
		select {
		case r := <-opened:
			return r.d, r.err
		case <-time.After(time.Until(deadline)):
			buf := make([]byte, 1<<20)
			t.Fatalf("the opening of an ASD on a failing disk does not end\n%s", buf[:runtime.Stack(buf, true)])
			return nil, nil
		}
	}
	for range 2 { // what the first left holds nothing up
		_, err = try()
		wantErr(t, err, syscall.ENOSPC)
	}
	full.Store(false)
	d, err = try()
	must(t, err)
	got, err := d.Get(background, "key", guest)
	must(t, err)
	if string(got.Data) != "kept" {
		t.Fatalf("read %q", got.Data)
	}
	must(t, d.Close())
}

// TestNoCompactionBeforeItIsOpen: while an opening can fail, nothing goes on beside it that
// would use what it gives up then, and that would panic. Compactions that are due begin
// when it is open.
func TestNoCompactionBeforeItIsOpen(t *testing.T) {
	fsys := vfs.NewMem()
	early := make(chan string, 1)
	hook := func(op vfs.Op, name string) error {
		switch {
		case op == vfs.OpOpen && strings.HasSuffix(name, ".sst"):
			select {
			case early <- name:
			default:
			}
		case op == vfs.OpCreate && strings.Contains(name, "/kv/") && strings.HasSuffix(name, ".log"):
			// The old log was carried over, after which compactions are due: time for one.
			for i := 0; i < 50 && len(early) == 0; i++ {
				time.Sleep(time.Millisecond)
			}
			return syscall.EIO
		}
		return nil
	}
	// Each opening that fails leaves another table of the same keys.
	for i := range 4 {
		d := open(t, fsys, "/asd", testOptions)
		must(t, d.Apply(background, nil, []asd.Update{asd.Put("key", asd.NewValue([]byte{byte(i)}))}, guest))
		left, err := fsys.KillClone()
		must(t, err)
		_ = d.Close()
		left.SetHook(hook)
		for range 3 {
			_, err = Open(left, "/asd", testOptions)
			wantErr(t, err, syscall.EIO)
		}
		left.SetHook(nil)
		fsys = left
	}
	select {
	case name := <-early:
		t.Fatalf("%s was read while an opening failed", name)
	default:
	}
	d := open(t, fsys, "/asd", testOptions)
	eventually(t, "compactions begin", func() bool { return d.db.Metrics().Compact.Count > 0 })
	got, err := d.Get(background, "key", guest)
	must(t, err)
	if string(got.Data) != "\x03" {
		t.Fatalf("read %q", got.Data)
	}
	must(t, d.Close())
}

// TestOpeningThatFailsUnderATableThatIsRead: Pebble reads tables with deletions beside its
// opening, and panics when that fails meanwhile; here the opening fails, and the process
// lives.
func TestOpeningThatFailsUnderATableThatIsRead(t *testing.T) {
	for range 10 { // whether the opening or the reader is first is chance
		left := vfs.NewMem()
		for _, updates := range [][]asd.Update{
			{asd.Put("gone", asd.NewValue([]byte("x"))), asd.Put("key", asd.NewValue([]byte("kept")))},
			{asd.Delete("gone")}, // of what is in a table
		} {
			d := open(t, left, "/asd", testOptions)
			must(t, d.Apply(background, nil, updates, guest))
			next, err := left.KillClone()
			must(t, err)
			_ = d.Close()
			left = next
		}
		failOverReader(t, left)
		d := open(t, left, "/asd", testOptions)
		_, err := d.Get(background, "key", guest)
		must(t, err)
		must(t, d.Close())
	}
}

// failOverReader has an opening fail while a table is read, if one is.
func failOverReader(t *testing.T, fsys *vfs.Mem) {
	t.Helper()
	reading, failing := make(chan struct{}), make(chan struct{})
	var read, fail sync.Once
	fsys.SetHook(func(op vfs.Op, name string) error {
		switch {
		case op == vfs.OpOpen && strings.HasSuffix(name, ".sst"):
			read.Do(func() {
				close(reading)
				<-failing
				time.Sleep(20 * time.Millisecond) // for what would give its table up
			})
		case op == vfs.OpCreate && strings.Contains(name, "/kv/") && strings.HasSuffix(name, ".log"):
			fail.Do(func() {
				select {
				case <-reading:
				case <-time.After(50 * time.Millisecond): // it waits for the opening
				}
				close(failing)
			})
			return syscall.EIO
		}
		return nil
	})
	_, err := Open(fsys, "/asd", testOptions)
	wantErr(t, err, syscall.EIO)
	fsys.SetHook(nil)
}

// TestDirectoryThatCannotBeSynced: Pebble panics when it can't sync its directory after
// it has made a manifest; here the opening fails, and the process lives.
func TestDirectoryThatCannotBeSynced(t *testing.T) {
	fsys := vfs.NewMem()
	d := open(t, fsys, "/asd", testOptions)
	must(t, d.Apply(background, nil, []asd.Update{asd.Put("key", asd.NewValue([]byte("kept")))}, guest))
	left, err := fsys.KillClone()
	must(t, err)
	_ = d.Close()
	var marked atomic.Bool
	left.SetHook(func(op vfs.Op, name string) error {
		if op == vfs.OpRemove && strings.Contains(name, "/kv/marker.manifest") {
			marked.Store(true)
		}
		if op == vfs.OpSyncDir && strings.HasSuffix(name, "/kv") && marked.Load() {
			return syscall.EIO
		}
		return nil
	})
	failed := make(chan error, 1)
	go func() { _, err := Open(left, "/asd", testOptions); failed <- err }()
	select {
	case err := <-failed:
		wantErr(t, err, syscall.EIO)
	case <-time.After(2 * time.Minute):
		buf := make([]byte, 1<<20)
		t.Fatalf("the opening does not end\n%s", buf[:runtime.Stack(buf, true)])
	}
	left.SetHook(nil)
	d = open(t, left, "/asd", testOptions)
	_, err = d.Get(background, "key", guest)
	must(t, err)
	must(t, d.Close())
}
