package disk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"scoria/alba/asd"
)

// The keys of the key-value store begin with one of these bytes.
const (
	prefixKey   = 'k' // + key: a record
	prefixEpoch = 'e' // + namespace: its epoch, 8 bytes little-endian
	prefixFile  = 'f' // + id of a value file, 8 bytes big-endian: the key it is for
	prefixMeta  = 'm' // + name: what the ASD knows of itself
)

var metaKey = []byte{prefixMeta, 's'}

const (
	recordVersion = 1
	recordInline  = 1 // checksums and data follow
	recordFile    = 2 // the id of the value file follows
	recordAdopted = 3 // id and offset of the data in the file, and checksums, follow
	recordHead    = 18
	metaVersion   = 1
	metaBytes     = 2 + 16 + 4*8
)

var errRecord = errors.New("damaged record")

// record is what the key-value store holds under a key.
type record struct {
	size      int64
	blockSize int
	sum       uint32
	fileID    uint64 // 0: inline
	adopted   bool   // the file was somebody else's; it has no head
	fileOff   int64  // adopted: of the data in the file
	crcs      []byte // inline, adopted: 4 bytes little-endian each
	data      []byte // inline
}

// room is what the value's file takes, 0 if it has none.
func (r *record) room(key string) int64 {
	switch {
	case r.fileID == 0:
		return 0
	case r.adopted:
		return (r.size + filePage - 1) &^ (filePage - 1)
	}
	return fileBytes(key, r.size, r.blockSize)
}

func (r *record) info(key string) asd.Info {
	return asd.Info{Key: key, Exists: true, Size: r.size, BlockSize: r.blockSize, Sum: r.sum}
}

// appendRecordHead writes the first recordHead bytes of a record.
func appendRecordHead(b []byte, kind byte, blockSize int, size int64, sum uint32) []byte {
	b = append(b, recordVersion, kind)
	b = binary.LittleEndian.AppendUint32(b, uint32(blockSize))
	b = binary.LittleEndian.AppendUint64(b, uint64(size))
	return binary.LittleEndian.AppendUint32(b, sum)
}

func encodeInline(v *asd.Value, sum uint32) []byte {
	b := make([]byte, 0, recordHead+4*len(v.CRCs)+len(v.Data))
	b = appendRecordHead(b, recordInline, v.BlockSize, int64(len(v.Data)), sum)
	for _, c := range v.CRCs {
		b = binary.LittleEndian.AppendUint32(b, c)
	}
	return append(b, v.Data...)
}

func encodeFile(v *asd.Value, sum uint32, id uint64) []byte {
	b := appendRecordHead(make([]byte, 0, recordHead+8), recordFile, v.BlockSize, int64(len(v.Data)), sum)
	return binary.LittleEndian.AppendUint64(b, id)
}

func encodeAdopted(p *asd.FilePart, id uint64) []byte {
	sum := asd.SumOf(p.Size, asd.DefaultBlockSize, p.CRCs)
	b := appendRecordHead(make([]byte, 0, recordHead+16+4*len(p.CRCs)), recordAdopted, asd.DefaultBlockSize, p.Size, sum)
	b = binary.LittleEndian.AppendUint64(b, id)
	b = binary.LittleEndian.AppendUint64(b, uint64(p.Off))
	for _, c := range p.CRCs {
		b = binary.LittleEndian.AppendUint32(b, c)
	}
	return b
}

// decodeRecord reads a record; its slices are b's.
func decodeRecord(b []byte) (record, error) {
	if len(b) < recordHead || b[0] != recordVersion {
		return record{}, fmt.Errorf("%w: %d bytes, or not of version %d", errRecord, len(b), recordVersion)
	}
	r := record{
		blockSize: int(binary.LittleEndian.Uint32(b[2:])),
		size:      int64(binary.LittleEndian.Uint64(b[6:])),
		sum:       binary.LittleEndian.Uint32(b[14:]),
	}
	if r.blockSize < asd.MinBlockSize || r.blockSize > asd.MaxBlockSize || r.size < 0 || r.size > asd.MaxValueBytes {
		return record{}, fmt.Errorf("%w: size %d in blocks of %d", errRecord, r.size, r.blockSize)
	}
	rest := b[recordHead:]
	switch b[1] {
	case recordInline:
		table := 4 * asd.Blocks(r.size, r.blockSize)
		if int64(len(rest)) != int64(table)+r.size {
			return record{}, fmt.Errorf("%w: %d bytes behind the head, want %d", errRecord, len(rest), int64(table)+r.size)
		}
		r.crcs, r.data = rest[:table], rest[table:]
	case recordFile:
		if len(rest) != 8 {
			return record{}, fmt.Errorf("%w: %d bytes of file id", errRecord, len(rest))
		}
		if r.fileID = binary.LittleEndian.Uint64(rest); r.fileID == 0 {
			return record{}, fmt.Errorf("%w: file id 0", errRecord)
		}
	case recordAdopted:
		table := 4 * asd.Blocks(r.size, r.blockSize)
		if len(rest) != 16+table {
			return record{}, fmt.Errorf("%w: %d bytes behind the head, want %d", errRecord, len(rest), 16+table)
		}
		r.adopted, r.fileID, r.fileOff = true, binary.LittleEndian.Uint64(rest), int64(binary.LittleEndian.Uint64(rest[8:]))
		r.crcs = rest[16:]
		if r.fileID == 0 || r.fileOff < 0 || r.fileOff > math.MaxInt64-asd.MaxValueBytes || r.fileOff%filePage != 0 {
			return record{}, fmt.Errorf("%w: file id %d, data at %d", errRecord, r.fileID, r.fileOff)
		}
	default:
		return record{}, fmt.Errorf("%w: kind %d", errRecord, b[1])
	}
	return r, nil
}

// crc returns the checksum of block i of an inline record.
func (r *record) crc(i int) uint32 { return binary.LittleEndian.Uint32(r.crcs[4*i:]) }

func decodeCRCs(b []byte) []uint32 {
	crcs := make([]uint32, len(b)/4)
	for i := range crcs {
		crcs[i] = binary.LittleEndian.Uint32(b[4*i:])
	}
	return crcs
}

// meta is the record under metaKey; every commit rewrites it.
type meta struct {
	id        [16]byte
	keys      int64  // records
	bytes     int64  // of all values
	fileBytes int64  // that value files take
	reserved  uint64 // no file has this id or a larger one
}

func (m *meta) encode() []byte {
	b := append(make([]byte, 0, metaBytes), metaVersion, 0)
	b = append(b, m.id[:]...)
	b = binary.LittleEndian.AppendUint64(b, uint64(m.keys))
	b = binary.LittleEndian.AppendUint64(b, uint64(m.bytes))
	b = binary.LittleEndian.AppendUint64(b, uint64(m.fileBytes))
	return binary.LittleEndian.AppendUint64(b, m.reserved)
}

func decodeMeta(b []byte) (meta, error) {
	if len(b) != metaBytes || b[0] != metaVersion {
		return meta{}, fmt.Errorf("%w: %d bytes of ASD's state, or not of version %d", errRecord, len(b), metaVersion)
	}
	m := meta{id: [16]byte(b[2:18])}
	m.keys = int64(binary.LittleEndian.Uint64(b[18:]))
	m.bytes = int64(binary.LittleEndian.Uint64(b[26:]))
	m.fileBytes = int64(binary.LittleEndian.Uint64(b[34:]))
	m.reserved = binary.LittleEndian.Uint64(b[42:])
	return m, nil
}

func kvKey(prefix byte, name string) []byte {
	return append(append(make([]byte, 0, 1+len(name)), prefix), name...)
}

func kvFileKey(id uint64) []byte {
	return binary.BigEndian.AppendUint64([]byte{prefixFile}, id)
}
