package ring

import (
	"sync/atomic"
	"unsafe"
)

// view points into a ring's memory. Its methods check nothing: positions are
// masked by the caller.
type view struct {
	submit     unsafe.Pointer // entries × 64
	completion unsafe.Pointer // entries × 16
	kickFlag   *uint32
	callFlag   *uint32
}

func newView(mem []byte, l Layout) (view, error) {
	p := unsafe.Pointer(unsafe.SliceData(mem))
	if uint64(len(mem)) < l.TotalBytes() || uintptr(p)%SubmitBytes != 0 {
		return view{}, ErrMemory
	}
	return view{
		submit: unsafe.Add(p, l.SubmitOffset()), completion: unsafe.Add(p, l.CompletionOffset()),
		kickFlag: (*uint32)(unsafe.Add(p, kickFlagAt)), callFlag: (*uint32)(unsafe.Add(p, callFlagAt)),
	}, nil
}

func (v *view) submitWords(i uint32) *[8]uint64 {
	return (*[8]uint64)(unsafe.Add(v.submit, SubmitBytes*uintptr(i)))
}

// submitSequence acquires: the entry is visible if the sequence is.
func (v *view) submitSequence(i uint32) uint32 {
	return uint32(atomic.LoadUint64(&v.submitWords(i)[7]) >> 32)
}

// loadSubmit copies an entry, each byte once.
func (v *view) loadSubmit(i uint32, r *Request) {
	w := v.submitWords(i)
	r.Cookie = atomic.LoadUint64(&w[0])
	r.Offset = atomic.LoadUint64(&w[1])
	r.Length = atomic.LoadUint64(&w[2])
	r.Addr = atomic.LoadUint64(&w[3])
	x := atomic.LoadUint64(&w[4])
	r.Op, r.Flags, r.Segments = uint8(x), uint8(x>>8), uint16(x>>16)
	r.Reserved = x>>32 | atomic.LoadUint64(&w[5]) | atomic.LoadUint64(&w[6]) | uint64(uint32(atomic.LoadUint64(&w[7])))
}

// storeSubmit writes an entry but for its sequence.
func (v *view) storeSubmit(i uint32, r *Request) {
	w := v.submitWords(i)
	w[0], w[1], w[2], w[3] = r.Cookie, r.Offset, r.Length, r.Addr
	w[4] = uint64(r.Op) | uint64(r.Flags)<<8 | uint64(r.Segments)<<16
	w[5], w[6] = 0, 0
}

// publishSubmit stores a sequence; a full barrier.
func (v *view) publishSubmit(i, seq uint32) {
	atomic.StoreUint64(&v.submitWords(i)[7], uint64(seq)<<32)
}

// setSubmit stores the sequence of an entry behind one that is not published yet.
func (v *view) setSubmit(i, seq uint32) { v.submitWords(i)[7] = uint64(seq) << 32 }

func (v *view) completionWords(i uint32) *[2]uint64 {
	return (*[2]uint64)(unsafe.Add(v.completion, CompletionBytes*uintptr(i)))
}

// loadCompletion returns an entry and its sequence; it acquires.
func (v *view) loadCompletion(i uint32) (c Completion, seq uint32) {
	w := v.completionWords(i)
	x := atomic.LoadUint64(&w[1])
	return Completion{Cookie: atomic.LoadUint64(&w[0]), Status: Status(uint32(x))}, uint32(x >> 32)
}

// setCompletion writes an entry behind one that is not published yet.
func (v *view) setCompletion(i uint32, c Completion, seq uint32) {
	w := v.completionWords(i)
	w[0], w[1] = c.Cookie, uint64(c.Status)|uint64(seq)<<32
}

// publishCompletion writes an entry and makes it and those behind it visible; a
// full barrier.
func (v *view) publishCompletion(i uint32, c Completion, seq uint32) {
	w := v.completionWords(i)
	w[0] = c.Cookie
	atomic.StoreUint64(&w[1], uint64(c.Status)|uint64(seq)<<32)
}

// loadSegment copies an element of a gather list, each byte once, and reports
// whether its reserved bytes are zeroes. p is aligned to 8.
func loadSegment(p []byte) (Segment, bool) {
	w := (*[2]uint64)(unsafe.Pointer(unsafe.SliceData(p[:SegmentBytes])))
	addr, rest := atomic.LoadUint64(&w[0]), atomic.LoadUint64(&w[1])
	return Segment{Addr: addr, Length: uint32(rest)}, rest>>32 == 0
}
