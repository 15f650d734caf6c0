package wire

import (
	"fmt"

	"scoria/alba/asd"
)

// Request is a message of the client. Which fields mean something depends on Op.
type Request struct {
	ID       uint64
	Op       Op
	Priority asd.Priority
	Deadline uint32 // milliseconds, 0 for none

	Keys    []string         // get and read: one; multi-get, exists
	Off     int64            // read
	Size    int64            // read
	Range   asd.RangeRequest // range
	Asserts []asd.Assert     // apply
	Updates []asd.Update     // apply
	After   string           // epochs
	Verify  asd.VerifyRequest
}

// Encode returns the header and the body in one slice, and the data as the
// values' own slices. asd.ErrInvalid if it is more than a frame can hold.
func (r *Request) Encode() (frame []byte, data [][]byte, err error) {
	e := newEncoder(64)
	switch r.Op {
	case OpGet:
		e.str(r.Keys[0])
	case OpMultiGet, OpExists:
		e.strs(r.Keys)
	case OpReadAt:
		e.str(r.Keys[0])
		e.u64(uint64(r.Off))
		e.u64(uint64(r.Size))
	case OpRange:
		e.str(r.Range.From)
		e.str(r.Range.To)
		e.flag(r.Range.After)
		e.u32(uint32(r.Range.Limit))
	case OpApply:
		e.apply(r)
	case OpEpochs:
		e.str(r.After)
	case OpVerify:
		e.str(r.Verify.Cursor)
		e.u64(uint64(r.Verify.MaxBytes))
	}
	size := 0
	for _, p := range e.data {
		size += len(p)
	}
	if len(e.b) > HeaderBytes+MaxBodyBytes || size > asd.MaxValueBytes {
		return nil, nil, fmt.Errorf("%w: request of %d bytes and %d of values, want at most %d and %d", asd.ErrInvalid, len(e.b), size, MaxBodyBytes, asd.MaxValueBytes)
	}
	return finish(e.b, Header{ID: r.ID, Op: r.Op, Code: uint8(r.Priority), Deadline: r.Deadline}, e.data), e.data, nil
}

func (e *encoder) apply(r *Request) {
	e.u32(uint32(len(r.Asserts)))
	for i := range r.Asserts {
		a := &r.Asserts[i]
		e.u8(uint8(a.Kind))
		e.str(a.Key)
		switch a.Kind {
		case asd.KindAssertValue:
			e.blob(a.Data)
		case asd.KindAssertSum:
			e.u64(uint64(a.Size))
			e.u32(a.Sum)
		case asd.KindAssertEpoch:
			e.u64(a.Epoch)
		}
	}
	e.u32(uint32(len(r.Updates)))
	for i := range r.Updates {
		u := &r.Updates[i]
		e.u8(uint8(u.Kind))
		e.str(u.Key)
		switch u.Kind {
		case asd.KindPut:
			e.value(&u.Value)
		case asd.KindRaiseEpoch:
			e.u64(u.Epoch)
		}
	}
}

// DecodeRequest reads a request. Values refer to data and are not yet verified.
// The error wraps ErrProtocol.
func DecodeRequest(h *Header, body, data []byte) (Request, error) {
	r := Request{ID: h.ID, Op: h.Op, Priority: asd.Priority(h.Code), Deadline: h.Deadline}
	d := &decoder{b: body, data: data}
	if r.Priority > asd.PriorityRepair {
		d.fail("priority %d", h.Code)
	}
	switch h.Op {
	case OpGet:
		r.Keys = []string{d.str()}
	case OpMultiGet, OpExists:
		r.Keys = d.strs()
	case OpReadAt:
		r.Keys = []string{d.str()}
		r.Off, r.Size = d.i64(), d.i64()
	case OpRange:
		r.Range = asd.RangeRequest{From: d.str(), To: d.str(), After: d.flag(), Limit: int(d.u32())}
	case OpApply:
		d.apply(&r)
	case OpEpochs:
		r.After = d.str()
	case OpVerify:
		r.Verify = asd.VerifyRequest{Cursor: d.str(), MaxBytes: d.i64()}
	}
	if err := d.end(); err != nil {
		return Request{}, err
	}
	return r, nil
}

func (d *decoder) apply(r *Request) {
	r.Asserts = make([]asd.Assert, d.count(3, asd.MaxAsserts))
	for i := range r.Asserts {
		a := &r.Asserts[i]
		a.Kind, a.Key = asd.AssertKind(d.u8()), d.str()
		switch a.Kind {
		case asd.KindAssertAbsent:
		case asd.KindAssertValue:
			a.Data = d.blob()
		case asd.KindAssertSum:
			a.Size, a.Sum = d.i64(), d.u32()
		case asd.KindAssertEpoch:
			a.Epoch = d.u64()
		default:
			d.fail("assert of kind %d", a.Kind)
		}
	}
	r.Updates = make([]asd.Update, d.count(3, asd.MaxUpdates))
	for i := range r.Updates {
		u := &r.Updates[i]
		u.Kind, u.Key = asd.UpdateKind(d.u8()), d.str()
		switch u.Kind {
		case asd.KindPut:
			u.Value = d.value()
		case asd.KindDelete:
		case asd.KindRaiseEpoch:
			u.Epoch = d.u64()
		default:
			d.fail("update of kind %d", u.Kind)
		}
	}
}
