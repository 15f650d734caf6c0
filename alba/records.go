package alba

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
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
