package driver_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"scoria/driver"
	"scoria/driver/block"
	"scoria/driver/tlog"
)

// sumsStore compares the checksums that come with each SCO with what is put.
type sumsStore struct {
	driver.Store
	held func() int

	mu     sync.Mutex
	refuse int // so many puts, after their checksums were asked for
	memory int // SCOs whose checksums came from memory
	read   int // and those that were read
	pages  int // objects of map pages
	wrong  []string
}

func (s *sumsStore) Put(ctx context.Context, ns, name string, epoch uint64, obj driver.Object) error {
	if obj.Sums == nil {
		return s.Store.Put(ctx, ns, name, epoch, obj)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	before := s.held()
	sums, err := obj.Sums()
	if err != nil {
		return err
	}
	if strings.HasPrefix(name, "pages-") {
		s.pages++
	} else if s.held() <= before-len(sums) {
		s.memory++
	} else {
		s.read++
	}
	if int64(len(sums))*cluster != obj.Size {
		s.wrong = append(s.wrong, fmt.Sprintf("%s: %d sums for %d bytes", name, len(sums), obj.Size))
		return s.Store.Put(ctx, ns, name, epoch, obj)
	}
	p := make([]byte, cluster)
	for i, sum := range sums {
		if _, err := obj.Data.ReadAt(p, int64(i)*cluster); err != nil {
			return err
		}
		if got := tlog.CRC(p); got != sum {
			s.wrong = append(s.wrong, fmt.Sprintf("%s page %d: sum %08x, the file has %08x", name, i, sum, got))
		}
	}
	if s.refuse > 0 {
		s.refuse--
		return errMoody
	}
	return s.Store.Put(ctx, ns, name, epoch, obj)
}

// writeFaulty writes n clusters from first on out of memory of which all but the first
// page is gone.
func (r *rig) writeFaulty(first, n uint64) {
	r.t.Helper()
	fd, err := unix.MemfdCreate("faulty", unix.MFD_CLOEXEC)
	r.must(err)
	defer unix.Close(fd)
	r.must(unix.Ftruncate(fd, int64(n*cluster)))
	mem, err := unix.Mmap(fd, 0, int(n*cluster), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	r.must(err)
	defer unix.Munmap(mem)
	r.must(unix.Ftruncate(fd, cluster))
	err = do(r.vol, &block.Request{Op: block.OpWrite, Offset: first * cluster, Length: n * cluster, Segments: [][]byte{mem}})
	if !errors.Is(err, block.ErrFault) {
		r.t.Fatalf("a write from memory that is gone: %v", err)
	}
}

// TestP5SumsOfASCOMatchItsFile: the checksums that go to the store with a SCO, or with an
// object of map pages, are those of its pages, whether they come from memory or are read: with SCOs that are full, that were
// closed early, that hold clusters nobody filled, whose first upload failed, and that a
// daemon found that was killed before.
func TestP5SumsOfASCOMatchItsFile(t *testing.T) { overStores(t, testP5SumsOfASCOMatchItsFile) }

func testP5SumsOfASCOMatchItsFile(t *testing.T, k storeKind) {
	s := &sumsStore{}
	r := newStillRig(t, k, rand.New(rand.NewPCG(11, 3)), 2048, 16)
	r.wrap = func(inner driver.Store) driver.Store {
		s.Store, s.held = inner, func() int { return r.eng.SumsHeld() }
		return s
	}
	r.create()
	upload := func() {
		r.t.Helper()
		r.must(r.vol.CheckpointAnew(context.Background()))
		if !r.vol.WaitSealed() {
			t.Fatal("not everything was uploaded")
		}
		_, err := r.vol.Publish(context.Background())
		r.must(err)
	}
	counts := func(what string, memory, read int) {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.memory < memory || s.read < read || memory == 0 && s.memory > 0 || read == 0 && s.read > 0 {
			t.Errorf("%s: %d SCOs with sums from memory, %d that were read; want at least %d and %d, 0 for none", what, s.memory, s.read, memory, read)
		}
		s.memory, s.read = 0, 0
	}
	for at := uint64(0); at < 640; at += 64 { // two SCOs and a half
		r.must(r.write(at, 64, 0))
	}
	upload()
	counts("full and early", 3, 0)

	r.must(r.write(0, 3, 0))
	r.writeFaulty(1024, 4)
	r.must(r.write(8, 3, 0))
	upload()
	counts("unfilled clusters", 0, 1)

	s.mu.Lock()
	s.refuse = 1
	s.mu.Unlock()
	r.must(r.write(100, 50, 0))
	upload()
	counts("an upload that failed", 1, 1)

	r.must(r.write(300, 50, 0))
	r.must(r.flush()) // the file is there
	r.kill().reopen()
	upload()
	counts("after a kill", 0, 1)

	if held := r.eng.SumsHeld(); held != 0 {
		t.Errorf("%d sums are kept although all is uploaded", held)
	}
	s.mu.Lock()
	if s.pages == 0 {
		t.Error("no object of map pages came with its sums")
	}
	if len(s.wrong) > 0 {
		t.Error(strings.Join(s.wrong, "\n"))
	}
	s.mu.Unlock()
	r.close()
}
