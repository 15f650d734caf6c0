package lba

import (
	"context"
	"errors"
	"io"
	"sync"

	"github.com/google/uuid"
)

// maxOpenObjects bounds the headers that an ObjectReader keeps: at 8 bytes per
// page some 4 MiB, or 1 TiB of volume.
const maxOpenObjects = 256

// ObjectReader is a PageReader over stored page objects. It keeps their
// headers, so that a page costs one read. Safe from any goroutine.
type ObjectReader struct {
	volume uuid.UUID
	open   func(ctx context.Context, object uint32) (io.ReaderAt, int64, error)

	mu      sync.Mutex
	objects map[uint32]*openObject
}

type openObject struct {
	*PageObject
	r io.ReaderAt
}

// ContextReader is an io.ReaderAt that can be bound to the context of one call.
type ContextReader interface {
	WithContext(ctx context.Context) io.ReaderAt
}

// bound is r for one call.
func bound(ctx context.Context, r io.ReaderAt) io.ReaderAt {
	if c, ok := r.(ContextReader); ok {
		return c.WithContext(ctx)
	}
	return r
}

// NewObjectReader returns a reader of the volume's page objects. open returns
// something that reads the object, and the object's size. It may be called from
// several goroutines at once. What it returned, bound to the context of the call if
// it is a ContextReader, is used for further pages until Forget or until a read from it fails; then open is called again.
func NewObjectReader(volume uuid.UUID, open func(ctx context.Context, object uint32) (r io.ReaderAt, size int64, err error)) *ObjectReader {
	return &ObjectReader{volume: volume, open: open, objects: make(map[uint32]*openObject)}
}

// ReadPage implements PageReader.
func (o *ObjectReader) ReadPage(ctx context.Context, addr PageAddr, page []byte) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	object, known, err := o.object(ctx, addr.Object())
	if err != nil {
		return err
	}
	if err = object.ReadPage(bound(ctx, object.r), addr.Page(), page); err == nil {
		return nil
	}
	o.drop(addr.Object(), object)
	if !known {
		return err
	}
	// The object may have moved, or a copy of it may be damaged that is no
	// longer the one that open would choose.
	again, _, openErr := o.object(ctx, addr.Object())
	if openErr != nil {
		return errors.Join(err, openErr)
	}
	if err = again.ReadPage(bound(ctx, again.r), addr.Page(), page); err != nil {
		o.drop(addr.Object(), again)
	}
	return err
}

// object returns the object's header, and whether it was known before.
func (o *ObjectReader) object(ctx context.Context, number uint32) (*openObject, bool, error) {
	o.mu.Lock()
	known := o.objects[number]
	o.mu.Unlock()
	if known != nil {
		return known, true, nil
	}
	r, size, err := o.open(ctx, number)
	if err != nil {
		return nil, false, err
	}
	header, err := OpenPageObject(bound(ctx, r), size, o.volume, number)
	if err != nil {
		return nil, false, err
	}
	opened := &openObject{header, r}
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.objects) >= maxOpenObjects {
		for victim := range o.objects { // any: pages are read once and then stay in the map
			delete(o.objects, victim)
			break
		}
	}
	o.objects[number] = opened
	return opened, false, nil
}

// drop forgets the object if it still is the one given.
func (o *ObjectReader) drop(number uint32, object *openObject) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.objects[number] == object {
		delete(o.objects, number)
	}
}

// Forget drops what is kept of an object, which is about to be deleted or moved.
func (o *ObjectReader) Forget(object uint32) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.objects, object)
}
