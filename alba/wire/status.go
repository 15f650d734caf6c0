package wire

import (
	"context"
	"errors"
	"io"

	"scoria/alba/asd"
)

// Status is the outcome of a request. The numbers are part of the protocol.
type Status uint8

// The statuses.
const (
	StatusOK Status = iota
	StatusNoKey
	StatusFull
	StatusStaleEpoch
	StatusAssert
	StatusCorrupt
	StatusFailed
	StatusUnavailable
	StatusUnknownOutcome
	StatusInvalid
	StatusTooMuch
	StatusPastEnd
	StatusCanceled
	StatusDeadline
	StatusOther // the text says all
	statusEnd
)

// sentinels are the errors of the statuses; what a wrapped error means is
// decided by the first that fits.
var sentinels = [statusEnd]error{
	StatusNoKey:          asd.ErrNoKey,
	StatusFull:           asd.ErrFull,
	StatusStaleEpoch:     asd.ErrStaleEpoch,
	StatusAssert:         asd.ErrAssert,
	StatusCorrupt:        asd.ErrCorrupt,
	StatusFailed:         asd.ErrFailed,
	StatusUnavailable:    asd.ErrUnavailable,
	StatusUnknownOutcome: asd.ErrUnknownOutcome,
	StatusInvalid:        asd.ErrInvalid,
	StatusTooMuch:        asd.ErrTooMuch,
	StatusPastEnd:        io.ErrUnexpectedEOF,
	StatusCanceled:       context.Canceled,
	StatusDeadline:       context.DeadlineExceeded,
}

// statusOf returns the status of an error. An ASD that is closing is, for who
// is connected to it, unavailable.
func statusOf(err error) Status {
	if errors.Is(err, asd.ErrClosed) {
		return StatusUnavailable
	}
	for s, sentinel := range sentinels {
		if sentinel != nil && errors.Is(err, sentinel) {
			return Status(s)
		}
	}
	return StatusOther
}

// remoteError is an error with the text that the server gave it.
type remoteError struct {
	sentinel error // nil for StatusOther
	text     string
}

func (e *remoteError) Error() string { return e.text }
func (e *remoteError) Unwrap() error { return e.sentinel }

// error writes an error and returns its status.
func (e *encoder) error(err error) uint8 {
	status := statusOf(err)
	var (
		stale   *asd.StaleEpochError
		assert  *asd.AssertError
		corrupt *asd.CorruptError
	)
	e.str(err.Error())
	switch status {
	case StatusStaleEpoch:
		if !errors.As(err, &stale) {
			stale = new(asd.StaleEpochError)
		}
		e.str(stale.Namespace)
		e.u64(stale.Epoch)
		e.u64(stale.Known)
	case StatusAssert:
		if !errors.As(err, &assert) {
			assert = new(asd.AssertError)
		}
		e.u32(uint32(assert.Index))
		e.u8(uint8(assert.Assert.Kind))
		e.str(assert.Assert.Key)
		e.u64(uint64(assert.Assert.Size))
		e.u32(assert.Assert.Sum)
		e.str(assert.Reason)
	case StatusCorrupt:
		if !errors.As(err, &corrupt) {
			corrupt = &asd.CorruptError{Reason: err.Error()}
		}
		e.str(corrupt.Key)
		e.u64(uint64(corrupt.Off))
		e.u64(uint64(corrupt.Size))
		e.str(corrupt.Reason)
	}
	return uint8(status)
}

// error reads the error of a status other than 0.
func (d *decoder) error(code uint8) error {
	status := Status(code)
	if status >= statusEnd {
		d.fail("status %d", code)
		return nil
	}
	text := d.str()
	switch status {
	case StatusStaleEpoch:
		return &asd.StaleEpochError{Namespace: d.str(), Epoch: d.u64(), Known: d.u64()}
	case StatusAssert:
		e := &asd.AssertError{Index: int(d.u32())}
		e.Assert = asd.Assert{Kind: asd.AssertKind(d.u8()), Key: d.str(), Size: d.i64(), Sum: d.u32()}
		e.Reason = d.str()
		return e
	case StatusCorrupt:
		return &asd.CorruptError{Key: d.str(), Off: d.i64(), Size: d.i64(), Reason: d.str()}
	}
	return &remoteError{sentinel: sentinels[status], text: text}
}
