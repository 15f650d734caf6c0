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
	DeleteVolume(ctx context.Context, c driver.VolumeConfig) error
	CheckVolume(ctx context.Context, c driver.VolumeConfig, progress func(done, total int64)) (driver.CheckReport, error)
	// Adopted says whether the write buffer of an earlier daemon was found.
	Adopted() bool
	// Pending lists the volumes that have data there and are not open.
	Pending() []uuid.UUID
	Close(ctx context.Context) error
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
