package client

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// Request types (virtio 1.2, 5.2.6).
const (
	TypeIn          uint32 = 0  // read
	TypeOut         uint32 = 1  // write
	TypeFlush       uint32 = 4  //
	TypeGetID       uint32 = 8  // 20 bytes, read
	TypeDiscard     uint32 = 11 // one 16-byte segment, written
	TypeWriteZeroes uint32 = 13 // one 16-byte segment, written
)

// Status bytes (virtio 1.2, 5.2.6). StatusNone is what the client puts there
// before it submits, and what it finds if the server forgot to write one.
const (
	StatusOK     uint8 = 0
	StatusIOErr  uint8 = 1
	StatusUnsupp uint8 = 2
	StatusNone   uint8 = 0xff
)

// Device feature bits of virtio-blk (virtio 1.2, 5.2.3) and of rings and vhost
// that this client knows.
const (
	FeatureSizeMax          = 1 << 1
	FeatureSegMax           = 1 << 2
	FeatureReadOnly         = 1 << 5
	FeatureBlkSize          = 1 << 6
	FeatureFlush            = 1 << 9
	FeatureTopology         = 1 << 10
	FeatureConfigWCE        = 1 << 11
	FeatureMQ               = 1 << 12
	FeatureDiscard          = 1 << 13
	FeatureWriteZeroes      = 1 << 14
	FeatureLogAll           = 1 << 26
	FeatureIndirectDesc     = 1 << 28
	FeatureEventIdx         = 1 << 29
	FeatureProtocolFeatures = 1 << 30
	FeatureVersion1         = 1 << 32
)

// knownFeatures is what the client asks for if the server offers it.
// FeatureLogAll is added by StartLog only, as a front end does that migrates.
const knownFeatures = FeatureSizeMax | FeatureSegMax | FeatureReadOnly | FeatureBlkSize | FeatureFlush |
	FeatureTopology | FeatureConfigWCE | FeatureMQ | FeatureDiscard | FeatureWriteZeroes |
	FeatureIndirectDesc | FeatureEventIdx | FeatureProtocolFeatures | FeatureVersion1

// sectorSize is the unit of every address in virtio-blk.
const sectorSize = 512

// idBytes is the length of a GET_ID answer.
const idBytes = 20

// StatusError is a request that the server ended with a status other than OK.
type StatusError struct{ Status uint8 }

func (e *StatusError) Error() string {
	switch e.Status {
	case StatusIOErr:
		return "server answered I/O error"
	case StatusUnsupp:
		return "server answered unsupported request"
	case StatusNone:
		return "server wrote no status"
	}
	return fmt.Sprintf("server answered status %d, which virtio-blk doesn't know", e.Status)
}

// StatusErr is nil for StatusOK and a *StatusError otherwise.
func StatusErr(status uint8) error {
	if status == StatusOK {
		return nil
	}
	return &StatusError{Status: status}
}

// ConfigBytes is the length of the virtio-blk config space up to and including
// the write-zeroes fields.
const ConfigBytes = 60

// Config offsets of single fields, for SetConfig.
const (
	ConfigOffsetCapacity  = 0
	ConfigOffsetWriteback = 32
)

// ErrConfigShort: a config space of fewer than 8 bytes has no capacity.
var ErrConfigShort = errors.New("config space is too short for a capacity")

// Config is the virtio-blk config space (virtio 1.2, 5.2.4). Fields that lie
// behind what the server sent are zero.
type Config struct {
	Capacity               uint64 // sectors of 512 bytes
	SizeMax                uint32 // bytes of one segment
	SegMax                 uint32 // data segments of one request
	BlkSize                uint32 // bytes of a logical block
	PhysicalBlockExp       uint8  // log2 of logical blocks per physical block
	AlignmentOffset        uint8
	MinIOSize              uint16 // logical blocks
	OptIOSize              uint32 // logical blocks
	Writeback              uint8  // 1: write cache on
	NumQueues              uint16
	MaxDiscardSectors      uint32
	MaxDiscardSeg          uint32
	DiscardSectorAlignment uint32
	MaxWriteZeroesSectors  uint32
	MaxWriteZeroesSeg      uint32
	WriteZeroesMayUnmap    uint8
}

// ParseConfig decodes a config space or a prefix of one.
func ParseConfig(b []byte) (Config, error) {
	if len(b) < 8 {
		return Config{}, fmt.Errorf("%w: %d bytes", ErrConfigShort, len(b))
	}
	var full [ConfigBytes]byte
	copy(full[:], b)
	le := binary.LittleEndian
	return Config{
		Capacity:               le.Uint64(full[0:]),
		SizeMax:                le.Uint32(full[8:]),
		SegMax:                 le.Uint32(full[12:]),
		BlkSize:                le.Uint32(full[20:]),
		PhysicalBlockExp:       full[24],
		AlignmentOffset:        full[25],
		MinIOSize:              le.Uint16(full[26:]),
		OptIOSize:              le.Uint32(full[28:]),
		Writeback:              full[32],
		NumQueues:              le.Uint16(full[34:]),
		MaxDiscardSectors:      le.Uint32(full[36:]),
		MaxDiscardSeg:          le.Uint32(full[40:]),
		DiscardSectorAlignment: le.Uint32(full[44:]),
		MaxWriteZeroesSectors:  le.Uint32(full[48:]),
		MaxWriteZeroesSeg:      le.Uint32(full[52:]),
		WriteZeroesMayUnmap:    full[56],
	}, nil
}
