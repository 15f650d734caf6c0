package dirstore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"

	"scoria/alba/vfs"
)

const (
	epochMagic   = "SCOEPOCH"
	epochVersion = 1
	epochBytes   = 32
)

// ErrEpochFile: a namespace's epoch file can't be understood, so nothing in the
// namespace may change.
var ErrEpochFile = errors.New("damaged epoch file")

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// encodeEpoch returns the epoch file's contents.
func encodeEpoch(epoch uint64) []byte {
	b := make([]byte, epochBytes)
	copy(b, epochMagic)
	binary.LittleEndian.PutUint32(b[8:], epochVersion)
	binary.LittleEndian.PutUint64(b[16:], epoch)
	binary.LittleEndian.PutUint32(b[28:], crc32.Checksum(b[:28], castagnoli))
	return b
}

// decodeEpoch is the inverse of encodeEpoch; it refuses anything else.
func decodeEpoch(b []byte) (uint64, error) {
	switch {
	case len(b) != epochBytes:
		return 0, fmt.Errorf("%w: %d bytes, want %d", ErrEpochFile, len(b), epochBytes)
	case string(b[:8]) != epochMagic:
		return 0, fmt.Errorf("%w: magic %q, want %q", ErrEpochFile, b[:8], epochMagic)
	case crc32.Checksum(b[:28], castagnoli) != binary.LittleEndian.Uint32(b[28:]):
		return 0, fmt.Errorf("%w: wrong checksum", ErrEpochFile)
	}
	if v := binary.LittleEndian.Uint32(b[8:]); v != epochVersion {
		return 0, fmt.Errorf("%w: format version %d, this program knows %d", ErrEpochFile, v, epochVersion)
	}
	if binary.LittleEndian.Uint32(b[12:])|binary.LittleEndian.Uint32(b[24:]) != 0 {
		return 0, fmt.Errorf("%w: reserved bytes are not zero", ErrEpochFile)
	}
	return binary.LittleEndian.Uint64(b[16:]), nil
}

// readEpoch returns the namespace's epoch, 0 before the first Fence.
func (s *Store) readEpoch(ns string) (uint64, error) {
	f, err := s.fs.Open(s.path(ns, "epoch"), vfs.ReadOnly)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer f.Close()
	buf := make([]byte, epochBytes+1)
	n, err := f.ReadAt(buf, 0)
	if err != nil && err != io.EOF {
		return 0, err
	}
	epoch, err := decodeEpoch(buf[:n])
	if err != nil {
		return 0, fmt.Errorf("%s: %w", s.path(ns, "epoch"), err)
	}
	return epoch, nil
}

// writeEpoch replaces the epoch file. The caller holds the namespace's lock and
// syncs its directory.
func (s *Store) writeEpoch(ns string, epoch uint64) error {
	temp := s.tempName()
	err := s.writeFile(temp, encodeEpoch(epoch))
	if err == nil {
		err = s.fs.Rename(temp, s.path(ns, "epoch"))
	}
	if err != nil {
		_ = s.fs.Remove(temp)
	}
	return err
}

// writeFile makes a small file with synced contents.
func (s *Store) writeFile(name string, contents []byte) error {
	f, err := s.fs.Open(name, vfs.Create|vfs.Exclusive)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(contents, 0)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}
