package asd

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// CRC returns the CRC32C of a block.
func CRC(block []byte) uint32 { return crc32.Checksum(block, castagnoli) }

// Value is the contents of a key with its checksums.
type Value struct {
	Data      []byte
	BlockSize int      // bytes, from MinBlockSize to MaxBlockSize
	CRCs      []uint32 // CRC32C of each block of Data
	checked   bool     // see CheckAsItComes and SealBlocks
}

// NewValue makes a value of data, which it keeps, in blocks of DefaultBlockSize.
func NewValue(data []byte) Value { return NewValueBlocks(data, DefaultBlockSize) }

// NewValueBlocks makes a value of data, which it keeps, in blocks of blockSize
// bytes. A writer whose readers fetch units of another size than 4096 (encrypted
// blocks with their tags, say) chooses that, so that a unit is one block.
func NewValueBlocks(data []byte, blockSize int) Value {
	v := Value{Data: data, BlockSize: blockSize, CRCs: make([]uint32, Blocks(int64(len(data)), blockSize))}
	for i := range v.CRCs {
		v.CRCs[i] = CRC(v.block(i))
	}
	return v
}

// SealBlocks is NewValueBlocks for a writer that hands the value on at once and changes
// none of data's bytes any more: Check believes the checksums, so that an ASD in this
// process does not compute them a second time. Should a byte change all the
// same, whoever reads the value finds out; an ASD behind a network does when it comes.
func SealBlocks(data []byte, blockSize int) Value {
	v := NewValueBlocks(data, blockSize)
	v.checked = true
	return v
}

// Blocks returns how many blocks a value of size bytes has.
func Blocks(size int64, blockSize int) int {
	return int((size + int64(blockSize) - 1) / int64(blockSize))
}

func (v *Value) block(i int) []byte {
	return v.Data[i*v.BlockSize : min((i+1)*v.BlockSize, len(v.Data))]
}

// Check verifies the sizes (CheckSizes) and the data against the checksums: a
// *CorruptError names the first bad block of key.
func (v *Value) Check(key string) error {
	if err := v.CheckSizes(key); err != nil {
		return err
	}
	if v.checked {
		return nil
	}
	for i, want := range v.CRCs {
		if b := v.block(i); CRC(b) != want {
			return &CorruptError{Key: key, Off: int64(i) * int64(v.BlockSize), Size: int64(len(b)), Reason: "fails its checksum"}
		}
	}
	return nil
}

// CheckAsItComes has fill read Data, piece after piece in order, and verifies each right
// behind it, while it is in the CPU's cache. If all are sound, Check of this value says so
// from then on without another look; else Check will tell what is wrong. The sizes must
// agree (CheckSizes). The error is fill's.
func (v *Value) CheckAsItComes(fill func(piece []byte) error) error {
	if len(v.CRCs) == 0 {
		return nil
	}
	const pieceBytes = 256 << 10
	blocks := max(1, pieceBytes/v.BlockSize)
	sound := true
	for i := 0; i < len(v.CRCs); i += blocks {
		last := min(i+blocks, len(v.CRCs))
		if err := fill(v.Data[i*v.BlockSize : min(last*v.BlockSize, len(v.Data))]); err != nil {
			return err
		}
		for j := i; j < last && sound; j++ {
			sound = CRC(v.block(j)) == v.CRCs[j]
		}
	}
	v.checked = sound
	return nil
}

// CheckSizes returns ErrInvalid if sizes are out of range or don't agree.
func (v *Value) CheckSizes(key string) error {
	switch {
	case v.BlockSize < MinBlockSize || v.BlockSize > MaxBlockSize:
		return fmt.Errorf("%w: key %q: block size %d, want %d to %d", ErrInvalid, key, v.BlockSize, MinBlockSize, MaxBlockSize)
	case len(v.Data) > MaxValueBytes:
		return fmt.Errorf("%w: key %q: value of %d bytes, want at most %d", ErrInvalid, key, len(v.Data), MaxValueBytes)
	case len(v.CRCs) != Blocks(int64(len(v.Data)), v.BlockSize):
		return fmt.Errorf("%w: key %q: %d checksums for %d blocks", ErrInvalid, key, len(v.CRCs), Blocks(int64(len(v.Data)), v.BlockSize))
	}
	return nil
}

// Sum identifies the contents of a value by 32 bits: the CRC32C of its size (8
// bytes), its block size (4) and its checksums (4 each), all little-endian.
func (v *Value) Sum() uint32 { return SumOf(int64(len(v.Data)), v.BlockSize, v.CRCs) }

// SumOf is Value.Sum from a value's size, block size and checksums.
func SumOf(size int64, blockSize int, crcs []uint32) uint32 {
	var head [12]byte
	binary.LittleEndian.PutUint64(head[:], uint64(size))
	binary.LittleEndian.PutUint32(head[8:], uint32(blockSize))
	sum := crc32.Update(0, castagnoli, head[:])
	var buf [512]byte
	for len(crcs) > 0 {
		n := min(len(crcs), len(buf)/4)
		for i, c := range crcs[:n] {
			binary.LittleEndian.PutUint32(buf[4*i:], c)
		}
		sum = crc32.Update(sum, castagnoli, buf[:4*n])
		crcs = crcs[n:]
	}
	return sum
}
