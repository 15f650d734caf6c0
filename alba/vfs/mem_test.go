package vfs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"reflect"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

func seeded(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 0)) }

// synced returns a Mem whose file "f" durably holds the contents.
func synced(t testing.TB, contents []byte) (*Mem, File) {
	t.Helper()
	m := NewMem()
	f := mustOpen(t, m, "f", Create)
	_, err := f.WriteAt(contents, 0)
	must(t, err)
	must(t, f.Sync())
	must(t, m.SyncDir("/"))
	return m, f
}

// TestCrashSubset: after a loss of power every sector holds its synced value or
// one written since, and both happen; what was synced last stays as it was.
func TestCrashSubset(t *testing.T) {
	const sectors = 64
	for seed := range uint64(200) {
		rng := seeded(seed)
		m, f := synced(t, make([]byte, sectors*SectorSize))
		var possible [sectors]map[byte]bool
		for i := range possible {
			possible[i] = map[byte]bool{0: true}
		}
		value := byte(0)
		for range 30 {
			if rng.IntN(10) == 0 {
				must(t, f.Sync())
				b := []byte(get(t, m, "f"))
				for i := range possible {
					possible[i] = map[byte]bool{b[i*SectorSize]: true}
				}
				continue
			}
			value++
			first := rng.IntN(sectors)
			count := 1 + rng.IntN(sectors-first)
			_, err := f.WriteAt(bytes.Repeat([]byte{value}, count*SectorSize), int64(first*SectorSize))
			must(t, err)
			for i := first; i < first+count; i++ {
				possible[i][value] = true
			}
		}
		b := []byte(get(t, m.CrashClone(rng), "f"))
		if len(b) != sectors*SectorSize {
			t.Fatalf("seed %d: synced size lost: %d", seed, len(b))
		}
		for i := range possible {
			sector := b[i*SectorSize : (i+1)*SectorSize]
			if !possible[i][sector[0]] || !bytes.Equal(sector, bytes.Repeat(sector[:1], SectorSize)) {
				t.Fatalf("seed %d: sector %d holds %d, possible are %v", seed, i, sector[0], possible[i])
			}
		}
	}
}

// TestCrashReachesEverything: losing all, keeping all and tearing happen.
func TestCrashReachesEverything(t *testing.T) {
	old, now := bytes.Repeat([]byte{1}, 8192), bytes.Repeat([]byte{2}, 8192)
	seen := make(map[string]int)
	m, f := synced(t, old)
	_, err := f.WriteAt(now, 0)
	must(t, err)
	for seed := range uint64(100) {
		b := []byte(get(t, m.CrashClone(seeded(seed)), "f"))
		switch {
		case bytes.Equal(b, old):
			seen["lost"]++
		case bytes.Equal(b, now):
			seen["kept"]++
		default:
			seen["torn"]++
		}
	}
	if len(seen) != 3 {
		t.Fatalf("outcomes: %v", seen)
	}
	if get(t, m, "f") != string(now) {
		t.Fatal("CrashClone changed its source")
	}
}

func TestCrashSizes(t *testing.T) {
	sizes := make(map[int]bool)
	m, f := synced(t, make([]byte, 100))
	must(t, f.Truncate(50))
	_, err := f.WriteAt(make([]byte, 1000), 5000)
	must(t, err)
	for seed := range uint64(200) {
		sizes[len(get(t, m.CrashClone(seeded(seed)), "f"))] = true
	}
	if !reflect.DeepEqual(sizes, map[int]bool{50: true, 100: true, 6000: true}) {
		t.Fatalf("sizes after a crash: %v", sizes)
	}
	must(t, f.Sync())
	for seed := range uint64(20) {
		if size := len(get(t, m.CrashClone(seeded(seed)), "f")); size != 6000 {
			t.Fatalf("synced size lost: %d", size)
		}
	}
}

func TestCrashDeterministic(t *testing.T) {
	m := NewMem()
	for i := range 20 {
		put(t, m, fmt.Sprint("f", i), string(bytes.Repeat([]byte{byte(i)}, 5000)))
	}
	image := func(m *Mem) string {
		names, err := m.List("/")
		must(t, err)
		s := ""
		for _, name := range names {
			s += name + get(t, m, name)
		}
		return s
	}
	for seed := range uint64(20) {
		first, second := m.CrashClone(seeded(seed)), m.CrashClone(seeded(seed))
		if image(first) != image(second) {
			t.Fatalf("seed %d: two outcomes", seed)
		}
	}
}

func TestCrashNames(t *testing.T) {
	count := func(m *Mem, name string) (n int) {
		for seed := range uint64(100) {
			if _, err := m.CrashClone(seeded(seed)).Stat(name); err == nil {
				n++
			}
		}
		return n
	}
	m := NewMem()
	must(t, m.MkdirAll("a/b"))
	must(t, m.MkdirAll("c"))
	put(t, m, "a/b/f", "x")
	if n := count(m, "a/b/f"); n == 0 || n == 100 {
		t.Fatalf("an unsynced name survived %d of 100", n)
	}
	must(t, m.SyncDir("a/b"))
	if n := count(m, "a/b/f"); n != 100 {
		t.Fatalf("a synced name survived %d of 100", n)
	}
	must(t, m.Rename("a/b/f", "c/g"))
	for seed := range uint64(100) {
		c := m.CrashClone(seeded(seed))
		_, err1 := c.Stat("a/b/f")
		_, err2 := c.Stat("c/g")
		if (err1 == nil) == (err2 == nil) {
			t.Fatalf("seed %d: a rename was kept in part: %v, %v", seed, err1, err2)
		}
	}
	must(t, m.SyncDir("c"))
	if n := count(m, "c/g"); n != 100 {
		t.Fatalf("a synced rename survived %d of 100", n)
	}
	must(t, m.SyncDir("a/b"))
	must(t, m.Remove("c/g"))
	if n := count(m, "c/g"); n == 0 || n == 100 {
		t.Fatalf("an unsynced removal was lost %d times of 100", n)
	}
	must(t, m.SyncDir("c"))
	if n := count(m, "c/g"); n != 0 {
		t.Fatalf("a synced removal was lost %d times of 100", n)
	}
}

// TestCrashRenameKeepsFile: syncing only the directory that a file left must not
// lose it.
func TestCrashRenameKeepsFile(t *testing.T) {
	m := NewMem()
	must(t, m.MkdirAll("a"))
	must(t, m.MkdirAll("b"))
	put(t, m, "a/f", "x")
	must(t, m.SyncDir("a"))
	must(t, m.Rename("a/f", "b/f"))
	must(t, m.SyncDir("a"))
	for seed := range uint64(50) {
		if _, err := m.CrashClone(seeded(seed)).Stat("b/f"); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
}

func TestCrashLosesMappingsAndLocks(t *testing.T) {
	m := NewMem()
	pm, _, err := m.Map("pool", 4096)
	must(t, err)
	defer pm.Close()
	_, err = m.Lock("lock")
	must(t, err)
	must(t, m.SyncDir("/"))
	c := m.CrashClone(seeded(1))
	if _, err := c.Stat("pool"); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("a mapped file outlived the power: %v", err)
	}
	l, err := c.Lock("lock")
	must(t, err)
	must(t, l.Close())
}

func TestFailedSync(t *testing.T) {
	lost, kept := 0, 0
	for seed := range uint64(50) {
		m, f := synced(t, bytes.Repeat([]byte{1}, 16*4096))
		m.rng = seeded(seed)
		_, err := f.WriteAt(bytes.Repeat([]byte{2}, 16*4096), 0)
		must(t, err)
		m.SetHook(func(op Op, _ string) error {
			if op == OpSync {
				return syscall.EIO
			}
			return nil
		})
		wantErr(t, f.Sync(), syscall.EIO)
		m.SetHook(nil)
		after := get(t, m.CrashClone(seeded(1)), "f")
		_, err = f.WriteAt([]byte{3}, 0)
		must(t, err)
		must(t, f.Sync())
		b := []byte(after)
		b[0] = 3
		if get(t, m.CrashClone(seeded(2)), "f") != string(b) {
			t.Fatalf("seed %d: a later sync changed what a failed one left", seed)
		}
		lost += bytes.Count(b, []byte{1})
		kept += bytes.Count(b, []byte{2})
	}
	if lost == 0 || kept == 0 {
		t.Fatalf("bytes lost %d, kept %d", lost, kept)
	}
}

func TestHook(t *testing.T) {
	m := NewMem()
	var ops []Op
	m.SetHook(func(op Op, name string) error {
		ops = append(ops, op)
		if op == OpWrite {
			return syscall.ENOSPC
		}
		if op == OpRead {
			return syscall.EIO
		}
		return nil
	})
	f := mustOpen(t, m, "f", Create)
	n, err := f.WriteAt([]byte("x"), 0)
	if n != 0 {
		t.Fatalf("%d bytes written", n)
	}
	wantErr(t, err, syscall.ENOSPC)
	_, err = f.ReadAt(make([]byte, 1), 0)
	wantErr(t, err, syscall.EIO)
	must(t, f.Sync())
	if want := []Op{OpCreate, OpWrite, OpRead, OpSync}; !reflect.DeepEqual(ops, want) {
		t.Fatalf("calls %v, want %v", ops, want)
	}
}

// TestSetHookWaits: when SetHook returns nobody is in the hook that was set before
// any more, and nobody enters it, so that what it noted can be read.
func TestSetHookWaits(t *testing.T) {
	m := NewMem()
	inside, goOn := make(chan struct{}), make(chan struct{})
	var once sync.Once
	calls := 0 // a data race if SetHook does not wait
	var mu sync.Mutex
	m.SetHook(func(Op, string) error {
		once.Do(func() {
			close(inside)
			<-goOn
		})
		mu.Lock()
		defer mu.Unlock()
		calls++
		return nil
	})
	var others sync.WaitGroup
	others.Go(func() { _ = m.MkdirAll("first") })
	<-inside
	for i := range 4 {
		others.Go(func() {
			for j := range 50 {
				_ = m.MkdirAll(fmt.Sprintf("d%d-%d", i, j))
			}
		})
	}
	removed := make(chan struct{})
	go func() { m.SetHook(nil); close(removed) }()
	select {
	case <-removed:
		t.Error("SetHook returned while a call was in the hook")
	default:
	}
	close(goOn)
	<-removed
	seen := calls
	others.Wait()
	if calls != seen || seen == 0 {
		t.Errorf("%d calls when the hook was removed, %d later", seen, calls)
	}
}

func TestCapacity(t *testing.T) {
	m := NewMem()
	m.SetCapacity(10 * 4096)
	f := mustOpen(t, m, "f", Create)
	n, err := f.WriteAt(make([]byte, 11*4096), 0)
	wantErr(t, err, syscall.ENOSPC)
	if n != 10*4096 {
		t.Fatalf("%d bytes written", n)
	}
	_, err = f.WriteAt(make([]byte, 4096), 4096) // room it has
	must(t, err)
	wantErr(t, f.Allocate(10*4096, 1), syscall.ENOSPC)
	must(t, f.PunchHole(0, 4*4096))
	if free, _ := m.Free("/"); free != 4*4096 {
		t.Fatalf("free %d", free)
	}
	must(t, f.Allocate(0, 4*4096))
	g := mustOpen(t, m, "g", Create)
	_, err = g.WriteAt([]byte{1}, 0)
	wantErr(t, err, syscall.ENOSPC)
	must(t, m.Remove("f"))
	_, err = g.WriteAt([]byte{1}, 0)
	wantErr(t, err, syscall.ENOSPC) // f is still open
	must(t, f.Close())
	_, err = g.WriteAt([]byte{1}, 0)
	must(t, err)
	if used := m.Used(); used != 4096 {
		t.Fatalf("used %d", used)
	}
	must(t, m.Link("g", "h"))
	c, err := m.KillClone()
	must(t, err)
	if used := c.Used(); used != 4096 {
		t.Fatalf("used %d after a kill", used)
	}
}

func TestCorrupt(t *testing.T) {
	m, _ := synced(t, make([]byte, 100))
	must(t, m.Corrupt("f", 50))
	for _, x := range []*Mem{m, m.CrashClone(seeded(1))} {
		if b := get(t, x, "f"); b[50] == 0 || b[49] != 0 {
			t.Fatal("byte not flipped")
		}
	}
	wantErr(t, m.Corrupt("f", 100), syscall.EINVAL)
}

func TestKillKeepsEverything(t *testing.T) {
	m, f := synced(t, []byte("durable"))
	_, err := f.WriteAt([]byte("WRITTEN"), 0)
	must(t, err)
	must(t, m.Link("f", "g"))
	pm, _, err := m.Map("pool", 1<<20)
	must(t, err)
	copy(pm.Bytes()[777_777:], "stored")
	_, err = m.Lock("lock")
	must(t, err)
	c, err := m.KillClone()
	must(t, err)

	if get(t, c, "f") != "WRITTEN" || get(t, c, "g") != "WRITTEN" {
		t.Fatal("a kill lost a write")
	}
	cm, created, err := c.Map("pool", 1<<20)
	must(t, err)
	want := make([]byte, 1<<20)
	copy(want[777_777:], "stored")
	if created || !bytes.Equal(cm.Bytes(), want) {
		t.Fatal("a kill changed what was stored")
	}
	l, err := c.Lock("lock")
	must(t, err)
	must(t, l.Close())
	outcomes := make(map[string]bool)
	for seed := range uint64(100) {
		outcomes[get(t, c.CrashClone(seeded(seed)), "f")] = true
	}
	if !outcomes["durable"] || !outcomes["WRITTEN"] {
		t.Fatalf("a kill made writes durable or lost them: %v", outcomes)
	}

	// The old instance is cut off.
	pm.Bytes()[0] = 1
	if cm.Bytes()[0] != 0 || pm.Bytes()[0] != 1 {
		t.Fatal("the old mapping still reaches the clone")
	}
	cm.Bytes()[4096] = 1
	if pm.Bytes()[4096] != 0 {
		t.Fatal("the old mapping sees the clone")
	}
	_, err = f.WriteAt([]byte("x"), 0)
	wantErr(t, err, ErrKilled)
	wantErr(t, f.Sync(), ErrKilled)
	_, err = m.Open("f", 0)
	wantErr(t, err, ErrKilled)
	_, err = m.KillClone()
	wantErr(t, err, ErrKilled)
	must(t, f.Close())
	must(t, pm.Close())
	must(t, cm.Close())
	c.Kill()
	_, err = c.Open("f", 0)
	wantErr(t, err, ErrKilled)
}

// TestKillIsConsistentCut stores a counter to a far page before near ones, from
// two goroutines that follow one another, while the instance is killed.
func TestKillIsConsistentCut(t *testing.T) {
	const size, stride = 4 << 20, 1 << 20
	for range 30 {
		m := NewMem()
		pm, _, err := m.Map("pool", size)
		must(t, err)
		b := pm.Bytes()
		var stop atomic.Bool
		var turn atomic.Uint64
		var wg sync.WaitGroup
		for g := range uint64(2) {
			wg.Go(func() {
				for !stop.Load() {
					n := turn.Load()
					if n%2 != g {
						runtime.Gosched()
						continue
					}
					for off := size - stride; off >= 0; off -= stride {
						binary.LittleEndian.PutUint64(b[off:], n)
					}
					turn.Store(n + 1)
				}
			})
		}
		for deadline := time.Now().Add(2 * time.Minute); turn.Load() < 10; runtime.Gosched() {
			if time.Now().After(deadline) {
				panic("the writers don't move")
			}
		}
		c, err := m.KillClone()
		must(t, err)
		stop.Store(true)
		wg.Wait()
		cm, _, err := c.Map("pool", size)
		must(t, err)
		later := ^uint64(0)
		for off := size - stride; off >= 0; off -= stride {
			n := binary.LittleEndian.Uint64(cm.Bytes()[off:])
			if n > later || later != ^uint64(0) && later > n+1 {
				t.Fatalf("offset %d holds %d after %d", off, n, later)
			}
			later = n
		}
		must(t, cm.Close())
		must(t, pm.Close())
	}
}

// TestKilledInstanceHoldsNothing keeps files and a mapping of killed instances open,
// as a dead process's goroutines do.
func TestKilledInstanceHoldsNothing(t *testing.T) {
	for name, kill := range map[string]func(*Mem) *Mem{
		"kill":  func(m *Mem) *Mem { c, err := m.KillClone(); must(t, err); return c },
		"power": func(m *Mem) *Mem { c := m.CrashClone(rand.New(rand.NewPCG(1, 1))); m.Kill(); return c },
	} {
		t.Run(name, func(t *testing.T) {
			m := NewMem()
			must(t, m.MkdirAll("d"))
			f := mustOpen(t, m, "d/f", Create)
			_, err := f.WriteAt(make([]byte, 1<<20), 0)
			must(t, err)
			must(t, f.Sync())
			must(t, m.SyncDir("d"))
			_, err = f.WriteAt([]byte("behind"), 1<<20)
			must(t, err)
			c := kill(m)
			if n := f.(*memFile).n; len(n.cur.pages)+len(n.durable.pages)+len(n.journal) > 0 {
				t.Errorf("%d, %d pages and %d changes are left", len(n.cur.pages), len(n.durable.pages), len(n.journal))
			}
			if m.Used() != 0 {
				t.Errorf("%d bytes are in use", m.Used())
			}
			must(t, f.Close())
			size, err := mustOpen(t, c, "d/f", 0).Size()
			must(t, err)
			if size < 1<<20 {
				t.Errorf("the clone's file has %d bytes", size)
			}
		})
	}
}

func TestJournalIsBounded(t *testing.T) {
	m := NewMem()
	f := mustOpen(t, m, "f", Create)
	p := make([]byte, 1<<20)
	for i := range 3 * journalLimitBytes >> 20 {
		p[0] = byte(i)
		_, err := f.WriteAt(p, 0)
		must(t, err)
	}
	if n := f.(*memFile).n.journalBytes; n > journalLimitBytes {
		t.Fatalf("journal holds %d bytes", n)
	}
}

func BenchmarkMemWriteSync(b *testing.B) {
	m := NewMem()
	f := mustOpen(b, m, "f", Create)
	p := make([]byte, 4096)
	for i := 0; b.Loop(); i++ {
		if _, err := f.WriteAt(p, int64(i%1024)*4096); err != nil {
			b.Fatal(err)
		}
		if i%16 == 0 {
			if err := f.Sync(); err != nil {
				b.Fatal(err)
			}
		}
	}
}

func BenchmarkMemClones(b *testing.B) {
	m := NewMem()
	f := mustOpen(b, m, "f", Create)
	_, err := f.WriteAt(make([]byte, 16<<20), 0)
	must(b, err)
	rng := seeded(1)
	for b.Loop() {
		if _, err := mustOpen(b, m.CrashClone(rng), "f", Create).ReadAt(make([]byte, 1), 0); err != nil && err != io.EOF {
			b.Fatal(err)
		}
	}
}
