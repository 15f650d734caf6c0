package disk

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"syscall"
	"testing"

	"scoria/alba/asd"
	"scoria/alba/vfs"
)

// contents reads a file whole.
func contents(t *testing.T, fsys vfs.FS, name string) []byte {
	t.Helper()
	f, err := fsys.Open(name, vfs.ReadOnly)
	must(t, err)
	defer f.Close()
	size, err := f.Size()
	must(t, err)
	b := make([]byte, size)
	if n, err := f.ReadAt(b, 0); int64(n) != size || err != nil && err != io.EOF {
		t.Fatalf("%s: read %d of %d bytes: %v", name, n, size, err)
	}
	return b
}

// TestDirectWritesSameFile: a value's file has the same bytes whether it was written
// past the page cache or through it, wherever the value lies in memory and however
// long it is; and the value comes back.
func TestDirectWritesSameFile(t *testing.T) {
	for _, fsys := range []vfs.FS{vfs.NewMem(), vfs.OS()} {
		dir := "/asd"
		if fsys == vfs.OS() {
			dir = t.TempDir()
		}
		options := testOptions
		options.DirectBytes = 1
		options.InlineBytes = 100
		direct := open(t, fsys, dir+"/direct", options)
		options.DirectBytes = 1 << 30
		buffered := open(t, fsys, dir+"/buffered", options)
		for i, tt := range []struct{ size, block, shift int }{
			{101, 4096, 0}, {4096, 4096, 0}, {8192, 4096, 1}, {partBytes, 4096, 0}, {partBytes + 1, 4096, 0}, {5*partBytes - 7, 4096, 8},
			{9*partBytes + 4096, 4096, 0}, {300 * 4112, 4112, 0}, {300 * 4112, 4112, 16}, {3 << 20, 512, 0},
		} {
			data := alignedBytes(tt.size + filePage)[tt.shift:][:tt.size]
			for j := range data {
				data[j] = byte(j>>12 + j*7 + i)
			}
			key := fmt.Sprint("key", i)
			v := asd.NewValueBlocks(data, tt.block)
			var files [2][]byte
			for k, d := range []*Disk{direct, buffered} {
				id := d.nextID.Load()
				must(t, d.Apply(background, nil, []asd.Update{asd.Put(key, v)}, guest))
				files[k] = contents(t, fsys, d.valueName(id))
				got, err := d.Get(background, key, guest)
				if err != nil || !bytes.Equal(got.Data, data) {
					t.Fatalf("%+v: the value does not come back: %v", tt, err)
				}
			}
			if !bytes.Equal(files[0], files[1]) {
				t.Errorf("%+v: files of %d and %d bytes differ", tt, len(files[0]), len(files[1]))
			}
		}
		must(t, direct.Close())
		must(t, buffered.Close())
	}
}

// TestDirectWriteFails: a write that fails refuses this Apply alone and leaves no file;
// a sync that fails ends all writing.
func TestDirectWriteFails(t *testing.T) {
	fsys := vfs.NewMem()
	options := testOptions
	options.DirectBytes = 1
	d := open(t, fsys, "/asd", options)
	data := make([]byte, 6*partBytes)
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
