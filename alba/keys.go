package alba

import (
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
)

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

	StatedPrefix      = "~device/" // of names of epochs
	PresetOrderPrefix = "~preset/"

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

// PresetCopyName is under which name a device keeps the Position of the change that its copy
// of a preset is from, as if it were a namespace's epoch: so an older copy never replaces a
// later one. Of copies that were written before this name was, it has none.
func PresetCopyName(preset string) string { return PresetOrderPrefix + preset }

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
