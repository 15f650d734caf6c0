package driver

import (
	"errors"
	"fmt"
	"io"
	"io/fs"

	"scoria/alba/vfs"
)

// stageMapFile makes the contents of a map file durable under a temporary name,
// which nameMapFile changes. It leaves nothing behind if it fails.
func (v *Volume) stageMapFile(name string, r io.ReaderAt, size int64) error {
	fsys := v.eng.cfg.FS
	tmp := v.mapPath(name) + ".tmp"
	f, err := fsys.Open(tmp, vfs.Create)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	err = f.Truncate(0)
	buf := make([]byte, 1<<20)
	for off := int64(0); off < size && err == nil; {
		p := buf[:min(int64(len(buf)), size-off)]
		if _, err = r.ReadAt(p, off); err == nil || errors.Is(err, io.EOF) {
			_, err = f.WriteAt(p, off)
		}
		off += int64(len(p))
	}
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		v.removeStaged(name)
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

func (v *Volume) removeStaged(name string) {
	if err := v.eng.cfg.FS.Remove(v.mapPath(name) + ".tmp"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		v.log.Warn().Err(err).Str("file", name).Msg("temporary checkpoint file can't be removed")
	}
}

// nameMapFile gives a staged file its name, durably. After an error the file may
// be under either name.
func (v *Volume) nameMapFile(name string) error {
	err := v.eng.cfg.FS.Rename(v.mapPath(name)+".tmp", v.mapPath(name))
	if err != nil {
		v.removeStaged(name)
	} else {
		err = v.eng.cfg.FS.SyncDir(v.mapDir())
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

func (c *checkpoints) removeMapFile(name string) {
	if err := c.v.eng.cfg.FS.Remove(c.v.mapPath(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		c.v.log.Warn().Err(err).Str("file", name).Msg("old checkpoint file can't be removed")
	}
}
