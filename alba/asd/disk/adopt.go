package disk

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"scoria/alba/asd"
	"scoria/alba/vfs"
)

var _ asd.Adopter = (*Disk)(nil)

// Adopt implements asd.Adopter: the caller's goroutine links and syncs the file, the
// committer does the rest, as for any Apply.
func (d *Disk) Adopt(ctx context.Context, file string, parts []asd.FilePart, asserts []asd.Assert, updates []asd.Update, pri asd.Priority) error {
	if err := d.enter(); err != nil {
		return err
	}
	defer d.leave()
	err := d.adopt(ctx, file, parts, asserts, updates, pri)
	if err != nil {
		d.n.refused.Add(1)
	}
	return err
}

func (d *Disk) adopt(ctx context.Context, file string, parts []asd.FilePart, asserts []asd.Assert, updates []asd.Update, pri asd.Priority) error {
	if err := asd.CheckAdopt(parts, updates); err != nil {
		return err
	}
	req, done, err := d.admit(asserts, updates, pri, recordsRoom(parts))
	if err != nil {
		return err
	}
	defer done()
	err = d.prepare(ctx, req, updates)
	if err == nil {
		err = d.linkParts(ctx, req, file, parts)
	}
	if err != nil {
		d.discard(req)
		return err
	}
	return d.commit(ctx, req)
}

// recordsRoom is what the records of a file's parts take, in bytes. The file itself
// takes no more room than before.
func recordsRoom(parts []asd.FilePart) (room int64) {
	for i := range parts {
		room += int64(recordHead + 16 + 4*len(parts[i].CRCs))
	}
	return room
}

// linkParts gives the file a name for each part, and makes its contents durable. The
// parts come behind the request's updates.
func (d *Disk) linkParts(ctx context.Context, req *applyReq, file string, parts []asd.FilePart) error {
	if err := d.gate.acquire(ctx, req.pri); err != nil {
		return err
	}
	defer d.gate.release(req.pri)
	end, from := int64(0), file
	for i := range parts {
		p := &parts[i]
		end = max(end, p.Off+p.Size)
		id, err := d.allocID(ctx)
		if err != nil {
			return err
		}
		if err := d.ensureDir(id); err != nil {
			return err
		}
		if err := d.fs.Link(from, d.valueName(id)); err != nil {
			return d.linkError(p.Key, file, err)
		}
		from = d.valueName(id) // the same file, whatever becomes of the name
		record := encodeAdopted(p, id)
		req.ops = append(req.ops, op{kind: asd.KindPut, key: p.Key, record: record, rec: mustDecode(record)})
	}
	return d.syncAdopted(from, file, end)
}

// linkError is the error of a link: a full disk refuses this Adopt, and anything else
// means that the file has to be copied.
func (d *Disk) linkError(key, file string, err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return d.writeError(key, err)
	}
	return fmt.Errorf("key %q: %w: %s: %w", key, asd.ErrNotAdopted, file, err)
}

// syncAdopted makes what the file holds durable, which must be end bytes at least.
func (d *Disk) syncAdopted(name, file string, end int64) error {
	f, err := d.fs.Open(name, vfs.ReadOnly)
	if err != nil {
		return fmt.Errorf("adopt %s: %w", file, err)
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return fmt.Errorf("adopt %s: %w", file, err)
	}
	if size < end {
		return fmt.Errorf("%w: adopt %s: it has %d bytes, the parts end at %d", asd.ErrInvalid, file, size, end)
	}
	if err := f.Sync(); err != nil {
		d.fail(fmt.Errorf("sync %s: %w", file, err))
		return d.failErr()
	}
	return nil
}
