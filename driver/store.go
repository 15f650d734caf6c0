package driver

import (
	"context"
	"errors"
	"io"
)

// Store is where closed SCOs and map checkpoints live: the SCO side of the
// driver. Names are flat within a namespace (one namespace per volume, named by
// the volume's UUID). Implementations pass storetest. Safe from any goroutine.
//
// Every change carries the owner's epoch. A namespace remembers the largest
// epoch that Fence named; a Put or Delete with a smaller one is refused with
// ErrStaleEpoch and has no effect, however late it arrives.
type Store interface {
	// CreateNamespace makes a namespace; no error if it exists.
	CreateNamespace(ctx context.Context, ns string) error
	// DeleteNamespace removes a namespace with all its objects; no error if
	// there is none.
	DeleteNamespace(ctx context.Context, ns string) error
	// Namespaces lists all namespaces, sorted.
	Namespaces(ctx context.Context) ([]string, error)
	// Fence durably raises the namespace's epoch; ErrStaleEpoch if it is larger
	// already. Equal is fine.
	Fence(ctx context.Context, ns string, epoch uint64) error
	// Put stores an object whole or not at all; it is durable on return.
	// Repeating a Put with the same contents is safe; an object is never
	// overwritten with others (ErrExists).
	Put(ctx context.Context, ns, name string, epoch uint64, obj Object) error
	// ReadAt fills p from the object's offset. ErrNoObject if there is none;
	// io.ErrUnexpectedEOF if it ends before; ErrLost if it can't be read any more.
	// Not verified: the driver checks its own cluster checksums.
	ReadAt(ctx context.Context, ns, name string, p []byte, off int64) error
	// Size returns an object's size in bytes, or ErrNoObject.
	Size(ctx context.Context, ns, name string) (int64, error)
	// Delete removes an object; no error if there is none.
	Delete(ctx context.Context, ns, name string, epoch uint64) error
	// List returns the names with the prefix, sorted.
	List(ctx context.Context, ns, prefix string) ([]string, error)
}

// Object is what Put stores: Size bytes from Data. A store on the same file
// system as LocalPath, if that is set, may link that file instead of copying;
// the driver never changes a file after it has put it.
type Object struct {
	Data      io.ReaderAt
	Size      int64
	LocalPath string
	// Sums, if set, returns the CRC32C of each block.ClusterSize bytes, those of guests'
	// data from when it was written: a store that links the file need not read it.
	Sums func() ([]uint32, error)
}

// DiskSharer is a Store that may have a part of what it is given on the file system of the
// local disk. The engine then takes a write only if the disk also has the room for that:
// otherwise a disk that an outage of the store has filled could not be drained.
type DiskSharer interface {
	// DiskBytes returns how many bytes of the local disk an object of size bytes takes at
	// most, beside the file that it is put from: 0 if it lies elsewhere, or shares that
	// file. Housekeeping asks now and then, with a deadline.
	DiskBytes(ctx context.Context, ns string, size int64) (int64, error)
}

// LostPutter is a Store that can lose objects and be given them again.
type LostPutter interface {
	// PutLost stores an object anew for whose reads ErrLost is the answer, whole or not at
	// all, with the contents that it had: until it is durable readers get what they got.
	// It does nothing if the object can be read. ErrLost, with the reason, if it is lost but
	// can't be stored now; ErrNoObject if there is none; ErrExists if what can be read of it
	// differs from obj; ErrStaleEpoch as for Put.
	PutLost(ctx context.Context, ns, name string, epoch uint64, obj Object) error
}

// Errors of a Store.
var (
	ErrStaleEpoch = errors.New("stale epoch: another owner has taken the volume")
	ErrNoObject   = errors.New("no such object")
	ErrExists     = errors.New("object exists with other contents")
	// ErrLost: the store has too little of the object left, and asking again does not
	// change that. Somebody may still bring back what is missing.
	ErrLost = errors.New("the store has lost data")
)
