package driver_test

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"scoria/alba/vfs"
)

// TestSnapshotRootGoesWhileItIsOpened: the local copy of a snapshot's root is removed
// when the store has it, which may be between a reader's two looks at it.
func TestSnapshotRootGoesWhileItIsOpened(t *testing.T) {
	overStores(t, testSnapshotRootGoesWhileItIsOpened)
}

func testSnapshotRootGoesWhileItIsOpened(t *testing.T, k storeKind) {
	w := newWorld(t, k, rand.New(rand.NewPCG(1, 1)), 4<<20, 1<<20, 8<<20)
	if err := w.write(0, 8*cluster, false); err != nil {
		t.Fatal(err)
	}
	if err := w.snapshot(); err != nil {
		t.Fatal(err)
	}
	w.verifySpace() // everything is in the store, nothing waits
	w.restart()     // nothing of it is remembered
	name := fmt.Sprintf("snap-%016x", w.shots[0].Sequence)
	f, err := w.fs.Open(fmt.Sprintf("data/volumes/%s/map/%s", w.cfg.ID, name), vfs.Create)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(make([]byte, 2*cluster), 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	gone := false
	w.fs.SetHook(func(op vfs.Op, file string) error {
		if op == vfs.OpOpen && strings.HasSuffix(file, "/map/"+name) && !gone {
			gone = true
			return w.fs.Remove(file)
		}
		return nil
	})
	view, err := w.vol.OpenSnapshot(t.Context(), w.shots[0].ID)
	if err != nil || !gone {
		t.Fatalf("%v, gone %v", err, gone)
	}
	if err := view.Close(); err != nil {
		t.Fatal(err)
	}
	w.fs.SetHook(nil)
	w.verifyShots()
}
