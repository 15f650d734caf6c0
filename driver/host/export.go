package host

import (
	"bufio"
	"context"
	"fmt"
	"io"

	"scoria/driver/block"
	"scoria/driver/control"
	"scoria/driver/registry"
	"scoria/driver/stream"
)

// exportSource is what an export reads.
type exportSource struct {
	*snapshotDevice
	volume registry.Volume
	base   *registry.Snapshot // nil: everything is exported
	size   uint64
}

// openExport opens the snapshots of an export; nothing else is checked later.
func (h *VolumeSet) openExport(ctx context.Context, req control.Export) (*exportSource, error) {
	d, err := h.openSnapshot(ctx, req.Volume+"@"+req.Snapshot)
	if err != nil {
		return nil, err
	}
	src := &exportSource{snapshotDevice: d, size: d.Info().Size}
	if err := h.fillExport(ctx, src, req); err != nil {
		d.Release()
		return nil, err
	}
	return src, nil
}

func (h *VolumeSet) fillExport(ctx context.Context, src *exportSource, req control.Export) error {
	e, err := h.load(ctx, req.Volume)
	if err != nil {
		return err
	}
	src.volume = e.Record
	if req.Start > src.size || req.Start%block.ClusterSize != 0 {
		return control.Errorf(control.CodeInvalid, "start %d: must be a multiple of %d up to the snapshot's size, %d", req.Start, block.ClusterSize, src.size)
	}
	if req.Since == "" {
		return nil
	}
	base, err := h.loadSnapshot(ctx, &e.Record, req.Since)
	if err != nil {
		return err
	}
	if base.Record.Sequence >= src.snapshot.Sequence {
		return control.Errorf(control.CodeInvalid, "snapshot %s is not older than %s: changes can be exported from an earlier snapshot to a later one only", req.Since, req.Snapshot)
	}
	src.base = &base.Record
	_, err = src.hold(ctx, req.Since)
	return err
}

// walk calls fn with the extents from start on that differ from the base, in
// order: Mapped ones have data, the others read as zeroes. Without a base only the
// former.
func (src *exportSource) walk(ctx context.Context, start uint64, fn func(block.Extent) error) error {
	var failed error
	emit := func(e block.Extent) bool {
		if failed = fn(e); failed == nil {
			failed = ctx.Err()
		}
		return failed == nil
	}
	var err error
	if src.base == nil {
		err = src.BlockStatus(ctx, start, src.size-start, func(e block.Extent) bool { return !e.Mapped || emit(e) })
	} else {
		err = src.Changes(ctx, src.base.Name, start, src.size-start, func(e block.Extent) bool {
			if !e.Mapped {
				return true
			}
			if inner := src.BlockStatus(ctx, e.Offset, e.Length, emit); inner != nil && failed == nil {
				failed = inner
			}
			return failed == nil
		})
	}
	if failed != nil {
		return failed
	}
	return err
}

// export writes the stream of a snapshot to w.
func (h *VolumeSet) export(ctx context.Context, req control.Export, w io.Writer) error {
	src, err := h.openExport(ctx, req)
	if err != nil {
		return err
	}
	defer src.Release()
	hd := stream.Header{
		Volume: src.volume.FullName(), VolumeID: src.volume.ID, Size: src.size, BlockSize: src.volume.BlockSize,
		Snapshot: streamSnapshot(src.snapshot), Start: req.Start,
	}
	if src.base != nil {
		base := streamSnapshot(src.base)
		hd.Base = &base
	}
	if err := src.walk(ctx, req.Start, func(e block.Extent) error {
		if e.Mapped {
			hd.DataBytes += e.Length
		}
		return nil
	}); err != nil {
		return fmt.Errorf("export %s@%s: %w", req.Volume, req.Snapshot, err)
	}
	buffered := bufio.NewWriterSize(w, 1<<20)
	s, err := stream.NewWriter(buffered, hd)
	if err == nil {
		err = src.copyTo(ctx, s, req.Start)
	}
	if err == nil {
		err = s.End()
	}
	if err == nil {
		err = buffered.Flush()
	}
	if err != nil {
		return fmt.Errorf("export %s@%s: %w", req.Volume, req.Snapshot, err)
	}
	return nil
}

func streamSnapshot(s *registry.Snapshot) stream.Snapshot {
	return stream.Snapshot{ID: s.ID, Name: s.Name, Created: s.Created, Metadata: s.Metadata}
}

// copyTo reads what differs and writes it to s, in order.
func (src *exportSource) copyTo(ctx context.Context, s *stream.Writer, start uint64) error {
	t := newTransfer(src.Device)
	put := func(p *pending) error { return s.Data(p.Offset, p.Segments[0]) }
	err := src.walk(ctx, start, func(e block.Extent) error {
		if !e.Mapped {
			if err := t.drain(ctx, put); err != nil {
				return err
			}
			return s.Zero(e.Offset, e.Length)
		}
		for off, end := e.Offset, e.Offset+e.Length; off < end; {
			p, err := t.get(ctx, put)
			if err != nil {
				return err
			}
			n := min(end-off, transferBytes)
			p.buffer(n)
			t.submit(p, block.OpRead, off, n)
			off += n
		}
		return nil
	})
	if err != nil {
		_ = t.drain(ctx, nil) // the buffers are the device's until then
		return err
	}
	return t.drain(ctx, put)
}
