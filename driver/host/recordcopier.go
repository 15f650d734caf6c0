package host

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/rs/zerolog"

	"scoria/driver"
	"scoria/driver/registry"
)

// recordCopier keeps the copies of the records of all ready volumes in the object store
// up to date. It has one goroutine, run, which sleeps while nothing changes, and one
// per watch. What a change costs does not depend on how many volumes there are: only
// the volumes that it concerns are looked at. All are when a watch begins, as
// something may have changed before it. A copy that the store could not repair is
// made anew.
type recordCopier struct {
	reg     registry.Store
	node    string
	storeOf func(*registry.Volume) driver.Store
	log     zerolog.Logger

	settle, retry time.Duration // copySettle, copyRetry

	changed *changedKeys

	written map[string]copiedRecord // what the store has, as far as it is known; by the volume's key
	keys    map[uuid.UUID]string    // of the volumes in written
	behind  map[string]bool         // keys of volumes whose copy failed
}

// copiedRecord identifies the copy that the store has of a volume's record.
type copiedRecord struct {
	id  uuid.UUID
	sum [sha256.Size]byte
	// anew: it is not to be relied on, even if all of it lies in what is left of it and
	// it can be read.
	anew bool
}

const (
	copySettle  = 100 * time.Millisecond // several changes become one copy
	copyRetry   = 10 * time.Second       // after the store could not take one
	copyTimeout = 30 * time.Second       // of one copy: the others don't wait longer for it
	copyAtStop  = 2 * time.Second        // that a stop waits for what changed last

	// maxChangedKeys bounds what is remembered while a copy waits for the store; with
	// more, all volumes are looked at.
	maxChangedKeys = 4096
)

func newRecordCopier(reg registry.Store, node string, storeOf func(*registry.Volume) driver.Store, log zerolog.Logger) *recordCopier {
	return &recordCopier{reg: reg, node: node, storeOf: storeOf, log: log, settle: copySettle, retry: copyRetry, changed: newChangedKeys(),
		written: map[string]copiedRecord{}, keys: map[uuid.UUID]string{}, behind: map[string]bool{}}
}

// changedKeys are the keys that watches saw change. Safe from any goroutine.
type changedKeys struct {
	some chan struct{} // a token when there are any

	mu   sync.Mutex
	keys map[string]bool
	all  bool // too many to remember
}

func newChangedKeys() *changedKeys {
	return &changedKeys{some: make(chan struct{}, 1), keys: map[string]bool{}}
}

func (c *changedKeys) add(key string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.all:
	case len(c.keys) < maxChangedKeys || c.keys[key]:
		c.keys[key] = true
	default:
		c.all, c.keys = true, map[string]bool{}
	}
	select {
	case c.some <- struct{}{}:
	default:
	}
}

// take returns the keys and forgets them.
func (c *changedKeys) take() (keys map[string]bool, all bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	keys, all = c.keys, c.all
	c.keys, c.all = map[string]bool{}, false
	return keys, all
}

// run copies until ctx ends.
func (c *recordCopier) run(ctx context.Context) {
	for ctx.Err() == nil {
		if err := c.follow(ctx); err != nil && ctx.Err() == nil {
			c.log.Warn().Err(err).Msg("copies of the volumes' records can't follow the registry; tried again")
			sleepFor(ctx, c.retry)
		}
	}
}

// follow copies what there is, and what changes, until a watch ends.
func (c *recordCopier) follow(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	changed := c.changed
	for _, prefix := range []string{registry.VolumePrefix, registry.PoolPrefix, registry.SchedulePrefix} {
		events, err := c.reg.Watch(ctx, prefix, 0)
		if err != nil {
			return err
		}
		go func() {
			defer cancel() // a watch that ended
			for e := range events {
				changed.add(e.Key)
			}
		}()
	}
	if err := c.copyAll(ctx); err != nil {
		return err
	}
	var due time.Time // when those that are behind are tried again; zero: none are
	for {
		var again <-chan time.Time
		switch {
		case len(c.behind) == 0:
			due = time.Time{}
		case due.IsZero():
			due = time.Now().Add(c.retry)
			fallthrough
		default:
			again = time.After(time.Until(due))
		}
		select {
		case <-changed.some:
			sleepFor(ctx, c.settle)
		case <-again:
			due = time.Time{}
			for key := range c.behind {
				changed.add(key)
			}
		case <-ctx.Done():
			return nil
		}
		keys, all := changed.take()
		err := c.copyChanged(ctx, keys)
		if all && err == nil {
			err = c.copyAll(ctx)
		}
		if err != nil {
			return err
		}
	}
}

func sleepFor(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// copyAll writes all copies that are missing or old, but for those in behind
// afterwards, and forgets volumes that are gone.
func (c *recordCopier) copyAll(ctx context.Context) error {
	keys := map[string]bool{}
	for key := range c.written {
		keys[key] = true
	}
	for key := range c.behind {
		keys[key] = true
	}
	if err := c.addVolumes(ctx, keys, registry.VolumePrefix); err != nil {
		return err
	}
	return c.copyVolumes(ctx, keys)
}

// addVolumes adds the keys of the volumes under a prefix.
func (c *recordCopier) addVolumes(ctx context.Context, keys map[string]bool, prefix string) error {
	list, err := c.reg.List(ctx, prefix)
	for _, kv := range list {
		keys[kv.Key] = true
	}
	return err
}

// copyChanged does so for the volumes that a change of those keys concerns.
func (c *recordCopier) copyChanged(ctx context.Context, changed map[string]bool) error {
	volumes := map[string]bool{}
	for key := range changed {
		pool, isPool := strings.CutPrefix(key, registry.PoolPrefix)
		if !isPool {
			pool, isPool = strings.CutPrefix(key, registry.PoolScheduleKey(""))
		}
		id, isSchedule := strings.CutPrefix(key, registry.SchedulePrefix+"volume/")
		ns, isCopy := strings.CutPrefix(key, unrepairedCopy)
		switch {
		case isCopy:
			if id, err := uuid.Parse(ns); err == nil && c.keys[id] != "" {
				c.written[c.keys[id]] = copiedRecord{id: id, anew: true}
				volumes[c.keys[id]] = true
			}
		case isPool:
			if err := c.addVolumes(ctx, volumes, registry.VolumeKey(pool, "")); err != nil {
				return err
			}
		case isSchedule:
			// A volume that has no copy yet gets its schedule with the first.
			if id, err := uuid.Parse(id); err == nil && c.keys[id] != "" {
				volumes[c.keys[id]] = true
			}
		case strings.HasPrefix(key, registry.VolumePrefix):
			volumes[key] = true
		}
	}
	return c.copyVolumes(ctx, volumes)
}

// unrepairedCopy stands before a namespace among the changed keys.
const unrepairedCopy = "unrepaired copy of "

// notRepaired notes an object that the store could not repair, if it is a copy; it is
// called again as long as that is so. From any goroutine.
func (c *recordCopier) notRepaired(namespace, object string) {
	if strings.HasPrefix(object, copyPrefix) {
		c.changed.add(unrepairedCopy + namespace)
	}
}

// copyVolumes looks at volumes one after the other. What the store does not take is
// noted in behind; an error is the registry's.
func (c *recordCopier) copyVolumes(ctx context.Context, keys map[string]bool) error {
	pools := map[string]*poolRecords{}
	for _, key := range slices.Sorted(maps.Keys(keys)) {
		e, err := registry.Load[registry.Volume](ctx, c.reg, key)
		if errors.Is(err, registry.ErrNotFound) {
			c.forget(key)
			continue
		}
		if err != nil {
			return err
		}
		r := &e.Record
		if pools[r.Pool] == nil {
			if pools[r.Pool], err = c.loadPool(ctx, r.Pool); err != nil {
				return err
			}
		}
		pool := pools[r.Pool]
		if !pool.known || !c.copied(r) {
			delete(c.behind, key)
			continue
		}
		own, err := c.loadSchedule(ctx, registry.VolumeScheduleKey(r.ID))
		if err != nil {
			return err
		}
		want := &recordCopy{Version: copyVersion, Volume: *r, Pool: pool.record, PoolRevision: pool.revision, Schedule: own, PoolSchedule: pool.schedule}
		c.behind[key] = true
		err = c.update(ctx, key, want)
		switch {
		case err == nil, errors.Is(err, driver.ErrStaleEpoch): // not ours any more: a change follows
			delete(c.behind, key)
		case ctx.Err() != nil:
			return ctx.Err()
		default:
			c.log.Info().Err(err).Str("volume", r.FullName()).Msg("the copy of a volume's record was not stored; tried again")
		}
	}
	return nil
}

// poolRecords is what a volume's copy says of its pool.
type poolRecords struct {
	known    bool
	record   registry.Pool
	revision int64
	schedule *registry.Schedule
}

func (c *recordCopier) loadPool(ctx context.Context, name string) (*poolRecords, error) {
	e, err := registry.Load[registry.Pool](ctx, c.reg, registry.PoolKey(name))
	if errors.Is(err, registry.ErrNotFound) {
		return new(poolRecords), nil
	}
	if err != nil {
		return nil, err
	}
	s, err := c.loadSchedule(ctx, registry.PoolScheduleKey(name))
	return &poolRecords{known: true, record: e.Record, revision: e.Revision, schedule: s}, err
}

// loadSchedule returns nil if there is none.
func (c *recordCopier) loadSchedule(ctx context.Context, key string) (*registry.Schedule, error) {
	e, err := registry.Load[registry.Schedule](ctx, c.reg, key)
	switch {
	case errors.Is(err, registry.ErrNotFound):
		return nil, nil
	case err != nil:
		return nil, err
	}
	return &e.Record, nil
}

// copied says whether a record is one to be copied now. What is under way is not: a
// copy of it that was never replaced would have a volume deleted, or rolled back,
// that a registry is rebuilt for.
func (c *recordCopier) copied(r *registry.Volume) bool {
	return r.Owner == c.node && r.State == registry.StateReady && r.Incomplete == nil && r.RollingBack == nil
}

// update puts a copy, unless it is there, and deletes earlier ones.
func (c *recordCopier) update(ctx context.Context, key string, want *recordCopy) error {
	r := &want.Volume
	b, err := json.Marshal(want)
	if err != nil {
		return err
	}
	now := copiedRecord{id: r.ID, sum: sha256.Sum256(b)}
	if c.written[key] == now {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, copyTimeout)
	defer cancel()
	s, ns := c.storeOf(r), r.ID.String()
	numbers, err := copies(ctx, s, ns)
	if err != nil {
		return err
	}
	last := uint64(0)
	if n := len(numbers); n > 0 {
		last = numbers[n-1]
		if old, _, err := readCopy(ctx, s, ns, last); err == nil && !c.written[key].anew && bytes.Equal(old, b) {
			numbers = numbers[:n-1]
			b = nil
		}
	}
	if b != nil {
		if err := s.Put(ctx, ns, copyName(last+1), r.Epoch, driver.Object{Data: bytes.NewReader(b), Size: int64(len(b))}); err != nil {
			return err
		}
	}
	for _, n := range numbers {
		if err := s.Delete(ctx, ns, copyName(n), r.Epoch); err != nil {
			return err
		}
	}
	c.note(key, now)
	return nil
}

func (c *recordCopier) note(key string, now copiedRecord) {
	c.forget(key)
	c.written[key], c.keys[now.id] = now, key
}

// forget drops what is known of a volume's key. The volume may have another by now.
func (c *recordCopier) forget(key string) {
	if old, ok := c.written[key]; ok && c.keys[old.id] == key {
		delete(c.keys, old.id)
	}
	delete(c.written, key)
	delete(c.behind, key)
}

// copyRecords keeps copies of the volumes' records in the object store until the
// function that it returns is called; that one sees to what changed last.
func (h *Host) copyRecords(ctx context.Context) (stop func() error) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	c := newRecordCopier(h.reg, h.id.ID, h.volumes.storeOf, h.log)
	notRepaired := func(namespace, object string) {
		c.notRepaired(namespace, object)
		h.engine.LostInStore(namespace, object)
	}
	h.objects.notRepaired.Store(&notRepaired)
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.run(ctx)
	}()
	return func() error {
		cancel()
		<-done
		patient, cancel := h.patience(context.Background())
		defer cancel()
		bounded, end := context.WithTimeout(patient, copyAtStop)
		defer end()
		if err := c.copyAll(bounded); err != nil || len(c.behind) > 0 {
			h.log.Warn().Err(err).Msg("copies of the volumes' records are behind; the next start sees to them")
		}
		return nil
	}
}
