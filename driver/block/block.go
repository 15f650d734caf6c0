// Package block is the seam between front ends (vhost, shm, nbd) and whatever
// serves a virtual disk. Front ends know only this package.
//
// # Contract of a Device
//
// Submit never blocks on a disk, a network or another request: a request that
// must wait is taken over and completed later, from another goroutine, in any
// order. A request that can be answered at once is answered before Submit
// returns. The steady-state paths of Submit do not allocate.
//
// Between Submit and completion the device owns the request and may read
// (writes) or fill (reads) the memory that its segments point to. The memory
// may be shared with a hostile peer: the device reads every byte of it at most
// once for data, survives a fault on it (the request then ends with ErrFault),
// and a front end must not unmap it before the request has ended.
//
// Requests that wait for room or for a backend that does not answer
// (back-pressure) end early with ErrCanceled when their owner calls Cancel; all
// others end by themselves in bounded time.
//
// Durability: a completed write survives the death of the daemon. A flush that
// completes makes every write that had completed before the flush was submitted
// survive the loss of power. A write or discard with FUA is durable by itself
// when it completes.
package block

import (
	"context"
	"errors"
	"fmt"
)

// ClusterSize is the unit, in bytes, in which devices map and checksum data.
// Requests that cover whole aligned clusters are the fast ones.
const ClusterSize = 4096

// SectorSize is the unit, in bytes, in which virtio-blk counts.
const SectorSize = 512

// MaxRequestBytes bounds the data of one read or write request. Front ends
// announce it (or less) to their clients and split or refuse what is larger.
const MaxRequestBytes = 32 << 20

// Op is the kind of a request.
type Op uint8

// The operations of a Device.
const (
	OpRead        Op = iota // fill Segments from [Offset, Offset+Length)
	OpWrite                 // store Segments at [Offset, Offset+Length)
	OpFlush                 // make what has completed durable; Offset and Length are ignored
	OpDiscard               // forget [Offset, Offset+Length); it reads as zeroes afterwards
	OpWriteZeroes           // make [Offset, Offset+Length) read as zeroes
)

// String returns the operation's name as metrics and logs show it.
func (o Op) String() string {
	switch o {
	case OpRead:
		return "read"
	case OpWrite:
		return "write"
	case OpFlush:
		return "flush"
	case OpDiscard:
		return "discard"
	case OpWriteZeroes:
		return "write_zeroes"
	}
	return fmt.Sprintf("op(%d)", uint8(o))
}

// Flags modify a request.
type Flags uint8

const (
	// FUA: the request completes only when its effect would survive a loss of power.
	FUA Flags = 1 << iota
	// NoUnmap: write-zeroes must keep the space provisioned. A log-structured
	// device has nothing to keep and may ignore it.
	NoUnmap
)

// Errors that end requests. Front ends map them to their protocol's codes;
// anything else is an I/O error.
var (
	// ErrRange: the request lies, in part or whole, behind the end of the device.
	ErrRange = errors.New("request behind the end of the volume")
	// ErrAlignment: offset or length is no multiple of the logical block size.
	ErrAlignment = errors.New("request not aligned to the logical block size")
	// ErrReadOnly: the request would change a read-only device.
	ErrReadOnly = errors.New("volume is read-only")
	// ErrFault: memory that a segment points to is gone (a peer shrank its
	// memfd). The front end disconnects the peer.
	ErrFault = errors.New("request memory is not accessible")
	// ErrCanceled: the request waited for room or a backend, and its owner gave up.
	ErrCanceled = errors.New("request canceled")
	// ErrClosed: the device was closed or its ownership moved away.
	ErrClosed = errors.New("volume is closed")
	// ErrCorrupt: stored data fails its checksum and can't be repaired.
	ErrCorrupt = errors.New("stored data fails its checksum")
	// ErrFailed: an earlier failure of the local disk forbids the answer
	// (for example flushes after a failed sync).
	ErrFailed = errors.New("volume has failed")
)

// Request is one operation. Front ends embed or pool Requests and reuse them;
// a Device keeps no reference once a request has ended.
type Request struct {
	Op       Op
	Flags    Flags
	Offset   uint64   // bytes
	Length   uint64   // bytes; for reads and writes the sum of the segments' lengths
	Segments [][]byte // data of reads and writes, in order

	// Owner tags the request for Cancel: the front-end session it belongs to.
	Owner any

	// Complete is called exactly once, from any goroutine, when a request that
	// Submit took over has ended; never from within Submit and never for a
	// request that Submit answered itself. It must not block.
	Complete func(*Request)

	// Err is the outcome, valid once the request has ended; nil is success.
	Err error

	// Ended is set by the device before Submit returns if the request was
	// answered at once. It is not touched afterwards.
	Ended bool
}

// Info describes a device as guests see it.
type Info struct {
	Name             string // POOL/VOLUME
	Serial           string // at most 20 bytes, what GET_ID answers
	Size             uint64 // bytes, a multiple of LogicalBlock
	LogicalBlock     uint32 // bytes: 512 or 4096
	PhysicalBlock    uint32 // bytes: 4096
	ReadOnly         bool
	MaxDiscard       uint64 // bytes of one discard or write-zeroes request; 0 means no limit
	DiscardAlignment uint32 // bytes
}

// Extent is a run of a device in one state, for BlockStatus.
type Extent struct {
	Offset, Length uint64 // bytes
	Mapped         bool   // false: reads as zeroes and occupies nothing
}

// Device is a virtual disk.
type Device interface {
	// Info returns the current description. Size grows under a live resize.
	// Safe from any goroutine.
	Info() Info

	// Submit starts the requests, in order. See the package doc. Safe from any
	// goroutine; several may submit at once.
	Submit(batch []*Request)

	// Cancel ends with ErrCanceled every request of owner that waits for room or
	// for a backend.
	// It returns at once; requests that are being carried out end normally.
	Cancel(owner any)

	// Claim makes claimant the one writer. It fails with *InUseError while
	// somebody else holds the claim. The same claimant (equal Kind and ID) may
	// claim again; the claim ends when every release has been called. Devices do
	// not check claims in Submit: front ends claim before they submit anything
	// that changes data.
	Claim(claimant Claimant) (release func(), err error)

	// Watch calls fn, from any goroutine, after each change of Info until cancel
	// is called.
	Watch(fn func(Info)) (cancel func())

	// BlockStatus calls fn with consecutive extents that cover the part of
	// [off, off+length) inside the device until fn returns false. It may block
	// on map pages that have to be read.
	BlockStatus(ctx context.Context, off, length uint64, fn func(Extent) bool) error
}

// Delayer is a Device that holds requests back on purpose, for as long as its
// operator likes.
type Delayer interface {
	// Hasten carries out at once what owner's requests are held back for: a front
	// end calls it, from any goroutine, when somebody waits for those that are under
	// way to end and no more are coming (a guest's ring stops).
	Hasten(owner any)
}

// Hasten calls dev's Hasten if it has one.
func Hasten(dev Device, owner any) {
	if d, ok := dev.(Delayer); ok {
		d.Hasten(owner)
	}
}

// Claimant says who wants to be a device's writer.
type Claimant struct {
	Kind string // "vhost", "shm", "nbd", …
	ID   string // distinguishes two claimants of one kind, e.g. a session number or a peer's pid
}

func (c Claimant) String() string { return c.Kind + " " + c.ID }

// InUseError refuses a second writer.
type InUseError struct {
	Volume string
	Holder Claimant
}

func (e *InUseError) Error() string {
	return fmt.Sprintf("volume %s is in use by %s; only one front end may write to it at a time", e.Volume, e.Holder)
}

// Opener finds the device behind a name; front ends get one from their daemon.
type Opener interface {
	// Open returns the device called "POOL/VOLUME". It fails with an error that
	// wraps ErrNotFound if there is none.
	Open(ctx context.Context, name string) (Device, error)
	// Names lists the devices, sorted, for export lists.
	Names(ctx context.Context) ([]string, error)
	// Create makes a volume; NBD's resize-on-create and shm's create use it.
	Create(ctx context.Context, name string, size uint64) error
	// Resize grows (or, where the device allows it, shrinks) a volume.
	Resize(ctx context.Context, name string, size uint64) error
}

// ErrNotFound: no device has that name.
var ErrNotFound = errors.New("no such volume")

// CheckRange validates offset, length and alignment of a request against info.
func CheckRange(info *Info, r *Request) error {
	if r.Op == OpFlush {
		return nil
	}
	mask := uint64(info.LogicalBlock) - 1
	if (r.Offset|r.Length)&mask != 0 {
		return ErrAlignment
	}
	if r.Offset > info.Size || r.Length > info.Size-r.Offset {
		return ErrRange
	}
	if info.ReadOnly && r.Op != OpRead {
		return ErrReadOnly
	}
	return nil
}
