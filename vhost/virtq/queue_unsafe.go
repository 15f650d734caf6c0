package virtq

import (
	"fmt"
	"sync/atomic"
	"unsafe"
)

// view points into the shared memory of a ring. Its methods check nothing:
// indexes are masked by the caller.
type view struct {
	desc      unsafe.Pointer // num × Desc
	availRing unsafe.Pointer // num × u16
	usedHead  *uint32        // flags u16 | idx u16
	usedRing  unsafe.Pointer // num × { id u32, len u32 }
	availIdx  *uint32        // the aligned word that holds avail.idx …
	idxShift  uint8          // … and where in it
	flags     *uint16        // avail.flags
	usedEvent *uint16        // in the available ring, written by the driver
	availEvnt *uint16        // in the used ring, written by the device
}

// newView checks lengths and alignment (virtio 1.1, 2.6) of the parts as they
// lie in this process.
func newView(num int, desc, avail, used []byte) (view, error) {
	for _, p := range []struct {
		name        string
		b           []byte
		want, align int
	}{
		{"descriptor table", desc, DescTableBytes(num), 16},
		{"available ring", avail, AvailBytes(num), 2},
		{"used ring", used, UsedBytes(num), 4},
	} {
		if len(p.b) < p.want {
			return view{}, fmt.Errorf("%s of %d bytes, want %d for %d descriptors: %w", p.name, len(p.b), p.want, num, ErrLayout)
		}
		if uintptr(unsafe.Pointer(unsafe.SliceData(p.b)))%uintptr(p.align) != 0 {
			return view{}, fmt.Errorf("%s is not aligned to %d bytes: %w", p.name, p.align, ErrLayout)
		}
	}
	a, u := unsafe.Pointer(unsafe.SliceData(avail)), unsafe.Pointer(unsafe.SliceData(used))
	v := view{
		desc:      unsafe.Pointer(unsafe.SliceData(desc)),
		availRing: unsafe.Add(a, 4),
		usedHead:  (*uint32)(u),
		usedRing:  unsafe.Add(u, 4),
		availIdx:  (*uint32)(a),
		idxShift:  16,
		flags:     (*uint16)(a),
		usedEvent: (*uint16)(unsafe.Add(a, 4+2*num)),
		availEvnt: (*uint16)(unsafe.Add(u, 4+usedElemBytes*num)),
	}
	if uintptr(a)%4 != 0 { // then idx opens an aligned word with the first entry
		v.availIdx, v.idxShift = (*uint32)(unsafe.Add(a, 2)), 0
	}
	return v, nil
}

// loadAvailIdx acquires: the entries up to the index are visible afterwards.
func (v *view) loadAvailIdx() uint16 { return uint16(atomic.LoadUint32(v.availIdx) >> v.idxShift) }

func (v *view) loadHead(i uint16) uint16 {
	return *(*uint16)(unsafe.Add(v.availRing, 2*uintptr(i)))
}

// loadDesc copies a descriptor, each byte read once.
func (v *view) loadDesc(i uint16) Desc {
	p := unsafe.Add(v.desc, DescBytes*uintptr(i))
	addr := atomic.LoadUint64((*uint64)(p))
	rest := atomic.LoadUint64((*uint64)(unsafe.Add(p, 8)))
	return Desc{Addr: addr, Len: uint32(rest), Flags: uint16(rest >> 32), Next: uint16(rest >> 48)}
}

func (v *view) storeUsedElem(i uint16, id, n uint32) {
	// The element is only 4-byte aligned.
	e := (*[2]uint32)(unsafe.Add(v.usedRing, usedElemBytes*uintptr(i)))
	e[0], e[1] = id, n
}

// storeUsedHead publishes, and is a full barrier.
func (v *view) storeUsedHead(flags, idx uint16) {
	atomic.SwapUint32(v.usedHead, uint32(idx)<<16|uint32(flags))
}

func (v *view) loadUsedIdx() uint16 { return uint16(atomic.LoadUint32(v.usedHead) >> 16) }

// The two plain loads below follow an atomic operation in program order, which
// neither the compiler nor amd64 moves them across.

func (v *view) loadUsedEvent() uint16  { return *v.usedEvent }
func (v *view) loadAvailFlags() uint16 { return *v.flags }

// storeAvailEvent stores and is a full barrier. fence is private memory: any
// locked instruction orders all memory.
func (v *view) storeAvailEvent(idx uint16, fence *uint32) {
	*v.availEvnt = idx
	atomic.AddUint32(fence, 1)
}

// descBytes is the memory of descriptors, to copy an indirect table into.
func descBytes(d []Desc) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(d))), DescBytes*len(d))
}

// inflightRegion is QueueRegionSplit of the vhost-user specification, "Inflight
// I/O tracking".
type inflightRegion struct {
	features      uint64
	version       uint16
	descNum       uint16
	lastBatchHead uint16
	usedIdx       uint16
}

// inflightDesc is DescStateSplit.
type inflightDesc struct {
	inflight uint8
	_        [5]uint8
	next     uint16
	counter  uint64
}

// viewInflight returns the region in b, which must be long enough for num.
func viewInflight(b []byte, num int) (*inflightRegion, []inflightDesc, error) {
	p := unsafe.Pointer(unsafe.SliceData(b))
	if len(b) < InflightBytes(num) || uintptr(p)%8 != 0 {
		return nil, nil, fmt.Errorf("in-flight region of %d bytes, want %d, aligned to 8: %w", len(b), InflightBytes(num), ErrLayout)
	}
	return (*inflightRegion)(p), unsafe.Slice((*inflightDesc)(unsafe.Add(p, inflightHeaderBytes)), num), nil
}
