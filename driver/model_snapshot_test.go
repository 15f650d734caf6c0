package driver_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"

	"scoria/driver"
	"scoria/driver/block"
)

// shot is a snapshot beside what it must read as. That it is in the world's list
// is the registry's record.
type shot struct {
	driver.Snapshot
	data []byte
}

// maxShots bounds how many snapshots a world keeps at a time.
const maxShots = 6

func randomID(rng *rand.Rand) (id uuid.UUID) {
	binary.LittleEndian.PutUint64(id[:], rng.Uint64())
	binary.LittleEndian.PutUint64(id[8:], rng.Uint64()|1)
	return id
}

// maxBuried bounds how many deleted snapshots a world remembers.
const maxBuried = 20

// readRegistry fills in what the next opening is told of snapshots. Often it is an
// older copy, which lacks some that were made and names some that were deleted.
func (w *world) readRegistry() {
	w.cfg.Snapshots, w.cfg.Deleting = nil, w.dying
	old := w.rng.IntN(2) == 0
	for _, s := range w.shots {
		if !old || w.rng.IntN(2) == 0 {
			w.cfg.Snapshots = append(w.cfg.Snapshots, s.Snapshot)
		}
	}
	for _, s := range w.buried {
		if old && w.rng.IntN(3) == 0 {
			w.cfg.Snapshots = append(w.cfg.Snapshots, s)
		}
	}
	w.rng.Shuffle(len(w.cfg.Snapshots), func(i, j int) {
		w.cfg.Snapshots[i], w.cfg.Snapshots[j] = w.cfg.Snapshots[j], w.cfg.Snapshots[i]
	})
}

// bury remembers snapshots that are gone for good.
func (w *world) bury(gone ...driver.Snapshot) {
	w.buried = append(w.buried, gone...)
	w.buried = w.buried[max(0, len(w.buried)-maxBuried):]
}

// finishSnapshots does what the host does after an opening: a snapshot that was
// being made may be there, one that was being deleted goes.
func (w *world) finishSnapshots() {
	w.t.Helper()
	if m := w.making; m != nil {
		w.making = nil
		for _, s := range w.vol.Snapshots() {
			if s.ID == m.ID {
				if s.Name != m.Name || s.Metadata["n"] != m.Name {
					w.t.Fatalf("%s: adopted %+v, made was %s", w.where(), s, m.Name)
				}
				w.shots = append(w.shots, shot{s, m.data})
			}
		}
	}
	for _, s := range w.dying {
		if err := w.vol.DeleteSnapshot(context.Background(), s.ID); err != nil {
			w.t.Fatalf("%s: finish the deletion of %s: %v", w.where(), s.Name, err)
		}
	}
	w.bury(w.dying...)
	w.dying = nil
}

func (w *world) snapshot() error {
	name := fmt.Sprintf("s%d", len(w.trace))
	w.note("snapshot %s", name)
	id := randomID(w.rng)
	w.making = &shot{driver.Snapshot{ID: id, Name: name}, bytes.Clone(w.model)}
	s, err := w.vol.CreateSnapshot(context.Background(), id, name, map[string]string{"n": name})
	if err != nil {
		return err
	}
	w.making = nil
	if s.Size != w.vol.Info().Size || s.Name != name {
		w.t.Fatalf("%s: made %+v", w.where(), s)
	}
	w.shots = append(w.shots, shot{s, bytes.Clone(w.model)})
	w.settled()
	return nil
}

func (w *world) deleteShot(i int) error {
	s := w.shots[i]
	w.note("delete snapshot %s", s.Name)
	w.shots = slices.Delete(w.shots, i, i+1)
	w.dying = append(w.dying, s.Snapshot)
	if err := w.vol.DeleteSnapshot(context.Background(), s.ID); err != nil {
		return err
	}
	w.bury(w.dying...)
	w.dying = nil
	return nil
}

// deleteLocked tries to delete a snapshot that a clone builds on, unless that has just
// become independent: one that needs nothing of it is, once its root is published.
func (w *world) deleteLocked(i int) error {
	s := w.shots[i]
	w.note("delete snapshot %s, which has a clone", s.Name)
	err := w.vol.DeleteSnapshot(context.Background(), s.ID)
	switch {
	case errors.Is(err, driver.ErrSnapshotInUse):
		return nil
	case w.locked(s.ID):
		return fmt.Errorf("delete a snapshot with clones: %w", err)
	}
	w.shots = slices.Delete(w.shots, i, i+1)
	if err != nil {
		w.dying = append(w.dying, s.Snapshot)
		return err
	}
	w.bury(s.Snapshot)
	return nil
}

// readShot compares part of a snapshot.
func (w *world) readShot(s shot, off, length uint64) error {
	view, err := w.vol.OpenSnapshot(context.Background(), s.ID)
	if err != nil {
		return err
	}
	defer view.Close()
	got := make([]byte, min(length, s.Size-off))
	if err := do(view, &block.Request{Op: block.OpRead, Offset: off, Length: uint64(len(got)), Segments: w.split(got)}); err != nil {
		return fmt.Errorf("read snapshot %s: %w", s.Name, err)
	}
	if want := s.data[off : off+uint64(len(got))]; !bytes.Equal(got, want) {
		w.t.Fatalf("%s: snapshot %s at %d+%d differs in clusters %v (from there on)", w.where(), s.Name, off, len(got), diff(got[:len(got)&^(cluster-1)], want))
	}
	return nil
}

// snapshotStep does one of the things that have to do with snapshots.
func (w *world) snapshotStep() error {
	if len(w.shots) == 0 || len(w.shots) < maxShots && w.rng.IntN(3) == 0 {
		return w.snapshot()
	}
	i := w.rng.IntN(len(w.shots))
	switch w.rng.IntN(14) {
	case 0:
		return w.rollback(i)
	case 1, 2:
		return w.changes(i)
	case 3, 4:
		w.note("seal and compact")
		w.vol.WaitSealed()
		return w.vol.CompactAll(context.Background())
	}
	if w.rng.IntN(3) == 0 {
		if w.locked != nil && w.locked(w.shots[i].ID) {
			return w.deleteLocked(i)
		}
		return w.deleteShot(i)
	}
	w.note("read snapshot %s", w.shots[i].Name)
	off, length := w.span(sector, 800)
	if off >= w.shots[i].Size {
		return nil
	}
	return w.readShot(w.shots[i], off, length)
}

// rollback goes back to a snapshot. The registry forgets the later ones when it has
// succeeded, or when the volume says after a crash that it had.
func (w *world) rollback(i int) error {
	s := w.shots[i]
	later := len(w.shots) - i - 1
	for _, l := range w.shots[i+1:] {
		if w.locked != nil && w.locked(l.ID) {
			return nil
		}
	}
	w.note("rollback to %s, over %d snapshots", s.Name, later)
	if later > 0 {
		var refused *driver.LaterSnapshotsError
		err := w.vol.Rollback(context.Background(), s.ID, false)
		if !errors.As(err, &refused) && err != nil {
			return err
		}
		if refused == nil || len(refused.Names) != later {
			w.t.Fatalf("%s: rollback over snapshots: %v", w.where(), err)
		}
	}
	w.rolling = &s
	if err := w.vol.Rollback(context.Background(), s.ID, true); err != nil {
		return err
	}
	w.rolled()
	return nil
}

// rolled makes the model what it was at the snapshot that the volume went back to.
func (w *world) rolled() {
	s := w.rolling
	w.rolling = nil
	w.model = bytes.Clone(s.data)
	w.resized(s.Size)
	w.settled()
	w.shots = slices.DeleteFunc(w.shots, func(o shot) bool {
		if o.Sequence > s.Sequence {
			w.bury(o.Snapshot)
		}
		return o.Sequence > s.Sequence
	})
}

func (w *world) resized(size uint64) {
	w.size, w.cfg.Size = size, size
}

// opened finishes what the registry could not while the volume was gone.
func (w *world) opened() {
	w.t.Helper()
	w.finishSnapshots()
	if w.rolling != nil {
		// Either all later snapshots are there, or none is and it has happened. If
		// there are none it shows in the data.
		later := slices.ContainsFunc(w.shots, func(o shot) bool { return o.Sequence > w.rolling.Sequence })
		n := len(w.vol.Snapshots())
		switch {
		case later && n == len(w.shots):
		case later:
			w.rolled()
		case bytes.Equal(w.readUpTo(w.rolling.Size), w.rolling.data):
			w.rolled()
		}
		w.rolling = nil
		if size := w.vol.Info().Size; size < w.size { // the registry had the old one
			if err := w.vol.Resize(context.Background(), w.size); err != nil {
				w.t.Fatalf("%s: %v", w.where(), err)
			}
		} else if size > w.size {
			if err := w.vol.Shrink(context.Background(), w.size, false); err != nil {
				w.t.Fatalf("%s: %v", w.where(), err)
			}
		}
	}
	if w.vol.Info().Size != w.size {
		w.t.Fatalf("%s: opened with %d bytes, want %d", w.where(), w.vol.Info().Size, w.size)
	}
}

// readUpTo reads the beginning of a volume that may be smaller.
func (w *world) readUpTo(size uint64) []byte {
	size = min(size, w.vol.Info().Size)
	was := w.size
	w.size = size
	defer func() { w.size = was }()
	return w.readAll()
}

// changes compares what is said to have changed since a snapshot with what has.
func (w *world) changes(i int) error {
	var upTo uuid.UUID
	since, now := w.shots[i], w.model
	if j := w.rng.IntN(len(w.shots) + 1); j < len(w.shots) {
		upTo, now = w.shots[j].ID, w.shots[j].data
	}
	w.note("changes since %s up to %v", since.Name, upTo)
	off, length := w.span(sector, 2000)
	end := min(off+length, uint64(len(now)))
	at := off
	err := w.vol.Changes(context.Background(), since.ID, upTo, off, length, func(e block.Extent) bool {
		if e.Offset != at || e.Length == 0 {
			w.t.Fatalf("%s: extent %+v, want one from %d on", w.where(), e, at)
		}
		at += e.Length
		if e.Mapped {
			return true
		}
		for p := e.Offset; p < at; p += sector {
			old := make([]byte, sector)
			if p < uint64(len(since.data)) {
				old = since.data[p : p+sector]
			}
			if !bytes.Equal(old, now[p:p+sector]) {
				w.t.Fatalf("%s: byte %d differs and is not said to", w.where(), p)
			}
		}
		return true
	})
	if err == nil && off < end && at != end {
		w.t.Fatalf("%s: changes end at %d, want %d", w.where(), at, end)
	}
	return err
}

// resize makes the volume larger or smaller.
func (w *world) resize() error {
	size := uint64(1+w.rng.IntN(int(w.size>>20)+2)) << 20
	size = min(size, 10<<20)
	w.note("resize %d to %d", w.size, size)
	if size >= w.size {
		w.cfg.Size = size // the registry knows first
		if err := w.vol.Resize(context.Background(), size); err != nil {
			return err
		}
		w.grown(size)
		return nil
	}
	lost := !bytes.Equal(w.model[size:], make([]byte, w.size-size))
	var refused *driver.ShrinkError
	err := w.vol.Shrink(context.Background(), size, false)
	if errors.As(err, &refused) {
		// Zeroes that were written are data, too.
		if refused.Bytes == 0 || refused.Last < size || refused.Last >= w.size {
			w.t.Fatalf("%s: %v", w.where(), err)
		}
		w.history = append(w.history, update{size, make([]byte, w.size-size)})
		err = w.vol.Shrink(context.Background(), size, true)
	} else if lost && err == nil {
		w.t.Fatalf("%s: data was lost unasked", w.where())
	}
	if err != nil {
		return err
	}
	w.model = w.model[:size]
	w.resized(size)
	w.settled()
	return nil
}

func (w *world) grown(size uint64) {
	if size > w.size {
		more := make([]byte, size-w.size)
		w.model = append(bytes.Clone(w.model), more...)
		w.flushed = append(bytes.Clone(w.flushed), more...)
	}
	w.resized(size)
}

// verifyShots compares all snapshots, and what the volume says of them.
func (w *world) verifyShots() {
	w.t.Helper()
	var names []string
	for _, s := range w.vol.Snapshots() {
		names = append(names, s.Name)
	}
	var want []string
	for _, s := range w.shots {
		want = append(want, s.Name)
		for off := uint64(0); off < s.Size; off += 4 << 20 {
			if err := w.readShot(s, off, 4<<20); err != nil {
				w.t.Fatalf("%s: %v", w.where(), err)
			}
		}
	}
	if !slices.Equal(names, want) {
		w.t.Fatalf("%s: the volume has snapshots %v, want %v", w.where(), names, want)
	}
}

// verifySpace sees that exactly what is reached takes space when all has been given
// back that can be: no SCO, page object or root too few or too many.
func (w *world) verifySpace() {
	w.t.Helper()
	ctx := context.Background()
	must := func(err error) {
		w.t.Helper()
		if err != nil {
			w.t.Fatalf("%s: %v", w.where(), err)
		}
	}
	settle := func() {
		for try := 0; try < 3 || !w.vol.Settled(); try++ {
			must(w.vol.CheckpointAnew(ctx))
			w.vol.WaitSealed()
			for range 3 { // the one that waits, the one behind it, and what is dead
				_, err := w.vol.Publish(ctx)
				must(err)
			}
			if try > 200 {
				w.t.Fatalf("%s: there is always something left to do", w.where())
			}
		}
	}
	settle()
	must(w.vol.CompactAll(ctx))
	settle()
	reached, objects, err := w.vol.Reached(ctx)
	must(err)
	held := w.vol.Held()
	for n := range reached {
		if !held[n] {
			w.t.Fatalf("%s: SCO %d is reached and gone", w.where(), n)
		}
	}
	for n := range held {
		if reached[n] == 0 {
			w.t.Fatalf("%s: SCO %d is not reached and takes space", w.where(), n)
		}
	}
	names, err := w.store.List(ctx, w.cfg.ID.String(), "")
	must(err)
	var want []string
	for n := range reached {
		generation, clusters, pinned := w.vol.Generation(n)
		if pinned > 0 && pinned != clusters {
			w.t.Fatalf("%s: SCO %d, generation %d, has %d clusters, snapshots reach %d", w.where(), n, generation, clusters, pinned)
		}
		want = append(want, driver.ObjectName(n, generation))
	}
	for o := range objects {
		want = append(want, fmt.Sprintf("pages-%08x", o))
	}
	for _, s := range w.shots {
		want = append(want, fmt.Sprintf("snap-%016x", s.Sequence))
	}
	slices.Sort(want)
	got := slices.DeleteFunc(names, func(n string) bool { return strings.HasPrefix(n, "root-") })
	slices.Sort(got)
	if !slices.Equal(got, want) {
		w.t.Fatalf("%s: the store has\n%v\nwant\n%v", w.where(), got, want)
	}
	w.verifyAlone(ctx)
}

// verifyAlone compares the space of each snapshot with what deleting it would give.
func (w *world) verifyAlone(ctx context.Context) {
	w.t.Helper()
	got, err := w.vol.SnapshotSpace(ctx)
	if err != nil {
		w.t.Fatalf("%s: %v", w.where(), err)
	}
	want, notLive, err := w.vol.ReachedAlone(ctx)
	if err != nil {
		w.t.Fatalf("%s: %v", w.where(), err)
	}
	if space := w.vol.Stats().Space; space.Snapshots != notLive*cluster {
		w.t.Fatalf("%s: snapshots hold %d clusters, %d are said", w.where(), notLive, space.Snapshots/cluster)
	}
	for _, s := range w.shots {
		if got[s.ID] != want[s.ID]*cluster {
			w.t.Fatalf("%s: snapshot %s alone holds %d clusters, %d are said", w.where(), s.Name, want[s.ID], got[s.ID]/cluster)
		}
	}
}

// TestSnapshotSpace: deleting snapshots in any order gives back what they held
// alone, and at the end everything that is not live.
func TestSnapshotSpace(t *testing.T) {
	forStores(t, raced(10, 3), raced(2, 1), func(t *testing.T, k storeKind, rng *rand.Rand) {
		w := newWorld(t, k, rng, 4<<20, 1<<20, 8<<20)
		must := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatalf("%s: %v", w.where(), err)
			}
		}
		for range 5 {
			for range 1 + rng.IntN(20) {
				off, length := w.span(cluster, 100)
				must(w.write(off, length, false))
			}
			must(w.snapshot())
		}
		w.verifySpace()
		w.verifyShots()
		for len(w.shots) > 0 {
			must(w.deleteShot(rng.IntN(len(w.shots))))
			if rng.IntN(2) == 0 {
				w.restart()
			}
			w.verifySpace()
			w.verifyShots()
			w.check()
		}
	})
}

// TestSnapshotRefusals: what can't be done is refused and changes nothing.
func TestSnapshotRefusals(t *testing.T) { overStores(t, testSnapshotRefusals) }

func testSnapshotRefusals(t *testing.T, k storeKind) {
	w := newWorld(t, k, rand.New(rand.NewPCG(1, 1)), 4<<20, 1<<20, 8<<20)
	ctx := context.Background()
	if err := w.write(0, 8*cluster, false); err != nil {
		t.Fatal(err)
	}
	if err := w.snapshot(); err != nil {
		t.Fatal(err)
	}
	s := w.shots[0]
	if _, err := w.vol.CreateSnapshot(ctx, s.ID, "again", nil); !errors.Is(err, driver.ErrSnapshotExists) {
		t.Errorf("the same id again: %v", err)
	}
	if _, err := w.vol.CreateSnapshot(ctx, uuid.Nil, "nobody", nil); err == nil {
		t.Error("a snapshot without an id was made")
	}
	if _, err := w.vol.OpenSnapshot(ctx, uuid.UUID{9}); !errors.Is(err, driver.ErrNoSnapshot) {
		t.Errorf("unknown snapshot: %v", err)
	}
	view, err := w.vol.OpenSnapshot(ctx, s.ID)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.vol.DeleteSnapshot(ctx, s.ID); !errors.Is(err, driver.ErrSnapshotInUse) {
		t.Errorf("deleted while it is read: %v", err)
	}
	if err := do(view, &block.Request{Op: block.OpWrite, Length: cluster, Segments: [][]byte{make([]byte, cluster)}}); !errors.Is(err, block.ErrReadOnly) {
		t.Errorf("write to a snapshot: %v", err)
	}
	if err := do(view, &block.Request{Op: block.OpRead, Offset: s.Size, Length: cluster, Segments: [][]byte{make([]byte, cluster)}}); !errors.Is(err, block.ErrRange) {
		t.Errorf("read behind the end: %v", err)
	}
	if _, err := view.Claim(block.Claimant{Kind: "test"}); !errors.Is(err, block.ErrReadOnly) {
		t.Errorf("claim of a snapshot: %v", err)
	}
	var mapped uint64
	if err := view.BlockStatus(ctx, 0, s.Size, func(e block.Extent) bool {
		if e.Mapped {
			mapped += e.Length
		}
		return true
	}); err != nil || mapped != 8*cluster {
		t.Errorf("%d bytes are mapped, %v", mapped, err)
	}
	if err := view.Close(); err != nil {
		t.Fatal(err)
	}
	if err := do(view, &block.Request{Op: block.OpRead, Length: cluster, Segments: [][]byte{make([]byte, cluster)}}); !errors.Is(err, block.ErrClosed) {
		t.Errorf("read of a closed view: %v", err)
	}
	w.verifyShots()
	for range 2 {
		if err := w.vol.DeleteSnapshot(ctx, s.ID); err != nil {
			t.Errorf("delete: %v", err)
		}
	}
	w.shots = nil
	w.verifySpace()
}
