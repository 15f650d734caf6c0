package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/rs/zerolog"

	"scoria/driver"
	"scoria/driver/registry"
)

// watchedRegistry counts what is read of a registry, and cuts its watches.
type watchedRegistry struct {
	registry.Store

	mu      sync.Mutex
	records int // returned by Get and List
	watches map[context.Context]context.CancelFunc
}

func (r *watchedRegistry) count(n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.records += n
}

func (r *watchedRegistry) read() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.records
}

func (r *watchedRegistry) Get(ctx context.Context, key string) (registry.KV, bool, error) {
	r.count(1)
	return r.Store.Get(ctx, key)
}

func (r *watchedRegistry) List(ctx context.Context, prefix string) ([]registry.KV, error) {
	list, err := r.Store.List(ctx, prefix)
	r.count(len(list))
	return list, err
}

func (r *watchedRegistry) Watch(ctx context.Context, prefix string, from int64) (<-chan registry.Event, error) {
	ctx, cancel := context.WithCancel(ctx)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.watches[ctx] = cancel
	return r.Store.Watch(ctx, prefix, from)
}

// cut ends all watches, as if they had been too slow.
func (r *watchedRegistry) cut() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for ctx, cancel := range r.watches {
		cancel()
		delete(r.watches, ctx)
	}
}

// memoryStore keeps objects in memory; of some namespaces it takes none.
type memoryStore struct {
	driver.Store

	mu      sync.Mutex
	objects map[string][]byte // by namespace/name
	refused map[string]bool   // namespaces
	puts    int
	fails   int
}

var errRefused = errors.New("injected: the store refuses")

func (s *memoryStore) refuse(ns string, refused bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refused[ns] = refused
}

func (s *memoryStore) counts() (puts, fails int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.puts, s.fails
}

func (s *memoryStore) Put(_ context.Context, ns, name string, _ uint64, o driver.Object) error {
	b := make([]byte, o.Size)
	if _, err := o.Data.ReadAt(b, 0); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.refused[ns] {
		s.fails++
		return errRefused
	}
	s.puts++
	s.objects[ns+"/"+name] = b
	return nil
}

func (s *memoryStore) Delete(_ context.Context, ns, name string, _ uint64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.refused[ns] {
		s.fails++
		return errRefused
	}
	delete(s.objects, ns+"/"+name)
	return nil
}

func (s *memoryStore) List(_ context.Context, ns, prefix string) ([]string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var names []string
	for key := range s.objects {
		if name, ok := strings.CutPrefix(key, ns+"/"); ok && strings.HasPrefix(name, prefix) {
			names = append(names, name)
		}
	}
	return names, nil
}

func (s *memoryStore) get(ns, name string) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b, ok := s.objects[ns+"/"+name]
	if !ok {
		return nil, fs.ErrNotExist
	}
	return b, nil
}

func (s *memoryStore) Size(_ context.Context, ns, name string) (int64, error) {
	b, err := s.get(ns, name)
	return int64(len(b)), err
}

func (s *memoryStore) ReadAt(_ context.Context, ns, name string, p []byte, off int64) error {
	b, err := s.get(ns, name)
	if err == nil {
		_, err = bytes.NewReader(b).ReadAt(p, off)
	}
	return err
}

// copierBench is a running recordCopier.
type copierBench struct {
	reg   *watchedRegistry
	store *memoryStore
	end   func()
}

func newCopierBench(t *testing.T) *copierBench {
	t.Helper()
	embedded, err := registry.Open(filepath.Join(t.TempDir(), "registry.db"))
	if err != nil {
		t.Fatal(err)
	}
	b := &copierBench{
		reg:   &watchedRegistry{Store: embedded, watches: map[context.Context]context.CancelFunc{}},
		store: &memoryStore{objects: map[string][]byte{}, refused: map[string]bool{}},
	}
	b.start()
	t.Cleanup(func() {
		b.end()
		embedded.Close()
	})
	return b
}

// start runs a copier that knows nothing of what the store has.
func (b *copierBench) start() {
	c := newRecordCopier(b.reg, "me", func(*registry.Volume) driver.Store { return b.store }, zerolog.Nop())
	c.settle, c.retry = time.Millisecond, 5*time.Millisecond
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.run(ctx)
	}()
	b.end = func() {
		cancel()
		<-done
	}
}

func (b *copierBench) put(t *testing.T, key string, r any) {
	t.Helper()
	var err error
	switch r := r.(type) {
	case registry.Volume:
		err = putRecord(t, b.reg.Store, key, r)
	case registry.Pool:
		err = putRecord(t, b.reg.Store, key, r)
	case registry.Schedule:
		err = putRecord(t, b.reg.Store, key, r)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func putRecord[R registry.Record](t *testing.T, s registry.Store, key string, r R) error {
	t.Helper()
	e, err := registry.Load[R](t.Context(), s, key)
	if err != nil && !errors.Is(err, registry.ErrNotFound) {
		return err
	}
	e.Record = r
	_, err = registry.Replace(t.Context(), s, key, e)
	return err
}

func (b *copierBench) delete(t *testing.T, key string) {
	t.Helper()
	if _, err := b.reg.Store.Commit(t.Context(), nil, []registry.Write{{Key: key}}); err != nil {
		t.Fatal(err)
	}
}

func readyVolume(pool, name string) registry.Volume {
	return registry.Volume{ID: uuid.New(), Pool: pool, Name: name, Size: 1 << 30, BlockSize: 4096, SCOSize: 64 << 20,
		Serial: "s", State: registry.StateReady, Owner: "me", Epoch: 1}
}

// lag says which volume has not the copy that the registry's records demand.
func (b *copierBench) lag(t *testing.T) string {
	t.Helper()
	ctx, reg := t.Context(), b.reg.Store
	volumes, err := registry.LoadAll[registry.Volume](ctx, reg, registry.VolumePrefix)
	if err != nil {
		t.Fatal(err)
	}
	for i := range volumes {
		v := &volumes[i].Record
		pool, err := registry.Load[registry.Pool](ctx, reg, registry.PoolKey(v.Pool))
		if v.Owner != "me" || v.State != registry.StateReady || errors.Is(err, registry.ErrNotFound) {
			continue
		}
		want := &recordCopy{Version: copyVersion, Volume: *v, Pool: pool.Record, PoolRevision: pool.Revision}
		if s, err := registry.Load[registry.Schedule](ctx, reg, registry.VolumeScheduleKey(v.ID)); err == nil {
			want.Schedule = &s.Record
		}
		if s, err := registry.Load[registry.Schedule](ctx, reg, registry.PoolScheduleKey(v.Pool)); err == nil {
			want.PoolSchedule = &s.Record
		}
		numbers, err := copies(ctx, b.store, v.ID.String())
		if err != nil {
			t.Fatal(err)
		}
		if len(numbers) != 1 {
			return fmt.Sprintf("%s has the copies %v", v.FullName(), numbers)
		}
		// It may be replaced meanwhile.
		if _, got, err := readCopy(ctx, b.store, v.ID.String(), numbers[0]); err != nil || !reflect.DeepEqual(got, want) {
			return fmt.Sprintf("the copy of %s is %+v, want %+v (%v)", v.FullName(), got, want, err)
		}
	}
	return ""
}

func (b *copierBench) awaitCopies(t *testing.T) {
	t.Helper()
	last := ""
	defer func() {
		if t.Failed() {
			t.Log(last)
		}
	}()
	await(t, "the copies to be what the registry says", func() bool {
		last = b.lag(t)
		return last == ""
	})
}

// TestCopyOfOneChange: what one volume's change costs does not grow with the others,
// and what concerns several is copied for these.
func TestCopyOfOneChange(t *testing.T) {
	b := newCopierBench(t)
	b.put(t, registry.PoolKey("p"), registry.Pool{Name: "p"})
	b.put(t, registry.PoolKey("few"), registry.Pool{Name: "few"})
	const many, few = 300, 3
	for i := range many {
		v := readyVolume("p", fmt.Sprintf("v%d", i))
		b.put(t, registry.VolumeKey("p", v.Name), v)
	}
	var some registry.Volume
	for i := range few {
		some = readyVolume("few", fmt.Sprintf("v%d", i))
		b.put(t, registry.VolumeKey("few", some.Name), some)
	}
	// It comes last in everything: once it is copied, nothing else is under way.
	b.put(t, registry.PoolKey("z"), registry.Pool{Name: "z"})
	last := readyVolume("z", "z")
	quiet := func() {
		last.Size += 1 << 30
		b.put(t, registry.VolumeKey("z", "z"), last)
		b.awaitCopies(t)
	}
	quiet()
	for _, step := range []struct {
		what   string
		change func()
		puts   int
	}{
		{"a volume", func() { some.Size *= 2; b.put(t, registry.VolumeKey("few", some.Name), some) }, 1},
		{"a volume's schedule", func() {
			b.put(t, registry.VolumeScheduleKey(some.ID), registry.Schedule{Volume: some.ID})
		}, 1},
		{"a pool", func() { b.put(t, registry.PoolKey("few"), registry.Pool{Name: "few", BlockSize: 512}) }, few},
		{"a pool's schedule", func() { b.put(t, registry.PoolScheduleKey("few"), registry.Schedule{Pool: "few"}) }, few},
		{"no schedule of a pool", func() { b.delete(t, registry.PoolScheduleKey("few")) }, few},
	} {
		records := b.reg.read()
		puts, _ := b.store.counts()
		step.change()
		quiet()
		if now, _ := b.store.counts(); now-puts != step.puts+1 {
			t.Errorf("%s: %d copies were written, want %d", step.what, now-puts, step.puts+1)
		}
		if n := b.reg.read() - records; n > 8*few {
			t.Errorf("%s: %d records were read", step.what, n)
		}
	}
}

// TestCopyIsRetried: a copy that the store does not take is tried again without a
// further change, and keeps no other waiting.
func TestCopyIsRetried(t *testing.T) {
	b := newCopierBench(t)
	b.put(t, registry.PoolKey("p"), registry.Pool{Name: "p"})
	sick, well := readyVolume("p", "sick"), readyVolume("p", "well")
	b.store.refuse(sick.ID.String(), true)
	b.put(t, registry.VolumeKey("p", "sick"), sick)
	await(t, "three attempts", func() bool { _, fails := b.store.counts(); return fails >= 3 })
	b.put(t, registry.VolumeKey("p", "well"), well)
	await(t, "the copy of the other volume", func() bool { puts, _ := b.store.counts(); return puts == 1 })
	b.store.refuse(sick.ID.String(), false)
	b.awaitCopies(t)
	// An earlier copy that could not be deleted goes as well.
	b.store.refuse(sick.ID.String(), true)
	sick.Size *= 2
	b.put(t, registry.VolumeKey("p", "sick"), sick)
	_, fails := b.store.counts()
	await(t, "a refused attempt", func() bool { _, now := b.store.counts(); return now > fails })
	b.store.mu.Lock()
	b.store.objects[sick.ID.String()+"/"+copyName(0)] = []byte("old")
	b.store.mu.Unlock()
	b.store.refuse(sick.ID.String(), false)
	b.awaitCopies(t)
}

// TestCopiesFollowTheRegistry: whatever changes in the registry, with watches that are
// lost, a store that refuses and restarts in between, in the end the copies say what
// the records do.
func TestCopiesFollowTheRegistry(t *testing.T) {
	for seed := range uint64(5) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			b := newCopierBench(t)
			r := rand.New(rand.NewPCG(seed, 1))
			volumes := map[string]registry.Volume{}
			pools := []string{"p", "q"}
			for _, p := range pools {
				b.put(t, registry.PoolKey(p), registry.Pool{Name: p})
			}
			for range 6 {
				for range 30 {
					b.changeSomething(t, r, pools, volumes)
				}
				for _, v := range volumes {
					b.store.refuse(v.ID.String(), false)
				}
				b.awaitCopies(t)
			}
		})
	}
}

func (b *copierBench) changeSomething(t *testing.T, r *rand.Rand, pools []string, volumes map[string]registry.Volume) {
	t.Helper()
	pool := pools[r.IntN(len(pools))]
	key := registry.VolumeKey(pool, fmt.Sprint(r.IntN(6)))
	v, there := volumes[key]
	switch n := r.IntN(20); {
	case n < 7 && !there:
		v = readyVolume(pool, filepath.Base(key))
		if r.IntN(4) == 0 {
			v.Owner = "somebody else"
		}
		volumes[key] = v
		b.put(t, key, v)
	case n < 7:
		v.Size += 1 << 30
		v.Owner = "me"
		volumes[key] = v
		b.put(t, key, v)
	case n < 9 && there:
		delete(volumes, key)
		b.delete(t, key)
	case n < 11 && there:
		b.rename(t, pools[r.IntN(len(pools))], fmt.Sprint(r.IntN(6)), key, volumes)
	case n < 13 && there:
		b.put(t, registry.VolumeScheduleKey(v.ID), registry.Schedule{Volume: v.ID, Rules: []string{fmt.Sprintf("every %dh keep 1", 1+r.IntN(20))}})
	case n < 14 && there:
		b.delete(t, registry.VolumeScheduleKey(v.ID))
	case n < 15:
		b.put(t, registry.PoolKey(pool), registry.Pool{Name: pool, BlockSize: uint32(r.IntN(1000))})
	case n < 16:
		b.put(t, registry.PoolScheduleKey(pool), registry.Schedule{Pool: pool, Rules: []string{fmt.Sprintf("every %dh keep 1", 1+r.IntN(20))}})
	case n < 17:
		b.reg.cut()
	case n < 18 && there:
		b.store.refuse(v.ID.String(), r.IntN(2) == 0)
	case n < 19:
		b.end()
		b.start()
	default:
		time.Sleep(time.Duration(r.IntN(4)) * time.Millisecond)
	}
}

// rename gives a volume another key, as VolumeSet does: in one commit.
func (b *copierBench) rename(t *testing.T, pool, name, from string, volumes map[string]registry.Volume) {
	t.Helper()
	to := registry.VolumeKey(pool, name)
	if _, taken := volumes[to]; taken {
		return
	}
	v := volumes[from]
	v.Pool, v.Name = pool, name
	kv, _, err := b.reg.Store.Get(t.Context(), from)
	if err != nil {
		t.Fatal(err)
	}
	text := strings.NewReplacer(`"pool":"`+volumes[from].Pool+`"`, `"pool":"`+pool+`"`, `"name":"`+volumes[from].Name+`"`, `"name":"`+name+`"`).Replace(string(kv.Value))
	if _, err := b.reg.Store.Commit(t.Context(), nil, []registry.Write{{Key: from}, {Key: to, Value: []byte(text)}}); err != nil {
		t.Fatal(err)
	}
	delete(volumes, from)
	volumes[to] = v
}

// TestManyChangedKeys: more changes than are remembered make all volumes be looked at.
func TestManyChangedKeys(t *testing.T) {
	c := newChangedKeys()
	for i := range maxChangedKeys {
		c.add(fmt.Sprint(i))
	}
	c.add("0")
	if keys, all := c.take(); all || len(keys) != maxChangedKeys {
		t.Fatalf("%d keys, all is %v", len(keys), all)
	}
	for i := range maxChangedKeys + 2 {
		c.add(fmt.Sprint(i))
	}
	if len(c.some) != 1 {
		t.Fatal("nobody is told")
	}
	if keys, all := c.take(); !all || len(keys) > 0 {
		t.Fatalf("%d keys, all is %v", len(keys), all)
	}
	c.add("a")
	if keys, all := c.take(); all || len(keys) != 1 || !keys["a"] {
		t.Fatalf("%v, all is %v", keys, all)
	}
}
