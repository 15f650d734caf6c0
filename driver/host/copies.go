package host

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"

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

// RecordsCopied reports whether the object store has the records of all its volumes and of
// their pools as the registry has them at this moment, so that one which is rebuilt then has
// them, too. From any goroutine; a test asks before it has the registry lost.
func (h *Host) RecordsCopied(ctx context.Context) (bool, error) {
	kvs, err := h.reg.List(ctx, registry.VolumePrefix)
	if err != nil {
		return false, err
	}
	for _, kv := range kvs {
		v, err := registry.Load[registry.Volume](ctx, h.reg, kv.Key)
		if errors.Is(err, registry.ErrNotFound) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		if v.Record.Preset == "" {
			continue
		}
		p, err := registry.Load[registry.Pool](ctx, h.reg, registry.PoolKey(v.Record.Pool))
		if err != nil {
			return false, err
		}
		s, ns := h.volumes.storeOf(&v.Record), v.Record.ID.String()
		numbers, err := copies(ctx, s, ns)
		if err != nil || len(numbers) != 1 {
			return false, err
		}
		_, c, err := readCopy(ctx, s, ns, numbers[0])
		if errors.Is(err, driver.ErrNoObject) { // it was replaced meanwhile
			return false, nil
		}
		if err != nil || !reflect.DeepEqual(c.Volume, v.Record) || !reflect.DeepEqual(c.Pool, p.Record) {
			return false, err
		}
	}
	return true, nil
}

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
