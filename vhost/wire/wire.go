// Package wire is the codec of the vhost-user protocol: message header,
// payloads, and the limits on length and number of file descriptors that each
// message has. It does no I/O, keeps nothing and is used by both sides: the
// server (package vhost, the protocol's "back end") and the Go client
// (vhost/client, the "front end").
//
// Source: QEMU's docs/interop/vhost-user.rst, "Message Specification". All
// numbers are in the machine's byte order, which is little-endian here.
//
//	      0       4       8      12
//	      +-------+-------+-------+------------------+
//	      |request| flags | size  | payload (size)   |
//	      +-------+-------+-------+------------------+
//	flags: bits 0-1 version (1), bit 2 reply, bit 3 need_reply
//
//	u64            | u64 |
//	VringState     | index u32 | num u32 |
//	VringAddr      | index u32 | flags u32 | desc u64 | used u64 | avail u64 | log u64 |
//	MemTable       | n u32 | pad u32 | n × Region |
//	Region         | guest addr u64 | size u64 | user addr u64 | mmap offset u64 |
//	single Region  | pad u64 | Region |
//	Log            | size u64 | offset u64 |
//	Config         | offset u32 | size u32 | flags u32 | size bytes |
//	Inflight       | mmap size u64 | mmap offset u64 | queues u16 | queue size u16 | pad u32 |
//
// A reader takes HeaderSize bytes, calls ParseHeader and CheckRequest (or
// CheckReply) on them before it reads the payload, then CheckFDs, then the
// Decode function of the payload.
package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// Sizes in bytes, and counts.
const (
	HeaderSize = 12
	// MaxPayload bounds the payload of every message. The largest one is a
	// Config of MaxConfigSize; a MemTable of MaxMemTableRegions is 264 bytes.
	MaxPayload = configHeaderSize + MaxConfigSize
	// MaxFDs bounds the descriptors passed with one message
	// (VHOST_MEMORY_BASELINE_NREGIONS in QEMU).
	MaxFDs = 8
	// MaxMemTableRegions bounds SET_MEM_TABLE; more slots go by ADD_MEM_REG.
	MaxMemTableRegions = 8
	// MaxConfigSize bounds the virtio configuration space
	// (VHOST_USER_MAX_CONFIG_SIZE in QEMU).
	MaxConfigSize = 256

	configHeaderSize = 12
	regionSize       = 32
	vringAddrSize    = 40
	// QEMU's VhostUserInflight is not packed: 20 bytes of fields, 24 with padding.
	inflightMinSize = 20
	inflightSize    = 24
)

// Header flags.
const (
	FlagVersion     uint32 = 1
	FlagVersionMask uint32 = 3
	FlagReply       uint32 = 1 << 2
	FlagNeedReply   uint32 = 1 << 3
)

// Errors, wrapped with the message's name and what would be right.
var (
	ErrVersion = errors.New("wrong protocol version")
	ErrUnknown = errors.New("unknown message")
	ErrSize    = errors.New("wrong payload size")
	ErrFDs     = errors.New("wrong number of file descriptors")
	ErrFlags   = errors.New("wrong header flags")
	ErrField   = errors.New("bad field")
)

// Header opens every message.
type Header struct {
	Request Request
	Flags   uint32
	Size    uint32 // bytes of payload
}

// NeedReply reports whether the sender asks for an acknowledgement (REPLY_ACK).
func (h Header) NeedReply() bool { return h.Flags&FlagNeedReply != 0 }

// ParseHeader decodes the first HeaderSize bytes of a message.
func ParseHeader(p []byte) (Header, error) {
	if len(p) < HeaderSize {
		return Header{}, fmt.Errorf("header of %d bytes, want %d: %w", len(p), HeaderSize, ErrSize)
	}
	h := Header{
		Request: Request(binary.LittleEndian.Uint32(p)),
		Flags:   binary.LittleEndian.Uint32(p[4:]),
		Size:    binary.LittleEndian.Uint32(p[8:]),
	}
	if v := h.Flags & FlagVersionMask; v != FlagVersion {
		return h, fmt.Errorf("%v: version %d, want %d: %w", h.Request, v, FlagVersion, ErrVersion)
	}
	return h, nil
}

// AppendHeader encodes h.
func AppendHeader(dst []byte, h Header) []byte {
	dst = binary.LittleEndian.AppendUint32(dst, uint32(h.Request))
	dst = binary.LittleEndian.AppendUint32(dst, h.Flags)
	return binary.LittleEndian.AppendUint32(dst, h.Size)
}

// AppendMessage encodes a whole message; the size is the payload's, and the
// version is added to flags.
func AppendMessage(dst []byte, r Request, flags uint32, payload []byte) []byte {
	dst = AppendHeader(dst, Header{Request: r, Flags: flags | FlagVersion, Size: uint32(len(payload))})
	return append(dst, payload...)
}

// CheckRequest refuses a header from the front end that no valid request can
// have, before its payload is read.
func CheckRequest(h Header) error {
	l := requestLimits(h.Request)
	if l == nil {
		return fmt.Errorf("%v: %w", h.Request, ErrUnknown)
	}
	if h.Flags&FlagReply != 0 {
		return fmt.Errorf("%v: reply flag on a request: %w", h.Request, ErrFlags)
	}
	return checkSize(h, l.minSize, l.maxSize)
}

// CheckReply refuses a header from the back end that is no reply to want, or
// has a length that its payload can't have.
func CheckReply(h Header, want Request) error {
	if h.Request != want {
		return fmt.Errorf("%v: reply while waiting for one to %v: %w", h.Request, want, ErrUnknown)
	}
	if h.Flags&FlagReply == 0 {
		return fmt.Errorf("%v: reply without the reply flag: %w", h.Request, ErrFlags)
	}
	lo, hi := uint32(8), uint32(8) // u64: the payload of most replies and of REPLY_ACK
	switch want {
	case GetConfig:
		lo, hi = 0, MaxPayload // QEMU's docs: an empty payload is an error
	case GetInflightFD:
		lo, hi = inflightMinSize, inflightSize
	case SetLogBase:
		lo, hi = 0, 16
	}
	return checkSize(h, lo, hi)
}

// CheckFDs refuses a request that carries a number of descriptors that it
// can't have. SET_MEM_TABLE and the vring descriptors are checked further when
// the payload is known.
func CheckFDs(r Request, n int) error {
	l := requestLimits(r)
	if l == nil {
		return fmt.Errorf("%v: %w", r, ErrUnknown)
	}
	if n < int(l.minFDs) || n > int(l.maxFDs) {
		return fmt.Errorf("%v: %d file descriptors, want %s: %w", r, n, span(uint32(l.minFDs), uint32(l.maxFDs)), ErrFDs)
	}
	return nil
}

func checkSize(h Header, lo, hi uint32) error {
	if h.Size < lo || h.Size > hi {
		return fmt.Errorf("%v: payload of %d bytes, want %s: %w", h.Request, h.Size, span(lo, hi), ErrSize)
	}
	return nil
}

func span(lo, hi uint32) string {
	if lo == hi {
		return fmt.Sprint(lo)
	}
	return fmt.Sprintf("%d to %d", lo, hi)
}
