package driver

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"scoria/driver/lba"
)

// An object that the store has lost while the local disk still has it, a SCO or a file of
// the map, is stored anew as soon as somebody finds out: the store's maintenance
// (LostInStore) or a check. The local copy is verified first, and is not given up for room
// while the store has no place for it, or if it is damaged and so can't be stored. The store
// replaces the object in one step and asserts the epoch, so that a crash leaves the one or the
// other and a stale owner neither.

// maxLostObjects bounds what is remembered: what does not fit is told again.
const maxLostObjects = 1 << 12

// Pauses between attempts to store what is lost.
const (
	minLostPause = 100 * time.Millisecond
	maxLostPause = 10 * time.Second
)

// lostObjects are those of a volume's objects that the store is said to have lost. Under mu only
// metaMu is taken, so that names and what keepLocal says agree.
type lostObjects struct {
	mu    sync.Mutex
	names map[string]bool // whether the local copy was found to be sound since
	busy  bool            // there is a goroutine
}

// LostInStore tells an open volume that the store can't repair one of its objects,
// which may be so for a while only. It does not block; from any goroutine.
func (e *Engine) LostInStore(namespace, object string) {
	id, err := uuid.Parse(namespace)
	if err != nil {
		return
	}
	e.mu.Lock()
	v := e.volumes[id]
	e.mu.Unlock()
	if v != nil {
		v.lostInStore(object)
	}
}

// lostInStore has the object stored anew if the local disk has it.
func (v *Volume) lostInStore(name string) {
	if _, ok := v.cfg.Store.(LostPutter); !ok {
		return
	}
	l := &v.again
	l.mu.Lock()
	if l.names == nil {
		l.names = map[string]bool{}
	}
	if _, known := l.names[name]; !known {
		if len(l.names) == maxLostObjects {
			l.mu.Unlock()
			return
		}
		l.names[name] = false
	}
	v.keepLocal(name, true)
	begin := !l.busy
	l.busy = true
	l.mu.Unlock()
	if begin && !v.spawn(v.putLostObjects) {
		l.mu.Lock() // the volume is closing
		l.busy = false
		l.mu.Unlock()
	}
}

// keepLocal says whether the local copy of a SCO may not be given up, by its object's name.
func (v *Volume) keepLocal(name string, keep bool) {
	if m := v.scoOf(name); m != nil {
		v.metaMu.Lock()
		m.lost = keep
		v.metaMu.Unlock()
	}
}

// scoOf is the sealed SCO whose object has that name; nil if there is none, or none any more.
func (v *Volume) scoOf(name string) *scoMeta {
	number, ok := strings.CutPrefix(name, scoPrefix)
	if !ok {
		return nil
	}
	n, generation, ok := parseSCO(number)
	if !ok {
		return nil
	}
	v.metaMu.Lock()
	defer v.metaMu.Unlock()
	if m := v.scos[n]; m != nil && m.generation() == generation {
		return m
	}
	return nil
}

// putLostObjects stores what is lost until nothing is left, or the volume begins to close.
func (v *Volume) putLostObjects() {
	l := &v.again
	pause := minLostPause
	for {
		l.mu.Lock()
		if len(l.names) == 0 || v.ckpt.work.Err() != nil {
			l.busy = false
			l.mu.Unlock()
			return
		}
		names := make([]string, 0, len(l.names))
		for name := range l.names {
			names = append(names, name)
		}
		l.mu.Unlock()
		left := 0
		for _, name := range names {
			err := v.putLost(v.ckpt.work, name)
			if v.ckpt.work.Err() != nil {
				break
			}
			if !settlesLost(err) {
				v.log.Debug().Err(err).Str("object", name).Msg("what the store has lost can't be stored anew yet")
				left++
				continue
			}
			l.mu.Lock()
			delete(l.names, name)
			v.keepLocal(name, errors.Is(err, errUnsound))
			l.mu.Unlock()
		}
		if left == 0 {
			pause = minLostPause
			continue
		}
		if pauseFor(v.ckpt.work, pause) == nil {
			pause = min(2*pause, maxLostPause)
		}
	}
}

// errUnsound: the local copy is damaged, too. What is sound in it is nowhere else.
var errUnsound = errors.New("the local copy of what the store has lost is damaged")

// settlesLost says whether an attempt to store what is lost was the last one: it was stored,
// is no longer wanted, is not this volume's any more, or can't be. After anything else, an
// outage for one, the local copy is still needed for that.
func settlesLost(err error) bool {
	return err == nil || errors.Is(err, errUnsound) || errors.Is(err, ErrExists) || errors.Is(err, ErrNoObject) || errors.Is(err, ErrStaleEpoch)
}

// putLost stores an object anew, if it is lost and the local disk has it. See settlesLost for
// its errors.
func (v *Volume) putLost(ctx context.Context, name string) error {
	if m := v.scoOf(name); m != nil {
		return v.putLostSCO(ctx, m)
	}
	sound := v.soundMapFile(name)
	if sound == nil {
		return nil
	}
	path := v.mapPath(name)
	info, err := v.eng.cfg.FS.Stat(path)
	if err == nil {
		f := localFile{v.eng.cfg.FS, path}
		if err = sound(f, info.Size()); err == nil {
			ctx, cancel := context.WithTimeout(ctx, putTimeout)
			defer cancel()
			return v.replaceLost(ctx, name, Object{Data: f, Size: info.Size(), LocalPath: path})
		}
	}
	if !errors.Is(err, fs.ErrNotExist) { // else nobody needs it any more, or only the store had it
		v.log.Warn().Err(err).Str("object", name).Msg("what the store has lost is not sound on the local disk")
		return errUnsound
	}
	return nil
}

// soundMapFile returns what verifies a file of the map by its name; nil if it is none.
func (v *Volume) soundMapFile(name string) func(r io.ReaderAt, size int64) error {
	switch object, pages := parsePages(name); {
	case pages:
		return func(r io.ReaderAt, size int64) error { return v.soundPages(object, r, size) }
	case strings.HasPrefix(name, rootPrefix), strings.HasPrefix(name, snapPrefix):
		return func(r io.ReaderAt, size int64) error {
			_, err := lba.ReadRoot(r, size)
			return err
		}
	}
	return nil
}

func (v *Volume) putLostSCO(ctx context.Context, m *scoMeta) error {
	v.metaMu.Lock()
	local := m.local && m.uploaded && !m.dropping
	v.metaMu.Unlock()
	if !local {
		return nil
	}
	if err := v.anyLost(ctx, v.objectOf(m), m.size); !errors.Is(err, ErrLost) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return err
	}
	f, release, err := v.openLocal(m)
	if err != nil {
		return nil // whoever reads it finds out
	}
	defer release()
	if err := v.soundLocal(ctx, m, f); err != nil {
		return err
	}
	turn := v.uploadTurn(m.size)
	defer turn()
	return v.replaceLost(ctx, v.objectOf(m), Object{Data: f, Size: m.size, LocalPath: v.pathOf(m),
		Sums: func() ([]uint32, error) { return v.pageSums(m, f) }})
}

// soundLocal verifies the local copy of a SCO, but only once while the store has no place for
// it. It fails with errUnsound.
func (v *Volume) soundLocal(ctx context.Context, m *scoMeta, f io.ReaderAt) error {
	l, name := &v.again, v.objectOf(m)
	l.mu.Lock()
	sound := l.names[name]
	l.mu.Unlock()
	if sound {
		return nil
	}
	var rep CheckReport
	v.checkCopy(ctx, m, "local copy", f, &rep)
	if err := ctx.Err(); err != nil {
		return err
	}
	if len(rep.Problems) > 0 {
		v.log.Warn().Uint64("sco", m.number).Strs("problems", rep.Problems).Msg("what the store has lost is not sound on the local disk")
		return errUnsound
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, wanted := l.names[name]; wanted {
		l.names[name] = true
	}
	return nil
}

// anyLost reads an object from the store until that fails, ErrLost if some of it is lost. As long as
// the store only can't be reached that costs little: verifying all local copies that it might
// have lost, again and again, would take the disk from guests.
func (v *Volume) anyLost(ctx context.Context, name string, size int64) error {
	buf := make([]byte, min(size, maxLostRead))
	for off := int64(0); off < size; off += int64(len(buf)) {
		p := buf[:min(int64(len(buf)), size-off)]
		if err := v.cfg.Store.ReadAt(ctx, v.namespace(), name, p, off); err != nil {
			return err
		}
	}
	return nil
}

// replaceLost gives the store an object that it may have lost.
func (v *Volume) replaceLost(ctx context.Context, name string, obj Object) error {
	err := v.cfg.Store.(LostPutter).PutLost(ctx, v.namespace(), name, v.cfg.Epoch, obj)
	switch {
	case errors.Is(err, ErrExists):
		v.raise("corrupt-data", "%s differs between the store and the local disk, and the store has lost a part of it: run scoria volume check %s", name, v.cfg.Name)
	case errors.Is(err, ErrStaleEpoch):
		v.fence(err)
	}
	return err
}
