package disk

import (
	"fmt"

	"scoria/alba/asd"
	"scoria/alba/vfs"
)

// writeValueFile writes a file and makes its contents durable. On error nothing
// is left but perhaps the file, which it tries to remove.
func (d *Disk) writeValueFile(id uint64, key string, v *asd.Value, sum uint32) (err error) {
	if err := d.ensureDir(id); err != nil {
		return err
	}
	name := d.valueName(id)
	f, err := d.fs.Open(name, vfs.Create|vfs.Exclusive)
	if err != nil {
		return d.writeError(key, err)
	}
	defer func() {
		if closeErr := f.Close(); err == nil && closeErr != nil {
			err = d.writeError(key, closeErr)
		}
		if err != nil {
			_ = d.fs.Remove(name) // the sweep at the next start gets what stays
		}
	}()
	if err := writeContents(f, encodeFileHead(id, key, v, sum), v.Data); err != nil {
		return d.writeError(key, err)
	}
	if err := f.Sync(); err != nil {
		d.fail(fmt.Errorf("sync %s: %w", name, err))
		return d.failErr()
	}
	return nil
}

// writeContents writes through the page cache: direct writes of an upload's fragments,
// of 1 or 4 MiB and from aligned memory, took a quarter longer, since each waits for
// the disk before the next begins.
func writeContents(f vfs.File, head, data []byte) error {
	if err := f.Allocate(0, int64(len(head)+len(data))); err != nil {
		return err
	}
	_, err := f.WriteVecAt([][]byte{head, data}, 0)
	return err
}
