package disk

import (
	"context"
	"encoding/binary"
	"fmt"

	"scoria/alba/asd"

	"github.com/cockroachdb/pebble/v2"
)

// scan calls fn with what is stored under keys of this prefix, from from on and
// before to ("" for no end), while fn returns true.
func (d *Disk) scan(prefix byte, from, to string, fn func(name string, value []byte) (bool, error)) error {
	upper := []byte{prefix + 1}
	if to != "" {
		upper = kvKey(prefix, to)
	}
	it, err := d.db.NewIter(&pebble.IterOptions{LowerBound: kvKey(prefix, from), UpperBound: upper})
	if err != nil {
		return d.kvReadError(from, err)
	}
	last := from
	more := true
	for ok := it.First(); ok && more; ok = it.Next() {
		var b []byte
		if b, err = it.ValueAndErr(); err != nil {
			break
		}
		last = string(it.Key()[1:])
		if more, err = fn(last, b); err != nil {
			_ = it.Close()
			return err
		}
	}
	if err == nil {
		err = it.Error()
	}
	if closeErr := it.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return d.kvReadError(last, err)
	}
	return nil
}

// Range implements asd.Client.
func (d *Disk) Range(ctx context.Context, req asd.RangeRequest, pri asd.Priority) (asd.RangeResult, error) {
	limit, err := asd.CheckRange(&req)
	if err != nil {
		return asd.RangeResult{}, err
	}
	var res asd.RangeResult
	if req.To != "" && req.From >= req.To {
		return res, nil
	}
	end, err := d.begin(ctx, pri)
	if err != nil {
		return res, err
	}
	defer end()
	err = d.scan(prefixKey, req.From, req.To, func(key string, b []byte) (bool, error) {
		if req.After && key == req.From {
			return true, nil
		}
		if len(res.Infos) == limit {
			res.More = true
			return false, nil
		}
		rec, err := decodeRecord(b)
		if err != nil {
			return false, d.corrupt(key, 0, 0, err.Error())
		}
		res.Infos = append(res.Infos, rec.info(key))
		return true, ctx.Err()
	})
	if err != nil {
		return asd.RangeResult{}, err
	}
	return res, nil
}

// Epochs implements asd.Client.
func (d *Disk) Epochs(ctx context.Context, after string) (epochs []asd.NamespaceEpoch, more bool, err error) {
	end, err := d.begin(ctx, asd.PriorityGuest)
	if err != nil {
		return nil, false, err
	}
	defer end()
	err = d.scan(prefixEpoch, after, "", func(ns string, b []byte) (bool, error) {
		if ns == after {
			return true, nil
		}
		if len(epochs) == asd.MaxKeys {
			more = true
			return false, nil
		}
		if len(b) != 8 {
			return false, fmt.Errorf("epoch of namespace %q: %w", ns, errRecord)
		}
		epochs = append(epochs, asd.NamespaceEpoch{Namespace: ns, Epoch: binary.LittleEndian.Uint64(b)})
		return true, ctx.Err()
	})
	if err != nil {
		return nil, false, err
	}
	return epochs, more, nil
}
