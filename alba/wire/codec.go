package wire

import (
	"encoding/binary"

	"scoria/alba/asd"
)

// encoder builds a body behind room for the header, and collects the data.
type encoder struct {
	b    []byte
	data [][]byte
}

func newEncoder(size int) *encoder { return &encoder{b: make([]byte, HeaderBytes, HeaderBytes+size)} }

func (e *encoder) u8(v uint8)   { e.b = append(e.b, v) }
func (e *encoder) u32(v uint32) { e.b = binary.LittleEndian.AppendUint32(e.b, v) }
func (e *encoder) u64(v uint64) { e.b = binary.LittleEndian.AppendUint64(e.b, v) }

func (e *encoder) flag(v bool) {
	if v {
		e.u8(1)
	} else {
		e.u8(0)
	}
}

// maxStr bounds a str. Keys and namespaces are checked before they get here;
// longer texts of errors are cut.
const maxStr = 1<<16 - 1

func (e *encoder) str(s string) {
	s = s[:min(len(s), maxStr)]
	e.b = binary.LittleEndian.AppendUint16(e.b, uint16(len(s)))
	e.b = append(e.b, s...)
}

func (e *encoder) blob(p []byte) {
	e.u32(uint32(len(p)))
	e.b = append(e.b, p...)
}

func (e *encoder) strs(s []string) {
	e.u32(uint32(len(s)))
	for _, k := range s {
		e.str(k)
	}
}

func (e *encoder) crcs(crcs []uint32) {
	for _, c := range crcs {
		e.u32(c)
	}
}

func (e *encoder) value(v *asd.Value) {
	e.u32(uint32(v.BlockSize))
	e.u64(uint64(len(v.Data)))
	e.crcs(v.CRCs)
	e.data = append(e.data, v.Data)
}

func (e *encoder) infos(infos []asd.Info) {
	e.u32(uint32(len(infos)))
	for i := range infos {
		f := &infos[i]
		e.str(f.Key)
		e.flag(f.Exists)
		e.u64(uint64(f.Size))
		e.u32(uint32(f.BlockSize))
		e.u32(f.Sum)
	}
}

// decoder reads a body and the data. Its first error sticks.
type decoder struct {
	b    []byte
	data []byte
	err  error
}

func (d *decoder) fail(format string, args ...any) {
	if d.err == nil {
		d.err = protocolError(format, args...)
		d.b, d.data = nil, nil
	}
}

func (d *decoder) take(n int) []byte {
	if n < 0 || n > len(d.b) {
		d.fail("a body is too short")
		return nil
	}
	p := d.b[:n]
	d.b = d.b[n:]
	return p
}

func (d *decoder) u8() uint8 {
	if p := d.take(1); p != nil {
		return p[0]
	}
	return 0
}

func (d *decoder) u16() uint16 {
	if p := d.take(2); p != nil {
		return binary.LittleEndian.Uint16(p)
	}
	return 0
}

func (d *decoder) u32() uint32 {
	if p := d.take(4); p != nil {
		return binary.LittleEndian.Uint32(p)
	}
	return 0
}

func (d *decoder) u64() uint64 {
	if p := d.take(8); p != nil {
		return binary.LittleEndian.Uint64(p)
	}
	return 0
}

// i64 reads a size or an offset.
func (d *decoder) i64() int64 {
	v := d.u64()
	if v > 1<<62 {
		d.fail("number %d is out of range", v)
		return 0
	}
	return int64(v)
}

func (d *decoder) flag() bool {
	v := d.u8()
	if v > 1 {
		d.fail("flag of value %d", v)
	}
	return v == 1
}

func (d *decoder) str() string  { return string(d.take(int(d.u16()))) }
func (d *decoder) blob() []byte { return d.take(int(d.u32())) }

// count reads the length of a list whose elements have at least least bytes, so
// that the caller may make room for them.
func (d *decoder) count(least, limit int) int {
	n := d.u32()
	if uint64(n)*uint64(least) > uint64(len(d.b)) || int64(n) > int64(limit) {
		d.fail("a list of %d elements", n)
		return 0
	}
	return int(n)
}

func (d *decoder) strs() []string {
	n := d.count(2, asd.MaxKeys)
	s := make([]string, n)
	for i := range s {
		s[i] = d.str()
	}
	return s
}

func (d *decoder) crcs(n int) []uint32 {
	p := d.take(4 * n)
	crcs := make([]uint32, len(p)/4)
	for i := range crcs {
		crcs[i] = binary.LittleEndian.Uint32(p[4*i:])
	}
	return crcs
}

// value reads a value. Its bytes are those of the data, not yet verified.
func (d *decoder) value() asd.Value {
	bs, size := d.u32(), d.u64()
	switch {
	case d.err != nil:
		return asd.Value{}
	case bs < asd.MinBlockSize || bs > asd.MaxBlockSize:
		d.fail("block size %d", bs)
		return asd.Value{}
	case size > uint64(len(d.data)):
		d.fail("value of %d bytes, %d came", size, len(d.data))
		return asd.Value{}
	}
	v := asd.Value{BlockSize: int(bs), CRCs: d.crcs(asd.Blocks(int64(size), int(bs)))}
	if d.err != nil {
		return asd.Value{}
	}
	v.Data, d.data = d.data[:size:size], d.data[size:]
	return v
}

func (d *decoder) infos() []asd.Info {
	n := d.count(19, asd.MaxKeys)
	infos := make([]asd.Info, n)
	for i := range infos {
		infos[i] = asd.Info{Key: d.str(), Exists: d.flag(), Size: d.i64(), BlockSize: int(d.u32()), Sum: d.u32()}
	}
	return infos
}

// end returns the error, if there was one or something is left.
func (d *decoder) end() error {
	if d.err == nil && len(d.b)+len(d.data) > 0 {
		d.fail("%d bytes of body and %d of data too many", len(d.b), len(d.data))
	}
	return d.err
}
