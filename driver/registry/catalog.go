package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/google/uuid"

	"scoria/driver/limit"
)

// # Keys and records
//
//	pool/POOL            Pool
//	volume/POOL/VOLUME   Volume
//	node/ID              Node
//	snapshot/UUID/NAME   Snapshot; UUID is the volume's, so that a new name of it changes nothing
//	schedule/pool/POOL   Schedule of the volumes of a pool
//	schedule/volume/UUID Schedule of one volume, instead of its pool's
//	schedule-run/UUID    ScheduleRun of a volume
//
// Records are JSON with a version, so that a dump is readable and etcd's tools
// work on it. A record of a later version is refused, not guessed at. Version 2
// added snapshots, schedules, to volumes what begins with Template, and limits;
// version 1 is read as having none of it. Version 3 added Adopted to snapshots.

// RecordVersion is the version of all records that this program writes.
const RecordVersion = 3

// State is how far a volume's creation or deletion has come.
type State string

// A volume is made in the order creating, ready and goes in the order deleting,
// no record; whoever finds one that is neither finishes it.
const (
	StateCreating State = "creating" // its directories and namespace may be missing
	StateReady    State = "ready"
	StateDeleting State = "deleting" // its directories and namespace may be gone
)

// Pool is a named set of defaults for volumes.
type Pool struct {
	Version   int       `json:"version"`
	Name      string    `json:"name"`
	BlockSize uint32    `json:"block_size"` // logical block in bytes, 512 or 4096
	SCOSize   int64     `json:"sco_size"`   // data bytes of a SCO
	Created   time.Time `json:"created"`

	// Preset of the object store in which new volumes are kept; empty: in the directory
	// store. It never changes.
	Preset string `json:"preset,omitempty"`

	Limits *limit.Settings `json:"limits,omitempty"` // of each volume that sets none itself
}

// Volume is a virtual disk.
type Volume struct {
	Version   int       `json:"version"`
	ID        uuid.UUID `json:"id"`
	Pool      string    `json:"pool"`
	Name      string    `json:"name"`
	Size      uint64    `json:"size"`       // bytes; grows before the engine and the guests learn of it
	BlockSize uint32    `json:"block_size"` // logical block in bytes, 512 or 4096
	SCOSize   int64     `json:"sco_size"`   // data bytes of a SCO
	Serial    string    `json:"serial"`     // at most 20 bytes, what the guest sees
	ReadOnly  bool      `json:"read_only"`
	Created   time.Time `json:"created"`
	State     State     `json:"state"`
	Owner     string    `json:"owner"` // node ID; empty: nobody yet
	Epoch     uint64    `json:"epoch"` // grows by one at each change of owner

	// Preset of the object store that the volume was made with; empty: it is in the
	// directory store. It never changes.
	Preset string `json:"preset,omitempty"`
	// Template: front ends may not write to it, only clone it.
	Template bool `json:"template,omitempty"`
	// Parent is what the volume was cloned from; nil: nothing, or it was flattened.
	Parent *Parent `json:"parent,omitempty"`
	// Ancestors are all volumes that it may still read, oldest first: the parent's
	// ancestors, then the parent. They outlive Parent while snapshots of the volume
	// need them.
	Ancestors []Ancestor `json:"ancestors,omitempty"`
	// RollingBack is the snapshot of an unfinished rollback; whoever opens the
	// volume carries it out again, and no guest gets it before.
	RollingBack *uuid.UUID `json:"rolling_back,omitempty"`
	// Incomplete: its contents are being brought in; no guest gets it.
	Incomplete *Incomplete `json:"incomplete,omitempty"`

	Limits *limit.Settings `json:"limits,omitempty"` // what it does not set, its pool does
}

// FullName returns POOL/VOLUME.
func (v *Volume) FullName() string { return v.Pool + "/" + v.Name }

// Node is a host's daemon.
type Node struct {
	Version  int       `json:"version"`
	ID       string    `json:"id"`
	Host     string    `json:"host"`
	Created  time.Time `json:"created"`
	Attached []string  `json:"attached"` // volumes that front ends used lately; opened at the next start
}

// Parent says what a volume was cloned from.
type Parent struct {
	Volume   uuid.UUID `json:"volume"`
	Snapshot uuid.UUID `json:"snapshot"`
	Name     string    `json:"name"` // POOL/VOLUME@SNAPSHOT at that time, for people
}

// Ancestor is a volume that another one reads, and the snapshot that keeps for it
// what it reads.
type Ancestor struct {
	Volume   uuid.UUID `json:"volume"`
	Snapshot uuid.UUID `json:"snapshot"`
}

// What makes a volume incomplete.
const (
	IncompleteImport  = "import"
	IncompleteReceive = "receive"
)

// Incomplete is an unfinished import or receive. Without Resumable it is undone
// at the next start: a volume goes back to Base, or is deleted if that is nil.
type Incomplete struct {
	Kind      string    `json:"kind"`
	Base      uuid.UUID `json:"base,omitzero"`     // snapshot that the stream builds on
	Snapshot  uuid.UUID `json:"snapshot,omitzero"` // snapshot that the stream ends at
	Position  uint64    `json:"position"`          // all before this byte is received and durable
	Resumable bool      `json:"resumable"`
}

// Snapshot is a state of a volume that is kept. All but the name, State, Temporary
// and Adopted is as the engine gave it.
type Snapshot struct {
	Version    int               `json:"version"`
	ID         uuid.UUID         `json:"id"`
	Volume     uuid.UUID         `json:"volume"`
	Name       string            `json:"name"`
	Created    time.Time         `json:"created"`
	Metadata   map[string]string `json:"metadata,omitempty"`
	Size       uint64            `json:"size"`        // of the volume then, bytes
	SCO        uint64            `json:"sco"`         // last SCO of the log that it contains
	Sequence   uint64            `json:"sequence"`    // of its root; orders a volume's snapshots
	LastObject uint32            `json:"last_object"` // last page object that existed
	State      State             `json:"state"`
	Temporary  bool              `json:"temporary,omitempty"` // made for one operation; deleted at the next start
	Adopted    bool              `json:"adopted,omitempty"`   // found in the volume without a record, and not renamed since
}

// Schedule says when snapshots are made and which are kept (package schedule).
// Without rules none are made: a volume's says so against its pool's.
type Schedule struct {
	Version int       `json:"version"`
	Pool    string    `json:"pool,omitempty"`  // of a pool's
	Volume  uuid.UUID `json:"volume,omitzero"` // of a volume's
	Rules   []string  `json:"rules"`
	Zone    string    `json:"zone,omitempty"` // time zone; empty: the host's
	Since   time.Time `json:"since"`          // it was set; earlier slots don't count
}

// ScheduleRun is how far the slots of a volume's schedule have been dealt with.
type ScheduleRun struct {
	Version  int           `json:"version"`
	Volume   uuid.UUID     `json:"volume"`
	Since    time.Time     `json:"since"`              // of the schedule that Done is about
	Done     time.Time     `json:"done"`               // slots up to then are dealt with
	Made     string        `json:"made,omitempty"`     // name of the last snapshot made
	MadeAt   time.Time     `json:"made_at,omitzero"`   //
	Missed   []MissedSlots `json:"missed,omitempty"`   // the last time that any were
	MissedAt time.Time     `json:"missed_at,omitzero"` // and when that was found
}

// MissedSlots are snapshots that a rule wanted and that were not made.
type MissedSlots struct {
	Rule  string    `json:"rule"`
	Count int       `json:"count"`
	First time.Time `json:"first"`
	Last  time.Time `json:"last"`
}

// Errors of the catalog.
var (
	ErrNotFound = errors.New("not found")
	ErrExist    = errors.New("exists already")
)

// Prefixes under which the records lie.
const (
	PoolPrefix     = "pool/"
	VolumePrefix   = "volume/"
	NodePrefix     = "node/"
	SnapshotPrefix = "snapshot/"
	SchedulePrefix = "schedule/"
	RunPrefix      = "schedule-run/"
)

// PoolKey returns the key of a pool's record.
func PoolKey(name string) string { return PoolPrefix + name }

// VolumeKey returns the key of a volume's record.
func VolumeKey(pool, name string) string { return VolumePrefix + pool + "/" + name }

// NodeKey returns the key of a node's record.
func NodeKey(id string) string { return NodePrefix + id }

// SnapshotsOf returns the prefix of the records of a volume's snapshots.
func SnapshotsOf(volume uuid.UUID) string { return SnapshotPrefix + volume.String() + "/" }

// SnapshotKey returns the key of a snapshot's record.
func SnapshotKey(volume uuid.UUID, name string) string { return SnapshotsOf(volume) + name }

// PoolScheduleKey returns the key of the schedule of a pool's volumes.
func PoolScheduleKey(pool string) string { return SchedulePrefix + "pool/" + pool }

// VolumeScheduleKey returns the key of a volume's own schedule.
func VolumeScheduleKey(volume uuid.UUID) string { return SchedulePrefix + "volume/" + volume.String() }

// RunKey returns the key of how far a volume's schedule has come.
func RunKey(volume uuid.UUID) string { return RunPrefix + volume.String() }

var nameRE = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)

// DefaultPool is the pool of volumes that are named without one.
const DefaultPool = "default"

// CheckName validates the name of a pool, volume or snapshot; what says which
// ("pool", "volume", "snapshot") in the error.
func CheckName(what, name string) error {
	if nameRE.MatchString(name) {
		return nil
	}
	why := "has a character that is not allowed"
	switch {
	case name == "":
		why = "is empty"
	case len(name) > 63:
		why = fmt.Sprintf("has %d characters", len(name))
	case strings.Contains("._-", name[:1]):
		why = fmt.Sprintf("begins with %q", name[:1])
	case strings.ToLower(name) != name:
		why = "has capital letters"
	}
	return fmt.Errorf("%s name %q %s: must be 1 to 63 of a-z, 0-9, '.', '_' and '-', and begin with a letter or digit", what, name, why)
}

// SplitName splits [POOL/]VOLUME and validates both parts.
func SplitName(full string) (pool, name string, err error) {
	pool, name, found := strings.Cut(full, "/")
	if !found {
		pool, name = DefaultPool, full
	}
	if err := CheckName("pool", pool); err != nil {
		return "", "", err
	}
	if err := CheckName("volume", name); err != nil {
		return "", "", err
	}
	return pool, name, nil
}

// SplitSnapshot splits [POOL/]VOLUME@SNAPSHOT and validates all parts.
func SplitSnapshot(full string) (pool, volume, snapshot string, err error) {
	name, snapshot, found := strings.Cut(full, "@")
	if !found {
		return "", "", "", fmt.Errorf("snapshot %q: must be VOLUME@SNAPSHOT or POOL/VOLUME@SNAPSHOT", full)
	}
	if pool, volume, err = SplitName(name); err != nil {
		return "", "", "", err
	}
	return pool, volume, snapshot, CheckName("snapshot", snapshot)
}

// Record is what lies under the prefixes.
type Record interface {
	Pool | Volume | Node | Snapshot | Schedule | ScheduleRun
}

// Entry is a record with its revision, for compares.
type Entry[R Record] struct {
	Record   R
	Revision int64
}

// Load reads a record; ErrNotFound if there is none.
func Load[R Record](ctx context.Context, s Store, key string) (Entry[R], error) {
	kv, ok, err := s.Get(ctx, key)
	if err != nil {
		return Entry[R]{}, err
	}
	if !ok {
		return Entry[R]{}, fmt.Errorf("%s: %w", key, ErrNotFound)
	}
	return decode[R](kv)
}

// LoadAll reads all records under a prefix, ordered by key.
func LoadAll[R Record](ctx context.Context, s Store, prefix string) ([]Entry[R], error) {
	kvs, err := s.List(ctx, prefix)
	if err != nil {
		return nil, err
	}
	entries := make([]Entry[R], len(kvs))
	for i, kv := range kvs {
		if entries[i], err = decode[R](kv); err != nil {
			return nil, err
		}
	}
	return entries, nil
}

// Create writes a record that must not exist, else ErrExist.
func Create[R Record](ctx context.Context, s Store, key string, r R) (Entry[R], error) {
	e, err := Replace(ctx, s, key, Entry[R]{Record: r})
	if errors.Is(err, ErrConflict) {
		return e, fmt.Errorf("%s: %w", key, ErrExist)
	}
	return e, err
}

// Replace writes e.Record if the key is still at e.Revision (0: does not exist),
// else ErrConflict. It returns the entry with its new revision.
func Replace[R Record](ctx context.Context, s Store, key string, e Entry[R]) (Entry[R], error) {
	b, err := encode(e.Record)
	if err != nil {
		return e, fmt.Errorf("%s: %w", key, err)
	}
	rev, err := s.Commit(ctx, []Compare{{Key: key, Revision: e.Revision}}, []Write{{Key: key, Value: b}})
	if err != nil {
		return e, err
	}
	e.Revision = rev
	return e, nil
}

// Update changes a record with fn until no other change came between; fn may be
// called several times and may refuse. ErrNotFound if there is no record.
func Update[R Record](ctx context.Context, s Store, key string, fn func(*R) error) (Entry[R], error) {
	const attempts = 100
	for range attempts {
		e, err := Load[R](ctx, s, key)
		if err != nil {
			return e, err
		}
		if err := fn(&e.Record); err != nil {
			return e, err
		}
		e, err = Replace(ctx, s, key, e)
		if !errors.Is(err, ErrConflict) {
			return e, err
		}
	}
	return Entry[R]{}, fmt.Errorf("%s: %w %d times in a row", key, ErrConflict, attempts)
}

// Remove deletes a key if it is still at the revision, else ErrConflict.
func Remove(ctx context.Context, s Store, key string, revision int64) error {
	_, err := s.Commit(ctx, []Compare{{Key: key, Revision: revision}}, []Write{{Key: key}})
	return err
}

func encode[R Record](r R) ([]byte, error) {
	switch v := any(&r).(type) {
	case *Pool:
		v.Version = RecordVersion
	case *Volume:
		v.Version = RecordVersion
	case *Node:
		v.Version = RecordVersion
	case *Snapshot:
		v.Version = RecordVersion
	case *Schedule:
		v.Version = RecordVersion
	case *ScheduleRun:
		v.Version = RecordVersion
	}
	return json.Marshal(r)
}

func decode[R Record](kv KV) (Entry[R], error) {
	e := Entry[R]{Revision: kv.Revision}
	var head struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(kv.Value, &head); err != nil {
		return e, fmt.Errorf("record %s: %w", kv.Key, err)
	}
	if head.Version < 1 || head.Version > RecordVersion {
		return e, fmt.Errorf("record %s has version %d, this program knows %d: %w", kv.Key, head.Version, RecordVersion, ErrVersion)
	}
	d := json.NewDecoder(bytes.NewReader(kv.Value))
	d.DisallowUnknownFields()
	if err := d.Decode(&e.Record); err != nil {
		return e, fmt.Errorf("record %s: %w", kv.Key, err)
	}
	return e, nil
}
