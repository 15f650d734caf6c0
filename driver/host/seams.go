package host

import (
	"context"
	"time"

	"github.com/google/uuid"

	"scoria/driver"
	"scoria/driver/block"
)

// Engine is what the daemon asks of driver.Engine.
type Engine interface {
	CreateVolume(ctx context.Context, c driver.VolumeConfig) error
	OpenVolume(ctx context.Context, c driver.VolumeConfig) (Volume, error)
	// CreateClone makes a volume that begins as a snapshot of an open one.
	CreateClone(ctx context.Context, c driver.VolumeConfig, parent Volume, snapshot uuid.UUID) error
	// OpenSnapshot opens a snapshot of an open volume, which it keeps until closed.
	OpenSnapshot(ctx context.Context, v Volume, snapshot uuid.UUID) (View, error)
	DeleteVolume(ctx context.Context, c driver.VolumeConfig) error
	CheckVolume(ctx context.Context, c driver.VolumeConfig, progress func(done, total int64)) (driver.CheckReport, error)
	// Adopted says whether the write buffer of an earlier daemon was found.
	Adopted() bool
	// Pending lists the volumes that have data there and are not open.
	Pending() []uuid.UUID
	Close(ctx context.Context) error
	// GuestWaits is what guests of all open volumes wait for.
	GuestWaits() driver.GuestWaits
	// LostInStore tells an open volume that the store can't repair one of its objects.
	LostInStore(namespace, object string)
	// Drained says, after Close, that the write buffer holds nothing any more.
	Drained() bool
}

// Volume is what the daemon asks of driver.Volume.
type Volume interface {
	block.Device
	// Holder returns who claims the volume.
	Holder() (block.Claimant, bool)
	Stats() driver.Stats
	Resize(ctx context.Context, size uint64) error
	Check(ctx context.Context, progress func(done, total int64)) (driver.CheckReport, error)
	Close(ctx context.Context) error

	CreateSnapshot(ctx context.Context, id uuid.UUID, name string, metadata map[string]string) (driver.Snapshot, error)
	DeleteSnapshot(ctx context.Context, id uuid.UUID) error
	Snapshots() []driver.Snapshot
	SnapshotSpace(ctx context.Context) (map[uuid.UUID]uint64, error)
	Changes(ctx context.Context, since, upTo uuid.UUID, off, length uint64, fn func(block.Extent) bool) error
	Rollback(ctx context.Context, id uuid.UUID, force bool) error
	Shrink(ctx context.Context, size uint64, force bool) error
	Flatten(ctx context.Context, progress func(done, total uint64)) error
	Ancestors() []driver.Ancestor
}

// View is what the daemon asks of driver.View: a snapshot to read.
type View interface {
	block.Device
	Snapshot() driver.Snapshot
	Close() error
}

// FrontEnd is a way in for guests and tools. Safe from any goroutine.
type FrontEnd interface {
	// Add begins to serve a volume that is ready.
	Add(name string) error
	// Remove stops serving a volume and disconnects its users; it returns when
	// none of them touches the device any more. No error if it was not served.
	Remove(name string)
	// Users describes who is connected to a volume ("nbd pid 17"), for the
	// operator and to refuse its deletion.
	Users(name string) []string
	// LastDisconnect says why and when a user was last thrown out for a fault of
	// its own or the device's; empty if that never happened.
	LastDisconnect(name string) (reason string, when time.Time)
	// Close disconnects everybody after requests under way have ended, until ctx
	// does.
	Close(ctx context.Context) error
}
