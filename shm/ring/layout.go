package ring

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// Version of the layout.
const Version = 1

// Sizes and limits.
const (
	HeaderBytes     = 4096
	SubmitBytes     = 64 // of a submission entry
	CompletionBytes = 16
	SegmentBytes    = 16      // of a gather list's element
	MaxEntries      = 1024    // of a ring
	MaxSegments     = 256     // of a request's gather list
	MaxArenaBytes   = 1 << 30 // of a ring

	pageBytes = 4096

	kickFlagAt = 128
	callFlagAt = 192
)

// Magic opens the header.
const Magic = "SCORSHMR"

// Errors of layouts and headers.
var (
	ErrEntries = fmt.Errorf("number of entries must be a power of two from 1 to %d", MaxEntries)
	ErrArena   = fmt.Errorf("arena must be a multiple of %d bytes up to %d", pageBytes, MaxArenaBytes)
	ErrMemory  = errors.New("memory is too short for the ring, or not aligned to 64 bytes")
	ErrHeader  = errors.New("not the header of a ring")
)

// Layout says where a ring's parts lie in its memory.
type Layout struct {
	Entries    int    // a power of two
	ArenaBytes uint64 // a multiple of 4096
}

// Check names what is wrong with the layout.
func (l Layout) Check() error {
	if l.Entries < 1 || l.Entries > MaxEntries || l.Entries&(l.Entries-1) != 0 {
		return fmt.Errorf("%d: %w", l.Entries, ErrEntries)
	}
	if l.ArenaBytes > MaxArenaBytes || l.ArenaBytes%pageBytes != 0 {
		return fmt.Errorf("%d bytes: %w", l.ArenaBytes, ErrArena)
	}
	return nil
}

// SubmitOffset is where the submission ring begins, in bytes.
func (l Layout) SubmitOffset() uint64 { return HeaderBytes }

// CompletionOffset is where the completion ring begins, in bytes.
func (l Layout) CompletionOffset() uint64 { return HeaderBytes + uint64(l.Entries)*SubmitBytes }

// ArenaOffset is where the arena begins, in bytes.
func (l Layout) ArenaOffset() uint64 {
	end := l.CompletionOffset() + uint64(l.Entries)*CompletionBytes
	return (end + pageBytes - 1) &^ (pageBytes - 1)
}

// TotalBytes is the size of the whole memory.
func (l Layout) TotalBytes() uint64 { return l.ArenaOffset() + l.ArenaBytes }

// PutHeader writes the header of a new ring to memory that is all zeroes.
func (l Layout) PutHeader(mem []byte) {
	copy(mem, Magic)
	le := binary.LittleEndian
	le.PutUint32(mem[8:], Version)
	le.PutUint32(mem[12:], uint32(l.Entries))
	le.PutUint64(mem[16:], l.SubmitOffset())
	le.PutUint64(mem[24:], l.CompletionOffset())
	le.PutUint64(mem[32:], l.ArenaOffset())
	le.PutUint64(mem[40:], l.ArenaBytes)
}

// ParseHeader reads a header; clients do. It fails with ErrHeader, wrapped with
// what is wrong, for another version or offsets that are not this version's.
func ParseHeader(mem []byte) (Layout, error) {
	if len(mem) < HeaderBytes || string(mem[:8]) != Magic {
		return Layout{}, fmt.Errorf("no magic: %w", ErrHeader)
	}
	le := binary.LittleEndian
	if v := le.Uint32(mem[8:]); v != Version {
		return Layout{}, fmt.Errorf("version %d, want %d: %w", v, Version, ErrHeader)
	}
	l := Layout{Entries: int(le.Uint32(mem[12:])), ArenaBytes: le.Uint64(mem[40:])}
	if err := l.Check(); err != nil {
		return Layout{}, fmt.Errorf("%w: %w", ErrHeader, err)
	}
	if le.Uint64(mem[16:]) != l.SubmitOffset() || le.Uint64(mem[24:]) != l.CompletionOffset() || le.Uint64(mem[32:]) != l.ArenaOffset() {
		return Layout{}, fmt.Errorf("offsets do not follow from %d entries: %w", l.Entries, ErrHeader)
	}
	return l, nil
}

// Flags of a request.
const (
	FlagFUA     = 1 << 0
	FlagNoUnmap = 1 << 1
)

// Operations.
const (
	OpRead = iota
	OpWrite
	OpFlush
	OpDiscard
	OpWriteZeroes
)

// Status is the outcome of a request.
type Status uint32

// The outcomes.
const (
	StatusOK          Status = iota
	StatusIO                 // anything that no other code says
	StatusInvalid            // the entry breaks the protocol
	StatusRange              // behind the end of the volume
	StatusAlignment          // not a multiple of the logical block
	StatusReadOnly           // the volume, or the connection to it, is read-only
	StatusUnsupported        // no such operation
	StatusCorrupt            // stored data fails its checksum
	StatusFailed             // an earlier failure of the local disk forbids the answer
)

// String returns the outcome in words.
func (s Status) String() string {
	names := [...]string{
		"ok", "I/O error", "invalid request", "request behind the end of the volume", "request not aligned to the logical block size",
		"volume is read-only", "operation is not supported", "stored data fails its checksum", "volume has failed",
	}
	if int(s) < len(names) {
		return names[s]
	}
	return fmt.Sprintf("status %d", uint32(s))
}

// Request is a submission entry.
type Request struct {
	Cookie   uint64
	Offset   uint64 // bytes
	Length   uint64 // bytes
	Addr     uint64 // in the arena
	Op       uint8
	Flags    uint8
	Segments uint16 // of the gather list at Addr; 0: none
	// Reserved is what lies where zeroes belong, or-ed together. Clients leave it 0.
	Reserved uint64
}

// Completion is a completion entry.
type Completion struct {
	Cookie uint64
	Status Status
}

// Segment is an element of a gather list.
type Segment struct {
	Addr   uint64 // in the arena
	Length uint32 // bytes
}

// PutSegment writes an element of a gather list.
func PutSegment(p []byte, s Segment) {
	binary.LittleEndian.PutUint64(p, s.Addr)
	binary.LittleEndian.PutUint32(p[8:], s.Length)
	binary.LittleEndian.PutUint32(p[12:], 0)
}
