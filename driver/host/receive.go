package host

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/google/uuid"

	"scoria/driver/block"
	"scoria/driver/control"
	"scoria/driver/registry"
	"scoria/driver/stream"
)

// # Receiving
//
// A volume that is being received has Incomplete in its record. From then on no
// front end gets it and every other operation on it is refused, so the gate is free
// while data comes. The data goes into the volume itself; then comes a snapshot with
// the sender's identity, then Incomplete goes. Before the latter the volume is, for
// everybody, what it was: an interrupted receive is undone (a new volume is deleted,
// an old one rolled back to the base, which takes no time), by the next start if the
// daemon died; or, if it is resumable, stays incomplete until a receive of the same
// snapshot completes it. What was received already may come again.

// positionBytes is how much a resumable receive takes between two records of how
// far it is.
const positionBytes = 256 << 20

// receiver is a receive under way.
type receiver struct {
	set       *VolumeSet
	stream    *stream.Reader
	header    stream.Header
	resumable bool
	name      string // POOL/VOLUME
	dev       Volume
	release   func() // of the claim
	at        uint64 // all before this byte of the volume was submitted
	noted     uint64 // bytes of data at the last record of the position
}

func (h *VolumeSet) receive(ctx context.Context, name string, resumable bool, body io.Reader) (registry.Volume, registry.Snapshot, stream.Totals, error) {
	var totals stream.Totals
	name, err := fullName(name)
	if err != nil {
		return registry.Volume{}, registry.Snapshot{}, totals, control.Errorf(control.CodeInvalid, "%v", err)
	}
	s, err := stream.NewReader(bufio.NewReaderSize(body, 1<<20))
	if err != nil {
		return registry.Volume{}, registry.Snapshot{}, totals, control.Errorf(control.CodeInvalid, "receive %s: %v", name, err)
	}
	r := &receiver{set: h, stream: s, header: s.Header(), resumable: resumable, name: name}
	if !h.beginTransfer(name) {
		return registry.Volume{}, registry.Snapshot{}, totals, control.Errorf(control.CodeInUse, "volume %s is being received already", name)
	}
	defer h.endTransfer(name)
	if err := r.begin(ctx); err != nil {
		return registry.Volume{}, registry.Snapshot{}, totals, err
	}
	defer r.release()
	err = r.apply(ctx)
	// From here on it is finished one way or the other, whatever becomes of ctx.
	ctx = context.WithoutCancel(ctx)
	var v registry.Volume
	var snap registry.Snapshot
	if err == nil {
		v, snap, err = r.finish(ctx)
	}
	if err != nil {
		return v, snap, s.Totals(), r.giveUp(ctx, fmt.Errorf("receive %s: %w", name, err))
	}
	return v, snap, s.Totals(), nil
}

// beginTransfer says that a receive of a volume begins; false if one runs.
func (h *VolumeSet) beginTransfer(name string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.transfers[name] {
		return false
	}
	if h.transfers == nil {
		h.transfers = map[string]bool{}
	}
	h.transfers[name] = true
	return true
}

func (h *VolumeSet) endTransfer(name string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.transfers, name)
}

// begin makes or takes the volume, so that nobody else does anything with it.
func (r *receiver) begin(ctx context.Context) error {
	e, err := r.set.load(ctx, r.name)
	switch {
	case errors.Is(err, block.ErrNotFound) && r.header.Base == nil:
		err = r.create(ctx)
	case err != nil && r.header.Base != nil:
		return fmt.Errorf("the stream has the changes since snapshot %s of %s, which has to be received first: %w", r.header.Base.Name, r.header.Volume, err)
	case err != nil:
		return err
	case e.Record.Incomplete != nil:
		err = r.resume(ctx, e)
	case r.header.Base == nil:
		return control.Errorf(control.CodeExists, "volume %s exists already; a whole volume is received under a new name", r.name)
	default:
		err = r.take(ctx)
	}
	if err != nil {
		return err
	}
	if r.release != nil {
		return nil
	}
	if r.dev, err = r.set.open(ctx, r.name); err == nil {
		r.release, err = r.set.claim(r.dev, r.name, "receive")
	}
	return err
}

func (r *receiver) incomplete() *registry.Incomplete {
	i := &registry.Incomplete{Kind: registry.IncompleteReceive, Snapshot: r.header.Snapshot.ID, Resumable: r.resumable}
	if r.header.Base != nil {
		i.Base = r.header.Base.ID
	}
	return i
}

// create makes the volume of a whole stream.
func (r *receiver) create(ctx context.Context) error {
	if r.header.Start > 0 {
		return control.Errorf(control.CodeInvalid, "the stream begins at byte %d, but nothing was received of it before: export it from the beginning", r.header.Start)
	}
	_, err := r.set.createAs(ctx, control.CreateVolume{Name: r.name, Size: r.header.Size, BlockSize: r.header.BlockSize}, r.incomplete())
	return err
}

// resume goes on with an interrupted receive of the same snapshot.
func (r *receiver) resume(ctx context.Context, e registry.Entry[registry.Volume]) error {
	want, has := r.incomplete(), e.Record.Incomplete
	switch {
	case has.Kind != want.Kind || has.Snapshot != want.Snapshot || has.Base != want.Base:
		return control.Errorf(control.CodeInvalid, "volume %s is incomplete and waits for another stream than this one, of %s@%s: undo that with `scoria volume receive --abort %s`", r.name, r.header.Volume, r.header.Snapshot.Name, r.name)
	case r.header.Start > has.Position:
		return control.Errorf(control.CodeInvalid, "the stream begins at byte %d, but volume %s was received up to byte %d: export it with --start %d", r.header.Start, r.name, has.Position, has.Position)
	}
	_, err := registry.Update(ctx, r.set.reg, registry.VolumeKey(e.Record.Pool, e.Record.Name), func(v *registry.Volume) error {
		if v.Incomplete != nil {
			v.Incomplete.Resumable = r.resumable
		}
		return nil
	})
	return err
}

// take makes a volume incomplete that is exactly as its newest snapshot, the
// stream's base.
func (r *receiver) take(ctx context.Context) error {
	h := r.set
	if r.header.Start > 0 {
		return control.Errorf(control.CodeInvalid, "the stream begins at byte %d, but nothing was received of it before: export it from the beginning", r.header.Start)
	}
	dev, e, leave, err := h.enterOpen(ctx, r.name)
	if err != nil {
		return err
	}
	defer leave()
	if err := r.checkBase(ctx, dev, &e.Record); err != nil {
		return err
	}
	if by := h.usedBy(r.name); by != "" {
		return inUse(r.name, by)
	}
	release, err := h.claim(dev, r.name, "receive")
	if err != nil {
		return err
	}
	// Nobody writes any more: now what was seen stays.
	if err = r.checkBase(ctx, dev, &e.Record); err == nil {
		e.Record.Incomplete = r.incomplete()
		_, err = registry.Replace(ctx, h.reg, registry.VolumeKey(e.Record.Pool, e.Record.Name), e)
	}
	if err != nil {
		release()
		return err
	}
	v := h.volume(r.name)
	h.setIncomplete(v, registry.IncompleteReceive)
	h.unserve(v)
	r.dev, r.release = dev, release
	return nil
}

// checkBase says whether the volume is what the stream builds on.
func (r *receiver) checkBase(ctx context.Context, dev Volume, v *registry.Volume) error {
	list, err := registry.Snapshots(ctx, r.set.reg, v.ID)
	if err != nil {
		return err
	}
	want := r.header.Base
	i := slices.IndexFunc(list, func(e registry.Entry[registry.Snapshot]) bool { return e.Record.ID == want.ID })
	for j := range list {
		switch s := &list[j].Record; {
		case s.ID == r.header.Snapshot.ID:
			return control.Errorf(control.CodeExists, "volume %s has the stream's snapshot %s already", r.name, s.Name)
		case s.Name == r.header.Snapshot.Name:
			return control.Errorf(control.CodeExists, "volume %s has another snapshot %s than the stream's: rename or delete it", r.name, s.Name)
		}
	}
	switch {
	case i < 0:
		has := "it has none"
		if len(list) > 0 {
			has = "it has " + nameSome(list)
		}
		return control.Errorf(control.CodeInvalid, "the stream has the changes since snapshot %s (%s) of %s, which volume %s does not have: %s", want.Name, want.ID, r.header.Volume, r.name, has)
	case i != len(list)-1:
		return control.Errorf(control.CodeInvalid, "the stream builds on snapshot %s of volume %s, which has later ones: %s; roll it back with `scoria snapshot rollback %s@%s`", list[i].Record.Name, r.name, nameSome(list[i+1:]), r.name, list[i].Record.Name)
	}
	changed := dev.Info().Size != list[i].Record.Size
	if !changed {
		err = dev.Changes(ctx, want.ID, uuid.Nil, 0, dev.Info().Size, func(e block.Extent) bool {
			changed = e.Mapped
			return !changed
		})
	}
	if err == nil && changed {
		err = control.Errorf(control.CodeInvalid, "volume %s was changed since snapshot %s, on which the stream builds: roll it back with `scoria snapshot rollback %s@%s`", r.name, list[i].Record.Name, r.name, list[i].Record.Name)
	}
	return err
}

// apply writes the stream into the volume, durably.
func (r *receiver) apply(ctx context.Context) error {
	if err := r.fit(ctx); err != nil {
		return err
	}
	t := newTransfer(r.dev)
	err := r.copyFrom(ctx, t)
	if err == nil {
		return r.flush(ctx, t)
	}
	// The buffers are the device's until all has ended.
	late := context.WithoutCancel(ctx)
	if drained := t.drain(late, nil); drained != nil || !r.resumable {
		return err
	}
	return errors.Join(err, r.notePosition(late, t, r.at))
}

// fit gives the volume the size that it had in the snapshot. The registry learns
// it in the end.
func (r *receiver) fit(ctx context.Context) error {
	switch now := r.dev.Info().Size; {
	case now < r.header.Size:
		return r.dev.Resize(ctx, r.header.Size)
	case now > r.header.Size:
		return r.dev.Shrink(ctx, r.header.Size, true)
	}
	return nil
}

func (r *receiver) copyFrom(ctx context.Context, t *transfer) error {
	for {
		e, err := r.stream.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
		p, err := t.get(ctx, nil)
		if err != nil {
			return err
		}
		if e.Data == nil {
			if err := r.zero(ctx, t, p, e); err != nil {
				return err
			}
		} else {
			copy(p.buffer(e.Length), e.Data)
			t.submit(p, block.OpWrite, e.Offset, e.Length)
		}
		r.at = e.Offset + e.Length
		if r.resumable && r.stream.Totals().DataBytes-r.noted >= positionBytes {
			if err := r.notePosition(ctx, t, r.at); err != nil {
				return err
			}
		}
	}
}

// zero forgets an extent, in requests that the device takes.
func (r *receiver) zero(ctx context.Context, t *transfer, p *pending, e stream.Extent) (err error) {
	limit := r.dev.Info().MaxDiscard
	if limit == 0 {
		limit = e.Length
	}
	for off, end := e.Offset, e.Offset+e.Length; off < end; {
		if p == nil {
			if p, err = t.get(ctx, nil); err != nil {
				return err
			}
		}
		n := min(end-off, limit)
		t.submit(p, block.OpDiscard, off, n)
		off, p = off+n, nil
	}
	return nil
}

// notePosition records how far a resumable receive is.
func (r *receiver) notePosition(ctx context.Context, t *transfer, position uint64) error {
	if err := r.flush(ctx, t); err != nil {
		return err
	}
	r.noted = r.stream.Totals().DataBytes
	pool, vol, err := registry.SplitName(r.name)
	if err != nil {
		return err
	}
	_, err = registry.Update(ctx, r.set.reg, registry.VolumeKey(pool, vol), func(v *registry.Volume) error {
		if v.Incomplete != nil {
			v.Incomplete.Position = max(v.Incomplete.Position, position)
		}
		return nil
	})
	return err
}

// flush makes all that was submitted durable.
func (r *receiver) flush(ctx context.Context, t *transfer) error {
	if err := t.drain(ctx, nil); err != nil {
		return err
	}
	p, err := t.get(ctx, nil)
	if err != nil {
		return err
	}
	t.submit(p, block.OpFlush, 0, 0)
	return t.drain(ctx, nil)
}

// finish makes the snapshot and gives the volume free.
func (r *receiver) finish(ctx context.Context) (registry.Volume, registry.Snapshot, error) {
	h := r.set
	v, leave, err := h.enter(ctx, r.name)
	if err != nil {
		return registry.Volume{}, registry.Snapshot{}, err
	}
	defer leave()
	e, err := h.load(ctx, r.name)
	if err != nil {
		return e.Record, registry.Snapshot{}, err
	}
	s, err := h.createSnapshotIn(ctx, r.dev, e, r.header.Snapshot.ID, control.CreateSnapshot{Name: r.header.Snapshot.Name, Metadata: r.header.Snapshot.Metadata})
	if err != nil {
		return e.Record, s, err
	}
	if e, err = h.endIncomplete(ctx, e, r.dev.Info().Size); err != nil {
		return e.Record, s, err
	}
	r.release()
	r.release = func() {}
	h.setIncomplete(v, "")
	h.serve(v)
	return e.Record, s, nil
}

// giveUp undoes a receive that failed, or leaves it to be resumed.
func (r *receiver) giveUp(ctx context.Context, cause error) error {
	r.release()
	r.release = func() {}
	if !r.resumable {
		return errors.Join(cause, r.set.undoIncomplete(ctx, r.name))
	}
	e, err := r.set.load(ctx, r.name)
	if err != nil || e.Record.Incomplete == nil {
		return errors.Join(cause, err)
	}
	return fmt.Errorf("%w; resume it with an export that has --start %d", cause, e.Record.Incomplete.Position)
}
