package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"scoria/alba/asd"
)

// Sizes and versions.
const (
	HelloBytes  = 64
	HeaderBytes = 32
	// MaxBodyBytes bounds a frame's body: enough for each largest message.
	MaxBodyBytes = 16 << 20

	MinVersion = 1
	MaxVersion = 1

	magic = "SCORIASD"
)

// ErrProtocol: what came is not of this protocol, or damaged. The connection is
// of no more use.
var ErrProtocol = errors.New("protocol error")

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func protocolError(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrProtocol}, args...)...)
}

// Hello is the client's first message.
type Hello struct {
	Lowest, Highest uint16   // versions
	Want            [16]byte // the ASD's UUID, or zeroes
}

// WelcomeStatus is the server's decision about a connection.
type WelcomeStatus uint16

// The values of WelcomeStatus.
const (
	Welcomed WelcomeStatus = iota
	NoCommonVersion
	OtherASD
	TooManyConnections
)

func (s WelcomeStatus) String() string {
	switch s {
	case Welcomed:
		return "welcome"
	case NoCommonVersion:
		return "no common version of the protocol"
	case OtherASD:
		return "another ASD answers"
	case TooManyConnections:
		return "too many connections"
	}
	return fmt.Sprintf("status %d", uint16(s))
}

// Welcome is the server's first message.
type Welcome struct {
	Version     uint16
	Status      WelcomeStatus
	MaxRequests uint32 // under way at once
	ID          [16]byte
}

func seal(b []byte) {
	binary.LittleEndian.PutUint32(b[len(b)-4:], crc32.Checksum(b[:len(b)-4], castagnoli))
}

func sealed(b []byte) bool {
	return binary.LittleEndian.Uint32(b[len(b)-4:]) == crc32.Checksum(b[:len(b)-4], castagnoli)
}

// Encode returns the HelloBytes of a hello.
func (h *Hello) Encode() []byte {
	b := make([]byte, HelloBytes)
	copy(b, magic)
	binary.LittleEndian.PutUint16(b[8:], h.Lowest)
	binary.LittleEndian.PutUint16(b[10:], h.Highest)
	copy(b[16:], h.Want[:])
	seal(b)
	return b
}

// DecodeHello reads a hello of HelloBytes.
func DecodeHello(b []byte) (Hello, error) {
	if len(b) != HelloBytes || string(b[:8]) != magic || !sealed(b) {
		return Hello{}, protocolError("no hello of a client")
	}
	return Hello{
		Lowest:  binary.LittleEndian.Uint16(b[8:]),
		Highest: binary.LittleEndian.Uint16(b[10:]),
		Want:    [16]byte(b[16:32]),
	}, nil
}

// Encode returns the HelloBytes of a welcome.
func (w *Welcome) Encode() []byte {
	b := make([]byte, HelloBytes)
	copy(b, magic)
	binary.LittleEndian.PutUint16(b[8:], w.Version)
	binary.LittleEndian.PutUint16(b[10:], uint16(w.Status))
	binary.LittleEndian.PutUint32(b[12:], w.MaxRequests)
	copy(b[16:], w.ID[:])
	seal(b)
	return b
}

// DecodeWelcome reads a welcome of HelloBytes.
func DecodeWelcome(b []byte) (Welcome, error) {
	if len(b) != HelloBytes || string(b[:8]) != magic || !sealed(b) {
		return Welcome{}, protocolError("no welcome of an ASD")
	}
	return Welcome{
		Version:     binary.LittleEndian.Uint16(b[8:]),
		Status:      WelcomeStatus(binary.LittleEndian.Uint16(b[10:])),
		MaxRequests: binary.LittleEndian.Uint32(b[12:]),
		ID:          [16]byte(b[16:32]),
	}, nil
}

// Op is an operation.
type Op uint8

// The operations.
const (
	OpGet Op = 1 + iota
	OpMultiGet
	OpReadAt
	OpRange
	OpExists
	OpApply
	OpEpochs
	OpVerify
	OpStats
	OpPing
	OpCancel
	opEnd
)

// Header precedes each frame.
type Header struct {
	Body, Data uint32 // lengths in bytes
	ID         uint64
	Op         Op
	// Code is the priority of a request, the status of an answer.
	Code     uint8
	Deadline uint32 // milliseconds, 0 for none
	BodyCRC  uint32
}

// AppendHeader appends the HeaderBytes of a header.
func AppendHeader(b []byte, h *Header) []byte {
	start := len(b)
	b = binary.LittleEndian.AppendUint32(b, h.Body)
	b = binary.LittleEndian.AppendUint32(b, h.Data)
	b = binary.LittleEndian.AppendUint64(b, h.ID)
	b = append(b, byte(h.Op), h.Code, 0, 0)
	b = binary.LittleEndian.AppendUint32(b, h.Deadline)
	b = binary.LittleEndian.AppendUint32(b, h.BodyCRC)
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b[start:], castagnoli))
}

// DecodeHeader reads a header of HeaderBytes and checks its limits, so that the
// caller can make room for what it announces.
func DecodeHeader(b []byte) (Header, error) {
	if len(b) != HeaderBytes || !sealed(b) {
		return Header{}, protocolError("a frame's header fails its checksum")
	}
	le := binary.LittleEndian
	h := Header{
		Body: le.Uint32(b), Data: le.Uint32(b[4:]), ID: le.Uint64(b[8:]),
		Op: Op(b[16]), Code: b[17], Deadline: le.Uint32(b[20:]), BodyCRC: le.Uint32(b[24:]),
	}
	switch {
	case h.Body > MaxBodyBytes:
		return Header{}, protocolError("body of %d bytes, want at most %d", h.Body, MaxBodyBytes)
	case h.Data > asd.MaxValueBytes:
		return Header{}, protocolError("data of %d bytes, want at most %d", h.Data, asd.MaxValueBytes)
	case h.Op == 0 || h.Op >= opEnd:
		return Header{}, protocolError("operation %d", h.Op)
	}
	return h, nil
}

// CheckBody verifies a body against its header.
func (h *Header) CheckBody(body []byte) error {
	if uint32(len(body)) != h.Body || crc32.Checksum(body, castagnoli) != h.BodyCRC {
		return protocolError("a frame's body fails its checksum")
	}
	return nil
}

// finish puts the header in front of a body for which room was left.
func finish(b []byte, h Header, data [][]byte) []byte {
	body := b[HeaderBytes:]
	h.Body, h.BodyCRC = uint32(len(body)), crc32.Checksum(body, castagnoli)
	for _, d := range data {
		h.Data += uint32(len(d))
	}
	AppendHeader(b[:0], &h)
	return b
}
