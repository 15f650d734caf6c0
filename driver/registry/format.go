package registry

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"strconv"
)

// # File format, version 1
//
// buntdb's: a sequence of Redis commands, appended:
//
//	*3 CRLF $3 CRLF set CRLF $<n> CRLF <key> CRLF $<n> CRLF <value> CRLF
//	*2 CRLF $3 CRLF del CRLF $<n> CRLF <key> CRLF
//
// Keys are "k:" + the caller's key, or "journal". Values are binary, little endian:
//
//	  0        4    5          13
//	+--------+----+----------+---------------------------------+
//	| crc32c | 1  | revision | the caller's value              |   under k:…
//	+--------+----+----------+-------+-------------------------+
//	| crc32c | 1  | revision | count | count × write           |   under journal
//	+--------+----+----------+-------+-------------------------+
//	                         13      17
//	write: key length u32 | key | kind u8 (0 delete, 1 put) | value length u32 | value
//
// The checksum covers the key, then everything after itself.

const (
	formatVersion = 1
	headerBytes   = 4 + 1 + 8

	journalKey = "journal"
	keyPrefix  = "k:"

	kindDelete = 0
	kindPut    = 1

	maxCommandBytes = MaxWrites*(MaxKeyBytes+16) + 64<<20
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// journal is the last commit.
type journal struct {
	revision int64
	writes   []Write
}

func (j *journal) events() []Event {
	events := make([]Event, len(j.writes))
	for i, w := range j.writes {
		events[i] = Event{KV{Key: w.Key, Value: bytes.Clone(w.Value), Revision: j.revision}}
	}
	return events
}

func (j *journal) encode() []byte {
	b := make([]byte, headerBytes, 512)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(j.writes)))
	for _, w := range j.writes {
		b = binary.LittleEndian.AppendUint32(b, uint32(len(w.Key)))
		b = append(b, w.Key...)
		kind := byte(kindPut)
		if w.Value == nil {
			kind = kindDelete
		}
		b = append(b, kind)
		b = binary.LittleEndian.AppendUint32(b, uint32(len(w.Value)))
		b = append(b, w.Value...)
	}
	seal(journalKey, j.revision, b)
	return b
}

func decodeJournal(b []byte) (journal, error) {
	revision, body, err := unseal(journalKey, b)
	if err != nil {
		return journal{}, err
	}
	r := fieldReader{b: body}
	count := r.uint32()
	if count > MaxWrites {
		return journal{}, fmt.Errorf("%w: journal of %d writes", ErrCorrupt, count)
	}
	j := journal{revision: revision, writes: make([]Write, 0, count)}
	for range count {
		w := Write{Key: string(r.bytes(r.uint32()))}
		kind := r.bytes(1)
		value := r.bytes(r.uint32())
		if r.failed {
			break
		}
		switch {
		case kind[0] == kindPut:
			w.Value = append([]byte{}, value...)
		case kind[0] != kindDelete || len(value) > 0:
			return journal{}, fmt.Errorf("%w: journal of revision %d: write of kind %d with %d bytes", ErrCorrupt, revision, kind[0], len(value))
		}
		j.writes = append(j.writes, w)
	}
	if r.failed || len(r.b) != 0 {
		return journal{}, fmt.Errorf("%w: journal of revision %d has the wrong length", ErrCorrupt, revision)
	}
	return j, nil
}

func encodeValue(key string, revision int64, value []byte) []byte {
	b := make([]byte, headerBytes, headerBytes+len(value))
	b = append(b, value...)
	seal(key, revision, b)
	return b
}

func decodeValue(key string, b []byte) (revision int64, value []byte, err error) {
	revision, body, err := unseal(key, b)
	return revision, append([]byte{}, body...), err
}

func seal(key string, revision int64, b []byte) {
	b[4] = formatVersion
	binary.LittleEndian.PutUint64(b[5:], uint64(revision))
	binary.LittleEndian.PutUint32(b, checksum(key, b))
}

func unseal(key string, b []byte) (revision int64, body []byte, err error) {
	switch {
	case len(b) < headerBytes:
		return 0, nil, fmt.Errorf("%w: value of %s has %d bytes", ErrCorrupt, key, len(b))
	case binary.LittleEndian.Uint32(b) != checksum(key, b):
		return 0, nil, fmt.Errorf("%w: value of %s fails its checksum", ErrCorrupt, key)
	case b[4] != formatVersion:
		return 0, nil, fmt.Errorf("%w: value of %s has format %d, this program knows %d", ErrVersion, key, b[4], formatVersion)
	}
	return int64(binary.LittleEndian.Uint64(b[5:])), b[headerBytes:], nil
}

func checksum(key string, b []byte) uint32 {
	return crc32.Update(crc32.Checksum([]byte(key), castagnoli), castagnoli, b[4:])
}

// fieldReader takes fields off the front of b; failed says that b was too short.
type fieldReader struct {
	b      []byte
	failed bool
}

func (r *fieldReader) bytes(n uint32) []byte {
	if r.failed || uint64(n) > uint64(len(r.b)) {
		r.failed = true
		return nil
	}
	p := r.b[:n]
	r.b = r.b[n:]
	return p
}

func (r *fieldReader) uint32() uint32 {
	p := r.bytes(4)
	if r.failed {
		return 0
	}
	return binary.LittleEndian.Uint32(p)
}

// repairTail cuts off what the loss of power left of unsynced commands at the
// end of the file. Everything up to the sync of commit N is intact after any
// crash, and journal N+1 is written after that sync; so behind damage at most one
// journal can follow, N+1 (the damage being in the application of N). If a later
// one does, committed data is damaged: ErrCorrupt, nothing is changed.
func repairTail(path string) error {
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	good, last, err := scan(b)
	if err != nil || good == len(b) {
		return err
	}
	if later := laterJournal(b[good:], last+1); later != 0 {
		return fmt.Errorf("%w at byte %d, in front of commit %d (the last good one is %d): restore the file from a backup", ErrCorrupt, good, later, last)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(int64(good)), f.Sync(), f.Close())
}

// scan returns how many bytes of b are whole, valid commands, and the revision
// of the last journal among them. Its only error is ErrVersion.
func scan(b []byte) (good int, revision int64, err error) {
	for good < len(b) {
		args, n, err := parseCommand(b[good:])
		if err != nil {
			return good, revision, nil
		}
		if len(args) == 3 {
			rev, _, err := unseal(string(args[1]), args[2])
			if errors.Is(err, ErrVersion) {
				return good, revision, err
			}
			if err != nil {
				return good, revision, nil
			}
			if string(args[1]) == journalKey {
				revision = rev
			}
		}
		good += n
	}
	return good, revision, nil
}

// laterJournal looks in damaged bytes for a valid journal with a revision above
// limit and returns that revision, or 0.
func laterJournal(b []byte, limit int64) int64 {
	start := []byte("*3\r\n$3\r\nset\r\n$" + strconv.Itoa(len(journalKey)) + "\r\n" + journalKey + "\r\n")
	for {
		i := bytes.Index(b, start)
		if i < 0 {
			return 0
		}
		b = b[i:]
		if args, _, err := parseCommand(b); err == nil {
			if rev, _, err := unseal(journalKey, args[2]); err == nil && rev > limit {
				return rev
			}
		}
		b = b[1:]
	}
}

// parseCommand takes the first command off b: set with two arguments or del
// with one, as this store makes buntdb write them.
func parseCommand(b []byte) (args [][]byte, n int, err error) {
	rest := b
	count, rest, err := parseNumber(rest, '*', 3)
	if err != nil {
		return nil, 0, err
	}
	for range count {
		var length int
		length, rest, err = parseNumber(rest, '$', maxCommandBytes)
		if err != nil {
			return nil, 0, err
		}
		if len(rest) < length+2 || rest[length] != '\r' || rest[length+1] != '\n' {
			return nil, 0, io.ErrUnexpectedEOF
		}
		args = append(args, rest[:length])
		rest = rest[length+2:]
	}
	set := len(args) == 3 && string(args[0]) == "set"
	del := len(args) == 2 && string(args[0]) == "del"
	if !set && !del || bytes.IndexByte(args[1], 0) >= 0 {
		return nil, 0, fmt.Errorf("%w: unknown command", ErrCorrupt)
	}
	return args, len(b) - len(rest), nil
}

// parseNumber takes "<mark><decimal>\r\n" off b.
func parseNumber(b []byte, mark byte, limit int) (n int, rest []byte, err error) {
	line, _, ok := bytes.Cut(b[:min(len(b), 16)], []byte("\r\n"))
	if !ok || len(line) < 2 || line[0] != mark {
		return 0, nil, io.ErrUnexpectedEOF
	}
	for _, c := range line[1:] {
		if c < '0' || c > '9' {
			return 0, nil, io.ErrUnexpectedEOF
		}
		n = n*10 + int(c-'0')
	}
	if n > limit {
		return 0, nil, io.ErrUnexpectedEOF
	}
	return n, b[len(line)+2:], nil
}
