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
// number of the next log and zeros for the rest. It is durable before the next log is
// begun, so that a log that another follows is damaged if it does not end like that.
//
// Pebble keeps logs whose contents are in tables to write them again. It opens only those
// that are not, when it starts, one after the other, and writes nothing before it has
// read them all: there they are checked, and a bad bit in another one does no harm.
const (
	walBlock      = 32 << 10
	walHead       = 11
	walSyncHead   = 19
	walFirstKind  = 5
	walFirstSync  = 9
	walLastKind   = 12
	walSuffix     = ".log"
	walMaskOffset = 0xa282ead8

	// Kinds come in fours: all of a record, its first, a middle, its last part.
	walParts    = 4
	walFull     = 0
	walLastPart = 3
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

// walEnd returns where the sound chunks of a log end, and where its last whole record
// does, which is the same unless the end of a record is missing.
func walEnd(b []byte, number uint32) (end, whole int64) {
	off, size := int64(0), int64(len(b))
	for {
		if left := walBlock - off%walBlock; left < walSyncHead && allZero(b[min(off, size):min(off+left, size)]) {
			if whole == off {
				whole += left
			}
			off += left // too small for a chunk
		}
		end, _, ok := walChunk(b, off, number)
		if !ok {
			return min(off, size), min(whole, size)
		}
		if part := (b[off+6] - walFirstKind) % walParts; part == walFull || part == walLastPart {
			whole = end
		}
		off = end
	}
}

// walEnded says whether Pebble's mark of the end of a log is at off, and nothing else.
func walEnded(b []byte, off int64, number uint32) bool {
	return off+walHead == int64(len(b)) && allZero(b[off:off+6]) && b[off+6] == walFirstKind && binary.LittleEndian.Uint32(b[off+7:]) == number+1
}

// walClosed says whether Pebble would take what is at off for a log's end, and not for
// the death of its writer: it looks at the mark's kind and number only.
func walClosed(b []byte, off int64, number uint32) bool {
	if off == int64(len(b)) {
		return true
	}
	return off+walHead <= int64(len(b)) && b[off+6] >= walFirstKind && b[off+6] <= walLastKind && binary.LittleEndian.Uint32(b[off+7:]) == number+1
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// walDamage says whether a log is damaged for certain, and where; before that its last
// whole record ends. followed: there is a log with a larger number.
func walDamage(b []byte, number uint32, followed bool) (off, whole int64, damaged bool) {
	off, whole = walEnd(b, number)
	for i := off + 1; i < int64(len(b)); i++ {
		if _, durable, ok := walChunk(b, i, number); ok && durable > off {
			return off, whole, true
		}
	}
	return off, whole, followed && (whole != off || !walClosed(b, off, number))
}

// walNumber is a log's number by its file's name.
func walNumber(name string) (uint32, bool) {
	base, ok := strings.CutSuffix(path.Base(name), walSuffix)
	n, err := strconv.ParseUint(base, 10, 64)
	return uint32(n), ok && err == nil
}

// kvReplay looks at the logs that Pebble is about to read at its start. It is used by the
// goroutine that opens the key-value store.
type kvReplay struct {
	salvage bool
	cut     func(text string) // told of each log that was cut
	err     error             // why one was not given to Pebble, which has its own words for it
}

// check refuses a log that is damaged for certain: what was acknowledged would be
// missing, and old values in the place of new ones. With salvage it is cut where the
// damage begins, and the whole file is kept under another name.
func (r *kvReplay) check(fsys vfs.FS, name string) error {
	number, ok := walNumber(name)
	if r == nil || !ok {
		return nil
	}
	r.err = r.checkLog(fsys, name, number)
	return r.err
}

func (r *kvReplay) checkLog(fsys vfs.FS, name string, number uint32) error {
	dir, base := path.Dir(name), path.Base(name)
	names, err := fsys.List(dir)
	if err != nil {
		return err
	}
	followed := slices.ContainsFunc(names, func(other string) bool {
		n, ok := walNumber(other)
		return ok && n > number
	})
	b, err := readAll(fsys, name)
	if err != nil {
		return err
	}
	off, whole, damaged := walDamage(b, number, followed)
	if !damaged {
		return nil
	}
	text := fmt.Sprintf("%s: damaged at byte %d of %d", base, off, len(b))
	if !r.salvage {
		return fmt.Errorf("%w: log of the key-value store: %s: what was acknowledged is lost from there on; replace this ASD and have its data rebuilt from others, "+
			"or, if there are none, `scoria-asd salvage` opens it without", asd.ErrCorrupt, text)
	}
	if err := replaceFile(fsys, dir, base+".damaged", b); err != nil {
		return err
	}
	if err := replaceFile(fsys, dir, base, b[:whole]); err != nil {
		return err
	}
	r.cut(text)
	return nil
}
