package disk

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"

	"scoria/alba/asd"
)

// A value file, all integers little-endian:
//
//	 0  "scoVALUE"
//	 8  u32 format version, 1
//	12  u32 block size, bytes
//	16  u64 size of the value, bytes
//	24  u64 id: the file's name
//	32  u32 sum of the value (asd.Value.Sum)
//	36  u32 CRC32C of bytes [0, end of the table) with this field zero
//	40  u32 offset of the data, bytes: a multiple of 4096
//	44  u16 length of the key, bytes
//	46  u16 0
//	48  key
//	    table: a u32 CRC32C per block of the value
//	    zeroes to the data's offset
//	    data: the value, to the end of the file
//
// The key makes a file useful alone, should the key-value store be lost.
const (
	fileMagic   = "scoVALUE"
	fileVersion = 1
	fileHead    = 48
	filePage    = 4096
	// maxFileHead bounds what is read to find the data: the largest key and the
	// largest table.
	maxFileHead = (fileHead + asd.MaxKeyBytes + 4*(asd.MaxValueBytes/asd.MinBlockSize) + filePage - 1) &^ (filePage - 1)
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// fileHeadBytes returns the offset of the data.
func fileHeadBytes(key string, blocks int) int {
	return (fileHead + len(key) + 4*blocks + filePage - 1) &^ (filePage - 1)
}

// fileBytes is the room that a value takes as a file.
func fileBytes(key string, size int64, blockSize int) int64 {
	data := (size + filePage - 1) &^ (filePage - 1)
	return int64(fileHeadBytes(key, asd.Blocks(size, blockSize))) + data
}

// encodeFileHead returns what precedes the data.
func encodeFileHead(id uint64, key string, v *asd.Value, sum uint32) []byte {
	b := make([]byte, fileHeadBytes(key, len(v.CRCs)))
	copy(b, fileMagic)
	le := binary.LittleEndian
	le.PutUint32(b[8:], fileVersion)
	le.PutUint32(b[12:], uint32(v.BlockSize))
	le.PutUint64(b[16:], uint64(len(v.Data)))
	le.PutUint64(b[24:], id)
	le.PutUint32(b[32:], sum)
	le.PutUint32(b[40:], uint32(len(b)))
	le.PutUint16(b[44:], uint16(len(key)))
	end := fileHead + copy(b[fileHead:], key)
	for _, c := range v.CRCs {
		le.PutUint32(b[end:], c)
		end += 4
	}
	le.PutUint32(b[36:], crc32.Checksum(b[:end], castagnoli))
	return b
}

// fileHeader is a decoded head.
type fileHeader struct {
	key       string
	id        uint64
	size      int64
	blockSize int
	sum       uint32
	dataOff   int64
	crcs      []uint32
}

// decodeFileHead reads the head at the beginning of b, which may hold more.
func decodeFileHead(b []byte) (fileHeader, error) {
	if len(b) < fileHead || string(b[:8]) != fileMagic {
		return fileHeader{}, fmt.Errorf("%w: no value file's head", errRecord)
	}
	le := binary.LittleEndian
	if v := le.Uint32(b[8:]); v != fileVersion {
		return fileHeader{}, fmt.Errorf("%w: value file of version %d, this program knows %d", errRecord, v, fileVersion)
	}
	h := fileHeader{
		blockSize: int(le.Uint32(b[12:])),
		size:      int64(le.Uint64(b[16:])),
		id:        le.Uint64(b[24:]),
		sum:       le.Uint32(b[32:]),
		dataOff:   int64(le.Uint32(b[40:])),
	}
	keyLen := int(le.Uint16(b[44:]))
	if h.blockSize < asd.MinBlockSize || h.blockSize > asd.MaxBlockSize || h.size < 0 || h.size > asd.MaxValueBytes || keyLen > asd.MaxKeyBytes {
		return fileHeader{}, fmt.Errorf("%w: head of a value file: size %d, block size %d, key of %d bytes", errRecord, h.size, h.blockSize, keyLen)
	}
	end := fileHead + keyLen + 4*asd.Blocks(h.size, h.blockSize)
	if len(b) < end || h.dataOff < int64(end) || h.dataOff%filePage != 0 || h.dataOff > maxFileHead {
		return fileHeader{}, fmt.Errorf("%w: head of a value file: %d bytes, data at %d, want room for %d", errRecord, len(b), h.dataOff, end)
	}
	var zero [4]byte
	crc := crc32.Checksum(b[:36], castagnoli)
	crc = crc32.Update(crc, castagnoli, zero[:])
	if crc = crc32.Update(crc, castagnoli, b[40:end]); crc != le.Uint32(b[36:]) {
		return fileHeader{}, fmt.Errorf("%w: head of a value file fails its checksum", errRecord)
	}
	h.key = string(b[fileHead : fileHead+keyLen])
	h.crcs = decodeCRCs(b[fileHead+keyLen : end])
	return h, nil
}
