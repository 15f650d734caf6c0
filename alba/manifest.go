package alba

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"slices"
)

// ManifestVersion is the version that this program writes; it reads all up to it.
const ManifestVersion = 1

const manifestMagic = "ALBAMANI"

// MaxManifestBytes bounds an encoded manifest.
const MaxManifestBytes = 16 << 10

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Manifest says what an object is and where its shards are.
//
// Its bytes, all numbers little-endian, strings with their length in a byte before
// them:
//
//	"ALBAMANI"  version u16  k u8  m u8  c u8  x u8  domain u8
//	compression u8  encryption u8  shards u8  blockBytes u32  fragmentBytes u32
//	namespaceID 16  upload 16  epoch u64  size u64  stored u64  created i64
//	generation u64  namespace string  object string  preset string
//	device string × shards ("": the shard is missing)
//	CRC32C u32 of all before
type Manifest struct {
	Namespace   string
	NamespaceID ID
	Object      string
	Upload      ID // unique to the upload; part of the keys of its fragments
	Epoch       uint64
	Size        int64 // bytes of the object
	Created     int64 // Unix time in nanoseconds
	Generation  uint64
	Preset      string // under which it was stored

	Policy        Policy
	Domain        Domain
	Compression   Compression
	Encryption    Encryption
	BlockBytes    int   // of the object, per compressed and encrypted block
	FragmentBytes int   // of each chunk but the last
	Stored        int64 // bytes of the stream
	Shards        []string
}

// Layout of the object's stream.
func (m *Manifest) Layout() Layout {
	return Layout{K: m.Policy.K, M: m.Policy.M, FragmentBytes: m.FragmentBytes,
		Stored: m.Stored, Unit: Unit(m.Compression, m.Encryption)}
}

// Live is the number of shards that the manifest knows a device for.
func (m *Manifest) Live() int {
	n := 0
	for _, d := range m.Shards {
		if d != "" {
			n++
		}
	}
	return n
}

// Clone returns a copy that shares nothing.
func (m *Manifest) Clone() *Manifest {
	c := *m
	c.Shards = slices.Clone(m.Shards)
	return &c
}

// Encode returns the manifest's bytes. It panics on values that no upload makes.
func (m *Manifest) Encode() []byte {
	if err := m.check(); err != nil {
		panic(fmt.Sprintf("alba: manifest of %s/%s can't be encoded: %v", m.Namespace, m.Object, err))
	}
	b := make([]byte, 0, 256+len(m.Shards)*33)
	b = append(b, manifestMagic...)
	b = binary.LittleEndian.AppendUint16(b, ManifestVersion)
	b = append(b, byte(m.Policy.K), byte(m.Policy.M), byte(m.Policy.C), byte(m.Policy.X), byte(m.Domain),
		byte(m.Compression), byte(m.Encryption), byte(len(m.Shards)))
	b = binary.LittleEndian.AppendUint32(b, uint32(m.BlockBytes))
	b = binary.LittleEndian.AppendUint32(b, uint32(m.FragmentBytes))
	b = append(append(b, m.NamespaceID[:]...), m.Upload[:]...)
	for _, v := range []uint64{m.Epoch, uint64(m.Size), uint64(m.Stored), uint64(m.Created), m.Generation} {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	for _, s := range append([]string{m.Namespace, m.Object, m.Preset}, m.Shards...) {
		b = append(append(b, byte(len(s))), s...)
	}
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// DecodeManifest parses what Encode made: ErrRecord if it is damaged, ErrVersion if
// it is of a later version.
func DecodeManifest(b []byte) (*Manifest, error) {
	bad := func(format string, args ...any) (*Manifest, error) {
		return nil, fmt.Errorf("%w: manifest: %s", ErrRecord, fmt.Sprintf(format, args...))
	}
	if len(b) < len(manifestMagic)+2+4 || len(b) > MaxManifestBytes || string(b[:len(manifestMagic)]) != manifestMagic {
		return bad("%d bytes that are none", len(b))
	}
	body, sum := b[:len(b)-4], binary.LittleEndian.Uint32(b[len(b)-4:])
	if got := crc32.Checksum(body, castagnoli); got != sum {
		return bad("checksum %08x, want %08x", got, sum)
	}
	r := reader{b: body[len(manifestMagic):]}
	if v := r.u16(); v == 0 || v > ManifestVersion {
		return nil, fmt.Errorf("manifest of version %d, this program knows %d: %w", v, ManifestVersion, ErrVersion)
	}
	m := new(Manifest)
	m.Policy = Policy{K: int(r.u8()), M: int(r.u8()), C: int(r.u8()), X: int(r.u8())}
	m.Domain, m.Compression, m.Encryption = Domain(r.u8()), Compression(r.u8()), Encryption(r.u8())
	shards := int(r.u8())
	m.BlockBytes, m.FragmentBytes = int(r.u32()), int(r.u32())
	copy(m.NamespaceID[:], r.take(len(m.NamespaceID)))
	copy(m.Upload[:], r.take(len(m.Upload)))
	m.Epoch, m.Size, m.Stored = r.u64(), int64(r.u64()), int64(r.u64())
	m.Created, m.Generation = int64(r.u64()), r.u64()
	m.Namespace, m.Object, m.Preset = r.str(), r.str(), r.str()
	m.Shards = make([]string, shards)
	for i := range m.Shards {
		m.Shards[i] = r.str()
	}
	if r.short || len(r.b) > 0 {
		return bad("its parts do not add up to %d bytes", len(b))
	}
	if err := m.check(); err != nil {
		return bad("%v", err)
	}
	return m, nil
}

func (m *Manifest) check() error {
	if err := m.Policy.check(); err != nil {
		return err
	}
	if err := m.Layout().check(); err != nil {
		return err
	}
	if err := CheckName("namespace", m.Namespace); err != nil {
		return err
	}
	if err := CheckName("object", m.Object); err != nil {
		return err
	}
	if err := checkPresetName(m.Preset); err != nil {
		return err
	}
	switch {
	case len(m.Shards) != m.Policy.Shards():
		return fmt.Errorf("%d shards, must have k+m (%d)", len(m.Shards), m.Policy.Shards())
	case m.Size < 0 || m.Size > MaxObjectBytes:
		return fmt.Errorf("size %d: must be 0 to %d", m.Size, int64(MaxObjectBytes))
	case m.Domain >= domainCount || m.Compression >= compressionCount || m.Encryption >= encryptionCount:
		return fmt.Errorf("domain %d, compression %d, encryption %d: one of them is unknown", m.Domain, m.Compression, m.Encryption)
	case m.BlockBytes != m.blockBytes():
		return fmt.Errorf("blocks of %d bytes, must be %d", m.BlockBytes, m.blockBytes())
	case m.Compression == CompressNone && m.Encryption == EncryptNone && m.Stored != m.Size:
		return fmt.Errorf("%d bytes stored of %d", m.Stored, m.Size)
	case m.Stored < m.Size && m.Compression == CompressNone:
		return fmt.Errorf("%d bytes stored of %d", m.Stored, m.Size)
	}
	for _, d := range m.Shards {
		if d == "" {
			continue
		}
		if err := CheckDeviceID(d); err != nil {
			return err
		}
	}
	return nil
}

func (m *Manifest) blockBytes() int { return BlockBytes(m.Compression) }

// BlockBytes is the size of the blocks that are compressed and encrypted each alone.
func BlockBytes(c Compression) int {
	if c == CompressNone {
		return BlockSize
	}
	return CompressedBlock
}

// reader takes bytes off the front; after one take too many all are zero.
type reader struct {
	b     []byte
	short bool
}

var zeroes [64]byte

func (r *reader) take(n int) []byte {
	if n > len(r.b) {
		r.short, r.b = true, nil
		return zeroes[:min(n, len(zeroes))]
	}
	p := r.b[:n]
	r.b = r.b[n:]
	return p
}

func (r *reader) u8() byte    { return r.take(1)[0] }
func (r *reader) u16() uint16 { return binary.LittleEndian.Uint16(r.take(2)) }
func (r *reader) u32() uint32 { return binary.LittleEndian.Uint32(r.take(4)) }
func (r *reader) u64() uint64 { return binary.LittleEndian.Uint64(r.take(8)) }

func (r *reader) str() string {
	n := int(r.u8())
	if n > len(r.b) {
		r.short, r.b = true, nil
		return ""
	}
	return string(r.take(n))
}
