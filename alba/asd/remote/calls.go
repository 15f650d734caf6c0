package remote

import (
	"bytes"
	"context"
	"fmt"
	"io"

	"scoria/alba/asd"
	"scoria/alba/wire"
)

// lane chooses the connection for a request of about this many bytes there or
// back.
func (c *Client) lane(size int64, pri asd.Priority) *lane {
	if size >= bulkBytes || pri == asd.PriorityRepair {
		return &c.lanes[1]
	}
	return &c.lanes[0]
}

// received verifies a value and makes it the caller's own.
func received(key string, v asd.Value) (asd.Value, error) {
	if err := v.Check(key); err != nil {
		return asd.Value{}, fmt.Errorf("%w: %w", errDamaged, err)
	}
	v.Data = bytes.Clone(v.Data)
	return v, nil
}

// Get implements asd.Client.
func (c *Client) Get(ctx context.Context, key string, pri asd.Priority) (v asd.Value, err error) {
	if err := asd.CheckKey(key); err != nil {
		return asd.Value{}, err
	}
	req := &wire.Request{Op: wire.OpGet, Priority: pri, Keys: []string{key}}
	err = c.call(ctx, c.lane(bulkBytes, pri), req, func(a *wire.Answer) (err error) {
		v, err = received(key, a.Value)
		return err
	})
	return v, err
}

// MultiGet implements asd.Client.
func (c *Client) MultiGet(ctx context.Context, keys []string, pri asd.Priority) (results []asd.Result, err error) {
	if err := asd.CheckKeys(keys); err != nil {
		return nil, err
	}
	req := &wire.Request{Op: wire.OpMultiGet, Priority: pri, Keys: keys}
	err = c.call(ctx, c.lane(bulkBytes, pri), req, func(a *wire.Answer) (err error) {
		if len(a.Results) != len(keys) {
			return fmt.Errorf("%w: %d results for %d keys", wire.ErrProtocol, len(a.Results), len(keys))
		}
		for i := range a.Results {
			if r := &a.Results[i]; r.Err == nil {
				if r.Value, err = received(keys[i], r.Value); err != nil {
					return err
				}
			}
		}
		results = a.Results
		return nil
	})
	return results, err
}

// ReadAt implements asd.Client.
func (c *Client) ReadAt(ctx context.Context, key string, p []byte, off int64, pri asd.Priority) (info asd.ReadInfo, err error) {
	if err := asd.CheckKey(key); err != nil {
		return info, err
	}
	if err := asd.CheckSpan(key, off, int64(len(p))); err != nil {
		return info, err
	}
	req := &wire.Request{Op: wire.OpReadAt, Priority: pri, Keys: []string{key}, Off: off, Size: int64(len(p))}
	err = c.call(ctx, c.lane(int64(len(p)), pri), req, func(a *wire.Answer) error {
		if off+int64(len(p)) > a.Read.Size {
			return fmt.Errorf("key %q: %d bytes at %d of %d: %w", key, len(p), off, a.Read.Size, io.ErrUnexpectedEOF)
		}
		bs := int64(a.Read.BlockSize)
		rest := a.Data
		for i, crc := range a.Read.CRCs {
			b := rest[:min(bs, int64(len(rest)))]
			if asd.CRC(b) != crc {
				return fmt.Errorf("%w: key %q: block %d", errDamaged, key, a.Read.FirstBlock+i)
			}
			rest = rest[len(b):]
		}
		start := int64(a.Read.FirstBlock) * bs
		if len(p) > 0 && (start > off || start+int64(len(a.Data)) < off+int64(len(p))) {
			return fmt.Errorf("%w: key %q: %d bytes at %d asked for, %d at %d came", wire.ErrProtocol, key, len(p), off, len(a.Data), start)
		}
		if len(p) > 0 {
			copy(p, a.Data[off-start:])
		}
		info = a.Read
		return nil
	})
	return info, err
}

// Range implements asd.Client.
func (c *Client) Range(ctx context.Context, req asd.RangeRequest, pri asd.Priority) (res asd.RangeResult, err error) {
	if req.Limit, err = asd.CheckRange(&req); err != nil {
		return res, err
	}
	size := int64(req.Limit) * 64
	err = c.call(ctx, c.lane(size, pri), &wire.Request{Op: wire.OpRange, Priority: pri, Range: req}, func(a *wire.Answer) error {
		res = asd.RangeResult{Infos: a.Infos, More: a.More}
		return nil
	})
	return res, err
}

// Exists implements asd.Client.
func (c *Client) Exists(ctx context.Context, keys []string, pri asd.Priority) (infos []asd.Info, err error) {
	if err := asd.CheckKeys(keys); err != nil {
		return nil, err
	}
	req := &wire.Request{Op: wire.OpExists, Priority: pri, Keys: keys}
	err = c.call(ctx, c.lane(int64(len(keys))*64, pri), req, func(a *wire.Answer) error {
		if len(a.Infos) != len(keys) {
			return fmt.Errorf("%w: %d infos for %d keys", wire.ErrProtocol, len(a.Infos), len(keys))
		}
		infos = a.Infos
		return nil
	})
	return infos, err
}

// Apply implements asd.Client.
func (c *Client) Apply(ctx context.Context, asserts []asd.Assert, updates []asd.Update, pri asd.Priority) error {
	if err := asd.CheckApply(asserts, updates); err != nil {
		return err
	}
	size := int64(0)
	for i := range updates {
		size += int64(len(updates[i].Value.Data))
	}
	return c.call(ctx, c.lane(size, pri), &wire.Request{Op: wire.OpApply, Priority: pri, Asserts: asserts, Updates: updates}, nil)
}

// Epochs implements asd.Client.
func (c *Client) Epochs(ctx context.Context, after string) (epochs []asd.NamespaceEpoch, more bool, err error) {
	err = c.call(ctx, &c.lanes[0], &wire.Request{Op: wire.OpEpochs, After: after}, func(a *wire.Answer) error {
		epochs, more = a.Epochs, a.More
		return nil
	})
	return epochs, more, err
}

// Verify implements asd.Client.
func (c *Client) Verify(ctx context.Context, req asd.VerifyRequest) (res asd.VerifyResult, err error) {
	req.MaxBytes = max(req.MaxBytes, 0)
	err = c.call(ctx, &c.lanes[1], &wire.Request{Op: wire.OpVerify, Priority: asd.PriorityRepair, Verify: req}, func(a *wire.Answer) error {
		res = a.Verify
		return nil
	})
	return res, err
}

// Stats implements asd.Client.
func (c *Client) Stats(ctx context.Context) (stats asd.Stats, err error) {
	err = c.call(ctx, &c.lanes[0], &wire.Request{Op: wire.OpStats}, func(a *wire.Answer) error {
		stats = a.Stats
		return nil
	})
	return stats, err
}
