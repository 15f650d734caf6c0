package disk

import (
	"errors"
	"syscall"
	"testing"

	"scoria/alba/asd"
	"scoria/alba/vfs"
)

// TestFailedWriteOfValueFile: a write that fails refuses this Apply alone and leaves no file;
// a sync that fails ends all writing.
func TestFailedWriteOfValueFile(t *testing.T) {
	fsys := vfs.NewMem()
	d := open(t, fsys, "/asd", testOptions)
	data := make([]byte, 6<<20)
	v := asd.NewValue(data)
	for _, op := range []vfs.Op{vfs.OpAllocate, vfs.OpWrite} {
		id := d.nextID.Load()
		fsys.SetHook(func(o vfs.Op, name string) error {
			if o == op && name == d.valueName(id) {
				return syscall.ENOSPC
			}
			return nil
		})
		err := d.Apply(background, nil, []asd.Update{asd.Put("a", v)}, guest)
		fsys.SetHook(nil)
		if !errors.Is(err, asd.ErrFull) {
			t.Errorf("%v failed: %v, want ErrFull", op, err)
		}
		if _, err := fsys.Stat(d.valueName(id)); err == nil {
			t.Errorf("%v failed: the file is left", op)
		}
	}
	must(t, d.Apply(background, nil, []asd.Update{asd.Put("b", v)}, guest))
	fsys.SetHook(func(o vfs.Op, name string) error {
		if o == vfs.OpSync && name == d.valueName(d.nextID.Load()-1) {
			return syscall.EIO
		}
		return nil
	})
	for range 2 {
		if err := d.Apply(background, nil, []asd.Update{asd.Put("c", v)}, guest); !errors.Is(err, asd.ErrFailed) {
			t.Errorf("sync failed: %v, want ErrFailed", err)
		}
	}
	fsys.SetHook(nil)
	got, err := d.Get(background, "b", guest)
	if err != nil || len(got.Data) != len(data) {
		t.Errorf("reads after a failed sync: %v", err)
	}
	_ = d.Close()
}
