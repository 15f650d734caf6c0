package wire

import (
	"encoding/json"
	"fmt"

	"scoria/alba/asd"
)

// Answer is a message of the server. Which fields mean something depends on Op,
// and only if Err is nil.
type Answer struct {
	ID  uint64
	Op  Op
	Err error // one of the statuses' errors

	Value   asd.Value    // get
	Results []asd.Result // multi-get
	Read    asd.ReadInfo // read
	Data    []byte       // read: whole blocks
	Infos   []asd.Info   // range, exists
	More    bool         // range, epochs
	Epochs  []asd.NamespaceEpoch
	Verify  asd.VerifyResult
	Stats   asd.Stats
}

// Encode returns the header and the body in one slice, and the data as the
// values' own slices.
func (a *Answer) Encode() (frame []byte, data [][]byte) {
	e := newEncoder(64)
	h := Header{ID: a.ID, Op: a.Op}
	if a.Err == nil {
		e.answer(a)
	}
	if len(e.b) > HeaderBytes+MaxBodyBytes {
		a.Err = fmt.Errorf("%w: the answer would have %d bytes", asd.ErrInvalid, len(e.b))
	}
	if a.Err != nil {
		e.b, e.data = e.b[:HeaderBytes], nil
		h.Code = e.error(a.Err)
	}
	return finish(e.b, h, e.data), e.data
}

func (e *encoder) answer(a *Answer) {
	switch a.Op {
	case OpGet:
		e.value(&a.Value)
	case OpMultiGet:
		e.results(a.Results)
	case OpReadAt:
		e.u64(uint64(a.Read.Size))
		e.u32(uint32(a.Read.BlockSize))
		e.u32(uint32(a.Read.FirstBlock))
		e.u32(uint32(len(a.Read.CRCs)))
		e.crcs(a.Read.CRCs)
		e.data = append(e.data, a.Data)
	case OpRange:
		e.flag(a.More)
		e.infos(a.Infos)
	case OpExists:
		e.infos(a.Infos)
	case OpEpochs:
		e.flag(a.More)
		e.u32(uint32(len(a.Epochs)))
		for _, ne := range a.Epochs {
			e.str(ne.Namespace)
			e.u64(ne.Epoch)
		}
	case OpVerify:
		e.verify(&a.Verify)
	case OpStats:
		b, err := json.Marshal(&a.Stats)
		if err != nil {
			a.Err = err
			return
		}
		e.blob(b)
	}
}

func (e *encoder) results(results []asd.Result) {
	e.u32(uint32(len(results)))
	for i := range results {
		r := &results[i]
		if r.Err == nil {
			e.u8(uint8(StatusOK))
			e.value(&r.Value)
			continue
		}
		at := len(e.b)
		e.u8(0)
		e.b[at] = e.error(r.Err)
	}
}

func (e *encoder) verify(v *asd.VerifyResult) {
	e.str(v.Next)
	e.flag(v.Done)
	e.u64(uint64(v.Keys))
	e.u64(uint64(v.Bytes))
	e.u32(uint32(len(v.Bad)))
	for i := range v.Bad {
		b := &v.Bad[i]
		e.str(b.Key)
		e.u64(uint64(b.Off))
		e.u64(uint64(b.Size))
		e.str(b.Reason)
	}
}

// DecodeAnswer reads an answer. Values refer to data and are not yet verified.
// The error wraps ErrProtocol; an Answer's own error is in Err.
func DecodeAnswer(h *Header, body, data []byte) (Answer, error) {
	a := Answer{ID: h.ID, Op: h.Op}
	d := &decoder{b: body, data: data}
	if h.Code != uint8(StatusOK) {
		a.Err = d.error(h.Code)
	} else {
		d.answer(&a)
	}
	if err := d.end(); err != nil {
		return Answer{}, err
	}
	return a, nil
}

func (d *decoder) answer(a *Answer) {
	switch a.Op {
	case OpGet:
		a.Value = d.value()
	case OpMultiGet:
		d.results(a)
	case OpReadAt:
		d.read(a)
	case OpRange:
		a.More = d.flag()
		a.Infos = d.infos()
	case OpExists:
		a.Infos = d.infos()
	case OpEpochs:
		a.More = d.flag()
		a.Epochs = make([]asd.NamespaceEpoch, d.count(10, asd.MaxKeys))
		for i := range a.Epochs {
			a.Epochs[i] = asd.NamespaceEpoch{Namespace: d.str(), Epoch: d.u64()}
		}
	case OpVerify:
		a.Verify = asd.VerifyResult{Next: d.str(), Done: d.flag(), Keys: d.i64(), Bytes: d.i64()}
		a.Verify.Bad = make([]asd.BadBlocks, d.count(20, MaxBodyBytes))
		for i := range a.Verify.Bad {
			a.Verify.Bad[i] = asd.BadBlocks{Key: d.str(), Off: d.i64(), Size: d.i64(), Reason: d.str()}
		}
	case OpStats:
		if b := d.blob(); d.err == nil {
			if err := json.Unmarshal(b, &a.Stats); err != nil {
				d.fail("statistics: %v", err)
			}
		}
	}
}

func (d *decoder) results(a *Answer) {
	a.Results = make([]asd.Result, d.count(3, asd.MaxKeys))
	for i := range a.Results {
		r := &a.Results[i]
		if code := d.u8(); code != uint8(StatusOK) {
			r.Err = d.error(code)
		} else {
			r.Value = d.value()
		}
	}
}

func (d *decoder) read(a *Answer) {
	r := asd.ReadInfo{Size: d.i64(), BlockSize: int(d.u32()), FirstBlock: int(d.u32())}
	r.CRCs = d.crcs(d.count(4, MaxBodyBytes))
	if d.err != nil {
		return
	}
	if r.BlockSize < asd.MinBlockSize || r.BlockSize > asd.MaxBlockSize || asd.Blocks(int64(len(d.data)), r.BlockSize) != len(r.CRCs) {
		d.fail("%d bytes in blocks of %d have %d checksums", len(d.data), r.BlockSize, len(r.CRCs))
		return
	}
	a.Read, a.Data, d.data = r, d.data, nil
}
