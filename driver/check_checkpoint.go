package driver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"

	"scoria/driver/lba"
)

// checkCheckpoint verifies roots and page objects, on the local disk and in the
// store. It holds no lock: what fails and is no longer needed was replaced by a
// checkpoint meanwhile.
func (v *Volume) checkCheckpoint(ctx context.Context, rep *CheckReport) {
	c := v.ckpt
	c.mu.Lock()
	sequence := c.sequence
	var stored []uint32
	for o := range c.inStore {
		stored = append(stored, o)
	}
	c.mu.Unlock()
	if sequence == 0 {
		return
	}
	v.checkLocalRoot(sequence, rep)
	v.checkStoredRoots(ctx, rep)
	for _, o := range c.own(v.m.Objects()) {
		name := pagesName(o)
		if info, err := v.eng.cfg.FS.Stat(v.mapPath(name)); err == nil {
			v.checkPages(o, "local copy", localFile{v.eng.cfg.FS, v.mapPath(name)}, info.Size(), rep)
		} else if !slices.Contains(stored, o) && v.needsPages(o) {
			rep.problem("checkpoint: %s: %v", name, err)
		}
		if !slices.Contains(stored, o) || ctx.Err() != nil {
			continue
		}
		size, err := v.cfg.Store.Size(ctx, v.namespace(), name)
		if err == nil {
			v.checkPages(o, "store's copy", storeObject{ctx, v, name}, size, rep)
		} else if v.needsPages(o) {
			rep.problem("checkpoint: %s: store's copy: %v", name, err)
		}
	}
}

// needsPages reports whether the map still refers to a page object.
func (v *Volume) needsPages(object uint32) bool { return slices.Contains(v.m.Objects(), object) }

// soundPages reads all of a page object.
func (v *Volume) soundPages(object uint32, r io.ReaderAt, size int64) error {
	o, err := lba.OpenPageObject(r, size, v.cfg.ID, object)
	if err != nil {
		return err
	}
	page := make([]byte, lba.PageBytes)
	for i := range uint32(o.Pages()) {
		if err := o.ReadPage(r, i, page); err != nil {
			return fmt.Errorf("page %d: %w", i, err)
		}
	}
	return nil
}

func (v *Volume) checkPages(object uint32, which string, r io.ReaderAt, size int64, rep *CheckReport) {
	err := v.soundPages(object, r, size)
	if errors.Is(err, ErrLost) {
		v.lostInStore(pagesName(object))
	}
	if err != nil && v.needsPages(object) {
		rep.problem("checkpoint: %s: %s: %v", pagesName(object), which, err)
	}
}

func (v *Volume) checkLocalRoot(sequence uint64, rep *CheckReport) {
	name := rootName(sequence)
	info, err := v.eng.cfg.FS.Stat(v.mapPath(name))
	if err == nil {
		_, err = lba.ReadRoot(localFile{v.eng.cfg.FS, v.mapPath(name)}, info.Size())
	}
	if err == nil || errors.Is(err, fs.ErrNotExist) { // replaced, or restored from the store only
		return
	}
	rep.problem("checkpoint: %s: local copy: %v", name, err)
}

func (v *Volume) checkStoredRoots(ctx context.Context, rep *CheckReport) {
	names, err := v.cfg.Store.List(ctx, v.namespace(), rootPrefix)
	if err != nil {
		rep.problem("checkpoint: roots in the store: %v", err)
		return
	}
	for _, name := range names {
		_, err := v.storedRoot(ctx, name)
		if errors.Is(err, ErrLost) {
			v.lostInStore(name)
		}
		if err != nil && !errors.Is(err, ErrNoObject) {
			rep.problem("checkpoint: %s: store's copy: %v", name, err)
		}
	}
}
