package mem

import (
	"bytes"
	"errors"
	"io"
	"math"
	"net"
	"os"
	"runtime/debug"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

func memfd(t *testing.T, size int64) int {
	t.Helper()
	fd, err := CreateMemfd("test", size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func TestMapIsSharedAndUnaligned(t *testing.T) {
	fd := memfd(t, 3*4096)
	a, err := Map(fd, 0, 3*4096)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Release()
	b, err := Map(fd, 4097, 5000)
	if err != nil {
		t.Fatal(err)
	}
	b.Bytes()[0] = 7
	b.Bytes()[4999] = 8
	if a.Bytes()[4097] != 7 || a.Bytes()[4097+4999] != 8 || len(b.Bytes()) != 5000 || cap(b.Bytes()) != 5000 {
		t.Fatal("the mapping is not where it should be")
	}
	b.Retain()
	b.Release()
	b.Bytes()[0] = 9 // still mapped
	b.Release()
	if b.Bytes() != nil {
		t.Fatal("still there after the last Release")
	}
}

func TestMapRefuses(t *testing.T) {
	fd := memfd(t, 8192)
	for _, c := range []struct {
		off, n uint64
		want   error
	}{
		{0, 0, ErrRange}, {0, 8193, ErrFileTooShort}, {8192, 1, ErrFileTooShort},
		{math.MaxUint64, 2, ErrRange}, {1, math.MaxInt64, ErrRange}, {math.MaxInt64, 1, ErrRange},
	} {
		if _, err := Map(fd, c.off, c.n); !errors.Is(err, c.want) {
			t.Errorf("%d bytes at %d: %v, want %v", c.n, c.off, err, c.want)
		}
	}
}

func TestSealedMemfdDoesNotShrink(t *testing.T) {
	fd := memfd(t, 4096)
	if SizeSealed(fd) {
		t.Fatal("sealed from the start")
	}
	if err := SealSize(fd); err != nil {
		t.Fatal(err)
	}
	if !SizeSealed(fd) || unix.Ftruncate(fd, 0) == nil || unix.Ftruncate(fd, 8192) == nil {
		t.Fatal("the size can be changed")
	}
}

// A fault on a file that shrank is recognised and has its address; our own nil
// dereference is not mistaken for one.
func TestFault(t *testing.T) {
	fd := memfd(t, 4096)
	m, err := Map(fd, 0, 4096)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Release()
	if err := unix.Ftruncate(fd, 0); err != nil {
		t.Fatal(err)
	}
	touch := func(f func()) (r any) {
		defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
		defer func() { r = recover() }()
		f()
		return nil
	}
	addr, ok := Fault(touch(func() { m.Bytes()[5] = 1 }))
	if !ok || !m.Contains(addr) {
		t.Fatalf("%#x, %v", addr, ok)
	}
	if _, ok := Fault(touch(func() { var p *Region; p.GuestAddr = 1 })); ok {
		t.Fatal("a nil dereference is taken for a fault on shared memory")
	}
	if _, ok := Fault("other"); ok {
		t.Fatal("any panic is taken for a fault")
	}
}

func region(guest, user uint64, n int) Region {
	return Region{GuestAddr: guest, UserAddr: user, Data: make([]byte, n)}
}

func TestTableRefuses(t *testing.T) {
	for _, c := range []struct {
		name    string
		regions []Region
		want    error
	}{
		{"overlap", []Region{region(0, 0, 100), region(99, 1000, 100)}, ErrOverlap},
		{"user overlap", []Region{region(0, 0, 100), region(1000, 99, 100)}, ErrOverlap},
		{"empty", []Region{region(0, 0, 0)}, ErrRange},
		{"end", []Region{region(math.MaxUint64-10, 0, 100)}, ErrRange},
		{"many", make([]Region, MaxRegions+1), ErrTooManyRegions},
	} {
		if _, err := NewTable(c.regions); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
}

// Translation agrees with a byte-by-byte model, with few regions and with many.
func TestTableTranslates(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		var regions []Region
		guest := rapid.Uint64Range(0, 20).Draw(rt, "first")
		for range rapid.IntRange(1, 20).Draw(rt, "regions") {
			r := region(guest, guest+1<<32, rapid.IntRange(1, 30).Draw(rt, "size"))
			for i := range r.Data {
				r.Data[i] = byte(guest + uint64(i))
			}
			regions = append(regions, r)
			guest += r.Size() + rapid.SampledFrom([]uint64{0, 0, 1, 7}).Draw(rt, "gap")
		}
		tab, err := NewTable(regions)
		if err != nil {
			rt.Fatal(err)
		}
		at := func(a uint64) int { // the region that holds a
			for i := range regions {
				if a >= regions[i].GuestAddr && a-regions[i].GuestAddr < regions[i].Size() {
					return i
				}
			}
			return -1
		}
		addr, n := rapid.Uint64Range(0, guest+10).Draw(rt, "addr"), rapid.Uint64Range(1, 60).Draw(rt, "n")
		all, one := true, true
		for a := addr; a < addr+n; a++ {
			all = all && at(a) >= 0
			one = one && at(a) == at(addr)
		}
		s := tab.Slice(addr, n)
		if (s != nil) != (all && one) {
			rt.Fatalf("slice of %d at %d: %v", n, addr, s)
		}
		if s != nil {
			if back, ok := tab.GuestAddr(s); !ok || back != addr {
				rt.Fatal(back, ok)
			}
			u := tab.UserSlice(addr+1<<32, n)
			if &u[0] != &s[0] || len(u) != len(s) {
				rt.Fatal("user address is elsewhere")
			}
		}
		parts, ok := tab.AppendSlices(nil, addr, n)
		buf := make([]byte, n)
		if ok != all || tab.ReadAt(buf, addr) != all {
			rt.Fatalf("%d at %d: %v", n, addr, ok)
		}
		if all {
			joined := bytes.Join(parts, nil)
			if uint64(len(joined)) != n || joined[0] != byte(addr) || joined[n-1] != byte(addr+n-1) || !bytes.Equal(joined, buf) {
				rt.Fatal("wrong bytes")
			}
		}
	})
}

func TestTableOverflow(t *testing.T) {
	top := region(math.MaxUint64-99, 0, 99) // ends one byte before the end
	tab, err := NewTable([]Region{top})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ addr, n uint64 }{{math.MaxUint64 - 10, 100}, {math.MaxUint64, 1}, {math.MaxUint64 - 1, math.MaxUint64}, {0, 1}} {
		if tab.Slice(c.addr, c.n) != nil {
			t.Errorf("%d at %#x", c.n, c.addr)
		}
		if _, ok := tab.AppendSlices(nil, c.addr, c.n); ok {
			t.Errorf("%d at %#x", c.n, c.addr)
		}
		if tab.UserSlice(c.addr, c.n) != nil && c.addr >= 99 {
			t.Errorf("user %d at %#x", c.n, c.addr)
		}
	}
	if tab.ReadAt(make([]byte, 200), math.MaxUint64-20) {
		t.Error("read over the end of the address space")
	}
}

// Old tables keep their memory until they are released.
func TestTablesCountMappings(t *testing.T) {
	fd := memfd(t, 8192)
	m1, _ := Map(fd, 0, 4096)
	m2, _ := Map(fd, 4096, 4096)
	t1, err := NewTable([]Region{{GuestAddr: 0, UserAddr: 0, Data: m1.Bytes(), Mapping: m1}})
	if err != nil {
		t.Fatal(err)
	}
	t2, err := t1.Add(Region{GuestAddr: 4096, UserAddr: 4096, Data: m2.Bytes(), Mapping: m2})
	if err != nil {
		t.Fatal(err)
	}
	t3, err := t2.Remove(0, 0, 4096)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := t3.Remove(0, 0, 4096); !errors.Is(err, ErrNoRegion) {
		t.Fatal(err)
	}
	t1.Release()
	if m1.Bytes() == nil {
		t.Fatal("t2 still holds it")
	}
	t2.Release()
	if m1.Bytes() != nil || m2.Bytes() == nil || t3.Len() != 1 {
		t.Fatal("wrong mapping released")
	}
	t3.Release()
	if m2.Bytes() != nil {
		t.Fatal("leaked")
	}
}

func socketPair(t *testing.T) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	conn := func(fd int) *net.UnixConn {
		f := os.NewFile(uintptr(fd), "pair")
		defer f.Close()
		c, err := net.FileConn(f)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c.(*net.UnixConn)
	}
	return conn(fds[0]), conn(fds[1])
}

func TestDescriptorsArePassed(t *testing.T) {
	a, b := socketPair(t)
	fd := memfd(t, 4096)
	if err := WriteFull(a, []byte("hello"), fd, fd); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 5)
	fds, err := ReadFull(b, p, 2)
	if err != nil || len(fds) != 2 || string(p) != "hello" {
		t.Fatal(fds, err)
	}
	flags, _ := unix.FcntlInt(uintptr(fds[0]), unix.F_GETFD, 0)
	if flags&unix.FD_CLOEXEC == 0 {
		t.Fatal("inherited by children")
	}
	CloseAll(fds)
	if err := WriteFull(a, []byte("x"), fd, fd, fd); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadFull(b, p[:1], 2); !errors.Is(err, ErrFDs) {
		t.Fatal(err)
	}
	_, _ = a.Write([]byte("hel"))
	a.Close()
	if _, err := ReadFull(b, p, 0); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatal(err)
	}
	if _, err := ReadFull(b, p, 0); !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
}

func TestEventFD(t *testing.T) {
	fd, err := NewEventFD()
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := CheckEventFD(fd); err != nil {
		t.Fatal(err)
	}
	if err := CheckEventFD(memfd(t, 1)); !errors.Is(err, ErrNotEventFD) {
		t.Fatal(err)
	}
	if set, err := DrainEventFD(fd); set || err != nil {
		t.Fatal(set, err)
	}
	for range 2 {
		if err := SignalEventFD(fd); err != nil {
			t.Fatal(err)
		}
	}
	if set, err := DrainEventFD(fd); !set || err != nil {
		t.Fatal(set, err)
	}
	// It does not block on a descriptor that does.
	if err := unix.SetNonblock(fd, false); err != nil {
		t.Fatal(err)
	}
	if set, err := DrainEventFD(fd); set || err != nil {
		t.Fatal(set, err)
	}
}

func BenchmarkTableSlice(b *testing.B) {
	for _, n := range []int{3, 200} {
		var regions []Region
		for i := range n {
			regions = append(regions, region(uint64(i)<<20, uint64(i)<<20, 1<<12))
		}
		tab, err := NewTable(regions)
		if err != nil {
			b.Fatal(err)
		}
		b.Run(map[int]string{3: "few", 200: "many"}[n], func(b *testing.B) {
			for i := range b.N {
				if tab.Slice(uint64(i%n)<<20, 4096) == nil {
					b.Fatal(i)
				}
			}
		})
	}
}
