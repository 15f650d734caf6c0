package host

import (
	"context"
	"errors"
	"fmt"

	"scoria/alba"
	"scoria/alba/proxy"
	"scoria/driver"
	"scoria/driver/registry"
)

// AlbaStore is the erasure-coded object store as a driver.Store. Namespaces are
// made with Preset.
type AlbaStore struct {
	Proxy  *proxy.Proxy
	Preset string
	// OnDisk says of a device whether it lies on the file system of the volumes' local
	// disk, in this process. nil: none does. Any goroutine.
	OnDisk func(alba.Device) bool
}

var _ interface {
	driver.Store
	driver.DiskSharer
	driver.LostPutter
} = AlbaStore{}

// storeError adds the driver's error to the object store's of the same meaning.
func storeError(err error) error {
	for from, to := range map[error]error{
		proxy.ErrStaleEpoch: driver.ErrStaleEpoch,
		proxy.ErrNoObject:   driver.ErrNoObject,
		proxy.ErrExists:     driver.ErrExists,
		proxy.ErrLost:       driver.ErrLost,
	} {
		if errors.Is(err, from) {
			return fmt.Errorf("%w (%w)", to, err)
		}
	}
	return err
}

// CreateNamespace implements driver.Store.
func (s AlbaStore) CreateNamespace(ctx context.Context, ns string) error {
	return storeError(s.Proxy.CreateNamespaceWith(ctx, ns, s.Preset))
}

// DeleteNamespace implements driver.Store.
func (s AlbaStore) DeleteNamespace(ctx context.Context, ns string) error {
	return storeError(s.Proxy.DeleteNamespace(ctx, ns))
}

// Namespaces implements driver.Store.
func (s AlbaStore) Namespaces(ctx context.Context) ([]string, error) {
	names, err := s.Proxy.Namespaces(ctx)
	return names, storeError(err)
}

// Fence implements driver.Store.
func (s AlbaStore) Fence(ctx context.Context, ns string, epoch uint64) error {
	return storeError(s.Proxy.Fence(ctx, ns, epoch))
}

// Put implements driver.Store.
func (s AlbaStore) Put(ctx context.Context, ns, name string, epoch uint64, obj driver.Object) error {
	return storeError(s.Proxy.PutSource(ctx, ns, name, epoch, proxy.Source(obj)))
}

// PutLost implements driver.LostPutter.
func (s AlbaStore) PutLost(ctx context.Context, ns, name string, epoch uint64, obj driver.Object) error {
	return storeError(s.Proxy.PutLost(ctx, ns, name, epoch, proxy.Source(obj)))
}

// ReadAt implements driver.Store.
func (s AlbaStore) ReadAt(ctx context.Context, ns, name string, p []byte, off int64) error {
	return storeError(s.Proxy.ReadAt(ctx, ns, name, p, off))
}

// Size implements driver.Store.
func (s AlbaStore) Size(ctx context.Context, ns, name string) (int64, error) {
	n, err := s.Proxy.Size(ctx, ns, name)
	return n, storeError(err)
}

// Delete implements driver.Store.
func (s AlbaStore) Delete(ctx context.Context, ns, name string, epoch uint64) error {
	return storeError(s.Proxy.Delete(ctx, ns, name, epoch))
}

// List implements driver.Store.
func (s AlbaStore) List(ctx context.Context, ns, prefix string) ([]string, error) {
	names, err := s.Proxy.List(ctx, ns, prefix)
	return names, storeError(err)
}

// DiskBytes implements driver.DiskSharer.
func (s AlbaStore) DiskBytes(ctx context.Context, ns string, size int64) (int64, error) {
	if s.OnDisk == nil {
		return 0, nil
	}
	n, err := s.Proxy.RoomOn(ctx, ns, size, s.OnDisk)
	return n, storeError(err)
}

// AlbaRegistry is a registry as the object store wants it.
type AlbaRegistry struct{ Store registry.Store }

var _ alba.Registry = AlbaRegistry{}

// Get implements alba.Registry.
func (r AlbaRegistry) Get(ctx context.Context, key string) (alba.KV, bool, error) {
	kv, ok, err := r.Store.Get(ctx, key)
	return alba.KV(kv), ok, err
}

// List implements alba.Registry.
func (r AlbaRegistry) List(ctx context.Context, prefix string) ([]alba.KV, error) {
	kvs, err := r.Store.List(ctx, prefix)
	list := make([]alba.KV, len(kvs))
	for i, kv := range kvs {
		list[i] = alba.KV(kv)
	}
	return list, err
}

// pager is what the embedded registry can do besides.
type pager interface {
	Page(ctx context.Context, prefix, after string, limit int) ([]registry.KV, bool, error)
}

// Page implements alba.Pager: all at once where the registry knows no parts.
func (r AlbaRegistry) Page(ctx context.Context, prefix, after string, limit int) ([]alba.KV, bool, error) {
	p, ok := r.Store.(pager)
	if !ok {
		list, err := r.List(ctx, prefix)
		for len(list) > 0 && list[0].Key <= after {
			list = list[1:]
		}
		return list, false, err
	}
	kvs, more, err := p.Page(ctx, prefix, after, limit)
	list := make([]alba.KV, len(kvs))
	for i, kv := range kvs {
		list[i] = alba.KV(kv)
	}
	return list, more, err
}

// Commit implements alba.Registry.
func (r AlbaRegistry) Commit(ctx context.Context, compares []alba.Compare, writes []alba.Write) (int64, error) {
	cs := make([]registry.Compare, len(compares))
	for i, c := range compares {
		cs[i] = registry.Compare(c)
	}
	ws := make([]registry.Write, len(writes))
	for i, w := range writes {
		ws[i] = registry.Write(w)
	}
	rev, err := r.Store.Commit(ctx, cs, ws)
	if errors.Is(err, registry.ErrConflict) {
		err = fmt.Errorf("%w (%w)", alba.ErrConflict, err)
	}
	return rev, err
}

// Watch implements alba.Registry.
func (r AlbaRegistry) Watch(ctx context.Context, prefix string, from int64) (<-chan alba.Event, error) {
	in, err := r.Store.Watch(ctx, prefix, from)
	if err != nil {
		return nil, err
	}
	out := make(chan alba.Event)
	go func() {
		defer close(out)
		for e := range in {
			select {
			case out <- alba.Event{KV: alba.KV(e.KV)}:
			case <-ctx.Done():
				return
			}
		}
	}()
	return out, nil
}
