package wire

import (
	"encoding/binary"
	"fmt"
)

// VringState is an index and a number: ring size, ring base, enable.
type VringState struct {
	Index, Num uint32
}

// VringAddr holds the addresses of a ring: "user addresses" of the front end,
// but Log, which is a guest-physical address.
type VringAddr struct {
	Index, Flags           uint32
	Desc, Used, Avail, Log uint64
}

// VringFD is the payload that goes with a kick, call or error descriptor.
type VringFD struct {
	Index uint8
	NoFD  bool // no descriptor is passed: the front end polls, or wants polling
}

// Region is a range of guest memory inside a file.
type Region struct {
	GuestAddr  uint64
	Size       uint64 // bytes
	UserAddr   uint64 // where the front end has it mapped
	MmapOffset uint64 // bytes from the start of the file
}

// Log describes the area for the dirty bitmap.
type Log struct {
	Size, Offset uint64 // bytes
}

// Config is a part of the virtio configuration space.
type Config struct {
	Offset uint32
	Flags  uint32
	Data   []byte // what is set; in a request to get, as long as what is wanted
}

// Inflight describes the area that tracks requests in flight.
type Inflight struct {
	MmapSize, MmapOffset uint64 // bytes
	Queues, QueueSize    uint16
}

func need(r Request, p []byte, n int) error {
	if len(p) != n {
		return fmt.Errorf("%v: payload of %d bytes, want %d: %w", r, len(p), n, ErrSize)
	}
	return nil
}

// DecodeU64 decodes the payload of r, a single number.
func DecodeU64(r Request, p []byte) (uint64, error) {
	if err := need(r, p, 8); err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint64(p), nil
}

// AppendU64 encodes a single number.
func AppendU64(dst []byte, v uint64) []byte { return binary.LittleEndian.AppendUint64(dst, v) }

// DecodeVringState decodes the payload of r.
func DecodeVringState(r Request, p []byte) (VringState, error) {
	if err := need(r, p, 8); err != nil {
		return VringState{}, err
	}
	return VringState{Index: binary.LittleEndian.Uint32(p), Num: binary.LittleEndian.Uint32(p[4:])}, nil
}

// Append encodes s.
func (s VringState) Append(dst []byte) []byte {
	dst = binary.LittleEndian.AppendUint32(dst, s.Index)
	return binary.LittleEndian.AppendUint32(dst, s.Num)
}

// DecodeVringAddr decodes the payload of SET_VRING_ADDR.
func DecodeVringAddr(p []byte) (VringAddr, error) {
	if err := need(SetVringAddr, p, vringAddrSize); err != nil {
		return VringAddr{}, err
	}
	le := binary.LittleEndian
	return VringAddr{
		Index: le.Uint32(p), Flags: le.Uint32(p[4:]),
		Desc: le.Uint64(p[8:]), Used: le.Uint64(p[16:]), Avail: le.Uint64(p[24:]), Log: le.Uint64(p[32:]),
	}, nil
}

// Append encodes a.
func (a VringAddr) Append(dst []byte) []byte {
	le := binary.LittleEndian
	dst = le.AppendUint32(dst, a.Index)
	dst = le.AppendUint32(dst, a.Flags)
	dst = le.AppendUint64(dst, a.Desc)
	dst = le.AppendUint64(dst, a.Used)
	dst = le.AppendUint64(dst, a.Avail)
	return le.AppendUint64(dst, a.Log)
}

// noFD is bit 8 of the payload, behind the ring's index in bits 0 to 7.
const noFD = 1 << 8

// DecodeVringFD decodes the payload of SET_VRING_KICK, CALL or ERR and checks
// it against the number of descriptors that came along.
func DecodeVringFD(r Request, p []byte, fds int) (VringFD, error) {
	v, err := DecodeU64(r, p)
	if err != nil {
		return VringFD{}, err
	}
	if v&^(noFD|0xff) != 0 {
		return VringFD{}, fmt.Errorf("%v: payload %#x: only bits 0 to 8 may be set: %w", r, v, ErrField)
	}
	f := VringFD{Index: uint8(v), NoFD: v&noFD != 0}
	want := 1
	if f.NoFD {
		want = 0
	}
	if fds != want {
		return f, fmt.Errorf("%v of ring %d: %d file descriptors, want %d: %w", r, f.Index, fds, want, ErrFDs)
	}
	return f, nil
}

// Append encodes f.
func (f VringFD) Append(dst []byte) []byte {
	v := uint64(f.Index)
	if f.NoFD {
		v |= noFD
	}
	return AppendU64(dst, v)
}

// DecodeMemTable decodes the payload of SET_MEM_TABLE and checks the number of
// regions against its length and against the number of descriptors.
func DecodeMemTable(p []byte, fds int) ([]Region, error) {
	if len(p) < 8 {
		return nil, fmt.Errorf("%v: payload of %d bytes, want at least 8: %w", SetMemTable, len(p), ErrSize)
	}
	n := binary.LittleEndian.Uint32(p)
	if n > MaxMemTableRegions {
		return nil, fmt.Errorf("%v: %d regions, want at most %d: %w", SetMemTable, n, MaxMemTableRegions, ErrField)
	}
	if int(n) != fds {
		return nil, fmt.Errorf("%v: %d file descriptors for %d regions: %w", SetMemTable, fds, n, ErrFDs)
	}
	// Some front ends always send room for all regions.
	if len(p) < 8+int(n)*regionSize {
		return nil, fmt.Errorf("%v: payload of %d bytes, want %d for %d regions: %w", SetMemTable, len(p), 8+n*regionSize, n, ErrSize)
	}
	regions := make([]Region, n)
	for i := range regions {
		regions[i] = decodeRegion(p[8+i*regionSize:])
		if err := regions[i].check(SetMemTable); err != nil {
			return nil, err
		}
	}
	return regions, nil
}

// AppendMemTable encodes the payload of SET_MEM_TABLE.
func AppendMemTable(dst []byte, regions []Region) []byte {
	dst = binary.LittleEndian.AppendUint32(dst, uint32(len(regions)))
	dst = binary.LittleEndian.AppendUint32(dst, 0)
	for _, r := range regions {
		dst = r.append(dst)
	}
	return dst
}

// DecodeRegion decodes the payload of ADD_MEM_REG or REM_MEM_REG.
func DecodeRegion(r Request, p []byte) (Region, error) {
	if err := need(r, p, 8+regionSize); err != nil {
		return Region{}, err
	}
	reg := decodeRegion(p[8:])
	return reg, reg.check(r)
}

// AppendRegion encodes the payload of ADD_MEM_REG or REM_MEM_REG.
func AppendRegion(dst []byte, r Region) []byte {
	return r.append(binary.LittleEndian.AppendUint64(dst, 0))
}

func decodeRegion(p []byte) Region {
	le := binary.LittleEndian
	return Region{GuestAddr: le.Uint64(p), Size: le.Uint64(p[8:]), UserAddr: le.Uint64(p[16:]), MmapOffset: le.Uint64(p[24:])}
}

func (r Region) append(dst []byte) []byte {
	le := binary.LittleEndian
	dst = le.AppendUint64(dst, r.GuestAddr)
	dst = le.AppendUint64(dst, r.Size)
	dst = le.AppendUint64(dst, r.UserAddr)
	return le.AppendUint64(dst, r.MmapOffset)
}

// check refuses empty regions and sums that overflow. Offsets are file
// offsets and must stay positive as such.
func (r Region) check(req Request) error {
	switch {
	case r.Size == 0:
		return fmt.Errorf("%v: region at %#x is empty: %w", req, r.GuestAddr, ErrField)
	case r.GuestAddr+r.Size < r.GuestAddr:
		return fmt.Errorf("%v: guest address %#x plus size %#x overflows: %w", req, r.GuestAddr, r.Size, ErrField)
	case r.UserAddr+r.Size < r.UserAddr:
		return fmt.Errorf("%v: user address %#x plus size %#x overflows: %w", req, r.UserAddr, r.Size, ErrField)
	case !fileRange(r.MmapOffset, r.Size):
		return fmt.Errorf("%v: mmap offset %#x plus size %#x overflows: %w", req, r.MmapOffset, r.Size, ErrField)
	}
	return nil
}

// fileRange reports whether [off, off+n) can lie inside a file.
func fileRange(off, n uint64) bool {
	const maxFile = 1 << 62
	return off <= maxFile && n <= maxFile
}

// DecodeLog decodes the payload of SET_LOG_BASE with LOG_SHMFD.
func DecodeLog(p []byte) (Log, error) {
	if err := need(SetLogBase, p, 16); err != nil {
		return Log{}, err
	}
	l := Log{Size: binary.LittleEndian.Uint64(p), Offset: binary.LittleEndian.Uint64(p[8:])}
	if l.Size == 0 || !fileRange(l.Offset, l.Size) {
		return l, fmt.Errorf("%v: log of %#x bytes at %#x: empty or overflowing: %w", SetLogBase, l.Size, l.Offset, ErrField)
	}
	return l, nil
}

// Append encodes l.
func (l Log) Append(dst []byte) []byte {
	return binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(dst, l.Size), l.Offset)
}

// DecodeConfig decodes the payload of GET_CONFIG or SET_CONFIG; Data aliases p.
func DecodeConfig(r Request, p []byte) (Config, error) {
	if len(p) < configHeaderSize {
		return Config{}, fmt.Errorf("%v: payload of %d bytes, want at least %d: %w", r, len(p), configHeaderSize, ErrSize)
	}
	le := binary.LittleEndian
	c := Config{Offset: le.Uint32(p), Flags: le.Uint32(p[8:])}
	size := le.Uint32(p[4:])
	if size > MaxConfigSize || c.Offset > MaxConfigSize || c.Offset+size > MaxConfigSize {
		return c, fmt.Errorf("%v: %d bytes at %d: want at most %d in all: %w", r, size, c.Offset, MaxConfigSize, ErrField)
	}
	if uint32(len(p)-configHeaderSize) != size {
		return c, fmt.Errorf("%v: %d bytes announced, %d sent: %w", r, size, len(p)-configHeaderSize, ErrSize)
	}
	c.Data = p[configHeaderSize:]
	return c, nil
}

// Append encodes c.
func (c Config) Append(dst []byte) []byte {
	le := binary.LittleEndian
	dst = le.AppendUint32(dst, c.Offset)
	dst = le.AppendUint32(dst, uint32(len(c.Data)))
	dst = le.AppendUint32(dst, c.Flags)
	return append(dst, c.Data...)
}

// DecodeInflight decodes the payload of GET_INFLIGHT_FD or SET_INFLIGHT_FD.
func DecodeInflight(r Request, p []byte) (Inflight, error) {
	if len(p) < inflightMinSize || len(p) > inflightSize {
		return Inflight{}, fmt.Errorf("%v: payload of %d bytes, want %d to %d: %w", r, len(p), inflightMinSize, inflightSize, ErrSize)
	}
	le := binary.LittleEndian
	f := Inflight{MmapSize: le.Uint64(p), MmapOffset: le.Uint64(p[8:]), Queues: le.Uint16(p[16:]), QueueSize: le.Uint16(p[18:])}
	if !fileRange(f.MmapOffset, f.MmapSize) {
		return f, fmt.Errorf("%v: mmap offset %#x plus size %#x overflows: %w", r, f.MmapOffset, f.MmapSize, ErrField)
	}
	return f, nil
}

// Append encodes f with its padding, as QEMU does.
func (f Inflight) Append(dst []byte) []byte {
	le := binary.LittleEndian
	dst = le.AppendUint64(dst, f.MmapSize)
	dst = le.AppendUint64(dst, f.MmapOffset)
	dst = le.AppendUint16(dst, f.Queues)
	dst = le.AppendUint16(dst, f.QueueSize)
	return le.AppendUint32(dst, 0)
}
