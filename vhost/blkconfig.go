package vhost

import (
	"encoding/binary"
	"math"

	"scoria/driver/block"
	"scoria/vhost/virtq"
	"scoria/vhost/wire"
)

// Feature bits of virtio-blk (virtio 1.1, 5.2.3).
const (
	featureSizeMax     uint64 = 1 << 1
	featureSegMax      uint64 = 1 << 2
	featureRO          uint64 = 1 << 5
	featureBlkSize     uint64 = 1 << 6
	featureFlush       uint64 = 1 << 9
	featureTopology    uint64 = 1 << 10
	featureConfigWCE   uint64 = 1 << 11
	featureMQ          uint64 = 1 << 12
	featureDiscard     uint64 = 1 << 13
	featureWriteZeroes uint64 = 1 << 14
)

const (
	baseFeatures = featureSizeMax | featureSegMax | featureBlkSize | featureFlush | featureTopology |
		featureConfigWCE | featureMQ |
		virtq.FeatureIndirect | virtq.FeatureEventIdx | virtq.FeatureVersion1 |
		wire.FeatureLogAll | wire.FeatureProtocolFeatures

	protocolFeatures = wire.ProtocolMQ | wire.ProtocolLogShmFD | wire.ProtocolReplyAck |
		wire.ProtocolBackendReq | wire.ProtocolConfig | wire.ProtocolInflightShmFD |
		wire.ProtocolResetDevice | wire.ProtocolConfigureMemSlots | wire.ProtocolStatus
)

// Limits that the configuration space announces. A request of segMax segments
// of sizeMax bytes stays below block.MaxRequestBytes; segMax leaves room for
// header and status in QEMU's default ring of 128.
const (
	segMax  = 126
	sizeMax = 256 << 10
)

// configSize is the length of struct virtio_blk_config up to
// write_zeroes_may_unmap and its padding; what lies behind reads as zeroes.
const configSize = 60

// wceOffset is where the one writable field lies.
const wceOffset = 32

// deviceFeatures are the bits offered for a device.
func deviceFeatures(info *block.Info) uint64 {
	f := baseFeatures
	if info.ReadOnly {
		return f | featureRO
	}
	return f | featureDiscard | featureWriteZeroes
}

// buildConfig fills the configuration space (virtio 1.1, 5.2.4).
func buildConfig(info *block.Info, queues int, writeCache bool) (c [configSize]byte) {
	le := binary.LittleEndian
	le.PutUint64(c[0:], info.Size/block.SectorSize)
	le.PutUint32(c[8:], sizeMax)
	le.PutUint32(c[12:], segMax)
	le.PutUint32(c[20:], info.LogicalBlock)
	exp := byte(0)
	for info.LogicalBlock<<(exp+1) <= info.PhysicalBlock {
		exp++
	}
	c[24] = exp                                                // physical_block_exp; alignment_offset is 0
	le.PutUint16(c[26:], 1<<exp)                               // min_io_size, in logical blocks
	le.PutUint32(c[28:], max(1<<exp, 65536/info.LogicalBlock)) // opt_io_size, likewise
	if writeCache {
		c[wceOffset] = 1
	}
	le.PutUint16(c[34:], uint16(queues))
	if info.ReadOnly {
		return c
	}
	sectors := maxDiscardSectors(info)
	le.PutUint32(c[36:], sectors)
	le.PutUint32(c[40:], 1) // max_discard_seg
	le.PutUint32(c[44:], max(info.DiscardAlignment, info.LogicalBlock)/block.SectorSize)
	le.PutUint32(c[48:], sectors)
	le.PutUint32(c[52:], 1) // max_write_zeroes_seg
	c[56] = 1               // write_zeroes_may_unmap
	return c
}

// maxDiscardSectors is the largest discard or write-zeroes request, in sectors:
// whole clusters.
func maxDiscardSectors(info *block.Info) uint32 {
	n := uint64(math.MaxUint32)
	if info.MaxDiscard != 0 {
		n = min(n, info.MaxDiscard/block.SectorSize)
	}
	const cluster = block.ClusterSize / block.SectorSize
	if n >= cluster {
		n &^= cluster - 1
	}
	return uint32(n)
}
