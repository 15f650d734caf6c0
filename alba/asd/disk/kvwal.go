package disk

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"path"
	"slices"
	"strconv"
	"strings"

	"scoria/alba/asd"
	"scoria/alba/vfs"
)

// Pebble's log is blocks of 32 KiB with chunks in them:
//
//	 0  u32 CRC32C of what follows, masked
//	 4  u16 length
//	 6  u8 kind: 5 to 8 recyclable, 9 to 12 with the offset
//	 7  u32 number of the log
//	11  u64 up to here the log was durable when the chunk was written; kinds 9 to 12
//	    data
//
// A chunk that fails its checksum is the end of a log whose writer died, or damage.
// It is damage for certain if a later chunk says that the log was durable there.
// Pebble looks for one in the blocks that follow, not within the block, and takes
// all behind the chunk for unwritten. Most logs are shorter than a block.
//
// A log that Pebble has ended has a head of kind 5 behind its last chunk, with the
// number of the next log and zeros for the rest.
const (
	walBlock      = 32 << 10
	walHead       = 11
	walSyncHead   = 19
	walFirstKind  = 5
	walFirstSync  = 9
	walLastKind   = 12
	walSuffix     = ".log"
	walMaskOffset = 0xa282ead8
)

var walTable = crc32.MakeTable(crc32.Castagnoli)

// walChunk reads the chunk at off of a log: its end and the offset that it says was
// durable (0 if it says none). ok is false if there is no sound one.
func walChunk(b []byte, off int64, number uint32) (end, durable int64, ok bool) {
	limit := min(int64(len(b)), (off/walBlock+1)*walBlock)
	if off+walHead > limit {
		return 0, 0, false
	}
	h := b[off:limit]
	kind := h[6]
	if kind < walFirstKind || kind > walLastKind || binary.LittleEndian.Uint32(h[7:]) != number {
		return 0, 0, false
	}
	head := int64(walHead)
	if kind >= walFirstSync {
		head = walSyncHead
	}
	end = off + head + int64(binary.LittleEndian.Uint16(h[4:]))
	if end > limit || off+head > limit {
		return 0, 0, false
	}
	sum := crc32.Checksum(b[off+6:end], walTable)
	if (sum>>15|sum<<17)+walMaskOffset != binary.LittleEndian.Uint32(h) {
		return 0, 0, false
	}
	if kind >= walFirstSync {
		durable = int64(binary.LittleEndian.Uint64(h[11:]))
	}
	return end, durable, true
}

// walEnd returns where the sound chunks of a log end.
func walEnd(b []byte, number uint32) int64 {
	off := int64(0)
	for {
		if left := walBlock - off%walBlock; left < walSyncHead && allZero(b[min(off, int64(len(b))):min(off+left, int64(len(b)))]) {
			off += left // too small for a chunk
		}
		end, _, ok := walChunk(b, off, number)
		if !ok {
			return min(off, int64(len(b)))
		}
		off = end
	}
}

// walEnded says whether Pebble's mark of the end of a log is at off, and nothing else.
func walEnded(b []byte, off int64, number uint32) bool {
	return off+walHead == int64(len(b)) && allZero(b[off:off+6]) && b[off+6] == walFirstKind && binary.LittleEndian.Uint32(b[off+7:]) == number+1
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// walDamage says whether a log is damaged for certain, and where.
func walDamage(b []byte, number uint32) (off int64, damaged bool) {
	off = walEnd(b, number)
	for i := off + 1; i < int64(len(b)); i++ {
		if _, durable, ok := walChunk(b, i, number); ok && durable > off {
			return off, true
		}
	}
	return off, false
}

// walNumber is a log's number by its file's name.
func walNumber(name string) (uint32, bool) {
	base, ok := strings.CutSuffix(path.Base(name), walSuffix)
	n, err := strconv.ParseUint(base, 10, 64)
	return uint32(n), ok && err == nil
}

// checkLogs refuses logs that are damaged for certain: what was acknowledged would be
// missing, and old values in the place of new ones. With salvage they are cut where
// the damage begins, and the whole file is kept under another name.
func checkLogs(fsys vfs.FS, dir string, salvage bool) (cut []string, err error) {
	names, err := fsys.List(dir)
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
	for _, name := range names {
		number, ok := walNumber(name)
		if !ok {
			continue
		}
		b, err := readAll(fsys, path.Join(dir, name))
		if err != nil {
			return cut, err
		}
		off, damaged := walDamage(b, number)
		if !damaged {
			continue
		}
		text := fmt.Sprintf("%s: damaged at byte %d of %d", name, off, len(b))
		if !salvage {
			return cut, fmt.Errorf("%w: log of the key-value store: %s: what was acknowledged is lost from there on; replace this ASD and have its data rebuilt from others, "+
				"or, if there are none, `scoria-asd salvage` opens it without", asd.ErrCorrupt, text)
		}
		if err := replaceFile(fsys, dir, name+".damaged", b); err != nil {
			return cut, err
		}
		if err := replaceFile(fsys, dir, name, b[:off]); err != nil {
			return cut, err
		}
		cut = append(cut, text)
	}
	return cut, nil
}
