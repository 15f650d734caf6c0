package vfs

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path"
	"reflect"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// target is a file system under test and an empty directory on it.
type target struct {
	FS
	dir string
}

func (x target) name(base string) string { return path.Join(x.dir, base) }

// eachFS runs a test on the host's file systems and on the twin in memory.
func eachFS(t *testing.T, test func(t *testing.T, x target)) {
	t.Run("os", func(t *testing.T) { test(t, target{OS(), t.TempDir()}) })
	t.Run("tmpfs", func(t *testing.T) {
		dir, err := os.MkdirTemp("/dev/shm", "vfs-test-")
		if err != nil {
			t.Skip("no tmpfs at /dev/shm:", err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		test(t, target{OS(), dir})
	})
	t.Run("mem", func(t *testing.T) {
		m := NewMem()
		must(t, m.MkdirAll("/some/dir"))
		test(t, target{m, "/some/dir"})
	})
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantErr(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error %v, want %v", err, want)
	}
}

func mustOpen(t testing.TB, fsys FS, name string, flags OpenFlag) File {
	t.Helper()
	f, err := fsys.Open(name, flags)
	must(t, err)
	return f
}

// put makes a file with these contents.
func put(t testing.TB, fsys FS, name, contents string) {
	t.Helper()
	f := mustOpen(t, fsys, name, Create)
	_, err := f.WriteAt([]byte(contents), 0)
	must(t, err)
	must(t, f.Close())
}

// get returns a file's contents.
func get(t testing.TB, fsys FS, name string) string {
	t.Helper()
	f := mustOpen(t, fsys, name, ReadOnly)
	defer f.Close()
	size, err := f.Size()
	must(t, err)
	b := make([]byte, size)
	_, err = f.ReadAt(b, 0)
	if err != nil && err != io.EOF {
		t.Fatal(err)
	}
	return string(b)
}

func TestOpenFlags(t *testing.T) {
	eachFS(t, func(t *testing.T, x target) {
		_, err := x.Open(x.name("a"), 0)
		wantErr(t, err, fs.ErrNotExist)
		_, err = x.Open(x.name("no/such"), Create)
		wantErr(t, err, fs.ErrNotExist)
		_, err = x.Open(x.dir, ReadOnly)
		wantErr(t, err, syscall.EISDIR)
		must(t, mustOpen(t, x, x.name("a"), Create|Exclusive).Close())
		_, err = x.Open(x.name("a"), Create|Exclusive)
		wantErr(t, err, fs.ErrExist)
		f := mustOpen(t, x, x.name("a"), ReadOnly)
		if _, err := f.WriteAt([]byte("x"), 0); err == nil {
			t.Fatal("a read-only file was written")
		}
		must(t, f.Close())
		wantErr(t, f.Close(), fs.ErrClosed)
		_, err = f.ReadAt(make([]byte, 1), 0)
		wantErr(t, err, fs.ErrClosed)
		wantErr(t, f.Sync(), fs.ErrClosed)
	})
}

// Parts land where they should, whatever their number and shape, buffered or
// direct, and errors come out.
func TestWriteParts(t *testing.T) {
	eachFS(t, func(t *testing.T, x target) {
		for _, flags := range []OpenFlag{Create, Create | Direct} {
			f := mustOpen(t, x, x.name("f"), flags)
			want := make([]byte, 64*directAlignment)
			var parts []Part
			for i := range 7 { // more than are under way at once
				p := Part{Off: int64(i*9+1) * directAlignment}
				at := p.Off
				for k := range i % 4 {
					b := alignedBuffer((1 + k%2) * directAlignment)
					for j := range b {
						b[j] = byte(i*31 + k*7 + j)
					}
					at += int64(copy(want[at:], b))
					p.Bufs = append(p.Bufs, b)
				}
				parts = append(parts, p)
			}
			must(t, f.Truncate(int64(len(want))))
			for _, some := range [][]Part{nil, parts[3:4], parts} {
				n, err := f.WriteParts(some)
				must(t, err)
				bytes := 0
				for _, p := range some {
					for _, b := range p.Bufs {
						bytes += len(b)
					}
				}
				if n != bytes {
					t.Fatalf("wrote %d bytes, want %d", n, bytes)
				}
			}
			must(t, f.Close())
			if got := get(t, x, x.name("f")); got != string(want) {
				t.Fatal("wrong bytes")
			}
			_, err := f.WriteParts(parts)
			wantErr(t, err, fs.ErrClosed)
			f = mustOpen(t, x, x.name("f"), ReadOnly|flags&Direct)
			if _, err := f.WriteParts(parts); err == nil {
				t.Fatal("a read-only file was written")
			}
			must(t, f.Close())
		}
	})
}

// alignedBuffer is one that direct I/O accepts.
func alignedBuffer(n int) []byte {
	b := make([]byte, n+directAlignment)
	skip := (directAlignment - int(reflect.ValueOf(b).Pointer()%directAlignment)) % directAlignment
	return b[skip:][:n:n]
}

func TestReadWriteSparse(t *testing.T) {
	eachFS(t, func(t *testing.T, x target) {
		f := mustOpen(t, x, x.name("f"), Create)
		defer f.Close()
		_, err := f.WriteAt([]byte("tail"), 10_000)
		must(t, err)
		b := make([]byte, 10_010)
		n, err := f.ReadAt(b, 0)
		if n != 10_004 || err != io.EOF {
			t.Fatalf("read %d bytes, %v; want 10004, EOF", n, err)
		}
		if !bytes.Equal(b[:10_000], make([]byte, 10_000)) || string(b[10_000:n]) != "tail" {
			t.Fatal("wrong bytes")
		}
		if n, err := f.ReadAt(b[:1], 1<<40); n != 0 || err != io.EOF {
			t.Fatalf("read behind the end: %d, %v", n, err)
		}
		if _, err := f.ReadAt(b[:1], -1); err == nil {
			t.Fatal("negative offset accepted")
		}
		must(t, f.Sync())
		must(t, f.StartWriteback(0, 4096))
		must(t, f.Prefetch(0, 4096))
		must(t, f.Prefetch(1<<40, 4096))
		must(t, f.DropCache(0, 4096))
	})
}

func TestTruncateAllocatePunch(t *testing.T) {
	eachFS(t, func(t *testing.T, x target) {
		f := mustOpen(t, x, x.name("f"), Create)
		defer f.Close()
		_, err := f.WriteAt(bytes.Repeat([]byte{7}, 20_000), 0)
		must(t, err)
		must(t, f.Truncate(5_000))
		must(t, f.Truncate(12_000))
		want := append(bytes.Repeat([]byte{7}, 5_000), make([]byte, 7_000)...)
		if got := get(t, x, x.name("f")); got != string(want) {
			t.Fatal("bytes behind a truncation came back")
		}
		must(t, f.PunchHole(100, 4_000))
		clear(want[100:4_100])
		must(t, f.PunchHole(8_192, 1<<20)) // beyond the end: the size stays
		if got := get(t, x, x.name("f")); got != string(want) {
			t.Fatal("wrong bytes around a hole")
		}
		must(t, f.Allocate(4_096, 60_000))
		if size, _ := f.Size(); size != 64_096 {
			t.Fatalf("size %d after Allocate", size)
		}
		want = append(want, make([]byte, 64_096-len(want))...)
		if got := get(t, x, x.name("f")); got != string(want) {
			t.Fatal("Allocate changed contents")
		}
	})
}

// TestRandomFileOps compares a file with a flat model.
func TestRandomFileOps(t *testing.T) {
	eachFS(t, func(t *testing.T, x target) {
		rng := rand.New(rand.NewPCG(3, 4))
		f := mustOpen(t, x, x.name("f"), Create)
		defer f.Close()
		var model []byte
		grow := func(size int) {
			if size > len(model) {
				model = append(model, make([]byte, size-len(model))...)
			}
		}
		for range 3_000 {
			off, length := rng.IntN(60_000), 1+rng.IntN(9_000)
			switch rng.IntN(6) {
			case 0, 1:
				p := bytes.Repeat([]byte{byte(rng.Uint32())}, length)
				_, err := f.WriteAt(p, int64(off))
				must(t, err)
				grow(off + length)
				copy(model[off:], p)
			case 2:
				must(t, f.Truncate(int64(off)))
				model = model[:min(off, len(model))]
				grow(off)
			case 3:
				must(t, f.PunchHole(int64(off), int64(length)))
				if off < len(model) {
					clear(model[off:min(off+length, len(model))])
				}
			case 4:
				must(t, f.Allocate(int64(off), int64(length)))
				grow(off + length)
			case 5:
				must(t, f.Sync())
			}
			p := make([]byte, length)
			n, err := f.ReadAt(p, int64(off))
			want := model[min(off, len(model)):min(off+length, len(model))]
			if n != len(want) || !bytes.Equal(p[:n], want) || (err == io.EOF) != (n < length) {
				t.Fatalf("read at %d: %d bytes, %v; want %d", off, n, err, len(want))
			}
		}
	})
}

func TestNames(t *testing.T) {
	eachFS(t, func(t *testing.T, x target) {
		must(t, x.MkdirAll(x.name("d/e")))
		must(t, x.MkdirAll(x.name("d/e")))
		put(t, x, x.name("d/b"), "one")
		wantErr(t, x.Link(x.name("d/b"), x.name("d/b")), fs.ErrExist)
		must(t, x.Link(x.name("d/b"), x.name("d/a")))
		wantErr(t, x.Link(x.name("d/none"), x.name("d/c")), fs.ErrNotExist)
		put(t, x, x.name("d/e/f"), "two")
		must(t, x.Rename(x.name("d/e/f"), x.name("d/b"))) // replaces
		wantErr(t, x.Rename(x.name("d/e/f"), x.name("d/b")), fs.ErrNotExist)
		if get(t, x, x.name("d/a")) != "one" || get(t, x, x.name("d/b")) != "two" {
			t.Fatal("wrong contents after link and rename")
		}
		got, err := x.List(x.name("d"))
		must(t, err)
		if !reflect.DeepEqual(got, []string{"a", "b", "e"}) {
			t.Fatalf("list: %v", got)
		}
		must(t, x.SyncDir(x.name("d")))
		info, err := x.Stat(x.name("d/b"))
		must(t, err)
		if info.Size() != 3 || info.IsDir() || info.Name() != "b" {
			t.Fatalf("stat: %+v", info)
		}
		if err := x.Remove(x.name("d")); err == nil {
			t.Fatal("a full directory was removed")
		}
		must(t, x.Remove(x.name("d/a")))
		wantErr(t, x.Remove(x.name("d/a")), fs.ErrNotExist)
		must(t, x.RemoveAll(x.name("d")))
		must(t, x.RemoveAll(x.name("d")))
		_, err = x.Stat(x.name("d"))
		wantErr(t, err, fs.ErrNotExist)
		_, err = x.List(x.name("d"))
		wantErr(t, err, fs.ErrNotExist)
		wantErr(t, x.SyncDir(x.name("d")), fs.ErrNotExist)
		if free, err := x.Free(x.dir); err != nil || free == 0 {
			t.Fatalf("free: %d, %v", free, err)
		}
	})
}

func TestRemovedFileStaysOpen(t *testing.T) {
	eachFS(t, func(t *testing.T, x target) {
		put(t, x, x.name("f"), "still here")
		f := mustOpen(t, x, x.name("f"), 0)
		must(t, x.Remove(x.name("f")))
		b := make([]byte, 10)
		_, err := f.ReadAt(b, 0)
		must(t, err)
		if string(b) != "still here" {
			t.Fatalf("read %q", b)
		}
		must(t, f.Close())
	})
}

func TestLock(t *testing.T) {
	eachFS(t, func(t *testing.T, x target) {
		l, err := x.Lock(x.name("lock"))
		must(t, err)
		_, err = x.Lock(x.name("lock"))
		wantErr(t, err, ErrLocked)
		if !strings.Contains(err.Error(), "pid") {
			t.Fatalf("%v: does not name the holder", err)
		}
		must(t, l.Close())
		var wg sync.WaitGroup
		var mu sync.Mutex
		var held []io.Closer
		for range 8 {
			wg.Go(func() {
				if l, err := x.Lock(x.name("lock")); err == nil {
					mu.Lock()
					held = append(held, l)
					mu.Unlock()
				} else if !errors.Is(err, ErrLocked) {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if len(held) != 1 {
			t.Fatalf("%d holders at once", len(held))
		}
		must(t, held[0].Close())
	})
}

func TestMap(t *testing.T) {
	eachFS(t, func(t *testing.T, x target) {
		m, created, err := x.Map(x.name("pool"), 16_384)
		must(t, err)
		if !created || len(m.Bytes()) != 16_384 {
			t.Fatalf("created %v, %d bytes", created, len(m.Bytes()))
		}
		copy(m.Bytes()[5_000:], "stored")
		m2, created, err := x.Map(x.name("pool"), 16_384)
		must(t, err)
		if created || string(m2.Bytes()[5_000:5_006]) != "stored" {
			t.Fatal("a second mapping does not see the first one's stores")
		}
		must(t, m.Close())
		if err := m.Close(); err == nil {
			t.Fatal("closed twice")
		}
		m3, created, err := x.Map(x.name("pool"), 32_768)
		must(t, err)
		if !created || string(m3.Bytes()[5_000:5_006]) != "stored" {
			t.Fatal("growing lost the contents")
		}
		if got := get(t, x, x.name("pool")); len(got) != 32_768 || got[5_000:5_006] != "stored" {
			t.Fatal("the file and its mapping differ")
		}
		m3.Bytes()[0] = 9
		if m2.Bytes()[0] != 9 {
			t.Fatal("mappings of different sizes differ")
		}
		f := mustOpen(t, x, x.name("pool"), 0)
		must(t, f.Allocate(0, 40_000))
		must(t, f.PunchHole(4096, 4096))
		_, err = f.WriteAt([]byte{8}, 1)
		must(t, err)
		must(t, f.Close())
		if b := m2.Bytes(); b[0] != 9 || b[1] != 8 || b[5_000] != 0 {
			t.Fatal("a mapping does not see what was done to its file")
		}
		must(t, m2.Close())
		must(t, m3.Close())
		_, _, err = x.Map(x.name("pool"), 0)
		wantErr(t, err, syscall.EINVAL)
	})
}

func TestDirect(t *testing.T) {
	eachFS(t, func(t *testing.T, x target) {
		f := mustOpen(t, x, x.name("f"), Create|Exclusive|Direct)
		defer f.Close()
		buf, err := unix.Mmap(-1, 0, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
		must(t, err)
		defer unix.Munmap(buf)
		for i := range buf {
			buf[i] = byte(i / 512)
		}
		_, err = f.WriteAt(buf, 4096)
		must(t, err)
		must(t, f.Sync())
		clear(buf)
		_, err = f.ReadAt(buf[:4096], 8192)
		must(t, err)
		if buf[0] != 8 || buf[4095] != 15 {
			t.Fatal("wrong bytes through direct I/O")
		}
		if _, ok := x.FS.(*Mem); ok {
			_, err = f.WriteAt(buf[:512], 0)
			wantErr(t, err, syscall.EINVAL)
			_, err = f.WriteAt(buf[512:4608], 0)
			wantErr(t, err, syscall.EINVAL)
		}
	})
}

func TestConcurrentUse(t *testing.T) {
	eachFS(t, func(t *testing.T, x target) {
		f := mustOpen(t, x, x.name("f"), Create)
		var wg sync.WaitGroup
		for g := range 4 {
			wg.Go(func() {
				p := bytes.Repeat([]byte{byte(g + 1)}, 4096)
				q := make([]byte, 4096)
				for i := range 200 {
					off := int64(g+4*i) * 4096
					if _, err := f.WriteAt(p, off); err != nil {
						t.Error(err)
						return
					}
					if _, err := f.ReadAt(q, off); err != nil || !bytes.Equal(p, q) {
						t.Error("read back other bytes", err)
						return
					}
					if i%50 == 0 {
						if err := f.Sync(); err != nil {
							t.Error(err)
						}
					}
				}
			})
		}
		wg.Wait()
		must(t, f.Close())
	})
}
