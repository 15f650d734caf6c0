package block

import "context"

// Differ is what a Device offers too that can tell what changed since a snapshot
// of it was taken. Front ends ask for it with a type assertion.
type Differ interface {
	// Since lists the names that Changes knows, oldest first: all snapshots of the
	// device, or, where the device itself is a snapshot, those before it.
	Since(ctx context.Context) ([]string, error)

	// Changes calls fn with consecutive extents that cover the part of [off,
	// off+length) inside the device until fn returns false. Mapped says that the
	// extent may differ from the snapshot; what is not Mapped is certainly the same.
	// It fails with an error that wraps ErrNotFound if there is no such snapshot. It
	// may block on map pages that have to be read.
	Changes(ctx context.Context, since string, off, length uint64, fn func(Extent) bool) error
}

// Releaser is what a Device implements that Opener.Open has opened for its caller
// alone, such as a snapshot. The caller calls Release once, when all its requests
// have ended, and does not use the device any more.
type Releaser interface{ Release() }

// Release releases a device that needs it. A nil device is ignored.
func Release(d Device) {
	if r, ok := d.(Releaser); ok {
		r.Release()
	}
}
