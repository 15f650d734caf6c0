package host

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/rs/zerolog"

	"scoria/driver"
	"scoria/driver/registry"
)

// Beside the data of a volume, its store keeps a copy of what the registry says of the
// volume and its pool, for a registry that has to be rebuilt (P10) and for one that was
// put back from an older backup: only a whole volume gets a copy, so that nothing that
// has one is undone as unfinished (VolumeSet.finishedBefore). It is an
// object of the volume's namespace, JSON of recordCopy:
//
//	record-SSSSSSSSSSSSSSSS   S: 16 hexadecimal digits, more than those of earlier copies
//	{"version":1, "volume":{…}, "pool":{…}, "pool_revision":N, "schedule":{…}, "pool_schedule":{…}}
//
// Volume, pool and schedules are records as the registry has them. Objects never change,
// so a new copy is put before the earlier ones are deleted; of several the one with the
// largest number counts. A copy follows a change within a moment, or as soon as the
// store can be reached; no operation waits for it. Snapshots aren't in it: their roots
// say what they are.

const (
	copyPrefix  = "record-"
	copyVersion = 1
	// maxCopyBytes bounds what is read.
	maxCopyBytes = 1 << 20
)

// recordCopy is what the store knows of a volume's records.
type recordCopy struct {
	Version int             `json:"version"`
	Volume  registry.Volume `json:"volume"`
	Pool    registry.Pool   `json:"pool"`
	// PoolRevision is the registry's, of the pool's record: of several copies of it the
	// one with the largest is the latest.
	PoolRevision int64              `json:"pool_revision"`
	Schedule     *registry.Schedule `json:"schedule,omitempty"`      // the volume's own
	PoolSchedule *registry.Schedule `json:"pool_schedule,omitempty"` // its pool's
}

func copyName(n uint64) string { return fmt.Sprintf("%s%016x", copyPrefix, n) }

// copies lists the numbers of a namespace's copies, ascending.
func copies(ctx context.Context, s driver.Store, ns string) ([]uint64, error) {
	names, err := s.List(ctx, ns, copyPrefix)
	if err != nil {
		return nil, err
	}
	var numbers []uint64
	for _, name := range names {
		var n uint64
		if _, err := fmt.Sscanf(strings.TrimPrefix(name, copyPrefix), "%x", &n); err == nil && name == copyName(n) {
			numbers = append(numbers, n)
		}
	}
	slices.Sort(numbers)
	return numbers, nil
}

// readCopy reads a copy.
func readCopy(ctx context.Context, s driver.Store, ns string, number uint64) ([]byte, *recordCopy, error) {
	size, err := s.Size(ctx, ns, copyName(number))
	if err != nil {
		return nil, nil, err
	}
	if size > maxCopyBytes {
		return nil, nil, fmt.Errorf("%s of %s has %d bytes, want at most %d", copyName(number), ns, size, maxCopyBytes)
	}
	b := make([]byte, size)
	if err := s.ReadAt(ctx, ns, copyName(number), b, 0); err != nil {
		return nil, nil, err
	}
	c, err := decodeCopy(b)
	if err == nil && c.Volume.ID.String() != ns {
		err = fmt.Errorf("it is of volume %s", c.Volume.ID)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("%s of %s: %w", copyName(number), ns, err)
	}
	return b, c, nil
}

func decodeCopy(b []byte) (*recordCopy, error) {
	var head struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(b, &head); err != nil {
		return nil, err
	}
	if head.Version < 1 || head.Version > copyVersion {
		return nil, fmt.Errorf("version %d, this program knows %d: %w", head.Version, copyVersion, registry.ErrVersion)
	}
	c := new(recordCopy)
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(c); err != nil {
		return nil, err
	}
	for _, v := range []int{c.Volume.Version, c.Pool.Version} {
		if v < 1 || v > registry.RecordVersion {
			return nil, fmt.Errorf("has a record of version %d, this program knows %d: %w", v, registry.RecordVersion, registry.ErrVersion)
		}
	}
	if err := registry.CheckName("volume", c.Volume.Name); err != nil {
		return nil, err
	}
	if err := registry.CheckName("pool", c.Volume.Pool); err != nil {
		return nil, err
	}
	if c.Pool.Name != c.Volume.Pool {
		return nil, fmt.Errorf("is of a volume in pool %s and has the record of pool %q", c.Volume.Pool, c.Pool.Name)
	}
	return c, nil
}

// recordCopier keeps the copies of the records of all ready volumes in the object store
// up to date. It has one goroutine, run, which sleeps while nothing changes.
type recordCopier struct {
	reg     registry.Store
	node    string
	storeOf func(*registry.Volume) driver.Store
	log     zerolog.Logger
	written map[uuid.UUID][]byte // what the store has, as far as it is known
}

const (
	copySettle  = 100 * time.Millisecond // several changes become one copy
	copyRetry   = 10 * time.Second       // after the store could not take one
	copyTimeout = 30 * time.Second       // of one copy: the others don't wait longer for it
	copyAtStop  = 2 * time.Second        // that a stop waits for what changed last
)

// run copies until ctx ends.
func (c *recordCopier) run(ctx context.Context) {
	for ctx.Err() == nil {
		if err := c.follow(ctx); err != nil && ctx.Err() == nil {
			c.log.Warn().Err(err).Msg("copies of the volumes' records can't follow the registry; tried again")
			sleepFor(ctx, copyRetry)
		}
	}
}

// follow copies what there is, and what changes, until a watch ends.
func (c *recordCopier) follow(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	changed := make(chan struct{}, 1)
	for _, prefix := range []string{registry.VolumePrefix, registry.PoolPrefix, registry.SchedulePrefix} {
		events, err := c.reg.Watch(ctx, prefix, 0)
		if err != nil {
			return err
		}
		go func() {
			defer cancel() // a watch that ended
			for range events {
				select {
				case changed <- struct{}{}:
				default:
				}
			}
		}()
	}
	for {
		complete, err := c.pass(ctx)
		if err != nil {
			return err
		}
		var again <-chan time.Time
		if !complete {
			again = time.After(copyRetry)
		}
		select {
		case <-changed:
		case <-again:
		case <-ctx.Done():
			return nil
		}
		sleepFor(ctx, copySettle)
	}
}

func sleepFor(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// byKey loads all records under a prefix.
func byKey[R registry.Record](ctx context.Context, reg registry.Store, prefix string, key func(*R) string) (map[string]registry.Entry[R], error) {
	entries, err := registry.LoadAll[R](ctx, reg, prefix)
	all := make(map[string]registry.Entry[R], len(entries))
	for i := range entries {
		all[key(&entries[i].Record)] = entries[i]
	}
	return all, err
}

// pass writes all copies that are missing or old. complete says that none is left.
func (c *recordCopier) pass(ctx context.Context) (complete bool, err error) {
	volumes, err := registry.LoadAll[registry.Volume](ctx, c.reg, registry.VolumePrefix)
	if err != nil {
		return false, err
	}
	pools, err := byKey(ctx, c.reg, registry.PoolPrefix, func(p *registry.Pool) string { return p.Name })
	if err != nil {
		return false, err
	}
	schedules, err := byKey(ctx, c.reg, registry.SchedulePrefix, scheduleKey)
	if err != nil {
		return false, err
	}
	complete = true
	there := make(map[uuid.UUID]bool, len(volumes))
	for i := range volumes {
		r := &volumes[i].Record
		there[r.ID] = true
		pool, known := pools[r.Pool]
		if !known || !c.copied(r) {
			continue
		}
		want := &recordCopy{Version: copyVersion, Volume: *r, Pool: pool.Record, PoolRevision: pool.Revision}
		if s, ok := schedules[registry.VolumeScheduleKey(r.ID)]; ok {
			want.Schedule = &s.Record
		}
		if s, ok := schedules[registry.PoolScheduleKey(r.Pool)]; ok {
			want.PoolSchedule = &s.Record
		}
		err := c.update(ctx, want)
		switch {
		case err == nil:
		case ctx.Err() != nil:
			return false, ctx.Err()
		case errors.Is(err, driver.ErrStaleEpoch): // not ours any more: a change follows
		default:
			complete = false
			c.log.Info().Err(err).Str("volume", r.FullName()).Msg("the copy of a volume's record was not stored; tried again")
		}
	}
	for id := range c.written {
		if !there[id] {
			delete(c.written, id)
		}
	}
	return complete, nil
}

func scheduleKey(s *registry.Schedule) string {
	if s.Pool != "" {
		return registry.PoolScheduleKey(s.Pool)
	}
	return registry.VolumeScheduleKey(s.Volume)
}

// copied says whether a record is one to be copied now. What is under way is not: a
// copy of it that was never replaced would have a volume deleted, or rolled back,
// that a registry is rebuilt for.
func (c *recordCopier) copied(r *registry.Volume) bool {
	return r.Owner == c.node && r.State == registry.StateReady && r.Incomplete == nil && r.RollingBack == nil
}

// update puts a copy, unless it is there, and deletes earlier ones.
func (c *recordCopier) update(ctx context.Context, want *recordCopy) error {
	r := &want.Volume
	b, err := json.Marshal(want)
	if err != nil || bytes.Equal(c.written[r.ID], b) {
		return err
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
		if old, _, err := readCopy(ctx, s, ns, last); err == nil && bytes.Equal(old, b) {
			c.written[r.ID] = b
			return nil
		}
	}
	if err := s.Put(ctx, ns, copyName(last+1), r.Epoch, driver.Object{Data: bytes.NewReader(b), Size: int64(len(b))}); err != nil {
		return err
	}
	for _, n := range numbers {
		if err := s.Delete(ctx, ns, copyName(n), r.Epoch); err != nil {
			return err
		}
	}
	c.written[r.ID] = b
	return nil
}

// copyRecords keeps copies of the volumes' records in the object store until the
// function that it returns is called; that one sees to what changed last.
func (h *Host) copyRecords(ctx context.Context) (stop func() error) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	c := &recordCopier{reg: h.reg, node: h.id.ID, storeOf: h.volumes.storeOf, log: h.log, written: map[uuid.UUID][]byte{}}
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
		if complete, err := c.pass(bounded); err != nil || !complete {
			h.log.Warn().Err(err).Msg("copies of the volumes' records are behind; the next start sees to them")
		}
		return nil
	}
}
