package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
)

// Versions of the protocol that this package speaks.
const (
	MinVersion = 1
	MaxVersion = 1
)

// Sizes and limits.
const (
	HeaderBytes = 16
	MaxMessage  = 8192 // bytes, header included
	MaxName     = 255  // bytes of a volume's or a snapshot's name
	MaxFDs      = 3    // with one message

	nameHeadBytes = 8
	volumeBytes   = 56
	serialBytes   = 24
)

// Magic opens both hellos.
const Magic = "SCORSHMS"

// Type is the kind of a message.
type Type uint32

// The messages.
const (
	Hello     Type = 1
	Open      Type = 2
	Ring      Type = 3
	CloseRing Type = 4
	Stat      Type = 5
	Create    Type = 6
	Resize    Type = 7
	List      Type = 8
	Snapshot  Type = 9
	Changed   Type = 100

	// Answer is set in the type of an answer.
	Answer Type = 1 << 31
)

// String returns the message's name as logs show it.
func (t Type) String() string {
	names := map[Type]string{
		Hello: "hello", Open: "open", Ring: "ring", CloseRing: "close ring", Stat: "stat", Create: "create",
		Resize: "resize", List: "list", Snapshot: "snapshot", Changed: "changed",
	}
	name, ok := names[t&^Answer]
	if !ok {
		return fmt.Sprintf("message %d", uint32(t))
	}
	if t&Answer != 0 {
		return "answer to " + name
	}
	return name
}

// Code is the status of an answer.
type Code uint32

// The codes.
const (
	OK          Code = iota
	Invalid          // the request breaks the protocol or a rule; the text says which
	NotFound         // no such volume
	Exists           // there is such a volume already
	InUse            // somebody else writes to the volume
	Denied           // this user may not
	Unsupported      // this server can't
	Limit            // too many connections or rings, or too much memory, now
	Failed           // anything else
	Closing          // the server is about to end: connect again
)

// Errors of messages that end the connection.
var (
	ErrShort   = errors.New("message is too short")
	ErrLength  = errors.New("message's length field differs from its length")
	ErrMagic   = errors.New("not the protocol of Scoria's shared-memory server")
	ErrVersion = errors.New("no common version of the protocol")
	ErrName    = fmt.Errorf("name must have 1 to %d bytes", MaxName)
	ErrFlags   = errors.New("flags or reserved bytes that are not known are set")
)

var le = binary.LittleEndian

// Header opens every message.
type Header struct {
	Type   Type
	Tag    uint32
	Status Code
}

// Append appends a whole message.
func Append(dst []byte, h Header, body []byte) []byte {
	dst = le.AppendUint32(dst, uint32(HeaderBytes+len(body)))
	dst = le.AppendUint32(dst, uint32(h.Type))
	dst = le.AppendUint32(dst, h.Tag)
	dst = le.AppendUint32(dst, uint32(h.Status))
	return append(dst, body...)
}

// Parse splits a message, which is a whole packet. The body is a part of p.
func Parse(p []byte) (Header, []byte, error) {
	if len(p) < HeaderBytes {
		return Header{}, nil, fmt.Errorf("%d bytes: %w", len(p), ErrShort)
	}
	if n := le.Uint32(p); uint64(n) != uint64(len(p)) {
		return Header{}, nil, fmt.Errorf("%d in a message of %d: %w", n, len(p), ErrLength)
	}
	h := Header{Type: Type(le.Uint32(p[4:])), Tag: le.Uint32(p[8:]), Status: Code(le.Uint32(p[12:]))}
	return h, p[HeaderBytes:], nil
}

// exact fails unless a body has n bytes.
func exact(p []byte, n int) error {
	if len(p) != n {
		return fmt.Errorf("body of %d bytes, want %d: %w", len(p), n, ErrShort)
	}
	return nil
}

// HelloRequest is the body of hello.
type HelloRequest struct{ Min, Max uint32 }

// Append appends the body.
func (h HelloRequest) Append(dst []byte) []byte {
	dst = append(dst, Magic...)
	return le.AppendUint32(le.AppendUint32(dst, h.Min), h.Max)
}

// DecodeHelloRequest reads the body, and the version that both speak.
func DecodeHelloRequest(p []byte) (version uint32, err error) {
	if len(p) < 16 || string(p[:8]) != Magic { // later versions may add to it
		return 0, ErrMagic
	}
	lo, hi := le.Uint32(p[8:]), le.Uint32(p[12:])
	if lo > hi || lo > MaxVersion || hi < MinVersion {
		return 0, fmt.Errorf("client speaks %d to %d, server %d to %d: %w", lo, hi, MinVersion, MaxVersion, ErrVersion)
	}
	return min(hi, MaxVersion), nil
}

// HelloAnswer is the body of the answer to hello.
type HelloAnswer struct {
	Version, MaxRings, MaxEntries, MaxSegments uint32
	MaxArena, MaxRequest                       uint64 // bytes
}

// Append appends the body.
func (h HelloAnswer) Append(dst []byte) []byte {
	dst = append(dst, Magic...)
	for _, v := range []uint32{h.Version, h.MaxRings, h.MaxEntries, h.MaxSegments} {
		dst = le.AppendUint32(dst, v)
	}
	return le.AppendUint64(le.AppendUint64(dst, h.MaxArena), h.MaxRequest)
}

// DecodeHelloAnswer reads the body.
func DecodeHelloAnswer(p []byte) (h HelloAnswer, err error) {
	if len(p) < 40 || string(p[:8]) != Magic {
		return h, ErrMagic
	}
	h = HelloAnswer{
		Version: le.Uint32(p[8:]), MaxRings: le.Uint32(p[12:]), MaxEntries: le.Uint32(p[16:]), MaxSegments: le.Uint32(p[20:]),
		MaxArena: le.Uint64(p[24:]), MaxRequest: le.Uint64(p[32:]),
	}
	if h.Version < MinVersion || h.Version > MaxVersion {
		return h, fmt.Errorf("server speaks %d: %w", h.Version, ErrVersion)
	}
	return h, nil
}

// OpenReadOnly is a flag of open.
const OpenReadOnly = 1

// Named is the body of the requests about a volume.
type Named struct {
	Value uint64 // flags, a size, or zero
	Name  string
}

// Append appends the body.
func (n Named) Append(dst []byte) []byte { return append(le.AppendUint64(dst, n.Value), n.Name...) }

// DecodeNamed reads the body; the name may be empty for list only.
func DecodeNamed(t Type, p []byte) (n Named, err error) {
	if len(p) < nameHeadBytes {
		return n, fmt.Errorf("body of %d bytes: %w", len(p), ErrShort)
	}
	n = Named{Value: le.Uint64(p), Name: string(p[nameHeadBytes:])}
	if len(n.Name) > MaxName || n.Name == "" && t != List {
		return n, fmt.Errorf("%d bytes: %w", len(n.Name), ErrName)
	}
	if t == Open && n.Value&^OpenReadOnly != 0 || (t == Stat || t == List) && n.Value != 0 {
		return n, ErrFlags
	}
	return n, nil
}

// RingReuse is a flag of ring.
const RingReuse = 1

// RingRequest is the body of ring.
type RingRequest struct {
	Entries, Flags uint32
	ArenaBytes     uint64
}

// Append appends the body.
func (r RingRequest) Append(dst []byte) []byte {
	return le.AppendUint64(le.AppendUint32(le.AppendUint32(dst, r.Entries), r.Flags), r.ArenaBytes)
}

// DecodeRingRequest reads the body.
func DecodeRingRequest(p []byte) (r RingRequest, err error) {
	if err := exact(p, 16); err != nil {
		return r, err
	}
	r = RingRequest{Entries: le.Uint32(p), Flags: le.Uint32(p[4:]), ArenaBytes: le.Uint64(p[8:])}
	if r.Flags&^RingReuse != 0 {
		return r, ErrFlags
	}
	return r, nil
}

// RingAnswer is the body of the answer to ring.
type RingAnswer struct {
	Ring        uint32
	MemoryBytes uint64
}

// Append appends the body.
func (r RingAnswer) Append(dst []byte) []byte {
	return le.AppendUint64(le.AppendUint64(dst, uint64(r.Ring)), r.MemoryBytes)
}

// DecodeRingAnswer reads the body.
func DecodeRingAnswer(p []byte) (r RingAnswer, err error) {
	if err := exact(p, 16); err != nil {
		return r, err
	}
	return RingAnswer{Ring: le.Uint32(p), MemoryBytes: le.Uint64(p[8:])}, nil
}

// AppendCloseRing appends the body of close ring.
func AppendCloseRing(dst []byte, ring uint32) []byte { return le.AppendUint64(dst, uint64(ring)) }

// DecodeCloseRing reads the body of close ring.
func DecodeCloseRing(p []byte) (ring uint64, err error) {
	if err := exact(p, 8); err != nil {
		return 0, err
	}
	return le.Uint64(p), nil
}

// SnapshotRequest is the body of snapshot.
type SnapshotRequest struct{ Volume, Snapshot string }

// Append appends the body.
func (s SnapshotRequest) Append(dst []byte) []byte {
	dst = le.AppendUint64(dst, uint64(len(s.Volume)))
	return append(append(dst, s.Volume...), s.Snapshot...)
}

// DecodeSnapshotRequest reads the body.
func DecodeSnapshotRequest(p []byte) (s SnapshotRequest, err error) {
	if len(p) < nameHeadBytes {
		return s, fmt.Errorf("body of %d bytes: %w", len(p), ErrShort)
	}
	n, rest := le.Uint64(p), p[nameHeadBytes:]
	if n == 0 || n > MaxName || n >= uint64(len(rest)) || uint64(len(rest))-n > MaxName {
		return s, ErrName
	}
	return SnapshotRequest{Volume: string(rest[:n]), Snapshot: string(rest[n:])}, nil
}

// VolumeReadOnly is a flag of a volume.
const VolumeReadOnly = 1

// Volume describes a volume.
type Volume struct {
	Size, MaxDiscard                              uint64 // bytes
	LogicalBlock, PhysicalBlock, DiscardAlignment uint32 // bytes
	Flags                                         uint32
	Serial, Name                                  string
}

// Append appends the description.
func (v Volume) Append(dst []byte) []byte {
	dst = le.AppendUint64(le.AppendUint64(dst, v.Size), v.MaxDiscard)
	for _, x := range []uint32{v.LogicalBlock, v.PhysicalBlock, v.DiscardAlignment, v.Flags} {
		dst = le.AppendUint32(dst, x)
	}
	var serial [serialBytes]byte
	copy(serial[:], v.Serial)
	return append(append(dst, serial[:]...), v.Name...)
}

// DecodeVolume reads the description.
func DecodeVolume(p []byte) (v Volume, err error) {
	if len(p) < volumeBytes {
		return v, fmt.Errorf("volume of %d bytes: %w", len(p), ErrShort)
	}
	return Volume{
		Size: le.Uint64(p), MaxDiscard: le.Uint64(p[8:]),
		LogicalBlock: le.Uint32(p[16:]), PhysicalBlock: le.Uint32(p[20:]), DiscardAlignment: le.Uint32(p[24:]), Flags: le.Uint32(p[28:]),
		Serial: string(bytes.TrimRight(p[32:volumeBytes], "\x00")), Name: string(p[volumeBytes:]),
	}, nil
}

// AppendNames appends the body of the answer to list: as many of the names, in
// their order, as fit into a message.
func AppendNames(dst []byte, names []string) []byte {
	room, n := MaxMessage-HeaderBytes-8, 0
	for n < len(names) && 2+len(names[n]) <= room {
		room -= 2 + len(names[n])
		n++
	}
	more := uint32(0)
	if n < len(names) {
		more = 1
	}
	dst = le.AppendUint32(le.AppendUint32(dst, uint32(n)), more)
	for _, name := range names[:n] {
		dst = append(le.AppendUint16(dst, uint16(len(name))), name...)
	}
	return dst
}

// DecodeNames reads the body of the answer to list.
func DecodeNames(p []byte) (names []string, more bool, err error) {
	if len(p) < 8 {
		return nil, false, fmt.Errorf("list of %d bytes: %w", len(p), ErrShort)
	}
	count, more := le.Uint32(p), le.Uint32(p[4:]) != 0
	p = p[8:]
	for range count {
		if len(p) < 2 || len(p)-2 < int(le.Uint16(p)) {
			return nil, false, fmt.Errorf("list of %d names ends after %d: %w", count, len(names), ErrShort)
		}
		n := int(le.Uint16(p))
		names = append(names, string(p[2:2+n]))
		p = p[2+n:]
	}
	return names, more && len(names) > 0, nil
}
