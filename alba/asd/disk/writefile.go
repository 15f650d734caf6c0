package disk

import (
	"fmt"
	"sync"

	"scoria/alba/asd"
	"scoria/alba/vfs"
)

const (
	// partBytes is the size of one direct write, of which partsAtOnce of one file are
	// under way together: more than one was no faster, since uploads write several
	// files at once.
	partBytes   = 1 << 20
	partsAtOnce = 1
)

// bouncePool holds aligned buffers of partBytes for values that lie anywhere.
var bouncePool = sync.Pool{New: func() any { b := alignedBytes(partBytes); return &b }}

// writeValueFile writes a file and makes its contents durable. On error nothing
// is left but perhaps the file, which it tries to remove.
func (d *Disk) writeValueFile(id uint64, key string, v *asd.Value, sum uint32) (err error) {
	if err := d.ensureDir(id); err != nil {
		return err
	}
	flags := vfs.Create | vfs.Exclusive
	direct := len(v.Data) >= d.opts.DirectBytes
	if direct {
		flags |= vfs.Direct
	}
	name := d.valueName(id)
	f, err := d.fs.Open(name, flags)
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
	head := encodeFileHead(id, key, v, sum)
	if direct {
		err = writeDirect(f, head, v.Data)
	} else {
		err = writeBuffered(f, head, v.Data)
	}
	if err != nil {
		return d.writeError(key, err)
	}
	if err := f.Sync(); err != nil {
		d.fail(fmt.Errorf("sync %s: %w", name, err))
		return d.failErr()
	}
	return nil
}

func writeBuffered(f vfs.File, head, data []byte) error {
	if err := f.Allocate(0, int64(len(head)+len(data))); err != nil {
		return err
	}
	_, err := f.WriteVecAt([][]byte{head, data}, 0)
	return err
}

// writeDirect writes whole pages; the last one's rest is cut off again, so that the
// file is the same however it was written. Memory that is not aligned is copied.
func writeDirect(f vfs.File, head, data []byte) error {
	size := int64(len(head) + len(data))
	if err := f.Allocate(0, (size+filePage-1)&^(filePage-1)); err != nil {
		return err
	}
	first := alignedBytes(len(head))
	copy(first, head)
	w := directWriter{file: f, parts: make([]vfs.Part, 0, partsAtOnce)}
	defer w.end()
	if err := w.add(first, 0); err != nil {
		return err
	}
	whole := len(data) &^ (filePage - 1)
	inPlace := isAligned(data)
	for off := 0; off < len(data); {
		p := data[off:min(off+partBytes, len(data))]
		if inPlace && off < whole {
			p = data[off:min(off+partBytes, whole)]
		} else {
			p = w.bounce(p)
		}
		if err := w.add(p, int64(len(head)+off)); err != nil {
			return err
		}
		off += len(p)
	}
	if err := w.flush(); err != nil {
		return err
	}
	if size%filePage != 0 {
		return f.Truncate(size)
	}
	return nil
}

// directWriter gathers parts and writes partsAtOnce of them together.
type directWriter struct {
	file  vfs.File
	parts []vfs.Part
	bufs  []*[]byte
}

// bounce returns an aligned copy of p, at most partBytes, with zeroes to the page's end.
func (w *directWriter) bounce(p []byte) []byte {
	b := bouncePool.Get().(*[]byte)
	w.bufs = append(w.bufs, b)
	n := copy(*b, p)
	end := (n + filePage - 1) &^ (filePage - 1)
	clear((*b)[n:end])
	return (*b)[:end]
}

func (w *directWriter) add(p []byte, off int64) error {
	w.parts = append(w.parts, vfs.Part{Bufs: [][]byte{p}, Off: off})
	if len(w.parts) < partsAtOnce {
		return nil
	}
	return w.flush()
}

func (w *directWriter) flush() error {
	if len(w.parts) == 0 {
		return nil
	}
	_, err := w.file.WriteParts(w.parts)
	w.parts = w.parts[:0]
	w.end()
	return err
}

// end gives the buffers back; no write uses them any more.
func (w *directWriter) end() {
	for _, b := range w.bufs {
		bouncePool.Put(b)
	}
	w.bufs = w.bufs[:0]
}
