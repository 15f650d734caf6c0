package disk

import (
	"slices"
	"sync"
	"testing"

	"scoria/alba/asd"
	"scoria/alba/vfs"
)

// TestFirstReadWaitsOnce: the disk is asked for the bytes of a value's first read before
// its head is read, so that both come together; later reads read no head.
func TestFirstReadWaitsOnce(t *testing.T) {
	fsys := vfs.NewMem()
	d := open(t, fsys, "/asd", testOptions)
	id := d.nextID.Load()
	must(t, d.Apply(background, nil, []asd.Update{asd.Put("a", asd.NewValue(make([]byte, 1<<20)))}, guest))
	var mu sync.Mutex
	var ops []vfs.Op
	fsys.SetHook(func(op vfs.Op, name string) error {
		if name == d.valueName(id) {
			mu.Lock()
			defer mu.Unlock()
			ops = append(ops, op)
		}
		return nil
	})
	for _, want := range [][]vfs.Op{{vfs.OpOpen, vfs.OpPrefetch, vfs.OpRead, vfs.OpRead}, {vfs.OpRead}} {
		_, err := d.ReadAt(background, "a", make([]byte, 4096), 40960, guest)
		must(t, err)
		mu.Lock()
		if !slices.Equal(ops, want) {
			t.Errorf("a read does %v, want %v", ops, want)
		}
		ops = nil
		mu.Unlock()
	}
	must(t, d.Close())
}
