// Package tlog is the codec of the transaction log: fixed records of 32 bytes,
// one per cluster written, per discard and per mark, in the order of their
// reservation. It is pure: callers own the memory, which may be a shared mapping.
//
// # Layout (little endian)
//
//	0        8        16       20       24       28      32
//	├────────┼────────┼────────┼────────┼────────┼───────┤
//	│ lba    │ arg    │ data   │ durable│ type 8 │ crc   │
//	│ u64    │ u64    │ crc u32│ u32    │ cluster│ u32   │
//	└────────┴────────┴────────┴────────┴─24─────┴───────┘
//
// crc is the CRC32C of bytes 0 to 23 started from a value that mixes the SCO's
// key (volume and SCO number), the record's index and bytes 24 to 27. A record
// that lies elsewhere than where it was written, or is left over from another
// SCO, therefore fails its check.
//
// durable is a number of records of the same SCO that were known to be on stable
// storage when this one was written. Recovery uses the largest one it finds: a
// damaged record below it is corruption, at or above it the end of the log.
//
// # Publication
//
// Put stores bytes 24 to 31 last, with one atomic store. A reader on another
// thread, or a later process after kill -9, sees a record whole or not at all
// (Filled). Bytes 24 to 31 of memory that Put has not reached must be zero.
package tlog

import (
	"encoding/binary"
	"hash/crc32"

	"github.com/google/uuid"
)

// Size of a record in bytes.
const Size = 32

// Type says what a record records.
type Type uint8

const (
	// None marks memory that was never filled.
	None Type = iota
	// Open is record 0 of every SCO: LBA is the number of the SCO before it in
	// the log (0 for none), Arg the number of records which that one ended with,
	// DataCRC the low 32 bits of the owner's epoch.
	Open
	// Write: cluster LBA has the data in Cluster, with CRC DataCRC.
	Write
	// Relocate: as Write, but only if the map still says that LBA lies at Arg.
	Relocate
	// Discard: Arg clusters from LBA on read as zeroes.
	Discard
	// Void: a reservation that was not used. If Cluster is not NoCluster that
	// cluster holds nothing of value.
	Void
	maxType
)

// NoCluster is the Cluster of records without data.
const NoCluster = 1<<24 - 1

// Record is one decoded record.
type Record struct {
	Type    Type
	LBA     uint64 // cluster number
	Arg     uint64
	DataCRC uint32
	Durable uint32
	Cluster uint32 // cluster index within the SCO, or NoCluster
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// CRC returns the CRC32C of a cluster's data.
func CRC(p []byte) uint32 { return crc32.Update(0, castagnoli, p) }

// Key is the start value for the records of one SCO.
func Key(volume uuid.UUID, sco uint64) uint32 {
	var b [24]byte
	copy(b[:], volume[:])
	binary.LittleEndian.PutUint64(b[16:], sco)
	return crc32.Checksum(b[:], castagnoli)
}

func seed(key, index, word uint32) uint32 {
	return key ^ index*0x9e3779b1 ^ (word*0x85ebca6b + word>>15)
}

// Put writes r as record number index of the SCO with that key into the 32
// bytes at b, which must be 8-byte aligned. Any goroutine that owns the
// reservation may call it; it does not allocate.
func Put(b []byte, key, index uint32, r *Record) {
	_ = b[Size-1]
	binary.LittleEndian.PutUint64(b[0:], r.LBA)
	binary.LittleEndian.PutUint64(b[8:], r.Arg)
	binary.LittleEndian.PutUint64(b[16:], uint64(r.DataCRC)|uint64(r.Durable)<<32)
	word := uint32(r.Type)<<24 | r.Cluster&NoCluster
	crc := crc32.Update(seed(key, index, word), castagnoli, b[:24])
	publish(b[24:32], uint64(word)|uint64(crc)<<32)
}

// Filled reports whether Put has finished on the 32 bytes at b.
func Filled(b []byte) bool { return load(b[24:32]) != 0 }

// Get decodes and verifies record number index. ok is false if the bytes are not
// that record of that SCO.
func Get(b []byte, key, index uint32) (r Record, ok bool) {
	_ = b[Size-1]
	last := load(b[24:32])
	word, crc := uint32(last), uint32(last>>32)
	t := Type(word >> 24)
	if t == None || t >= maxType {
		return r, false
	}
	if crc32.Update(seed(key, index, word), castagnoli, b[:24]) != crc {
		return r, false
	}
	mid := binary.LittleEndian.Uint64(b[16:])
	return Record{
		Type:    t,
		LBA:     binary.LittleEndian.Uint64(b[0:]),
		Arg:     binary.LittleEndian.Uint64(b[8:]),
		DataCRC: uint32(mid),
		Durable: uint32(mid >> 32),
		Cluster: word & NoCluster,
	}, true
}

// HasData reports whether the record's Cluster holds a cluster's data.
func (r *Record) HasData() bool { return r.Type == Write || r.Type == Relocate }
