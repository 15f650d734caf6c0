package driver_test

import (
	"bytes"
	"context"
	"math/rand/v2"
	"path"
	"testing"

	"scoria/alba"
	"scoria/alba/albatest"
	"scoria/alba/vfs"
	"scoria/driver"
)

// sizeOf adds up the files below a directory.
func sizeOf(t *testing.T, fsys *vfs.Mem, dir string) (size int64) {
	t.Helper()
	names, err := fsys.List(dir)
	for _, name := range names {
		info, serr := fsys.Stat(path.Join(dir, name))
		switch {
		case serr != nil:
			err = serr
		case info.IsDir():
			size += sizeOf(t, fsys, path.Join(dir, name))
		default:
			size += info.Size()
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return size
}

// TestDiskBytes: an object store says what objects take on the disks of its storage
// daemons: no less than they do, and not much more.
func TestDiskBytes(t *testing.T) {
	ctx := context.Background()
	preset := func(p alba.Policy, c alba.Compression, e alba.Encryption) alba.Preset {
		ps := albatest.Preset(p)
		ps.Compression, ps.Encryption = c, e
		return ps
	}
	for name, ps := range map[string]alba.Preset{
		"parity":     preset(alba.Policy{K: 2, M: 1, C: 3, X: 1}, alba.CompressNone, alba.EncryptNone),
		"copies":     preset(alba.Policy{K: 1, M: 1, C: 2, X: 1}, alba.CompressNone, alba.EncryptNone),
		"encrypted":  preset(alba.Policy{K: 2, M: 1, C: 3, X: 1}, alba.CompressNone, alba.EncryptAES256GCM),
		"compressed": preset(alba.Policy{K: 2, M: 1, C: 3, X: 1}, alba.CompressZstd, alba.EncryptAES256GCM),
		"linked":     preset(alba.Policy{K: 1, M: 0, C: 1, X: 1}, alba.CompressNone, alba.EncryptNone),
	} {
		t.Run(name, func(t *testing.T) {
			fsys := vfs.NewMem()
			s, err := openObjects(ps)(fsys)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if err := s.CreateNamespace(ctx, "ns"); err != nil {
				t.Fatal(err)
			}
			sharer := s.(driver.DiskSharer)
			rng := rand.NewChaCha8([32]byte{1})
			for _, size := range []int64{1 << 20, 3<<20 + 4096} {
				data := make([]byte, size)
				_, _ = rng.Read(data)
				most, err := sharer.DiskBytes(ctx, "ns", size)
				if err != nil {
					t.Fatal(err)
				}
				if name == "linked" {
					if most != 0 {
						t.Errorf("%d bytes: takes %d beside the file that it shares", size, most)
					}
					continue
				}
				before := sizeOf(t, fsys, "data/store")
				if err := s.Put(ctx, "ns", alba.NewID().String(), 0, driver.Object{Data: bytes.NewReader(data), Size: size}); err != nil {
					t.Fatal(err)
				}
				// The registry's and the key-value stores' logs grow, too.
				if took := sizeOf(t, fsys, "data/store") - before; took > most+64<<10 || most > took+took/20+64<<10 {
					t.Errorf("%d bytes: took %d, said to take %d", size, took, most)
				}
			}
		})
	}
}
