package disk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"syscall"

	"scoria/alba/asd"

	"github.com/cockroachdb/pebble/v2"
)

// readAttempts bounds how often a read starts anew because the value was
// replaced under it.
const readAttempts = 16

// withRecord calls fn with the record of a key, whose slices are valid during
// the call. If fn returns errRetry the record is read again.
func (d *Disk) withRecord(key string, fn func(*record) error) error {
	if err := asd.CheckKey(key); err != nil {
		return err
	}
	var last uint64
	for range readAttempts {
		rec, closer, err := d.lookup(key)
		if err != nil {
			return err
		}
		err = fn(&rec)
		_ = closer.Close()
		if !errors.Is(err, errRetry) {
			return err
		}
		if rec.fileID == last {
			return d.corrupt(key, 0, 0, "its file is missing")
		}
		last = rec.fileID
	}
	return fmt.Errorf("key %q: %w: replaced too often during a read", key, asd.ErrUnavailable)
}

// lookup reads a record; its slices are valid until the closer is closed.
func (d *Disk) lookup(key string) (record, io.Closer, error) {
	b, closer, err := d.db.Get(kvKey(prefixKey, key))
	switch {
	case errors.Is(err, pebble.ErrNotFound):
		return record{}, nil, fmt.Errorf("key %q: %w", key, asd.ErrNoKey)
	case err != nil:
		return record{}, nil, d.kvReadError(key, err)
	}
	rec, err := decodeRecord(b)
	if err != nil {
		_ = closer.Close()
		return record{}, nil, d.corrupt(key, 0, 0, err.Error())
	}
	return rec, closer, nil
}

// kvReadError is the error of a read from the key-value store.
func (d *Disk) kvReadError(key string, err error) error {
	if pebble.IsCorruptionError(err) || errors.Is(err, syscall.EIO) {
		d.setDamaged(err.Error())
		return d.corrupt(key, 0, 0, "key-value store: "+err.Error())
	}
	return fmt.Errorf("key %q: key-value store: %w", key, kvError(err))
}

// readFile fills p from the data of a value file. A sector that the disk can't
// read is as bad as one with wrong bytes.
func (d *Disk) readFile(h *handle, key string, p []byte, off int64) error {
	n, err := h.file.ReadAt(p, h.head.dataOff+off)
	d.n.diskReadBytes.Add(uint64(n))
	switch {
	case n == len(p):
		return nil
	case err == io.EOF:
		return d.corrupt(key, off, int64(len(p)), "its file is too short")
	case errors.Is(err, syscall.EIO):
		return d.corrupt(key, off, int64(len(p)), err.Error())
	}
	return fmt.Errorf("key %q: read %d bytes at %d: %w", key, len(p), off, err)
}

// verify checks whole blocks, of which first is the first, against crc.
func (d *Disk) verify(key string, p []byte, first, blockSize int, crc func(int) uint32) error {
	for i := first; len(p) > 0; i++ {
		n := min(blockSize, len(p))
		if asd.CRC(p[:n]) != crc(i) {
			return d.corrupt(key, int64(i)*int64(blockSize), int64(n), "fails its checksum")
		}
		p = p[n:]
	}
	return nil
}

// span returns the range of whole blocks around [off, off+size) in the value.
func (r *record) span(off, size int64) (first int, start, end int64) {
	bs := int64(r.blockSize)
	first = int(off / bs)
	start = int64(first) * bs
	end = min((off+size+bs-1)/bs*bs, r.size)
	return first, start, max(start, end)
}

// readSpan returns the blocks in [start, end), the first of which is first,
// verified. They are in buf if that is large enough, and for an inline value
// in the record.
func (d *Disk) readSpan(key string, rec *record, buf []byte, first int, start, end int64) ([]byte, []uint32, error) {
	blocks := asd.Blocks(end-start, rec.blockSize)
	if rec.fileID == 0 {
		p := rec.data[start:end]
		if err := d.verify(key, p, first, rec.blockSize, rec.crc); err != nil {
			return nil, nil, err
		}
		return p, decodeCRCs(rec.crcs[4*first : 4*(first+blocks)]), nil
	}
	h, err := d.handles.get(key, rec, start, end-start)
	if err != nil {
		return nil, nil, err
	}
	defer d.handles.put(h)
	if int64(cap(buf)) < end-start {
		buf = make([]byte, end-start)
	}
	buf = buf[:end-start]
	if err := d.readFile(h, key, buf, start); err != nil {
		return nil, nil, err
	}
	if err := d.verify(key, buf, first, rec.blockSize, func(i int) uint32 { return h.head.crcs[i] }); err != nil {
		return nil, nil, err
	}
	return buf, h.head.crcs[first : first+blocks : first+blocks], nil
}

// begin admits a request; the returned function ends it.
func (d *Disk) begin(ctx context.Context, pri asd.Priority) (func(), error) {
	if err := d.enter(); err != nil {
		return nil, err
	}
	if err := d.gate.acquire(ctx, pri); err != nil {
		d.leave()
		return nil, err
	}
	return func() {
		d.gate.release(pri)
		d.leave()
	}, nil
}

// spanBuffers hold the blocks around ranges that are not on block boundaries.
var spanBuffers = sync.Pool{New: func() any { return new([]byte) }}

// ReadAt implements asd.Client.
func (d *Disk) ReadAt(ctx context.Context, key string, p []byte, off int64, pri asd.Priority) (asd.ReadInfo, error) {
	end, err := d.begin(ctx, pri)
	if err != nil {
		return asd.ReadInfo{}, err
	}
	defer end()
	if err := asd.CheckSpan(key, off, int64(len(p))); err != nil {
		return asd.ReadInfo{}, err
	}
	var info asd.ReadInfo
	err = d.withRecord(key, func(rec *record) error {
		if off+int64(len(p)) > rec.size {
			return fmt.Errorf("key %q: %d bytes at %d of %d: %w", key, len(p), off, rec.size, io.ErrUnexpectedEOF)
		}
		first, start, end := rec.span(off, int64(len(p)))
		buf := &p
		if end-start != int64(len(p)) {
			buf = spanBuffers.Get().(*[]byte)
			defer spanBuffers.Put(buf)
		}
		data, crcs, err := d.readSpan(key, rec, *buf, first, start, end)
		if err != nil {
			return err
		}
		if buf != &p && rec.fileID != 0 {
			*buf = data
		}
		if len(p) > 0 && &data[off-start] != &p[0] {
			copy(p, data[off-start:])
		}
		info = asd.ReadInfo{Size: rec.size, BlockSize: rec.blockSize, FirstBlock: first, CRCs: crcs}
		return nil
	})
	d.countRead(err, int64(len(p)))
	return info, err
}

// ReadBlocks implements asd.BlockReader.
func (d *Disk) ReadBlocks(ctx context.Context, key string, buf []byte, off, size int64, pri asd.Priority) ([]byte, asd.ReadInfo, error) {
	end, err := d.begin(ctx, pri)
	if err != nil {
		return nil, asd.ReadInfo{}, err
	}
	defer end()
	if err := asd.CheckSpan(key, off, size); err != nil {
		return nil, asd.ReadInfo{}, err
	}
	var info asd.ReadInfo
	var data []byte
	err = d.withRecord(key, func(rec *record) error {
		info = asd.ReadInfo{Size: rec.size, BlockSize: rec.blockSize}
		data = buf[:0]
		if off >= rec.size || size == 0 {
			return nil
		}
		first, start, end := rec.span(off, size)
		p, crcs, err := d.readSpan(key, rec, buf, first, start, end)
		if err != nil {
			return err
		}
		if rec.fileID == 0 {
			p = append(buf[:0], p...)
		}
		data, info.FirstBlock, info.CRCs = p, first, crcs
		return nil
	})
	d.countRead(err, size)
	return data, info, err
}

func (d *Disk) countRead(err error, size int64) {
	if err == nil {
		d.n.gets.Add(1)
		d.n.readBytes.Add(uint64(size))
	}
}

// get reads a whole value of at most limit bytes; errLimit if it is larger.
func (d *Disk) get(key string, limit int64) (asd.Value, error) {
	var v asd.Value
	err := d.withRecord(key, func(rec *record) error {
		if rec.size > limit {
			return asd.ErrTooMuch
		}
		data, crcs, err := d.readSpan(key, rec, nil, 0, 0, rec.size)
		if err != nil {
			return err
		}
		if rec.fileID == 0 {
			data = append([]byte(nil), data...)
		}
		v = asd.Value{Data: data, BlockSize: rec.blockSize, CRCs: crcs}
		if asd.SumOf(rec.size, rec.blockSize, crcs) != rec.sum {
			return d.corrupt(key, 0, 0, "its checksums are not the ones that were put")
		}
		return nil
	})
	d.countRead(err, int64(len(v.Data)))
	return v, err
}

// Get implements asd.Client.
func (d *Disk) Get(ctx context.Context, key string, pri asd.Priority) (asd.Value, error) {
	end, err := d.begin(ctx, pri)
	if err != nil {
		return asd.Value{}, err
	}
	defer end()
	return d.get(key, asd.MaxValueBytes)
}

// MultiGet implements asd.Client.
func (d *Disk) MultiGet(ctx context.Context, keys []string, pri asd.Priority) ([]asd.Result, error) {
	if err := asd.CheckKeys(keys); err != nil {
		return nil, err
	}
	end, err := d.begin(ctx, pri)
	if err != nil {
		return nil, err
	}
	defer end()
	results := make([]asd.Result, len(keys))
	left := int64(asd.MaxValueBytes)
	full := false
	for i, key := range keys {
		r := &results[i]
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if full {
			r.Err = asd.ErrTooMuch
			continue
		}
		r.Value, r.Err = d.get(key, left)
		left -= int64(len(r.Value.Data))
		full = errors.Is(r.Err, asd.ErrTooMuch)
	}
	return results, nil
}

// Exists implements asd.Client.
func (d *Disk) Exists(ctx context.Context, keys []string, pri asd.Priority) ([]asd.Info, error) {
	if err := asd.CheckKeys(keys); err != nil {
		return nil, err
	}
	end, err := d.begin(ctx, pri)
	if err != nil {
		return nil, err
	}
	defer end()
	infos := make([]asd.Info, len(keys))
	for i, key := range keys {
		infos[i].Key = key
		err := d.withRecord(key, func(rec *record) error {
			infos[i] = rec.info(key)
			return nil
		})
		if err != nil && !errors.Is(err, asd.ErrNoKey) {
			return nil, err
		}
	}
	return infos, nil
}
