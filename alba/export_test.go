package alba

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
)

// FixManifestSum returns b with a checksum that fits, so that fuzzing gets behind it.
func FixManifestSum(b []byte) []byte {
	if len(b) < 4 {
		return b
	}
	b = bytes.Clone(b)
	body := b[:len(b)-4]
	binary.LittleEndian.PutUint32(b[len(b)-4:], crc32.Checksum(body, castagnoli))
	return b
}
