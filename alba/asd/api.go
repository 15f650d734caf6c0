// Package asd is what the rest of Scoria knows of an ALBA Storage Daemon, the
// daemon that serves one disk: a store of keys and values with an atomic Apply
// of (asserts, updates). Client is implemented by the engine itself
// (scoria/alba/asd/disk, in process) and by the TCP client
// (scoria/alba/asd/remote); both pass scoria/alba/asd/asdtest.
//
// # Values, blocks, checksums
//
// A value is cut into blocks of Value.BlockSize bytes (4096 unless the writer
// chooses otherwise; the last block may be shorter). Every block has a CRC32C
// (Castagnoli) from the moment the writer makes the Value; the checksums travel
// with the data, are verified by the ASD before it stores the value, are stored
// with it, are verified by the ASD whenever it reads the disk, and again by the
// client when they have come over the network. Whatever Get, MultiGet and ReadAt
// return without an error is therefore what was put.
//
// # Epochs
//
// An ASD remembers the largest epoch of every namespace that was ever raised on
// it, durably, and it never forgets or lowers one. AssertEpoch makes an Apply
// with a smaller epoch fail with ErrStaleEpoch and have no effect; RaiseEpoch,
// an update like any other, raises it. Raising to the epoch that is there
// already costs nothing, so an owner may put both into each Apply.
package asd

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Limits of every ASD. What exceeds them is refused with ErrInvalid.
const (
	MaxKeyBytes       = 1024     // length of a key; a key has at least one byte
	MaxNamespaceBytes = 256      // length of a namespace's name, at least one byte
	MaxValueBytes     = 32 << 20 // length of a value, and of all values of one Apply or MultiGet together
	MaxKeys           = 4096     // keys of one MultiGet or Exists, entries of one Range
	MaxAsserts        = 1024     // asserts of one Apply
	MaxUpdates        = 1024     // updates of one Apply
	MaxAssertBytes    = 64 << 10 // length of the value of an AssertValue
	MaxAssertsBytes   = 4 << 20  // length of the values of all AssertValues of one Apply together

	DefaultBlockSize = 4096    // bytes
	MinBlockSize     = 512     // bytes
	MaxBlockSize     = 1 << 20 // bytes
)

// Errors of a Client. Test for them with errors.Is: what is returned says more.
var (
	// ErrNoKey: there is no such key (Get, ReadAt; per key in MultiGet).
	ErrNoKey = errors.New("no such key")
	// ErrFull: the ASD takes no more puts; reads, deletes and epochs still work.
	ErrFull = errors.New("ASD is full")
	// ErrStaleEpoch: the ASD knows a larger epoch of the namespace. Nothing of
	// the Apply was done, nor will be. *StaleEpochError says which epoch. It goes
	// before ErrAssert if both apply.
	ErrStaleEpoch = errors.New("stale epoch: a later owner has written to this ASD")
	// ErrAssert: an assert other than AssertEpoch does not hold; nothing of the
	// Apply was done, nor will be. *AssertError says which.
	ErrAssert = errors.New("assert does not hold")
	// ErrCorrupt: stored bytes fail their checksum, or are missing; or what was
	// to be put fails the checksums that came with it. *CorruptError says where.
	// Putting the key again repairs it.
	ErrCorrupt = errors.New("checksum mismatch")
	// ErrFailed: a sync of this ASD's disk failed. It acknowledges no Apply until
	// the disk was opened anew, which it does by itself when a test write succeeds;
	// reads may still work. Whether the Apply that met this was done shows only then.
	ErrFailed = errors.New("ASD's disk failed; it takes no writes until it is opened anew")
	// ErrUnavailable: the ASD was not reached (or is closing); the request had no
	// effect. It may be repeated at once or later.
	ErrUnavailable = errors.New("ASD is unavailable")
	// ErrUnknownOutcome: the connection broke, or the caller stopped waiting,
	// after an Apply was sent: it was done whole or not at all, now or a little
	// later. Repeating it is the way to know; asserts make that safe. It also
	// wraps the context's error if that is the reason.
	ErrUnknownOutcome = errors.New("outcome unknown")
	// ErrWrongASD: another ASD than the expected one answers at that address.
	ErrWrongASD = errors.New("another ASD answers")
	// ErrInvalid: the request breaks a limit or a rule; the text says which.
	ErrInvalid = errors.New("invalid request")
	// ErrClosed: Close was called on this Client.
	ErrClosed = errors.New("ASD client is closed")
)

// Priority orders requests that wait for the same disk.
type Priority uint8

const (
	// PriorityGuest is for what a guest waits for, or will: its reads, uploads
	// of its log, fencing.
	PriorityGuest Priority = iota
	// PriorityRepair is for maintenance: it runs when no guest's request waits,
	// and otherwise gets a small share so that it is never starved.
	PriorityRepair
)

// Client is one ASD. Safe from any goroutine; any number of requests may be
// under way, and the answers come in any order.
//
// A context that ends makes the call return early with the context's error
// (wrapped); a read then leaves the caller's buffer in any state but no longer
// touches it. An Apply that is canceled is done whole or not at all
// (ErrUnknownOutcome, unless it certainly had no effect).
//
// Calls wait for a busy ASD: slowness is back-pressure. Calls to an ASD that
// cannot be reached fail with ErrUnavailable without waiting for it to return.
type Client interface {
	// Get returns a whole value, or ErrNoKey, or ErrCorrupt.
	Get(ctx context.Context, key string, pri Priority) (Value, error)
	// MultiGet returns one Result per key, in the keys' order; a missing or
	// corrupt value is an error of its Result alone. If the values together pass
	// MaxValueBytes, the Results from the first that does not fit on have
	// ErrTooMuch: ask for those again.
	MultiGet(ctx context.Context, keys []string, pri Priority) ([]Result, error)
	// ReadAt fills p with the value's bytes [off, off+len(p)). The blocks that
	// hold them are read and verified, no others; a range on block boundaries
	// reads and moves nothing more than itself. ErrNoKey; ErrCorrupt if one of
	// these blocks is bad; io.ErrUnexpectedEOF if the value ends before, p is
	// then undefined.
	ReadAt(ctx context.Context, key string, p []byte, off int64, pri Priority) (ReadInfo, error)
	// Range lists keys in byte order.
	Range(ctx context.Context, req RangeRequest, pri Priority) (RangeResult, error)
	// Exists returns one Info per key, in the keys' order. It reads no values.
	Exists(ctx context.Context, keys []string, pri Priority) ([]Info, error)
	// Apply checks all asserts and does all updates, as one atomic step; with a
	// nil error it is durable. Of two updates of one key the later counts.
	// Errors: ErrStaleEpoch, ErrAssert, ErrFull, ErrCorrupt, ErrInvalid and
	// ErrUnavailable (nothing was done); ErrFailed, ErrUnknownOutcome.
	Apply(ctx context.Context, asserts []Assert, updates []Update, pri Priority) error
	// Epochs lists namespaces with the epochs that this ASD remembers, by name,
	// starting behind after ("" for the first), at most MaxKeys of them.
	Epochs(ctx context.Context, after string) (epochs []NamespaceEpoch, more bool, err error)
	// Verify reads and checks the next stretch of the store; see VerifyRequest.
	Verify(ctx context.Context, req VerifyRequest) (VerifyResult, error)
	// Stats returns the state of the ASD; cheap enough to ask every second.
	Stats(ctx context.Context) (Stats, error)
	// Close ends the use of this Client; requests under way fail. An engine in
	// process closes its disk.
	Close() error
}

// BlockReader is what a server of a Client needs besides: blocks together with
// their checksums, so that the reader at the other end can verify them.
type BlockReader interface {
	// ReadBlocks is ReadAt for the whole blocks that hold [off, off+size), as far
	// as the value reaches: a range behind its end gives no blocks and no error.
	// The data is appended to buf[:0].
	ReadBlocks(ctx context.Context, key string, buf []byte, off, size int64, pri Priority) ([]byte, ReadInfo, error)
}

// Adopter is an ASD in this process, which may take over a file of its file system
// instead of copying its bytes.
type Adopter interface {
	// Adopt is Client.Apply with parts of a file put besides the updates, in the
	// same atomic step. The file may stay where it is or be removed, but its
	// contents must never change from now on. They are not read: their checksums,
	// which are older than the file, vouch for them, now and at every read.
	// ErrNotAdopted, and nothing was done, if the file can't be shared; then put
	// the values.
	Adopt(ctx context.Context, file string, parts []FilePart, asserts []Assert, updates []Update, pri Priority) error
}

// FilePart is a value that lies in a file.
type FilePart struct {
	Key       string
	Off, Size int64    // in the file, bytes; Off is a multiple of DefaultBlockSize, Size at least 1
	CRCs      []uint32 // CRC32C of each block of DefaultBlockSize bytes
}

// ErrNotAdopted: the file can't be shared with its writer.
var ErrNotAdopted = errors.New("file can't be adopted")

// Info says what is stored under a key without its contents.
type Info struct {
	Key       string
	Exists    bool
	Size      int64  // bytes
	BlockSize int    // bytes
	Sum       uint32 // Value.Sum: equal contents and block size have equal sums
}

// ReadInfo is what ReadAt tells besides the bytes.
type ReadInfo struct {
	Size      int64 // of the whole value, bytes
	BlockSize int   // bytes
	// FirstBlock is the index of the block that holds off; CRCs are the
	// checksums of that block and the following ones that were read.
	FirstBlock int
	CRCs       []uint32
}

// Result is the answer for one key of a MultiGet.
type Result struct {
	Value Value // if Err is nil
	Err   error // ErrNoKey, ErrCorrupt, ErrTooMuch
}

// ErrTooMuch marks the keys of a MultiGet whose values no longer fitted.
var ErrTooMuch = errors.New("values exceed what one answer may hold")

// RangeRequest asks for the keys in [From, To), or (From, To) with After set.
type RangeRequest struct {
	From  string
	After bool   // leave From itself out: for the next page of a listing
	To    string // exclusive; "" means no end
	Limit int    // most entries of the answer; 0 or more than MaxKeys means MaxKeys
}

// RangeResult is a page of a listing.
type RangeResult struct {
	Infos []Info // in byte order of keys
	More  bool   // there are further keys: go on with From = last key, After = true
}

// AssertKind says what an Assert asserts.
type AssertKind uint8

// The kinds of asserts; use the functions of the same names.
const (
	KindAssertAbsent AssertKind = 1 + iota
	KindAssertValue
	KindAssertSum
	KindAssertEpoch
)

// Assert is a condition of an Apply. Make one with AssertAbsent, AssertValue,
// AssertSum or AssertEpoch.
type Assert struct {
	Kind  AssertKind
	Key   string // a key; for KindAssertEpoch the namespace
	Data  []byte // KindAssertValue
	Size  int64  // KindAssertSum
	Sum   uint32 // KindAssertSum
	Epoch uint64 // KindAssertEpoch
}

// AssertAbsent asserts that there is no such key.
func AssertAbsent(key string) Assert { return Assert{Kind: KindAssertAbsent, Key: key} }

// AssertValue asserts that the key's value has exactly these bytes (at most
// MaxAssertBytes).
func AssertValue(key string, data []byte) Assert {
	return Assert{Kind: KindAssertValue, Key: key, Data: data}
}

// AssertSum asserts that the key exists with this size in bytes and this
// Value.Sum. The stored checksums are compared, the data isn't read.
func AssertSum(key string, size int64, sum uint32) Assert {
	return Assert{Kind: KindAssertSum, Key: key, Size: size, Sum: sum}
}

// AssertEpoch asserts that epoch is at least the namespace's epoch on this ASD
// (0 if none was raised). It fails with ErrStaleEpoch.
func AssertEpoch(namespace string, epoch uint64) Assert {
	return Assert{Kind: KindAssertEpoch, Key: namespace, Epoch: epoch}
}

// UpdateKind says what an Update does.
type UpdateKind uint8

// The kinds of updates; use the functions.
const (
	KindPut UpdateKind = 1 + iota
	KindDelete
	KindRaiseEpoch
)

// Update is one change of an Apply. Make one with Put, Delete or RaiseEpoch.
type Update struct {
	Kind  UpdateKind
	Key   string // a key; for KindRaiseEpoch the namespace
	Value Value  // KindPut
	Epoch uint64 // KindRaiseEpoch
}

// Put stores a value, over an earlier one if there is one. The Value's slices
// belong to the ASD until Apply returns, and are not changed.
func Put(key string, v Value) Update { return Update{Kind: KindPut, Key: key, Value: v} }

// Delete removes a key; no error if there is none.
func Delete(key string) Update { return Update{Kind: KindDelete, Key: key} }

// RaiseEpoch sets the namespace's epoch to the given one. The Apply fails with
// ErrStaleEpoch if it is larger already; equal is fine and free.
func RaiseEpoch(namespace string, epoch uint64) Update {
	return Update{Kind: KindRaiseEpoch, Key: namespace, Epoch: epoch}
}

// NamespaceEpoch is an epoch that an ASD remembers.
type NamespaceEpoch struct {
	Namespace string
	Epoch     uint64
}

// VerifyRequest asks an ASD to read and check what it stores, from a cursor on.
// One call checks a stretch and returns, so that the caller sets the rate (by
// when it calls again), shows the progress, and goes on where it was after a
// crash (by keeping VerifyResult.Next). VerifyAll is the loop around it.
type VerifyRequest struct {
	Cursor   string // "" for the beginning, else VerifyResult.Next
	MaxBytes int64  // stop behind the value or file that reaches this; 0 means 16 MiB
}

// VerifyResult is the report on one stretch. Values come first, in the order of
// their keys, then the files of the key-value store.
type VerifyResult struct {
	Next  string // go on here: opaque, at most MaxKeyBytes+1 bytes
	Done  bool   // the end was reached: Next is ""
	Keys  int64  // values checked
	Bytes int64  // bytes checked
	Bad   []BadBlocks
}

// BadBlocks names damaged bytes. Size 0: the value can't be read at all (its
// file or its record is missing or damaged). Key "": not a value but a file of
// the key-value store; Stats.Damaged is set too.
type BadBlocks struct {
	Key    string
	Off    int64 // bytes, a multiple of the block size
	Size   int64 // bytes
	Reason string
}

// Stats is the state of an ASD.
type Stats struct {
	ID      string // UUID, made when the disk was first opened
	Version string // of the program that serves it
	// Capacity is what this ASD may fill, Used what its values and its key-value
	// store take of that; bytes. Puts are refused before Used reaches Capacity:
	// a reserve is kept for deleting.
	Capacity, Used int64
	Full           bool   // puts are refused
	Failed         string // why no Apply is taken ("" if all is well), and what is done about it
	// Reopened is how often the disk was opened anew because it had failed, the last
	// time because of LastFailure; since the program's start.
	Reopened    uint64 `json:",omitempty"`
	LastFailure string `json:",omitempty"`
	// Damaged: the key-value store met bytes that fail their checksum outside of
	// a value, so that some keys may be lost; move the data elsewhere and replace it.
	Damaged string
	Keys    int64         // number of keys
	Bytes   int64         // sum of the values' sizes
	Uptime  time.Duration // since the disk was opened

	// Counters since the disk was opened.
	Gets, Applies, Refused uint64 // values read (by get, multi-get or partial); Applies done; Applies refused
	ReadBytes              uint64 // bytes asked for by readers
	DiskReadBytes          uint64 // bytes read from files of values for it, with headers
	WrittenBytes           uint64 // bytes of values put
	CorruptBlocks          uint64 // blocks that failed their checksum
	Commits                uint64 // group commits: Applies/Commits share one sync
	QueuedGuest            int64  // requests waiting or under way now
	QueuedRepair           int64
}

// AssertError says which assert does not hold.
type AssertError struct {
	Index  int // in the asserts of the Apply
	Assert Assert
	Reason string
}

func (e *AssertError) Error() string {
	return fmt.Sprintf("assert %d on key %q does not hold: %s", e.Index, e.Assert.Key, e.Reason)
}

// Unwrap returns ErrAssert.
func (e *AssertError) Unwrap() error { return ErrAssert }

// StaleEpochError says which epoch an ASD knows.
type StaleEpochError struct {
	Namespace string
	Epoch     uint64 // of the Apply
	Known     uint64 // to the ASD
}

func (e *StaleEpochError) Error() string {
	return fmt.Sprintf("namespace %q: epoch %d is stale, the ASD knows %d", e.Namespace, e.Epoch, e.Known)
}

// Unwrap returns ErrStaleEpoch.
func (e *StaleEpochError) Unwrap() error { return ErrStaleEpoch }

// CorruptError says which bytes of a value are bad.
type CorruptError struct {
	Key    string
	Off    int64 // of the first bad block, bytes; 0 with Size 0 if nothing can be read
	Size   int64 // bytes
	Reason string
}

func (e *CorruptError) Error() string {
	return fmt.Sprintf("key %q: bytes %d to %d: %s", e.Key, e.Off, e.Off+e.Size, e.Reason)
}

// Unwrap returns ErrCorrupt.
func (e *CorruptError) Unwrap() error { return ErrCorrupt }
