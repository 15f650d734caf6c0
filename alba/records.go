package alba

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// RecordVersion is the version of the JSON records that this program writes;
// rotatedVersion that of a namespace whose key was wrapped anew.
const (
	RecordVersion  = 1
	rotatedVersion = 2
)

// Errors of records and names.
var (
	// ErrRecord: a record in the registry or on a device can't be understood.
	ErrRecord = errors.New("damaged record")
	// ErrVersion: it was written by a newer program.
	ErrVersion = errors.New("written by a newer Scoria; install that version or a later one")
	// ErrName: a name is not one that the store accepts.
	ErrName = errors.New("invalid name")
)

// ID is 16 random bytes, hex as text.
type ID [16]byte

// NewID returns a random ID.
func NewID() ID {
	var id ID
	_, _ = rand.Read(id[:]) // never fails
	return id
}

func (id ID) String() string { return hex.EncodeToString(id[:]) }

// MarshalText implements encoding.TextMarshaler.
func (id ID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (id *ID) UnmarshalText(b []byte) error {
	v, err := ParseID(string(b))
	*id = v
	return err
}

// ParseID parses 32 lower-case hex digits.
func ParseID(s string) (ID, error) {
	var id ID
	if len(s) != 2*len(id) || strings.ToLower(s) != s {
		return id, fmt.Errorf("ID %q: must be %d lower-case hex digits: %w", s, 2*len(id), ErrName)
	}
	if _, err := hex.Decode(id[:], []byte(s)); err != nil {
		return ID{}, fmt.Errorf("ID %q: %v: %w", s, err, ErrName)
	}
	return id, nil
}

// Namespace is a set of objects: those of one volume.
type Namespace struct {
	Version  int       `json:"version"`
	Name     string    `json:"name"`
	ID       ID        `json:"id"`
	Epoch    uint64    `json:"epoch"` // smaller ones are refused
	Preset   string    `json:"preset"`
	Deleting bool      `json:"deleting,omitempty"` // its deletion has begun and will be finished
	Created  time.Time `json:"created"`
	// Key is the namespace's encryption key, wrapped by a master key; nil until an
	// encrypted object is stored.
	Key *WrappedKey `json:"key,omitempty"`
}

// DeviceState is what the operator wants of a device.
type DeviceState string

// States of a device.
const (
	DeviceActive   DeviceState = "active"
	DeviceDraining DeviceState = "draining" // takes nothing new; what it has is moved away
	DeviceRemoved  DeviceState = "removed"  // lost for good; what it had is rebuilt elsewhere
)

// Device is one ASD: one disk.
type Device struct {
	Version    int         `json:"version"`
	ID         string      `json:"id"`
	Address    string      `json:"address"` // what the daemon's dialer understands: host:port, or a path
	Host       string      `json:"host"`
	Rack       string      `json:"rack"`
	Datacentre string      `json:"datacentre"`
	State      DeviceState `json:"state"`
	Added      time.Time   `json:"added"`
}

// DomainName is the name of the failure domain that the device is in, unique over
// all domains of that kind.
func (d *Device) DomainName(kind Domain) string {
	switch kind {
	case DomainDatacentre:
		return d.Datacentre
	case DomainRack:
		return d.Datacentre + "/" + d.Rack
	case DomainHost:
		return d.Datacentre + "/" + d.Rack + "/" + d.Host
	default:
		return d.ID
	}
}

// Check validates a device's record.
func (d *Device) Check() error {
	if err := CheckDeviceID(d.ID); err != nil {
		return err
	}
	switch d.State {
	case DeviceActive, DeviceDraining, DeviceRemoved:
	default:
		return fmt.Errorf("device %s: state %q: must be active, draining or removed: %w", d.ID, d.State, ErrRecord)
	}
	for what, s := range map[string]string{"host": d.Host, "rack": d.Rack, "datacentre": d.Datacentre} {
		if len(s) > 255 || strings.ContainsAny(s, "/\x00\n") {
			return fmt.Errorf("device %s: %s %.40q: must have at most 255 bytes and no '/': %w", d.ID, what, s, ErrName)
		}
	}
	return nil
}

// Intent announces an upload, or a move of an object's shards.
type Intent struct {
	Version   int       `json:"version"`
	Namespace string    `json:"namespace"`
	Object    string    `json:"object"`
	Epoch     uint64    `json:"epoch"`
	Move      bool      `json:"move,omitempty"` // of shards of an object that is there
	Policy    Policy    `json:"policy"`
	Shards    []string  `json:"shards"` // devices that may get fragments; "" for none
	By        string    `json:"by"`     // the daemon
	Since     time.Time `json:"since"`
}

// History says which generations of the registry there were. A generation begins when
// a daemon opens the registry, and at the latest after MaxPosition changes.
type History struct {
	Version int         `json:"version"`
	Starts  []Beginning `json:"starts"` // ascending, at most MaxBeginnings: the latest
	// Read has the positions that devices were at when the registry was rebuilt from
	// what they hold: it knows all that they were told before.
	Read map[string]Position `json:"read,omitempty"`
}

// Beginning is where a generation of the registry begins.
type Beginning struct {
	Generation uint64 `json:"generation"`
	// Revision of the registry is that of the generation's first change, the one that
	// recorded it. In the record of that change it is 0.
	Revision int64 `json:"revision"`
}

// MaxBeginnings bounds History.Starts.
const MaxBeginnings = 1024

// Position is how far a registry is: its generation, and how many changes it is behind
// that one's beginning in the low 22 bits. Devices keep the latest that they were told
// (PositionName). A registry that was put back from an older backup does not know
// it: either the generation began after the backup was taken, or it ended there before
// that change.
type Position uint64

const positionBits = 22

// MaxPosition is how many changes behind its beginning a generation may be.
const MaxPosition = 1<<positionBits - 1

// Generation of a position.
func (p Position) Generation() uint64 { return uint64(p) >> positionBits }

func (p Position) String() string {
	return fmt.Sprintf("%d.%d", p.Generation(), uint64(p)&MaxPosition)
}

// NextGeneration returns a number for a generation that begins now and is larger than
// those before: units of 16 seconds since 2020 and 14 random bits, so that those of a
// registry and of one that was put back from its backup are different ones.
func (h *History) NextGeneration(now time.Time) uint64 {
	const randomBits = 14
	var b [2]byte
	_, _ = rand.Read(b[:]) // never fails
	random := (uint64(b[0])<<8 | uint64(b[1])) & (1<<randomBits - 1)
	least := uint64(max(0, now.Unix()-1_577_836_800)) / 16 << randomBits
	if n := len(h.Starts); n > 0 {
		least = max(least, h.Starts[n-1].Generation+1)
	}
	for _, p := range h.Read {
		least = max(least, p.Generation()+1)
	}
	return min(least+random, 1<<(64-positionBits)-1)
}

// DecodeHistory parses the value of HistoryKey; of none it is empty.
func DecodeHistory(kv KV) (History, error) {
	if kv.Revision == 0 {
		return History{}, nil
	}
	h, err := Decode[History](kv.Value)
	if n := len(h.Starts); err == nil && n > 0 {
		h.Starts[n-1].Revision = kv.Revision
	}
	if err != nil {
		err = fmt.Errorf("%s: %w", kv.Key, err)
	}
	return h, err
}

// Begin appends a generation. It takes the oldest away if there are too many.
func (h *History) Begin(generation uint64) {
	h.Starts = append(h.Starts, Beginning{Generation: generation})
	if n := len(h.Starts); n > MaxBeginnings {
		h.Starts = slices.Delete(h.Starts, 0, n-MaxBeginnings)
	}
}

// At returns the position of a revision, or that of the last generation's beginning if it
// is later; ok is false if that one is too long, or there is none.
func (h *History) At(revision int64) (p Position, ok bool) {
	n := len(h.Starts)
	if n == 0 {
		return 0, false
	}
	b := h.Starts[n-1]
	if revision-b.Revision > MaxPosition {
		return 0, false
	}
	return Position(b.Generation<<positionBits | uint64(max(0, revision-b.Revision))), true
}

// Knows says whether a registry with this history, which is at the revision, has all
// that the device was told when it was told the position.
func (h *History) Knows(device string, p Position, revision int64) bool {
	if p <= h.Read[device] {
		return true // also of a device that was never told anything
	}
	for i, b := range h.Starts {
		if b.Generation != p.Generation() {
			continue
		}
		end := revision
		if i+1 < len(h.Starts) {
			end = h.Starts[i+1].Revision - 1
		}
		return b.Revision+int64(uint64(p)&MaxPosition) <= end
	}
	// Of one so old that the history does not reach back to it nothing can be said.
	return len(h.Starts) == MaxBeginnings && p.Generation() < h.Starts[0].Generation
}

// Record is what is kept as JSON in the registry and on devices.
type Record interface {
	Preset | Namespace | Device | Intent | History
}

// Encode returns a record's bytes.
func Encode[R Record](r R) []byte {
	switch v := any(&r).(type) {
	case *Preset:
		v.Version = RecordVersion
	case *Namespace:
		v.Version = RecordVersion
		if v.Key != nil && v.Key.Rotations > 0 {
			v.Version = rotatedVersion
		}
	case *Device:
		v.Version = RecordVersion
	case *Intent:
		v.Version = RecordVersion
	case *History:
		v.Version = RecordVersion
	}
	b, err := json.Marshal(r)
	if err != nil {
		panic(fmt.Sprintf("alba: record can't be encoded: %v", err)) // only of a value out of its range
	}
	return b
}

// Decode parses a record and refuses those of later versions and unknown fields.
func Decode[R Record](b []byte) (R, error) {
	var r R
	var head struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(b, &head); err != nil {
		return r, fmt.Errorf("%w: %v", ErrRecord, err)
	}
	known := RecordVersion
	if _, ok := any(r).(Namespace); ok {
		known = rotatedVersion
	}
	if head.Version < 1 || head.Version > known {
		return r, fmt.Errorf("record of version %d, this program knows %d: %w", head.Version, known, ErrVersion)
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil {
		return r, fmt.Errorf("%w: %v", ErrRecord, err)
	}
	return r, nil
}

// Prefixes in the registry.
const (
	Prefix          = "alba/"
	PresetPrefix    = Prefix + "preset/"
	DevicePrefix    = Prefix + "asd/"
	NamespacePrefix = Prefix + "namespace/"
	ObjectPrefix    = Prefix + "object/"
	IntentPrefix    = Prefix + "intent/"
	TrashPrefix     = Prefix + "trash/"
	JobPrefix       = Prefix + "job/"
	RemovedPrefix   = Prefix + "removed/"

	// ClusterKey holds an ID in hex that all devices of the registry know.
	ClusterKey = Prefix + "cluster"
	// HistoryKey holds the History.
	HistoryKey = Prefix + "history"
)

// PresetKey is where a preset is in the registry.
func PresetKey(name string) string { return PresetPrefix + name }

// DeviceKey is where a device is in the registry.
func DeviceKey(id string) string { return DevicePrefix + id }

// RemovedKey is where it is remembered that a device was removed and that nothing
// refers to it any more: its last Device record.
func RemovedKey(id string) string { return RemovedPrefix + id }

// NamespaceKey is where a namespace is in the registry.
func NamespaceKey(name string) string { return NamespacePrefix + name }

// ObjectKey is where an object's manifest is in the registry; with object "" the
// prefix of all of the namespace.
func ObjectKey(ns ID, object string) string { return ObjectPrefix + ns.String() + "/" + object }

// IntentKey is where an intent is in the registry.
func IntentKey(ns, upload ID) string { return IntentPrefix + ns.String() + "/" + upload.String() }

// TrashKey is where a deleted object's manifest is in the registry.
func TrashKey(ns, upload ID) string { return TrashPrefix + ns.String() + "/" + upload.String() }

// SplitKey returns the two IDs of an intent's or trash record's key.
func SplitKey(key, prefix string) (ns, upload ID, err error) {
	a, b, _ := strings.Cut(strings.TrimPrefix(key, prefix), "/")
	if ns, err = ParseID(a); err != nil {
		return ns, upload, err
	}
	upload, err = ParseID(b)
	return ns, upload, err
}

// Prefixes on a device.
const (
	FragmentPrefix      = "f/"
	ShardPrefix         = "m/"
	AttemptPrefix       = "a/"
	NamespaceCopyPrefix = "n/"
	TombstonePrefix     = "t/"
	PresetCopyPrefix    = "p/"
	RemovedCopyPrefix   = "x/"

	StatedPrefix = "~device/" // of names of epochs

	// ClusterCopyKey holds the ID of the cluster that the device belongs to. What a
	// device of another cluster holds is not this registry's to judge.
	ClusterCopyKey = "c"
)

// CopyName is under which name a device keeps CopyOrder of the copy of a namespace that it
// has, as if it were a namespace's epoch: so an older copy never replaces a later one.
func CopyName(ns ID) string { return "~copy/" + ns.String() }

// CopyOrder orders copies of a namespace's record: of two the later one has the larger
// epoch, and with the same, a key that was wrapped more often.
func (n *Namespace) CopyOrder() uint64 {
	const keyBits = 20
	wrapped := uint64(0)
	if n.Key != nil {
		wrapped = 1 + uint64(n.Key.Rotations)
	}
	return min(n.Epoch, 1<<(64-keyBits)-1)<<keyBits | min(wrapped, 1<<keyBits-1)
}

// RemovedCopyKey is where a device remembers that another one was removed.
func RemovedCopyKey(device string) string { return RemovedCopyPrefix + device }

// StatedName is under which name a device keeps the Position at which it was told last
// whether another one was removed, as if it were a namespace's epoch.
func StatedName(device string) string { return StatedPrefix + device }

// PositionName is under which name a device keeps the position of the registry that it
// was told last, as if it were a namespace's epoch: so it never goes back.
const PositionName = "~registry"

const hexDigits = "0123456789abcdef"

// FragmentKey is where a fragment is on its device.
func FragmentKey(ns, upload ID, shard, chunk int) string {
	b := make([]byte, 0, 2+33+33+3+8)
	b = append(b, FragmentPrefix...)
	b = append(hex.AppendEncode(b, ns[:]), '/')
	b = append(hex.AppendEncode(b, upload[:]), '/')
	b = append(b, hexDigits[shard>>4&15], hexDigits[shard&15], '/')
	for s := 28; s >= 0; s -= 4 {
		b = append(b, hexDigits[chunk>>s&15])
	}
	return string(b)
}

// ShardKey is where the manifest of a shard is on its device.
func ShardKey(ns, upload ID, shard int) string {
	return ShardPrefix + ns.String() + "/" + upload.String() + "/" + fmt.Sprintf("%02x", shard)
}

// AttemptKey is where a device has the ID of the last attempt to move or mend a shard
// that it was to get; none for a shard that is where its upload put it.
func AttemptKey(ns, upload ID, shard int) string {
	return AttemptPrefix + ShardKey(ns, upload, shard)[len(ShardPrefix):]
}

// NamespaceCopyKey is where a namespace's copy is on a device.
func NamespaceCopyKey(ns ID) string { return NamespaceCopyPrefix + ns.String() }

// TombstoneKey is where a deletion is remembered on a device.
func TombstoneKey(ns, upload ID) string {
	return TombstonePrefix + ns.String() + "/" + upload.String()
}

// PresetCopyKey is where a preset's copy is on a device.
func PresetCopyKey(name string) string { return PresetCopyPrefix + name }

// ParseShardKey parses what FragmentKey (chunk ≥ 0), ShardKey and AttemptKey (chunk -1)
// made.
func ParseShardKey(key string) (ns, upload ID, shard, chunk int, err error) {
	bad := func() (ID, ID, int, int, error) {
		return ID{}, ID{}, 0, 0, fmt.Errorf("key %.120q: not a fragment's or shard's: %w", key, ErrName)
	}
	parts := strings.Split(key, "/")
	fragment := len(parts) == 5 && parts[0] == "f"
	if !fragment && !(len(parts) == 4 && (parts[0] == "m" || parts[0] == "a")) || len(parts[3]) != 2 {
		return bad()
	}
	if ns, err = ParseID(parts[1]); err != nil {
		return bad()
	}
	if upload, err = ParseID(parts[2]); err != nil {
		return bad()
	}
	n, err := strconv.ParseUint(parts[3], 16, 8)
	if err != nil {
		return bad()
	}
	if !fragment {
		return ns, upload, int(n), -1, nil
	}
	c, err := strconv.ParseUint(parts[4], 16, 31)
	if err != nil || len(parts[4]) != 8 {
		return bad()
	}
	return ns, upload, int(n), int(c), nil
}

// MaxNameBytes bounds the names of namespaces and objects.
const MaxNameBytes = 200

// CheckName accepts what is a plain file name everywhere; what ("object") is for
// the error.
func CheckName(what, name string) error {
	switch {
	case name == "" || len(name) > MaxNameBytes:
		return fmt.Errorf("%s name %.40q has %d bytes, must have 1 to %d: %w", what, name, len(name), MaxNameBytes, ErrName)
	case name[0] == '.':
		return fmt.Errorf("%s name %q must not begin with a dot: %w", what, name, ErrName)
	}
	for i := range len(name) {
		c := name[i]
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '.' || c == '-' || c == '_' {
			continue
		}
		return fmt.Errorf("%s name %q: byte %#02x at %d; letters, digits, '.', '-' and '_' are allowed: %w", what, name, c, i, ErrName)
	}
	return nil
}

// CheckDeviceID validates a device's ID.
func CheckDeviceID(id string) error {
	if len(id) > 64 {
		return fmt.Errorf("device ID %.70q has %d bytes, must have 1 to 64: %w", id, len(id), ErrName)
	}
	return CheckName("device", id)
}

func checkPresetName(name string) error {
	if len(name) > 63 {
		return fmt.Errorf("preset name has %d bytes, must have 1 to 63: %w", len(name), ErrName)
	}
	return CheckName("preset", name)
}
