package dirstore

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"scoria/alba/vfs"
)

// countedFile counts how many are open.
type countedFile struct {
	vfs.File
	open   *atomic.Int64
	closed atomic.Bool
}

func (f *countedFile) Close() error {
	if f.closed.Swap(true) {
		return fmt.Errorf("closed twice")
	}
	f.open.Add(-1)
	return nil
}

// TestDeletedWhileOpening: a file that was opened before its object was deleted
// is not kept, since the name may soon belong to another.
func TestDeletedWhileOpening(t *testing.T) {
	c := newFDCache(4)
	key := fileKey{"v", "o"}
	var opened atomic.Int64
	f, err := c.acquire(key, func() (vfs.File, error) {
		c.drop(key)
		opened.Add(1)
		return &countedFile{open: &opened}, nil
	})
	must(t, err)
	if len(c.files) != 0 {
		t.Fatal("a file opened before a deletion was kept")
	}
	c.release(f)
	if opened.Load() != 0 {
		t.Fatal("the last user did not close it")
	}
}

func TestFDCacheConcurrent(t *testing.T) {
	c := newFDCache(3)
	var opened atomic.Int64
	var wg sync.WaitGroup
	for g := range uint64(4) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(g, 0))
			for range 3_000 {
				key := fileKey{fmt.Sprint(rng.IntN(2)), fmt.Sprint(rng.IntN(4))}
				switch rng.IntN(20) {
				case 0:
					c.drop(key)
				case 1:
					c.dropNamespace(key.ns)
				default:
					f, err := c.acquire(key, func() (vfs.File, error) {
						opened.Add(1)
						return &countedFile{open: &opened}, nil
					})
					if err != nil {
						t.Error(err)
						return
					}
					if f.file.(*countedFile).closed.Load() {
						t.Error("a closed file was handed out")
					}
					c.release(f)
				}
			}
		})
	}
	wg.Wait()
	if n := opened.Load(); n > 3 || int(n) != len(c.files) {
		t.Fatalf("%d open, %d cached", n, len(c.files))
	}
	must(t, c.close())
	if n := opened.Load(); n != 0 {
		t.Fatalf("%d open after close", n)
	}
}
